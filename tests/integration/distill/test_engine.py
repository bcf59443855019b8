"""Whole runs on a tiny model: learning, bf16, the guard, interruption, resuming, the exported student."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdscale.distill import step
from kdscale.distill import trainer as loop
from kdscale.distill.checkpoint import folder as checkpoint_folder
from kdscale.distill.objectives.token_divergence import TokenDivergence
from kdscale.distill.validate import Validator
from kdscale.errors import CheckpointError, ConfigError, Interrupted, RunFolderError, SelfCheckError, TrainingError
from kdscale.models import head, sequence_parallel
from kdscale.runs.metrics_log import read_metrics
from kdscale.runtime.exits import exit_code_of
from kdscale_kernels import backend
from kdscale_kernels.c_kernels.library import library_obstacle
from kdscale_kernels.c_kernels.steps import CompiledBf16Steps
from kdscale_kernels.fused import memory_plan, products
from kdscale_launch import STOPPED_EXIT_CODE

PURE_KD = {
    "objectives": [{"name": "token_divergence", "top_k": 32}],
    "tokens": 30 * 8 * 48,
    "global_batch": 8,
    "optimizer": {"lr": 1e-3, "warmup_steps": 5},
}


def student_bytes(run_dir):
    return {item.name: item.read_bytes() for item in sorted((run_dir / "student").iterdir())}


@pytest.fixture
def steps_in_c(monkeypatch):
    """The kernels as for a large vocabulary on a CPU with bf16 instructions; counts the gradients that C has scaled."""
    if obstacle := library_obstacle():
        pytest.skip(obstacle)
    scale, calls = CompiledBf16Steps.scale, []
    monkeypatch.setattr(CompiledBf16Steps, "scale", lambda *args: calls.append(1) or scale(*args))
    monkeypatch.setattr(products, "_cpu_has_bf16", lambda: True)
    monkeypatch.setattr(memory_plan, "CPU_WORKSPACE", 1)
    monkeypatch.setattr(backend, "C_FROM_LOGITS", 1)
    return calls


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_student_moves_towards_the_teacher(distil, tmp_path, dtype, request):
    in_c = request.getfixturevalue("steps_in_c") if dtype == "bfloat16" else None
    rows = distil(tmp_path, dtype=dtype, **PURE_KD)
    validation = [row for row in rows if row["kind"] == "validation"]
    assert validation[0]["step"] == 0
    assert validation[-1]["step"] == 30
    assert validation[-1]["kd"] < 0.85 * validation[0]["kd"]
    train = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in train] == list(range(1, 31))
    assert train[-1]["tokens"] == 30 * 8 * 48
    assert all(0 < row["teacher_mass"] <= 1 and 0 < row["tail_mass"] < 1 for row in train)
    assert all(0 <= row["top1_agree"] <= 1 for row in train)
    assert in_c is None or in_c


@pytest.mark.parametrize(("dtype", "stage"), [("bfloat16", 1), ("float32", 3)])
def test_the_student_moves_towards_the_whole_of_the_teacher(distil, tmp_path, dtype, stage):
    settings = PURE_KD | {"objectives": [{"name": "token_divergence", "targets": "full"}], "tokens": 10 * 8 * 48}
    rows = distil(tmp_path, dtype=dtype, zero_stage=stage, **settings)
    validation = [row["kd"] for row in rows if row["kind"] == "validation"]
    assert validation[-1] < 0.9 * validation[0]
    train = [row for row in rows if row["kind"] == "train"]
    assert [(row["teacher_mass"], row["tail_mass"]) for row in train] == [(1.0, 0.0)] * 10
    assert "whole vocabulary" in (tmp_path / "student" / "README.md").read_text()


def test_the_student_is_a_standard_checkpoint(distil, student_dir, tmp_path):
    distil(tmp_path, dtype="bfloat16")
    out = tmp_path / "student"
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert len(AutoTokenizer.from_pretrained(out)) == 320
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (student_dir / name).read_bytes()
    before, after = load_file(student_dir / "model.safetensors"), load_file(out / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    # from the fp32 masters: bf16 copies would have no bits below the eighth of the mantissa
    weight = after["model.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())
    assert "8" in (out / "README.md").read_text()


def test_bf16_masters_start_from_the_digits_on_disk(distil, student_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "cosine_lr", lambda *args, **kwargs: 0.0)
    distil(tmp_path, dtype="bfloat16")
    before, after = load_file(student_dir / "model.safetensors"), load_file(tmp_path / "student" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_deepspeed_that_rounds_rope_is_noticed(distil, tmp_path, monkeypatch):
    import deepspeed

    real = deepspeed.initialize

    def as_before_0_19_3(**arguments):
        for module in arguments["model"].modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.bfloat16())
        return real(**arguments)

    monkeypatch.setattr(deepspeed, "initialize", as_before_0_19_3)
    with pytest.raises(
        SelfCheckError, match=r"student: model\.model\.rotary_emb\.inv_freq(.|\n)*float32(.|\n)*bfloat16"
    ):
        distil(tmp_path, dtype="bfloat16")


def test_bf16_is_never_run_at_stage_0(distil, tmp_path):
    rows = distil(tmp_path / "zero", dtype="bfloat16", zero_stage=0)
    assert [r["loss"] for r in rows] == [r["loss"] for r in distil(tmp_path / "one", dtype="bfloat16", zero_stage=1)]


# --- the guard


def snapshot(trainer):
    """Every fp32 weight and all of Adam's state."""
    state = trainer.saver._zero_state
    return [torch.tensor(state.adam_step), *(block.clone() for block in state.blocks())]


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "float32"), (1, "float32"), (1, "bfloat16"), (2, "bfloat16"), (3, "float32")]
)
def test_a_bad_step_leaves_no_trace(distil, tmp_path, monkeypatch, stage, dtype):
    """NaN in one micro-batch's loss at step 3 (of 8): skipped, counted, nothing of student or optimiser moves."""
    calls, real_loss, real_step, same = [0], TokenDivergence.__call__, loop.Trainer._one_step, {}

    def loss(*args):
        total, terms = real_loss(*args)
        if total.requires_grad:
            calls[0] += 1
            if calls[0] == 6:  # second micro-batch of the third step
                # the value is NaN while its own gradient is finite: the guard must not rely on the backward to show it
                total = total + torch.tensor(float("nan"))
        return total, terms

    def one_step(self, number, *args):
        before = snapshot(self)
        out = real_step(self, number, *args)
        after = snapshot(self)
        same[number] = len(before) == len(after) and all(map(torch.equal, before, after))
        return out

    monkeypatch.setattr(TokenDivergence, "__call__", loss)
    monkeypatch.setattr(loop.Trainer, "_one_step", one_step)
    rows = [r for r in distil(tmp_path, zero_stage=stage, dtype=dtype) if r["kind"] == "train"]
    assert [number for number, equal in same.items() if equal] == [2]
    assert [row["skipped"] for row in rows] == [0, 0, 1, 0, 0, 0, 0, 0]
    assert rows[2]["documents"]
    assert rows[-1]["skipped_total"] == 1
    for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_run_of_bad_steps_stops_and_names_the_layer(distil, student_dir, tmp_path, stage):
    broken = tmp_path / "broken"
    shutil.copytree(student_dir, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.gate_proj.weight"][3, 5] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=r"step 3.*3 steps in a row") as caught:
        distil(tmp_path / "run", student=broken, zero_stage=stage, guard={"max_skipped_in_a_row": 3})
    assert "student's model.layers.1.mlp.gate_proj" in str(caught.value)
    assert "documents" in str(caught.value)
    assert not (tmp_path / "run" / "student").exists()


def test_a_bad_gradient_is_found_where_the_forward_is_clean(distil, tmp_path, monkeypatch):
    class Blow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return grad * float("inf")

    real = head.final_hidden
    monkeypatch.setattr(sequence_parallel, "final_hidden", lambda *args: Blow.apply(real(*args)))
    with pytest.raises(TrainingError, match=r"forward is finite; first non-finite gradient: .*model\.norm"):
        distil(tmp_path, guard={"max_skipped_in_a_row": 2})


# --- stopping and going on


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(0, "float32"), pytest.param(1, "bfloat16", marks=pytest.mark.long), (3, "bfloat16")],
)
def test_resume_gives_the_bytes_of_an_unbroken_run(distil, tmp_path, monkeypatch, stage, dtype):
    """Killed at step 5; and asked to stop in the third of step 5's four micro-batches."""
    settings = {"zero_stage": stage, "dtype": dtype, "micro_batch": 1}
    whole = distil(tmp_path / "whole", **settings)
    real, real_copy, began = loop.Trainer._one_step, step.to_device, []

    def die_at_5(self, number, *args):
        if number == 5:
            raise ZeroDivisionError
        return real(self, number, *args)

    def count_steps(self, number, *args):
        began.append(0)
        return real(self, number, *args)

    def signal_in_the_third_micro_batch(*args):
        if began:
            began[-1] += 1
            if (len(began), began[-1]) == (5, 3):
                signal.raise_signal(signal.SIGTERM)
        return real_copy(*args)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(loop.Trainer, "_one_step", die_at_5)
        distil(tmp_path / "killed", **settings)
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="after training step 4, which") as stop:
        patch.setattr(loop.Trainer, "_one_step", count_steps)
        patch.setattr(step, "to_device", signal_in_the_third_micro_batch)
        distil(tmp_path / "stopped", **settings)
    assert began[-1] == 3
    assert exit_code_of(stop.value) == STOPPED_EXIT_CODE
    newest = checkpoint_folder.sealed_checkpoints(tmp_path / "stopped" / "checkpoints")[0]
    assert checkpoint_folder.verify(newest)["step"] == 4

    def numbers(rows):
        return [{k: v for k, v in row.items() if "second" not in k and "memory" not in k} for row in rows]

    for name in ("killed", "stopped"):
        assert numbers(distil(tmp_path / name, **settings)) == numbers(whole)
        assert student_bytes(tmp_path / name) == student_bytes(tmp_path / "whole")


def test_a_validation_that_was_cut_short_is_made_up_for(distil, tmp_path, monkeypatch):
    """SIGTERM in the validation after step 4, whose checkpoint is then saved without it."""
    whole = distil(tmp_path / "whole")
    real, calls = Validator.run, []

    def run(self, engine, before_each):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(self, engine, before_each)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="after training step 4, which is saved"):
        patch.setattr(Validator, "run", run)
        distil(tmp_path / "cut")
    resumed = distil(tmp_path / "cut")
    assert [(row["kind"], row["step"], row["loss"]) for row in resumed] == [
        (row["kind"], row["step"], row["loss"]) for row in whole
    ]


def test_before_the_first_step_there_is_nothing_to_save(distil, tmp_path, monkeypatch):
    real = loop.Observer.begin

    def begin(self, number):
        signal.raise_signal(signal.SIGTERM)
        real(self, number)

    monkeypatch.setattr(loop.Observer, "begin", begin)
    with pytest.raises(Interrupted, match="before the first step") as stop:
        distil(tmp_path)
    assert exit_code_of(stop.value) == STOPPED_EXIT_CODE
    assert not checkpoint_folder.sealed_checkpoints(tmp_path / "checkpoints")


def test_75_is_never_said_of_a_checkpoint_that_could_not_be_written(distil, tmp_path, monkeypatch):
    def no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    real = loop.Trainer._one_step

    def signal_at_2(self, number, *args):
        if number == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(self, number, *args)

    monkeypatch.setattr(loop.Trainer, "_one_step", signal_at_2)
    monkeypatch.setattr(checkpoint_folder, "seal", no_room)
    with pytest.raises(RunFolderError):
        distil(tmp_path)


def test_killed_anywhere_it_ends_with_the_same_bytes(spawn, distil, make_config, tmp_path):
    settings = {"dtype": "bfloat16"}
    distil(tmp_path / "whole", **settings)
    for die in (("seal", 6), ("export", 0), None):  # in a step: test_run_end_to_end.py
        process = spawn(make_config(**settings), tmp_path / "cut", die)
        _, said = process.communicate(timeout=100)
        assert process.returncode == (77 if die else 0), said
        assert (tmp_path / "cut" / "student").exists() == (die is None)
    assert student_bytes(tmp_path / "whole") == student_bytes(tmp_path / "cut")
    assert not list((tmp_path / "cut").rglob(".partial-*"))


@pytest.mark.long  # test_run_end_to_end.py stops a whole run
def test_sigterm_saves_and_leaves(spawn, make_config, tmp_path):
    process = spawn(make_config(tokens=4 * 48 * 100_000, checkpoint_every=100_000, validate_every=100_000), tmp_path)
    log = tmp_path / "logs" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while sum(row["kind"] == "train" for row in read_metrics(log)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "SIGTERM" in said
    saved = checkpoint_folder.sealed_checkpoints(tmp_path / "checkpoints")
    assert len(saved) == 1
    last = [row["step"] for row in read_metrics(log) if row["kind"] == "train"][-1]
    assert checkpoint_folder.verify(saved[0])["step"] == last


def test_ctrl_c_drops_the_step(distil, tmp_path, monkeypatch):
    real = step.train_step
    calls = [0]

    def interrupt(*args):
        calls[0] += 1
        if calls[0] == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with monkeypatch.context() as patch, pytest.raises(Interrupted, match="after training step 2") as caught:
            patch.setattr(loop, "train_step", interrupt)
            distil(tmp_path / "cut")
        assert caught.value.exit_code == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_torn_newest_checkpoint_is_passed_over(distil, tmp_path):
    distil(tmp_path)
    expected = student_bytes(tmp_path)
    newest = checkpoint_folder.sealed_checkpoints(tmp_path / "checkpoints")[0]
    victim = newest / checkpoint_folder.rank_file(0)
    victim.write_bytes(victim.read_bytes()[:-100])
    shutil.rmtree(tmp_path / "student")
    rows = distil(tmp_path)
    assert student_bytes(tmp_path) == expected
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 9))


def test_a_checkpoint_of_other_settings_is_refused(distil, tmp_path):
    distil(tmp_path)
    with pytest.raises(RunFolderError, match=r"optimizer\.lr: 0\.003 → 0\.001"):
        distil(tmp_path, optimizer={"lr": 1e-3, "warmup_steps": 2, "weight_decay": 0.1})


# --- refusals before any work


def test_a_wrong_number_of_processes_is_refused(distil, tmp_path):
    with pytest.raises(ConfigError, match=r"distill\.processes"):
        distil(tmp_path, processes=2, micro_batch=1)


def test_a_student_of_another_tokenizer_is_refused(distil, student_dir, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(student_dir, other)
    text = json.loads((other / "tokenizer.json").read_text())
    first, second = list(text["model"]["vocab"])[300:302]
    vocab = text["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match="tokenizer"):
        distil(tmp_path / "run", student=other)
