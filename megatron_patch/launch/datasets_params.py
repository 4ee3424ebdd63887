"""What a JSON file of arguments for datasets' `load_dataset` means here: local files, and nothing from a hub."""

from pathlib import Path
from typing import Any

from megatron_patch.data.json_lines import parse_object

BUILDERS = ("json", "csv", "parquet", "arrow", "text")
WITHOUT_EFFECT = ("cache_dir", "keep_in_memory", "num_proc", "streaming", "download_mode", "verification_mode")


def resolve_params(path: str) -> list[str]:
    """The inputs that the file at `path` names.

    Raises FileNotFoundError where there is no such file, ValueError for arguments that ask for anything else.
    """
    given = _read(path)
    unknown = [name for name in given if name not in ("path", "data_files", "data_dir", "split", *WITHOUT_EFFECT)]
    if unknown:
        raise ValueError(f"{path}: {unknown[0]} is not used here; name local files with path, data_files and split")
    builder, directory, files = given.get("path"), given.get("data_dir"), given.get("data_files")
    split = given.get("split", "train")
    if isinstance(files, dict):
        if split not in files:
            raise ValueError(f"{path}: split {split!r} is not one of data_files ({', '.join(files)})")
        files = files[split]
    elif split != "train":
        raise ValueError(f"{path}: split is {split!r}; only 'train', or a name in data_files, is known here")
    if builder not in BUILDERS and not (isinstance(builder, str) and Path(builder).exists()):
        raise ValueError(
            f"{path}: path is {builder!r}, neither one of {', '.join(BUILDERS)} nor a local path; nothing is downloaded"
        )
    words = [files] if isinstance(files, str) else files or [""]
    base = Path(directory or ("" if builder in BUILDERS else builder))
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{path}: data_files is neither a path nor a list of paths")
    if builder in BUILDERS and not (files or directory):
        raise ValueError(f"{path} names no files; data_files does")
    return [str(base / word) for word in words]


def _read(path: str) -> dict[str, Any]:
    try:
        return parse_object(Path(path).read_bytes(), f"--hf-datasets-params {path!r}")
    except FileNotFoundError:
        raise FileNotFoundError(f"--hf-datasets-params {path!r} does not exist") from None
