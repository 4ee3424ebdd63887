"""Documented values whose capability is not built yet. The work that builds one deletes its line."""

from collections.abc import Callable, Mapping

from megatron_patch.launch.positional import UsageError

# argument, is this value beyond what is built?, the capability, what to use instead
Line = tuple[str, Callable[[Mapping[str, object]], bool], str, str]


def check_built(lines: tuple[Line, ...], values: Mapping[str, object], where: Callable[[str], str]) -> None:
    """Raise UsageError naming every value that a later version will accept; lines of absent names do not apply.

    `where` turns a name into how the user wrote it: `argument 11 (PP)`.
    """
    refused = [
        f"{where(name)} is {_spelled(values[name])}: {what} is not built yet; use {instead}"
        for name, is_beyond, what, instead in lines
        if name in values and is_beyond(values)
    ]
    if refused:
        raise UsageError("\n".join(refused))


def _spelled(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
