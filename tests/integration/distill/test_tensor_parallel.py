"""Ranks that share layers: the run of one process, whatever shares what; checkpoints go from one to any other."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

from kdscale.distill.checkpoint import folder as checkpoint_folder
from kdscale.distill.parallel.checks import check_tensor_parallel
from kdscale.errors import ConfigError
from kdscale.runs.metrics_log import read_metrics
from tests.integration.prune.family_table import save_teacher

# the families whose layers ranks can share
FAMILIES = ("gemma2", "gemma3_text", "granite", "llama", "mistral", "qwen2", "qwen3", "smollm3")
VOCAB, HIDDEN = 320, 96
WHERE = {"gradient_checkpointing": "selective", "teacher_placement": "partitioned", "async_checkpoints": True}
OFFLOADED = {"zero": {"offload_optimizer": "cpu"}, "teacher_placement": "offloaded"}
# name → phases of (ranks, of which so many share layers, ZeRO stage, killed when it begins this step, other settings)
RUNS = {
    "one": [(1, 1, 1, None, {})],
    "data and tensor": [(4, 2, 2, None, WHERE)],
    "there and back": [(2, 2, 0, 2, {}), (1, 1, 2, 3, {}), (4, 2, 3, None, OFFLOADED)],
}
UNTIED = {
    "one, untied": [(1, 1, 1, None, {})],
    "two, untied": [(2, 2, 1, None, {})],
    "two, untied, killed": [(2, 2, 1, 3, {}), (2, 2, 1, None, {})],
}
# one step that changes next to nothing
STILL = {"dtype": "bfloat16", "tokens": 4 * 48, "optimizer": {"lr": 1e-8, "min_lr": 0.0}}
BF16 = {"bf16": [(2, 2, 1, None, STILL)]}
# sizes that two ranks do not divide
UNEVEN = {
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "hidden_size": 36, "intermediate_size": 47,
    "vocab_size": 63,
}  # fmt: skip
SETTINGS = {
    "tokens": 5 * 4 * 48, "micro_batch": 1, "checkpoint_every": 1, "keep_checkpoints": 8, "validate_every": 5,
    "optimizer": {"lr": 3e-3, "warmup_steps": 2, "weight_decay": 0.1, "gradient_clipping": 0.5},
}  # fmt: skip


@pytest.fixture(scope="module")
def untied_dir(student_dir, tmp_path_factory):
    """The student with a head of its own."""
    folder = tmp_path_factory.mktemp("untied")
    for file in student_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_llama_dir, student_dir, untied_dir, data_dir, make_config, run_parallel):
    """The folder of all runs and of what the models' ranks found, made by one process that forks the ranks."""
    folder = tmp_path_factory.mktemp("tensor")
    models = {name: str(save_teacher(name, folder / name)) for name in FAMILIES}
    models["uneven"] = str(save_teacher("llama", folder / "uneven", **UNEVEN))
    places = {"teacher_dir": str(tiny_llama_dir), "data_dir": str(data_dir)}
    runs = []
    for name, phases in {**RUNS, **UNTIED, **BF16}.items():
        listed = []
        for ranks, tensor, stage, until, more in phases:
            config = make_config(processes=ranks, tensor_parallel=tensor, zero_stage=stage, **{**SETTINGS, **more})
            listed.append({"config": config.resolved(), "until": until})
        student = untied_dir if name in UNTIED else student_dir
        runs.append({"run_dir": str(folder / name), "student_dir": str(student), "phases": listed, **places})
    run_parallel(folder, runs, models)
    return folder


def rows_of(run_dir, kind="train"):
    return [row for row in read_metrics(run_dir / "logs" / "metrics.jsonl") if row["kind"] == kind]


def seen(run_dir, phase, rank):
    return json.loads((run_dir / f"seen-{phase}-{rank}.json").read_text())


@pytest.mark.parametrize("name", [name for name in (*RUNS, *UNTIED) if not name.startswith("one")])
def test_ranks_that_share_layers_train_what_one_process_trains(done, name):
    alone = done / ("one, untied" if name in UNTIED else "one")
    rows, expected = rows_of(done / name), rows_of(alone)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert min(row["grad_norm"] for row in expected) > 0.5  # or clipping would not be seen
    for key, tolerance in (("loss", 1e-5), ("kd", 1e-5), ("grad_norm", 1e-4)):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in expected], abs=tolerance)
    assert [row["labels"] for row in rows] == [row["labels"] for row in expected]
    for row, other in zip(rows_of(done / name, "validation"), rows_of(alone, "validation"), strict=True):
        assert row["labels"] == other["labels"]
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
    got, want = (load_file(run / "student/model.safetensors") for run in (done / name, alone))
    assert got.keys() == want.keys()
    assert max(float((got[key] - want[key]).abs().max()) for key in want) < 1e-4


def test_ranks_that_share_layers_take_the_same_batch_and_the_others_one_of_another_size(done):
    first, second, third, fourth = (seen(done / "data and tensor", 0, rank)["labels"] for rank in range(4))
    assert first == second
    assert third == fourth
    assert first != third


def test_no_rank_has_logits_or_a_gradient_of_the_whole_vocabulary(done):
    def whole(shapes):
        return [shape for shape in shapes if VOCAB in shape]

    assert whole(seen(done / "one", 0, 0)["shapes"])  # such shapes would be seen
    for name in ("there and back", "two, untied"):
        for rank in range(2):
            shapes = seen(done / name, 0, rank)["shapes"]
            assert [VOCAB // 2, HIDDEN] in shapes
            assert not whole(shapes)


def test_a_killed_run_goes_on_to_the_same_bytes(done):
    left, right = (done / name / "student" / "model.safetensors" for name in ("two, untied", "two, untied, killed"))
    assert left.read_bytes() == right.read_bytes()


def test_masters_of_parts_have_the_digits_that_bf16_rounds_away(done, student_dir):
    (row,) = rows_of(done / "bf16")
    first = rows_of(done / "one")[0]
    assert row["loss"] == pytest.approx(first["loss"], abs=2e-2)
    assert row["grad_norm"] == pytest.approx(first["grad_norm"], rel=2e-2)  # each part counts once, the copies too
    got, want = (load_file(folder / "model.safetensors") for folder in (done / "bf16" / "student", student_dir))
    assert max(float((got[key] - want[key]).abs().max()) for key in want) < 1e-7


def test_each_rank_writes_its_parts_and_the_first_what_all_have(done):
    path = checkpoint_folder.step_dir(done / "two, untied" / "checkpoints", 1)
    first, second = (load_file(path / checkpoint_folder.rank_file(rank)) for rank in range(2))
    assert "master:0:model.layers.0.mlp.down_proj.weight@1:0:64" in first
    assert "master:0:model.layers.0.mlp.down_proj.weight@1:64:128" in second
    assert "master:0:model.norm.weight" in first
    assert not any("norm" in name for name in second)


@pytest.mark.parametrize("name", [*FAMILIES, "uneven"])
def test_a_shared_model_has_the_loss_gradients_and_targets_of_the_whole_one(done, name):
    for rank in range(2):
        found = json.loads((done / f"found-{rank}.json").read_text())[name]
        alone, shared = found["loss"]
        assert shared == pytest.approx(alone, rel=1e-5)
        assert {key: error for key, error in found["errors"].items() if error > 1e-4} == {}
        assert max(found["targets"], found["lse"]) < 1e-4
        assert all("norm" in key or key.endswith(("o_proj.bias", "down_proj.bias")) for key in found["whole"])


def test_ranks_need_not_divide_heads_units_or_vocabulary(done):
    held = [json.loads((done / f"found-{rank}.json").read_text())["uneven"]["held"] for rank in range(2)]
    layer = "model.layers.0."
    for name, shapes in (
        (f"{layer}self_attn.q_proj.weight", [[32, 36], [16, 36]]),
        (f"{layer}self_attn.o_proj.weight", [[36, 32], [36, 16]]),
        (f"{layer}mlp.down_proj.weight", [[36, 24], [36, 23]]),
        ("model.embed_tokens.weight", [[32, 36], [31, 36]]),
    ):
        assert [shapes_of[name] for shapes_of in held] == shapes


def test_other_families_and_too_many_ranks_are_refused_by_name(tmp_path, tiny_llama_dir):
    other = save_teacher("gpt_neox", tmp_path / "neox")
    with pytest.raises(ConfigError, match=r"(?s)a teacher with separate q, .*query_key_value.*gpt_neox"):
        check_tensor_parallel(2, {"teacher": other})
    with pytest.raises(ConfigError, match=r"(?s)at most the student's kv_heads, 2.*got: +3"):
        check_tensor_parallel(3, {"student": tiny_llama_dir})
    check_tensor_parallel(1, {"teacher": other})
