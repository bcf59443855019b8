"""Codes, scales and packed words: the same values after every way round."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdscale.config.quantize import FormConfig, Fp8Config, Int4Config, Int8Config
from kdscale.errors import ConfigError
from kdscale.families import Dims
from kdscale.quantize.forms import make_form
from kdscale.quantize.integers import IntegerForm
from kdscale.quantize.matrices import check_family, check_widths
from kdscale.weights import TensorInfo

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
FORMS = [Int8Config(), *(Int4Config(method="rtn", group=group) for group in (32, 64, 128)), Fp8Config()]


@pytest.mark.parametrize("settings", FORMS, ids=lambda form: form.label)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_announced_is_what_is_encoded(settings: FormConfig, dtype: str) -> None:
    form = make_form(settings)
    weight_OI = torch.randn(6, 256, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    announced = form.tensors("a.weight", TensorInfo((6, 256), dtype))
    encoded = form.encode("a.weight", form.round(weight_OI))
    names = {"I32": torch.int32, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn, **DTYPES}
    assert {name: (tuple(t.shape), t.dtype) for name, t in encoded.items()} == {
        name: (info.shape, names[info.dtype]) for name, info in announced.items()
    }


def test_a_group_of_zeros_stays_zeros() -> None:
    weight_OI = torch.zeros(2, 64)
    weight_OI[1, :32] = torch.linspace(-1, 1, 32)
    for settings in (Int4Config(method="rtn"), Int8Config(), Fp8Config()):
        values = make_form(settings).round(weight_OI).values()
        assert bool((values[0] == 0).all()) and bool((values[1, 32:] == 0).all())


def test_the_largest_weight_never_becomes_an_infinity() -> None:
    """A scale in bf16 may be rounded down, and e4m3 has no infinity: what is beyond its range would be NaN."""
    for seed in range(20):
        weight_OI = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
        values = make_form(Fp8Config()).round(weight_OI).values()
        assert bool(torch.isfinite(values).all())
        torch.testing.assert_close(values.float(), weight_OI.float(), rtol=0.07, atol=0.02)


@given(inputs=st.sampled_from([32, 64, 96, 160]), bits=st.sampled_from([4, 8]), seed=st.integers(0, 99))
def test_packed_words_hold_every_code(inputs: int, bits: int, seed: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    settings: FormConfig = Int8Config() if bits == 8 else Int4Config(method="rtn")
    form = IntegerForm(settings)
    codes = torch.randint(
        form.grid.least, form.grid.most + 1, (5, inputs), generator=torch.Generator().manual_seed(seed)
    )
    quantized = form.round(torch.ones(5, inputs))._replace(codes_OI=codes.to(torch.int8))
    packed = form.encode("a.weight", quantized)["a.weight_packed"]
    assert torch.equal(unpack_from_int32(packed, bits, torch.Size((5, inputs))), quantized.codes_OI)


DIMS = Dims(hidden=576, ffn=700, heads=6, kv_heads=2, head_dim=64, layers=2, vocab=10)


def test_a_width_that_no_group_divides_is_named_with_the_nearest_that_it_would() -> None:
    with pytest.raises(ConfigError) as refused:
        check_widths(DIMS, [Int8Config(), Int4Config(group=128)])
    said = str(refused.value)
    assert "int4_gptq_g128: hidden is 576, the nearest multiples are 512 and 640" in said
    assert "ffn is 700, the nearest multiples are 640 and 768" in said and "heads*head_dim" not in said
    check_widths(DIMS, [Int8Config(), Fp8Config()])
    with pytest.raises(ConfigError, match="group: 32 or 64 divides them all"):
        check_widths(DIMS.replace(ffn=704), [Int4Config(group=128)])


@pytest.mark.parametrize(
    ("experts", "transposed", "said"), [("mlp.experts", False, "mixture"), ("", True, "other way")]
)
def test_models_that_no_form_holds_are_refused(experts: str, transposed: bool, said: str) -> None:
    data = SimpleNamespace(dims={"experts": experts} if experts else {})
    family = SimpleNamespace(data=data, name="x", module_in_whole=None, transposed=lambda role: transposed)
    with pytest.raises(ConfigError, match=said):
        check_family(family)  # type: ignore[arg-type]
