"""Megatron-Core's own division of layers, as JSON: `layer_ranges.py CASES.json`, each (layers, pp, vp, first stage).

A process of its own, because importing Megatron-Core takes long. One answer per case: by stage and chunk, the first
layer and the number of layers; null where Megatron-Core refuses.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset


def ranges(layers, pp, vp, first):
    config = SimpleNamespace(
        num_layers=layers,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp if vp > 1 else None,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=None,
        pipeline_model_parallel_layout=None,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
    )
    chunks = range(vp) if vp > 1 else [None]
    functions = (get_transformer_layer_offset, get_num_layers_to_build)
    try:
        return [[[f(config, chunk, stage) for f in functions] for chunk in chunks] for stage in range(pp)]
    except AssertionError:
        return None


print(json.dumps([ranges(*case) for case in json.loads(Path(sys.argv[1]).read_text())]))
