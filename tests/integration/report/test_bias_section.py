"""What is shown of bias.json: page, terminal and model card, whatever its groups are called."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdscale.cli import tables
from kdscale.errors import RunFolderError
from kdscale.eval.bias.changes import headline, summarise
from kdscale.eval.bias.measures import MEASURES, Measure
from kdscale.packaging.card_sections import measured
from kdscale.report.bias_facts import bias
from kdscale.report.html import write_report
from kdscale.runs.folder import RunFolder

HOSTILE = "<script>alert(1)</script> | $x_1$ [a](b)"


def results(measure: Measure, columns: dict[str, float], models: tuple[str, ...]) -> dict[str, Any]:
    """A measure of 60 items; the share of each model with the decision is in `columns`."""
    rng = np.random.default_rng(0)
    base = rng.random(60)
    values = {name: np.full((60, len(measure.columns)), 0.5) for name in models}
    for name in models:
        values[name][:, 0] = base < columns[name]
    groups = [HOSTILE if at % 2 else "age" for at in range(60)]
    summary = summarise(measure, values, groups, [str(at) for at in range(60)], kept_within=0.05, seed=0)
    return {
        "measure": measure.name, "title": measure.title, "paper": measure.paper, "decision": measure.decision,
        "headline": headline(measure, summary["all"]), "verdicts": dict.fromkeys(models[1:], "kept: so"),
        "figures": {one.name: {"title": one.title, "ideal": one.ideal, "range": one.range} for one in measure.figures},
        **summary,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    models = ("teacher", "pruned", "distilled", "int4_rtn_g32")
    shares = dict(zip(models, (0.5, 0.6, 0.9, 0.5), strict=True))
    tree = {
        "schema_version": 1, "settings": {}, "models": list(models),
        "measures": {
            "pairs": results(MEASURES["pairs"], shares, models), "own": results(MEASURES["pairs"], shares, models),
            "stereoset": results(MEASURES["stereoset"], shares, models),
        },
    }  # fmt: skip
    (tmp_path / "bias").mkdir()
    (tmp_path / "bias" / "bias.json").write_text(json.dumps(tree))
    return tmp_path


def test_the_facts_say_what_grew_and_what_is_above_a_limit(run: Path) -> None:
    facts = bias(run / "bias", {"pairs": 0.2, "stereoset": 45.0})
    assert facts is not None
    assert facts["grew"] == ["Minimal pairs (distilled)", "Minimal pairs (distilled)", "StereoSet (distilled)"]
    (above,) = facts["too_much"]
    assert above.startswith("pairs, distilled: grew by ") and "more than 0.2" in above
    first, own, _ = facts["measures"]
    assert (first["title"], own["title"]) == ("Minimal pairs", "Minimal pairs: own")
    change = first["changes"][1]
    assert (change["title"], change["verdict"], change["back"]) == ("Distilled", "grew", 0)
    assert change["growth"].startswith("+0.") and change["to"] > 10
    assert {group["name"] for group in first["groups"]} == {"age", HOSTILE}
    (note,) = bias(run / "bias", {"pairs": 0.001})["notes"]  # type: ignore[index]
    assert "chance decides" in note
    assert bias(run / "nowhere") is None


def test_the_page_and_the_card_escape_what_groups_are_called(run: Path, tmp_path: Path) -> None:
    page = write_report(run, tmp_path / "out").read_text()
    section = page[page.index('<section id="bias"') :]
    assert HOSTILE not in page and "&lt;script&gt;alert(1)" in section
    assert section.count("<svg") >= 6  # three measures, wide and narrow
    for words in ("Bias and safety", "INT4 RTN g32", "not measurable", "Prefers the stereotype (ideal 0.5)"):
        assert words in section
    card, _ = measured(run)
    assert "### Bias and safety" in card and "Minimal pairs (own): Prefers the stereotype (0.5)" in card
    assert "| grew |" in card


def test_the_terminal_shows_a_line_a_measure(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables._bias(RunFolder(run))
    out = " ".join(capsys.readouterr().out.split())
    assert "Minimal pairs: own teacher 0.467 ± 0.0" in out
    assert "StereoSet teacher 46.7" in out and "+38.3 grew int4_rtn_g32" in out


def test_limits_that_hold_nothing_are_named(run: Path) -> None:
    tree = json.loads((run / "bias" / "bias.json").read_text())
    change = tree["measures"]["pairs"]["all"]["changes"]["distilled"]["figures"]["share"]
    change |= {"growth": None, "growth_error": None, "smallest": None, "verdict": None}
    (run / "bias" / "bias.json").write_text(json.dumps(tree))
    facts = bias(run / "bias", {"pairs": 1.0, "pairs.typo": 0.1})
    assert facts is not None and facts["notes"] == [
        "bias.fail_if: pairs cannot be computed for distilled from these items",
        "bias.fail_if: pairs.typo is no figure of these results",
    ]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tree: tree["models"].append("new"),
        lambda tree: tree["models"].remove("teacher"),
        lambda tree: tree["measures"]["own"].update(headline="x"),
        lambda tree: tree["measures"]["own"]["all"]["figures"]["teacher"].pop("share"),
        lambda tree: tree["measures"]["own"]["groups"]["age"]["changes"]["pruned"].update(flips={}),
    ],
)
def test_results_that_lack_what_is_shown_are_damaged(run: Path, spoil: Callable[[Any], None]) -> None:
    tree = json.loads((run / "bias" / "bias.json").read_text())
    spoil(tree)
    (run / "bias" / "bias.json").write_text(json.dumps(tree))
    with pytest.raises(RunFolderError, match="damaged"):
        bias(run / "bias")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"schema_version": 1, "models": [], "measures": {"pairs": 3}}'])
def test_a_damaged_file_is_named(run: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "bias" / "bias.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"bias\.json"):
        bias(run / "bias")
    tables._bias(RunFolder(run))
    assert "warning" in capsys.readouterr().out
