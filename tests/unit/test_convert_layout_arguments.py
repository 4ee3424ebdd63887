"""Layout arguments of the converter: the target gets them, or the source must have them, or no effect is told."""

import json

import pytest
from layouts_of_mcore import CONFIGS, ENTRIES, FRAGMENTS, RandomSource

from megatron_patch import convert
from megatron_patch.checkpoint.formats import FORMATS
from megatron_patch.checkpoint.interface import Target
from megatron_patch.families import ALL

ONE = {"tp": 1, "pp": 1, "ep": 1, "vp": 1}
TE, LOCAL = {"transformer_impl": "te"}, {"transformer_impl": "local"}
SEQUENTIAL = {"experts": "sequential"}
SOURCES = [  # format, family, layout that is written, layout that shows
    ("hf", "mixtral", {}, {}),
    ("mcore", "mistral", {"tp": 2}, ONE | TE | {"tp": 2}),
    ("mcore", "mixtral", {"tp": 2, "etp": 1} | LOCAL, ONE | LOCAL | SEQUENTIAL | {"tp": 2, "etp": 1}),
    (
        "mcore",
        "mixtral",
        {"tp": 2, "pp": 2, "ep": 2, "vp": 2, "experts": "grouped"},
        TE | {"tp": 2, "pp": 2, "ep": 2, "vp": 2, "etp": 2, "first_stage_layers": 2, "experts": "grouped"},
    ),
    (
        "mcore",
        "deepseek_v2",
        {"pp": 2, "first_stage_layers": 1} | LOCAL,
        ONE | LOCAL | SEQUENTIAL | {"pp": 2, "first_stage_layers": 1, "etp": 1},
    ),
    ("torch_dist", "mistral", LOCAL, {}),  # the names are Transformer Engine's too
    ("torch_dist", "mixtral", LOCAL, LOCAL),
    ("torch_dist", "mixtral", TE, TE),
    ("torch_dist", "deepseek_v2", LOCAL, LOCAL),
    ("megatron", "mistral", {"tp": 2, "pp": 2}, ONE | {"tp": 2, "pp": 2, "first_stage_layers": 2}),
    ("modellink", "mixtral", {"tp": 2, "ep": 2}, ONE | {"tp": 2, "ep": 2, "etp": 2}),
    ("megablocks", "mixtral", {"tp": 2, "ep": 2}, ONE | {"tp": 2, "ep": 2, "etp": 1}),
]
OTHERWISE = {"te": "local", "local": "te", "sequential": "grouped", "grouped": "sequential"}
UNUSUAL = {"tp": 8, "pp": 8, "ep": 8, "etp": 8, "vp": 8, "first_stage_layers": 8} | LOCAL | {"experts": "grouped"}


def write(directory, format, family, **layout):
    """A random model with its config.json, as SRC."""
    directory.mkdir()
    chosen, target = FORMATS[format], Target(**layout)
    chosen.check(ENTRIES[family], CONFIGS[family], target)
    chosen.write(directory, ENTRIES[family], CONFIGS[family], RandomSource(family), target)
    hf = FRAGMENTS[family] | {"architectures": [ALL[family].architecture], "model_type": ALL[family].model_type}
    (directory / "config.json").write_text(json.dumps(hf))
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture
def run(capsys):
    """Convert SRC to DST beside it; exit status and standard error."""

    def run(source, format, **layout):
        flags = [text for name, value in layout.items() for text in (flag(name), str(value))]
        target = source.with_name(f"{len(list(source.parent.iterdir()))}")
        return convert.main([str(source), str(target), "--format", format, *flags]), capsys.readouterr().err

    return run


def flag(name):
    return "--" + name.replace("_", "-")


@pytest.mark.parametrize(("format", "family", "layout", "shown"), SOURCES)
def test_what_is_said_of_a_source_must_be_what_its_files_show(tmp_path, run, format, family, layout, shown):
    source = write(tmp_path / "SRC", format, family, **layout)
    assert FORMATS[format].open(source, ENTRIES[family], CONFIGS[family]).layout == shown
    assert run(source, "hf", **shown) == (0, "")
    for name, value in shown.items():
        wrong = OTHERWISE.get(value) or value + 1
        status, told = run(source, "hf", **{name: wrong})
        assert status == 1 and f"{flag(name)} is {wrong}, but SRC has {value} ({format} release, " in told
        assert "hf has no such layout" in told


@pytest.mark.parametrize(("format", "family", "layout", "shown"), SOURCES)
def test_what_neither_source_nor_target_shows_has_no_effect_and_is_told(tmp_path, run, format, family, layout, shown):
    source = write(tmp_path / "SRC", format, family, **layout)
    hidden = {name: value for name, value in UNUSUAL.items() if name not in shown}
    status, told = run(source, "hf", **hidden)
    assert status == 0
    assert [line.split(" has no effect: ")[0] for line in told.splitlines()] == [
        f"warning: {flag(name)} {value}" for name, value in hidden.items()
    ]


def test_a_target_takes_its_own_arguments_whatever_the_source_has(tmp_path, run):
    source = write(tmp_path / "SRC", "mcore", "mixtral", tp=2)
    wanted = {"tp": 1, "pp": 2, "vp": 2, "first_stage_layers": 2, "experts": "grouped"} | LOCAL
    assert run(source, "mcore", **wanted) == (0, "")
    assert run(source, "torch_dist", **LOCAL) == (0, "")
    assert "--experts is grouped, but SRC has sequential" in run(source, "torch_dist", experts="grouped")[1]
    assert run(source, "modellink", tp=1, ep=4) == (0, "")


def test_the_layout_of_experts_that_a_model_has_not_is_told(tmp_path, run):
    source = write(tmp_path / "SRC", "hf", "mistral")
    status, told = run(source, "mcore", tp=2, etp=1, experts="grouped")
    assert status == 0
    assert told.splitlines() == [
        "warning: --etp 1 has no effect: the model has no experts",
        "warning: --experts grouped has no effect: the model has no experts",
    ]
