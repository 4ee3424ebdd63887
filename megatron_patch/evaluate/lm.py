"""This project's checkpoints as a model of lm-eval.

lm-eval's own `hf` model stays in charge of what a text's tokens are, so that scores differ from its by nothing but who
computes the probabilities.
"""

from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PretrainedConfig

from megatron_patch.inference.decoding import Decoding
from megatron_patch.inference.engine import Engine, open_engine

NUMBERS = {"top_k": int, "top_p": float, "num_beams": int, "length_penalty": float}  # transformers' names, and ours
OPTIONAL = ("tokenizer", "tp", "pp", "ep", "precision", "add_bos_token")  # of --model_args


class Described:
    """What lm-eval's `hf` model reads off a transformers model that it does not call."""

    def __init__(self, engine: Engine) -> None:
        self.device, self.dtype = engine.device, engine.forward.dtype
        self.config = PretrainedConfig(max_position_embeddings=engine.config.max_position_embeddings)


@register_model("megatron_patch")
class CheckpointLM(HFLM):
    """`checkpoint`: a directory of any format that this project reads; `tokenizer`: one, where that holds none.

    lm-eval sees one model: the engine shares texts among the ranks that tp · pp leave of the world.
    """

    def __init__(
        self,
        checkpoint: str = "",
        tokenizer: str | None = None,
        tp: int = 1,
        pp: int = 1,
        ep: int = 1,
        precision: str = "fp32",
        batch_size: int | str = 1,
        add_bos_token: bool | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown: object,
    ) -> None:
        """Raises ValueError in one sentence for what --model_args lacks or misspells and for what the engine raises."""
        del max_batch_size, device  # lm-eval always passes them; the first is of `auto`, a rank's device is its own
        if unknown or not checkpoint:
            wrong = f"has the unknown {', '.join(unknown)}" if unknown else "names no checkpoint"
            raise ValueError(f"--model_args {wrong}; allowed: checkpoint=DIR and {', '.join(OPTIONAL)}")
        for name, size in (("tp", tp), ("pp", pp), ("ep", ep)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"--model_args {name} is {size}; allowed: a whole number of ranks ≥ 1")
        if not str(batch_size).isdigit() or not int(batch_size):
            raise ValueError(f"--batch_size {batch_size} must be a whole number of texts, such as 16")
        self.engine = open_engine(checkpoint, tokenizer=tokenizer, tp=tp, pp=pp, ep=ep, precision=precision)
        if self.engine.tokenizer is None:
            raise ValueError(f"{checkpoint} holds no tokenizer; name one: --model_args checkpoint=…,tokenizer=DIR")
        super().__init__(
            pretrained=Described(self.engine),
            backend="causal",
            tokenizer=self.engine.tokenizer,
            batch_size=batch_size,
            add_bos_token=add_bos_token,
        )

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """The log-probability of each request's continuation, and whether it is what greedy decoding would write."""
        pairs = [(context, continuation) for _, context, continuation in requests]
        answers = self.engine.log_likelihoods(pairs, override_bs or self.batch_size)
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:  # a rolling window is no request of its own
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], attention_mask: Tensor, **options: Any
    ) -> Tensor:
        """Left-padded prompts [B, S] and what follows them, padded on the right [B, S + new]."""
        prompts = [row[kept.bool()].tolist() for row, kept in zip(context, attention_mask, strict=True)]
        decoding = Decoding(max_new_tokens=max_length - context.shape[1], stop_strings=tuple(stop), **choice(options))
        tokens = [list(completion.tokens) for completion in self.engine.generate(prompts, decoding)]
        longest, padding = max(map(len, tokens)), self.tokenizer.pad_token_id
        padded = [row + [padding] * (longest - len(row)) for row in tokens]
        return torch.cat([context, torch.tensor(padded, dtype=context.dtype, device=context.device)], dim=1)


def choice(options: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's generation arguments, which are transformers', as those of `Decoding`.

    A temperature of 0, or none, is greedy unless `do_sample` says otherwise. Raises ValueError for an unknown one.
    """
    unknown = sorted(set(options) - {"do_sample", "temperature", *NUMBERS})
    if unknown:
        known = ", ".join(["do_sample", "temperature", *NUMBERS])
        raise ValueError(f"--gen_kwargs {', '.join(unknown)} is not known; there are until, max_gen_toks, {known}")
    temperature = float(options.get("temperature") or 0)
    is_sampled = bool(temperature) if options.get("do_sample") is None else options["do_sample"]
    chosen = {name: kind(options[name]) for name, kind in NUMBERS.items() if name in options}
    return chosen | {"do_sample": is_sampled, "temperature": temperature if is_sampled and temperature else 1.0}
