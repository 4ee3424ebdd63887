"""The files beside a run's weights: configuration, tokenizer, and `run.json`, the resolved run."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_patch.checkpoint.assets import MODEL, TOKENIZER, copy_assets, write_dtype
from megatron_patch.checkpoint.atomic import write_text
from megatron_patch.config.checkpoint import RUN
from megatron_patch.config.run import RunConfig
from megatron_patch.families import ALL
from megatron_patch.families.resolve import read_config
from megatron_patch.families.upcycle import upcycled_hf_config
from megatron_patch.model.build import DTYPES


def write_companions(run: RunConfig, root: Path) -> None:
    """What says which model this run trained, with which tokenizer: the start weights' files serve where no option
    differs."""
    family, load, tokenizer = ALL[run.family], run.checkpoint.load, run.data.tokenizer_model
    if load is None:
        hf = family.hf_config(run.model, dtype="float32")
    else:
        copy_assets(Path(load), root, MODEL if tokenizer else (*MODEL, *TOKENIZER))
        start = read_config(load)
        is_other = run.checkpoint.upcycle
        hf = upcycled_hf_config(start, family, run.model, "float32") if is_other else family.restated(start, run.model)
    if tokenizer:
        copy_assets(Path(tokenizer), root, TOKENIZER)
    write_text(root / "config.json", as_json(hf))
    write_dtype(root, str(DTYPES[run.precision]).removeprefix("torch."))
    write_text(root / RUN, as_json(dataclasses.asdict(run)))


def as_json(value: Mapping[str, Any]) -> str:
    """As files that people read hold it."""
    return json.dumps(value, indent=2) + "\n"
