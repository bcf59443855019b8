"""Writing on a server that does what vLLM documents: it reads the weights that it is told of, and draws from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdscale.distill.trainer import Trainer
from kdscale.errors import ConfigError, ServiceError
from kdscale.models.generation.drawing import Drawing, draw_answers
from kdscale.models.loading import load_model
from tests.fake_endpoint import FakeEndpoint, Fault, serving

TOKENS = 2 * 4 * 48


class FakeVllm:
    """Its state: the folders that it was told to read, the model in it, what it was asked."""

    def __init__(self) -> None:
        self.folders: list[Path] = []
        self.files: list[dict[str, torch.Tensor]] = []
        self.told: list[str] = []
        self.without: str = ""  # a field that is missing in its answers
        self._model: Any = None

    def control(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.told.append(path)
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            folder = Path(body["kwargs"]["weights_path"])
            self.folders.append(folder)
            self.files.append(load_file(folder / "model.safetensors"))
            self._model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
        return {"results": [None]}

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["return_token_ids"] and body["logprobs"] == 0 and body["model"] == "student"
        uniforms = torch.rand(1, body["max_tokens"], generator=torch.Generator().manual_seed(body["seed"])).double()
        drawing = Drawing(body["max_tokens"], body["temperature"], body["top_p"], 320, (0,), 0)
        (drawn,) = draw_answers(self._model, [body["prompt"]], uniforms, drawing)
        choice = {
            "index": 0, "text": "", "finish_reason": "stop" if drawn.ended else "length", "token_ids": drawn.ids,
            "logprobs": {"token_logprobs": drawn.logprobs, "tokens": [], "top_logprobs": None, "text_offset": []},
        }  # fmt: skip
        return {"choices": [{key: value for key, value in choice.items() if key != self.without}]}


@pytest.fixture
def vllm() -> Iterator[tuple[FakeVllm, FakeEndpoint]]:
    server = FakeVllm()
    with serving(FakeEndpoint(complete=server.complete, control=server.control)) as endpoint:
        yield server, endpoint


def settings(url: str, **more: Any) -> dict[str, Any]:
    own = {
        "share": 1.0, "every": 1, "prompt_tokens": 8, "max_new_tokens": 6, "validate_prompts": 0, "writer": "vllm",
        "vllm": {"endpoint": {"base_url": url, "model": "student"}, "retries": 1, **more},
        "objectives": [{"name": "policy_gradient"}],
    }  # fmt: skip
    return {"tokens": TOKENS, "on_policy": own, "optimizer": {"lr": 3e-3, "warmup_steps": 0}}


def test_a_server_writes_with_the_students_weights_of_the_moment(
    distil: Callable[..., Any], vllm: tuple[FakeVllm, FakeEndpoint], student_dir: Path, tmp_path: Path
) -> None:
    server, endpoint = vllm
    endpoint.faults = [Fault(), Fault(), Fault(503, b"{}")]  # the weights are read; the first completion is not given
    rows = distil(tmp_path / "run", **settings(endpoint.url))
    assert server.told == ["/collective_rpc", "/reset_prefix_cache"] * 2
    pruned, first, second = load_file(student_dir / "model.safetensors"), *server.files
    assert all(torch.equal(first[name], pruned[name]) for name in pruned)
    assert not all(torch.equal(second[name], pruned[name]) for name in pruned)
    assert [folder.exists() for folder in server.folders] == [False, True]  # no more than the last is kept
    lines = (tmp_path / "run" / "on-policy" / "rank-0.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in lines]
    assert len(written) == 2 * 4 * 3 and all(1 <= record["answer_tokens"] <= 6 for record in written)
    train = [row for row in rows if row["kind"] == "train"]
    assert train[0]["on_policy_ratio"] == pytest.approx(1.0, abs=1e-4)  # the weights that wrote are those that learn
    assert train[0]["on_policy_reverse_kl"] > 0 and "kd" not in train[0]


def test_what_was_written_is_asked_for_once(
    distil: Callable[..., Any], vllm: tuple[FakeVllm, FakeEndpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, endpoint = vllm

    def killed(*_: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_one_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            distil(tmp_path / "run", **settings(endpoint.url))
    asked = len(endpoint.asked)
    distil(tmp_path / "run", **settings(endpoint.url))
    assert len(endpoint.asked) == asked + 2 + 4 * 3  # the second step alone: weights, cache and twelve prompts


def test_servers_that_cannot_write_are_named(
    distil: Callable[..., Any], vllm: tuple[FakeVllm, FakeEndpoint], tmp_path: Path
) -> None:
    server, endpoint = vllm
    endpoint.faults = [Fault(404, b"{}")]
    with pytest.raises(ConfigError, match="VLLM_SERVER_DEV_MODE=1"):
        distil(tmp_path / "a", **settings(endpoint.url))
    endpoint.faults = [Fault(401, b"no key")]
    with pytest.raises(ConfigError, match="key that the server accepts"):
        distil(tmp_path / "b", **settings(endpoint.url))
    server.without = "token_ids"
    with pytest.raises(ServiceError, match=r"(?s)token_ids, as vLLM gives them.*0\.10\.2"):
        distil(tmp_path / "c", **settings(endpoint.url))
