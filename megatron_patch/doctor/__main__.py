"""`python3 -m megatron_patch.doctor [DIRECTORY] [--json]`: what this machine has, what it lacks and what that costs."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_patch.doctor.collectives import collectives
from megatron_patch.doctor.devices import attention, devices, float8
from megatron_patch.doctor.finding import LACKS, Finding, looked_at
from megatron_patch.doctor.host import disk, host, limits
from megatron_patch.doctor.versions import versions


def main(argv: Sequence[str]) -> int:
    """0 whatever is found: findings are no failure. 2 for a directory that is not there."""
    reader = argparse.ArgumentParser(
        prog="megatron_patch.doctor", description=__doc__.split(": ")[1], allow_abbrev=False
    )
    reader.add_argument("directory", nargs="?", default=".", help="where runs would write; its disk is tried")
    reader.add_argument("--json", action="store_true", help="one JSON object on standard output, no table")
    options = reader.parse_args(argv)
    directory = Path(options.directory)
    if not _is_directory(directory):
        print(f"megatron_patch.doctor: {options.directory!r} is no directory; name one that is there", file=sys.stderr)
        return 2
    findings = examine(directory)
    print(as_json(findings) if options.json else table(findings))
    return 0


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that no file system has room for
        return False


def examine(directory: Path) -> list[Finding]:
    """Everything that can be looked at; `directory` is where a run would write."""
    looks = {
        "versions": versions,
        "devices": devices,
        "attention": attention,
        "fp8": float8,
        "collectives": collectives,
        "host": host,
        "disk": lambda: disk(directory),
        "limits": limits,
    }
    return [finding for section, look in looks.items() for finding in looked_at(section, look)]


def as_json(findings: Sequence[Finding]) -> str:
    """`findings` in order, and how many lack something."""
    rows = [asdict(finding) | {"state": finding.state} for finding in findings]
    return json.dumps({"findings": rows, "lacking": sum(row["state"] == LACKS for row in rows)}, indent=2)


def table(findings: Sequence[Finding]) -> str:
    """A line for each thing, and under it what its lack costs."""
    width = max(len(finding.name) for finding in findings)
    lines, section = [], ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines.append(section)
        lines.append(f"  {finding.state:5}  {finding.name:{width}}  {finding.found}".rstrip())
        if finding.cost:
            lines.append(f"         {'':{width}}  → {finding.cost}")
    lacking = sum(finding.state == LACKS for finding in findings)
    return "\n".join([*lines, f"{len(findings)} things were looked at, {lacking} are lacking"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
