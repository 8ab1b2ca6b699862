"""The one way to register, look up and refuse a name: of densities, weightings, samplers, ..."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from diffusers_curriculum.checks import refuse

Kind = TypeVar("Kind")
Made = TypeVar("Made")
# Where an installed package says which names it registers, as NAME = "module" or "module:object".
GROUPS = tuple(f"diffusers_curriculum.{what}" for what in ("densities", "weightings", "samplers"))


@dataclass(frozen=True)
class Entry(Generic[Kind]):
    """One entry of a catalogue, as it stands in the table of the docs.

    Attributes:
        name: under which it is asked for.
        make: the class or function behind the name.
        formula: in ASCII; l is the log-SNR, S = exp(l), t the time fraction (0 = clean).
        source: paper and equation, or the code base that made it known.
        families: schedules it is meant for: "all", or some of "vp", "flow", "edm".
        note: what a user should know besides, empty for most.
        example: parameters of a telling instance, for the gallery and for tests; needed where a
            parameter has no default.
        whole_schedule: whether it means nothing for single noise levels, as what it says of one
            depends on those beside it.
    """

    name: str
    make: Kind
    formula: str = ""
    source: str = ""
    families: str = "all"
    note: str = ""
    example: dict[str, Any] = field(default_factory=dict)
    whole_schedule: bool = False


class Catalogue(Mapping[str, Kind]):
    """Names, and the class or function behind each, in the order in which they were registered.

    Args:
        what: it is a catalogue of, for messages: "density".
        reserved: names that are known, and stand for nothing that could be looked up.
        group: of entry points; the one of an unknown name is imported when it is asked for.
    """

    def __init__(self, what: str, reserved: Iterable[str] = (), group: str = "") -> None:
        self.what, self.reserved, self.group = what, tuple(reserved), group
        self._entries: dict[str, Entry[Kind]] = {}

    def register(self, name: str, **told: Any) -> Callable[[Made], Made]:
        """Decorator: make a class or function available under ``name``, with its formula and
        source, said here once, at the end of its docstring.

        Args:
            told: what the catalogue says of it, see :class:`Entry`.

        Raises:
            ValueError: the name is taken.
        """

        def add(make: Any) -> Any:
            if name in self._entries or name in self.reserved:
                raise ValueError(
                    f"a {self.what} named {name!r} exists already: choose another name, or "
                    "remove() it first."
                )
            entry = self._entries[name] = Entry(name, make, **told)
            texts = (make.__doc__, entry.formula and f"    {entry.formula}", entry.source)
            with suppress(AttributeError, TypeError):  # what is built in keeps its own
                make.__doc__ = "\n\n".join(text for text in texts if text)
            return make

        return add

    def remove(self, name: str) -> None:
        """Forget ``name``, so that a notebook's cell may register it again."""
        del self._entries[name]

    def look_up(self, name: Any) -> Kind:
        """What is registered as ``name``; errors as of :meth:`entry`."""
        return self.entry(name).make

    def entry(self, name: Any) -> Entry[Kind]:
        """Everything that is told of ``name``.

        Raises:
            ValueError: unknown name; the message lists the known ones, and the one most like it.
                Or an installed package that is broken.
        """
        if name not in self:
            refuse(f"{self.what} {name!r}", name, (*self.reserved, *self._entries))
        return self._entries[name]

    def import_installed(self, name: str | None = None) -> None:
        """Import what installed packages register, all of it or one ``name``.

        Raises:
            ValueError: it cannot be imported, or does not register what its entry point says.
        """
        chosen: dict[str, Any] = {} if name is None else {"name": name}
        for point in entry_points(group=self.group, **chosen) if self.group else ():
            if point.name not in self._entries:
                self._import(point)

    def _import(self, point: EntryPoint) -> None:
        package = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
        try:
            point.load()
        except Exception as error:  # whatever the code of others raises
            raise ValueError(
                f"{self.what} {point.name!r} of the installed package {package} cannot be imported "
                f"({type(error).__name__}: {error}): mend the package or uninstall it."
            ) from error
        if point.name not in self._entries:
            raise ValueError(
                f"the installed package {package} registers no {self.what} {point.name!r}, which "
                f"its entry point {point.value!r} promises: mend the package or uninstall it."
            )

    def check_parameters(self, name: str, given: Iterable[str], known: Iterable[str]) -> None:
        """Raise a ValueError for parameters of ``name`` that are not ``known``, which it lists."""
        names = tuple(known)
        for parameter in sorted(set(given) - set(names)):
            takes = f"it takes {', '.join(names) or 'none'}"
            raise ValueError(f"{self.what} {name!r} has no parameter {parameter!r}: {takes}.")

    @property
    def entries(self) -> tuple[Entry[Kind], ...]:
        """Everything that is told of each name."""
        return tuple(self._entries.values())

    def name_of(self, make: Any) -> str:
        """The name of a class or function; its own where it is not registered."""
        return next((e.name for e in self.entries if e.make is make), make.__name__)

    def __getitem__(self, name: str) -> Kind:
        if not isinstance(name, str):
            raise KeyError(name)
        if name not in self._entries and name not in self.reserved:
            self.import_installed(name)
        return self._entries[name].make

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
