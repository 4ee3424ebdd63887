"""Packaging. What is needed stands once, in requirements.txt, whose last section is the extra `test`."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
needed, for_tests = (here / "requirements.txt").read_text(encoding="utf-8").split("# tests\n")


def lines(text: str) -> list[str]:
    """The requirements among `text`'s lines."""
    return [line for line in text.splitlines() if line and not line.startswith("#")]


setup(
    name="megatron_patch",
    version="0.1.0",
    description="Converts, pre-trains, fine-tunes and evaluates LLMs at Megatron scale behind positional commands",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_patch", "megatron_patch.*"]),
    install_requires=lines(needed),
    # Float8 training, faster attention kernels on GPUs and .zst files, each used where it is found.
    extras_require={
        "test": lines(for_tests),
        "fp8": ["torchao>=0.13"],
        "gpu": ["flash-attn>=2.7"],
        "zst": ["zstandard>=0.23"],
    },
)
