"""What autograd keeps of a micro-batch until its backward pass: an estimate from the tensors that the layers save."""

from dataclasses import dataclass

from megatron_patch.config.checks import sample_length
from megatron_patch.config.model import ModelConfig
from megatron_patch.config.run import RunConfig
from megatron_patch.parallel.grid import Grid

FP32 = 4
ROUTING_COPIES = 3  # of a token's logits over the experts, in float32: themselves, their softmax, the eligible
# Hidden rows beside those kept while SwiGLU's gradient is put together: the gradient that comes, those of gate and up,
# and both in one; the product's own input is no longer needed.
WORK_OF_MLP = 4
# glibc gives freed blocks back to the system one by one from this size on, however large a program's blocks are
# (M_MMAP_THRESHOLD in mallopt(3)). The holes that smaller ones leave seldom fit what is asked for next in a step.
LARGEST_HOLE = 32 * 2**20


@dataclass(frozen=True)
class Kept:
    """Bytes that autograd keeps of a micro-batch; `in_holes` are those of them in small blocks."""

    all: int = 0
    in_holes: int = 0


@dataclass(frozen=True)
class Activations:
    """What one micro-batch leaves to the backward pass of a pipeline stage, and what that pass needs besides, in bytes.

    `layers` is what is kept of each layer, in order; `logits` only the last stage has. Recomputation gives `recomputed`
    back for the layers at work. `waiting` micro-batches are under way when the first backward pass begins. `work` is
    what the backward pass of a layer's MLP holds besides.
    """

    layers: list[Kept]
    logits: int
    recomputed: Kept
    waiting: int
    work: int

    @property
    def kept(self) -> int:
        """Of all micro-batches under way, without logits."""
        return self.waiting * sum(layer.all for layer in self.layers) + self.recomputed.all

    @property
    def in_holes(self) -> int:
        """Of one micro-batch, in small blocks."""
        return sum(layer.in_holes for layer in self.layers) + self.recomputed.in_holes


def activations(run: RunConfig, grid: Grid, element_bytes: int, stages: list[list[range]], stage: int) -> Activations:
    """What autograd keeps on `stage`. `element_bytes` is the size of a number in the precision of the layers."""
    chunks, micro_batches = stages[stage], run.global_batch_size // (run.micro_batch_size * grid.dp)
    tokens = run.micro_batch_size * sample_length(run) // grid.cp
    per_token = tokens * element_bytes
    # 1F1B fills the pipeline before the first backward; interleaving has every chunk but one wait for another round.
    waiting = len(stages) - stage if len(chunks) == 1 else 2 * (len(stages) - stage - 1) + 1
    under_way = min(waiting + (len(chunks) - 1) * len(stages), micro_batches * len(chunks))
    width = max(_mlp_width(run, grid, layer) for chunk in chunks for layer in chunk)
    recomputed = (_in_bytes(blocks, per_token) for chunk in chunks for blocks in _recomputed(run, grid, chunk))
    return Activations(
        layers=[_in_bytes(blocks, per_token) for chunk in chunks for blocks in _kept_of_chunk(run, grid, chunk)],
        logits=int(tokens * _logits(run, grid, element_bytes)) if stage == len(stages) - 1 else 0,
        recomputed=max(recomputed, key=lambda kept: kept.all, default=Kept()),
        waiting=-(-under_way // len(chunks)),
        work=int(WORK_OF_MLP * width * per_token),
    )


def _in_bytes(blocks: list[float], per_token: int) -> Kept:
    sizes = [int(width * per_token) for width in blocks]
    return Kept(sum(sizes), sum(size for size in sizes if size < LARGEST_HOLE))


def _logits(run: RunConfig, grid: Grid, element_bytes: int) -> float:
    """Bytes per token: float32 beside what they were or will be in half precision, and what the last norm and the
    output layer were given."""
    columns = run.model.vocab_size / grid.tp
    half = element_bytes if element_bytes < FP32 else 0
    return columns * (FP32 + half) + element_bytes * run.model.hidden_size * (1 + _residual_share(run, grid))


def _kept_of_chunk(run: RunConfig, grid: Grid, chunk: range) -> list[list[float]]:
    """Numbers per token in each tensor that each of a chunk's layers keeps on the device."""
    if run.memory.recompute_granularity == "full":
        together, given = run.memory.recompute_num_layers, _residual_share(run, grid) * run.model.hidden_size
        return [[given] if number % together == 0 else [] for number in range(len(chunk))]
    offloaded = run.memory.cpu_offloading_num_layers
    return [[] if number < offloaded else _kept_of_layer(run, grid, layer) for number, layer in enumerate(chunk)]


def _recomputed(run: RunConfig, grid: Grid, chunk: range) -> list[list[float]]:
    """The same of the layers that the backward pass computes again at once."""
    if run.memory.recompute_granularity != "full":
        return []
    each, together = [_kept_of_layer(run, grid, layer) for layer in chunk], run.memory.recompute_num_layers
    groups = (each[first : first + together] for first in range(0, len(each), together))
    return [[width for blocks in group for width in blocks] for group in groups]


def _mlp_width(run: RunConfig, grid: Grid, layer: int) -> float:
    """Numbers per token of one hidden row, of all its experts."""
    model = run.model
    if model.is_moe_layer(layer):
        return model.moe_router_topk * model.moe_ffn_hidden_size / grid.etp
    return model.ffn_hidden_size / grid.tp


def _kept_of_layer(run: RunConfig, grid: Grid, layer: int) -> list[float]:
    model, residual = run.model, _residual_share(run, grid)
    kept = [residual * model.hidden_size, residual * model.hidden_size]  # what the two norms were given
    attention = _latent_attention if model.is_mla else _attention
    kept += attention(model, grid, run.memory.recompute_granularity == "selective")
    if model.is_moe_layer(layer):
        return kept + _experts(model, grid, residual)
    return [*kept, model.hidden_size, *_hidden(model.ffn_hidden_size / grid.tp)]


def _residual_share(run: RunConfig, grid: Grid) -> float:
    return 1 / grid.tp if run.parallel.sequence_parallel else 1.0


def _hidden(width: float) -> list[float]:
    """Gate and up together, and their product."""
    return [2 * width, width]


def _attention(model: ModelConfig, grid: Grid, is_selective: bool) -> list[float]:
    """The normalised input; queries, keys and values as kernels read them; what these give, and its tokens in order."""
    queries, keys = (heads * model.kv_channels for heads in (model.num_attention_heads, model.num_query_groups))
    core = [] if is_selective else [queries]
    return [
        model.hidden_size,
        *(block / grid.tp for block in (queries, keys * grid.cp, keys * grid.cp, *core, queries)),
    ]


def _latent_attention(model: ModelConfig, grid: Grid, is_selective: bool) -> list[float]:
    """The normalised input; latents and what they are before and after their norms; heads of queries, keys, values."""
    heads, width = model.num_attention_heads / grid.tp, model.qk_head_dim + model.qk_pos_emb_head_dim
    latents = [model.qk_pos_emb_head_dim, *(2 * [model.kv_lora_rank * grid.cp]), *(2 * [model.q_lora_rank or 0])]
    padded = max(width, model.v_head_dim)  # with the zeros that fused attention wants
    core = 0 if is_selective else padded
    values = padded + model.v_head_dim
    return [
        model.hidden_size,
        *latents,
        *(heads * block for block in (width, width * grid.cp, values * grid.cp, core)),
    ]


def _experts(model: ModelConfig, grid: Grid, residual: float) -> list[float]:
    """Routing; each chosen expert's copy of a token and its hidden rows; the same of the shared expert."""
    routing = ROUTING_COPIES * [residual * model.num_moe_experts]
    chosen, shared = model.moe_router_topk, model.moe_shared_expert_intermediate_size
    rows = [chosen * model.hidden_size, *_hidden(chosen * model.moe_ffn_hidden_size / grid.etp)]
    return [model.hidden_size, *routing, *rows, *([model.hidden_size, *_hidden(shared / grid.tp)] if shared else [])]
