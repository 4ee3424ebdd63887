"""A tiny model, a global batch, and one optimizer step on any layout: what the layout tests run on their ranks."""

import dataclasses
from types import SimpleNamespace

import torch

from megatron_patch.config.model import ModelConfig
from megatron_patch.config.optimizer import OptimizerConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.data.batches import Batch
from megatron_patch.families import ALL
from megatron_patch.families.family import Family
from megatron_patch.families.manifest import manifest
from megatron_patch.model.build import build_model
from megatron_patch.model.router import TopKRouter
from megatron_patch.parallel.grid import resolve_grid
from megatron_patch.parallel.mesh import Mesh, build_mesh
from megatron_patch.train.optimizer import build_optimizer, clip_gradients, finish_gradients
from megatron_patch.train.parameters import entry_tensors, named_parameters
from megatron_patch.train.save import tensor_parallel_weights
from megatron_patch.train.step import backward, evaluate, train_step
from megatron_patch.train.weights import RandomWeights, load_weights

# vocab_size is odd: a tensor-parallel rank holds a padding row. Sequences are longer than the window.
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=12,
    vocab_size=61,
    max_position_embeddings=64,
    window_size=7,
    init_method_std=0.2,
)
TIED = dataclasses.replace(MODEL, share_embeddings_and_output_weights=True)
# Latent attention, a dense layer, then three experts: two ranks cannot share them equally.
EXPERTS = dataclasses.replace(
    MODEL,
    rotary_interleaved=True,
    num_moe_experts=3,
    moe_router_topk=2,
    moe_ffn_hidden_size=24,
    moe_first_dense_layers=1,
    moe_shared_expert_intermediate_size=16,
    moe_router_pre_softmax=True,
    q_lora_rank=12,
    kv_lora_rank=20,
    qk_head_dim=8,
    qk_pos_emb_head_dim=4,
    v_head_dim=12,
)
SAMPLES, LENGTH, MICRO_BATCH = 8, 16, 2


def global_batch() -> Batch:
    """Samples with different numbers of unmasked tokens, so that averaging per rank or micro-batch would be wrong."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, MODEL.vocab_size, (SAMPLES, LENGTH + 1), generator=generator)
    mask = torch.rand(SAMPLES, LENGTH, generator=generator) < torch.linspace(0.1, 1.0, SAMPLES)[:, None]
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask.float())


def micro_batches(rank: int, size: int) -> list[Batch]:
    """This data-parallel rank's share of the global batch, in Megatron's order."""
    whole = global_batch()
    starts = range(rank * MICRO_BATCH, SAMPLES, MICRO_BATCH * size)
    return [Batch(*(t[s : s + MICRO_BATCH] for t in (whole.tokens, whole.labels, whole.loss_mask))) for s in starts]


def family(config: ModelConfig) -> Family:
    """One whose weights are those of `config`."""
    return ALL["deepseek_v2" if config.is_mla else "mistral"]


def step(config: ModelConfig, parallel: ParallelConfig, precision: str, mesh, steps: int = 0, dtype=torch.float32):
    """After `steps` optimizer steps: loss, gradient norm and this rank's gradients of one accumulation; parameters."""
    torch.set_default_dtype(dtype)
    entries = manifest(family(config), config)
    chunks = build_model(config, parallel, precision, mesh)
    load_weights(chunks, entries, RandomWeights(config, entries, seed=3), mesh)
    settings = OptimizerConfig(lr=1e-2, min_lr=0.0, lr_decay_iters=10, clip_grad=0.5)
    run, optimizer = SimpleNamespace(optimizer=settings, parallel=parallel), build_optimizer(settings, chunks)
    batches = micro_batches(mesh.dp.rank, mesh.dp.size)
    for _ in range(steps):
        train_step(run, chunks, optimizer, entries, batches, mesh)
    optimizer.zero_grad()
    loss = backward(chunks, batches, mesh)
    finish_gradients(chunks, entries, mesh)
    gradients = {
        entry: gradient
        for name, parameter in named_parameters(chunks).items()
        for entry, gradient in entry_tensors(name, _whole(parameter.grad), mesh)
    }
    norm = clip_gradients(chunks, entries, mesh, limit=settings.clip_grad, sharded=parallel.use_distributed_optimizer)
    return loss.item(), norm.item(), gradients, tensor_parallel_weights(chunks, mesh, dtype, keep=True)


def _whole(gradient: torch.Tensor) -> torch.Tensor:
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()


def mesh_of(parallel: ParallelConfig, world: int) -> Mesh:
    """The mesh of this rank among `world`, on the CPU."""
    return build_mesh(
        resolve_grid(parallel, world),
        torch.device("cpu"),
        sharded=parallel.use_distributed_optimizer,
        sequence_parallel=parallel.sequence_parallel,
        timeout_minutes=1.0,
    )


def on_ranks(config: ModelConfig, parallel: ParallelConfig, world: int, precision: str, steps: int, dtype: torch.dtype):
    """What `run_ranks` runs."""
    mesh = mesh_of(parallel, world)
    return step(config, parallel, precision, mesh, steps, dtype)


def bf16_shards(config: ModelConfig, world: int) -> tuple[list[torch.dtype], int, int]:
    """In a model that computes in bfloat16: the type of each router's weight as its forward sees it, the bytes of this
    rank's shards, and of all parameters as its forward sees them, padded to equal shards."""
    mesh = mesh_of(ParallelConfig(), world)
    chunks = build_model(config, ParallelConfig(), "bf16", mesh)
    entries = manifest(family(config), config)
    load_weights(chunks, entries, RandomWeights(config, entries, seed=3), mesh)
    (model,), seen = chunks, []
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_pre_hook(lambda router, _: seen.append(router.weight.dtype))
    held = sum(parameter.to_local().nbytes for parameter in model.parameters())
    model(micro_batches(mesh.dp.rank, mesh.dp.size)[0].tokens)
    whole = [(len(p), p.nbytes) for p in model.parameters()]  # since reshard_after_forward is off
    return seen, held, sum(size // rows * -(-rows // world) * world for rows, size in whole)


def validation(parallel: ParallelConfig, mesh) -> float:
    """The validation loss of the global batch, which its ranks share unequally in unmasked tokens."""
    entries = manifest(family(MODEL), MODEL)
    chunks = build_model(MODEL, parallel, "fp32", mesh)
    load_weights(chunks, entries, RandomWeights(MODEL, entries, seed=3), mesh)
    return evaluate(chunks, [micro_batches(mesh.dp.rank, mesh.dp.size)], mesh)


def validation_on_ranks(parallel: ParallelConfig, world: int) -> float:
    """What `run_ranks` runs."""
    return validation(parallel, mesh_of(parallel, world))


def rotary_dtypes_on_ranks(precision: str) -> set[torch.dtype]:
    """The types in which attention receives its rotary tables."""
    mesh = mesh_of(ParallelConfig(), 1)
    entries, found = manifest(family(MODEL), MODEL), set()
    chunks = build_model(MODEL, ParallelConfig(), precision, mesh)
    load_weights(chunks, entries, RandomWeights(MODEL, entries, seed=3), mesh)
    (model,) = chunks
    for layer in model.decoder.layers.values():
        layer.self_attention.register_forward_pre_hook(lambda _, given: found.update(t.dtype for t in given[1]))
    model(global_batch().tokens)
    return found
