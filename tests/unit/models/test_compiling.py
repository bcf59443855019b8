"""Compiled decoder layers: the model's own values and gradients, one compilation for all of them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._inductor.config as inductor
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM

from kdscale.config.distill.objective import LayersRead
from kdscale.config.distill.recompute import RECOMPUTE
from kdscale.distill.layers.recompute import recompute_in_backward
from kdscale.families import decoder_types
from kdscale.models import compiling
from kdscale.models.attention import attend_within_documents
from kdscale.models.head import final_hidden
from kdscale.models.layer_records import LayerReader
from tests.integration.prune.family_table import tiny_config

REGIONS = 4  # what one kind of layer comes to: up to attention (two), the output projection, the rest


@pytest.fixture(autouse=True)
def _cheap_backend(monkeypatch):
    """What inductor is given, run as it is. The plan of what a backward reads is inductor's too."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager_decomp_partition")
    torch._dynamo.reset()
    counters.clear()


def make_model(model_type="llama", **changes):
    tree = {**tiny_config(model_type), "embd_pdrop": 0.0, "resid_pdrop": 0.0, **changes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(tree.pop("model_type"), **tree)).train()
    attend_within_documents(model)
    return model


def compiled(model, recompute="off"):
    twin = copy.deepcopy(model)
    recompute_in_backward(twin, RECOMPUTE[recompute], compiled=True)
    compiling.compile_layers(twin)
    return twin


def forward_and_backward(model):
    """Final hidden states and every gradient, of packed documents."""
    ids_BS = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(1))
    position_ids_BS = torch.cat([torch.arange(20), torch.arange(12)]).expand(2, 32)
    model.zero_grad()
    hidden_BSH = final_hidden(model, ids_BS.to(model.device), position_ids_BS.to(model.device))
    weights_BSH = torch.randn(hidden_BSH.shape, generator=torch.Generator().manual_seed(2)).to(model.device)
    (hidden_BSH * weights_BSH).sum().backward()
    return hidden_BSH.detach(), {name: value.grad for name, value in model.base_model.named_parameters()}


def assert_same(found, expected, atol):
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=atol * float(expected[0].abs().max()))
    for name, gradient in expected[1].items():
        close = {"rtol": 0, "atol": atol * float(gradient.abs().max())}
        torch.testing.assert_close(found[1][name], gradient, **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("dtype", "atol", "recompute"), [(torch.float32, 1e-5, "off"), (torch.bfloat16, 3e-2, "full")])
def test_thirty_layers_are_compiled_once(dtype, atol, recompute):
    plain = make_model(num_hidden_layers=30).to(dtype)
    model = compiled(plain, recompute)
    assert_same(forward_and_backward(model), forward_and_backward(plain), atol)
    assert counters["stats"]["unique_graphs"] == REGIONS
    forward_and_backward(model)
    assert counters["stats"]["unique_graphs"] == REGIONS


@pytest.mark.gpu
def test_inductor_on_a_gpu_computes_the_same(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    plain = make_model().to("cuda", torch.bfloat16)
    assert_same(forward_and_backward(compiled(plain, "full")), forward_and_backward(plain), 3e-2)


def test_what_is_computed_again_between_compiled_products_need_not_be_kept():
    plain, saved = make_model(), {}
    for level in RECOMPUTE:
        torch._dynamo.reset()
        model, sizes = compiled(plain, level), {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found = forward_and_backward(model)
        assert_same(found, forward_and_backward(plain), 1e-5)
        saved[level] = sum(sizes.values())
    assert saved["full"] < saved["selective"] < saved["off"]


# These have between them every kind of operation that a family's layers have; the others run in the long look.
VARIED = {"gemma2", "gpt2", "gpt_neox", "olmo2", "qwen3_moe"}


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=() if name in VARIED else pytest.mark.long) for name in decoder_types()],
)
def test_every_family_computes_the_same(model_type, monkeypatch):
    """The graphs as torch sees them, run operation by operation: equal bits, a few graphs a kind of layer."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    plain = make_model(model_type)
    model = compiled(plain)
    found, expected = forward_and_backward(model), forward_and_backward(plain)
    assert found[0].equal(expected[0])
    trained = {name: gradient for name, gradient in expected[1].items() if gradient is not None}
    assert all(found[1][name].equal(gradient) for name, gradient in trained.items())
    assert 0 < counters["stats"]["unique_graphs"] <= 2 * REGIONS


def test_a_backward_keeps_weights_and_not_views_of_them():
    """ZeRO-3 takes a weight's memory away between forward and backward; a view would keep it."""
    model = compiled(make_model())
    weights = {value.untyped_storage().data_ptr(): value for value in model.parameters()}
    kept = []

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() in weights:
            kept.append(tensor is weights[tensor.untyped_storage().data_ptr()])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward_and_backward(model)
    assert len(kept) > 20 and all(kept)


def test_hooks_around_layers_are_called_and_hooks_inside_them_when_asked():
    model, calls = make_model(), []
    model = compiled(model)
    layer = model.model.layers[1]
    layer.register_forward_hook(lambda *_: calls.append("layer"))
    layer.mlp.up_proj.register_forward_hook(lambda *_: calls.append("inside"))
    forward_and_backward(model)
    assert "layer" in calls
    calls.clear()
    with compiling.uncompiled():
        forward_and_backward(model)
    assert calls == ["inside", "layer"]


def test_what_a_forward_records_is_not_part_of_the_graphs():
    """Each forward has an object of its own that is told of attention and hidden states."""
    model, read = make_model(), LayersRead(hidden=(1,), attention=(2,))
    ids_BS, position_ids_BS, rows_N = torch.arange(32)[None], torch.arange(32)[None], torch.arange(5)

    def record(model):
        records = LayerReader(model, read).records()
        with torch.no_grad(), records.of_forward(rows_N) as arguments:
            final_hidden(model, ids_BS, position_ids_BS, **arguments)
        return records

    expected = record(model)
    model = compiled(model)
    for found in (record(model), record(model), record(model)):
        torch.testing.assert_close(found.layers_NH, expected.layers_NH)
        assert found.attention.keys() == {2}
    assert counters["stats"]["unique_graphs"] == REGIONS


def test_kernels_are_not_chosen_by_timing_them():
    """A resumed run must compile to the same code."""
    with inductor.patch(deterministic=False, compile_threads=32):
        compiling.compile_layers(make_model())
        assert inductor.deterministic
        assert inductor.compile_threads == torch.get_num_threads()


def test_a_model_without_layers_of_transformers_is_left_alone():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert compiling.compile_layers(model) == 0
    assert type(model[0]) is torch.nn.Linear
