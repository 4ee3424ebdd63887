"""The layouts whose training equals one process, as docs/layout_table.md shows and write_layout_table.py measures.

A layout names the size of each axis that is more than 1; what is left of the ranks is data-parallel. `vp` is the layers
of an interleaved chunk, `first` those of the first stage, `layers` those of the model where they are not 4. `sp` cuts
the sequence over tensor-parallel ranks, `replicated` is DO=false, `packed` puts several documents in a sample.
"""

import dataclasses
import re

import torch

from layout_step import Trial
from megatron_patch.config.parallel import ParallelConfig
from tiny_models import MODELS

LAYOUTS = (  # (model, ranks, layout)
    # Window shorter than the sequence, grouped queries, a vocabulary that no axis divides.
    ("mistral", 2, "tp2"),
    ("mistral", 2, "tp2 sp"),
    ("mistral", 4, "tp4 sp"),
    ("mistral", 2, ""),
    ("mistral", 2, "replicated"),
    ("mistral", 2, "pp2"),
    ("mistral", 4, "pp4"),
    ("mistral", 2, "pp2 vp1"),
    ("mistral", 2, "pp2 first1 layers5"),
    ("mistral", 4, "pp4 first2 layers5"),
    ("mistral", 2, "cp2"),
    ("mistral", 4, "cp4"),
    ("mistral", 2, "cp2 packed"),
    ("mistral", 8, "tp2 sp pp2"),
    ("mistral", 8, "tp2 sp pp2 replicated"),
    ("mistral", 8, "tp2 cp2"),
    ("mistral", 8, "tp2 sp cp2 pp2"),
    ("mistral", 4, "tp2 sp cp2 packed"),
    ("mistral", 4, "pp2 cp2"),
    ("mistral", 4, "pp2 vp1 cp2 packed"),
    ("mistral", 8, "tp2 sp pp2 vp1"),
    # Frequencies stretched as LLaMA-3.1 does.
    ("llama", 2, "tp2 sp"),
    ("llama", 2, "cp2"),
    ("llama", 4, "tp2 pp2"),
    ("llama", 4, "pp2 vp1"),
    ("llama", 4, "pp2 first3 layers5"),
    ("llama", 2, "pp2 vp1 first4 layers6"),
    ("llama", 4, "replicated packed"),
    ("llama", 8, ""),
    ("llama", 8, "pp4 replicated"),
    ("llama", 8, "tp2 sp cp2"),
    ("llama", 8, "tp2 sp pp2 cp2 packed"),
    # A bias on queries, keys and values; tied: the embedding stands at both ends of the pipeline.
    ("qwen1_5", 2, "pp2"),
    ("qwen1_5", 4, "tp4"),
    ("qwen1_5", 4, "tp2 sp"),
    ("qwen1_5", 4, "cp2 replicated"),
    ("qwen1_5 tied", 2, "tp2 sp"),
    ("qwen1_5 tied", 2, "pp2"),
    ("qwen1_5 tied", 2, "pp2 vp1"),
    ("qwen1_5 tied", 4, "pp4"),
    ("qwen1_5 tied", 4, "pp2 cp2"),
    ("qwen1_5 tied", 4, "pp2 first1 layers5 replicated"),
    ("qwen1_5 tied", 8, "tp2 sp pp2"),
    ("qwen1_5 tied", 8, "tp2 pp2 cp2 packed"),
    # Experts chosen first, weighted by a softmax over the chosen.
    ("mixtral", 2, "ep2"),
    ("mixtral", 2, "tp2"),
    ("mixtral", 2, "tp2 sp"),
    ("mixtral", 2, "cp2 ep2"),
    ("mixtral", 2, "tp2 ep2 etp1"),
    ("mixtral", 4, "ep4"),
    ("mixtral", 4, "ep2 replicated"),
    ("mixtral", 4, "tp2 sp ep2"),
    ("mixtral", 4, "tp2 sp ep2 etp1"),
    ("mixtral", 4, "pp2 ep2"),
    ("mixtral", 4, "pp2 vp1 ep2"),
    ("mixtral", 4, "pp2 cp2 ep2 packed"),
    ("mixtral", 8, "tp2 ep4"),
    ("mixtral", 8, "tp2 sp ep4"),
    ("mixtral", 8, "tp4 sp ep2"),
    ("mixtral", 8, "tp2 sp pp2 ep2"),
    ("mixtral", 8, "tp2 sp cp2 ep4 etp1"),
    # A softmax over all experts, and a shared expert behind a gate.
    ("qwen1_5_moe", 2, ""),
    ("qwen1_5_moe", 2, "ep2"),
    ("qwen1_5_moe", 2, "tp2"),
    ("qwen1_5_moe", 2, "tp2 sp"),
    ("qwen1_5_moe", 2, "tp2 etp1"),
    ("qwen1_5_moe", 2, "tp2 sp ep2 etp1"),
    ("qwen1_5_moe", 4, "cp2 ep2 packed"),
    ("qwen1_5_moe", 4, "tp2 ep2 replicated"),
    ("qwen1_5_moe", 8, "ep8"),
    ("qwen1_5_moe", 8, "tp2 ep4 etp1"),
    ("qwen1_5_moe", 8, "tp2 sp ep4"),
    ("qwen1_5_moe", 8, "tp2 sp cp4 ep8 etp1"),
    ("qwen1_5_moe tied", 4, "pp2 ep2"),
    ("qwen1_5_moe tied", 8, "tp2 sp pp2 vp1 ep2"),
    # Latent attention, a dense first layer, experts limited to groups; lite: neither query compression nor groups.
    ("deepseek_v2", 2, "tp2"),
    ("deepseek_v2", 2, "tp2 sp"),
    ("deepseek_v2", 2, "tp2 etp1"),
    ("deepseek_v2", 2, "cp2"),
    ("deepseek_v2", 2, "pp2"),
    ("deepseek_v2", 2, "pp2 first1 layers5"),
    ("deepseek_v2", 2, "ep2"),
    ("deepseek_v2", 4, "tp4 sp"),
    ("deepseek_v2", 4, "cp2 ep4 packed"),
    ("deepseek_v2", 4, "pp2 vp1 ep2"),
    ("deepseek_v2", 4, "tp2 sp cp2"),
    ("deepseek_v2", 8, "pp4 ep2"),
    ("deepseek_v2", 8, "tp2 ep4"),
    ("deepseek_v2", 8, "tp2 sp ep4 etp1"),
    ("deepseek_v2", 8, "tp2 sp pp2 cp2 ep2"),
    ("deepseek_v2 lite", 2, "replicated"),
    ("deepseek_v2 lite", 2, "tp2 sp ep2 etp1"),
    ("deepseek_v2 lite", 2, "cp2 packed"),
    ("deepseek_v2 lite", 4, "pp2 ep2"),
    ("deepseek_v2 lite", 8, "tp2 sp pp2 ep2"),
)

SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "vp": "num_layers_per_virtual_pipeline_stage",
    "first": "decoder_first_pipeline_num_layers",
}


def trial(name: str, world: int, layout: str, *, steps: int = 0, dtype: torch.dtype = torch.float32) -> Trial:
    """The trial that a line of LAYOUTS names."""
    words = dict(re.fullmatch("([a-z]+)([0-9]*)", word).groups() for word in layout.split())
    layers = words.pop("layers", None)
    is_packed = words.pop("packed", None) is not None
    switches = {
        "sequence_parallel": words.pop("sp", None) is not None,
        "use_distributed_optimizer": words.pop("replicated", None) is None,
    }
    sizes = {SIZES[word]: int(size) for word, size in words.items()}
    return Trial(
        name,
        ParallelConfig(**switches, **sizes),
        world,
        steps,
        dtype,
        model=dataclasses.replace(MODELS[name], num_layers=int(layers)) if layers else None,
        is_packed=is_packed,
    )
