"""A converter's arguments as one `megatron_patch.convert` command."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from megatron_patch.config.checkpoint import TRACKER
from megatron_patch.families import ALL
from megatron_patch.families.resolve import Resolved, from_checkpoint
from megatron_patch.families.upcycle import Upcycling
from megatron_patch.launch.conversion_rules import (
    division_problems,
    expert_problems,
    parameters,
    upcycled,
    upcycling,
    vocabulary,
    without_effect,
)
from megatron_patch.launch.options import check_options, option_value
from megatron_patch.launch.positional import Request, UsageError
from megatron_patch.launch.size import resolve_size
from megatron_patch.plan.disk import check_writable, present_obstacles

OPTIONS = (
    *("--dtype", "--overwrite", "--transformer-impl", "--experts", "--etp", "--vp", "--assets"),
    *("--verify", "--verify-logits", "--upcycle-padding", "--upcycle-pre-softmax", "--upcycle-seed"),
)
UPCYCLING = {
    "num_moe_experts": "--upcycle-experts",
    "moe_router_topk": "--upcycle-topk",
    "num_splits": "--upcycle-splits",
    "moe_ffn_hidden_size": "--upcycle-ffn",
    "moe_shared_expert_intermediate_size": "--upcycle-shared",
}
ITERATION = re.compile(r"release|iter_\d{7}")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """One conversion in the words of `megatron_patch.convert`; a setting that is 0, "" or None was not said."""

    source: str
    target: str
    format: str
    families: tuple[str, ...]  # what the source may be
    size: str = "auto"
    assets: str | None = None
    layout: Mapping[str, int | str | None] = field(default_factory=dict)  # flag → value
    dtype: str | None = None
    upcycling: Upcycling | None = None

    def command(self, options: list[str]) -> list[str]:
        """The command that converts. Raises UsageError for an option that says again what is already decided."""
        all_flags = {**self.layout, "--assets": self.assets, "--dtype": self.dtype, **_changed(self.upcycling)}
        said = {flag: str(value) for flag, value in all_flags.items() if value}
        for name in options:
            if name.split("=")[0] in said:
                raise UsageError(f"{name.split('=')[0]} follows from the arguments before it; say it once")
        return [
            *(sys.executable, "-m", "megatron_patch.convert", self.source, self.target, "--format", self.format),
            *(text for flag in said.items() for text in flag),
            *("--model-size", self.size, *options),
        ]


def plan(request: Request) -> dict[str, Any]:
    """What will be written, and by which command. Raises ValueError or OSError for what stands in its way."""
    check_options(request.options, OPTIONS)
    job, notes = _job(request)
    described = option_value(request.options, "--assets") or job.assets or job.source
    resolved, absent = architecture(request, job, described)
    how = upcycling(request, resolved and resolved.config)
    if how:
        job = replace(job, upcycling=how)
        notes += [f"a dense model becomes {how.num_moe_experts} experts made of its own MLP"]
        resolved = resolved and Resolved(*upcycled(request, resolved.config, how), resolved.warnings)
    config = resolved and resolved.config
    problems = expert_problems(request, config, is_read=not absent) + division_problems(request, config)
    wrong, said = vocabulary(request, config, Path(described))
    return finish(
        request, job, resolved, absent, [*problems, *wrong], [*notes, *said, *without_effect(request, config)]
    )


def finish(
    request: Request,
    job: Conversion,
    resolved: Resolved | None,
    absent: list[str],
    problems: list[str],
    warnings: list[str],
) -> dict[str, Any]:
    """The plan of `job`. Raises UsageError with all `problems`; unless it is dry, with what is in the way too."""
    is_replaced = "--overwrite" in request.options
    obstacles = absent + present_obstacles(
        lambda: _check_source(job.source), lambda: check_target(job.target, is_replaced=is_replaced)
    )
    broken = [*problems, *([] if request.is_dry else obstacles)]
    if broken:
        raise UsageError("\n".join(broken))
    family, config = (resolved.family, resolved.config) if resolved else (None, None)
    return {
        "arguments": request.arguments(),
        "model": family and {"family": family.name, "parameters": parameters(request, family, config)},
        "output": {"checkpoint": job.target, "format": job.format},
        "environment": {},
        "command": job.command(request.options),
        "warnings": [*(resolved.warnings if resolved else ()), *obstacles, *warnings],
    }


def architecture(request: Request, job: Conversion, directory: str) -> tuple[Resolved | None, list[str]]:
    """What `directory` describes, and what is not there yet; None where a dry run has nothing to read it from."""
    try:
        return resolve_size(job.families, job.size, directory)
    except FileNotFoundError as error:
        if not request.is_dry:
            raise
        return None, [f"{error}; the architecture is unknown"]


def check_target(target: str, *, is_replaced: bool) -> None:
    """Raise unless `target` can be written, without replacing anything unless that was asked for."""
    check_writable(target)
    if not is_replaced and Path(target).is_dir() and any(Path(target).iterdir()):
        raise FileExistsError(f"target directory {target!r} is not empty; pass --overwrite, or name another")


def checkpoint_root(path: str) -> str:
    """The directory with the tracker file; documents also name the iteration inside it.

    Raises ValueError where the tracker file names another iteration.
    """
    directory = Path(path)
    tracker = directory.parent / TRACKER
    if not ITERATION.fullmatch(directory.name) or not tracker.is_file():
        return str(directory.parent) if ITERATION.fullmatch(directory.name) else path
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    current = f"iter_{int(text):07d}" if text.isdecimal() else text
    if current != directory.name:
        raise ValueError(f"{path} was named, but {tracker} says {text[:40]!r}; write the wanted one there")
    return str(directory.parent)


def _job(request: Request) -> tuple[Conversion, list[str]]:
    """The conversion before its architecture is known, and what to say about it."""
    v = request.values
    is_back = v.get("mg2hf", False)
    source = checkpoint_root(v["SOURCE_CKPT_PATH"]) if is_back else v["SOURCE_CKPT_PATH"]
    assets = v.get("HG_CKPT_PATH")
    if assets and Path(assets).absolute() == Path(source).absolute():
        assets = None
    size, families, notes = v.get("MODEL_SIZE") or v.get("MN") or "auto", request.families, []
    if is_back and v.get("NUM_EXPERTS") and assets and _has_grown(source, assets):
        notes = [f"config.json and tokenizer come from {source}: {assets} describes a model without its experts"]
        size, families, assets = "auto", tuple(ALL), None
    job = Conversion(
        source=source,
        target=v["TARGET_CKPT_PATH"],
        format="hf" if is_back else request.format,
        families=families,
        size=size,
        assets=assets or None,
        layout=_layout(v),
        dtype=v.get("PR"),
    )
    return job, notes


def _layout(v: Mapping[str, Any]) -> dict[str, int | str | None]:
    """What is written; on the way back what the checkpoint must be."""
    layout = {"--tp": v["TP"], "--pp": v["PP"], "--ep": v.get("EP")}
    layout["--first-stage-layers"] = v.get("MP_PP0_LAYERS") if v["PP"] > 1 else None
    if "USE_TE" in v:
        layout["--transformer-impl"] = "te" if v["USE_TE"] else "local"
    return layout


def _changed(how: Upcycling | None) -> dict[str, Any]:
    """The flags of what is not at its default."""
    if how is None:
        return {}
    defaults = {item.name: item.default for item in fields(how)}
    return {flag: getattr(how, name) for name, flag in UPCYCLING.items() if getattr(how, name) != defaults[name]}


def _has_grown(source: str, assets: str) -> bool:
    """Whether `source` describes experts and `assets` none: a dense model was converted to the former."""
    try:
        ours, theirs = (from_checkpoint(tuple(ALL), "auto", path).config for path in (source, assets))
    except FileNotFoundError:
        return False
    return ours.num_moe_experts > 0 and theirs.num_moe_experts == 0


def _check_source(source: str) -> None:
    if not Path(source).is_dir():
        raise FileNotFoundError(f"source directory {source!r} does not exist")
