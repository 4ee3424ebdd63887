"""What a positional's text may be: parsers that return a value or raise ValueError."""

from collections.abc import Callable, Mapping

LARGEST_EXACT_FLOAT = 2**53
LARGEST = 2**63 - 1
WHOLE, COUNT, SWITCH = "a whole number ≥ 0", "a whole number ≥ 1", "true or false"
RATE = "a number from 0 to 1"


def whole(text: str) -> int:
    """A whole number ≥ 0; `10_000` and `1e9` are numbers too, and digits of other scripts are not."""
    if not text.isascii():
        raise ValueError(f"{text} is not a number")
    try:
        value = int(text)
    except ValueError:
        real = float(text)
        if not real.is_integer() or real > LARGEST_EXACT_FLOAT:
            raise ValueError(f"{text} is not a whole number") from None
        value = int(real)
    if not 0 <= value <= LARGEST:
        raise ValueError(f"{text} is negative, or beyond what is counted in 64 bits")
    return value


def count(text: str) -> int:
    """A whole number ≥ 1."""
    value = whole(text)
    if value < 1:
        raise ValueError(f"{text} is less than 1")
    return value


def rate(text: str) -> float:
    """A number from 0 to 1: no learning rate is higher, and what is higher belongs to another argument."""
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(f"{text} is not from 0 to 1")
    return value


def above_zero(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not text.isascii() or not 0 < value < float("inf"):
        raise ValueError(f"{text} is not above 0")
    return value


def share(text: str) -> float:
    """A number above 0, at most 1."""
    return rate(str(above_zero(text)))


def nothing(text: str) -> float:
    """Zero, however it is written."""
    if float(text) != 0:
        raise ValueError(f"{text} is not 0")
    return 0.0


def switch(text: str) -> bool:
    """`true` or `false`, in any case."""
    lowered = text.lower()
    if lowered not in ("true", "false"):
        raise ValueError(f"{text} is neither true nor false")
    return lowered == "true"


def on_or_off(text: str) -> bool:
    """A switch that the environment spells 1 or 0, and people also spell true or false."""
    return {"1": True, "0": False, "": False}[text] if text in ("1", "0", "") else switch(text)


def one_of(*names: str) -> Callable[[str], str]:
    """One of `names`, in any case; the value is the spelling in `names`."""

    def parse(text: str) -> str:
        for name in names:
            if text.lower() == name.lower():
                return name
        raise ValueError(f"{text} is not one of {', '.join(names)}")

    return parse


def recomputation(text: str) -> str:
    """AC: `false`, which documents use, is `none`."""
    value = one_of("sel", "full", "offload", "none", "false")(text)
    return "none" if value == "false" else value


def offloading(text: str) -> str | float:
    """OPTIMIZER_OFFLOAD: a policy, or a share above 0 and at most 1 of the layers. 0 is `false`."""
    try:
        share = float(text)
    except ValueError:
        return one_of("false", "static", "auto")(text)
    if not 0 <= share <= 1:
        raise ValueError(f"{text} is not a share")
    return share or "false"


def keys(text: str) -> list[str]:
    """Names separated by spaces or commas, at least one, and none that would pass for an option."""
    names = text.replace(",", " ").split()
    if not names or any(name.startswith("-") for name in names):
        raise ValueError("no key, or an option")
    return names


def lines(text: str) -> list[str]:
    """One value on each line, none of them empty."""
    return [words(line) for line in text.split("\n")]


def words(text: str) -> str:
    """Text that is not empty, as typed. With a hyphen in front it would pass for an option (`./-name` does not)."""
    if not text.strip() or text.startswith("-"):
        raise ValueError("empty, or an option")
    return text


def optional(parse: Callable[[str], object]) -> Callable[[str], object]:
    """`parse`, or None for an empty text: nothing was said."""
    return lambda text: parse(text) if text else None


def named(sizes: Mapping[str, str]) -> Callable[[str], str]:
    """A model name such as `mistral-7b`, in any case; the value is its size. A name that ends in `*` is a prefix."""

    def parse(text: str) -> str:
        for name, size in sizes.items():
            lowered = text.lower()
            if lowered == name or (name.endswith("*") and lowered.startswith(name[:-1])):
                return size
        raise ValueError(f"{text} is not one of {', '.join(sizes)}")

    return parse
