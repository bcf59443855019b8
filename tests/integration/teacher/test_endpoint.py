"""A server that scores text as vLLM does: the targets of a teacher in this process, and what a bad server costs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdscale.config.distill.targets import Needs
from kdscale.config.endpoint import EndpointConfig
from kdscale.config.load import build_config
from kdscale.errors import ConfigError, KdscaleError, LostRankError, ServiceError
from kdscale.models.documents import Documents
from kdscale.models.loading import load_model
from kdscale.models.sequence_parallel import SequenceSlice
from kdscale.teacher import services
from kdscale.teacher.endpoint import EndpointTeacher, open_endpoint
from kdscale.teacher.online import OnlineTeacher
from kdscale.teacher.placement.placed import ReplicatedTeacher
from kdscale.teacher.source import MicroBatch, SourceRequest
from tests.fake_endpoint import FakeEndpoint, Fault, scores_of, serving

VOCAB, TOP_K = 320, 5
TOP = Needs(top_k=TOP_K)


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> Any:
    return load_model(tiny_llama_dir, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def served(tiny_llama_dir: Path) -> Any:
    """The same model as the server has it, with transformers' own attention."""
    return load_model(tiny_llama_dir, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture
def server(served: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEndpoint]:
    monkeypatch.setattr(services, "_FIRST_PAUSE", 0.01)

    with serving(FakeEndpoint(score=scores_of(served))) as running:
        yield running


@pytest.fixture
def teacher(server: FakeEndpoint) -> Iterator[Callable[..., EndpointTeacher]]:
    opened = []

    def make(gives: Needs = TOP, timeout: float = 20.0, **settings: Any) -> EndpointTeacher:
        config = EndpointConfig(base_url=server.url, model="tiny", timeout=timeout, **settings)
        opened.append(EndpointTeacher(config, gives, vocab_size=VOCAB))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def packed() -> MicroBatch:
    """Two windows of three and two documents; the last document's label lies beyond its window, one has no labels."""
    made = torch.Generator().manual_seed(3)
    ids_BS = torch.randint(0, VOCAB, (2, 12), generator=made)
    lengths = [[5, 4, 3], [2, 10]]
    positions_BS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    rows_N = torch.tensor([0, 1, 2, 3, 6, 7, 9, 10, 11, 14, 16, 20, 23])
    return MicroBatch(ids_BS, positions_BS, rows_N, torch.randint(0, VOCAB, (len(rows_N),), generator=made))


def in_process(model: Any, batch: MicroBatch, temperature: float = 1.0) -> Any:
    SequenceSlice().prepare(model)
    gives = Needs(top_k=TOP_K, temperature=temperature)
    return OnlineTeacher(ReplicatedTeacher(model, VOCAB), gives, vocab_size=VOCAB).targets(batch).top_k


@pytest.mark.parametrize("ahead", [False, True])
def test_its_targets_are_those_of_the_teacher_in_this_process(
    teacher: Callable[..., EndpointTeacher], model: Any, server: FakeEndpoint, ahead: bool
) -> None:
    source, batch = teacher(), packed()
    if ahead:
        source.prefetch(batch)
    got, expected = source.targets(batch).top_k, in_process(model, batch)
    assert got is not None
    assert torch.equal(got.ids_NK, expected.ids_NK)
    logp_NK = expected.logits_NK - expected.lse_N[:, None]
    torch.testing.assert_close(got.logits_NK - got.lse_N[:, None], logp_NK, atol=2e-5, rtol=0)
    assert len(server.asked) == 1
    assert len(server.asked[0][2]["prompt"]) == 4  # the document without labels is not asked about


@pytest.mark.parametrize("top_k", [0, TOP_K])
def test_it_tells_the_probability_of_the_texts_own_tokens(
    teacher: Callable[..., EndpointTeacher], model: Any, server: FakeEndpoint, top_k: int
) -> None:
    """As the teacher in this process does, and as the logits say; with the top K or alone."""
    gives, batch = Needs(top_k=top_k, label=True), packed()
    follows = torch.isin(batch.rows_N + 1, (batch.position_ids_BS.flatten() > 0).nonzero())  # in the same document
    following_N = batch.input_ids_BS.flatten()[(batch.rows_N + 1).clamp(max=23)]
    batch = replace(batch, labels_N=torch.where(follows, following_N, batch.labels_N))
    got = teacher(gives).targets(batch)
    SequenceSlice().prepare(model)
    own = OnlineTeacher(ReplicatedTeacher(model, VOCAB), gives, vocab_size=VOCAB).targets(batch)
    logp_BSV = model(batch.input_ids_BS, position_ids=batch.position_ids_BS, documents=Documents.of(
        batch.position_ids_BS
    )).logits.log_softmax(-1)  # fmt: skip
    expected = logp_BSV.flatten(0, 1)[batch.rows_N].gather(1, batch.labels_N[:, None])[:, 0]
    for targets in (got, own):
        assert targets.label is not None and (targets.top_k is not None) == (top_k > 0)
        torch.testing.assert_close(targets.label.logprobs_N, expected.detach(), atol=2e-5, rtol=0)


def test_at_another_temperature_the_top_k_alone_are_scaled(teacher: Callable[..., EndpointTeacher], model: Any) -> None:
    source, batch = teacher(Needs(top_k=TOP_K, temperature=2.0, mass=False)), packed()
    got, expected = source.targets(batch).top_k, in_process(model, batch, 2.0)
    assert got is not None
    scaled_NK = (expected.logits_NK / 2.0).softmax(1)
    torch.testing.assert_close((got.logits_NK / 2.0 - got.lse_N[:, None]).exp(), scaled_NK, atol=2e-6, rtol=0)


def test_a_batch_without_labels_asks_nobody(teacher: Callable[..., EndpointTeacher], server: FakeEndpoint) -> None:
    none = MicroBatch(torch.ones(1, 4, dtype=torch.long), torch.arange(4)[None], *[torch.empty(0).long()] * 2)
    source = teacher()
    source.prefetch(none)
    top_k = source.targets(none).top_k
    assert top_k is not None and top_k.ids_NK.shape == (0, TOP_K)
    assert server.asked == []


@pytest.mark.parametrize(
    "fault",
    [
        Fault(500),
        Fault(429, headers={"retry-after": "1"}),
        Fault(503, b"loading"),
        Fault(cut=20),
        Fault(headers={"content-encoding": "gzip"}),
    ],
)
def test_what_passes_is_asked_again(
    teacher: Callable[..., EndpointTeacher], server: FakeEndpoint, fault: Fault
) -> None:
    server.faults = [fault, fault]
    assert teacher().targets(packed()).rows == 13
    assert len(server.asked) == 3


def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[FakeEndpoint], bytes]:
    """The right answer, changed; an object that `change` returns takes its place."""

    def body(server: FakeEndpoint) -> bytes:
        good = server.right_answer("/v1/completions", {"prompt": [[1, 2, 3]], "prompt_logprobs": TOP_K})
        other = change(good)
        return json.dumps(other if isinstance(other, dict) else good).encode()

    return body


def entry(answer: dict[str, Any]) -> dict[str, Any]:
    return dict(answer["choices"][0]["prompt_logprobs"][1])


def put(answer: dict[str, Any], value: Any) -> None:
    answer["choices"][0]["prompt_logprobs"][1] = value


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda _: b'{"choices": [', "JSON object"),
        (lambda _: b"[]", "an object"),
        (lambda _: b"\xff\xfe", "JSON object"),
        (changed(lambda answer: answer["choices"].append(answer["choices"][0])), "choices 0 to 0"),
        (changed(lambda answer: answer["choices"].clear()), "choices 0 to 0"),
        (changed(lambda answer: answer["choices"][0].pop("prompt_logprobs")), "as vLLM gives them"),
        (changed(lambda answer: answer["choices"][0]["prompt_logprobs"].append(None)), "3 entries"),
        (changed(lambda answer: put(answer, None)), "token ids with their logprob"),
        (changed(lambda answer: put(answer, {"1": {"logprob": -1.0}})), "the 5 most likely"),
        (changed(lambda answer: put(answer, {**entry(answer), str(VOCAB): {"logprob": -0.001}})), "below 320"),
        (changed(lambda answer: put(answer, {**entry(answer), "7": {"logprob": float("nan")}})), "log-probabilities"),
        (changed(lambda answer: put(answer, {key: {"logprob": -0.1} for key in "12345"})), "sum to 4.524"),
        (changed(lambda answer: put(answer, {**entry(answer), "7": {"logprob": 3.0}})), "log-probabilities"),
        (changed(lambda answer: {"padding": "x" * 3_000_000}), "too large"),
    ],
)
def test_an_answer_that_is_not_one_is_an_error_of_the_service(
    teacher: Callable[..., EndpointTeacher], server: FakeEndpoint, body: Callable[[Any], bytes], message: str
) -> None:
    server.faults = [Fault(body=body(server))]
    batch = MicroBatch(torch.tensor([[1, 2]]), torch.tensor([[0, 1]]), torch.tensor([0, 1]), torch.tensor([2, 3]))
    with pytest.raises(ServiceError, match=message):
        teacher().targets(batch)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (Fault(400, b"prompt logprobs of 5 above max_logprobs 2"), ServiceError, "--max-logprobs"),
        (Fault(401, b"the key sekrit-key is wrong"), ConfigError, r"the key \*\*\* is wrong"),
        (Fault(307, headers={"location": "http://elsewhere/v1"}), ConfigError, "redirect to http://elsewhere"),
    ],
)
def test_a_refusal_ends_the_training_at_once_with_the_servers_words(
    teacher: Callable[..., EndpointTeacher], server: FakeEndpoint, monkeypatch: pytest.MonkeyPatch,
    fault: Fault, error: type[KdscaleError], message: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("ENDPOINT_KEY", "sekrit-key")
    server.faults = [fault]
    with pytest.raises(error, match=message):
        teacher(key_variable="ENDPOINT_KEY").targets(packed())
    assert [headers["authorization"] for _, headers, _ in server.asked] == ["Bearer sekrit-key"]


def test_a_server_that_fails_on_is_a_lost_rank_whose_error_hides_the_key(
    teacher: Callable[..., EndpointTeacher], server: FakeEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENDPOINT_KEY", "sekrit-key")
    server.faults = [Fault(500, b"sekrit-key: no memory")] * 999
    with pytest.raises(LostRankError, match=r"500 \*\*\*: no memory"):
        teacher(timeout=0.05, key_variable="ENDPOINT_KEY").targets(packed())


def test_a_server_that_hangs_is_a_lost_rank(teacher: Callable[..., EndpointTeacher], server: FakeEndpoint) -> None:
    server.faults = [Fault(hang=60.0)] * 9
    with pytest.raises(LostRankError, match=r"distill\.endpoint\.timeout"):
        teacher(timeout=0.2).targets(packed())


def request(server: FakeEndpoint, teacher_dir: Path, **endpoint: Any) -> SourceRequest:
    config = build_config(
        {
            "name": "t", "run_dir": "r", "teacher": {"path": "t"}, "prune": {"ffn": 8},
            "distill": {
                "teacher_placement": "endpoint",
                "endpoint": {"base_url": server.url, "model": "tiny", **endpoint},
            },
        },
        "test",
    )  # fmt: skip
    cpu = torch.device("cpu")
    return SourceRequest(
        config, Needs(top_k=TOP_K), teacher_dir, Path("r"), torch.float32, cpu, SequenceSlice(), load_split=None,
        student_dir=teacher_dir, tags=(),
    )  # fmt: skip


def test_before_any_training_the_server_scores_a_text_in_the_runs_own_tokens(
    server: FakeEndpoint, tiny_llama_dir: Path
) -> None:
    opened = open_endpoint(request(server, tiny_llama_dir))
    assert opened.rows == VOCAB
    opened.start(VOCAB).close()
    honest = server.score
    assert honest is not None

    def with_other_tokens(prompts: list[list[int]], top_k: int) -> list[Any]:
        scored = honest(prompts, top_k)
        for row in scored[0][1:]:
            for value in row.values():
                value["decoded_token"] = "zebra"
        return scored

    server.score = with_other_tokens
    with pytest.raises(ConfigError, match="tokenizer"):
        opened.start(VOCAB)
    server.faults = [Fault(503)] * 99
    with pytest.raises(ConfigError, match=r"base_url"):
        open_endpoint(request(server, tiny_llama_dir, timeout=0.05)).start(VOCAB)


@pytest.mark.parametrize(
    ("endpoint", "objective", "message"),
    [
        ({}, {}, "endpoint.base_url and endpoint.model"),
        ({"base_url": "http://10.0.0.1/v1", "model": "m"}, {}, "allow_http"),
        ({"base_url": "ftp://h/v1", "model": "m"}, {}, "https://HOST/v1"),
        ({"base_url": "https://[::1/v1", "model": "m"}, {}, "https://HOST/v1"),
        ({"base_url": "https://h/v1?x=1", "model": "m"}, {}, "https://HOST/v1"),
        ({"base_url": "https://u:pass@h/v1", "model": "m"}, {}, r"(?s)\A(?!.*pass@).*no user, password or token"),
        ({"base_url": "https://h/v1", "model": "m", "key_variable": "sk-123"}, {}, "key_variable"),
        ({"base_url": "https://h/v1", "model": "m"}, {"temperature": 2.0}, "tail: renormalised"),
        ({"base_url": "https://h/v1", "model": "m"}, {"targets": "full"}, "whole vocabulary"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    endpoint: dict[str, Any], objective: dict[str, Any], message: str
) -> None:
    settings = {
        "teacher_placement": "endpoint", "endpoint": endpoint,
        "objectives": [{"name": "token_divergence", **objective}],
    }  # fmt: skip
    tree = {"name": "t", "run_dir": "r", "teacher": {"path": "t"}, "prune": {"ffn": 8}, "distill": settings}
    with pytest.raises(ConfigError, match=message):
        build_config(tree, "test")
