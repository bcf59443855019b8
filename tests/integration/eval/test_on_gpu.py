"""Evaluation on a GPU, a fake one: quality, samples, sizes and timings mix no devices, and scores are a CPU's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kdscale.config.data import DataConfig, SourceConfig
from kdscale.config.evaluation.settings import EvalConfig
from kdscale.config.root import RuntimeConfig
from kdscale.data.token_store import TokenStore
from kdscale.eval import efficiency, quality
from kdscale.families import load_family
from kdscale.files import read_json
from kdscale.models.loading import load_tokenizer
from kdscale.prune.search.latency_timing import machine_name, measurer
from kdscale.runtime.device import resolve_device
from kdscale.runtime.progress import Reporter
from tests.fake_gpu.cuda import fake_gpu

SILENT = Reporter(quiet=True)


@pytest.fixture(scope="module")
def data_dir(tiny_llama_dir: Path, tiny_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts))
    data = DataConfig(sources=(SourceConfig(path=str(folder / "texts.jsonl")),), heldout_fraction=0.2)
    TokenStore.build(folder / "store", data, load_tokenizer(tiny_llama_dir), eos_id=0, reporter=SILENT)
    return folder / "store"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_models_are_scored_and_continue_prompts(temperature, tiny_llama_dir, data_dir, tmp_path):
    models = {"teacher": tiny_llama_dir, "pruned": tiny_llama_dir}
    cfg = EvalConfig(tokens=128, seq_len=32, micro_batch=2, dtype="float32", prompts=("The river",), sample_tokens=3,
                     sample_temperature=temperature, efficiency=False)  # fmt: skip

    def evaluate(device: str) -> dict[str, Any]:
        runtime = RuntimeConfig(device=device, threads=1)
        return quality.evaluate(models, data_dir, cfg, runtime, tmp_path / f"{device}.json", SILENT)

    expected = evaluate("cpu")
    with fake_gpu():
        got = evaluate("cuda")
    assert (got["settings"]["device"], got["settings"]["device_name"]) == ("cuda", "Fake GPU")
    assert got["samples"] == expected["samples"]
    for name in models:
        ours, theirs = (found["models"][name]["quality"] for found in (got, expected))
        numbers = {key for key, value in theirs.items() if isinstance(value, float)}
        assert {"ce", "perplexity"} <= numbers
        for key in numbers:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key
        assert got["models"][name]["size"] == expected["models"][name]["size"]


def test_speed_and_memory_are_measured(tiny_llama_dir, capsys):
    with fake_gpu():
        efficiency.main([str(tiny_llama_dir), "--device", "cuda", "--repeats", "1", "--prefill-tokens", "4",
                         "--decode-tokens", "2", "--threads", "1"])  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "cuda"
    assert found["decode_tokens_per_second"] > 0


def test_shapes_are_timed_for_a_latency_target(tiny_llama_dir, monkeypatch):
    monkeypatch.setattr("kdscale.prune.search.latency_timing._MIN_WEIGHT_BYTES", 1)
    config = read_json(tiny_llama_dir / "config.json")
    family = load_family(config, "config.json")
    with fake_gpu():
        device = resolve_device("cuda")
        assert "Fake GPU" in machine_name(device, torch.float32, 1, 8)
        time_shape = measurer(config, family, device=device, dtype=torch.float32, context_tokens=8)
        timing = time_shape(family.dims(config))
    assert timing.layer["decode"] > 0
