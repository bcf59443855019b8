"""Evaluation on a GPU, a fake one: quality, samples, sizes and timings mix no devices, and scores are a CPU's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdscale.config.data import DataConfig, SourceConfig
from kdscale.config.evaluation.settings import EvalConfig
from kdscale.config.root import RuntimeConfig
from kdscale.data.token_store import TokenStore
from kdscale.eval import quality
from kdscale.eval.speed.worker import serve
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


@pytest.mark.parametrize("energy", [True, False])
def test_speed_memory_and_energy_are_measured(tiny_llama_dir, monkeypatch, energy):
    counted = iter(range(1000, 9000, 1000))  # millijoules, one more joule at each reading
    names = ("nvmlInit", "nvmlDeviceGetHandleByUUID")
    nvml = SimpleNamespace(NVMLError=OSError, **dict.fromkeys(names, lambda *_: None))
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda _: next(counted)
    monkeypatch.setitem(sys.modules, "pynvml", nvml if energy else None)
    found: list[dict[str, Any]] = []
    sizes = {"batch": 2, "context": 4, "new_tokens": 3}
    requests = [{"do": "load"}, {"do": "generate", **sizes}, {"do": "grow", **sizes}]
    with fake_gpu():
        serve([str(tiny_llama_dir), "--device", "cuda", "--threads", "1"], map(json.dumps, requests), found.append)
    loaded, generated, grown = found
    assert loaded["device"] == "cuda"
    assert (loaded["no_energy_because"] is None) == energy
    assert generated["joules"] == grown["joules"] == (1.0 if energy else None)
    assert len(generated["gaps"]) == len(grown["gaps"]) == 3


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
