"""Quantised checkpoints: every format against an independent source, in every way that a tensor can be asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdscale.errors import CheckpointError
from kdscale.weights import Checkpoint, read_config
from tests.unit.weights import quantising

NAME = "layer.weight"


def opened(
    folder: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any], dtype: str = "float16"
) -> Checkpoint:
    config = {"model_type": "llama", "dtype": dtype, "quantization_config": settings}
    return Checkpoint.open(quantising.write_folder(folder, tensors, config))


def asked_in_parts(checkpoint: Checkpoint, name: str) -> None:
    """A matrix is the same whether it is read whole, in blocks of rows, or from the middle of one row to another's."""
    whole = checkpoint.tensor(name)
    for max_bytes in (1, 2 * whole[0].nbytes):
        blocks = list(checkpoint.blocks(name, max_bytes))
        assert len(blocks) > 1 and torch.equal(torch.cat(blocks), whole)
    flat, values = whole.flatten(), whole.numel()
    for begin, end in ((0, values), (5, values - 3), (values // 2, values // 2 + 2), (values - 1, values)):
        out = torch.empty(end - begin)
        checkpoint.fill(name, begin, out)
        assert torch.equal(out, flat[begin:end].float())
    with pytest.raises(ValueError, match="has no values"):
        checkpoint.fill(name, values, torch.empty(1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("version", "ordered"), [(1, False), (1, True), (2, True)])
def test_gptq(tmp_path: Path, bits: int, version: int, ordered: bool) -> None:
    tensors, plain = quantising.gptq(
        "layer", (32, 64), bits=bits, group=16, version=version, ordered=ordered, seed=bits
    )
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 16, "desc_act": ordered}
    settings |= {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    checkpoint = opened(tmp_path, tensors, settings)
    assert checkpoint.spec(NAME) == ((32, 64), "F16")
    assert torch.equal(checkpoint.tensor(NAME), plain.half())
    asked_in_parts(checkpoint, NAME)


def test_gptq_of_one_matrix_in_other_bits_than_the_config_says(tmp_path: Path) -> None:
    tensors, plain = quantising.gptq("layer", (8, 32), bits=8, group=16, version=2, ordered=True, seed=0)
    settings = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}
    assert torch.equal(opened(tmp_path, tensors, settings).tensor(NAME), plain.half())


def test_awq(tmp_path: Path) -> None:
    tensors, plain = quantising.awq("layer", (32, 48), group=16, seed=1)
    checkpoint = opened(tmp_path, tensors, {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "GEMM"})
    assert torch.equal(checkpoint.tensor(NAME), plain.half())
    asked_in_parts(checkpoint, NAME)


COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "int4 groups": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "int4 groups with zeros": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "int3 channels with zeros": ("pack-quantized", {"num_bits": 3, "strategy": "channel", "symmetric": False}),
    "int8 channels": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "plain int8 channels": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "plain int8 groups with zeros": (
        "naive-quantized",
        {"num_bits": 8, "strategy": "group", "group_size": 16, "symmetric": False},
    ),
    "float channels": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "float tensor": ("naive-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "float blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]},
    ),
}


@pytest.mark.parametrize("case", COMPRESSED)
def test_compressed_tensors_as_the_library_itself_decompresses(tmp_path: Path, case: str) -> None:
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import BaseCompressor

    form, said = COMPRESSED[case]
    said = {"symmetric": True, **said}
    scheme = library.quantization.QuantizationScheme(targets=["Linear"], weights=said)
    rng, groups = torch.Generator().manual_seed(4), 96 // said.get("group_size", 96)
    shape = {"tensor": (1,), "channel": (48, 1), "group": (48, groups), "block": (3, 3)}[said["strategy"]]
    weight = torch.randn(48, 96, generator=rng).bfloat16()
    state = {"weight": weight, "weight_scale": (torch.rand(shape, generator=rng) / 50 + 0.01).bfloat16()}
    if not said["symmetric"]:
        half = 1 << said["num_bits"] - 1
        state["weight_zero_point"] = torch.randint(-half, half, shape, generator=rng, dtype=torch.int8)
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(dict(state), scheme)
    expected = compressor.decompress(dict(stored), scheme)["weight"]
    settings = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"]}
    settings["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": said}}
    tensors = {f"layer.{key}": value for key, value in stored.items()} | {"lm_head.weight": weight}
    checkpoint = opened(tmp_path, tensors, settings, "bfloat16")
    assert torch.equal(checkpoint.tensor(NAME), expected.bfloat16())
    assert torch.equal(checkpoint.tensor("lm_head.weight"), weight)
    assert set(checkpoint.names) == {NAME, "lm_head.weight"}
    asked_in_parts(checkpoint, NAME)


@pytest.mark.parametrize("form", ["nvfp4-pack-quantized", "mxfp4-pack-quantized"])
def test_4_bit_floats_as_the_library_itself_decompresses(tmp_path: Path, form: str) -> None:
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import BaseCompressor

    said: dict[str, Any] = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
    rng = torch.Generator().manual_seed(5)
    stored = {"weight_packed": torch.randint(0, 256, (12, 48), generator=rng, dtype=torch.uint8)}
    if form.startswith("nvfp4"):
        said |= {"strategy": "tensor_group", "group_size": 16}
        stored["weight_scale"] = (torch.rand(12, 6, generator=rng) * 200 + 1).to(torch.float8_e4m3fn)
        stored["weight_global_scale"] = torch.tensor([1234.5])
    else:
        stored["weight_scale"] = torch.randint(110, 135, (12, 3), generator=rng, dtype=torch.uint8)
    scheme = library.quantization.QuantizationScheme(targets=["Linear"], weights=said)
    expected = BaseCompressor.get_value_from_registry(form).decompress(dict(stored), scheme)["weight"]
    settings = {"quant_method": "compressed-tensors", "format": form}
    settings["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": said}}
    tensors = {f"layer.{key}": value for key, value in stored.items()} | {"layer.input_global_scale": torch.ones(1)}
    checkpoint = opened(tmp_path, tensors, settings, "bfloat16")
    assert torch.equal(checkpoint.tensor(NAME), expected)
    assert checkpoint.quantised is not None and "4-bit floats, groups of" in checkpoint.quantised.label
    asked_in_parts(checkpoint, NAME)


def test_float8_in_blocks_of_which_the_last_are_smaller(tmp_path: Path) -> None:
    tensors, plain = quantising.float8(NAME, (40, 72), (16, 32), seed=2)
    settings = {"quant_method": "fp8", "weight_block_size": [16, 32]}
    checkpoint = opened(tmp_path, tensors | {"layer.input_scale": torch.ones(())}, settings, "bfloat16")
    assert torch.equal(checkpoint.tensor(NAME), plain.float().bfloat16())
    assert checkpoint.names == [NAME]
    asked_in_parts(checkpoint, NAME)


@pytest.mark.parametrize("scales", [(), (1,), (4, 2), (32, 1)])
def test_float8_as_transformers_dequantises_it(tmp_path: Path, scales: tuple[int, ...]) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rng = torch.Generator().manual_seed(6)
    codes = torch.randn(32, 64, generator=rng).to(torch.float8_e4m3fn)
    factors = torch.rand(scales, generator=rng) + 0.5
    grid = factors.reshape(1, 1) if factors.numel() == 1 else factors
    expected = Fp8Dequantize(None)._dequantize_one(codes, grid, torch.bfloat16)
    checkpoint = opened(tmp_path, {NAME: codes, f"{NAME}_scale_inv": factors}, {"quant_method": "fp8"}, "bfloat16")
    assert torch.equal(checkpoint.tensor(NAME), expected)
    asked_in_parts(checkpoint, NAME)


def test_mxfp4_as_transformers_dequantises_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = torch.Generator().manual_seed(7)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), generator=rng, dtype=torch.uint8)
    scales = torch.randint(110, 140, (3, 10, 2), generator=rng, dtype=torch.uint8)
    stem = "model.layers.0.mlp.experts.gate_up_proj"
    checkpoint = opened(
        tmp_path, {f"{stem}_blocks": blocks, f"{stem}_scales": scales}, {"quant_method": "mxfp4"}, "bfloat16"
    )
    assert checkpoint.spec(stem) == ((3, 64, 10), "BF16")
    assert torch.equal(checkpoint.tensor(stem), convert_moe_packed_tensors(blocks, scales))
    asked_in_parts(checkpoint, stem)


@pytest.mark.parametrize("nested", [False, True])
def test_nf4(tmp_path: Path, nested: bool) -> None:
    tensors, plain = quantising.nf4("layer", (24, 25), nested=nested, seed=8)
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": nested}
    checkpoint = opened(tmp_path, tensors, settings, "float32")
    # sums and products are in fp32, as in bitsandbytes
    torch.testing.assert_close(checkpoint.tensor(NAME), plain.float(), rtol=3e-7, atol=1e-8)
    asked_in_parts(checkpoint, NAME)


def test_int8_of_bitsandbytes(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(9)
    codes = torch.randint(-127, 128, (6, 10), generator=rng, dtype=torch.int8)
    largest = torch.rand(6, generator=rng)
    tensors = {NAME: codes, "layer.SCB": largest, "layer.weight_format": torch.zeros((), dtype=torch.uint8)}
    checkpoint = opened(tmp_path, tensors, {"load_in_8bit": True}, "float32")
    plain = codes.double() * largest.double().unsqueeze(1) / 127
    torch.testing.assert_close(checkpoint.tensor(NAME).double(), plain, rtol=2e-7, atol=0)
    assert checkpoint.names == [NAME]
    asked_in_parts(checkpoint, NAME)


def test_a_plain_config_and_a_notice_are_all_that_is_left_of_it(tmp_path: Path) -> None:
    tensors, _ = quantising.gptq("layer", (16, 32), bits=4, group=16, version=1, ordered=False, seed=0)
    tensors["norm.weight"] = torch.ones(32).half()
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    checkpoint = opened(tmp_path, tensors, settings)
    assert checkpoint.names == [NAME, "norm.weight"]
    assert "quantization_config" not in checkpoint.config
    assert read_config(tmp_path) == checkpoint.config
    assert checkpoint.quantised is not None
    assert checkpoint.quantised.notice.startswith("1 matrices are stored quantised (GPTQ, 4 bits, groups of 16)")
    assert checkpoint.nbytes == (16 * 32 + 32) * 2
    assert checkpoint.itemsize(NAME) == 2


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16}


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"quant_method": "aqlm"}, {}, "quant_method.*awq, bitsandbytes, compressed-tensors(.|\n)*'aqlm'"),
        ({**GPTQ, "bits": 5}, {}, r"quantization_config\.bits(.|\n)*2, 3, 4, 8"),
        ({**GPTQ, "checkpoint_format": "marlin"}, {}, "checkpoint_format(.|\n)*'marlin'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, {}, "version(.|\n)*'gemv'"),
        (GPTQ, {"layer.scales": None}, r"no layer\.scales"),
        (GPTQ, {"layer.scales": torch.ones(2, 8).half()}, r"scales of shape \[2, 16\](.|\n)*\[2, 8\]"),
        (GPTQ, {"layer.qweight": torch.ones(64, dtype=torch.int32)}, r"of 2 dimensions(.|\n)*\[64\]"),
        (GPTQ, {"layer.scales": torch.ones(0, 16).half()}, r"scales with values(.|\n)*\[0, 16\]"),
        (GPTQ, {"layer.qzeros": torch.ones(2, 2).half()}, r"qzeros in I32(.|\n)*F16"),
        (GPTQ, {"other.weight": torch.ones(2, dtype=torch.int8)}, r"other\.weight in I8"),
        (GPTQ, {"layer.weight": torch.ones(2, 2)}, "beside its quantised parts"),
        ({"quant_method": "fp8"}, {}, r"does not explain(.|\n)*layer\.qweight in I32"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, {}, "format(.|\n)*marlin"),
        (
            {
                "quant_method": "compressed-tensors", "format": "pack-quantized",
                "transform_config": {"config_groups": {"u": 1}},
            },
            {},
            "transform_config",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_before_a_tensor_is(
    tmp_path: Path, settings: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    tensors, _ = quantising.gptq("layer", (16, 32), bits=4, group=16, version=1, ordered=False, seed=0)
    changed = {name: value for name, value in (tensors | change).items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, changed, settings)


def test_an_order_that_names_no_group_is_an_error(tmp_path: Path) -> None:
    tensors, _ = quantising.gptq("layer", (16, 32), bits=4, group=16, version=1, ordered=True, seed=0)
    tensors["layer.g_idx"][3] = 2
    with pytest.raises(CheckpointError, match="groups 0 to 1 in g_idx"):
        opened(tmp_path, tensors, GPTQ).tensor(NAME)
