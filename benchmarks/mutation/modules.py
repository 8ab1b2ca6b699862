"""Which modules are mutated, and which tests belong to each, the likeliest to notice first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

PACKAGE = "diffusers_curriculum"
FOLDERS = ("densities", "weighting", "samplers", "drop_in")
FILES = (
    "catalogue",
    "checks",
    "noise_levels",
    "randomness",
    "clustering",
    "pacing",
    "objective",
    "average_velocity",
    "inference_spacing",
)
CURRICULUM, ADAPTIVE = "tests/samplers/test_curriculum.py", "tests/samplers/test_adaptive*.py"
# tests of a module that stand under another name than its own
OWN: dict[str, Sequence[str]] = {
    "catalogue": ("tests/test_names_and_checks.py", "tests/densities/test_catalogue.py"),
    "checks": ("tests/test_names_and_checks.py",),
    "densities/nested": ("tests/densities/test_combined.py",),
    "weighting/learned": ("tests/weighting/test_learned.py",),
    "densities/curve": ("tests/densities/test_points.py",),
    "densities/time_fraction": ("tests/densities/test_time_laws.py",),
    "densities/laws": ("tests/test_densities.py",),
    "densities/base": ("tests/test_densities.py", "tests/densities/test_catalogue.py"),
    "samplers/composition": ("tests/samplers/test_base.py", "tests/samplers/test_continuous.py"),
    "samplers/description": ("tests/samplers/test_base.py",),
    "samplers/stages": (CURRICULUM,),
    "samplers/information": ("tests/samplers/test_adaptive_laws.py", ADAPTIVE),
    "samplers/gradient": ("tests/samplers/test_adaptive_gradients.py", ADAPTIVE),
    "samplers/statistics": ("tests/samplers/test_adaptive_statistics.py", ADAPTIVE),
    "samplers/loss_based": (ADAPTIVE,),
    "noise_levels": ("tests/samplers/test_continuous.py",),
    "drop_in/binding": ("tests/drop_in/test_density.py",),
    "drop_in/names": ("tests/drop_in/test_density.py", "tests/drop_in/test_weights_and_snr.py"),
}
STATISTICS = ("tests/statistics/test_catalogue_fit.py", "tests/statistics/test_goodness_of_fit.py")
GOLDEN = "tests/golden"
AROUND: dict[str, Sequence[str]] = {
    "densities": ("tests/densities", "tests/test_densities.py", GOLDEN, *STATISTICS),
    "weighting": ("tests/weighting", "tests/test_objective.py"),
    "samplers": ("tests/samplers", GOLDEN, "tests/statistics/test_unbiasedness.py"),
    "drop_in": ("tests/drop_in",),
    "noise_levels": ("tests/test_objective.py", "tests/drop_in/test_weights_and_snr.py", GOLDEN),
    "randomness": (GOLDEN, *STATISTICS),
    "clustering": (CURRICULUM, GOLDEN),
    "pacing": (CURRICULUM, GOLDEN),
    "objective": ("tests/test_exactness.py", "tests/weighting"),
    "weighting/variational": ("tests/weighting/test_variational.py",),
    "inference_spacing": ("tests/test_cli_preview.py",),
}


def modules(root: Path, wanted: Sequence[str] = ()) -> list[str]:
    """The modules of floors 0 to 2 below the package, "densities/laws"; all without ``wanted``.

    Raises:
        ValueError: something wanted is neither one of them nor a folder of them.
    """
    folder = root / PACKAGE
    found = [file for name in FOLDERS for file in sorted((folder / name).glob("*.py"))]
    names = [*FILES, *(str(file.relative_to(folder).with_suffix("")) for file in found)]
    known = {*names, *FOLDERS}
    for name in wanted:
        if name not in known:
            raise ValueError(f"no module {name!r} to mutate: choose from {', '.join(names)}.")
    return [n for n in names if not wanted or n in wanted or n.split("/")[0] in wanted]


def tests_of(module: str, root: Path) -> list[str]:
    """The test files of a module, relative to the root, each once."""
    first, _, last = module.partition("/")
    named = f"tests/{first}/test_{last}.py" if last else f"tests/test_{first}.py"
    survivors = f"tests/mutants/test_survivors_{first}.py"
    files = [
        str(file.relative_to(root))
        for pattern in [named, *OWN.get(module, ()), survivors, *AROUND.get(first, ())]
        for place in sorted(root.glob(pattern))
        for file in (sorted(place.rglob("test_*.py")) if place.is_dir() else [place])
    ]
    return list(dict.fromkeys(files))
