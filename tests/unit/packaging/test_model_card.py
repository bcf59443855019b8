"""The model card says what the student learnt from, what it inherits and what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdscale.config.load import build_config
from kdscale.errors import FileError
from kdscale.files import write_json
from kdscale.packaging import front_matter
from kdscale.packaging.model_card import card_facts, model_card, with_measurements
from kdscale.packaging.origin import origin_of

MANIFEST = {"step": 3, "fingerprint": {"distill": {"dtype": "bfloat16"}}, "state": {"guard": {"total": 1}}}


def card(**settings: Any) -> str:
    tree = {"name": "t", "run_dir": "r", "teacher": {"path": "models/big"}, "prune": {"ffn": 8}}
    tree["distill"] = {"objectives": [{"name": "token_divergence", **settings}]}  # type: ignore[assignment]
    return model_card(card_facts(build_config(tree, "test"), MANIFEST))


@pytest.mark.parametrize(
    ("settings", "learnt_from", "loss"),
    [
        (
            {"ce_weight": 0.25},
            "top-K probabilities",
            "0.25·CE + 0.75·T²·forward_kl, T = 1, teacher's top 64, tail: buck",
        ),
        ({"targets": "full"}, "probabilities over the whole vocabulary", "T = 1, whole vocabulary"),
    ],
)
def test_the_card_names_what_was_learnt_from(settings: dict[str, Any], learnt_from: str, loss: str) -> None:
    text = card(**settings)
    assert f"distilled on the teacher's {learnt_from} with kdscale" in text
    assert loss in text
    assert ("top-K" in text) == (settings.get("targets") != "full")
    assert "| teacher | big |" in text and "| skipped steps | 1 |" in text


def test_a_name_cannot_leave_its_cell() -> None:
    facts = {"teacher": "x| |\n\n# [go](http://evil)\x1b[2J", "learnt from": "text"}
    (row,) = [line for line in model_card(facts).splitlines() if line.startswith("| teacher")]
    assert row == r"| teacher | x\| \|  # \[go\](http:\/\/evil)\\x1b\[2J |"


def evaluation(**quality: float) -> dict[str, Any]:
    size = {"parameters": 1000, "weight_bytes": 2000, "kv_cache_bytes_per_token": 64}
    teacher = {"quality": {"perplexity": 10.0, "perplexity_standard_error": 0.5, "kl_to_teacher": None}, "size": size}
    settings = {"tokens": 4096, "seq_len": 128, "dtype": "a | b"}
    return {"settings": settings, "models": {"teacher": teacher, "distilled": {"quality": quality, "size": size}}}


def measured_card(run: Path, card: str = "", **quality: float) -> str:
    write_json(run / "eval" / "eval.json", evaluation(**quality))
    facts = {"teacher": "big", "learnt from": "text"}
    return with_measurements(card or model_card(facts), run, "small", "README.md")


def test_what_was_measured_is_in_the_text_and_in_the_front_matter(tmp_path: Path) -> None:
    text = measured_card(tmp_path, perplexity=12.0, perplexity_standard_error=0.25, kl_to_teacher=0.5)
    assert "| Perplexity | 10.0 ± 0.5 | 12.0 ± 0.2 |" in text
    assert "| KL to the teacher, nats per token |  | 0.500 |" in text and r"in a \| b; ±" in text
    fields, _ = front_matter.split(text, "card")
    (model,) = fields["model-index"]
    assert model["results"][0]["metrics"] == [{"type": "perplexity", "value": 12.0}] and model["name"] == "small"
    assert fields["library_name"] == "transformers" and fields["metrics"] == ["perplexity"]


def test_measuring_again_keeps_what_people_wrote(tmp_path: Path) -> None:
    first = measured_card(tmp_path, perplexity=12.0)
    assert measured_card(tmp_path, first, perplexity=12.0) == first
    edited = first.replace("# Distilled student", "# Ours\n\nMade for tea.").replace("---\n", "---\n# ours\nx: 1\n", 1)
    again = measured_card(tmp_path, edited, perplexity=13.0)
    assert again == edited.replace("12.0", "13.0")
    bare = measured_card(tmp_path, "Made for tea.\n", perplexity=13.0)  # no front matter, and no part of ours
    assert bare.startswith("---\n") and "\nMade for tea.\n\n<!--" in bare and "| Perplexity |" in bare


def test_timings_make_no_difference_to_the_card(tmp_path: Path) -> None:
    card = measured_card(tmp_path, perplexity=12.0)
    timed = evaluation(perplexity=12.0)
    for model in timed["models"].values():
        model["efficiency"] = {"decode_tokens_per_second": 21.7, "peak_memory_bytes": 4e9}
    write_json(tmp_path / "eval" / "eval.json", {**timed, "settings": {**timed["settings"], "device_name": "busy"}})
    assert with_measurements(card, tmp_path, "small", "README.md") == card


def test_without_figures_the_card_says_nothing_of_them(tmp_path: Path) -> None:
    text = with_measurements(measured_card(tmp_path, perplexity=12.0), tmp_path / "other", "small", "README.md")
    assert "Perplexity" not in text and "model-index" not in text and "metrics" not in text


@pytest.mark.parametrize(
    "damage", ["---\n[1]\n---\n", "---\na: [\n---\n", "---\na: 1\n", "---\n" + "[" * 5000 + "\n---\n"]
)
def test_front_matter_that_is_none_is_refused_by_name(damage: str) -> None:
    with pytest.raises(FileError, match=r"card\.md: front matter"):
        front_matter.split(damage, "card.md")


def test_no_value_leaves_the_front_matter() -> None:
    facts = {"teacher": "t", "learnt from": "text"}
    hostile = "x\n---\n# other: [&a *a] !!python/object:os.system"
    fields, body = front_matter.split(model_card(facts, inherited={"license_link": hostile}), "card")
    assert fields["license_link"] == hostile and "python/object" not in body


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: other\nlicense_name: tea\nlanguage: [de, en, 3]\n---\n",
         {"license": "other", "license_name": "tea", "language": ["de", "en"]}),
        ("---\nlicense: [a, b]\nlanguage: fr\n---\n", {"license": "apache-2.0", "language": ["fr"]}),
        ("---\n: [\n", {"license": "apache-2.0"}),
        ("", {"license": "apache-2.0"}),
    ],
)  # fmt: skip
def test_the_student_inherits_what_the_teachers_card_says(tmp_path: Path, card: str, expected: dict[str, Any]) -> None:
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "LICENSE").write_text("  Apache License\n   Version 2.0, January 2004\n")
    sources = [{"path": "hf:org/data#en"}, {"path": "hf:org/data#de"}, {"path": "text.jsonl"}]
    tree = {"name": "t", "run_dir": "r", "teacher": {"path": str(tmp_path)}, "prune": {"ffn": 8}}
    config = build_config({**tree, "data": {"sources": sources}}, "test")
    assert origin_of(config, tmp_path).fields() == {**expected, "datasets": ["org/data"]}


def test_a_teacher_of_the_hub_or_of_the_catalogue_is_the_base_model(tmp_path: Path) -> None:
    tree = {"name": "t", "run_dir": "r", "prune": {"ffn": 8}}
    hub = build_config({**tree, "teacher": {"path": "hf:org/never-downloaded"}}, "test")
    assert origin_of(hub, tmp_path).fields() == {"base_model": "org/never-downloaded"}
    write_json(tmp_path / "kdscale_teacher.json", {"name": "smollm2-135m-instruct"})
    demo = build_config({**tree, "teacher": {"path": str(tmp_path)}}, "test")
    assert origin_of(demo, tmp_path).fields() == {
        "license": "apache-2.0", "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "language": ["en"],
    }  # fmt: skip
