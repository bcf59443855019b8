"""LoRA adapters merged into a teacher: against sums in fp64 written out here, and (long) against peft itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kdscale.config.load import load_config
from kdscale.errors import CheckpointError, ConfigError
from kdscale.files import read_json
from kdscale.models.loading import open_teacher
from kdscale.models.lora.adapter_files import open_adapter
from kdscale.models.lora.merging import MergePlan, merge_adapters
from kdscale.pipeline.runner import run_until
from kdscale.runs.folder import RunFolder
from kdscale.runs.lineage import teacher_of_run
from kdscale.runtime.progress import Reporter
from tests.integration.prune.family_table import save_teacher

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"
EMBED, NORM = "model.embed_tokens", "model.norm.weight"
QUIET = Reporter(quiet=True)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def save_adapter(folder: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> Path:
    """As peft writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    named = {f"base_model.model.{name}": value.contiguous() for name, value in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


def low_rank(module: str, out: int, into: int, seed: int, rank: int = 4) -> dict[str, torch.Tensor]:
    return {
        f"{module}.lora_A.weight": random(rank, into, seed=seed),
        f"{module}.lora_B.weight": random(out, rank, seed=seed + 1),
    }


def product(tensors: dict[str, torch.Tensor], module: str) -> np.ndarray:
    b, a = (tensors[f"{module}.lora_{part}.weight"].double().numpy() for part in "BA")
    return np.asarray(b @ a)


def merged(teacher: Path, out: Path, *adapters: Path) -> dict[str, torch.Tensor]:
    checkpoint, family = open_teacher(teacher)
    plan = MergePlan.of(checkpoint, family, [open_adapter(folder) for folder in adapters])
    merge_adapters(plan, out, max_shard_bytes=1 << 20, journal=out.parent / "written.json")
    open_teacher(out)
    assert (out / "tokenizer.json").exists() == (teacher / "tokenizer.json").exists()
    return {name: value for file in out.glob("*.safetensors") for name, value in load_file(file).items()}


def near(got: torch.Tensor, expected: np.ndarray) -> bool:
    return bool(np.abs(got.double().numpy() - expected).max() < 1e-6)


def test_rank_alpha_patterns_and_whole_modules(tiny_llama_dir: Path, tmp_path: Path) -> None:
    before = load_file(tiny_llama_dir / "model.safetensors")
    tensors = {
        **low_rank(Q, 96, 96, seed=1), **low_rank(DOWN, 96, 128, seed=3, rank=2),
        f"{EMBED}.lora_embedding_A": random(4, 320, seed=5), f"{EMBED}.lora_embedding_B": random(96, 4, seed=6),
        NORM: random(96, seed=7),
    }  # fmt: skip
    adapter = save_adapter(
        tmp_path / "one", tensors, rank_pattern={"down_proj": 2}, alpha_pattern={"^model.layers.2.mlp.down_proj": 10}
    )
    after = merged(tiny_llama_dir, tmp_path / "out", adapter)
    assert near(after[f"{Q}.weight"], before[f"{Q}.weight"].double().numpy() + 6 / 4 * product(tensors, Q))
    assert near(after[f"{DOWN}.weight"], before[f"{DOWN}.weight"].double().numpy() + 10 / 2 * product(tensors, DOWN))
    added = tensors[f"{EMBED}.lora_embedding_B"].double() @ tensors[f"{EMBED}.lora_embedding_A"].double()
    assert near(after[f"{EMBED}.weight"], before[f"{EMBED}.weight"].double().numpy() + 1.5 * added.T.numpy())
    assert torch.equal(after[NORM], tensors[NORM])
    untouched = before.keys() - {f"{Q}.weight", f"{DOWN}.weight", f"{EMBED}.weight", NORM}
    assert len(untouched) > 20
    assert all(torch.equal(before[name], after[name]) for name in untouched)


def test_rslora_dora_and_two_adapters_in_order(tiny_llama_dir: Path, tmp_path: Path) -> None:
    before = load_file(tiny_llama_dir / "model.safetensors")[f"{Q}.weight"].double().numpy()
    first, second = low_rank(Q, 96, 96, seed=11), low_rank(Q, 96, 96, seed=13)
    magnitude = random(96, seed=15).abs() + 1
    one = save_adapter(tmp_path / "one", first, use_rslora=True)
    two = save_adapter(tmp_path / "two", {**second, f"{Q}.lora_magnitude_vector": magnitude}, use_dora=True)
    after = merged(tiny_llama_dir, tmp_path / "out", one, two)[f"{Q}.weight"]
    weight = before + 6 / np.sqrt(4) * product(first, Q) + 6 / 4 * product(second, Q)
    expected = magnitude.double().numpy()[:, None] * weight / np.linalg.norm(weight, axis=1, keepdims=True)
    assert near(after, expected)
    swapped = merged(tiny_llama_dir, tmp_path / "swapped", two, one)[f"{Q}.weight"]
    assert not near(swapped, expected)


def test_weights_that_are_stored_the_other_way_round(tmp_path: Path) -> None:
    teacher = save_teacher("gpt2", tmp_path / "teacher")
    name = "transformer.h.1.mlp.c_fc"
    before = load_file(teacher / "model.safetensors")[f"{name}.weight"]
    tensors = low_rank(name, before.shape[1], before.shape[0], seed=1)
    adapter = save_adapter(tmp_path / "one", tensors, fan_in_fan_out=True)
    after = merged(teacher, tmp_path / "out", adapter)[f"{name}.weight"]
    assert near(after, before.double().numpy() + 1.5 * product(tensors, name).T)


def test_a_killed_merge_goes_on_and_a_spoilt_adapter_is_found(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch
) -> None:
    adapter = save_adapter(tmp_path / "one", {**low_rank(Q, 96, 96, 1), **low_rank(DOWN, 96, 128, 3)})
    whole = merged(tiny_llama_dir, tmp_path / "whole" / "out", adapter)
    plain, asked = MergePlan.merged, []

    def killed(plan: MergePlan, name: str) -> torch.Tensor:
        asked.append(name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return plain(plan, name)

    monkeypatch.setattr(MergePlan, "merged", killed)
    with pytest.raises(KeyboardInterrupt):
        merged(tiny_llama_dir, tmp_path / "half" / "out", adapter)
    again = merged(tiny_llama_dir, tmp_path / "half" / "out", adapter)
    assert len(asked) == 3
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    tensors = low_rank(Q, 96, 96, 1)
    tensors[f"{Q}.lora_B.weight"][3, 1] = float("nan")
    with pytest.raises(CheckpointError, match=rf"{Q}.weight with the adapters"):
        merged(tiny_llama_dir, tmp_path / "nan" / "out", save_adapter(tmp_path / "two", tensors))


def _pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _settings(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = read_json(folder / "adapter_config.json")
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))

    return change


def _weights(tensors: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        save_adapter(folder, tensors)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, r"teacher\.adapters"),
        (_pickled, "a pickle is never opened"),
        (_settings(peft_type="IA3"), 'peft_type(.|\n)*"LORA"'),
        (_settings(use_qalora=True), "QALoRA"),
        (_settings(trainable_token_indices=[1]), "single rows"),
        (_settings(target_parameters=["experts.gate_up_proj"]), "no module's weight"),
        (_settings(init_lora_weights="pissa_niter_4"), "changes them at the start"),
        (_settings(use_dora=True), "use_dora"),
        (_settings(r=8), r"expected: 4, as its weights have"),
        (_settings(lora_alpha="x"), "a positive number"),
        (_settings(alpha_pattern={"(a+)+": 3}), "names of modules"),
        (_weights(low_rank(Q, 96, 64, 1)), r"\[96, 96\], as the teacher has"),
        (_weights(low_rank("model.layers.9.self_attn.q_proj", 96, 96, 1)), "is it an adapter of this model"),
        (_weights({f"{Q}.lora_A.weight": torch.ones(4, 96)}), "its A, B or magnitude"),
        (_weights({f"{Q}.lora_C.weight": torch.ones(4, 96)}), "lora_A and lora_B"),
        (_weights({"lm_head.weight": torch.ones(320, 96)}), "tied to model.embed_tokens.weight"),
    ],
)
def test_what_cannot_be_merged_exactly_is_refused(
    tiny_llama_dir: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    adapter = save_adapter(tmp_path / "one", low_rank(Q, 96, 96, seed=1))
    change(adapter)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        merged(tiny_llama_dir, tmp_path / "out", adapter)


def test_a_run_works_with_the_merged_teacher(tiny_config: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "one", low_rank(Q, 96, 96, seed=1))
    config = load_config(tiny_config, [f"teacher.adapters=[{adapter}]"])
    run = RunFolder(Path(config.run_dir))
    assert teacher_of_run(run, config, tiny_llama_dir) == tiny_llama_dir
    assert run_until(config, "data", QUIET)
    teacher = teacher_of_run(run, config, tiny_llama_dir)
    assert teacher != tiny_llama_dir
    weights = [load_file(folder / "model.safetensors")[f"{Q}.weight"] for folder in (teacher, tiny_llama_dir)]
    assert not torch.equal(*weights)
    assert not run_until(config, "data", QUIET)
    stamp = (run.stages / "merge.json").read_text()
    save_adapter(adapter, low_rank(Q, 96, 96, seed=2))
    assert run_until(config, "data", QUIET)
    assert (run.stages / "merge.json").read_text() != stamp
    _settings(peft_type="VERA")(adapter)
    with pytest.raises(CheckpointError, match="peft_type"):
        run_until(config, "data", QUIET)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["norm"]}])
def test_peft_merges_to_the_same(tiny_llama_dir: Path, tmp_path: Path, settings: dict[str, Any], dtype: Any) -> None:
    """bf16: peft adds a delta that it has rounded to bf16, kdscale one in fp32, so that they differ by a rounding."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    shutil.copytree(tiny_llama_dir, base)
    AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=dtype).save_pretrained(base)
    folders = []
    torch.manual_seed(3)
    for name, rank in (("one", 4), ("two", 3)):
        made = peft.LoraConfig(
            r=rank, lora_alpha=9, target_modules=["q_proj", "down_proj"], rank_pattern={"layers.1.mlp.down_proj": 2},
            alpha_pattern={"q_proj": 5}, init_lora_weights=False, **settings,
        )  # fmt: skip
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), made)
        for parameter_name, value in model.named_parameters():
            if "modules_to_save" in parameter_name:
                value.data.add_(0.25)
        model.save_pretrained(tmp_path / name)
        folders.append(tmp_path / name)
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    for folder in folders:
        reference = peft.PeftModel.from_pretrained(reference, folder).merge_and_unload()
    got = merged(base, tmp_path / "out", *folders)
    tolerance = 2e-6 if dtype == torch.float32 else 0.02
    for name, value in reference.state_dict().items():
        if name != "lm_head.weight":
            assert got[name].dtype == dtype
            assert (got[name].float() - value.float()).abs().max() <= tolerance * value.float().abs().max(), name
