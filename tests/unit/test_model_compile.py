"""Compiled layers: one graph for all dense ones, the gradients of the plain model."""

from functools import lru_cache

import pytest
import torch
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks

from megatron_patch.config.memory import MemoryConfig
from megatron_patch.config.model import ModelConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest
from megatron_patch.model.activations import is_moved
from megatron_patch.model.build import build_model
from megatron_patch.model.compilation import compile_layers, is_compiled
from megatron_patch.parallel.mesh import single_process
from megatron_patch.weights.load import RandomWeights, load_weights

DENSE = ModelConfig(
    num_layers=3,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=61,
    max_position_embeddings=64,
    init_method_std=0.2,
)
LATENT = ModelConfig(
    num_layers=3,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=8,
    vocab_size=61,
    max_position_embeddings=64,
    num_moe_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=24,
    moe_first_dense_layers=1,
    moe_shared_expert_intermediate_size=48,
    moe_router_pre_softmax=True,
    q_lora_rank=12,
    kv_lora_rank=20,
    qk_head_dim=8,
    qk_pos_emb_head_dim=4,
    v_head_dim=12,
    rotary_interleaved=True,
    init_method_std=0.2,
)
MODELS = {"mistral": DENSE, "deepseek_v2": LATENT}
TOKENS = torch.arange(2 * 2 * 25).view(2, 2, 25) ** 2 % 61  # two micro-batches
STARTS = torch.tensor([[0, 7], [11, 3]])  # of the second document of each sample


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch._dynamo.reset()
    counters.clear()


def build(name: str, memory: MemoryConfig):
    config = MODELS[name]
    entries = manifest(ALL[name], config)
    (model,) = build_model(config, ParallelConfig(), "fp32", single_process(), memory)
    load_weights([model], entries, RandomWeights(config, entries, seed=3), single_process())
    return model


def step(model, *, is_packed: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of both micro-batches, whose documents end in different places."""
    total = torch.zeros(())
    for tokens, second in zip(TOKENS, STARTS, strict=True):
        positions = torch.arange(24).expand(2, 24)
        starts = torch.where(positions >= second[:, None], second[:, None], 0) if is_packed else None
        loss = model(tokens[:, :-1], tokens[:, 1:], starts).mean()
        loss.backward()
        total += loss.detach()
    return total, {name: parameter.grad for name, parameter in model.named_parameters()}


@lru_cache
def plain(name: str, is_packed: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return step(build(name, MemoryConfig()), is_packed=is_packed)


def check_equal(found, wanted) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=0)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        difference = (found[1][name] - gradient).abs().max()
        assert difference <= 1e-5 * gradient.abs().max(), name


def test_all_dense_layers_are_one_graph_with_the_gradients_of_the_plain_model():
    model = build("mistral", MemoryConfig())
    compile_layers([model], backend="aot_eager", fullgraph=True)
    check_equal(step(model), plain("mistral"))
    assert counters["stats"]["unique_graphs"] == 1


def test_recomputation_runs_the_same_graph_again():
    model = build("mistral", MemoryConfig(recompute_granularity="full", recompute_num_layers=2))
    compile_layers([model], backend="aot_eager", fullgraph=True)
    check_equal(step(model), plain("mistral"))
    assert counters["stats"]["unique_graphs"] == 1


def test_latent_attention_and_shared_experts_are_graphs_and_routed_experts_are_not():
    model = build("deepseek_v2", MemoryConfig())
    compile_layers([model], backend="aot_eager", fullgraph=True)
    check_equal(step(model), plain("deepseek_v2"))
    assert counters["stats"]["unique_graphs"] == 4  # the dense layer; norm, attention and shared expert of the others


@pytest.mark.parametrize(("granularity", "is_packed"), [("selective", False), ("none", True)])
def test_core_attention_stays_out_where_it_is_recomputed_or_cut_by_documents(granularity, is_packed):
    model = build("mistral", MemoryConfig(recompute_granularity=granularity))
    compile_layers([model], backend="aot_eager")
    check_equal(step(model, is_packed=is_packed), plain("mistral", is_packed))
    assert counters["stats"]["unique_graphs"] == 3  # before it, after it, the MLP: not one for each batch


def test_a_compiled_layer_keeps_no_weight_that_offloading_would_move():
    model = build("mistral", MemoryConfig())
    compile_layers([model], backend="aot_eager")
    weights, moved = {p.untyped_storage().data_ptr() for p in model.parameters()}, []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        moved.append(tensor.untyped_storage().data_ptr() if is_moved(tensor) else None)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        model(TOKENS[0][:, :-1], TOKENS[0][:, 1:])
    assert any(moved) and weights.isdisjoint(moved)


@pytest.mark.parametrize(
    ("choice", "device", "wanted"),
    [("auto", "cpu", False), ("auto", "cuda", True), ("on", "cpu", True), ("off", "cuda", False)],
)
def test_layers_are_compiled_on_cuda_unless_asked_otherwise(choice, device, wanted):
    assert is_compiled(choice, torch.device(device)) is wanted
