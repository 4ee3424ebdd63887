"""Wrong command lines for what does not train: converters, dataset tools, and the scripts that people edit."""

import json
import random
import re
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest
from commands import clean_environment
from documented import documented_lines, scripts
from mutations import (
    ABOVE_ZERO,
    COUNT,
    LINES,
    MAYBE,
    OF_CHECKPOINTS,
    OF_CONVERTERS,
    OF_DATASETS,
    OF_PREPROCESSING,
    OF_SCRIPTS,
    PATH,
    RATE,
    SWITCH,
    WHOLE,
    Flags,
    Line,
    mutations,
)
from test_mutations import IN_PROCESS, PER_SHELL, SEED, SHELLS, check_refusal

from megatron_patch.launch.__main__ import main
from megatron_patch.launch.positional import IGNORED, Several, Switch
from megatron_patch.launch.tables import LAUNCHERS

KINDS_OF = {
    "conversion": OF_CONVERTERS,
    **dict.fromkeys(("preprocessing", "sft_preprocessing"), OF_PREPROCESSING),
    **dict.fromkeys(("modellink", "mixtral_export"), OF_CHECKPOINTS),
    **dict.fromkeys(("preprocess_data", "merge_datasets"), OF_DATASETS),
    **dict.fromkeys(("scripts", "evaluation", "generation"), OF_SCRIPTS),
}
TOOLS = [name for name, launcher in LAUNCHERS.items() if launcher.module in KINDS_OF]
UNDOCUMENTED = {"merge-datasets": [["--input", "tokens", "--output-prefix", "out/merged"]]}
OWN = {("qwen-dense-to-moe", "NUM_EXPERTS"): COUNT, ("merge-datasets", "--input"): PATH}


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Launcher → the longest of its documented command lines."""
    documented = documented_lines(tmp_path_factory.mktemp("stand in")) | UNDOCUMENTED
    return {launcher: max(documented[launcher], key=len) for launcher in TOOLS}


def good(launcher: str, arguments: list[str]) -> Line | Flags:
    """`arguments` as what mutations are drawn of."""
    kinds = dict(KINDS_OF[LAUNCHERS[launcher].module])
    kinds |= {name: kind for (owner, name), kind in OWN.items() if owner == launcher}
    tables = LAUNCHERS[launcher].tables
    if not LAUNCHERS[launcher].is_flags:
        table = next(table for table in tables if len(arguments) <= len(table))
        return Line([arg.name for arg in table], kinds, arguments)
    given = []
    for text in arguments:
        if text.startswith("--"):
            given.append((text, []))
        else:
            given[-1][1].append(text)
    return Flags(
        given,
        kinds,
        known=frozenset(arg.name for arg in tables[0] if arg.means != IGNORED),
        once=frozenset(arg.name for arg in tables[0] if arg.means == arg.name),
        needed=frozenset(arg.name for arg in tables[0] if arg.default is None),
        alone=frozenset(arg.name for arg in tables[0] if isinstance(arg, Switch)),
        several=frozenset(arg.name for arg in tables[0] if isinstance(arg, Several)),
    )


def check_planned(texts: Mapping[str, str], kinds: Mapping[str, str], planned: Mapping[str, object]) -> None:
    """The plan's arguments are what was typed."""
    for name in texts.keys() & planned.keys():
        value, text, kind = planned[name], texts[name], kinds.get(name, "").removeprefix(MAYBE)
        if not text:
            assert not value, name
        elif kind in (COUNT, WHOLE, RATE, ABOVE_ZERO):
            assert value == float(text), name
        elif kind == SWITCH:
            assert value is (text.lower() == "true"), name
        elif isinstance(value, list):
            assert value == (text.split("\n") if kind == LINES else text.replace(",", " ").split()), name
        elif kind == PATH:
            assert (value or "") == text, name
        else:
            assert text.lower().endswith(str(value).lower()), name


@pytest.mark.parametrize("launcher", TOOLS)
def test_a_changed_command_is_refused_by_name_or_planned_as_it_says(lines, monkeypatch, capsys, tmp_path, launcher):
    monkeypatch.setenv("MP_DRY_RUN", "1")
    line, names, planned = good(launcher, lines[launcher]), names_of(launcher), 0
    for mutation in mutations(line, SEED, IN_PROCESS):
        try:
            status = main([launcher, *mutation.arguments])
        except SystemExit as end:
            status = end.code
        captured = capsys.readouterr()
        if status == 2:
            assert captured.out == ""
            check_refusal(mutation, names, captured.err)
        else:
            assert (status, mutation.told) == (0, ())
            check_planned(mutation.texts, line.kinds, json.loads(captured.out)["arguments"])
            planned += 1
    assert 30 < planned < IN_PROCESS * 2 / 3
    assert not list(tmp_path.iterdir())


def names_of(launcher: str) -> list[str]:
    """Of arguments in every table, with what a message may call a flag instead."""
    return [name for table in LAUNCHERS[launcher].tables for arg in table for name in (arg.name, arg.means)]


def test_a_changed_command_is_refused_through_the_shell_too(lines, tmp_path):
    """Those that must be refused, also behind a script's own flags; a substring of an argument is never run."""
    started, jobs = scripts(), []
    for launcher in TOOLS:
        drawn = mutations(good(launcher, lines[launcher]), SEED + 1, 100)
        wrong = [one for one in drawn if one.told and not re.search(" is missing| follows no flag", one.told[0])]
        for shell in SHELLS:
            picked = random.Random(f"{shell} {launcher}").sample(wrong, PER_SHELL)
            jobs += [(shell, started[launcher], names_of(launcher), one) for one in picked]

    def run(job):
        shell, script, names, mutation = job
        command = ["-c", 'exec python3 "$0" "$@"', str(script)] if script.suffix == ".py" else [str(script)]
        result = subprocess.run(
            [shell, *command, *mutation.arguments],
            cwd=tmp_path,
            env=clean_environment(MP_DRY_RUN="1"),
            capture_output=True,
            text=True,
        )
        assert (result.returncode, result.stdout) == (2, ""), (job, result.stderr)
        check_refusal(mutation, names, result.stderr)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, jobs))
    assert not list(tmp_path.iterdir())
