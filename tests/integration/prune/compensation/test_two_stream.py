"""Compensation in both streams equals a plain whole-model computation of its definition."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from kdscale.models.loading import load_model
from kdscale.prune import self_check
from kdscale.prune.slicing import SlicedStudent, Slicer

CPU = torch.device("cpu")
PLAIN = {"ridge_lambda": 0.03, "compensate": "two_stream"}


def _run(model, batches, sites) -> dict[str, torch.Tensor]:
    """What enters and leaves each of `sites` (paths) of a whole model: `in path` and `out path`, [B, S, ·]."""
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(path):
        def hook(_module, args, output):
            seen.setdefault(f"in {path}", []).append(args[0])
            seen.setdefault(f"out {path}", []).append(output if isinstance(output, torch.Tensor) else output[0])

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in sites]
    with torch.inference_mode():
        for batch in batches:
            model(input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).double() for name, parts in seen.items()}


def _ridge(x, target, prior, ridge):
    """The same minimum by least squares on stacked rows, not by normal equations."""
    x, target = x.flatten(0, -2), target.flatten(0, -2)
    root = (ridge * x.square().sum(0).mean()).sqrt()
    rows = torch.cat([x, root * torch.eye(x.shape[1], dtype=x.dtype)])
    values = torch.cat([target, root * prior.double().T])
    return torch.linalg.lstsq(rows, values).solution.T


def _inputs(plan, position, site) -> list[int]:
    """The inputs of a projection that stay."""
    if site == "mlp.down_proj":
        return plan.kept.ffn[position]
    width = plan.teacher.head_dim
    return [head * width + i for head in plan.kept.heads[position] for i in range(width)]


READERS = {
    "self_attn.o_proj": ("input_layernorm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    "mlp.down_proj": ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
}


def _refit_readers(teacher, student, plan, position, site, ridge) -> dict[str, torch.Tensor]:
    """Each by a regression of its own: what it puts out in the teacher, from what the two norms put out."""
    theirs, ours = f"model.layers.{plan.kept.layers[position]}", f"model.layers.{position}"
    norm, paths = READERS[site]
    wide = _run(teacher.model, teacher.batches, [f"{theirs}.{norm}"])[f"out {theirs}.{norm}"]
    narrow = _run(student, teacher.batches, [f"{ours}.{norm}"])[f"out {ours}.{norm}"]
    first = torch.cat([batch.position_ids_BS for batch in teacher.batches]) == 0
    weight = torch.where(first, 32.0**0.5, 1.0)[..., None].double()
    out = {}
    for path in paths:
        module = student.get_submodule(f"{ours}.{path}")
        prior = module.weight.detach().double()
        x = torch.cat([wide * weight, narrow * weight])
        out[f"{ours}.{path}.weight"] = _ridge(x, torch.cat([wide * weight] * 2) @ prior.T, prior, 0.1 * ridge)
        module.weight.data = out[f"{ours}.{path}.weight"].float()
    return out


def _whole_model(teacher, student, plan, beta, ridge) -> dict[str, torch.Tensor]:
    """Refits every projection of `student` in place, running both whole models anew for each; returns the weights."""
    out = {}
    rows = torch.tensor(plan.kept.hidden)
    for position, index in enumerate(plan.kept.layers):
        theirs, ours = f"model.layers.{index}", f"model.layers.{position}"
        for site, others in (("self_attn.o_proj", ()), ("mlp.down_proj", ("self_attn.o_proj",))):
            paths = (site, *others)
            if plan.student.hidden == plan.teacher.hidden:
                out |= _refit_readers(teacher, student, plan, position, site, ridge)
            wide = _run(teacher.model, teacher.batches, [theirs, *(f"{theirs}.{path}" for path in paths)])
            narrow = _run(student, teacher.batches, [ours, *(f"{ours}.{path}" for path in paths)])
            behind = wide[f"in {theirs}"][..., rows] - narrow[f"in {ours}"]
            for path in others:
                behind = behind + wide[f"out {theirs}.{path}"][..., rows] - narrow[f"out {ours}.{path}"]
            wanted = wide[f"out {theirs}.{site}"][..., rows]
            units = _inputs(plan, position, site)
            x = torch.cat([wide[f"in {theirs}.{site}"][..., units], narrow[f"in {ours}.{site}"]])
            target = torch.cat([wanted, wanted + beta * behind])
            module = student.get_submodule(f"{ours}.{site}")
            if module.bias is not None:
                target = target - module.bias.detach().double()
            if module.weight.shape[1] == teacher.model.get_submodule(f"{theirs}.{site}").weight.shape[1]:
                continue
            solved = _ridge(x, target, module.weight.detach(), ridge)
            module.weight.data = solved.float()
            out[f"{ours}.{site}.weight"] = solved
    return out


@pytest.mark.parametrize(
    ("kind", "cut", "beta"),
    [
        ("tiny", {"ffn": 64, "heads": 2}, 0.5),
        ("tiny", {"ffn": 64, "hidden": 84, "hidden_method": "activation", "layers": 3, "layer_repair": "none"}, 1.0),
        ("tiny", {"heads": 4}, 0.0),
        ("biased", {"ffn": 40, "heads": 3}, 0.5),
    ],
)
def test_the_streamed_weights_are_those_of_a_whole_model_pass(teacher, other_teachers, tmp_path, kind, cut, beta):
    one = teacher if kind == "tiny" else other_teachers(kind)
    cut = {**cut, **PLAIN, "stream_correction": beta, "layer_repair": "none"}
    plan = one.prune(tmp_path / "student", **cut)
    assert plan.methods.compensate == "two_stream"
    written = load_file(tmp_path / "student" / "model.safetensors")
    # the starting point: the same slices, with the same norm factor but no regression
    sliced = load_model(tmp_path / "student", dtype=torch.float32, device=CPU)
    start = SlicedStudent(Slicer(one.config, one.family, plan), one.checkpoint.tensor)
    sliced.load_state_dict({name: start.tensor(name) for name in written}, strict=False)
    one.model = load_model(one.checkpoint.path, dtype=torch.float32, device=CPU)
    expected = _whole_model(one, sliced, plan, beta, PLAIN["ridge_lambda"])
    readers = 0 if "hidden" in cut else 5
    assert len(expected) == plan.student.layers * (readers + len({"ffn", "heads"} & set(plan.cut_axes())))
    for name, weight in expected.items():
        error = (written[name] - weight).norm() / weight.norm()
        assert error < 1e-4, f"{name}: {error}"
    self_check.self_check(one.checkpoint, one.family, plan, tmp_path / "student", one.ids)


def test_the_students_stream_ends_nearer_to_the_teachers(teacher, tmp_path):
    cut = {"ffn": 48, "heads": 2}
    want = _run(load_model(teacher.checkpoint.path, dtype=torch.float32, device=CPU), teacher.batches, ["model.norm"])
    errors = {}
    for method in ("none", "ridge", "two_stream"):
        teacher.prune(tmp_path / method, **cut, compensate=method)
        student = load_model(tmp_path / method, dtype=torch.float32, device=CPU)
        got = _run(student, teacher.batches, ["model.norm"])
        errors[method] = float((got["in model.norm"] - want["in model.norm"]).norm() / want["in model.norm"].norm())
    assert errors["two_stream"] < 0.95 * errors["ridge"] < errors["none"]
