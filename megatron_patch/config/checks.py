"""Rules between the settings of a run: what is broken is reported together, and nothing is changed."""

from collections.abc import Callable, Iterable, Iterator

from megatron_patch.config.model import ModelConfig
from megatron_patch.config.run import RunConfig

Rule = tuple[bool, str]  # what must hold, and the sentence for when it does not
Fields = Iterable[tuple[object, str]]  # an owner and the names of its fields

GROUPED_MM_BYTES = 16  # torch.nn.functional.grouped_mm wants its strides to be multiples of it
ELEMENT_BYTES = {"fp32": 4, "bf16": 2}


def check(run: RunConfig, world: int) -> None:
    """Raise ValueError with every rule that `run` breaks on `world` ranks, one sentence per line."""
    broken = problems(run, world)
    if broken:
        raise ValueError("\n".join(broken))


def problems(run: RunConfig, world: int) -> list[str]:
    """The broken rules. Ranges come first: a division rule has no meaning for a size of zero."""
    out_of_range = _broken(_ranges(run))
    model = [*_attention(run.model), *_routing(run.model)]
    return out_of_range or _broken([*_division(run, world), *model, *_experts(run), *_optimization(run), *_inputs(run)])


def check_model(model: ModelConfig) -> None:
    """Raise ValueError with every rule that the architecture breaks on its own, one sentence per line."""
    broken = _broken(_model_ranges(model)) or _broken([*_attention(model), *_routing(model)])
    if broken:
        raise ValueError("\n".join(broken))


def product_problems(model: ModelConfig, precision: str) -> list[str]:
    """The broken rules of multiplying the experts' matrices in `precision`."""
    return _broken(_products(model, precision))


def sample_length(run: RunConfig) -> int:
    """Tokens per sample: raw records are padded to their own length."""
    return run.data.max_padding_length if run.data.dataset == "JSON-SFT" else run.data.seq_length


def _broken(rules: Iterable[Rule]) -> list[str]:
    return [sentence for holds, sentence in rules if not holds]


def _ranges(run: RunConfig) -> Iterator[Rule]:
    parallel, optimizer = run.parallel, run.optimizer
    yield from _model_ranges(run.model)
    at_least_one = (
        (parallel, "tensor_model_parallel_size pipeline_model_parallel_size"),
        (parallel, "context_parallel_size expert_model_parallel_size"),
        (run.data, "seq_length max_padding_length"),
        (run.checkpoint, "save_interval"),
        (run, "micro_batch_size global_batch_size log_interval eval_interval eval_iters"),
    )
    at_least_zero = (
        (optimizer, "lr min_lr lr_warmup_iters weight_decay clip_grad"),
        (run.data, "seed"),
    )
    above_zero = ((optimizer, "adam_eps"), (parallel, "distributed_timeout_minutes"))
    yield from _each_in_range(at_least_one, at_least_zero, above_zero)
    yield from _each(
        ((optimizer, "adam_beta1 adam_beta2"),), lambda value: 0 <= value < 1, "must be 0 or more and less than 1"
    )


def _model_ranges(model: ModelConfig) -> Iterator[Rule]:
    at_least_one = (
        (model, "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels vocab_size"),
        (model, "max_position_embeddings" if model.window_size is None else "max_position_embeddings window_size"),
        (model, _sizes_of_role(model)),
    )
    at_least_zero = (
        (model, "init_method_std kv_lora_rank num_moe_experts moe_first_dense_layers"),
        (model, "moe_shared_expert_intermediate_size"),
    )
    above_zero = (
        (model, "norm_epsilon rotary_base rotary_scaling_factor moe_router_topk_scaling_factor"),
        (model, "low_freq_factor high_freq_factor beta_fast beta_slow"),
    )
    yield from _each_in_range(at_least_one, at_least_zero, above_zero)


def _sizes_of_role(model: ModelConfig) -> str:
    """The sizes that this kind of attention and MLP must have, and another need not."""
    names = []
    if model.is_mla:
        names += ["qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"]
        names += ["q_lora_rank"] if model.q_lora_rank is not None else []
    if model.num_moe_experts:
        names += ["moe_router_topk", "moe_ffn_hidden_size", "moe_router_num_groups", "moe_router_group_topk"]
    if model.rope_type != "default" and model.original_max_position_embeddings is not None:
        names += ["original_max_position_embeddings"]
    return " ".join(names)


def _each_in_range(at_least_one: Fields, at_least_zero: Fields, above_zero: Fields) -> Iterator[Rule]:
    yield from _each(at_least_one, lambda value: value >= 1, "must be at least 1")
    yield from _each(at_least_zero, lambda value: 0 <= value < float("inf"), "must be 0 or more")
    yield from _each(above_zero, lambda value: 0 < value < float("inf"), "must be more than 0")


def _each(fields: Fields, holds: Callable[[float], bool], must: str) -> Iterator[Rule]:
    for owner, names in fields:
        for name in names.split():
            value = getattr(owner, name)
            yield holds(value), f"{name} {value} {must}"


def _division(run: RunConfig, world: int) -> Iterator[Rule]:
    model, parallel, length = run.model, run.parallel, sample_length(run)
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        size = getattr(model, name)
        yield size % tp == 0, f"{name} {size} is not a multiple of tensor_model_parallel_size {tp}"
    yield (
        not parallel.sequence_parallel or length % tp == 0,
        f"sequence_parallel cuts the {length} tokens of a sample into equal parts, and tensor_model_parallel_size {tp} "
        "does not divide them",
    )
    yield (
        length <= model.max_position_embeddings,
        f"{length} tokens per sample are more than max_position_embeddings {model.max_position_embeddings}",
    )
    ranks = tp * pp * cp
    dp, rest = divmod(world, ranks)
    yield (
        rest == 0,
        f"tensor_model_parallel_size {tp} × pipeline_model_parallel_size {pp} × context_parallel_size {cp} = {ranks} "
        f"does not divide {world} ranks",
    )
    yield (
        rest != 0 or run.global_batch_size % (run.micro_batch_size * dp) == 0,
        f"global_batch_size {run.global_batch_size} is not a multiple of micro_batch_size {run.micro_batch_size} × "
        f"{dp} data-parallel ranks",
    )


def _attention(model: ModelConfig) -> Iterator[Rule]:
    yield (
        model.num_attention_heads % model.num_query_groups == 0,
        f"num_attention_heads {model.num_attention_heads} is not a multiple of num_query_groups "
        f"{model.num_query_groups}",
    )
    turned = "qk_pos_emb_head_dim" if model.is_mla else "kv_channels"
    width = getattr(model, turned)
    yield width % 2 == 0, f"{turned} {width} must be even: rotary positions pair channels"
    yield (
        model.rope_type == "default" or model.original_max_position_embeddings is not None,
        f"rope_type {model.rope_type} needs original_max_position_embeddings, the context before it was stretched",
    )
    yield (
        model.rope_type != "llama3" or model.low_freq_factor < model.high_freq_factor,
        f"low_freq_factor {model.low_freq_factor} must be less than high_freq_factor {model.high_freq_factor}",
    )
    yield (
        model.rope_type != "yarn" or model.beta_slow < model.beta_fast,
        f"beta_slow {model.beta_slow} must be less than beta_fast {model.beta_fast}",
    )


def _experts(run: RunConfig) -> Iterator[Rule]:
    model, tp = run.model, run.parallel.tensor_model_parallel_size
    whole = [name for name, has in (("experts", model.num_moe_experts), ("latent attention", model.is_mla)) if has]
    yield (
        tp == 1 or not whole,
        f"tensor_model_parallel_size {tp}: {' and '.join(whole)} cannot be cut over tensor-parallel ranks yet; use 1, "
        "and more data-parallel ranks",
    )
    yield (
        model.moe_shared_expert_intermediate_size > 0 or not (model.num_moe_experts and model.moe_shared_expert_gate),
        "moe_shared_expert_gate needs moe_shared_expert_intermediate_size of at least 1",
    )
    yield from _products(model, run.precision)


def _products(model: ModelConfig, precision: str) -> Iterator[Rule]:
    step = GROUPED_MM_BYTES // ELEMENT_BYTES[precision]
    for name in ("hidden_size", "moe_ffn_hidden_size") if model.num_moe_experts else ():
        size = getattr(model, name)
        yield (
            size % step == 0,
            f"{name} {size} is not a multiple of {step}: experts are multiplied in rows of whole {GROUPED_MM_BYTES} "
            f"bytes, which precision {precision} fills with {step}",
        )


def _routing(model: ModelConfig) -> Iterator[Rule]:
    if not model.num_moe_experts:
        return
    experts, groups, chosen = model.num_moe_experts, model.moe_router_num_groups, model.moe_router_group_topk
    yield (
        model.moe_first_dense_layers < model.num_layers,
        f"moe_first_dense_layers {model.moe_first_dense_layers} must be less than num_layers {model.num_layers}",
    )
    yield (
        experts % groups == 0 and chosen <= groups,
        f"moe_router_group_topk {chosen} of moe_router_num_groups {groups} with num_moe_experts {experts}: groups must "
        "be equal, and no more be chosen than there are",
    )
    yield (
        model.moe_router_topk <= experts // groups * chosen,
        f"moe_router_topk {model.moe_router_topk} is more than the {experts // groups * chosen} experts that a token "
        "may choose from",
    )


def _optimization(run: RunConfig) -> Iterator[Rule]:
    optimizer, length = run.optimizer, sample_length(run)
    yield (
        run.train_iters >= 1,
        f"train_iters {run.train_iters} must be at least 1; one iteration takes global_batch_size "
        f"{run.global_batch_size} × {length} = {run.global_batch_size * length} tokens",
    )
    yield (
        run.train_iters < 1 or optimizer.lr_warmup_iters < optimizer.lr_decay_iters,
        f"lr_warmup_iters {optimizer.lr_warmup_iters} must be less than lr_decay_iters {optimizer.lr_decay_iters}",
    )
    yield optimizer.lr >= optimizer.min_lr, f"lr {optimizer.lr} must be at least min_lr {optimizer.min_lr}"


def _inputs(run: RunConfig) -> Iterator[Rule]:
    yield (
        run.checkpoint.load is not None or run.data.tokenizer_model is not None,
        "without a checkpoint to load, --tokenizer-model must name the tokenizer's directory",
    )
    yield (
        run.data.dataset == "MMAP" or len(run.data.train_data_path) == len(run.data.valid_data_path) == 1,
        "raw records come from one JSON file each for training and validation",
    )
