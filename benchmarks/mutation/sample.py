"""The mutants of one run."""

from __future__ import annotations

import random
from collections.abc import Mapping

from benchmarks.mutation.edits import Mutant, is_program, mutants


def drawn(sources: Mapping[str, str], count: int, seed: int) -> tuple[list[Mutant], int]:
    """(``count`` mutants, how many there are to draw from), each with the same chance.

    The first ones of a larger sample are those of a smaller one with the same seed.

    Args:
        sources: the text of each file by its path.
    """
    candidates = [m for path, source in sources.items() for m in mutants(source, path)]
    random.Random(seed).shuffle(candidates)
    sample: list[Mutant] = []
    for mutant in candidates:
        if len(sample) == count:
            break
        if is_program(mutant, sources[mutant.path]):
            sample.append(mutant)
    return sample, len(candidates)
