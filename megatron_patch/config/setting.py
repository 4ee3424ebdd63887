"""One setting: a dataclass field that carries its own help text, and through it a command-line flag."""

from dataclasses import MISSING, field
from typing import Any


def setting(help: str, default: Any = MISSING, *, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field whose flag is `--its-name`; without `default` the flag is required."""
    return field(default=default, metadata={"help": help, "choices": choices})
