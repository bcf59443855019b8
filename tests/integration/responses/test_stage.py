"""The stage: prompts to a source of text, redone for what matters alone, and never asking again for what is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kdscale.config.load import build_config
from kdscale.data.token_store import TokenStore
from kdscale.errors import ConfigError, DataError, RunFolderError, ServiceError, SpendingLimitError
from kdscale.models.loading import load_tokenizer
from kdscale.pipeline.runner import run_until
from kdscale.runs.metrics_log import read_metrics
from kdscale.runtime.progress import Reporter
from tests.fake_endpoint import FakeEndpoint, Fault, serving

PROMPTS = ["Who lived at the mill?", "What did they count?", "Who lived at the mill?", "Where is the river?"]


@pytest.fixture
def server() -> Iterator[FakeEndpoint]:
    with serving(FakeEndpoint()) as running:
        yield running


@pytest.fixture
def answer(chatting_llama_dir: Path, tmp_path: Path) -> Callable[..., bool]:
    """Bring the run in `tmp_path/run` up to the stage; whether there was anything to do."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))

    def run(
        accept: bool = False, until: str = "responses", data: Any = None, distill: Any = None, **responses: Any
    ) -> bool:
        settings = {"prompts": [{"path": str(tmp_path / "prompts.txt")}], "retries": 0, **responses}
        tree = {
            "name": "t", "run_dir": str(tmp_path / "run"), "teacher": {"path": str(chatting_llama_dir)},
            "prune": {"ffn": 64}, "distill": distill or {"seq_len": 64},
            "eval": {"efficiency": False, "sample_tokens": 4},
            "responses": settings, "importance": {"calibration_tokens": 64, "seq_len": 32, "micro_batch": 1},
            **({"data": data} if data else {}),
        }  # fmt: skip
        return run_until(build_config(tree, "test"), until, Reporter(quiet=True), accept_changes=accept)

    return run


@pytest.fixture
def lines(tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    return lambda: [json.loads(line) for line in (tmp_path / "run/responses/responses.jsonl").read_text().splitlines()]


def facts(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "run/stages/responses.json").read_text())["facts"])


def by(server: FakeEndpoint, **more: Any) -> dict[str, Any]:
    return {"teacher": "endpoint", "endpoint": {"base_url": server.url, "model": "m"}, **more}


def test_answers_become_chats_and_what_filters_drop_is_counted(
    server: FakeEndpoint, answer: Callable[..., bool], lines: Callable[[], Any], tmp_path: Path
) -> None:
    server.reply = lambda messages, number: ["I cannot help with that.", messages[-1]["content"][::-1], ""][number]
    filters = [{"name": "length", "min_chars": 3}, {"name": "refusals"}]
    assert answer(**by(server, system="Be brief.\nBe kind.", sampling={"n": 3}, filters=filters))
    asked = [PROMPTS[0], PROMPTS[1], PROMPTS[3]]
    assert [line["messages"] for line in lines()] == [
        [
            {"role": "system", "content": "Be brief.\nBe kind."},
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": prompt[::-1]},
        ]
        for prompt in asked
    ]
    assert {line["source"] for line in lines()} == {"responses"}
    assert facts(tmp_path) == {
        "prompts": 4, "answers": 9, "kept": 3, "repeated prompts": 1, "empty answers": 3, "dropped by length": 0,
        "dropped by refusals": 3, "spent": "75 tokens",
    }  # fmt: skip
    assert not answer(**by(server, system="Be brief.\nBe kind.", sampling={"n": 3}, filters=filters))
    assert len(server.asked) == 3
    # other filters need the old answers alone; how fast it is asked matters to nothing
    assert answer(accept=True, **by(server, system="Be brief.\nBe kind.", sampling={"n": 3}))
    assert len(lines()) == 6
    assert not answer(**by(server, system="Be brief.\nBe kind.", sampling={"n": 3}, concurrency=3, retries=5))
    assert len(server.asked) == 3


def test_the_student_learns_the_answers_alone(
    server: FakeEndpoint, answer: Callable[..., bool], chatting_llama_dir: Path, tmp_path: Path, tiny_texts: list[str]
) -> None:
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts))
    data = {"sources": [{"path": "responses:"}, {"path": str(tmp_path / "other.jsonl")}], "heldout_fraction": 0.1}
    server.reply = lambda messages, _: tiny_texts[len(messages[-1]["content"])]
    assert answer(until="data", data=data, **by(server))
    split, tokenizer = TokenStore.open(tmp_path / "run/data").split("train"), load_tokenizer(chatting_llama_dir)
    chats = [i for i in range(split.documents) if split.source_labels[split.labels_D[i]] == "responses"]
    assert chats
    for number in chats:
        ids, is_label = split.document_tokens(number), split.document_is_label(number)
        asked, _, said = tokenizer.decode(ids).partition("assistant: ")
        assert asked.startswith("user: W")
        assert is_label is not None
        assert tokenizer.decode(ids[is_label]).startswith(said.partition("<|end|>")[0])
    assert not answer(until="data", data=data, **by(server))
    (tmp_path / "prompts.txt").write_text("Something else?")  # the text follows the answers
    assert answer(until="data", data=data, **by(server))
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [event["stage"] for event in events if event["event"] == "done"] == ["responses", "data"] * 2


def test_answers_need_somebody_who_gives_them() -> None:
    tree = {"name": "t", "run_dir": "r", "teacher": {"path": "t"}, "prune": {"ffn": 8}}
    with pytest.raises(ConfigError, match="needs a section responses"):
        build_config({**tree, "data": {"sources": [{"path": "responses:"}]}}, "test")


def test_a_limit_ends_the_stage_says_why_and_goes_on_when_it_is_raised(
    server: FakeEndpoint, answer: Callable[..., bool], lines: Callable[[], Any], tmp_path: Path
) -> None:
    settings = {"sampling": {"max_tokens": 5}, "concurrency": 1}
    with pytest.raises(SpendingLimitError, match=r"responses\.limits"):
        answer(**by(server, limits={"total_tokens": 45}, **settings))
    status = json.loads((tmp_path / "run/status.json").read_text())["stages"]["responses"]
    assert status["state"] == "failed" and "at most 45 tokens" in status["reason"]
    bought = len(server.asked)
    assert 0 < bought < 3
    assert answer(**by(server, limits={"total_tokens": 200}, **settings))
    assert len(server.asked) == len(lines()) == 3


def test_an_error_on_the_way_keeps_what_is_answered(
    server: FakeEndpoint, answer: Callable[..., bool], lines: Callable[[], Any]
) -> None:
    server.faults = [Fault(), Fault(400, b"no such prompt")]
    with pytest.raises(ServiceError, match=r"prompts\.txt line 2(.|\n)*400 no such prompt"):
        answer(**by(server, concurrency=1))
    assert answer(**by(server, concurrency=1))
    assert len(lines()) == 3
    assert set(server.answered.values()) == {1}


def test_a_reward_server_scores_each_answer_once(
    server: FakeEndpoint, answer: Callable[..., bool], lines: Callable[[], Any]
) -> None:
    reward = {"name": "reward", "endpoint": {"base_url": server.url, "model": "rm"}, "threshold": 0.225}
    assert answer(**by(server, filters=[reward]))
    kept = [line["messages"][-1]["content"] for line in lines()]
    assert kept == [f"{prompt} #0" for prompt in (PROMPTS[0], PROMPTS[1]) if len(prompt) + 3 >= 22.5]
    scored = [body for path, _, body in server.asked if path == "/v1/score"]
    assert len(scored) == 3 and scored[0]["messages"][-1]["role"] == "assistant"
    server.reply = lambda messages, number: "I give it 7.5 of 10"
    judge = {**reward, "style": "judge", "threshold": 8.0}
    with pytest.raises(DataError, match="dropped by reward: 3"):
        answer(accept=True, **by(server, filters=[judge]))
    assert answer(accept=True, **by(server, filters=[{**judge, "threshold": 7.5}]))
    assert len(lines()) == 3
    assert len(server.asked) == 9
    with pytest.raises(ServiceError, match="no other in the answer"):  # what another field said does not count
        answer(accept=True, **by(server, filters=[{**reward, "score_field": "other"}]))
    server.faults = [Fault(body=b'{"score": NaN}')]
    with pytest.raises(ServiceError, match="reward"):
        answer(accept=True, **by(server, filters=[{**reward, "path": "other"}]))


def test_the_runs_own_teacher_answers(answer: Callable[..., bool], lines: Callable[[], Any], tmp_path: Path) -> None:
    settings = {"sampling": {"max_tokens": 6, "temperature": 1.0}, "micro_batch": 2, "dtype": "float32"}
    assert answer(**settings)
    first = lines()
    assert len(first) == 3
    assert facts(tmp_path)["prompts"] == 4
    assert not answer(**settings)
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, "And another one?"]))
    assert answer(**settings)
    assert lines()[:3] == first and len(lines()) == 4


def test_before_any_work_prompts_and_key_are_checked(
    server: FakeEndpoint, answer: Callable[..., bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    (tmp_path / "prompts.txt").write_text("\n")
    endpoint = {"base_url": server.url, "model": "m", "key_variable": "NO_SUCH_KEY"}
    with pytest.raises(DataError, match="holds no prompt"):
        answer(teacher="endpoint", endpoint=endpoint)
    (tmp_path / "prompts.txt").write_text("fine\n")
    with pytest.raises(Exception, match="NO_SUCH_KEY"):
        answer(teacher="endpoint", endpoint=endpoint)
    assert server.asked == []
    assert not (tmp_path / "run" / "responses").exists()


def test_another_prompt_needs_no_permission_but_another_model_does(
    server: FakeEndpoint, answer: Callable[..., bool], tmp_path: Path
) -> None:
    assert answer(**by(server))
    with pytest.raises(RunFolderError, match=r"responses\.endpoint\.model"):
        answer(**{**by(server), "endpoint": {"base_url": server.url, "model": "other"}})
    assert len(server.asked) == 3


@pytest.mark.long
def test_the_student_learns_the_log_probabilities_that_came_with_the_answers(
    server: FakeEndpoint, answer: Callable[..., bool], chatting_llama_dir: Path, tmp_path: Path, tiny_texts: list[str]
) -> None:
    """To the end of a distillation; and a run whose tokenizer never cuts as the endpoint's does is refused."""
    tokenizer = load_tokenizer(chatting_llama_dir)
    (tmp_path / "prompts.txt").write_text("\n".join(f"Number {i}?" for i in range(60)))
    server.reply = lambda messages, _: tiny_texts[int(messages[-1]["content"][7:-1])]
    server.tokens = lambda text: [tokenizer.decode([token]) for token in tokenizer(text)["input_ids"]]
    data = {"sources": [{"path": "responses:"}], "heldout_fraction": 0.2}
    distill = {
        "teacher_placement": "responses", "objectives": [{"name": "token_divergence", "top_k": 2}], "tokens": 512,
        "seq_len": 64, "global_batch": 4, "micro_batch": 2, "validate_every": 1, "validate_tokens": 200,
    }  # fmt: skip
    settings = {**by(server), "sampling": {"top_logprobs": 2}, "retries": 5}
    assert answer(until="distill", data=data, distill=distill, **settings)
    rows = list(read_metrics(tmp_path / "run/logs/metrics.jsonl"))
    losses = [row["loss"] for row in rows if row["kind"] == "validation"]
    assert len(losses) == 3 and losses[-1] < losses[0]
    answered = sum(len(tokenizer(text)["input_ids"]) for text in tiny_texts)
    assert 0 < max(row["labels"] for row in rows if row["kind"] == "train") <= answered
    server.tokens = lambda text: [text]
    with pytest.raises(DataError, match="teacher_placement: responses"):
        answer(accept=True, until="distill", data=data, distill=distill, **settings, system="Be brief.")
