"""What autograd keeps of a micro-batch until its backward pass: an estimate from the tensors that the layers save."""

from megatron_patch.config.checks import sample_length
from megatron_patch.config.model import ModelConfig
from megatron_patch.config.run import RunConfig
from megatron_patch.parallel.grid import Grid
from megatron_patch.parallel.stages import resolve_stages

FP32 = 4
ROUTING_COPIES = 3  # of a token's logits over the experts, in float32: themselves, their softmax, the eligible


def activation_bytes(run: RunConfig, grid: Grid, element_bytes: int) -> int:
    """Bytes that the fullest pipeline stage keeps when most micro-batches are under way.

    `element_bytes` is the size of a number in the precision of the layers. Kernels' scratch memory and the temporary
    copies of one layer at work are not counted.
    """
    stages = resolve_stages(run.model.num_layers, run.parallel)
    tokens = run.micro_batch_size * sample_length(run) // grid.cp
    return max(_stage_bytes(run, grid, tokens, element_bytes, stages, stage) for stage in range(len(stages)))


def _stage_bytes(
    run: RunConfig, grid: Grid, tokens: int, element_bytes: int, stages: list[list[range]], stage: int
) -> int:
    chunks, micro_batches = stages[stage], run.global_batch_size // (run.micro_batch_size * grid.dp)
    layers = sum(_kept_of_chunk(run, grid, chunk) for chunk in chunks) / len(chunks)
    # 1F1B fills the pipeline before the first backward; interleaving has every chunk but one wait for another round.
    waiting = len(stages) - stage if len(chunks) == 1 else 2 * (len(stages) - stage - 1) + 1
    under_way = min(waiting + (len(chunks) - 1) * len(stages), micro_batches * len(chunks))
    kept = under_way * layers * tokens * element_bytes
    if stage == len(stages) - 1:
        model, residual = run.model, _residual_share(run, grid)
        kept += tokens * (FP32 * model.vocab_size / grid.tp + element_bytes * model.hidden_size * (1 + residual))
    return int(kept)


def _kept_of_chunk(run: RunConfig, grid: Grid, chunk: range) -> float:
    """Numbers per token that a chunk's layers keep on the device, in the precision of the layers."""
    each = [_kept_of_layer(run, grid, layer) for layer in chunk]
    if run.memory.recompute_granularity == "full":
        together = run.memory.recompute_num_layers
        inputs = -(-len(chunk) // together) * _residual_share(run, grid) * run.model.hidden_size
        return inputs + max(sum(each[first : first + together]) for first in range(0, len(each), together))
    return sum(each[run.memory.cpu_offloading_num_layers :])


def _kept_of_layer(run: RunConfig, grid: Grid, layer: int) -> float:
    model, residual = run.model, _residual_share(run, grid)
    kept = 2 * residual * model.hidden_size  # what the two norms were given
    if model.is_mla:
        kept += _latent_attention(model, grid, run.memory.recompute_granularity == "selective")
    else:
        kept += _attention(model, grid)
    if model.is_moe_layer(layer):
        return kept + _experts(model, grid, residual)
    return kept + model.hidden_size + 3 * model.ffn_hidden_size / grid.tp


def _residual_share(run: RunConfig, grid: Grid) -> float:
    return 1 / grid.tp if run.parallel.sequence_parallel else 1.0


def _attention(model: ModelConfig, grid: Grid) -> float:
    """The normalised input; queries, keys and values before and after rotation; the result."""
    queries, keys = (heads * model.kv_channels for heads in (model.num_attention_heads, model.num_query_groups))
    contiguous = queries if keys < queries else 0  # grouped queries are copied to stand side by side
    gathered = 2 * keys * (grid.cp if grid.cp > 1 else 0)
    return model.hidden_size + (2 * queries + 3 * keys + contiguous + queries + gathered) / grid.tp


def _latent_attention(model: ModelConfig, grid: Grid, is_selective: bool) -> float:
    """The normalised input; latents and what they are before and after their norms; heads of queries, keys, values."""
    heads, width = model.num_attention_heads, model.qk_head_dim + model.qk_pos_emb_head_dim
    shared = model.hidden_size + model.qk_pos_emb_head_dim + 2 * model.kv_lora_rank * grid.cp
    shared += 2 * model.q_lora_rank if model.q_lora_rank else 0
    values = max(width, model.v_head_dim) + model.v_head_dim  # with the zeros that fused attention wants
    core = 0 if is_selective else values - model.v_head_dim
    return shared + heads * (width + (width + values) * grid.cp + core) / grid.tp


def _experts(model: ModelConfig, grid: Grid, residual: float) -> float:
    """Routing; each chosen expert's copy of a token and its hidden rows; the same of the shared expert."""
    routing = ROUTING_COPIES * residual * model.num_moe_experts
    rows = model.moe_router_topk * (model.hidden_size + 3 * model.moe_ffn_hidden_size / grid.etp)
    shared = model.moe_shared_expert_intermediate_size
    return model.hidden_size + routing + rows + (model.hidden_size + 3 * shared / grid.tp if shared else 0)
