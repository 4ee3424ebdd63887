"""A plan as text for people."""

import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from megatron_patch.config.model import ModelConfig

INDENT = 2
WIDTH = 120  # of a paragraph
UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
HELD = ("layers", "experts", "embedding", "output_layer")
MOST_ROWS = 32  # of a section that has one line for each rank


def render(plan: Mapping[str, Any]) -> str:
    """Every section of `plan`, one setting per line; then warnings and the command.

    What a model has no use for, and leaves at its default, is in the JSON only; settings nobody chose are a paragraph.
    """
    plan = {**plan, "model": _used(plan.get("model") or {})}
    settings = [section for section in plan.values() if isinstance(section, Mapping) and section]
    width = max((len(key) for section in settings for key in section), default=0)
    lines = []
    for name, section in plan.items():
        if name == "defaults":
            lines += [name, *_paragraph(section)]
        elif isinstance(section, Mapping) and section:
            shown = _memory if name == "memory" else _plain
            lines += [name, *(f"{'':{INDENT}}{key:{width}}  {shown(value)}" for key, value in section.items())]
        elif isinstance(section, list) and section and isinstance(section[0], Mapping):
            rows = section if len(section) <= MOST_ROWS else _together(section)
            lines += [name, *(" " * INDENT + line for line in _rows(rows))]
    lines += [f"warning: {warning}" for warning in plan["warnings"]]
    return "\n".join([*lines, "command", " " * INDENT + shlex.join(plan["command"])])


def _used(model: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {field.name: field.default for field in fields(ModelConfig)}
    return {key: value for key, value in model.items() if key not in defaults or value != defaults[key]}


def _paragraph(section: Mapping[str, Any]) -> list[str]:
    text = ", ".join(f"{key} {value if type(value) is int else _plain(value)}" for key, value in section.items())
    indent = " " * INDENT
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _together(ranks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for ranks that follow each other and hold the same, without their places on the axes."""
    shown = [{key: row[key] for key in HELD if key in row} for row in ranks]
    rows: list[dict[str, Any]] = []
    for number, held in enumerate(shown):
        if rows and rows[-1] == {"rank": rows[-1]["rank"]} | held:
            rows[-1]["rank"] = f"{rows[-1]['rank'].split('–')[0]}–{number}"
        else:
            rows.append({"rank": str(number)} | held)
    return rows


def _rows(section: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table with a column for each key, as long as people read."""
    cells = [list(section[0]), *([_plain(value) for value in row.values()] for row in section[:MOST_ROWS])]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    left = len(section) - MOST_ROWS
    return lines + ([f"and {left} more"] if left > 0 else [])


def _memory(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(value) or "–"
    is_bytes = isinstance(value, int) and not isinstance(value, bool)
    return in_units(value) if is_bytes else _plain(value)


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(one)}" for name, one in value.items()) or "–"
    return f"{value:,}" if isinstance(value, int) else str(value)


def in_units(value: int | None) -> str:
    """A number of bytes as people read it: `3.2 GiB`."""
    if value is None:
        return "unknown"
    unit, name = next(((size, name) for size, name in UNITS if value >= size), (1, "bytes"))
    return f"{value / unit:.4g} {name}"
