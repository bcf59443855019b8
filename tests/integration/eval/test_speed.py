"""Speed and memory: each model in a process of its own, all in turn; failures carry the child's words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdscale.config.evaluation.settings import EvalConfig
from kdscale.config.evaluation.speed import SpeedConfig
from kdscale.errors import CheckpointError, ConfigError, Interrupted, MachineError
from kdscale.eval import sizes
from kdscale.eval.speed import measure as measuring
from kdscale.eval.speed import worker as child
from kdscale.eval.speed.process import worker
from kdscale.models.generation.graph import GraphDecoder, GraphRefusedError
from kdscale.models.generation.times import PlainDecoder, time_generation
from kdscale.runtime.progress import Reporter
from tests.fake_gpu.cuda import fake_gpu
from tests.integration.prune.family_table import tiny_config

QUIET = Reporter(quiet=True)


def config(**speed: Any) -> EvalConfig:
    settings: dict[str, Any] = {"batch_sizes": (1, 2), "context_lengths": (8, 16), "new_tokens": 4, "repeats": 5}
    return EvalConfig(speed=SpeedConfig(**settings | {"max_batch_size": 4, "seconds": 60.0} | speed))


def measure(models: dict[str, Path], cfg: EvalConfig) -> dict[str, dict[str, Any]]:
    return measuring.measure(models, cfg, device="cpu", threads=1, reporter=QUIET)


@dataclass
class HereWorker:
    """A worker without a process of its own, which takes seconds to start."""

    path: Path
    requests: list[dict[str, Any]]
    model: child.Measured

    def ask(self, do: str, **settings: int) -> dict[str, Any]:
        self.requests.append({"do": do, **settings})
        return json.loads(json.dumps(self.model.answer(self.requests[-1])))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The requests of all workers, which answer in this process."""
    requests: list[dict[str, Any]] = []

    @contextmanager
    def worker_here(path: Path, arguments: list[str]) -> Iterator[HereWorker]:
        yield HereWorker(path, requests, child.Measured(child.parsed(arguments[2:])))

    monkeypatch.setattr(measuring, "worker", worker_here)
    return requests


def test_models_are_measured_in_turn(tiny_llama_dir: Path) -> None:
    found = measure({"teacher": tiny_llama_dir, "pruned": tiny_llama_dir}, config())
    assert list(found) == ["teacher", "pruned"]
    for figures in found.values():
        low, high = figures["decode_tokens_per_second_range"]
        assert 0 < low <= figures["decode_tokens_per_second"] <= high
        assert figures["prefill_tokens_per_second"] > 0
        assert figures["peak_memory_bytes"] > figures["peak_memory_before_loading_bytes"] > 0
        assert (figures["batch"], figures["context"], figures["new_tokens"]) == (1, 8, 4)
        assert figures["interleaved"] is True
        cells = figures["cells"]
        assert [(cell["batch"], cell["context"]) for cell in cells] == [(1, 8), (1, 16), (2, 8), (2, 16)]
        for cell in cells:
            assert (cell["repeats"], cell["left_out"], cell["joules_per_token"]) == (5, None, None)
            for times, count in ((cell["first_token_seconds"], 5), (cell["token_seconds"], 20)):
                assert times["measurements"] == count and 0 < times["median"] <= times["p95"]
        saturation = figures["saturation"]
        steps = {step["batch"]: step["tokens_per_second"] for step in saturation["steps"]}
        assert saturation["ended_by"] in ("gain", "max_batch_size") and list(steps) == [1, 2, 4][: len(steps)]
        assert figures["saturated_tokens_per_second"] == max(steps.values()) == steps[saturation["batch"]]


@pytest.mark.usefixtures("here")
def test_the_smallest_cell_alone_is_measured_without_time(tiny_llama_dir: Path) -> None:
    (figures,) = measure({"teacher": tiny_llama_dir}, config(seconds=1e-3)).values()
    assert [cell["repeats"] for cell in figures["cells"]] == [1, 0, 0, 0]
    assert {cell["left_out"] for cell in figures["cells"][1:]} == {"eval.speed.seconds did not suffice"}
    assert figures["token_seconds_p95"] is None  # of four
    assert figures["saturation"]["ended_by"] == "seconds" and len(figures["saturation"]["steps"]) == 1


@pytest.mark.usefixtures("here")
def test_models_that_do_not_fit_together_run_one_after_another(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "_SHARE_OF_FREE_MEMORY", 0.0)
    models = {"teacher": tiny_llama_dir, "pruned": tiny_llama_dir}
    found = measure(models, config(batch_sizes=(1,), context_lengths=(4,), repeats=1, max_batch_size=None))
    assert [figures["interleaved"] for figures in found.values()] == [False, False]
    assert {figures["saturation"] for figures in found.values()} == {None}


@pytest.mark.usefixtures("here")
def test_a_packed_model_is_not_timed_and_why_is_said(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """What transformers does on a CPU is to unpack it: a speed would say nothing of the model."""
    packed = tmp_path / "int4"
    packed.mkdir()
    settings = json.loads((tiny_llama_dir / "config.json").read_text())
    (packed / "config.json").write_text(
        json.dumps(settings | {"quantization_config": {"quant_method": "compressed-tensors"}})
    )
    models = {"teacher": tiny_llama_dir, "int4": packed}
    assert list(measuring.left_out(models)) == ["int4"]
    only = config(batch_sizes=(1,), context_lengths=(4,), repeats=1, max_batch_size=None)
    assert list(measure(models, only)) == ["teacher"]


CHILD = """
import os, resource, signal, sys
sys.stdin.readline()
if "exit" in sys.argv[1]:
    print("its own words", file=sys.stderr)
    sys.exit(int(sys.argv[1].removeprefix("exit")))
number = int(sys.argv[1].removeprefix("signal"))
if number == signal.SIGINT:  # ignored by what a shell starts in the background
    signal.signal(number, signal.SIG_DFL)
os.kill(os.getpid(), number)
"""


@pytest.mark.parametrize(
    ("end", "error", "words"),
    [
        ("exit3", CheckpointError, "its own words"), ("exit2", ConfigError, "its own words"),
        ("exit1", RuntimeError, "its own words"), ("signal9", MachineError, "ended by SIGKILL"),
        ("signal11", MachineError, "SIGSEGV"), ("signal2", Interrupted, "SIGINT"),
    ],
)  # fmt: skip
def test_a_process_that_ends_early_is_an_error_of_its_kind(end: str, error: type[BaseException], words: str) -> None:
    with worker(Path("model"), ["-c", CHILD, end]) as process, pytest.raises(error, match=words) as caught:
        process.ask("load")
    assert caught.type is error


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (CheckpointError("no safetensors"), CheckpointError.exit_code, "no safetensors"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), MachineError.exit_code, "out of memory: Default"),
    ],
)
def test_a_child_leaves_with_the_code_of_its_error_and_its_message_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: int, words: str
) -> None:
    def fails() -> None:
        raise error

    monkeypatch.setattr(child, "main", fails)
    with pytest.raises(SystemExit) as left:
        child.main_of_process()
    assert left.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(words)


@pytest.fixture(scope="module")
def answers(tiny_llama_dir: Path) -> list[dict[str, Any]]:
    """What a worker answers to what fits and to what does not."""
    requests = [
        {"do": "load"},
        {"do": "generate", "batch": 10**9, "context": 1000, "new_tokens": 2},
        {"do": "grow", "batch": 10**9, "context": 1000, "new_tokens": 2},
        {"do": "generate", "batch": 2, "context": 3, "new_tokens": 2},
        {"do": "grow", "batch": 3, "context": 3, "new_tokens": 2},
    ]
    found: list[Any] = []
    child.serve([str(tiny_llama_dir), "--threads", "1"], map(json.dumps, requests), found.append)
    return found


def test_a_request_that_memory_does_not_hold_is_refused_and_the_next_is_answered(answers: list[dict[str, Any]]) -> None:
    _, generate, grow, smaller, grown = answers
    assert "GB" in generate["lacks_memory"] and "GB" in grow["lacks_memory"]
    assert len(smaller["gaps"]) == len(grown["gaps"]) == 2
    assert smaller["joules"] is None and answers[0]["no_energy_because"] == "a CPU does not tell"


@pytest.mark.usefixtures("here")
def test_a_smallest_cell_without_memory_names_the_setting(tiny_llama_dir: Path) -> None:
    with pytest.raises(MachineError, match=r"eval\.speed\.batch_sizes") as caught:
        measure({"teacher": tiny_llama_dir}, config(batch_sizes=(65_536,), context_lengths=(1 << 24,)))
    assert "65536 x 16,777,216 tokens" in str(caught.value)


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()


def test_a_decoder_over_a_fixed_cache_gives_the_same_tokens_also_the_second_time(model: Any) -> None:
    prompt_BS = torch.arange(10).view(2, 5)
    plain, fixed = PlainDecoder(model), GraphDecoder(model, 2, 12)
    for prompt in (prompt_BS, prompt_BS + 7):
        expected = [plain.first(prompt), *(plain.following() for _ in range(4))]
        assert [fixed.first(prompt), *(fixed.following() for _ in range(4))] == expected


@pytest.mark.parametrize("model_type", ["llama", "qwen3_next", "gemma4_text"])
def test_sequences_that_go_on_from_one_prompt_decode_what_they_would_alone(model_type: str) -> None:
    torch.manual_seed(2)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_config(model_type))).eval()
    prompt_1S, ids_B1 = torch.arange(5)[None], torch.tensor([[3], [9]])
    one, many = PlainDecoder(model), PlainDecoder(model)
    one.first(prompt_1S)
    many.go_on_from(one, 2, ids_B1)
    got = many.following()
    with torch.no_grad():
        expected = model(torch.cat([prompt_1S.expand(2, -1), ids_B1], 1)).logits[:, -1].argmax(-1)
    assert got == expected.tolist()


def test_a_recorded_step_waits_for_nothing(tiny_llama_dir: Path) -> None:
    """No graph can be recorded of a step that the host waits in; on a CPU that is all that can be known."""
    with fake_gpu() as gpu:
        model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, device_map={"": "cuda"}).eval()
        decoder = GraphDecoder(model, 2, 12)
        decoder.first(torch.arange(10).view(2, 5).to("cuda"))
        gpu.clear()
        with torch.inference_mode():
            decoder.step()
        assert gpu.total() == 0, str(gpu)
        times = time_generation(decoder, torch.arange(10).view(2, 5).to("cuda"), 2)
    assert len(times.gaps) == 2


def test_sliding_windows_are_refused(model: Any) -> None:
    config = type(model.config)(**model.config.to_dict())
    config.layer_types, config.sliding_window = ["sliding_attention"] * config.num_hidden_layers, 4
    with pytest.raises(GraphRefusedError, match="sliding"):
        GraphDecoder(type("M", (), {"config": config, "device": "cpu"})(), 1, 8)  # type: ignore[arg-type]
