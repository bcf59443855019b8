"""Streaming scores are those of the whole model, and streaming never holds the whole model."""

from __future__ import annotations

import json
import shutil
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kdscale.config.prune import PruneConfig
from kdscale.errors import CheckpointError, DataError, SelfCheckError
from kdscale.models.loading import load_model
from kdscale.prune import self_check
from kdscale.prune.search.planning import make_plan
from kdscale.runs.importance_scores import DIRECTIONS, FINAL_COVARIANCE, ImportanceScores, load_scores, write_scores
from kdscale.weights import Checkpoint

ALL = {
    "target_params": "50%", "axes": ("ffn", "heads", "kv_heads", "hidden", "layers"),
    "layer_method": "block_influence",
}  # fmt: skip


def _whole_model_scores(teacher) -> dict[str, np.ndarray]:
    """The definitions, written out plainly with every activation of the whole model in memory (fp64)."""
    model = load_model(teacher.checkpoint.path, dtype=torch.float32, device=torch.device("cpu"))
    dims = teacher.family.dims(teacher.config)
    seen: dict[str, list[torch.Tensor]] = {}

    def keep_input(key):
        return lambda _m, args: seen.setdefault(key, []).append(args[0].double())

    def keep_output(key):
        return lambda _m, _a, out: seen.setdefault(key, []).append(out.double())

    for index, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(keep_input(f"ffn{index}"))
        layer.self_attn.o_proj.register_forward_pre_hook(keep_input(f"heads{index}"))
        layer.register_forward_pre_hook(keep_input(f"in{index}"))
        layer.register_forward_hook(keep_output(f"out{index}"))
        layer.post_attention_layernorm.register_forward_pre_hook(keep_input(f"mid{index}"))
        layer.input_layernorm.register_forward_hook(keep_output(f"norm{index}a"))
        layer.post_attention_layernorm.register_forward_hook(keep_output(f"norm{index}b"))
    model.model.norm.register_forward_hook(keep_output("norm"))
    with torch.inference_mode():
        for batch in teacher.batches:
            model(input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False)
    cat = {key: torch.cat(parts) for key, parts in seen.items()}  # [all samples, S, ·]
    minitron = lambda x: x.abs().mean(1).square().sum(0).sqrt()  # noqa: E731
    out: dict[str, list[torch.Tensor]] = {}
    for index, layer in enumerate(model.model.layers):
        x, down = cat[f"ffn{index}"], layer.mlp.down_proj.weight.detach().double()
        out.setdefault("ffn.activation", []).append(minitron(x))
        energy = [(x[..., unit, None] * down[:, unit]).square().sum() for unit in range(dims.ffn)]
        out.setdefault("ffn.output_energy", []).append(torch.stack(energy))
        x = cat[f"heads{index}"].unflatten(-1, (dims.heads, dims.head_dim))
        o = layer.self_attn.o_proj.weight.detach().double().unflatten(-1, (dims.heads, dims.head_dim))
        parts = torch.einsum("bshd,ohd->bsho", x, o)
        out.setdefault("heads.activation", []).append(minitron(x.norm(dim=-1)))
        out.setdefault("heads.output_energy", []).append(parts.square().sum((0, 1, 3)))
        groups = parts.unflatten(2, (dims.kv_heads, -1)).sum(3)
        out.setdefault("kv_heads.output_energy", []).append(groups.square().sum((0, 1, 3)))
        cosine = torch.nn.functional.cosine_similarity(cat[f"in{index}"], cat[f"out{index}"], dim=-1)
        out.setdefault("layers.block_influence", []).append(1 - cosine.mean())
    scores = {key: torch.stack(rows).numpy() for key, rows in out.items()}
    norms = [minitron(value) for key, value in cat.items() if key.startswith("norm")]
    stream = [cat[f"in{index}"] for index in range(dims.layers)] + [cat[f"mid{index}"] for index in range(dims.layers)]
    x = torch.cat([part.flatten(0, 1) for part in (*stream, cat[f"out{dims.layers - 1}"])])
    x = x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)  # the padding token embeds to zero
    energy, vectors = torch.linalg.eigh(x.T @ x)
    vectors = vectors.flip(1).T * vectors.flip(1).T.gather(1, vectors.flip(1).T.abs().argmax(1, keepdim=True)).sign()
    final = x[-(len(x) // (2 * dims.layers + 1)) :]  # what the final norm reads, which is the last of the inputs
    return scores | {
        "hidden.refit": energy.flip(0).clamp_max(energy.quantile(0.25)).numpy(),
        DIRECTIONS: vectors.numpy(),
        FINAL_COVARIANCE: (final.T @ final).numpy(),
        "hidden.activation": torch.stack(norms).sum(0).numpy(),
        "hidden.pca": energy.flip(0).numpy(),
        "hidden.rotation": vectors.numpy(),
    }


def test_streamed_scores_equal_a_whole_model_pass(teacher, tmp_path):
    scores, expected = teacher.scores(tmp_path, **ALL), _whole_model_scores(teacher)
    assert scores.keys() == expected.keys()
    for name, values in expected.items():
        # eigenvectors of neighbouring eigenvalues turn into each other at the least change
        tolerance = 2e-3 if name in ("hidden.rotation", DIRECTIONS) else 1e-5
        assert np.abs(scores[name] - values).max() < tolerance * np.abs(values).max(), name


def test_files_hold_what_the_planner_reads(teacher, tmp_path):
    scores = teacher.scores(tmp_path, **ALL)
    loaded = load_scores(tmp_path)
    assert all(np.array_equal(loaded[name], scores[name]) for name in scores)
    summary = json.loads((tmp_path / "scores.json").read_text())
    assert summary["tokens"] == 2 * 3 * 48
    assert summary["layers"][3]["layers.block_influence"] == pytest.approx(float(scores["layers.block_influence"][3]))
    first = (tmp_path / "scores.safetensors").read_bytes(), (tmp_path / "scores.json").read_bytes()
    teacher.scores(tmp_path, **ALL)
    assert first == ((tmp_path / "scores.safetensors").read_bytes(), (tmp_path / "scores.json").read_bytes())
    make_plan(teacher.config, teacher.family, loaded, PruneConfig(ffn=64, heads=4))


@pytest.mark.parametrize(
    ("cut", "names"),
    [
        ({"ffn": 64}, {"ffn.activation", "ffn.output_energy"}),
        ({"layers": 2}, {"layers.block_influence", "layers.one_by_one"}),
        ({"layers": 2, "layer_method": "block_influence"}, {"layers.block_influence"}),
        (
            {"hidden": 72},
            {"hidden.activation", "hidden.pca", "hidden.rotation", "hidden.refit", DIRECTIONS, FINAL_COVARIANCE},
        ),
    ],
)
def test_only_what_open_axes_need_is_gathered(teacher, tmp_path, cut, names):
    assert set(teacher.scores(tmp_path, **cut)) == names


def test_state_channels_share_what_the_heads_of_their_group_put_out(teacher_of, tmp_path, monkeypatch):
    """B and C are those that transformers hands to its scan, document by document, multipliers and all."""
    from transformers.models.falcon_h1 import modeling_falcon_h1 as falcon

    scan, calls = falcon.mamba2_chunk_scan, []

    def recorded(x, dt, a, b, c, **more):
        calls.append((b.double(), c.double()))
        return scan(x, dt, a, b, c, **more)

    monkeypatch.setattr(falcon, "mamba2_chunk_scan", recorded)
    teacher = teacher_of("falcon_h1")
    scores = teacher.scores(tmp_path, ssm_state=8, ssm_heads=4)
    runs = 2 * 3 * len(teacher.batches)  # two documents in each of three rows
    assert len(calls) == 3 * runs
    for layer in range(3):
        of_layer = calls[layer * runs : (layer + 1) * runs]
        b_GZ, c_GZ = (sum(call[which].square().sum((0, 1)) for call in of_layer) for which in (0, 1))
        shares_GZ = b_GZ * c_GZ / (b_GZ * c_GZ).sum(1, keepdim=True)
        heads_M, states_Z = (scores[f"{axis}.output_energy"][layer] for axis in ("ssm_heads", "ssm_state"))
        expected_Z = (torch.from_numpy(heads_M).double().view(2, 3).sum(1)[:, None] * shares_GZ).sum(0)
        torch.testing.assert_close(torch.from_numpy(states_Z).double(), expected_Z, rtol=1e-4, atol=0)


def test_what_leaves_a_mixer_is_refitted_behind_a_smaller_state(teacher_of, tmp_path):
    """From both streams alone: in the teacher's nothing that the projection reads goes."""
    teacher, logits = teacher_of("falcon_h1"), {}
    for compensate in ("teacher", "none", "two_stream"):
        if compensate != "teacher":
            plan = teacher.prune(tmp_path / compensate, ssm_state=8, compensate=compensate)
        folder = teacher.checkpoint.path if compensate == "teacher" else tmp_path / compensate
        model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
        with torch.inference_mode():
            logits[compensate] = model(input_ids=teacher.ids).logits.log_softmax(-1)
    self_check.files_equal_slices(teacher.checkpoint, teacher.family, plan, Checkpoint.open(tmp_path / "two_stream"))
    lost = {name: float((found - logits["teacher"]).square().sum()) for name, found in logits.items()}
    assert lost["two_stream"] < lost["none"]


def test_one_layer_at_a_time(teacher, tmp_path, monkeypatch):
    """Through importance and apply, tensors of at most one layer are alive whenever another one is read."""
    read, alive = Checkpoint.tensor, {}
    most = 0

    def spy(self, name):
        nonlocal most
        tensor = read(self, name)
        if ".layers." in name:
            layer = int(name.split(".")[2])
            # the module shares the tensor's memory (same dtype and device), so the storage tells whether it lives
            alive.setdefault(layer, []).append(weakref.ref(tensor.untyped_storage()))
            most = max(most, sum(any(ref() is not None for ref in refs) for refs in alive.values()))
        return tensor

    monkeypatch.setattr(Checkpoint, "tensor", spy)
    teacher.prune(tmp_path / "student", ffn=64, heads=4, layers=3)
    assert len(alive) == 4
    assert most == 1


def test_nothing_to_calibrate_on(teacher, tmp_path):
    teacher_without = object.__new__(type(teacher))
    teacher_without.__dict__ = {**teacher.__dict__, "batches": []}
    with pytest.raises(DataError, match="no calibration tokens"):
        teacher_without.scores(tmp_path, ffn=64)


def test_missing_and_damaged_scores(tmp_path):
    with pytest.raises(CheckpointError, match="kdscale importance"):
        load_scores(tmp_path)
    (tmp_path / "scores.safetensors").write_bytes(b"\x05\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(CheckpointError, match="damaged"):
        load_scores(tmp_path)
    write_scores(tmp_path, ImportanceScores({"ffn.output_energy": np.ones((2, 3), np.float32)}), {})
    assert load_scores(tmp_path).units == {"ffn.output_energy": "energy"}
    (tmp_path / "scores.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no units"):
        load_scores(tmp_path)


def test_removal_costs_come_from_the_whole_models_gram_matrices(teacher, tmp_path):
    from kdscale.prune.importance.optimal_brain_surgeon import head_removal_costs, removal_costs

    cut = {"ffn": 64, "heads": 4, "ffn_method": "obs", "head_method": "obs", "ridge_lambda": 0.03}
    scores = teacher.scores(tmp_path, **cut)
    model = load_model(teacher.checkpoint.path, dtype=torch.float32, device=torch.device("cpu"))
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith(("layers.2.mlp.down_proj", "layers.2.self_attn.o_proj")):
            module.register_forward_pre_hook(
                lambda _m, args, key=name: seen.setdefault(key[-9:], []).append(args[0].flatten(0, 1))
            )
    with torch.inference_mode():
        for batch in teacher.batches:
            model(input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False)
    layer = model.model.layers[2]
    down, o = layer.mlp.down_proj.weight.detach(), layer.self_attn.o_proj.weight.detach()
    x, z = torch.cat(seen["down_proj"]), torch.cat(seen["tn.o_proj"])
    dims = teacher.family.dims(teacher.config)
    expected = {
        "ffn.obs": removal_costs(x.T @ x, down, 0.03),
        "heads.obs": head_removal_costs(z.T @ z, o, 0.03, dims.kv_heads, dims.head_dim),
    }
    for name, values in expected.items():
        assert np.allclose(scores[name][2], values.numpy(), rtol=1e-3), name
    plan = make_plan(teacher.config, teacher.family, scores, PruneConfig(**cut))
    assert plan.methods.ffn == plan.methods.heads == "obs"
    assert plan.kept.ffn[2] == sorted(np.argsort(-scores["ffn.obs"][2], kind="stable")[:64].tolist())


@pytest.mark.parametrize("axis", ["ffn", "heads"])
def test_sums_that_cannot_be_inverted_name_the_layer_and_what_to_do(teacher, teacher_class, tmp_path, axis):
    """A teacher that overflows: no LinAlgError reaches the user."""
    shutil.copytree(teacher.checkpoint.path, tmp_path / "teacher")
    tensors = load_file(tmp_path / "teacher" / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "teacher" / "model.safetensors", metadata={"format": "pt"})
    cut = {"ffn": {"ffn": 64, "ffn_method": "obs"}, "heads": {"heads": 4, "head_method": "obs"}}[axis]
    with pytest.raises(SelfCheckError, match=rf"importance {axis}\.obs of layer 1 cannot be computed") as caught:
        teacher_class(tmp_path / "teacher").scores(tmp_path / "scores", **cut)
    assert "prune.ridge_lambda" in caught.value.hint
