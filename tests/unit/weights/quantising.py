"""Packs matrices as the formats' own libraries do, one number at a time: what the readers are checked against.

Written from the formats' descriptions, in Python's integers and fp64, and sharing nothing with what it checks.
O outputs · I inputs · G groups
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Packed = tuple[dict[str, torch.Tensor], torch.Tensor]  # tensors on disk, and the matrix in fp64


def stream_words(values: Sequence[int], bits: int) -> list[int]:
    """Numbers as one long integer, cut into signed 32-bit words."""
    whole = sum(value << place * bits for place, value in enumerate(values))
    words = [(whole >> 32 * word) & 0xFFFFFFFF for word in range(-(-len(values) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def gptq(stem: str, shape: tuple[int, int], *, bits: int, group: int, version: int, ordered: bool, seed: int) -> Packed:
    """A random matrix in GPTQ; `ordered`: inputs are in groups by the order of their activations."""
    (outputs, inputs), rng = shape, torch.Generator().manual_seed(seed)
    groups = inputs // group
    codes = torch.randint(0, 1 << bits, shape, generator=rng)
    zeros = torch.randint(0, 1 << bits, (groups, outputs), generator=rng)
    scales = (torch.rand(groups, outputs, generator=rng) / 50 + 0.001).half()
    order = torch.randperm(inputs, generator=rng) if ordered else torch.arange(inputs)
    group_of = order // group
    stored = [[(zero - 1) % (1 << bits) if version == 1 else zero for zero in row] for row in zeros.tolist()]
    tensors = {
        f"{stem}.qweight": torch.tensor(
            [stream_words(row, bits) for row in codes.tolist()], dtype=torch.int32
        ).T.contiguous(),
        f"{stem}.qzeros": torch.tensor([stream_words(row, bits) for row in stored], dtype=torch.int32),
        f"{stem}.scales": scales,
    }
    if ordered:
        tensors[f"{stem}.g_idx"] = group_of.to(torch.int32)
    plain = (codes - zeros.T[:, group_of]).double() * scales.double().T[:, group_of]
    return tensors, plain


def awq(stem: str, shape: tuple[int, int], *, group: int, seed: int) -> Packed:
    """A random matrix in AWQ's GEMM version."""
    (outputs, inputs), rng = shape, torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (inputs, outputs), generator=rng).tolist()
    zeros = torch.randint(0, 16, (inputs // group, outputs), generator=rng).tolist()
    scales = (torch.rand(inputs // group, outputs, generator=rng) / 50 + 0.001).half()

    def words(row: list[int]) -> list[int]:
        order = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ's order_map
        return [stream_words([row[at + place] for place in order], 4)[0] for at in range(0, len(row), 8)]

    tensors = {
        f"{stem}.qweight": torch.tensor([words(row) for row in codes], dtype=torch.int32),
        f"{stem}.qzeros": torch.tensor([words(row) for row in zeros], dtype=torch.int32),
        f"{stem}.scales": scales,
    }
    plain = torch.tensor(
        [
            [(codes[i][o] - zeros[i // group][o]) * float(scales[i // group, o]) for i in range(inputs)]
            for o in range(outputs)
        ],
        dtype=torch.float64,
    )
    return tensors, plain


def float8(name: str, shape: tuple[int, int], block: tuple[int, int], seed: int) -> Packed:
    """A random matrix in e4m3 with a scale for each block, the last ones cut off."""
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randn(shape, generator=rng).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1]), generator=rng) + 0.01
    plain = torch.tensor(
        [
            [float(codes[o, i]) * float(scales[o // block[0], i // block[1]]) for i in range(shape[1])]
            for o in range(shape[0])
        ],
        dtype=torch.float64,
    )
    return {name: codes, f"{name}_scale_inv": scales}, plain


def nf4(stem: str, shape: tuple[int, int], *, nested: bool, seed: int, block: int = 64) -> Packed:
    """A random matrix in NF4; `nested`: the scales of blocks are 8-bit numbers themselves."""
    rng, values = torch.Generator().manual_seed(seed), shape[0] * shape[1]
    table = torch.linspace(-1, 1, 16) ** 3
    chosen = torch.randint(0, 16, (values,), generator=rng).tolist()
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(shape)}
    blocks, parts = -(-values // block), dict[str, torch.Tensor]()
    if nested:
        codes = torch.randint(0, 256, (blocks,), generator=rng)
        nested_table = torch.linspace(-1, 1, 256)
        nested_absmax = torch.rand(-(-blocks // 256), generator=rng)
        offset = 0.0417
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        absmax = [float(nested_table[codes[b]]) * float(nested_absmax[b // 256]) + offset for b in range(blocks)]
        parts = {"absmax": codes.to(torch.uint8), "nested_quant_map": nested_table, "nested_absmax": nested_absmax}
    else:
        parts = {"absmax": torch.rand(blocks, generator=rng)}
        absmax = parts["absmax"].double().tolist()
    packed = [chosen[at] << 4 | (chosen[at + 1] if at + 1 < values else 0) for at in range(0, values, 2)]
    tensors = {
        f"{stem}.weight": torch.tensor(packed, dtype=torch.uint8).unsqueeze(1),
        f"{stem}.weight.quant_map": table,
        f"{stem}.weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
        **{f"{stem}.weight.{key}": value for key, value in parts.items()},
    }
    plain = [float(table[chosen[at]]) * absmax[at // block] for at in range(values)]
    return tensors, torch.tensor(plain, dtype=torch.float64).reshape(shape)


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    """A checkpoint folder with these tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder
