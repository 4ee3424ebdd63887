"""Whether a run begins or goes on, and from which checkpoint: what earlier runs recorded, read without torch."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_patch.config.checkpoint import RUN, TRACKER, why_unreadable
from megatron_patch.config.run import RunConfig

_ITERATION = re.compile(r"iter_(\d{7,})")
# What makes a run another one, with the model's architecture: where its samples and its first weights come from.
_COMPARED = ("family", "global_batch_size")
_COMPARED_DATA = ("train_data_path", "dataset", "is_instruction_dataset", "seed")
_COMPARED_RECORDS = (  # of raw data
    *("max_padding_length", "tokenizer_model", "prompt_type", "map_keys", "split", "sft_packing"),
)
_COMPARED_SAMPLES = ("seq_length", "split", "sft_packing")  # of fine-tuning and instruction data in .bin/.idx
_COMPARED_TOKENS = (
    "seq_length",
    "split",
    "dataloader_type",
    "reset_attention_mask",
    "reset_position_ids",
    "eod_mask_loss",
)
_BEFORE = {  # what the records of earlier versions do not say
    "map_keys": None,
    "is_instruction_dataset": False,
    "sft_packing": False,
    "dataloader_type": "single",
    "reset_attention_mask": False,
    "reset_position_ids": False,
    "eod_mask_loss": False,
}


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A complete iteration that training wrote: its directory, its number, and all that its `run.json` says."""

    directory: Path
    iteration: int
    record: Mapping[str, Any]

    @property
    def run(self) -> Mapping[str, Any]:
        """The resolved settings of the run that wrote it."""
        return self.record["run"]


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run starts: from `candidates`, the checkpoint to continue and the complete ones before it, or anew."""

    candidates: tuple[Recorded, ...]
    is_own: bool  # the checkpoint is of this output directory, not one that --resume names


def resolve_start(run: RunConfig) -> Start:
    """What `--resume` means for this run, with what stands on disk now.

    Raises FileExistsError where the output directory holds what this run neither continues nor may replace,
    FileNotFoundError where there is nothing to resume, ValueError for a record that is damaged or of another run.
    """
    checkpoint, root = run.checkpoint, Path(run.checkpoint.save)
    own = _own(run, root)
    if own or checkpoint.resume in ("auto", "never"):
        return Start(tuple(own), is_own=True)
    named = Path(checkpoint.resume)
    found = recorded_iterations(named, skip_damaged=checkpoint.resume_previous)
    if not found:
        raise FileNotFoundError(
            f"--resume {checkpoint.resume} holds no checkpoint to continue: there is no iter_NNNNNNN with a {RUN}; "
            "name the directory of a run, or one of its iterations"
        )
    differing = differences(found[0].run, run)
    if differing:
        raise ValueError(f"--resume {checkpoint.resume} is of another run:\n  " + "\n  ".join(differing))
    return Start(tuple(found), is_own=False)


def start(run: RunConfig) -> dict[str, Any]:
    """What the run will do first, as a section of its plan; all unknown while something stands in its way."""
    try:
        candidates = resolve_start(run).candidates
    except (OSError, ValueError):  # the checks of the disk say what
        return {"begins": None, "iterations_done": None, "weights": None}
    if not candidates:
        return {"begins": "anew", "iterations_done": 0, "weights": run.checkpoint.load or "random"}
    checkpoint = candidates[0]
    return {"begins": "where it stopped", "iterations_done": checkpoint.iteration, "weights": str(checkpoint.directory)}


def recorded_iterations(directory: Path, *, skip_damaged: bool = False) -> list[Recorded]:
    """The complete iterations of a run in `directory`, from the one that the tracker names back; or that one alone.

    Without a tracker, as where the first save was cut off before it got one, from the last one back. Raises ValueError
    where the record of the first of them cannot be read, unless it is to be skipped as those of earlier ones are.
    """
    if _ITERATION.fullmatch(directory.resolve().name):
        return [_read(directory)] if (directory / RUN).is_file() else []
    numbered = {int(match[1]): path for path in directory.glob("iter_*") if (match := _ITERATION.fullmatch(path.name))}
    tracked = _tracked(directory)
    found: list[Recorded] = []
    for number in sorted(numbered, reverse=True):
        if (numbered[number] / RUN).is_file() and (tracked is None or number <= tracked):
            try:
                found.append(_read(numbered[number]))
            except ValueError:
                if not found and not skip_damaged:
                    raise
    return found


def differences(recorded: Mapping[str, Any], run: RunConfig) -> list[str]:
    """What makes `run` another one than the recorded: a line for each setting, with both values."""
    ours, theirs = _identity(dataclasses.asdict(run)), _identity(recorded)
    return [
        f"{name}: {_spelled(theirs[name])} in the recorded run, {_spelled(value)} in this one"
        for name, value in ours.items()
        if name in theirs and theirs[name] != _plain(value)  # a setting that is newer than the record is not in it
    ]


def changes(recorded: Mapping[str, Any], run: RunConfig) -> list[str]:
    """Settings of the optimizer, the schedule and the layout that are not the recorded ones: `lr 1e-05 → 2e-05`."""
    ours, compared = dataclasses.asdict(run), ("optimizer", "parallel", "memory")
    pairs = [(name, recorded.get(name), ours[name]) for name in ("train_iters", "micro_batch_size", "precision")]
    for concern in compared:
        theirs = recorded.get(concern, {})
        pairs += [(name, theirs[name], value) for name, value in ours[concern].items() if name in theirs]
    return [f"{name} {_spelled(old)} → {_spelled(new)}" for name, old, new in pairs if old != _plain(new)]


def _own(run: RunConfig, root: Path) -> list[Recorded]:
    """The iterations of this run that stand in its output directory. FileExistsError for what it may not replace."""
    if not root.is_dir() or not _is_occupied(root):
        return []
    replace = "pass --overwrite to replace them, or name another output directory"
    if run.checkpoint.resume == "never":
        if not run.checkpoint.overwrite:
            raise FileExistsError(f"{root} already holds checkpoints, and --resume is never; {replace}")
        return []
    found = recorded_iterations(root, skip_damaged=run.checkpoint.resume_previous)
    differing = differences(found[0].run, run) if found else []
    if found and not differing:
        return [one for one in found if not differences(one.run, run)]
    if run.checkpoint.overwrite:
        return []
    if not found:
        raise FileExistsError(
            f"{root} already holds checkpoints that cannot be continued: none has a {RUN}, as with "
            f"--ckpt-format torch, which keeps weights alone; {replace}"
        )
    raise FileExistsError(
        f"{root} already holds checkpoints of another run; {replace}. What differs:\n  " + "\n  ".join(differing)
    )


def _is_occupied(root: Path) -> bool:
    return (root / TRACKER).exists() or any(_ITERATION.fullmatch(path.name) for path in root.glob("iter_*"))


def _tracked(directory: Path) -> int | None:
    """The iteration that the tracker names; None without a tracker."""
    path = directory / TRACKER
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{path} says {text[:40]!r}; to continue a run, it must be an iteration number")
    return int(text)


def _read(directory: Path) -> Recorded:
    path = directory / RUN
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = Recorded(directory, int(record["iteration"]), record)
        _identity(found.run)
        dict(record["files"])
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged: {why_unreadable(error)}; --resume-previous continues an earlier iteration"
        ) from None
    return found


def _identity(run: Mapping[str, Any]) -> dict[str, Any]:
    data = {**_BEFORE, **run["data"]}
    names = {"MMAP": _COMPARED_TOKENS, "MMAP-SFT": _COMPARED_SAMPLES}.get(data["dataset"], _COMPARED_RECORDS)
    if data["is_instruction_dataset"]:
        names = _COMPARED_SAMPLES
    if data["train_data_path"] != data["valid_data_path"]:
        names = tuple(name for name in names if name != "split")
    return {
        **{name: run[name] for name in _COMPARED},
        **{name: data[name] for name in (*_COMPARED_DATA, *names)},
        "start weights": run["checkpoint"]["load"],
        **run["model"],
    }


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def _spelled(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "none" if value is None else str(value)
