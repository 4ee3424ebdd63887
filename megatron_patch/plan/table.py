"""A plan as text for people."""

import shlex
from collections.abc import Mapping
from typing import Any

INDENT = 2
UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def render(plan: Mapping[str, Any]) -> str:
    """Every section of `plan`, one setting per line; then warnings and the command."""
    sections = {name: section for name, section in plan.items() if isinstance(section, Mapping) and section}
    width = max(len(key) for section in sections.values() for key in section)
    lines = []
    for name, section in sections.items():
        shown = in_units if name == "memory" else _plain
        lines += [name, *(f"{'':{INDENT}}{key:{width}}  {shown(value)}" for key, value in section.items())]
    lines += [f"warning: {warning}" for warning in plan["warnings"]]
    return "\n".join([*lines, "command", " " * INDENT + shlex.join(plan["command"])])


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def in_units(value: int | None) -> str:
    """A number of bytes as people read it: `3.2 GiB`."""
    if value is None:
        return "unknown"
    unit, name = next(((size, name) for size, name in UNITS if value >= size), (1, "bytes"))
    return f"{value / unit:.4g} {name}"
