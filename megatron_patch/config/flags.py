"""The flags of a run: derived from the config dataclasses, so that a setting is declared once."""

import argparse
import difflib
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from megatron_patch.config.run import RunConfig


def parser() -> argparse.ArgumentParser:
    """A parser with one group per concern; every setting of `RunConfig` is a flag."""
    result = argparse.ArgumentParser(
        prog="megatron_patch.train", usage="%(prog)s --flag value … (--help lists them)", allow_abbrev=False
    )
    for owner, concern in _concerns():
        group = result.add_argument_group(concern or "run")
        for item in _settings(owner):
            _add(group, item, typing.get_type_hints(owner)[item.name])
    return result


def from_flags(argv: list[str]) -> RunConfig:
    """Parse `argv`; unknown flags end the program with the nearest known name (exit 2)."""
    reader = parser()
    namespace, unknown = reader.parse_known_args(argv)
    if unknown:
        reader.error(unknown_flag(unknown[0], known_flags()))
    concerns: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for owner, concern in _concerns():
        values = {item.name: getattr(namespace, item.name) for item in _settings(owner)}
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        if concern:
            concerns[concern] = owner(**values)
        else:
            rest = values
    return RunConfig(**concerns, **rest)


def to_flags(run: RunConfig) -> list[str]:
    """The flags that `from_flags` turns back into `run`."""
    argv: list[str] = []
    for owner, concern in _concerns():
        values = getattr(run, concern) if concern else run
        for item in _settings(owner):
            argv += _words(flag(item.name), getattr(values, item.name))
    return argv


def flag(name: str) -> str:
    """`seq_length` → `--seq-length`."""
    return "--" + name.replace("_", "-")


def known_flags() -> list[str]:
    """Every flag, in declaration order."""
    return [flag(item.name) for owner, _ in _concerns() for item in _settings(owner)]


def unknown_flag(text: str, known: list[str]) -> str:
    """One sentence about a flag nobody declared, with the nearest that is `known`."""
    near = difflib.get_close_matches(text.split("=")[0], known, n=1)
    return f"unknown option {text!r}" + (f"; did you mean {near[0]}?" if near else "")


def _concerns() -> Iterator[tuple[type, str]]:
    hints = typing.get_type_hints(RunConfig)
    for item in fields(RunConfig):
        if is_dataclass(hints[item.name]):
            yield hints[item.name], item.name
    yield RunConfig, ""


def _settings(owner: type) -> list[Field]:
    return [item for item in fields(owner) if "help" in item.metadata]


def _add(group: argparse._ArgumentGroup, item: Field, hint: Any) -> None:
    required = item.default is MISSING
    options: dict[str, Any] = {"help": item.metadata["help"], "required": required, "dest": item.name}
    if not required:
        options["default"] = item.default
    if hint is bool:
        group.add_argument(flag(item.name), action=argparse.BooleanOptionalAction, **options)
        return
    if typing.get_origin(hint) is tuple:
        options["nargs"] = "+"
    if item.metadata["choices"]:
        options["choices"] = item.metadata["choices"]
    group.add_argument(flag(item.name), type=_scalar(hint), metavar=item.name.rsplit("_", 1)[-1].upper(), **options)


def _scalar(hint: Any) -> type:
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0]
    return hint


def _words(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, bool):
        return [name if value else name.replace("--", "--no-", 1)]
    if isinstance(value, tuple):
        return [name, *value]
    return [name, repr(value) if isinstance(value, float) else str(value)]
