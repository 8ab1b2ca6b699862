"""Whether torch and accelerate have FSDP2: the oldest versions that are allowed do not."""

from __future__ import annotations

from inspect import signature

import pytest
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule

_THERE = hasattr(FSDPModule, "set_reshard_after_forward")
_THERE &= "fsdp_version" in signature(FullyShardedDataParallelPlugin).parameters

needs_fsdp2 = pytest.mark.skipif(not _THERE, reason="torch or accelerate is too old for FSDP2")
