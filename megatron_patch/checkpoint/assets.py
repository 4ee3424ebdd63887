"""The files that travel with weights: configuration and tokenizer, copied and never run."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODEL = ("config.json", "generation_config.json", "*.py")
TOKENIZER = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model*",
    "*.model",
    "*.tiktoken",
    "chat_template.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*.py",
)


def copy_assets(source: Path, target: Path, patterns: tuple[str, ...] = (*MODEL, *TOKENIZER)) -> list[str]:
    """Copy configuration and tokenizer files of `source` into `target`; returns their names. Weights never match.

    Raises FileNotFoundError for one that is a link to nothing.
    """
    lost = sorted(path for path in source.iterdir() if not path.exists() and any(map(path.match, patterns)))
    if lost:
        raise FileNotFoundError(f"{lost[0]} is a link to a file that does not exist; fetch it or remove the link")
    found = sorted({path for pattern in patterns for path in source.glob(pattern) if path.is_file()})
    for path in found:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return [str(path.relative_to(source)) for path in found]


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Replace `directory`/config.json."""
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_dtype(directory: Path, dtype: str) -> None:
    """Make `directory`/config.json say `dtype` (`bfloat16` …): transformers loads weights in what it says."""
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    if any(config.get(key) != dtype for key in keys):
        write_config(directory, config | dict.fromkeys(keys, dtype))
