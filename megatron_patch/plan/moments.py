"""The moments of a run at which a rank may hold the most memory, and how much it holds at each."""

from dataclasses import dataclass

from megatron_patch.plan.activations import LARGEST_HOLE, Activations

FP32 = 4
MOMENTS = 2  # of Adam: averages of the gradient and of its square


@dataclass
class Weights:
    """Elements of some parameters on a rank: `held` and `offloaded` are its shards, `whole` what layers compute with.

    `copied` are the bytes of the latter, in the precision of the layers, and `in_holes` those of them in small blocks.
    """

    held: int = 0
    offloaded: int = 0
    whole: int = 0
    copied: int = 0
    in_holes: int = 0

    def add(self, elements: int, shards: int, size: int, is_offloaded: bool) -> None:
        """A parameter of `elements` on each of `shards` ranks, whose copy takes `size` bytes for each."""
        self.held += 0 if is_offloaded else elements
        self.offloaded += elements if is_offloaded else 0
        self.whole += elements * shards
        copied = elements * shards * size
        self.copied += copied
        self.in_holes += copied if copied < LARGEST_HOLE else 0


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes of each part where it is held in full; `host`: of what is offloaded to the memory that is counted."""

    master_weights: int
    working_copy: int
    gradients: int
    accumulated_gradients: int
    optimizer: int
    activations: int
    logits: int
    checkpoint_copy: int
    host: int
    output_gradient: int


def fullest_moment(
    weights: dict[int, Weights],
    kept: Activations,
    state: StateBytes,
    *,
    is_accumulating: bool,
    is_saved_early: bool,
    on_cpu: bool,
) -> tuple[str, int]:
    """The name of the moment at which a rank holds most, and how many bytes that is.

    `weights` are by layer, −1 for what is in none; of the latter the gradient of the output layer is the first of all.
    `is_accumulating`: over several micro-batches; `is_saved_early`: a checkpoint is written before the last step.
    """
    always = state.master_weights + state.optimizer + state.host + (state.checkpoint_copy if is_saved_early else 0)
    holes = kept.in_holes if on_cpu else 0
    updated = always + state.gradients + holes
    plain_gradients = state.gradients if is_accumulating and not state.working_copy else 0
    copies = state.working_copy + state.accumulated_gradients + plain_gradients
    moments = {
        "end of the forward pass": always + copies + state.activations + state.logits,
        "backward pass": always + _backward(weights, kept, state, is_accumulating, on_cpu),
        "optimizer step": updated,
        "validation": updated + state.working_copy + state.logits,
    }
    if state.checkpoint_copy:
        copied = 0 if is_saved_early else state.checkpoint_copy
        moments["checkpoint"] = updated + state.working_copy + copied
    fullest = max(moments, key=lambda name: moments[name])
    return fullest, moments[fullest]


def _backward(
    weights: dict[int, Weights], kept: Activations, state: StateBytes, is_accumulating: bool, on_cpu: bool
) -> int:
    """Bytes beside what always is: layer by layer from the last, activations and copies go and gradients come."""
    copies, accumulated, has_copy = state.working_copy, state.accumulated_gradients, state.working_copy > 0
    gradients = state.gradients if is_accumulating and not has_copy else 0
    of_layers = [layer for layer in weights if layer >= 0]
    waiting = kept.kept
    first = state.output_gradient  # summed with its module's other parameters, the last of all
    gradients += first if has_copy or not is_accumulating else 0
    most, sent = 0, 0  # `sent`: what is being added up over ranks, kept until the next is
    for number, layer in zip(reversed(range(len(of_layers))), reversed(of_layers), strict=True):
        part = weights[layer]
        most = max(most, copies + accumulated + gradients + waiting + kept.work + sent)
        waiting -= kept.layers[number].all - (kept.layers[number].in_holes if on_cpu else 0)
        if not has_copy:
            gradients += 0 if is_accumulating else part.held * FP32
            continue
        copies -= part.copied - (part.in_holes if on_cpu else 0)
        sent, added = part.whole * FP32, part.held * FP32
        fresh = 0 if is_accumulating else part.copied
        most = max(most, copies + accumulated + gradients + waiting + fresh + sent)
        accumulated -= sent if is_accumulating else 0
        gradients += added
        most = max(most, copies + accumulated + gradients + waiting + sent * (2 if on_cpu else 1))
    gradients -= first if has_copy or not is_accumulating else 0
    return max(most, copies + accumulated + gradients + waiting + _last_sum(weights[-1], has_copy, on_cpu))


def _last_sum(rest: Weights, has_copy: bool, on_cpu: bool) -> int:
    """Embedding and output layer: their gradients, and what adds them up over ranks."""
    if not has_copy:
        return rest.held * FP32
    sent = rest.whole * FP32
    return sent + max(rest.copied, rest.held * FP32 + (sent if on_cpu else 0)) - rest.copied
