"""Proof, on the user's own model, that a pruned checkpoint is what the plan says. Seconds, fp32, one layer in memory.

1. `masked_equals_sliced`: the teacher at its full shape, with the dropped units silenced by hooks, and the sliced
   student give the same hidden states after every sublayer and the same logits. The mask never looks at the slicing
   code, so a wrong index shows. Regression (compensation) is left out here; what it does not touch must be in the
   student's files exactly as sliced, and that is compared too.
2. `reload_parity`: plain transformers loads the folder with no tensor missing, left over or mismatched; its logits are
   those of our own layer-by-layer pass over the files; decoding with a cache gives what decoding without one gives.

Norms under a mask: with c = √(d/d'), a norm over d channels of c·x, zero outside the d' kept ones, has exactly the mean
square that the student's norm has over d', epsilon included, and its output is c times what the student's is with the
teacher's γ. Hence: scale what enters by c and what leaves by norm_scale/c. LayerNorm: x less its mean over the kept
channels enters, and its bias is left out of the scaling. The same holds of a q or k norm over all heads (OLMo 2), where
the mask stands between the projection and the norm: the student's norm knows the kept heads only.

Routers under a mask of experts are given the kept experts' rows, and what they choose is numbered as in the teacher.

B batch · S sequence · D teacher hidden · V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from kdscale.errors import SelfCheckError
from kdscale.families import Family
from kdscale.models.layer_stream import DecoderLayer, LayerStream
from kdscale.prune.compensation.layer_gaps import ROLE, find_gaps
from kdscale.prune.compensation.one_stream import compensated_roles
from kdscale.prune.plan import Plan
from kdscale.prune.slicing import Slicer
from kdscale.weights import Checkpoint
from kdscale.weights.reader import torch_dtype

# Largest difference allowed of any token, as a share of its norm. fp32 sums taken in another order measure below 1e-5
# after 30 layers of a real model; docs/explanation/pruning.md has what one wrong unit measures.
TOLERANCE = 2e-4


# Tokens whose vector nearly vanishes are held to a share of the typical norm instead of their own.
_FLOOR = 1e-2


# Students above this size in fp32 are reloaded in the files' dtype with their layers left on the disk, as transformers
# offers it, so that the check needs no more memory than pruning does. In bf16 decoding with a cache rounds otherwise.
_WHOLE_BYTES = 2 << 30


_CACHED_TOLERANCE_16BIT = 0.1


_BLOCK_BYTES = 1 << 25


_FIGURES = dict[str, float]


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
) -> _FIGURES:
    """Both checks and the files' contents. Returns the largest relative differences. Raises SelfCheckError."""
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
) -> _FIGURES:
    """Masked teacher == sliced student, after the embedding, every sublayer and the head.

    Returns {"masked_vs_sliced": largest relative difference of the logits}. Raises SelfCheckError naming the first
    layer and axis that disagree.
    """
    slicer = Slicer(teacher.config, family, plan)
    device = device or torch.device("cpu")
    whole = LayerStream(teacher.config, family, teacher.tensor, dtype=torch.float32, device=device)
    cut = LayerStream(
        slicer.student_config, family, _sliced_source(teacher, slicer), dtype=torch.float32, device=device
    )
    mask, batch = _Mask(teacher.config, plan, family, device), IdsBatch(input_ids_BS)
    positions = batch.position_ids_BS.to(device)
    compare = _Comparison(tolerance, torch.tensor(plan.kept.hidden, device=device))
    with torch.inference_mode():
        theirs, ours = whole.embed([batch])[0] * mask.hidden_D, cut.embed([batch])[0]
        compare.hidden("the embedding", "hidden", theirs, ours)
        for position, layer_index in enumerate(plan.kept.layers):
            seen_theirs: dict[str, Tensor] = {}
            seen_ours: dict[str, Tensor] = {}
            layer = whole.layer(layer_index)
            mask.attach(layer, position)
            _record(layer, family, seen_theirs)
            theirs = layer(theirs, positions)
            layer.release()
            layer = cut.layer(position)
            _record(layer, family, seen_ours)
            ours = layer(ours, positions)
            layer.release()
            where = f"teacher layer {layer_index} (student layer {position})"
            mlp = "experts / ffn" if family.sites.experts else "ffn"
            for site, axis in (("heads", "heads / kv_heads"), ("ffn", mlp)):
                compare.hidden(f"{where}, {axis} output", axis, seen_theirs[site], seen_ours[site])
            compare.hidden(where, "layers", theirs, ours)
        norm = mask.final_norm(whole.final_norm())
        theirs, ours = norm(theirs), cut.final_norm()(ours)
        compare.hidden("the final norm", "hidden", theirs, ours)
        logits = whole.head()(theirs * mask.head_factor)
        share = compare.equal("the logits", "hidden", logits, cut.head()(ours))
    return {"masked_vs_sliced": share}


def files_equal_slices(teacher: Checkpoint, family: Family, plan: Plan, student: Checkpoint) -> None:
    """Every tensor on disk is the teacher's slice, bit for bit, or (compensated) finite. Raises SelfCheckError."""
    slicer = Slicer(teacher.config, family, plan)
    changed = compensated_roles(plan, slicer)
    mended = {gap.position for gap in find_gaps(plan)}
    for position, source, target, spec in _all_pairs(slicer):
        if spec.role in changed or (spec.role == ROLE and position in mended):
            good = all(bool(torch.isfinite(block).all()) for block in student.blocks(target, _BLOCK_BYTES))
        else:
            good = _is_written(student, target, slicer.slice(teacher.tensor(source), spec, position))
        if not good:
            raise SelfCheckError(f"{student.path}: {target} is not what the plan makes of the teacher's {source}")


def _is_written(student: Checkpoint, name: str, expected: Tensor) -> bool:
    """Bit for bit, a block of rows of the file in memory at a time."""
    found = student.spec(name)
    if found.shape != tuple(expected.shape) or torch_dtype(found.dtype) != expected.dtype:
        return False
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
) -> _FIGURES:
    """Plain transformers on the folder against our own pass over its files; cached against uncached decoding.

    Returns {"reload_vs_streamed", "cached_vs_uncached"}. Raises SelfCheckError.
    """
    device = device or torch.device("cpu")
    student = Checkpoint.open(student_dir)
    whole = 4 * family.count_params(student.config).total <= _WHOLE_BYTES
    dtype = torch.float32 if whole else torch_dtype(student.spec(student.names[-1]).dtype)
    batch, compare = IdsBatch(input_ids_BS), _Comparison(tolerance, None)
    stream = LayerStream(student.config, family, student.tensor, dtype=dtype, device=device)
    with TemporaryDirectory(dir=student_dir.parent) as offload, torch.inference_mode():
        if whole:
            model = _plain_load(student_dir, dtype=dtype).to(device)
        else:
            places = _places(student_dir, family, device)
            model = _plain_load(student_dir, dtype=dtype, device_map=places, offload_folder=offload)
        states: list[Tensor] = []
        layers = model.get_submodule(family.sites.layers)
        for layer in layers.children():
            layer.register_forward_hook(lambda _m, _a, out: states.append(out if isinstance(out, Tensor) else out[0]))
        reloaded = model(input_ids=batch.input_ids_BS.to(device), use_cache=False).logits
        hidden = stream.embed([batch])[0]
        for index, one in enumerate(stream.layers()):
            hidden = one(hidden, batch.position_ids_BS.to(device))
            compare.equal(f"reloaded layer {index}", "layers", states[index], hidden)
        share = compare.equal(
            "the reloaded model's logits", "all", reloaded, stream.head()(stream.final_norm()(hidden))
        )
        rounded = dtype.itemsize < 4
        compare = _Comparison(max(tolerance, _CACHED_TOLERANCE_16BIT) if rounded else tolerance, None)
        cached = _cached_decoding(model, batch.input_ids_BS[:1].to(device), compare)
    return {"reload_vs_streamed": share, "cached_vs_uncached": cached}


def _places(folder: Path, family: Family, device: torch.device) -> dict[str, Any]:
    """A device_map: the layers on the disk, all that is outside them on `device`."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    layers = f"{family.sites.layers}."
    places: dict[str, Any] = {
        name: "disk"
        for name, _ in model.named_modules()
        if name.count(".") == layers.count(".") and name.startswith(layers)
    }
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own and not name.startswith(layers):
            places[name] = device.type if device.index is None else device.index
    return places


def _plain_load(folder: Path, **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **settings
    )
    model, info = loaded
    wrong = {key: sorted(map(str, value)) for key, value in info.items() if value}
    if wrong:
        raise SelfCheckError(
            f"{folder} does not load cleanly through transformers", expected="no complaints", got=str(wrong)
        )
    return model.eval()


def _cached_decoding(model: Any, input_ids_BS: Tensor, compare: _Comparison, steps: int = 3) -> float:
    """Greedy decoding with a cache gives, step for step, the logits of one pass without it."""
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
    whole_SV = model(input_ids=out.sequences[:, :-1], use_cache=False).logits[0, start - 1 :]
    return compare.equal("decoding with a cache", "all", whole_SV, cached_SV)


class _Mask:
    """Hooks that silence the dropped units of a full-size layer, built from the plan's index lists alone."""

    def __init__(self, config: dict[str, Any], plan: Plan, family: Family, device: torch.device):
        self._config, self._plan, self._family, self._device = config, plan, family, device
        self.hidden_D = self._indicator(plan.kept.hidden, plan.teacher.hidden)
        # A tied head carries the factor of its embedding, and the student's final norm its inverse.
        folded = family.data.embed_multiplier == "sqrt_hidden" and bool(family.tied(config))
        self.head_factor = math.sqrt(plan.teacher.hidden / plan.student.hidden) if folded else 1.0

    def attach(self, layer: DecoderLayer, position: int) -> None:
        plan, sites = self._plan, self._family.sites
        heads_QH = self._wide(plan.kept.heads[position], plan.teacher.heads)
        layer.site(sites.heads).register_forward_pre_hook(_scale_input(heads_QH))
        if sites.ffn:
            ffn_F = self._indicator(plan.kept.ffn[position], plan.teacher.ffn)
            layer.site(sites.ffn).register_forward_pre_hook(_scale_input(ffn_F))
        else:
            self._experts(layer, position)
        for path in (sites.heads, sites.mlp_output):
            layer.site(path).register_forward_hook(_scale_output(self.hidden_D))
        keep = {
            "hidden": self.hidden_D,
            "heads*head_dim": heads_QH,
            "kv_heads*head_dim": self._wide(plan.kept.kv_heads[position], plan.teacher.kv_heads),
        }
        prefix = self._family.layer_prefix(layer.index)
        for spec in self._family.layer_tensors(self._config, layer.index).values():
            if spec.role.endswith("_norm") and spec.axes[0] in keep:
                scale = plan.norm_scale if spec.axes[0] == "hidden" else 1.0
                path = spec.parameter.removeprefix(prefix).removesuffix(".weight")
                self._norm(layer.site(path), keep[spec.axes[0]], scale)

    def final_norm(self, module: nn.Module) -> nn.Module:
        """Make the teacher's final norm compute what the student's does, on the kept channels."""
        return self._norm(module, self.hidden_D, self._plan.norm_scale / self.head_factor)

    def _norm(self, module: nn.Module, keep_D: Tensor, scale: float) -> nn.Module:
        grow, centred = math.sqrt(len(keep_D) / float(keep_D.sum())), self._family.data.norm.kind == "layer"
        bias_D = getattr(module, "bias", None)

        def enter(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0] * keep_D
            if centred:
                x = (x - x.sum(-1, keepdim=True) / keep_D.sum()) * keep_D
            return (x * grow, *args[1:])

        def leave(_module: Any, _args: Any, output: Tensor) -> Tensor:
            if bias_D is None:
                return output * (keep_D * (scale / grow))
            return ((output - bias_D) * (scale / grow) + bias_D) * keep_D

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        return module

    def _experts(self, layer: DecoderLayer, position: int) -> None:
        """Columns of units that go are zeroed in each kept expert; the router has the kept experts to choose from."""
        plan, sites = self._plan, self._family.sites
        kept = plan.kept.experts[position]
        experts: Any = layer.site(sites.experts)
        router: Any = layer.site(sites.router)
        for expert in kept:
            experts.down_proj[expert] *= self._indicator(plan.kept.ffn_of(position, expert), plan.teacher.ffn)
        numbers = torch.tensor(kept, device=self._device)
        router.weight.data = router.weight.data[numbers]
        router.register_forward_hook(lambda _module, _args, output: (*output[:-1], numbers[output[-1]]))

    def _wide(self, kept: list[int], size: int) -> Tensor:
        return self._indicator(kept, size).repeat_interleave(self._plan.teacher.head_dim)

    def _indicator(self, kept: list[int], size: int) -> Tensor:
        out = torch.zeros(size, device=self._device)
        out[kept] = 1.0
        return out


class _Comparison:
    """Compares token by token, so that one token with massive activations does not hide the others."""

    def __init__(self, tolerance: float, kept_hidden: Tensor | None):
        self._tolerance, self._kept = tolerance, kept_hidden

    def hidden(self, where: str, axis: str, theirs_BSD: Tensor, ours: Tensor) -> float:
        """As `equal`, with `theirs` at the teacher's width."""
        assert self._kept is not None
        return self.equal(where, axis, theirs_BSD[..., self._kept], ours)

    def equal(self, where: str, axis: str, theirs: Tensor, ours: Tensor) -> float:
        norms = theirs.norm(dim=-1)
        floor = (_FLOOR * norms.median()).clamp_min(torch.finfo(norms.dtype).tiny)
        share = float(((theirs - ours).norm(dim=-1) / norms.maximum(floor)).max())
        if not (math.isfinite(share) and share <= self._tolerance):
            raise SelfCheckError(
                f"self-check failed at {where} (axis: {axis})",
                expected=f"every token's vector equal within {self._tolerance:g} of its norm",
                got=f"a relative difference of {share:.4g}",
                hint="the pruned model was not kept; please report this with plan.json",
            )
        return share


def _sliced_source(teacher: Checkpoint, slicer: Slicer) -> Callable[[str], Tensor]:
    where = {target: (position, source, spec) for position, source, target, spec in _all_pairs(slicer)}

    def tensor(name: str) -> Tensor:
        position, source, spec = where[name]
        whole = teacher.tensor(source)
        if (spec.role == "embed" and slicer.embed_factor != 1.0) or spec.role.endswith("norm"):
            whole = whole.float()  # before a factor is applied: rounding it to the file's dtype is not a slicing error
        return slicer.slice(whole, spec, position)

    return tensor


def _all_pairs(slicer: Slicer) -> Iterator[tuple[int | None, str, str, Any]]:
    for source, target, spec in slicer.outer():
        yield None, source, target, spec
    for position in range(slicer.plan.student.layers):
        for source, target, spec in slicer.layer(position):
            yield position, source, target, spec


def _record(layer: DecoderLayer, family: Family, seen: dict[str, Tensor]) -> None:
    """Keep what the two projections into the residual stream put out; registered last, so after any mask."""

    def keep(name: str) -> Callable[[Any, Any, Tensor], None]:
        return lambda _module, _args, output: seen.__setitem__(name, output)

    layer.site(family.sites.heads).register_forward_hook(keep("heads"))
    layer.site(family.sites.mlp_output).register_forward_hook(keep("ffn"))


def _scale_input(factor: Tensor | float) -> Callable[[Any, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda _module, args: (args[0] * factor, *args[1:])


def _scale_output(factor: Tensor | float) -> Callable[[Any, Any, Tensor], Tensor]:
    return lambda _module, _args, output: output * factor
