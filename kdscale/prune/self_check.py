"""Proof, on the user's own model, that a pruned checkpoint is what the plan says. Seconds, fp32, one layer in memory.

1. `masked_equals_sliced`: the teacher at its full shape, with the dropped units silenced by hooks, and the sliced
   student give the same hidden states after every sublayer and the same logits. The mask never looks at the slicing
   code, so a wrong index shows. Regression (compensation) is left out here; what it does not touch must be in the
   student's files exactly as sliced, and that is compared too. A hidden axis cut by `refit` leaves nothing exact on
   that axis: as many of the teacher's own channels stand for it under the mask, and what was refitted need be finite.
2. `reload_parity`: plain transformers loads the folder with no tensor missing, left over or mismatched; its logits are
   those of our own layer-by-layer pass over the files; decoding with a cache gives what decoding without one gives.

B batch · S sequence · D teacher hidden · V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor

from kdscale.errors import SelfCheckError
from kdscale.families import Family
from kdscale.families.writers import STREAM, Writer
from kdscale.models.head import encoder_parts
from kdscale.models.layer_stream import DecoderLayer, LayerStream
from kdscale.models.multimodal.language_part import path_in_whole
from kdscale.prune.carried import carried_blocks
from kdscale.prune.compensation.layer_gaps import REPAIRED_ROLES, find_gaps
from kdscale.prune.compensation.one_stream import rewritten
from kdscale.prune.compensation.readers import is_refitted_reader
from kdscale.prune.plan import Plan
from kdscale.prune.reloading import layers_on_disk, plain_load
from kdscale.prune.slicing import SlicedStudent, Slicer
from kdscale.prune.stream_cut import METHOD as REFIT
from kdscale.prune.unit_mask import UnitMask
from kdscale.weights import Checkpoint
from kdscale.weights.tensor_bytes import torch_dtype

# Largest difference allowed of any token, as a share of its norm. fp32 sums taken in another order measure below 1e-5
# after 30 layers of a real model; docs/explanation/pruning.md has what one wrong unit measures.
TOLERANCE = 2e-4

# Tokens whose vector nearly vanishes are held to a share of the typical norm instead of their own.
_FLOOR = 1e-2

# Students above this size in fp32 are reloaded in the files' dtype with their layers left on the disk, as transformers
# offers it, so that the check needs no more memory than pruning does. In bf16 decoding with a cache rounds otherwise.
_IN_MEMORY_BYTES = 2 << 30
_CACHED_TOLERANCE_16BIT = 0.1

_BLOCK_BYTES = 1 << 25

_AXES_OF = {"o": "heads / kv_heads"}  # that the output of a projection depends on, where it is not what it reads


class IdsBatch:
    """Token ids as one batch of whole documents."""

    def __init__(self, input_ids_BS: Tensor):
        self.input_ids_BS = input_ids_BS
        self.position_ids_BS = torch.arange(input_ids_BS.shape[1]).expand_as(input_ids_BS)


def self_check(
    teacher: Checkpoint,
    family: Family,
    plan: Plan,
    student_dir: Path,
    input_ids_BS: Tensor,
    *,
    device: torch.device | None = None,
    tolerance: float = TOLERANCE,
) -> dict[str, float]:
    """Run both checks and compare the files' contents.

    Returns the largest relative differences, by check. Raises SelfCheckError when one of them is too large.
    """
    student = Checkpoint.open(student_dir)
    student.verify_against(family)
    files_equal_slices(teacher, family, plan, student)
    figures = masked_equals_sliced(teacher, family, plan, input_ids_BS, device=device, tolerance=tolerance)
    return figures | reload_parity(student_dir, family, input_ids_BS, device=device, tolerance=tolerance)


def masked_equals_sliced(
    teacher: Checkpoint,
    family: Family,
    plan: Plan,
    input_ids_BS: Tensor,
    *,
    device: torch.device | None = None,
    tolerance: float = TOLERANCE,
) -> dict[str, float]:
    """Compare the masked teacher with the sliced student after the embedding, every sublayer and the head.

    Returns {"masked_vs_sliced": largest relative difference of the logits}. Raises SelfCheckError naming the first
    layer and axis that disagree.
    """
    slicer = Slicer(teacher.config, family, plan)
    device, dtype = device or torch.device("cpu"), torch.float32
    sliced = SlicedStudent(slicer, _unrounded(teacher, slicer))
    teacher_stream = LayerStream(teacher.config, family, teacher.tensor, dtype=dtype, device=device)
    student_stream = LayerStream(slicer.student_config, family, sliced.tensor, dtype=dtype, device=device)
    mask, batch = UnitMask(teacher.config, plan, family, device), IdsBatch(input_ids_BS)
    compare = _Comparison(tolerance, torch.tensor(plan.kept.hidden, device=device))
    teacher_stream.check_positions([batch.position_ids_BS])
    with torch.inference_mode():
        enter = teacher_stream.embedding(mask.embedding)
        masked = enter(input_ids_BS.to(device), batch.position_ids_BS.to(device))
        masked = teacher_stream.beside.with_stream(masked, teacher_stream.stream(masked) * mask.hidden_D)
        student = student_stream.embed([batch])[0]
        compare.hidden("the embedding", "hidden", teacher_stream.stream(masked), student_stream.stream(student))
        for position, layer_index in enumerate(plan.kept.layers):
            outputs: list[dict[str, Tensor]] = [{}, {}]
            layer = teacher_stream.layer(layer_index)
            mask.attach(layer, position)
            _record(layer, slicer.writers(position), outputs[0])
            masked = layer(masked, batch.position_ids_BS)
            layer.release()
            layer = student_stream.layer(position)
            _record(layer, slicer.writers(position), outputs[1])
            student = layer(student, batch.position_ids_BS)
            layer.release()
            where = f"teacher layer {layer_index} (student layer {position})"
            for role, writer in slicer.writers(position).items():
                axis = "experts / ffn" if writer.of_experts else _AXES_OF.get(role, writer.axis)
                same = compare.hidden if writer.writes == STREAM else compare.equal
                same(f"{where}, {axis} output", axis, outputs[0][role], outputs[1][role])
            compare.hidden(where, "layers", teacher_stream.stream(masked), student_stream.stream(student))
        masked, student = teacher_stream.stream(masked), student_stream.stream(student)
        if family.sites.final_norm:
            norm = mask.final_norm(teacher_stream.final_norm())
            masked, student = norm(masked), student_stream.final_norm()(student)
        compare.hidden("the final norm", "hidden", masked, student)
        logits = teacher_stream.head(mask.head)(masked * mask.head_factor)
        if not family.sites.head:
            difference = compare.hidden("what leaves the model", "hidden", logits, student)
        else:
            difference = compare.equal("the logits", "hidden", logits, student_stream.head()(student))
    return {"masked_vs_sliced": difference}


def _unrounded(teacher: Checkpoint, slicer: Slicer) -> Callable[[str], Tensor]:
    """Reads the teacher; in fp32 what a factor is applied to: rounding to the file's dtype is not a slicing error."""
    rescaled = {
        tensor.source
        for tensor in slicer.tensors()
        if (tensor.spec.role == "embed" and slicer.embed_factor != 1.0) or tensor.spec.role.endswith("norm")
    }
    return lambda name: teacher.tensor(name).float() if name in rescaled else teacher.tensor(name)


def files_equal_slices(teacher: Checkpoint, family: Family, plan: Plan, student: Checkpoint) -> None:
    """Every tensor on disk is the teacher's slice, bit for bit, or (compensated) finite. Raises SelfCheckError."""
    slicer = Slicer(teacher.config, family, plan)
    changed = [rewritten(plan, slicer, position) for position in range(plan.student.layers)]
    refits = plan.methods.hidden == REFIT
    repaired = {gap.position for gap in find_gaps(plan)}
    for source, target, spec, position in slicer.tensors():
        refitted = (refits and "hidden" in spec.axes) or is_refitted_reader(slicer, spec, position)
        fitted = position is not None and spec.role in changed[position]
        if refitted or fitted or (spec.role in REPAIRED_ROLES and position in repaired):
            good = all(bool(torch.isfinite(block).all()) for block in student.blocks(target, _BLOCK_BYTES))
        else:
            good = _is_written(student, target, slicer.slice(teacher.tensor(source), spec, position))
        if not good:
            raise SelfCheckError(f"{student.path}: {target} is not what the plan makes of the teacher's {source}")
    for name in teacher.carried:
        if refits and slicer.carried_indices(name):
            good = all(bool(torch.isfinite(block).all()) for block in student.blocks(name, _BLOCK_BYTES))
        else:
            blocks = [*carried_blocks(teacher, slicer, name, None)]
            good = _is_written(student, name, blocks[0] if len(blocks) == 1 else torch.cat(blocks))
        if not good:
            raise SelfCheckError(f"{student.path}: {name} is not what the plan makes of the teacher's")


def _is_written(student: Checkpoint, name: str, expected: Tensor) -> bool:
    """Whether a tensor of the file is `expected` bit for bit; reads a block of rows at a time."""
    on_disk = student.spec(name)
    if on_disk.shape != tuple(expected.shape) or torch_dtype(on_disk.dtype) != expected.dtype:
        return False
    if not expected.shape:
        return torch.equal(student.tensor(name), expected)
    begin = 0
    for block in student.blocks(name, _BLOCK_BYTES):
        if not torch.equal(block, expected[begin : begin + len(block)]):
            return False
        begin += len(block)
    return True


def reload_parity(
    student_dir: Path,
    family: Family,
    input_ids_BS: Tensor,
    *,
    device: torch.device | None = None,
    tolerance: float = TOLERANCE,
) -> dict[str, float]:
    """Compare plain transformers on the folder with kdscale's pass over its files, and cached with uncached decoding.

    Returns {"reload_vs_streamed", "cached_vs_uncached"}, of an encoder the first alone. Raises SelfCheckError.
    """
    device = device or torch.device("cpu")
    student = Checkpoint.open(student_dir)
    in_memory = 4 * family.count_params(student.config).total <= _IN_MEMORY_BYTES
    dtype = torch.float32 if in_memory else torch_dtype(student.spec(student.names[-1]).dtype)
    batch, compare = IdsBatch(input_ids_BS), _Comparison(tolerance, None)
    stream = LayerStream(student.config, family, student.tensor, dtype=dtype, device=device)
    with TemporaryDirectory(dir=student_dir.parent) as offload, torch.inference_mode():
        if in_memory:
            model = plain_load(student_dir, family, dtype=dtype).to(device)
        else:
            device_map = layers_on_disk(student_dir, family, device)
            model = plain_load(student_dir, family, dtype=dtype, device_map=device_map, offload_folder=offload)
        states: list[Tensor] = []
        for module in model.get_submodule(path_in_whole(family, family.sites.layers)).children():
            module.register_forward_hook(lambda _m, _a, out: states.append(out if isinstance(out, Tensor) else out[0]))
        reloaded = _outputs(model, batch, device)
        hidden = stream.embed([batch])[0]
        for layer in stream.layers():
            hidden = layer(hidden, batch.position_ids_BS)
            compare.equal(f"reloaded layer {layer.index}", "layers", states[layer.index], stream.stream(hidden))
        streamed = stream.head()(stream.final_norm()(stream.stream(hidden)))
        difference = compare.equal("the reloaded model's logits", "all", reloaded, streamed)
        rounded = dtype.itemsize < 4
        figures = {"reload_vs_streamed": difference}
        if family.is_encoder:  # which writes no text
            return figures
        compare = _Comparison(max(tolerance, _CACHED_TOLERANCE_16BIT) if rounded else tolerance, None)
        cached = _cached_decoding(model, batch.input_ids_BS[:1].to(device), compare)
    return {**figures, "cached_vs_uncached": cached}


def _outputs(model: Any, batch: IdsBatch, device: torch.device) -> Tensor:
    """The model's logits, of a row for one that tells classes; of an encoder without a head its last hidden states."""
    ids_BS = batch.input_ids_BS.to(device)
    if (encoder := encoder_parts(model)) is None:
        return cast(Tensor, model(input_ids=ids_BS, use_cache=False).logits)
    out = model(input_ids=ids_BS, position_ids=batch.position_ids_BS.to(device) + encoder.first_position)
    return cast(Tensor, out.logits if "logits" in out else out.last_hidden_state)


def _cached_decoding(model: Any, input_ids_BS: Tensor, compare: _Comparison, steps: int = 3) -> float:
    """Compare the logits of greedy decoding with a cache, step for step, with those of one pass without it."""
    out = model.generate(
        input_ids_BS,
        attention_mask=torch.ones_like(input_ids_BS),
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    cached_SV = torch.stack([step[0] for step in out.logits])
    start = input_ids_BS.shape[1]
    uncached_SV = model(input_ids=out.sequences[:, :-1], use_cache=False).logits[0, start - 1 :]
    return compare.equal("decoding with a cache", "all", uncached_SV, cached_SV)


class _Comparison:
    """Compares token by token, so that one token with massive activations does not hide the others."""

    def __init__(self, tolerance: float, kept_hidden: Tensor | None):
        self._tolerance, self._kept = tolerance, kept_hidden

    def hidden(self, where: str, axis: str, masked_BSD: Tensor, student: Tensor) -> float:
        """Compare hidden states, of which the masked ones have the teacher's width."""
        assert self._kept is not None
        return self.equal(where, axis, masked_BSD[..., self._kept], student)

    def equal(self, where: str, axis: str, expected: Tensor, got: Tensor) -> float:
        """The largest difference of any token's vector, as a share of its norm. Raises SelfCheckError if too large."""
        norms = expected.norm(dim=-1)
        floor = (_FLOOR * norms.median()).clamp_min(torch.finfo(norms.dtype).tiny)
        difference = float(((expected - got).norm(dim=-1) / norms.maximum(floor)).max())
        if not (math.isfinite(difference) and difference <= self._tolerance):
            raise SelfCheckError(
                f"self-check failed at {where} (axis: {axis})",
                expected=f"every token's vector equal within {self._tolerance:g} of its norm",
                got=f"a relative difference of {difference:.4g}",
                hint="the pruned model was not kept; please report this with plan.json",
            )
        return difference


def _record(layer: DecoderLayer, writers: Mapping[str, Writer], seen: dict[str, Tensor]) -> None:
    """Keep what the projections into the residual stream put out; registered last, so after any mask."""

    def keep(name: str) -> Callable[[Any, Any, Tensor], None]:
        return lambda _module, _args, output: seen.__setitem__(name, output)

    for role, writer in writers.items():
        layer.site(writer.path).register_forward_hook(keep(role))
