"""`python3 -m megatron_patch.launch LAUNCHER ARGUMENT… [--option …]`: check, plan, then become the planned command.

Modules are imported as late as their stage needs them: a wrong count or value is refused in Python's own start-up time.
"""

import os
import sys

from megatron_patch.launch.launcher import Launcher
from megatron_patch.launch.positional import (
    Request,
    UsageError,
    choose,
    divide,
    numbered,
    read,
    read_flags,
    read_variables,
    typed,
)
from megatron_patch.launch.tables import DRY_RUN, LAUNCHERS


def main(argv: list[str]) -> int:
    """Exit status 2 for what the user can mend; otherwise the planned command's own, because it replaces us."""
    name = argv[0] if argv else ""
    if name not in LAUNCHERS:
        print(f"megatron_patch.launch: {name!r} is no launcher; there are {', '.join(LAUNCHERS)}", file=sys.stderr)
        return 2
    if argv[1:2] in (["-h"], ["--help"]):
        print(_help(LAUNCHERS[name]))
        return 0
    try:
        request = _request(LAUNCHERS[name], argv[1:])
        plan = _plan(LAUNCHERS[name].module, request)
        if not request.is_dry:
            _check_installed()
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    return _start(plan, request.is_dry)


def _help(launcher: Launcher) -> str:
    """Every table: positionals with their numbers, flags with their names."""
    if launcher.is_flags:
        return "\n".join(f"  {arg.name:34}{arg.allowed}" for arg in launcher.tables[0])
    return "\n\n".join(numbered(table, []) for table in launcher.tables)


def _request(launcher: Launcher, argv: list[str]) -> Request:
    if launcher.is_flags:
        table = launcher.tables[0]
        values, options = read_flags(table, argv)
        texts = {}
    else:
        given, options = divide(argv)
        table = choose(launcher.tables, given)
        values, texts = read(table, given), typed(table, given)
    values = {**launcher.implied, **values, **read_variables(launcher.variables, os.environ)}
    is_dry = read_variables((DRY_RUN,), os.environ)[DRY_RUN.name]
    return Request(
        *(table, values, texts, options, os.environ, launcher.families, is_dry),
        *(launcher.format, launcher.flags, launcher.title),
    )


def _plan(module: str, request: Request) -> dict[str, object]:
    from importlib import import_module

    return import_module(f"megatron_patch.launch.{module}").plan(request)


def _check_installed() -> None:
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise UsageError(f"{sys.executable} has no torch; activate the environment that holds requirements.txt")


def _start(plan: dict[str, object], is_dry: bool) -> int:
    """Show `plan`; unless this is a dry run, replace this process by its command."""
    from megatron_patch.plan.table import render

    print(render(plan), file=sys.stderr, flush=True)
    if is_dry:
        import json

        print(json.dumps(plan, indent=2))
        return 0
    os.environ.update(plan["environment"])
    os.execv(plan["command"][0], plan["command"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
