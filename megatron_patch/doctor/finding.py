"""One thing that was looked at: what was found, and what it costs where it is not as it should be."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

OK, LACKS = "ok", "lacks"


@dataclass(frozen=True)
class Finding:
    """`section` and `name` say what was looked at; `cost` is empty where all is well."""

    section: str
    name: str
    found: str
    cost: str = ""

    @property
    def state(self) -> str:
        """`ok`, or `lacks`."""
        return LACKS if self.cost else OK


def looked_at(section: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of `look`, or that it could not be done: a doctor does not fall ill himself."""
    try:
        yield from look()
    except Exception as error:  # whatever a machine may raise, the other looks are worth having
        words = next(iter(str(error).splitlines()), "")
        yield Finding(section, "", f"{type(error).__name__}: {words}", f"what there is of {section} is unknown")
