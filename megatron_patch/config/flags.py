"""The flags of a run: derived from the config dataclasses, so that a setting is declared once."""

import argparse
import difflib
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from typing import Any

from megatron_patch.config.run import RunConfig

PROGRAM, USAGE = "megatron_patch.train", "%(prog)s --flag value … (--help lists them)"


def parser() -> argparse.ArgumentParser:
    """A parser with one group per concern; every setting of `RunConfig` is a flag."""
    result = argparse.ArgumentParser(prog=PROGRAM, usage=USAGE, allow_abbrev=False)
    for owner, concern in _concerns():
        group, hints = result.add_argument_group(concern or "run"), typing.get_type_hints(owner)
        for item in _settings(owner):
            _add(group, item, hints[item.name])
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


def updated(run: RunConfig, argv: list[str]) -> RunConfig:
    """`run` with the flags in `argv` in place of its settings; ends the program as `from_flags` does."""
    given = {text.split("=")[0] for text in argv if text.startswith("--")}
    reader = argparse.ArgumentParser(prog=PROGRAM, usage=USAGE, allow_abbrev=False)
    wanted = {owner: [item for item in _settings(owner) if given & set(_spellings(item))] for owner, _ in _concerns()}
    for owner, items in wanted.items():
        hints = typing.get_type_hints(owner) if items else {}
        for item in items:
            _add(reader, item, hints[item.name], is_update=True)
    namespace, unknown = reader.parse_known_args(argv)
    if unknown:
        reader.error(unknown_flag(unknown[0], known_flags()))
    for owner, concern in _concerns():
        values = {item.name: getattr(namespace, item.name) for item in wanted[owner]}
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        if values:
            run = replace(run, **({concern: replace(getattr(run, concern), **values)} if concern else values))
    return run


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


def _spellings(item: Field) -> tuple[str, str]:
    return flag(item.name), flag(f"no_{item.name}")


def _settings(owner: type) -> list[Field]:
    return [item for item in fields(owner) if "help" in item.metadata]


def _add(group: argparse._ActionsContainer, item: Field, hint: Any, *, is_update: bool = False) -> None:
    required = item.default is MISSING and not is_update
    options: dict[str, Any] = {"help": item.metadata["help"], "required": required, "dest": item.name}
    if not required:
        options["default"] = argparse.SUPPRESS if is_update else item.default
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
