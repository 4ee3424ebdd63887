"""A checkpoint of any format on the ranks that there are, ready to score texts and to write them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_patch.checkpoint.source import open_checkpoint
from megatron_patch.config.checks import check_layout, check_model
from megatron_patch.config.model import ModelConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.data.json_lines import parse_object
from megatron_patch.data.tokenizer import HUGGING_FACE, SENTENCEPIECE, check_vocabulary, load_tokenizer
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest
from megatron_patch.families.resolve import from_checkpoint
from megatron_patch.inference.beam import Search, search_beams
from megatron_patch.inference.decoding import Completion, Decoding
from megatron_patch.inference.forward import Forward
from megatron_patch.inference.rows import OnToken, write_rows
from megatron_patch.inference.scoring import Row, score
from megatron_patch.inference.text import decode, holds_stop
from megatron_patch.model.build import DTYPES
from megatron_patch.model.decoder import GPTModel
from megatron_patch.model.kernels import resolve_kernel
from megatron_patch.model.router import TopKRouter
from megatron_patch.parallel.grid import resolve_grid
from megatron_patch.parallel.mesh import Mesh, build_mesh, local_device, single_process, start_process_group
from megatron_patch.parallel.stages import resolve_stages
from megatron_patch.weights.load import load_weights

T = TypeVar("T")
TIMEOUT_MINUTES = 10.0
PRECISIONS = ("fp32", "bf16")


class Engine:
    """A model that answers. Every rank calls its methods with the same arguments, and gets the same results.

    Data-parallel ranks share the prompts. `tokenizer` is None where none was named and the checkpoint holds none;
    then every `Completion.text` is empty. `stop_ids` end a text: the checkpoint's EOS.
    """

    def __init__(self, forward: Forward, tokenizer: Any, stop_ids: tuple[int, ...], default_prompt: str) -> None:
        self.forward, self.tokenizer, self.stop_ids = forward, tokenizer, stop_ids
        self.default_prompt = default_prompt  # the family's template, where the tokenizer has none
        self.config, self.mesh, self.device = forward.config, forward.mesh, forward.mesh.device

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], options: Decoding, on_token: OnToken | None = None
    ) -> list[Completion]:
        """`num_return_sequences` completions of each prompt, prompt by prompt, of beams the best first.

        All prompts are one batch. `on_token(row, token)` is called as tokens come, for the rows of this data-parallel
        rank; beams tell nothing before they are complete. Raises ValueError for a prompt that is empty or leaves no
        room, an id that is not in the vocabulary, and stop strings without a tokenizer.
        """
        self._check(prompts, options)
        stop_ids = self.stop_ids if options.stop_ids is None else options.stop_ids

        def ends(tokens: Sequence[int]) -> bool:
            return tokens[-1] in stop_ids or holds_stop(self.tokenizer, tokens, options.stop_strings)

        mine = range(self.mesh.dp.rank, len(prompts), self.mesh.dp.size)
        share = [list(prompts[place]) for place in mine]
        numbers = [place * options.num_return_sequences for place in mine]
        work = (self.forward, share or [[0]], numbers or [0], options)  # a rank without a prompt keeps others company
        if not share and not self.forward.is_in_step:
            found = []
        elif options.num_beams > 1:
            searches = search_beams(*work, stop_ids, ends)
            found = [self._beams(search, options) for search in searches]
        else:
            rows = write_rows(*work, ends, on_token or (lambda row, token: None))
            count = options.num_return_sequences
            done = [self._completion(row.tokens, row.log_probs, row.is_stopped, options) for row in rows]
            found = [done[first : first + count] for first in range(0, len(done), count)]
        return [completion for group in self._shared(found[: len(share)], len(prompts)) for completion in group]

    @torch.inference_mode()
    def log_likelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int
    ) -> list[tuple[float, bool]]:
        """Of each (context, continuation) the sum of log p(token | all before it) over its continuation, and
        whether each of these tokens is the likeliest. Float32, over the real vocabulary.

        A context that is too long for the model loses its beginning. Raises ValueError for an empty context or
        continuation, and for an id that is not in the vocabulary.
        """
        longest = self.config.max_position_embeddings
        for context, continuation in pairs:
            self._check_ids([*context, *continuation])
            if not context or not continuation or len(continuation) > longest:
                raise ValueError(
                    f"a context has {len(context)} tokens and its continuation {len(continuation)}; each needs one, "
                    f"and a continuation may have {longest}"
                )
        shared = _shared_contexts(pairs, longest)
        rows = sorted(shared, key=lambda row: -len(row.tokens))
        batches = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
        mine = batches[self.mesh.dp.rank :: self.mesh.dp.size]
        passes = -(-len(batches) // self.mesh.dp.size) if self.forward.is_in_step else len(mine)
        found = {}
        for number in range(passes):
            batch = mine[number] if number < len(mine) else []
            places = [place for row in batch for place in shared[row]]
            found |= dict(zip(places, score(self.forward, batch or [Row((0,), 0, (0,))]), strict=False))
        for other in self._gathered(found):
            found |= other
        return [found[place] for place in range(len(pairs))]

    def _check(self, prompts: Sequence[Sequence[int]], options: Decoding) -> None:
        if self.tokenizer is None and options.stop_strings:
            raise ValueError("stop strings need a tokenizer, and the checkpoint holds none; name one")
        for number, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {number} is empty; a model needs at least one token to go on from")
            self._check_ids(prompt)
            options.new_tokens(len(prompt), self.config.max_position_embeddings)

    def _check_ids(self, tokens: Sequence[int]) -> None:
        if min(tokens, default=0) < 0 or max(tokens, default=0) >= self.config.vocab_size:
            raise ValueError(f"token ids must be 0 to {self.config.vocab_size - 1}, and one is not")

    def _beams(self, search: Search, options: Decoding) -> list[Completion]:
        return [
            self._completion(beam.tokens, beam.log_probs, beam.is_stopped, options, value)
            for value, beam in search.complete[: options.num_return_sequences]
        ]

    def _completion(
        self,
        tokens: Sequence[int],
        log_probs: Sequence[float],
        is_stopped: bool,
        options: Decoding,
        value: float | None = None,
    ) -> Completion:
        text = decode(self.tokenizer, tokens, options.stop_strings) if self.tokenizer is not None else ""
        return Completion(tuple(tokens), text, tuple(log_probs), is_stopped, value)

    def _shared(self, mine: list[T], count: int) -> list[T]:
        """What data-parallel rank r has of numbers r, r + dp, …, put together in order."""
        shares = self._gathered(mine)
        return [shares[number % len(shares)][number // len(shares)] for number in range(count)]

    def _gathered(self, mine: T) -> list[T]:
        if self.mesh.dp.size == 1:
            return [mine]
        gathered: list[Any] = [None] * self.mesh.dp.size
        dist.all_gather_object(gathered, mine, group=self.mesh.dp.group)
        return gathered


def open_engine(
    checkpoint: str | Path,
    *,
    tokenizer: str | Path | None = None,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    precision: str = "fp32",
) -> Engine:
    """The model in `checkpoint`, whatever its format, over the ranks that torchrun's variables describe, or this alone.

    Data-parallel ranks are what tp · pp leave of the world. Raises ValueError or FileNotFoundError, in one sentence,
    for a layout that the model or the world does not allow and for what reading a checkpoint raises.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; a model answers in {' or '.join(PRECISIONS)}")
    resolved = from_checkpoint(tuple(ALL), "auto", checkpoint)
    family, config = resolved.family, resolved.config
    check_model(config)
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, expert_model_parallel_size=ep
    )
    check_layout(config, parallel)
    stages = resolve_stages(config.num_layers, parallel)
    text = _tokenizer(checkpoint, tokenizer)
    if text is not None:
        check_vocabulary(text, config.vocab_size)
    mesh = _mesh(parallel)
    dtype = DTYPES[precision]
    model = _empty_model(config, stages[mesh.pp.rank][0], mesh, dtype)
    load_weights([model], manifest(family, config), open_checkpoint(checkpoint, family, config), mesh)
    kernel = resolve_kernel(config, mesh, dtype, fastest=True)
    forward = Forward(config, model.eval().requires_grad_(False), mesh, kernel, dtype)
    return Engine(forward, text, _stop_ids(Path(checkpoint), text), family.prompt_type)


def _mesh(parallel: ParallelConfig) -> Mesh:
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        resolve_grid(parallel, 1)
        return single_process(local_device(0))
    if not dist.is_initialized():
        device = start_process_group(TIMEOUT_MINUTES)
    elif dist.get_backend() == "gloo":
        device = torch.device("cpu")
    else:
        device = local_device(int(os.environ.get("LOCAL_RANK", "0")))
    grid = resolve_grid(parallel, dist.get_world_size())
    return build_mesh(grid, device, sharded=False, sequence_parallel=False, timeout_minutes=TIMEOUT_MINUTES)


def _empty_model(config: ModelConfig, layers: range, mesh: Mesh, dtype: torch.dtype) -> GPTModel:
    """Memory for this rank's weights in `dtype`; which expert is the best must not hang on rounded ones."""
    with torch.device("meta"):
        model = GPTModel(config, layers, mesh).to(dtype)
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.float()
    return model.to_empty(device=mesh.device)


def _tokenizer(checkpoint: str | Path, named: str | Path | None) -> Any:
    held = (SENTENCEPIECE, *(name for name in HUGGING_FACE if name != "config.json"))
    if named is None and not any(Path(checkpoint, name).is_file() for name in held):
        return None
    return load_tokenizer(checkpoint if named is None else named)


def _stop_ids(checkpoint: Path, tokenizer: Any) -> tuple[int, ...]:
    """The EOS of generation_config.json, else of config.json, and the tokenizer's."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        told = _read_object(checkpoint / name).get("eos_token_id")
        if told is not None:
            found = told if isinstance(told, list) else [told]
            break
    own = [] if tokenizer is None or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tuple(dict.fromkeys([*found, *own]))


def _read_object(path: Path) -> dict[str, Any]:
    """What a JSON file says, nothing where there is none. Raises ValueError naming it for one that is no object."""
    return parse_object(path.read_bytes(), str(path)) if path.is_file() else {}


def _shared_contexts(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], longest: int) -> dict[Row, list[int]]:
    """The rows to run, and of each end in them its place in `pairs`: choices of one question are one row."""
    groups: dict[tuple[tuple[int, ...], int], list[tuple[int, int]]] = {}
    for place, (context, continuation) in enumerate(pairs):
        *tokens, end = [*context, *continuation][-(longest + 1) :]
        groups.setdefault((tuple(tokens), len(continuation) - 1), []).append((place, end))
    return {
        Row(tokens, count, tuple(end for _, end in ends)): [place for place, _ in ends]
        for (tokens, count), ends in groups.items()
    }
