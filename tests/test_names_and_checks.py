"""The one way to register and refuse a name, and the one way to say "out of range"."""

from __future__ import annotations

import ast
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from diffusers_curriculum import catalogue, checks
from diffusers_curriculum.catalogue import Catalogue
from diffusers_curriculum.clustering import CLUSTERINGS
from diffusers_curriculum.densities import DENSITIES
from diffusers_curriculum.pacing import PACINGS
from diffusers_curriculum.randomness import DRAWS
from diffusers_curriculum.samplers import SAMPLERS
from diffusers_curriculum.weighting import WEIGHTINGS
from diffusers_curriculum.weighting.learned import LEARNED_WEIGHTINGS
from tests.structure.layout import imported_modules

ALL = (DENSITIES, WEIGHTINGS, LEARNED_WEIGHTINGS, SAMPLERS, DRAWS, PACINGS, CLUSTERINGS)


# -- catalogue -------------------------------------------------------------------------------------


def fruit() -> Catalogue[Any]:
    made: Catalogue[Any] = Catalogue("fruit", reserved=("none",))
    made.register("apple", formula="C6", source="a tree", note="red", example={"size": 2})(str)
    made.register("pear", families="vp", whole_schedule=True)(int)
    return made


def test_what_is_registered_is_found_with_all_that_is_told() -> None:
    fruits = fruit()
    assert fruits["apple"] is fruits.look_up("apple") is str
    assert (list(fruits), len(fruits), "apple" in fruits, "none" in fruits) == (
        ["apple", "pear"],
        2,
        True,
        False,
    )
    apple, pear = fruits.entries
    assert apple == fruits.entry("apple")
    assert dataclasses.astuple(apple) == (
        *("apple", str, "C6", "a tree", "all", "red", {"size": 2}),
        False,
    )
    assert (pear.families, pear.whole_schedule, pear.example) == ("vp", True, {})
    assert fruits.name_of(int) == "pear"
    assert fruits.name_of(float) == "float"


def test_the_decorator_hands_the_thing_back() -> None:
    fruits = fruit()

    @fruits.register("plum")
    class Plum:
        pass

    assert fruits["plum"] is Plum
    with pytest.raises(TypeError, match="formulla"):
        fruits.register("fig", formulla="C6")(Plum)


@pytest.mark.parametrize("name", ["apple", "none"])
def test_a_taken_name_is_refused_until_it_is_removed(name: str) -> None:
    fruits = fruit()
    with pytest.raises(ValueError, match=f"a fruit named '{name}' exists already: choose another"):
        fruits.register(name)(float)
    assert fruits["apple"] is str
    fruits.remove("apple")
    assert list(fruits) == ["pear"]
    fruits.register("apple")(float)
    assert fruits["apple"] is float


@pytest.mark.parametrize(
    ("name", "hint"),
    [("appel", " (is 'apple' meant?)"), ("nine", " (is 'none' meant?)"), ("zzz", ""), ([1], "")],
)
def test_an_unknown_name_is_refused_with_the_known_ones_and_a_suggestion(
    name: Any, hint: str
) -> None:
    for ask in (fruit().look_up, fruit().entry):
        with pytest.raises(ValueError, match="unknown") as caught:
            ask(name)
        told = f"fruit {name!r} is unknown: choose from none, apple, pear{hint}."
        assert str(caught.value) == told


@pytest.mark.parametrize("each", ALL, ids=lambda c: c.what)
def test_every_catalogue_of_the_package_is_one_and_tells_its_formulas(each: Any) -> None:
    assert type(each) is Catalogue
    own = [e for e in each.entries if e.make.__module__.startswith("diffusers_curriculum.")]
    assert own
    for entry in own:
        assert entry.formula
        assert each.name_of(entry.make) == entry.name
    with pytest.raises(ValueError, match=f"{each.what} 'nothing' is unknown: choose from "):
        each.look_up("nothing")


def test_names_and_checks_need_no_torch() -> None:
    """Nor anything else that is slow: the command line names things before it loads a model."""
    for module in (catalogue, checks):
        tree = ast.parse(Path(str(module.__file__)).read_text("utf-8"))
        roots = {name.partition(".")[0] for _, name in imported_modules(tree)}
        assert roots <= {
            *(
                "__future__",
                "collections",
                "contextlib",
                "dataclasses",
                "difflib",
                "importlib",
                "inspect",
                "math",
                "typing",
            ),
            "diffusers_curriculum",
        }
        own = {n for _, n in imported_modules(tree) if n.startswith("diffusers_curriculum")}
        assert own <= {"diffusers_curriculum.checks.refuse"}


# -- checks ----------------------------------------------------------------------------------------

HUGE = 10**400


@pytest.mark.parametrize(
    ("check", "bounds", "good", "bad", "message"),
    [
        (
            *(checks.finite, (), (0, -1.5, 10**300)),
            (math.nan, math.inf, HUGE, True, "1", None),
            "is not a finite number",
        ),
        (checks.above_zero, (), (1e-300, 5), (0, -0.0, -1), "must be greater than 0"),
        (checks.above_zero, (), (1,), (math.inf, False), "is not a finite number"),
        (checks.not_negative, (), (0, 0.0, 3.5), (-1e-300,), "must be 0 or more"),
        (checks.not_negative, (), (), (math.nan, "0"), "is not a finite number"),
        (checks.whole, (), (0, 7), (-1, 1.0, True, "1", None), "whole number of at least 0"),
        (checks.whole, (3,), (3, 4), (2,), "whole number of at least 3"),
        (checks.whole, (1, 5), (1, 5), (0, 6, 2.5), "whole number from 1 to 5"),
        (checks.inside, (0, 1), (0, 1, 0.5), (-0.1, 1.1, math.nan, True), r"lie in \[0, 1\]"),
        (checks.inside, (0, 1, "[)"), (0, 0.999), (1, 1.0, -1), r"lie in \[0, 1\)"),
        (checks.inside, (0, 1, "(]"), (1, 0.001), (0, 2), r"lie in \(0, 1\]"),
        (checks.inside, (-1.5, 2, "()"), (-1.4, 1.9), (-1.5, 2), r"lie in \(-1.5, 2\)"),
        (checks.one_of, (("red", "blue"),), ("red",), ("green", None, ["red"]), "red, blue"),
        (checks.flag, (), (True, False), (0, 1, "true", None), "must be true or false"),
    ],
)
def test_what_passes_and_what_is_refused(
    check: Any, bounds: Any, good: Any, bad: Any, message: str
) -> None:
    for value in good:
        check("it", value, *bounds)
    for value in bad:
        with pytest.raises(ValueError, match=rf"^it=.*{message}") as caught:
            check("it", value, *bounds)
        assert repr(value) in str(caught.value)


def test_a_wrong_choice_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"^it='blu' is unknown: choose from a, blue \(is 'blue' "):
        checks.one_of("it", "blu", (name for name in ("a", "blue")))


@dataclasses.dataclass(frozen=True)
class Settings:
    rate: float = checks.checked(checks.inside, 0, 1, "[)", default=0.5)
    steps: int | None = checks.checked(checks.whole, 1, default=None)
    free: str = "anything"
    own: Any = checks.checked(None, default=0)

    def __post_init__(self) -> None:
        checks.check_fields(self)


def test_fields_are_checked_when_they_are_given() -> None:
    assert Settings() == Settings(0.5, None)
    Settings(rate=0, steps=1, own="x")
    wrongs: list[tuple[dict[str, Any], str]] = [
        ({"rate": 1}, r"rate=1 must lie in \[0, 1\)"),
        ({"rate": None}, r"rate=None must lie in"),
        ({"steps": 0}, r"steps=0 must be a whole number of at least 1"),
    ]
    for wrong, message in wrongs:
        with pytest.raises(ValueError, match=message):
            Settings(**wrong)


def test_fields_without_a_check_get_the_one_for_the_others() -> None:
    with pytest.raises(ValueError, match="free='anything' is not a finite number"):
        checks.check_fields(Settings(own="still free"), otherwise=checks.finite)
