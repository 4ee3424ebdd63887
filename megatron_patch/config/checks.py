"""Rules between the settings of a run: what is broken is reported together, and nothing is changed."""

from collections.abc import Callable, Iterable, Iterator

from megatron_patch.config.model import ModelConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.config.run import RunConfig

Rule = tuple[bool, str]  # what must hold, and the sentence for when it does not
Fields = Iterable[tuple[object, str]]  # an owner and the names of its fields

OPTIONAL_SIZES = "expert_tensor_parallel_size num_layers_per_virtual_pipeline_stage decoder_first_pipeline_num_layers"
LARGEST_SEED = 2**32 - 1  # NumPy's
SHORTEST_TIMEOUT, LONGEST_TIMEOUT = 0.01, 10080  # minutes; a week


def check(run: RunConfig, world: int) -> None:
    """Raise ValueError with every rule that `run` breaks on `world` ranks, one sentence per line."""
    broken = problems(run, world)
    if broken:
        raise ValueError("\n".join(broken))


def problems(run: RunConfig, world: int) -> list[str]:
    """The broken rules. Ranges come first: a division rule has no meaning for a size of zero."""
    out_of_range = _broken(_ranges(run))
    model = [*_attention(run.model), *_routing(run.model), *_experts(run.model, run.parallel)]
    return out_of_range or _broken(
        [*_division(run, world), *_pipeline(run, world), *model, *_optimization(run), *_inputs(run)]
    )


def check_model(model: ModelConfig) -> None:
    """Raise ValueError with every rule that the architecture breaks on its own, one sentence per line."""
    broken = _broken(_model_ranges(model)) or _broken([*_attention(model), *_routing(model)])
    if broken:
        raise ValueError("\n".join(broken))


def check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raise ValueError with every size of the model that its ranks cannot share equally, one sentence per line."""
    sizes = ((parallel, "tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size"),)
    out_of_range = _broken(_each_in_range(sizes, (), ()))
    broken = out_of_range or _broken([*_shares(model, parallel), *_experts(model, parallel)])
    if broken:
        raise ValueError("\n".join(broken))


def sample_length(run: RunConfig) -> int:
    """Tokens per sample: raw records are padded to their own length."""
    return getattr(run.data, _length_field(run))


def _length_field(run: RunConfig) -> str:
    return "max_padding_length" if run.data.dataset == "JSON-SFT" else "seq_length"


def _broken(rules: Iterable[Rule]) -> list[str]:
    return [sentence for holds, sentence in rules if not holds]


def _ranges(run: RunConfig) -> Iterator[Rule]:
    parallel, optimizer = run.parallel, run.optimizer
    yield from _model_ranges(run.model)
    at_least_one = (
        (parallel, "tensor_model_parallel_size pipeline_model_parallel_size"),
        (parallel, "context_parallel_size expert_model_parallel_size"),
        (run.memory, "recompute_num_layers"),
        (parallel, _given(parallel, OPTIONAL_SIZES)),
        (run.data, "seq_length max_padding_length"),
        (run.checkpoint, "save_interval"),
        (run, "micro_batch_size global_batch_size log_interval eval_interval max_nonfinite_steps"),
    )
    at_least_zero = (
        (optimizer, "lr min_lr lr_warmup_iters weight_decay clip_grad"),
        (run.checkpoint, "keep_last"),
        (run.data, "show_samples"),
        (run, "eval_iters"),
        (run.memory, "cpu_offloading_num_layers"),
    )
    yield from _each_in_range(at_least_one, at_least_zero, ((optimizer, "adam_eps"),))
    yield from _between(run.memory, "optimizer_offload_fraction", 0, 1)
    yield from _between(run.data, "seed", 0, LARGEST_SEED)
    yield from _between(parallel, "distributed_timeout_minutes", SHORTEST_TIMEOUT, LONGEST_TIMEOUT)
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
        (model, "moe_shared_expert_intermediate_size moe_aux_loss_coeff moe_z_loss_coeff"),
    )
    above_zero = (
        (model, "norm_epsilon rotary_base rotary_scaling_factor moe_router_topk_scaling_factor"),
        (model, "low_freq_factor high_freq_factor beta_fast beta_slow"),
    )
    yield from _each_in_range(at_least_one, at_least_zero, above_zero)


def _given(owner: object, names: str) -> str:
    """Those of `names` that are not left out."""
    return " ".join(name for name in names.split() if getattr(owner, name) is not None)


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


def _between(owner: object, name: str, least: float, most: float) -> Iterator[Rule]:
    return _each(((owner, name),), lambda value: least <= value <= most, f"must be {least} to {most}")


def _division(run: RunConfig, world: int) -> Iterator[Rule]:
    model, parallel, length = run.model, run.parallel, sample_length(run)
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    yield from _shares(model, parallel)
    yield _equal_parts(length, cp, tp if parallel.sequence_parallel else 1)
    yield (
        length <= model.max_position_embeddings,
        f"{_length_field(run)}: {length} tokens per sample are more than max_position_embeddings "
        f"{model.max_position_embeddings}",
    )
    ranks = tp * pp * cp
    dp, rest = divmod(world, ranks)
    yield (
        rest == 0,
        f"tensor_model_parallel_size {tp} × pipeline_model_parallel_size {pp} × context_parallel_size {cp} = {ranks} "
        f"does not divide {world} ranks",
    )
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    of_experts = (tp if etp is None else etp) * ep * pp
    yield (
        ep == 1 or rest != 0 or world % of_experts == 0,
        f"expert_model_parallel_size {ep} with pipeline_model_parallel_size {pp} and experts cut over "
        f"{tp if etp is None else etp} tensor-parallel ranks takes multiples of {of_experts} ranks, not {world}",
    )
    yield (
        rest != 0 or run.global_batch_size % (run.micro_batch_size * dp) == 0,
        f"global_batch_size {run.global_batch_size} is not a multiple of micro_batch_size {run.micro_batch_size} × "
        f"{dp} data-parallel ranks",
    )


def _shares(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Rule]:
    tp = parallel.tensor_model_parallel_size
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        size = getattr(model, name)
        yield size % tp == 0, f"{name} {size} is not a multiple of tensor_model_parallel_size {tp}"


def _equal_parts(length: int, cp: int, tp: int) -> Rule:
    """A context-parallel rank holds an early and a late chunk of each sample, and sequence parallelism cuts both."""
    chunks = 2 * cp if cp > 1 else 1
    why = [f"2 × context_parallel_size {cp}"] if cp > 1 else []
    why += [f"tensor_model_parallel_size {tp} (sequence_parallel)"] if tp > 1 else []
    return (
        length % (chunks * tp) == 0,
        f"the {length} tokens of a sample are not a multiple of {' × '.join(why)} = {chunks * tp}, the equal parts "
        "that ranks hold; change the sample's length or the layout",
    )


def _pipeline(run: RunConfig, world: int) -> Iterator[Rule]:
    """Every stage and chunk has layers, and a step, of training or validation, has micro-batches for all of them."""
    parallel = run.parallel
    pp, per_chunk = parallel.pipeline_model_parallel_size, parallel.num_layers_per_virtual_pipeline_stage
    if pp == 1:
        for name in ("num_layers_per_virtual_pipeline_stage", "decoder_first_pipeline_num_layers"):
            value = getattr(parallel, name)
            yield value is None, f"{name} {value} needs pipeline_model_parallel_size of at least 2; leave it out"
        return
    first, layers = parallel.decoder_first_pipeline_num_layers or 0, run.model.num_layers
    stages = pp - 1 if first else pp
    share, rest = divmod(layers - first, stages)
    is_greedy = layers >= pp and 0 < layers < first + stages
    others = "stage" if stages == 1 else f"{stages} stages"
    yield (
        not is_greedy,
        f"decoder_first_pipeline_num_layers {first} of num_layers {layers} leaves too few for the other {others} of "
        f"pipeline_model_parallel_size {pp}; use at most {layers - stages}",
    )
    but = f" without the {first} of decoder_first_pipeline_num_layers" if first else ""
    yield (
        is_greedy or (rest == 0 and share > 0),
        f"num_layers {layers}{but} cannot be shared equally by {stages} of the {pp} stages of "
        "pipeline_model_parallel_size",
    )
    chunks = max(share // per_chunk, 1) if per_chunk else 1
    yield (
        is_greedy or rest > 0 or share < 1 or per_chunk is None or (share % per_chunk == 0 and first % chunks == 0),
        f"num_layers_per_virtual_pipeline_stage {per_chunk} does not cut the {share} layers of a stage"
        f"{f' and the {first} of the first' if first else ''} into the same number of equal chunks",
    )
    yield from _filled(run, world, is_interleaved=chunks > 1)


def _filled(run: RunConfig, world: int, *, is_interleaved: bool) -> Iterator[Rule]:
    parallel = run.parallel
    pp = parallel.pipeline_model_parallel_size
    dp, left = divmod(world, pp * parallel.tensor_model_parallel_size * parallel.context_parallel_size)
    if left or run.global_batch_size % (run.micro_batch_size * dp):
        return  # _division says so
    count = run.global_batch_size // (run.micro_batch_size * dp)
    cut = (
        f"a step's micro-batches, global_batch_size {run.global_batch_size} / (micro_batch_size "
        f"{run.micro_batch_size} × {dp} data-parallel ranks) = {count},"
    )
    yield (
        is_interleaved or count >= pp,
        f"{cut} are fewer than the stages of pipeline_model_parallel_size {pp}; raise the first or lower another",
    )
    rounds = max(1, count // pp)
    yield (
        not is_interleaved or count % rounds == 0,
        f"{cut} cannot be run in {rounds} equal rounds, as num_layers_per_virtual_pipeline_stage needs; make them a "
        f"multiple of pipeline_model_parallel_size {pp}",
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


def _experts(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Rule]:
    tp, ep = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    etp = tp if parallel.expert_tensor_parallel_size is None else parallel.expert_tensor_parallel_size
    yield etp in (1, tp), f"expert_tensor_parallel_size {etp} must be 1 or tensor_model_parallel_size {tp}"
    yield (
        ep == 1 or model.num_moe_experts > 0,
        f"expert_model_parallel_size {ep} shares out experts, and the model has none; use 1",
    )
    if not model.num_moe_experts:
        return
    yield (
        model.num_moe_experts % ep == 0,
        f"num_moe_experts {model.num_moe_experts} is not a multiple of expert_model_parallel_size {ep}",
    )
    shared, width = model.moe_shared_expert_intermediate_size, model.moe_ffn_hidden_size
    yield width % etp == 0, f"moe_ffn_hidden_size {width} is not a multiple of the {etp} ranks that share an expert"
    yield (
        shared % tp == 0,
        f"moe_shared_expert_intermediate_size {shared} is not a multiple of tensor_model_parallel_size {tp}",
    )
    yield (
        shared > 0 or not model.moe_shared_expert_gate,
        "moe_shared_expert_gate needs moe_shared_expert_intermediate_size of at least 1",
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
    is_pretraining = run.data.dataset == "MMAP" and not run.data.is_instruction_dataset
    paths = (
        (run.checkpoint, "save load"),
        (run.data, "tokenizer_model data_cache_path"),
        (run, "tensorboard_dir log_file"),
    )
    for owner, names in paths:
        for name in names.split():
            yield getattr(owner, name) != "", f"{name} '' is empty: name a path, or leave the option out"
    yield (
        run.checkpoint.load is not None or run.data.tokenizer_model is not None,
        "without a checkpoint to load, --tokenizer-model must name the tokenizer's directory",
    )
    yield (
        run.data.dataset == "JSON-SFT" or run.data.map_keys is None,
        "map_keys is of raw records; name the keys of .bin/.idx samples to the command that makes them",
    )
    yield (
        not is_pretraining or not run.data.sft_packing,
        "sft_packing is for fine-tuning data, and dataset MMAP is for pre-training; leave --sft-packing out",
    )
    for name in ("reset_attention_mask", "reset_position_ids", "eod_mask_loss"):
        yield (
            is_pretraining or not getattr(run.data, name),
            f"{name} is of pre-training documents; records that share a sample are kept apart by sft_packing",
        )
    yield (
        run.data.dataset != "JSON-SFT" or not run.data.is_instruction_dataset,
        "is_instruction_dataset is of .bin/.idx files, and dataset JSON-SFT reads raw records; leave one of them out",
    )
    yield (
        run.data.dataset == "JSON-SFT" or not run.data.show_samples,
        "show_samples is of raw records; .bin/.idx samples are shown by the command that makes them",
    )
