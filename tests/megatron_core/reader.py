"""Megatron-Core as the reader of converted checkpoints: `reader.py CASES.json`.

A process of its own, because Megatron-Core on a CPU needs torch patched globally. It imports nothing of
megatron_patch and takes architecture and layout from each checkpoint's own `args`. Every rank is a fork that builds its
stage of the model, loads its file strictly, by name and shape, and hands its output to the next stage; the last one
saves the logits. A case is a dict of `root` (checkpoint), `tokens` and `out` (files); what went wrong goes to
`out`.error.
"""

import json
import math
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch
import torch.distributed as dist

TIMEOUT = 120  # seconds a case


def pretend_cuda_is_the_cpu() -> None:
    """What Megatron-Core asks of torch.cuda and of Transformer Engine while it builds and runs a model."""
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401 (here, so that forks need not)
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda **_: torch.get_rng_state()
    torch.cuda.synchronize = lambda *_: None
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange"):
        setattr(torch, name, on_the_cpu(getattr(torch, name)))
    moe_utils.te_general_gemm = None
    multi_latent_attention.HAVE_TE = False


def on_the_cpu(make):
    """`make` for whom device="cuda" is the CPU."""

    def on_cpu(*size, device=None, **options):
        return make(*size, device="cpu" if str(device).startswith("cuda") else device, **options)

    return on_cpu


def configuration(args):
    """Megatron-Core's configuration, from arguments as Megatron itself would have it."""
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    kind, options = TransformerConfig, {}
    if args.multi_latent_attention:
        kind = MLATransformerConfig
        names = "q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rope_type rotary_base mscale"
        names += " mscale_all_dim rotary_scaling_factor beta_fast beta_slow"
        options = {name: getattr(args, name) for name in names.split()}
        if args.original_max_position_embeddings:
            options["original_max_position_embeddings"] = args.original_max_position_embeddings
    else:
        options = {name: getattr(args, name) for name in ("num_query_groups", "kv_channels")}
    if args.num_experts:
        names = [name for name in vars(args) if name.startswith("moe_")]
        options |= {name: getattr(args, name) for name in names} | {"num_moe_experts": args.num_experts}
        options |= {"moe_router_load_balancing_type": "none", "moe_token_dispatcher_type": "allgather"}
    return kind(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        layernorm_epsilon=args.norm_epsilon,
        normalization=args.normalization,
        window_size=args.window_size,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        qk_layernorm=args.qk_layernorm,
        gated_linear_unit=args.swiglu,
        activation_func=torch.nn.functional.silu,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=args.decoder_first_pipeline_num_layers,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        pipeline_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        **options,
    )


def build(args, chunk: int | None, is_first: bool, is_last: bool):
    """One virtual chunk of this rank's stage, of Megatron-Core's own modules."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    config = configuration(args)
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=args.normalization, vp_stage=chunk
    )
    if args.multi_latent_attention:
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = narrow_values()
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.seq_length,
        pre_process=is_first,
        post_process=is_last,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        rotary_percent=args.rotary_percent,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        parallel_output=False,
        vp_stage=chunk,
    ).eval()


def narrow_values():
    """A core attention whose values are narrower than its keys, which Megatron-Core has only in Transformer Engine."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class Narrow(DotProductAttention):
        def __init__(self, *args, k_channels=None, v_channels=None, **options):
            super().__init__(*args, **options)
            if v_channels:  # the generic attention builds one too, without channels, before MLA replaces it
                self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    return Narrow


def rank_file(directory: Path, args) -> Path:
    """Where Megatron looks for this rank's file (its `get_checkpoint_name`)."""
    from megatron.core import parallel_state

    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if args.pipeline_model_parallel_size > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if args.expert_model_parallel_size > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    return directory / name / "model_optim_rng.pt"


def load(model, state) -> None:
    """Load strictly: the names and shapes must be those of this rank's own modules."""
    result = model.load_state_dict(state, strict=False)
    lost = [key for key in result.missing_keys if not key.endswith("_extra_state")]
    if lost or result.unexpected_keys:
        raise ValueError(f"Megatron-Core misses {lost} and does not know {result.unexpected_keys}")


def load_rank_file(case, args, models) -> None:
    """Load this rank's file into its virtual chunks."""
    checkpoint = torch.load(rank_file(latest(case["root"]), args), weights_only=False)
    for chunk, model in enumerate(models):
        load(model, checkpoint[f"model{chunk}" if len(models) > 1 else "model"])


def run_rank(case, args, rendezvous: str, rank: int, world: int, load_models) -> None:
    """Everything one rank does."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    stages, chunks = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size or 1
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
    )
    model_parallel_cuda_manual_seed(1)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    tokens = torch.load(case["tokens"])
    ends = [(chunk == stage == 0, (chunk, stage) == (chunks - 1, stages - 1)) for chunk in range(chunks)]
    models = [build(args, chunk if chunks > 1 else None, *end) for chunk, end in enumerate(ends)]
    load_models(case, args, models)
    for model, (is_first, is_last) in zip(models, ends, strict=True):
        if not is_first:
            incoming = torch.empty(tokens.shape[1], tokens.shape[0], args.hidden_size)
            dist.recv(incoming, (rank - world // stages) % world)
            model.set_input_tensor(incoming)
        output = forward(model, tokens)
        if is_last and rank == world - world // stages:
            torch.save(output, case["out"])
        elif not is_last:
            dist.send(output.contiguous(), (rank + world // stages) % world)
    dist.barrier()


@torch.no_grad()
def forward(model, tokens):
    """Logits of the last chunk, hidden states of any other."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    causal = torch.triu(torch.ones(tokens.shape[1], tokens.shape[1]), diagonal=1).bool()[None, None]
    return model(tokens, positions, causal)


def latest(root: str) -> Path:
    return Path(root) / (Path(root) / "latest_checkpointed_iteration.txt").read_text().strip()


def world_size(args) -> int:
    """The fewest ranks that fill every axis once, the experts' too."""
    stages = args.pipeline_model_parallel_size
    experts = args.expert_tensor_parallel_size * args.expert_model_parallel_size * stages
    return math.lcm(args.tensor_model_parallel_size * stages, experts)


def run(case, load_models=load_rank_file) -> None:
    """Fork the ranks of one case and wait for them; its `layout` replaces that of the checkpoint's arguments."""
    args = torch.load(next(latest(case["root"]).rglob("*.pt")), weights_only=False, mmap=True)["args"]
    vars(args).update(case.get("layout", {}))
    world, error = world_size(args), Path(case["out"] + ".error")
    with tempfile.TemporaryDirectory() as directory:
        children = [fork(case, args, f"{directory}/rendezvous", rank, world, load_models) for rank in range(world)]
        deadline = time.monotonic() + TIMEOUT
        while children and time.monotonic() < deadline and not error.exists():
            children = [child for child in children if os.waitpid(child, os.WNOHANG) == (0, 0)]
            time.sleep(0.01)
        for child in children:
            os.kill(child, 9)
            os.waitpid(child, 0)
        if children and not error.exists():
            error.write_text(f"no result after {TIMEOUT} s")


def fork(case, args, rendezvous: str, rank: int, world: int, load_models) -> int:
    """Start a rank and return its process id; what it raises goes to the case's error file."""
    error = Path(case["out"] + ".error")
    child = os.fork()
    if child:
        return child
    try:
        run_rank(case, args, rendezvous, rank, world, load_models)
    except BaseException:
        error.with_suffix(f".{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        error.with_suffix(f".{rank}").rename(error)
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    pretend_cuda_is_the_cpu()
    for each in json.loads(Path(sys.argv[1]).read_text()):
        run(each)
