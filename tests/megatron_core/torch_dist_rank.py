"""One rank of Megatron-Core and its distributed checkpoints: `torch_dist_rank.py JOB.json RENDEZVOUS RANK`.

A process of its own, because Megatron-Core on a CPU needs torch patched globally. It imports nothing of
megatron_patch. The model is that of the checkpoint in `load`, or a random one. `save` is where Megatron-Core then
writes it as a checkpoint, `tensors` where its tensors go under Megatron-Core's own names, `logits` where rank 0 saves
what it computes for `tokens`.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch


def pretend_cuda_is_the_cpu() -> None:
    """What Megatron-Core asks of torch.cuda and of Transformer Engine while it builds and runs a model."""
    torch.set_num_threads(1)
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.synchronize = lambda *_: None
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None
    multi_latent_attention.HAVE_TE = False


def _on_cpu(make):
    def on_cpu(*size, device=None, **options):
        return make(*size, device="cpu" if str(device).startswith("cuda") else device, **options)

    return on_cpu


def build(job):
    """A GPTModel of local modules."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    kind = MLATransformerConfig if job["config"].get("multi_latent_attention") else TransformerConfig
    config = kind(
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        init_method_std=0.2,
        tensor_model_parallel_size=job["tp"],
        pipeline_model_parallel_size=job["pp"],
        expert_model_parallel_size=job["ep"],
        pipeline_dtype=torch.float32,
        **job["config"],
    )
    if kind is MLATransformerConfig or isinstance(config.moe_layer_freq, list):
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    else:
        spec = get_gpt_layer_local_spec(config.num_moe_experts, normalization="RMSNorm", moe_grouped_gemm=False)
    if kind is MLATransformerConfig:
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = narrow_values()
    stages = job["pp"]
    stage = torch.distributed.get_rank() * stages // torch.distributed.get_world_size()
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        pre_process=stage == 0,
        post_process=stage == stages - 1,
        position_embedding_type="rope",
        parallel_output=False,
        **job["gpt"],
    )


def narrow_values():
    """A core attention whose values are narrower than its keys, which Megatron-Core has only in Transformer Engine."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class Narrow(DotProductAttention):
        def __init__(self, *args, k_channels=None, v_channels=None, **options):
            super().__init__(*args, **options)
            if v_channels:  # the generic attention builds one too, without channels, before MLA replaces it
                self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    return Narrow


def content(job):
    return {"singleton_local_shards": job["singleton"]}


def randomise_norms(model) -> None:
    """Norms of one would hide a swap."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)


def save(model, job) -> None:
    """Write the model the way Megatron does, and its tensors under its own names for whoever wants to compare."""
    from megatron.core import dist_checkpointing, parallel_state

    state = model.sharded_state_dict(metadata=content(job))
    arguments = {"args": _namespace(job), "checkpoint_version": 3.0, "iteration": 7}
    directory = Path(job["save"]) / "iter_0000007"
    if torch.distributed.get_rank() == 0:
        directory.mkdir(parents=True)
        (directory.parent / "latest_checkpointed_iteration.txt").write_text("7")
    torch.distributed.barrier()
    dist_checkpointing.save(arguments | state, str(directory), content_metadata=content(job))
    if job.get("tensors"):
        assert parallel_state.get_tensor_model_parallel_world_size() == torch.distributed.get_world_size() == 1
        torch.save({name: value for name, value in model.state_dict().items() if value is not None}, job["tensors"])


def _namespace(job):
    from argparse import Namespace

    from megatron.core.transformer.enums import AttnBackend

    sizes = {f"{name}_model_parallel_size": job[short] for name, short in (("tensor", "tp"), ("pipeline", "pp"))}
    return Namespace(**job["args"], **sizes, attention_backend=AttnBackend.auto)


def load(model, job) -> None:
    """Read the checkpoint the way Megatron does: strictly, after its own content metadata."""
    from megatron.core import dist_checkpointing

    tracker = Path(job["load"]) / "latest_checkpointed_iteration.txt"
    iteration = tracker.read_text().strip()
    directory = str(tracker.with_name(iteration if iteration == "release" else f"iter_{int(iteration):07d}"))
    assert dist_checkpointing.check_is_distributed_checkpoint(directory)
    common = dist_checkpointing.load_common_state_dict(directory)
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    wanted = model.sharded_state_dict(metadata=metadata)
    state, missing, unexpected = dist_checkpointing.load(wanted, directory, strict="return_all")
    assert not missing, missing
    assert not [name for name in unexpected if "_extra_state" not in name], unexpected
    result = model.load_state_dict({name: value for name, value in state.items() if name not in common}, strict=False)
    lost = [key for key in result.missing_keys if not key.endswith("_extra_state")]
    assert not lost and not result.unexpected_keys, (lost, result.unexpected_keys)


def forward(model, job) -> torch.Tensor:
    ids = torch.tensor(job["tokens"])
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    causal = torch.triu(torch.ones(ids.shape[1], ids.shape[1]), diagonal=1).bool()[None, None]
    with torch.no_grad():
        return model(ids, positions, causal)


def main(job_file: str, rendezvous: str, rank: str) -> None:
    """Build, save or load, and compute."""
    job = json.loads(Path(job_file).read_text())
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    pretend_cuda_is_the_cpu()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=job["world"]
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=job["tp"],
        pipeline_model_parallel_size=job["pp"],
        expert_model_parallel_size=job["ep"],
        expert_tensor_parallel_size=1 if job["ep"] > 1 else None,
    )
    model_parallel_cuda_manual_seed(1)
    with contextlib.redirect_stdout(sys.stderr):
        model = build(job).eval()
        load(model, job) if job.get("load") else randomise_norms(model)
        if job.get("save"):
            save(model, job)
        if job.get("logits"):
            logits = forward(model, job)
            if rank == "0":
                torch.save(logits, job["logits"])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
