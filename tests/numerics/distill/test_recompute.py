"""Layers that compute again give the same bits, and what they keep and do again is what the planner counts."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from kdscale.config.distill.recompute import RECOMPUTE, Recompute
from kdscale.distill.layers.recompute import recompute_in_backward
from kdscale.errors import SelfCheckError
from kdscale.families import decoder_types, load_family
from kdscale.models.attention import attend_within_documents
from kdscale.models.head import final_hidden
from kdscale.sizing import memory
from kdscale.sizing.flops import attention_pairs, recomputed_flops
from kdscale.sizing.job import Job
from kdscale.sizing.model_shape import ModelShape
from tests.integration.prune.family_table import tiny_config

LEVELS = [level for level in RECOMPUTE.values() if level.checkpoints]
ROW = [20, 12]  # tokens of the documents of both sequences
POSITIONS_BS = torch.cat([torch.arange(length) for length in ROW]).expand(2, -1)
IDS_BS = torch.randint(1, 60, POSITIONS_BS.shape, generator=torch.Generator().manual_seed(1))
SIZES = {"hidden_size": 96, "intermediate_size": 320, "num_attention_heads": 6, "num_key_value_heads": 2,
         "head_dim": 16, "vocab_size": 64, "max_position_embeddings": 256}  # fmt: skip
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@pytest.fixture(autouse=True)
def torchs_own_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's ZeRO-3 leaves its own in the process, which computes again what torch counts differently."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


def make(config: dict[str, Any], level: Recompute, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype).train()
    attend_within_documents(model)
    recompute_in_backward(model, level)
    return model


def hidden_states(model: Any) -> Tensor:
    return final_hidden(model, IDS_BS, POSITIONS_BS)


def gradients(model: Any) -> dict[str, Tensor]:
    hidden_BSH = hidden_states(model)
    (
        hidden_BSH * torch.linspace(-1, 1, hidden_BSH.numel(), dtype=hidden_BSH.dtype).view_as(hidden_BSH)
    ).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model_type", [*sorted(decoder_types()), "gemma4_text, small"])
def test_gradients_have_the_same_bits(model_type: str) -> None:
    model = make(tiny_config(model_type), RECOMPUTE["off"])
    torch.manual_seed(3)  # what is dropped is the same for all levels
    want = gradients(model)
    assert want
    for level in LEVELS:
        model.zero_grad()
        recompute_in_backward(model, level)
        torch.manual_seed(3)
        got = gradients(model)
        assert [name for name in want if not torch.equal(want[name], got[name])] == []


@pytest.mark.parametrize(("share", "kept"), [(0.0, True), (0.3, False)])
def test_attention_that_drops_is_made_again(share: float, kept: bool) -> None:
    """Its random numbers would be missing the second time, and others would be drawn after it."""
    config = {**tiny_config("gpt2"), "attn_pdrop": share, "resid_pdrop": 0.3}
    layer = make(config, RECOMPUTE["keep_attention"]).transformer.h[0]
    assert ("context_fn" in layer._gradient_checkpointing_func.keywords) is kept
    want = gradients(make(config, RECOMPUTE["off"]))
    for level in LEVELS:
        got = gradients(make(config, level))
        assert all(torch.equal(want[name], got[name]) for name in want)


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def kept_after_forward(config: dict[str, Any], level: Recompute, dtype: torch.dtype) -> int:
    """Bytes of all that autograd saved, and of all tensors that Python holds, but for the weights."""
    model = make(config, level, dtype)
    before = {id(thing) for thing in gc.get_objects() if type(thing) is Tensor}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden_BSH = hidden_states(model)
    alive = [thing for thing in gc.get_objects() if type(thing) is Tensor and id(thing) not in before]
    assert hidden_BSH.requires_grad
    found = storages(saved) | storages(alive)
    return sum(size for place, size in found.items() if place not in storages(model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", RECOMPUTE.values(), ids=RECOMPUTE)
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_layers_keep_what_the_planner_counts(model_type: str, level: Recompute, dtype: torch.dtype) -> None:
    config = {"model_type": model_type, **SIZES}
    three, two = (kept_after_forward({**config, "num_hidden_layers": n}, level, dtype) for n in (3, 2))
    shape = ModelShape.of({**config, "num_hidden_layers": 1}, load_family(config, "test"))
    job = Job(shape, shape, 32, 1, 1, item_bytes=dtype.itemsize, device="cpu")
    random_state = torch.get_rng_state().nbytes if level.checkpoints else 0  # torch's, once a layer
    assert three - two - random_state == IDS_BS.numel() * memory.kept_bytes(job, shape, level)


def causal_flops(query: Any, *_: Any, **__: Any) -> int:
    """Of whole documents [n, A, L, D]: what each query sees, where torch would count the square."""
    documents, heads, length, size = query
    return documents * heads * size * 4 * attention_pairs({length: 1}, None)


@pytest.mark.parametrize("level", RECOMPUTE.values(), ids=RECOMPUTE)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "olmo2", "mixtral"])
def test_layers_do_again_what_the_planner_counts(model_type: str, level: Recompute) -> None:
    config = {"model_type": model_type, **SIZES, "num_hidden_layers": 2}
    if model_type == "mixtral":  # torch counts no grouped products
        config |= {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    counted = []
    for each in (level, RECOMPUTE["off"]):
        model = make(config, each)
        with FlopCounterMode(display=False, custom_mapping={FLASH: causal_flops}) as counter:
            gradients(model)
        counted.append(counter.get_total_flops())
    shape = ModelShape.of(config, load_family(config, "test"))
    assert counted[0] - counted[1] == IDS_BS.numel() * recomputed_flops(shape, level, ROW)


def test_what_was_written_to_is_computed_again_and_what_changed_afterwards_is_refused() -> None:
    from torch.utils.checkpoint import checkpoint

    from kdscale.distill.layers.recompute import _keep_and_hand_back

    seen: list[Tensor] = []

    def layer(x_ND: Tensor) -> Tensor:
        own = x_ND @ x_ND
        own.mul_(2.0)  # as ranks that sum in place do
        other = own @ own
        seen.append(other)
        return (other * other).sin() @ x_ND

    def run(**options: Any) -> tuple[Tensor, Tensor]:
        x_ND = torch.linspace(-1, 1, 16).view(4, 4).requires_grad_()
        return x_ND, checkpoint(layer, x_ND, use_reentrant=False, **options)

    keep = {"context_fn": lambda: _keep_and_hand_back(frozenset({"aten::mm"}))}
    want_x, want = run()
    x_ND, out = run(**keep)
    want.sum().backward()
    out.sum().backward()
    assert torch.equal(x_ND.grad, want_x.grad)
    _, out = run(**keep)
    seen[-1].detach().zero_()
    with pytest.raises(SelfCheckError, match="aten::mm"):
        out.sum().backward()
