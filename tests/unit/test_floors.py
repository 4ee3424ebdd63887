"""The house's own rules, held by reading the source: imports go down, and no corner grows what we do not want."""

import ast
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_patch"
FLOORS = (  # lowest first; packages on one floor never import each other
    {"config"},
    {"families"},
    {"parallel", "data"},
    {"model", "checkpoint", "plan"},
    {"weights"},
    {"verify", "inference"},
    {"train", "convert", "launch", "generate", "evaluate", "doctor"},
)
HEIGHT = {name: height for height, floor in enumerate(FLOORS) for name in floor}
STANDARD_LIBRARY_ONLY = {"config", "families", "plan", "launch"}
LIGHT_MODULES = {
    "parallel/grid.py",
    "parallel/stages.py",
    "data/__init__.py",
    "data/handlers.py",
    "data/index_header.py",
    "data/inputs.py",
    "data/json_lines.py",
    "data/paths.py",
    "data/prompts.py",
    "data/records.py",
    "data/sidecar.py",
    "data/splits.py",
    "data/zstd.py",
}
READING_THEMSELVES = {"config/model.py", "config/memory.py"}  # settings that their own methods read
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc", "base"}
FORBIDDEN_SUFFIXES = ("Manager", "Wrapper", "Provider")
MUTATORS = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "remove", "discard", "clear"}

# Exceptions: each list may only shrink.
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()
UNREAD_FIELDS: set[str] = set()

MODULES = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
every_module = pytest.mark.parametrize("module", MODULES)


def package_of(module: str) -> str:
    return Path(module).with_suffix("").parts[0]


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno} imports relatively"
            yield node.module
            if node.module == "megatron_patch":
                yield from (f"megatron_patch.{alias.name}" for alias in node.names)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@every_module
def test_imports_go_down(module):
    here = package_of(module)
    for name in imported(MODULES[module]):
        parts = name.split(".")
        if parts[0] == "megatron_patch" and len(parts) > 1 and parts[1] != here and here != "__init__":
            assert HEIGHT[parts[1]] < HEIGHT[here], f"{here} may not import {name}"


@pytest.mark.parametrize(
    "module", [m for m in MODULES if package_of(m) in STANDARD_LIBRARY_ONLY] + sorted(LIGHT_MODULES)
)
def test_what_a_bad_command_passes_through_needs_only_the_standard_library(module):
    for name in imported(MODULES[module]):
        parts = name.split(".")
        assert parts[0] in sys.stdlib_module_names or parts[0] == "megatron_patch", f"imports {name}"
        if parts[0] == "megatron_patch" and len(parts) > 1 and parts[1] not in STANDARD_LIBRARY_ONLY:
            assert "/".join(parts[1:]) + ".py" in LIGHT_MODULES, f"imports {name}, which may import torch"


@every_module
def test_no_global_state(module):
    tree = MODULES[module]
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Global)], "a global statement"
    containers = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(getattr(node, "value", None), ast.List | ast.Dict | ast.Set | ast.DictComp | ast.ListComp):
            containers |= {target.id: node.lineno for target in targets if isinstance(target, ast.Name)}
    assert all(name.isupper() or name == "__all__" for name in containers), f"not a constant: {containers}"
    for node in ast.walk(tree):
        changed = None
        if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            changed = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
            changed = node.func.value
        assert not (isinstance(changed, ast.Name) and changed.id in containers), (
            f"line {node.lineno} changes a constant"
        )


@every_module
def test_files_and_functions_are_short(module):
    if module not in LONG_FILES:
        assert len((PACKAGE / module).read_text().splitlines()) <= LONGEST_FILE
    for function in functions(MODULES[module]):
        if f"{module}:{function.name}" not in LONG_FUNCTIONS:
            assert function.end_lineno - function.lineno < LONGEST_FUNCTION, f"{function.name} is too long"


@every_module
def test_modules_say_what_lives_in_them(module):
    assert ast.get_docstring(MODULES[module]), "no opening sentence"
    assert not FORBIDDEN_NAMES & set(Path(module).with_suffix("").parts)
    for node in ast.walk(MODULES[module]):
        assert not (isinstance(node, ast.ClassDef) and node.name.endswith(FORBIDDEN_SUFFIXES)), node.name


@every_module
def test_errors_speak(module):
    for node in ast.walk(MODULES[module]):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"line {node.lineno}: bare except"
        if not isinstance(node, ast.Raise) or node.exc is None:
            continue
        is_silent = isinstance(node.exc, ast.Name) and node.exc.id[:1].isupper()
        is_silent |= isinstance(node.exc, ast.Call) and not node.exc.args and not node.exc.keywords
        assert not is_silent, f"line {node.lineno}: an exception without a message"


def test_every_setting_changes_a_run():
    """A flag that nothing reads is a lie. Passing it on, checking it or printing it does not count."""
    settings = {
        statement.target.id
        for module, tree in MODULES.items()
        if package_of(module) == "config"
        for owner in tree.body
        if isinstance(owner, ast.ClassDef)
        for statement in owner.body
        if isinstance(statement, ast.AnnAssign)
    }
    assert len(settings) > 40
    read = {
        node.attr
        for module, tree in MODULES.items()
        if package_of(module) not in {"config", "plan", "launch"}
        or module in ("config/model.py", "config/memory.py")  # methods
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    assert settings - read == UNREAD_FIELDS


def test_planning_a_run_never_imports_torch(tmp_path):
    command = shlex.split(
        "dsw 7B 1 8 1e-5 1e-6 128 128 bf16 4 1 1 1 true true true false false false 1 d d c 10000 100"
    )
    program = (
        "import sys\nfrom megatron_patch.launch.__main__ import main\n"
        f"status = main({['mistral', *command, str(tmp_path)]!r})\n"
        "heavy = {'torch', 'numpy', 'transformers'} & set(sys.modules)\nassert not heavy, heavy\nsys.exit(status)"
    )
    environment = {"MP_DRY_RUN": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert '"parameters": 7241732096' in result.stdout
