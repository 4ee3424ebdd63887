"""Megatron-Core as the reader of a converted checkpoint: `logits.py ROOT RENDEZVOUS RANK WORLD TOKENS OUT`.

A process of its own, because Megatron-Core on a CPU needs torch.cuda patched globally. It imports nothing of
megatron_patch, takes the architecture from the checkpoint's own `args`, and rank 0 saves the logits of TOKENS.
"""

import os
import sys
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch


def pretend_cuda_is_the_cpu() -> None:
    """What Megatron-Core asks of torch.cuda while it builds and runs a model."""
    torch.set_num_threads(1)
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda **_: torch.get_rng_state()
    ones_on_device = torch.ones

    def ones(*size, device=None, **options):
        return ones_on_device(*size, device="cpu" if device == "cuda" else device, **options)

    torch.ones = ones  # the sliding-window mask is made with device="cuda"


def build(args):
    """A GPTModel of local modules, as Megatron's own arguments describe it."""
    import torch.nn.functional as functional
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        layernorm_epsilon=args.norm_epsilon,
        normalization=args.normalization,
        window_size=args.window_size,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        gated_linear_unit=args.swiglu,
        activation_func=functional.silu,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
    )
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization=args.normalization),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.seq_length,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        rotary_percent=args.rotary_percent,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        parallel_output=False,
    )


def main(root: str, rendezvous: str, rank: str, world: str, tokens: str, out: str) -> None:
    """Load the rank's file strictly, run one forward, save the logits."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    pretend_cuda_is_the_cpu()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(world)
    )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=int(world))
    model_parallel_cuda_manual_seed(1)
    iteration = (Path(root) / "latest_checkpointed_iteration.txt").read_text().strip()
    file = Path(root) / iteration / f"mp_rank_{int(rank):02d}" / "model_optim_rng.pt"
    checkpoint = torch.load(file, weights_only=False)
    model = build(checkpoint["args"]).eval()
    result = model.load_state_dict(checkpoint["model"], strict=False)
    lost = [key for key in result.missing_keys if not key.endswith("_extra_state")]
    if lost or result.unexpected_keys:
        raise SystemExit(f"Megatron-Core misses {lost} and does not know {result.unexpected_keys}")
    ids = torch.load(tokens)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    causal = torch.triu(torch.ones(ids.shape[1], ids.shape[1]), diagonal=1).bool()[None, None]
    with torch.no_grad():
        logits = model(ids, positions, causal)
    if rank == "0":
        torch.save(logits, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
