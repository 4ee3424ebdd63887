"""The documented command lines of every launcher, and the script that each launcher is started by."""

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from commands import ROOT, clean_environment

CALL = re.compile(r'megatron_patch\.launch(?: |", ")([\w-]+)')


def scripts() -> Mapping[str, Path]:
    """Launcher → the first script that starts it."""
    files = sorted(path for folder in ("examples", "toolkits") for path in (ROOT / folder).rglob("*.[sp][hy]"))
    calls = [(CALL.search(path.read_text()), path) for path in reversed(files)]
    return {call[1]: path for call, path in calls if call}


def documented_lines(folder: Path) -> Mapping[str, list[list[str]]]:
    """Launcher → the arguments that it is given by each command of the documents; `folder` gets a stand-in for Python.

    What the shell makes of a block, and a script of its own variables, is what the stand-in is given.
    """
    for name in ("python", "python3"):
        (folder / name).write_text('#!/bin/sh\nprintf "%s\\0" "$@"\nprintf "\\1"\n')
        (folder / name).chmod(0o755)
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/commands.md").read_text(), re.DOTALL)
    told = subprocess.run(
        ["sh", "-c", "\n".join(f"({block})" for block in blocks)],
        cwd=ROOT,
        env=clean_environment(PATH=f"{folder}{os.pathsep}{os.environ['PATH']}"),
        capture_output=True,
        text=True,
    ).stdout
    lines: dict[str, list[list[str]]] = {}
    for command in told.split("\1")[:-1]:
        words = command.split("\0")[:-1]
        if words[:2] == ["-m", "megatron_patch.launch"]:
            lines.setdefault(words[2], []).append(words[3:])
        elif words[0] != "-m" and (call := CALL.search((ROOT / words[0]).read_text())):
            lines.setdefault(call[1], []).append(words[1:])
    return lines
