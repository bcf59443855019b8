"""How toxic texts are, by a list of words or a server; and which answers are refusals."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kdscale.config.endpoint import EndpointConfig
from kdscale.config.evaluation.bias import MeasureConfig, RefusalsConfig, ScorerConfig, ToxicityConfig
from kdscale.errors import DataError
from kdscale.files import read_text, sha256_file
from kdscale.responses import chat
from kdscale.responses.asking import Question, RequestPolicy, ask_all
from kdscale.responses.client import NotNowError, check_library
from kdscale.responses.filters import refusal_test
from kdscale.responses.journal import Journal, key_of
from kdscale.responses.reward import number, value_at
from kdscale.runtime.progress import Reporter

_PROBE = "This is a sentence."
_MAX_BYTES = 16 << 20  # of a list of words
_SAFE = re.compile(r"^\W*(un)?safe\b", re.IGNORECASE)

Judge = Callable[[Sequence[str]], Sequence[Any]]  # of each text: its toxicity from 0 to 1, or whether it is a refusal


def make_judge(entry: MeasureConfig, journal: Path, reporter: Reporter) -> Judge:
    """Who says what the texts of a measure are; `journal` is a folder for what a server has said already."""
    if isinstance(entry, RefusalsConfig):
        refuses = refusal_test(entry.patterns)
        return lambda texts: [refuses(text) for text in texts]
    assert isinstance(entry, ToxicityConfig)
    scorer, section = entry.scorer, f"bias.measures: {entry.key}.scorer"
    if scorer.endpoint is None:
        return _by_words(_words(scorer, section))
    return _by_server(scorer, scorer.endpoint, section, journal, reporter)


def check_scorer(entry: ToxicityConfig) -> None:
    """Raises DataError for a list without words, ConfigError where the server's library or key is missing."""
    section = f"bias.measures: {entry.key}.scorer"
    if entry.scorer.endpoint is None:
        _words(entry.scorer, section)
    else:
        check_library(section)
        entry.scorer.endpoint.key(section)


def try_out(entry: ToxicityConfig, journal: Path, reporter: Reporter) -> None:
    """Have one sentence scored, before any model is loaded. Raises what an endpoint's failures are."""
    make_judge(entry, journal, reporter)([_PROBE])


def words_digest(scorer: ScorerConfig) -> dict[str, str]:
    """sha256 of the list of words, where there is one. Raises DataError where it is missing."""
    if scorer.words is None:
        return {}
    file = Path(scorer.words).expanduser()
    if not file.is_file():
        raise DataError(f"{file} is missing", expected="a file with a word or phrase on each line")
    return {scorer.words: sha256_file(file)}


def _words(scorer: ScorerConfig, section: str) -> list[str]:
    assert scorer.words is not None
    lines = read_text(Path(scorer.words).expanduser(), DataError, _MAX_BYTES).splitlines()
    words = [" ".join(line.split()) for line in lines if line.strip() and not line.startswith("#")]
    if not words:
        raise DataError(f"{section}.words: {scorer.words}", expected="a word or phrase on each line", got="none")
    return words


def _by_words(words: Sequence[str]) -> Judge:
    """1 for a text that has one of the words or phrases whole, in any case; else 0."""
    alternatives = "|".join(re.escape(word).replace(r"\ ", r"\s+") for word in sorted(words, key=len, reverse=True))
    pattern = re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)", re.IGNORECASE)
    return lambda texts: [float(bool(pattern.search(text))) for text in texts]


def _by_server(scorer: ScorerConfig, endpoint: EndpointConfig, section: str, folder: Path, reporter: Reporter) -> Judge:
    policy = RequestPolicy(
        section=section, endpoint=endpoint, concurrency=scorer.concurrency, retries=scorer.retries,
        max_answer_bytes=scorer.max_answer_bytes,
    )  # fmt: skip

    def judge(texts: Sequence[str]) -> list[float]:
        # a model may end its text at once, and many servers refuse a text that is empty: it is not toxic
        questions = {
            text: _question(text, number, scorer, endpoint) for number, text in enumerate(texts, 1) if text.strip()
        }
        journal = Journal(folder, "scores", reporter.say)
        try:
            with reporter.bar("score texts", len(questions), "text") as bar:
                ask_all(list(questions.values()), journal, policy, bar)
            scores = {text: float(journal.get(question.key)["score"]) for text, question in questions.items()}
            return [scores.get(text, 0.0) for text in texts]
        finally:
            journal.close()

    return judge


def _question(text: str, position: int, scorer: ScorerConfig, endpoint: EndpointConfig) -> Question:
    if scorer.style == "guard":
        messages = [{"role": "user", "content": text}]
        path, body = chat.PATH, {"model": endpoint.model, "messages": messages, "temperature": 0.0, "max_tokens": 16}
    else:
        model = {"model": endpoint.model} if endpoint.model else {}
        path, body = scorer.path, {**model, scorer.text_field: text}

    def read(tree: dict[str, Any]) -> dict[str, Any]:
        if scorer.style == "json":
            score = number(value_at(tree, scorer.score_field), scorer.score_field)
            if not 0.0 <= score <= 1.0:
                raise NotNowError(f"{scorer.score_field}: expected a number from 0 to 1, got {score:g}")
            return {"score": score}
        said = value_at(tree, chat.ANSWER)
        match = _SAFE.match(said) if isinstance(said, str) else None
        if match is None:
            raise NotNowError(f"expected an answer that begins with safe or unsafe, got {said!r:.200}")
        return {"score": 1.0 if match[1] else 0.0}

    # measures share a journal: two of them may read other fields of one answer, or ask other servers the same
    key = key_of("bias", endpoint.base_url, path, body, scorer.style, scorer.score_field)
    return Question(key, path, body, read, about=f"text {position}")
