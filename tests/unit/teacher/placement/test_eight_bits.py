"""A teacher in 8 bits: rounding row by row, products against fp64, what of a model changes, and where it is refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from kdscale.errors import ConfigError
from kdscale.models import compiling
from kdscale.models.attention import attend_within_documents, to_attention
from kdscale.models.head import final_hidden
from kdscale.teacher.placement.eight_bits import (
    KINDS,
    Float8Linear,
    Int8Linear,
    check_eight_bits,
    float8_obstacle,
    load_in_eight_bits,
    round_linears,
    rounding_error,
    rows_in_float8,
)
from kdscale.teacher.source import MicroBatch
from tests.fake_gpu.cuda import fake_gpu
from tests.integration.prune.family_table import tiny_config

CPU = torch.device("cpu")
IDS = torch.arange(48).view(2, 24) % 60
SAMPLE = MicroBatch(IDS, torch.arange(24).expand(2, 24), torch.arange(0, 48, 2), torch.zeros(24, dtype=torch.int64))


def make_teacher(model_type="llama"):
    tree = tiny_config(model_type)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(tree.pop("model_type"), **tree)).eval()
    attend_within_documents(model)
    return model.requires_grad_(False)


def test_rows_are_rounded_to_three_bits_of_their_own_scale():
    generator = torch.Generator().manual_seed(0)
    x_RK = torch.randn(64, 256, generator=generator) * torch.logspace(-30, 30, 64)[:, None]
    x_RK[5] = 0.0
    rounded_RK, scale_R1 = rows_in_float8(x_RK)
    error_RK = (rounded_RK.double() * scale_R1 - x_RK.double()).abs()
    assert (error_RK <= torch.maximum(x_RK.abs().double() * 2**-4, scale_R1 * 2**-10) * 1.001).all()
    assert rounded_RK.float().abs().amax(-1)[[0, 63]].tolist() == [448.0, 448.0]
    assert not rounded_RK[5].float().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_product_is_that_of_the_rounded_values(dtype, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if device == "cuda" and (obstacle := float8_obstacle(torch.device("cuda", 0))):
        pytest.skip(obstacle)
    torch.manual_seed(1)
    linear, x = nn.Linear(64, 48, dtype=dtype).to(device), torch.randn(2, 5, 64, dtype=dtype).to(device)
    out, twin = Float8Linear(linear)(x), Float8Linear(linear)
    rounded, scale = rows_in_float8(x.flatten(0, 1))
    weight = twin.weight.double() * twin.scale_1N.double().T
    expected = (rounded.double() * scale) @ weight.T
    assert out.dtype == dtype and out.shape == (2, 5, 48)
    torch.testing.assert_close(out.double(), expected.view(2, 5, 48) + linear.bias.double(), rtol=2**-6, atol=2**-6)
    assert twin.weight.nbytes == 64 * 48


def test_what_is_not_finite_stays_so():
    x_RK = torch.ones(3, 32)
    x_RK[0, 3], x_RK[1, 3] = float("nan"), float("inf")
    out_RN = Float8Linear(nn.Linear(32, 16))(x_RK)
    assert out_RN.isfinite().all(-1).tolist() == [False, False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_int8_product_is_that_of_the_rounded_weight(dtype):
    torch.manual_seed(1)
    linear, x = nn.Linear(60, 41, dtype=dtype), torch.randn(2, 5, 60, dtype=dtype)
    with torch.no_grad():
        linear.weight[3] = 0.0
    out, twin = Int8Linear(linear)(x), Int8Linear(linear)
    weight = twin.weight.double() * twin.scale_1N.double().T
    assert ((weight - linear.weight.double()).abs() <= twin.scale_1N.double().T * 0.501).all()
    assert twin.weight.abs().amax(-1)[:3].tolist() == [127, 127, 127] and twin.weight.nbytes == 60 * 41
    expected = x.double() @ weight.T + linear.bias.double()
    assert out.dtype == dtype and out.shape == (2, 5, 41)
    tolerance = 2**-6 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def save(folder, model_type="llama"):
    """A tiny model on disk, and as load_model would have it."""
    model = make_teacher(model_type)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("model_type", "linears"), [("llama", 7), ("phi3", 4), ("mixtral", 4)])
def test_the_layers_linears_change_and_the_error_is_measured(tmp_path, model_type, linears, name):
    exact = save(tmp_path, model_type)
    before = dict(exact.named_parameters())
    teacher = load_in_eight_bits(tmp_path, name, dtype=torch.float32, device=CPU)
    attend_within_documents(teacher)
    changed = [key for key, value in teacher.named_parameters() if value.element_size() == 1]
    assert len(changed) == 3 * linears and all(".layers." in key for key in changed)
    assert all(value.equal(before[key]) for key, value in teacher.named_parameters() if key not in changed)
    assert not any(value.requires_grad for value in teacher.parameters()) and not teacher.training
    found = rounding_error(tmp_path, name, teacher, SAMPLE)
    assert found.share == sum(before[key].numel() for key in changed) / sum(v.numel() for v in before.values())
    p_NV, q_NV = (
        model(IDS, **to_attention(model, SAMPLE.position_ids_BS, None, CPU))
        .logits.float()
        .flatten(0, 1)[::2]
        .softmax(-1)
        for model in (exact, teacher)
    )
    assert found.divergence == pytest.approx(float((p_NV * (p_NV / q_NV).log()).sum(-1).mean()), rel=1e-3)
    assert 0 < found.divergence < (0.05 if name == "float8" else 0.002)
    assert found.positions == 24 and f"teacher in {name}" in found.in_words()


def test_one_weight_at_a_time_is_there_in_the_dtype_of_the_file(tmp_path, monkeypatch):
    save(tmp_path)
    sizes, read = [], torch.empty

    def watched(*size, **options):
        sizes.append(size[0] if options.get("dtype") is torch.float32 and isinstance(size[0], int) else 0)
        return read(*size, **options)

    monkeypatch.setattr(torch, "empty", watched)
    teacher = load_in_eight_bits(tmp_path, "int8", dtype=torch.float32, device=CPU)
    largest = max(value.numel() for value in teacher.parameters())
    assert max(sizes) == largest


@pytest.mark.parametrize("name", KINDS)
def test_a_compiled_teacher_computes_the_same(tmp_path, monkeypatch, name):
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager_decomp_partition")
    torch._dynamo.reset()
    save(tmp_path)
    teacher = load_in_eight_bits(tmp_path, name, dtype=torch.float32, device=CPU)
    attend_within_documents(teacher)
    compiling.compile_layers(teacher)
    with torch.no_grad():
        found = final_hidden(teacher, IDS, SAMPLE.position_ids_BS)
        with compiling.uncompiled():
            torch.testing.assert_close(found, final_hidden(teacher, IDS, SAMPLE.position_ids_BS), rtol=0, atol=2e-2)


def test_a_teacher_that_has_none_or_is_of_no_known_family_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)teacher_dtype.*GPT2LMHeadModel.*bfloat16"):
        round_linears(make_teacher("gpt2"), "int8", lambda name, value: value)
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "opt"}))
    with pytest.raises(ConfigError, match=r"(?s)teacher_dtype: int8.*loaded in parts.*opt.*bfloat16"):
        load_in_eight_bits(tmp_path, "int8", dtype=torch.bfloat16, device=CPU)


def test_only_gpus_that_multiply_it_are_taken(monkeypatch):
    check_eight_bits("int8", CPU)
    check_eight_bits("auto", CPU)
    with pytest.raises(ConfigError, match=r"(?s)8.9 or newer.*a CPU.*teacher_dtype: int8.*bfloat16"):
        check_eight_bits("float8", CPU)
    with fake_gpu():
        gpu = torch.device("cuda", 0)
        assert float8_obstacle(gpu) is None
        monkeypatch.setattr(torch, "_scaled_mm", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no  kernel")))
        assert float8_obstacle(gpu) == f"Fake GPU with torch {torch.__version__}: no kernel"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
        assert float8_obstacle(gpu) == "Fake GPU, which has none"
