"""Whatever fails while a checkpoint is written, a whole one is left."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from diffusers_curriculum.training.checkpoint.checkpoints import find_checkpoint
from diffusers_curriculum.training.errors import DiskFullError
from diffusers_curriculum.training.storage.folders import checkpoints, clean_temporary
from diffusers_curriculum.training.storage.manifest import MANIFEST, verify_checkpoint
from tests.training.small_checkpoints import content_of, names, save


class FileOperations:
    """Counts what changes the file system, and misbehaves at the chosen one."""

    def __init__(
        self, at: int = -1, fault: Callable[[], None] = lambda: None, lasting: bool = False
    ) -> None:
        self.at, self.fault, self.lasting = at, fault, lasting
        self.seen: list[str] = []

    def step(self, what: str) -> None:
        self.seen.append(what)
        now = len(self.seen) - 1
        if now == self.at or (self.lasting and now > self.at):
            self.fault()

    def wrap(self, original: Callable[..., Any], what: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            mode = args[1] if len(args) > 1 else kwargs.get("mode", "r")
            if what != "write" or "w" in str(mode):
                self.step(what)
            return original(*args, **kwargs)

        return wrapped


@contextmanager
def watched(operations: FileOperations) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)  # a real one only takes time here
        for name in ("replace", "fsync", "mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, operations.wrap(getattr(os, name), name))
        patch.setattr("builtins.open", operations.wrap(open, "write"))
        yield


def no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt() -> None:
    raise KeyboardInterrupt


def count_operations(tmp_path: Path, prepare: Callable[[Path], None], step: int) -> int:
    root = tmp_path / "count"
    prepare(tmp_path / "before")
    shutil.copytree(tmp_path / "before", root)
    operations = FileOperations()
    with watched(operations):
        save(root, step, limit=1, content="new")
    return len(operations.seen)


def prepare_older(root: Path) -> None:
    save(root, 2, content="old")


def prepare_same(root: Path) -> None:
    save(root, 4, content="old")


def prepare_both(root: Path) -> None:
    prepare_older(root)
    prepare_same(root)


PREPARATIONS = [prepare_older, prepare_same, prepare_both]


def whole_content(root: Path) -> str:
    """Of the newest checkpoint; every checkpoint-* must verify, before and after cleaning up."""
    found = [path for path in root.iterdir() if path.name.startswith("checkpoint-")]
    for folder in found:
        verify_checkpoint(folder)
    clean_temporary(root)
    assert names(root)
    assert all(name.startswith("checkpoint-") for name in names(root))
    newest = find_checkpoint(root, "latest")
    assert newest is not None
    return content_of(newest)


def assert_old_then_new(contents: list[str]) -> None:
    """The later the fault, the further the save had come: old ones first, then only new ones."""
    assert contents == sorted(contents, reverse=True)
    assert set(contents) == {"old", "new"}


@pytest.mark.reliability
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from_then_on"])
@pytest.mark.parametrize("fault", [no_space, interrupt])
@pytest.mark.parametrize("prepare", PREPARATIONS)
def test_save_fault_at_every_operation(
    tmp_path: Path, prepare: Callable[[Path], None], fault: Callable[[], None], lasting: bool
) -> None:
    total, contents = count_operations(tmp_path, prepare, step=4), []
    assert total > 15
    for at in range(1, total):  # 0 makes the output folder, which is there
        root = tmp_path / str(at)
        shutil.copytree(tmp_path / "before", root)
        operations = FileOperations(at, fault, lasting)
        with watched(operations), contextlib.suppress(DiskFullError, KeyboardInterrupt):
            save(root, 4, limit=1, content="new")
        assert len(operations.seen) > at
        if not lasting:  # the process itself, not only the next start, leaves a whole one
            assert checkpoints(root)
        contents.append(whole_content(root))
    assert_old_then_new(contents)


@pytest.mark.reliability
@pytest.mark.parametrize("prepare", PREPARATIONS)
def test_kill_at_every_operation(tmp_path: Path, prepare: Callable[[Path], None]) -> None:
    total, contents = count_operations(tmp_path, prepare, step=4), []
    for at in range(total):
        root = tmp_path / str(at)
        shutil.copytree(tmp_path / "before", root)
        assert killed_while_saving(root, at)
        contents.append(whole_content(root))
    assert_old_then_new(contents)


def killed_while_saving(root: Path, at: int) -> bool:
    """Save in a child process that is killed before file operation number ``at``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside torch's idle threads
        child = os.fork()
    if child == 0:
        try:
            with watched(FileOperations(at, lambda: os.kill(os.getpid(), signal.SIGKILL))):
                save(root, 4, limit=1, content="new")
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_order_is_write_sync_replace_rotate(tmp_path: Path) -> None:
    save(tmp_path, 1)
    operations = FileOperations()
    with watched(operations):
        save(tmp_path, 2, limit=1)
    seen = operations.seen
    last_write = len(seen) - 1 - seen[::-1].index("write")
    publish = seen.index("replace")
    assert seen.count("write") == 4
    # 4 files, 2 folders, then the parent after the new name is there.
    assert [i for i, what in enumerate(seen) if what == "fsync"] == [
        *range(last_write + 1, last_write + 7),
        publish + 1,
    ]
    assert seen[publish + 1 : publish + 3] == ["fsync", "replace"]
    assert "unlink" not in seen[: publish + 3]
    assert names(tmp_path) == ["checkpoint-2"]


def test_the_parent_is_synced_after_the_name_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def recording(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to see which file a descriptor belongs to")
    monkeypatch.setattr(os, "fsync", recording)
    save(tmp_path, 5)
    assert synced[-1] == str(tmp_path.resolve())
    assert {Path(name).name for name in synced[:-1]} >= {MANIFEST, "state.json", "model.bytes"}
