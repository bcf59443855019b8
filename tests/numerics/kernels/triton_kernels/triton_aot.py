"""Compiles every Triton body for every tile and target, without a GPU, and prints what each uses as JSON lines.

A program of its own, because a process that interprets Triton cannot compile it:

    PYTHONPATH=kernels python tests/numerics/kernels/triton_kernels/triton_aot.py [few|all] [--table]
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kdscale_kernels import DIVERGENCES
from kdscale_kernels.triton_kernels import full as triton_full
from kdscale_kernels.triton_kernels import slices, sparse, topk
from kdscale_kernels.triton_kernels.limits import GROUP

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
FEW_TARGETS = ("sm_90", "gfx942")  # one of each maker: the others take as long again
TYPES = {
    **dict.fromkeys(("rows_ptr", "ids_ptr", "top1_ptr", "labels_ptr", "groups_ptr"), "*i64"),
    **dict.fromkeys(("used_ptr", "covers_vocab_ptr"), "*i1"),
    **dict.fromkeys(("z_ptr", "teacher_ptr", "dz_ptr", "logp_ptr", "logp_tail_ptr", "sums_ptr"), "*fp32"),
    **dict.fromkeys(("lse_ptr", "maxima_ptr", "values_ptr", "kept_ptr", "tempered_ptr", "plain_ptr"), "*fp32"),
    **dict.fromkeys(("support_ptr", "label_logit_ptr", "top1_logit_ptr", "tail_sums_ptr"), "*fp32"),
    **dict.fromkeys(("at_label_ptr", "a_ptr", "tail_ptr", "b_ptr", "ce_weights_ptr"), "*fp32"),
    **dict.fromkeys(("temperature", "ce_weight", "parameter", "rest", "softcap", "teacher_softcap"), "fp32"),
}


class Build(NamedTuple):
    body: Any
    name: str
    constants: dict[str, Any]
    warps: int
    types: dict[str, str]


def constants_of(divergence: str, *, sparse: bool = True) -> dict[str, Any]:
    """What a loss's body is compiled with for a divergence."""
    info = DIVERGENCES[divergence]
    constants = {"DIVERGENCE": divergence, "GRADIENT_SUM": info.gradient_sum}
    return constants | ({"FLOORS_TAIL": info.floors_teacher_tail} if sparse else {})


def loss_variants(which: str) -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    """(name, constants, pointer types): the plainest, the fullest, and what lies between."""
    plain = {
        **constants_of("forward_kl"),
        "TAIL": "bucket",
        "HAS_KD": True,
        "HAS_CE": False,
        "TEMPERED": False,
        "SOFTCAP": False,
        "WANT_GRAD": True,
        "BF16_GRAD": True,
        "HAS_ROWS": False,
        "ROW_WEIGHTS": False,
    }
    bf16, same = {"dz_ptr": "*bf16"}, {"z_ptr": "*bf16", "dz_ptr": "*bf16"}
    full = {**plain, "HAS_CE": True, "TEMPERED": True, "SOFTCAP": True}
    yield "plain", plain, bf16
    yield "jsd, CE by row, T, soft-cap", {**full, **constants_of("jsd"), "ROW_WEIGHTS": True}, bf16
    yield "skewed reverse KL, CE, T, soft-cap", {**full, **constants_of("skewed_reverse_kl")}, bf16
    yield "bf16 in place, CE", {**plain, "HAS_CE": True, "BF16_GRAD": False, "HAS_ROWS": True}, same
    if which == "all":
        yield "no gradient", {**full, "WANT_GRAD": False}, bf16
        for divergence, tail in itertools.product(DIVERGENCES, ("bucket", "truncated", "renormalised")):
            yield f"{divergence} {tail}, full", {**full, **constants_of(divergence), "TAIL": tail}, bf16
        yield "fp32 in place, full", {**full, "BF16_GRAD": False, "HAS_ROWS": True}, {}


def full_variants(which: str) -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    """As loss_variants, for linear_full_kl."""
    plain = {
        **constants_of("forward_kl", sparse=False),
        "HAS_KD": True,
        "HAS_CE": False,
        "TEMPERED": False,
        "SOFTCAP": False,
        "TEACHER_SOFTCAP": False,
        "WANT_GRAD": True,
        "BF16_GRAD": True,
        "BLOCK_V": triton_full.TILE.block_v,
    }
    bf16 = {"dz_ptr": "*bf16"}
    full = {**plain, "HAS_CE": True, "TEMPERED": True, "SOFTCAP": True, "TEACHER_SOFTCAP": True}
    yield "plain", plain, bf16
    yield "jsd, CE, T, soft-caps", {**full, **constants_of("jsd", sparse=False)}, bf16
    yield "fp32 in place, CE", {**plain, "HAS_CE": True, "BF16_GRAD": False}, {}
    if which == "all":
        yield "no gradient", {**full, "WANT_GRAD": False}, bf16
        for divergence in DIVERGENCES.keys() - {"jsd"}:
            yield f"{divergence}, full", {**full, **constants_of(divergence, sparse=False)}, bf16
        yield "CE alone", {**full, **constants_of("jsd", sparse=False), "HAS_KD": False}, bf16


def builds(which: str) -> Iterator[Build]:
    for name, constants, types in full_variants(which):
        yield Build(triton_full.full_kl_rows_kernel, f"full_kl: {name}", constants, triton_full.TILE.warps, types)
    for tile, (name, flags, types) in itertools.product(sparse.TILES, loss_variants(which)):
        constants = {**flags, "BLOCK_V": tile.block_v, "BLOCK_K": tile.max_k}
        yield Build(sparse.sparse_kl_rows_kernel, f"sparse_kl K<={tile.max_k}: {name}", constants, tile.warps, types)
    yield from slice_builds()
    for capped in (False, True):
        constants = {"SOFTCAP": capped, "GROUP": GROUP, "BLOCK_G": topk.SWEEP_TILE.groups}
        name = "lse_groups" + (": soft-cap" if capped else "")
        yield Build(topk.lse_groups_kernel, name, constants, topk.SWEEP_TILE.warps, {})
    for tile, grouped in itertools.product(topk.SELECT_TILES, (False, True)):
        constants = {"HAS_GROUPS": grouped, "GROUP": GROUP, "BLOCK_J": tile.max_j}
        name = f"select J<={tile.max_j}" + (": groups" if grouped else "")
        yield Build(topk.select_kernel, name, constants, tile.warps, {})


def slice_builds() -> Iterator[Build]:
    """The two bodies for vocabulary slices, plainest and fullest, with what is kept and without."""
    for tile, full, kept in itertools.product(slices.SLICE_TILES, (False, True), (False, True)):
        blocks = {"BLOCK_S": tile.block_v, "BLOCK_K": tile.max_k, "SOFTCAP": full}
        name = ("CE, T, soft-cap" if full else "plain") + (", kept" if kept else "")
        reading = {**blocks, "TEMPERED": full, "KEEP": kept, "KEEP_PLAIN": full and kept}
        bf16 = {"tempered_ptr": "*bf16", "plain_ptr": "*bf16"}
        yield Build(slices.read_slice_kernel, f"read_slice K<={tile.max_k}: {name}", reading, tile.warps, bf16)
        writing = {**blocks, "HAS_CE": full, "HAS_PLAIN": full, "KEPT": kept, "BF16_GRAD": not kept}
        bf16 = {"dz_ptr": "*bf16"} | ({"z_ptr": "*bf16", "plain_ptr": "*bf16"} if kept else {})
        yield Build(slices.write_slice_kernel, f"write_slice K<={tile.max_k}: {name}", writing, tile.warps, bf16)


def compile_for(build: Build, target: GPUTarget) -> Any:
    names = build.body.arg_names
    types = {**TYPES, **build.types}
    signature = {name: "constexpr" if name in build.constants else types.get(name, "i32") for name in names}
    sixteen = [
        i
        for i, name in enumerate(names)
        if name.endswith("_ptr") or name.startswith("stride") or name in ("vocab", "width")
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in sixteen}
    warps = build.warps if target.backend == "cuda" else build.warps * 32 // target.warp_size
    source = ASTSource(build.body, signature, build.constants, attributes)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": 1})


def usage(compiled: Any, target: GPUTarget) -> dict[str, int]:
    """Registers a thread, bytes of stack and local memory a thread, spilled registers, shared bytes a program."""
    shared = int(compiled.metadata.shared)
    if target.backend == "hip":
        listing = compiled.asm["amdgcn"]
        found = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)$", listing, re.MULTILINE)}
        # A spilled scalar register goes to a lane of a vector register, so it costs no memory and is not counted.
        return {
            "registers": found["vgpr_count"],
            "stack": found["private_segment_fixed_size"],
            "local": 0,
            "spills": found["vgpr_spill_count"],
            "shared": shared,
        }
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in text.splitlines() if "REG:" in line]
    found = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
    # What ptxas spills lies on the stack: there is no other stack in these bodies.
    return {
        "registers": found["REG"],
        "stack": found["STACK"],
        "local": found["LOCAL"],
        "spills": found["STACK"],
        "shared": shared,
    }


def main() -> None:
    which = sys.argv[1] if len(sys.argv) > 1 else "few"
    rows: dict[str, list[str]] = {}
    targets = {label: target for label, target in TARGETS.items() if which == "all" or label in FEW_TARGETS}
    for build, (label, target) in itertools.product(builds(which), targets.items()):
        compiled = compile_for(build, target)
        used = usage(compiled, target)
        if target.backend == "cuda":
            ptx = compiled.asm["ptx"]
            used |= {"barriers": ptx.count("bar.sync"), "vector_loads": len(re.findall(r"ld\.global\S*\.v[24]", ptx))}
        record = {"name": build.name, "bf16_grad": bool(build.constants.get("BF16_GRAD")), "target": label, **used}
        if "--table" in sys.argv:
            rows.setdefault(build.name, []).append(f"{used['registers']} / {used['shared']}")
        else:
            print(json.dumps(record), flush=True)
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
