"""What is said of calibration text that lacks a source, and of held-out text of another kind."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from kdscale.config.load import build_config
from kdscale.data.token_store import TokenStore
from kdscale.models.loading import SpecialTokens
from kdscale.pipeline.calibration_text import calibration_notices
from kdscale.report.facts import gather
from kdscale.runtime.progress import Reporter

PROSE = "the river ran past an old mill and the children who lived there knew every stone of it by name".split()
CODE = "def f(x): return x[0] if len(x) > 1 else {} import os; assert y == z; print(a_b, c.d)".split()


@pytest.fixture
def notices(tmp_path: Path, tiny_llama_dir: Path) -> Callable[..., list[str]]:
    """The notices on sources of 40 documents each, given as name=words."""

    def write(name: str, words: list[str], documents: int, length: int = 60) -> dict[str, Any]:
        rng, path = random.Random(name), tmp_path / f"{name}.jsonl"
        texts = [" ".join(rng.choices(words, k=length)) for _ in range(documents)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return {"path": str(path), "tag": name}

    def made(
        tokens: int, heldout: dict[str, list[str]] | None = None, encoder: bool = False,
        **sources: tuple[list[str], int],
    ) -> list[str]:  # fmt: skip
        length = 6 if encoder else 60
        data: dict[str, Any] = {"sources": [write(name, *of, length) for name, of in sources.items()], "share": False}
        if heldout:
            data["heldout_sources"] = [write(name, words, 2400 // length, length) for name, words in heldout.items()]
        config = build_config(
            {
                "name": "x", "run_dir": str(tmp_path), "teacher": {"path": "t"}, "prune": {"ffn": 8}, "data": data,
                "importance": {"calibration_tokens": tokens, "seq_len": 64}, "distill": {"tokens": "1M"},
            },
            "test",
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
        ends = {"special": SpecialTokens((1,), (2,)), "encoder": True} if encoder else {}
        TokenStore.build(tmp_path / "data", config.data, tokenizer, eos_id=0, reporter=Reporter(quiet=True), **ends)
        return calibration_notices(config, tmp_path / "data")

    return made


def test_a_source_that_the_calibration_text_lacks_is_named(notices: Callable[..., list[str]]) -> None:
    sources = {"books": (PROSE, 90), "code": (CODE, 10)}
    (line,) = notices(128, **sources)
    assert line.startswith("The text that is distilled on has what the calibration text lacks: code (")
    assert "importance.calibration_tokens" in line
    assert notices(2048, **sources) == [], "with more text every source has its part"


def test_held_out_text_of_another_kind_is_noticed(notices: Callable[..., list[str]]) -> None:
    (line,) = notices(2048, heldout={"exam": CODE}, books=(PROSE, 90))
    assert line.startswith("The held-out text (data.heldout_sources) is of another kind than the calibration text: ")
    assert notices(2048, heldout={"exam": PROSE}, books=(PROSE, 90)) == []


def test_short_texts_of_an_encoder_are_compared_with_both_ends(notices: Callable[..., list[str]]) -> None:
    assert notices(2048, heldout={"exam": PROSE}, encoder=True, books=(PROSE, 900)) == []
    (line,) = notices(2048, heldout={"exam": CODE}, encoder=True, books=(PROSE, 900))
    assert "is of another kind" in line


def test_the_report_repeats_what_was_said(tmp_path: Path) -> None:
    (tmp_path / "importance").mkdir()
    (tmp_path / "importance" / "notices.json").write_text(json.dumps(["The text is <b>odd</b>."]))
    assert gather(tmp_path)["warnings"] == ["The text is <b>odd</b>."]
