"""Regression inside the experts of a mixture against its definition, computed token by token from whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kdscale.config.prune import PruneConfig
from kdscale.files import read_json
from kdscale.models.hidden_states import Scratch
from kdscale.models.loading import load_model
from kdscale.prune import self_check
from kdscale.prune.apply import apply_plan
from kdscale.prune.compensation.experts import Equations, refit_experts
from kdscale.prune.compensation.recovered_error import RecoveredErrors
from kdscale.prune.plan import Plan
from kdscale.prune.search.planning import make_plan
from kdscale.prune.slicing import Slicer
from kdscale.runtime.progress import Reporter
from tests.integration.prune.family_table import random_scores

CPU = torch.device("cpu")
RIDGE = 0.03
CUT = {"ffn": 24, "experts": 3, "hidden": 24, "hidden_method": "activation"}


def plan_of(teacher: Any, compensate: str, **cut: Any) -> tuple[Plan, PruneConfig]:
    cfg = PruneConfig(**cut, compensate=compensate, ridge_lambda=RIDGE)
    return make_plan(teacher.config, teacher.family, random_scores(teacher.config, teacher.family), cfg), cfg


def written(teacher: Any, plan: Plan, cfg: PruneConfig, out: Path, **settings: Any) -> dict[str, Tensor]:
    out.mkdir()
    silent = Reporter(quiet=True)
    apply_plan(teacher.checkpoint, teacher.family, plan, out, cfg, batches=teacher.batches, reporter=silent, **settings)
    return load_file(out / "model.safetensors")


def downs(tensors: dict[str, Tensor], position: int, expert: int) -> Tensor:
    (found,) = [
        value
        for name, value in tensors.items()
        if f"layers.{position}." in name and f"experts.{expert}." in name and ("w2" in name or "down_proj" in name)
    ]
    return found


def kept_routing(router: Any, kept: list[int], x_D: Tensor, normalise: bool) -> list[tuple[int, float]]:
    """(expert, weight) of one token, the router's softmax over the kept experts alone."""
    logits = router.weight[kept].double() @ x_D.double()
    weight, place = torch.softmax(logits, 0).topk(router.top_k)
    weight = weight / weight.sum() if normalise else weight
    return [(kept[int(p)], float(w)) for p, w in zip(place, weight, strict=True)]


def least_squares(rows: list[tuple[Tensor, Tensor]], prior_DK: Tensor) -> Tensor:
    x_nK, target_nD = (torch.stack(parts).double() for parts in zip(*rows, strict=True))
    root = (RIDGE * x_nK.square().sum(0).mean()).sqrt()
    rows_x = torch.cat([x_nK, root * torch.eye(x_nK.shape[1], dtype=torch.float64)])
    values = torch.cat([target_nD, root * prior_DK.double().T])
    return torch.linalg.lstsq(rows_x, values).solution.T


def run(model: Any, batches: list[Any]) -> list[dict[str, Tensor]]:
    """By layer: what enters and leaves the layer, its attention's output, what its experts read and put out; [N, ·]."""
    seen: list[dict[str, list[Tensor]]] = [{} for _ in model.model.layers]
    handles = []
    for found, layer in zip(seen, model.model.layers, strict=True):
        sites = {"layer": layer, "attention": layer.self_attn.o_proj, "experts": layer.mlp.experts}
        for name, module in sites.items():

            def keep(_m, args, output, name=name, found=found):
                after = output if isinstance(output, Tensor) else output[0]
                found.setdefault(f"in {name}", []).append(args[0].flatten(0, -2))
                found.setdefault(f"out {name}", []).append(after.flatten(0, -2))

            handles.append(module.register_forward_hook(keep))
    with torch.inference_mode():
        for batch in batches:
            model(input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False)
    for handle in handles:
        handle.remove()
    return [{name: torch.cat(parts) for name, parts in found.items()} for found in seen]


def units(module: Any, expert: int, x_D: Tensor) -> Tensor:
    gate_F, up_F = nn.functional.linear(x_D, module.gate_up_proj[expert]).chunk(2, dim=-1)
    return module.act_fn(gate_F) * up_F


@pytest.mark.parametrize(("model_type", "normalise"), [("mixtral", True), ("qwen3_moe", False), ("olmoe", False)])
def test_ridge_fits_each_expert_on_the_tokens_that_the_kept_ones_get(teacher_of, tmp_path, model_type, normalise):
    teacher = teacher_of(model_type)
    cut = {name: value for name, value in CUT.items() if "hidden" not in name or model_type != "olmoe"}
    plan, cfg = plan_of(teacher, "ridge", layers=2, **cut)
    recovered = RecoveredErrors(tmp_path / "repair.json")
    after = written(teacher, plan, cfg, tmp_path / "student", recovered=recovered)
    model = load_model(teacher.checkpoint.path, dtype=torch.float32, device=CPU)
    inputs, rows_D = run(model, teacher.batches), plan.kept.hidden
    with torch.no_grad():
        for position, layer in enumerate(plan.kept.layers):
            mlp, kept = model.model.layers[layer].mlp, plan.kept.experts[position]
            equations: dict[int, list[tuple[Tensor, Tensor]]] = {expert: [] for expert in kept}
            for x_D in inputs[layer]["in experts"]:
                for expert, weight in kept_routing(mlp.gate, kept, x_D, normalise):
                    a_F = weight * units(mlp.experts, expert, x_D)
                    target_D = mlp.experts.down_proj[expert][rows_D] @ a_F
                    equations[expert].append((a_F[plan.kept.ffn_of(position, expert)], target_D))
            for place, expert in enumerate(kept):
                prior = mlp.experts.down_proj[expert][rows_D][:, plan.kept.ffn_of(position, expert)]
                want = least_squares(equations[expert], prior)
                assert (want - prior).norm() > 0.1 * prior.norm()
                assert (downs(after, position, place) - want).norm() < 1e-4 * want.norm()
    self_check.self_check(teacher.checkpoint, teacher.family, plan, tmp_path / "student", teacher.ids)
    rows = [row for row in read_json(tmp_path / "repair.json")["layers"] if row["role"] == "down"]
    assert [row["layer"] for row in rows] == plan.kept.layers
    assert all(row["after"] < 0.9 * row["before"] for row in rows)
    assert {(row["experts"], row["short_of_tokens"], row["kept"], row["of"]) for row in rows} == {(3, 0, 24, 48)}


def test_two_stream_divides_the_target_among_the_kept_experts(teacher_of, tmp_path):
    """r of every token is what the kept experts' outputs, at the teacher's input, leave open of the target."""
    teacher = teacher_of("mixtral")
    plan, cfg = plan_of(teacher, "two_stream", layers=2, **CUT)
    after = written(teacher, plan, cfg, tmp_path / "student")
    plain, uncut = plan_of(teacher, "none", layers=2, **CUT)
    plain = plain.model_copy(update={"norm_scale": plan.norm_scale})
    written(teacher, plain, uncut, tmp_path / "sliced")
    model = load_model(teacher.checkpoint.path, dtype=torch.float32, device=CPU)
    student = load_model(tmp_path / "sliced", dtype=torch.float32, device=CPU)
    wide, rows_D, beta = run(model, teacher.batches), plan.kept.hidden, cfg.stream_correction
    for position, layer in enumerate(plan.kept.layers):
        theirs, kept = wide[layer], plan.kept.experts[position]
        ours = run(student, teacher.batches)[position]
        mlp, own = model.model.layers[layer].mlp, student.model.layers[position].mlp
        behind = theirs["in layer"][:, rows_D] - ours["in layer"]
        behind = behind + theirs["out attention"][:, rows_D] - ours["out attention"]
        equations: dict[int, list[tuple[Tensor, Tensor]]] = {expert: [] for expert in kept}
        with torch.no_grad():
            for token, x_D in enumerate(theirs["in experts"]):
                wanted = theirs["out experts"][token, rows_D]
                y_D = {e: mlp.experts.down_proj[e][rows_D] @ units(mlp.experts, e, x_D) for e in kept}
                in_theirs = kept_routing(mlp.gate, kept, x_D, True)
                own_D = ours["in experts"][token]
                in_ours = [(kept[p], w) for p, w in kept_routing(own.gate, list(range(3)), own_D, True)]
                for mine, routing, target in (
                    (False, in_theirs, wanted),
                    (True, in_ours, wanted + beta * behind[token]),
                ):
                    rest = target - sum(w * y_D[e] for e, w in routing)
                    for e, w in routing:
                        a_K = units(mlp.experts, e, x_D)[plan.kept.ffn_of(position, e)]
                        if mine:
                            a_K = units(own.experts, kept.index(e), own_D)
                        equations[e].append((w * a_K, w * (y_D[e] + rest)))
            for place, e in enumerate(kept):
                prior = mlp.experts.down_proj[e][rows_D][:, plan.kept.ffn_of(position, e)]
                want = least_squares(equations[e], prior)
                assert (downs(after, position, place) - want).norm() < 1e-4 * want.norm(), (position, e)
                own.experts.down_proj.data[place] = want.float()
    self_check.self_check(teacher.checkpoint, teacher.family, plan, tmp_path / "student", teacher.ids)


@pytest.mark.parametrize("compensate", ["ridge", "two_stream"])
def test_one_expert_at_a_time_and_states_on_the_disk_give_the_same_bytes(teacher_of, tmp_path, compensate):
    teacher = teacher_of("qwen3_moe")
    plan, cfg = plan_of(teacher, compensate, **CUT, heads=2)
    whole = written(teacher, plan, cfg, tmp_path / "whole")
    tight = written(teacher, plan, cfg, tmp_path / "tight", scratch=Scratch(tmp_path / "scratch", activation_bytes=1))
    assert whole.keys() == tight.keys()
    for name, value in whole.items():
        assert torch.equal(value, tight[name]), name


def test_an_expert_without_tokens_keeps_its_slice_and_is_counted(teacher_of):
    teacher = teacher_of("mixtral")
    plan, _ = plan_of(teacher, "ridge", ffn=24)
    slicer = Slicer(teacher.config, teacher.family, plan)
    model = load_model(teacher.checkpoint.path, dtype=torch.float32, device=CPU)
    experts = model.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(1)

    def sweep(group):
        for expert in group:
            if expert != 2:
                whole = torch.randn(12 if expert == 1 else 40, 48, generator=generator)
                kept = plan.kept.ffn_of(0, expert)
                yield Equations(expert, whole[:, kept], whole @ experts.down_proj[expert].T, whole)

    recovered = RecoveredErrors()
    with torch.inference_mode():
        found = refit_experts(experts, slicer, 0, sweep, RIDGE, 1 << 20, recovered)
        for expert in range(4):
            sliced = experts.down_proj[expert][:, plan.kept.ffn_of(0, expert)]
            assert torch.equal(found[f"down.{expert}"], sliced) == (expert == 2)
    (row,) = recovered.rows
    assert (row["experts"], row["short_of_tokens"]) == (4, 2)


def test_the_plan_says_which_experts_have_too_few_tokens(teacher_of, tmp_path):
    teacher = teacher_of("olmoe")
    scores = teacher.scores(tmp_path, ffn=24)
    assert scores["ffn.expert_tokens"].sum(1).tolist() == [3 * 2 * 3 * 48] * 3  # 3 of 4 experts a token
    cfg = PruneConfig(ffn=24)
    assert make_plan(teacher.config, teacher.family, scores, cfg).warnings == []
    few = {**scores, "ffn.expert_tokens": np.where(np.arange(4) == 2, 7, 500) * np.ones((3, 1))}
    (warning,) = make_plan(teacher.config, teacher.family, few, cfg).warnings
    assert "3 of 12 experts" in warning
    assert "7" in warning
    assert "24" in warning
    without = cfg.model_copy(update={"compensate": "none"})
    assert make_plan(teacher.config, teacher.family, few, without).warnings == []
