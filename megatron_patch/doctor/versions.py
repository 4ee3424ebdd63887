"""Python and the packages: which are here, which are asked for, and what does not work without them."""

import platform
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

from megatron_patch.doctor.finding import Finding

REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"
OLDEST_PYTHON = (3, 10)
EVERYTHING = "only planning works: nothing is converted, trained, generated or evaluated"
COSTS = MappingProxyType(
    {
        "torch": EVERYTHING,
        "numpy": EVERYTHING,
        "safetensors": "no Hugging Face checkpoint is read or written",
        "transformers": "no tokenizer is loaded: no preprocessing, training or generation",
        "tokenizers": "no tokenizer is loaded: no preprocessing, training or generation",
        "sentencepiece": "tokenizers that are only a tokenizer.model are not read",
        "tqdm": "training does not start: its log has a progress bar",
        "tensorboard": "training that names a TensorBoard directory does not start",
        "accelerate": "the quickstart's evaluation does not run",
        "lm-eval": "no evaluation",
        "matplotlib": "the quickstart draws no curves",
        "megatron-core": "tests that read our files with Megatron-Core are left out",
        "hypothesis": "the tests do not run",
        "psutil": "some tests do not run",
        "pytest": "the tests do not run",
        "torchao": "no fp8 training (PR=fp8)",
        "pyarrow": "no .parquet files as input",
        "flash-attn-3": "on Hopper GPUs attention is PyTorch's, which is slower for windows and packed samples",
    }
)
# The package that a command would use if it were there → the modules that it may be installed as.
EXTRAS = MappingProxyType({"pyarrow": ("pyarrow",), "flash-attn-3": ("flash_attn_interface", "flashattn_hopper")})


def versions() -> Iterator[Finding]:
    """Python, every requirement, and the extras."""
    found = platform.python_version()
    needed = ".".join(map(str, OLDEST_PYTHON))
    is_old = sys.version_info < OLDEST_PYTHON
    yield Finding("versions", "python", f"{found} (asked: >= {needed})", EVERYTHING if is_old else "")
    for line in requirements():
        yield _package(line)
    for name, modules in EXTRAS.items():
        yield _extra(name, modules)


def requirements(path: Path = REQUIREMENTS) -> list[str]:
    """The lines of requirements.txt, or of the installed package where there is no such file."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
    else:
        try:
            lines = requires("megatron_patch") or []
        except PackageNotFoundError:
            lines = []
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _package(line: str) -> Finding:
    requirement, _, condition = line.partition(";")
    name = re.split(r"[<>=!~\[ ]", requirement, maxsplit=1)[0]
    asked = requirement.removeprefix(name).strip()
    cost = COSTS.get(name, "what needs it does not run")
    try:
        found = version(name)
    except PackageNotFoundError:
        is_void = find_spec("packaging") is not None and _is_void(condition)
        return Finding("versions", name, f"not installed (asked: {asked})", "" if is_void else cost)
    if find_spec("packaging") is None or _is_within(found, asked):
        return Finding("versions", name, f"{found} (asked: {asked})")
    return Finding("versions", name, f"{found} (asked: {asked})", f"no test was run with this version; else: {cost}")


def _is_void(condition: str) -> bool:
    """Whether a requirement is not for this Python and machine."""
    from packaging.markers import Marker  # comes with torch and transformers

    return bool(condition.strip()) and not Marker(condition).evaluate({"extra": ""})


def _is_within(found: str, asked: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(asked).contains(found.split("+")[0], prereleases=True)


def _extra(name: str, modules: tuple[str, ...]) -> Finding:
    module = next((module for module in modules if find_spec(module)), None)
    return Finding("versions", name, "installed" if module else "not installed", "" if module else COSTS[name])
