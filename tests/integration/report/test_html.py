"""The report from files alone: every figure, nothing fetched, nothing unescaped, and partial runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kdscale.config.load import build_config, dump_config
from kdscale.errors import FileError, RunFolderError
from kdscale.families import load_family
from kdscale.prune.search.planning import make_plan
from kdscale.report.html import write_report

SECTIONS = (
    "side-by-side", "samples", "distillation", "pruning", "what-was-cut", "importance", "repair",
    "candidates", "how-it-was-made", "use",
)  # fmt: skip
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def quality(ce: float, kl: float | None) -> dict[str, Any]:
    return {
        "ce": ce, "ce_standard_error": 0.02, "perplexity": float(np.exp(ce)), "perplexity_standard_error": 0.5,
        "bits_per_byte": ce / 3, "top1_accuracy": 0.4, "expected_calibration_error": 0.02, "kl_to_teacher": kl,
        "kl_to_teacher_standard_error": None if kl is None else 0.01, "top1_agreement": None if kl is None else 0.6,
        "top1_agreement_standard_error": None if kl is None else 0.01,
    }  # fmt: skip


def evaluation() -> dict[str, Any]:
    sizes = {
        "parameters": 400, "non_embedding_parameters": 200, "weight_bytes": 800, "kv_cache_bytes_per_token": 64,
        "components": {"embedding": 200, "attention": 100, "ffn": 90, "norm": 10},
    }  # fmt: skip
    ces = {"teacher": (3.0, None), "pruned": (4.0, 0.9), "distilled": (3.4, 0.4)}
    return {
        "schema_version": 1,
        "settings": {
            "split": "heldout", "tokens": 1000, "bytes": 3000, "document_pieces": 9, "sequences": 4, "seq_len": 256,
            "micro_batch": 2, "dtype": "float32", "device": "cpu", "device_name": "a CPU", "threads": 2,
            "sample_tokens": 8, "sample_temperature": 0.7, "sample_top_p": 0.9,
            "calibration_bins": 15, "torch": "2.13", "transformers": "5.23",
        },
        "models": {name: {"path": name, "quality": quality(*ce), "size": sizes} for name, ce in ces.items()},
        "differences": {"distilled_minus_pruned": {"ce": -0.6, "ce_standard_error": 0.01}},
        "gap_closed": 0.6,
        "samples": [{"prompt": HOSTILE, "outputs": {name: f"{name} says {HOSTILE}" for name in ces}}],
        "seconds": {"quality_and_samples": 1.0, "total": 2.0},
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, tiny_llama_dir: Path) -> Path:
    """A run folder with every file the report reads, made without running a model."""
    folder = tmp_path / "run"
    for name in ("importance", "logs", "eval", "stages", "student"):
        (folder / name).mkdir(parents=True)
    config = build_config(
        {"name": "report-test", "run_dir": str(folder), "teacher": {"path": "t"}, "prune": {"ffn": 64, "heads": 4}},
        "here",
    )
    (folder / "config.yaml").write_text(dump_config(config))
    rng = np.random.default_rng(1)
    units = {"ffn.output_energy": 128, "ffn.activation": 128, "heads.output_energy": 6, "heads.activation": 6}
    scores = {name: rng.random((4, count), dtype=np.float32) for name, count in units.items()}
    save_file(scores, folder / "importance" / "scores.safetensors")
    summary = {"version": 1, "tokens": 512, "dtype": "float32", "axes": ["ffn", "heads"], "layers": []}
    summary["units"] = {name: "norm" if name.endswith("activation") else "energy" for name in units}
    (folder / "importance" / "scores.json").write_text(json.dumps(summary))
    teacher = json.loads((tiny_llama_dir / "config.json").read_text())
    make_plan(teacher, load_family(teacher, "t"), scores, config.prune).save(folder / "plan.json")
    rows = [
        {"kind": "validation", "step": 0, "tokens": 77, "loss": 1.0, "perplexity": 55.0},
        *(
            {
                "kind": "train",
                "step": s,
                "tokens": 64 * s,
                "loss": 1 / s,
                "tokens_per_second": 100.0,
                "skipped": int(s == 3),
            }
            for s in range(1, 9)
        ),
        {"kind": "validation", "step": 8, "tokens": 77, "loss": 0.5, "perplexity": 30.0},
    ]
    (folder / "logs" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "eval" / "eval.json").write_text(json.dumps(evaluation()))
    stage = {
        "stage": "prune",
        "seconds": 12.5,
        "finished": "2026-01-01T00:00:00+00:00",
        "facts": {"x": HOSTILE},
        "versions": {},
    }
    (folder / "stages" / "prune.json").write_text(json.dumps(stage))
    (folder / "student" / "config.json").write_text("{}")
    return folder


class Page(HTMLParser):
    """Collects ids, tags and every attribute that could make a browser fetch or run something."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.fetches: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "data", "srcset", "action") or (
                name in ("href", "xlink:href") and not (value or "").startswith(("#", "data:"))
            ):
                self.fetches.append(f"{tag} {name}={value}")
            if name.startswith("on"):
                self.handlers.append(f"{tag} {name}={value}")


def test_a_finished_run(run: Path, tmp_path: Path) -> None:
    page_path = write_report(run, tmp_path / "out")
    text = page_path.read_text(encoding="utf-8")
    page = Page(text)
    assert set(SECTIONS) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert page.fetches == []
    assert page.handlers == []
    assert "script" not in page.tags
    assert "&lt;script&gt;alert(1)" in text
    assert not re.search(r"url\(\s*['\"]?http|@import", text)
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    assert facts["evaluation"] == evaluation()
    assert facts["missing"] == []
    assert facts["curves"]["skipped_steps"] == 1
    assert [point["tokens"] for point in facts["curves"]["validation"]] == [0, 512]
    for figure in ("54.6", "30.0", "60%"):  # pruned and distilled perplexity, gap closed
        assert figure in text, figure


def test_the_headline_and_the_warnings_name_what_got_worse(run: Path, tmp_path: Path) -> None:
    measured = evaluation()
    measured["models"]["distilled"]["quality"] |= {"kl_to_teacher": 1.2, "top1_agreement": 0.5}
    (run / "eval" / "eval.json").write_text(json.dumps(measured))
    text = write_report(run, tmp_path / "out").read_text(encoding="utf-8")
    worse = "KL to the teacher 0.900 → 1.200, Top-1 agreement with the teacher 60.0 % → 50.0 %"
    assert text.count(worse) == 2
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {"title": "Got worse", "value": "2", "note": f"since pruned: {worse}"} in facts["headline"]
    assert f"Worse in the distilled student than in the pruned one: {worse}." in facts["warnings"]


def draft_of(speed_up: float, generated: bool) -> dict[str, Any]:
    """A student as a draft, as eval.json has it."""
    way = {"tokens_per_call": 1.75, "tokens_per_call_along": 1.81, "speed_up": speed_up}
    lengths = [{"length": length, "check_cost": 1.1, "sampled": way, "greedy": way} for length in (1, 4)]
    really = {"acceptance": 0.625, "tokens_per_call": 2.25, "rounds": 9, "speed_up": 0.93}
    return {
        "best_length": 1, "tokens_per_call": 1.75, "speed_up": speed_up, "draft_cost": 0.5,
        "teacher_step_seconds": 0.02, "draft_step_seconds": 0.01, "draft_lengths": [1, 4], "lengths": lengths,
        "generated": {"length": 4, "tokens": 96, "sampled": really, "greedy": really} if generated else None,
    }  # fmt: skip


def test_students_that_were_tried_as_drafts_have_a_section(run: Path, tmp_path: Path) -> None:
    measured = evaluation()
    for name, speed_up, why in (("pruned", 0.81, "heads differ"), ("distilled", 1.23, None)):
        model = measured["models"][name]
        model["quality"] |= {"acceptance": 0.545, "acceptance_standard_error": 0.012}
        model["draft"] = draft_of(speed_up, why is None) | ({"generated_left_out": why} if why else {})
    (run / "eval" / "eval.json").write_text(json.dumps(measured))
    text = write_report(run, tmp_path / "out").read_text(encoding="utf-8")
    assert "drafts" in Page(text).ids
    section = text[text.index('<section id="drafts"') :].split("</section>")[0]
    for words in (
        "54.5 %", "± 1.2", "60.0 %", "1.75", "text 1.81", "0.81×", "1.23×", "4 drafted tokens", "1 drafted token<",
        "62.5 % accepted, 2.25 tokens a call", "0.50 of the teacher’s 20.0 ms", "5 tokens 1.10", "96 tokens",
        "Pruned generated nothing: heads differ",
    ):  # fmt: skip
        assert words in section, words
    rows = {row["key"]: row for row in json.loads((tmp_path / "out" / "report.json").read_text())["comparison"]}
    assert rows["speed_up"]["best"] == ["distilled"] and set(rows["speed_up"]["cells"]) == {"pruned", "distilled"}
    assert rows["acceptance"]["cells"]["distilled"]["text"] == "54.5 %"


@pytest.mark.parametrize(("device", "said"), [("cpu", False), ("cuda", True)])
def test_what_a_gpu_s_decode_speed_leaves_out_is_said(run: Path, tmp_path: Path, device: str, said: bool) -> None:
    measured = evaluation()
    for model in measured["models"].values():
        model["efficiency"] = {
            "prefill_tokens_per_second": 9.0, "decode_tokens_per_second": 9.0, "peak_memory_bytes": 9, "device": device
        }  # fmt: skip
    (run / "eval" / "eval.json").write_text(json.dumps(measured))
    write_report(run, tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    assert any("without CUDA graphs" in warning for warning in facts["warnings"]) == said


def test_a_step_on_the_way_that_moved_away_from_the_teacher_is_named(run: Path, tmp_path: Path) -> None:
    """No evaluation measures it, and what comes after it may look good beside it."""
    step = run / "steps" / "1-wide"
    (step / "logs").mkdir(parents=True)
    (step / "plan.json").write_bytes((run / "plan.json").read_bytes())
    rows = [
        {"kind": "validation", "step": 0, "loss": 1.0, "kd": 0.07, "top1_agree": 0.383},
        {"kind": "validation", "step": 6, "loss": 1.0, "kd": 0.4, "top1_agree": 0.4},
    ]
    (step / "logs" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report(run, tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    moved = "Distilling moved wide away from the teacher on held-out text: divergence from the teacher 0.07 → 0.40."
    assert [warning for warning in facts["warnings"] if "moved" in warning] == [moved]


@pytest.mark.parametrize(
    "names", [("teacher", "distilled"), ("teacher", "pruned", "distilled", "quantized_int4"), ("a", "b")]
)
def test_the_report_takes_any_list_of_models(run: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    """Names and order come from the evaluation; what compares models is shown where the models are there."""
    measured = evaluation()
    models = {name: {**measured["models"]["pruned"], "path": name} for name in names}
    samples = [{"prompt": "p", "outputs": {name: f"{name} goes on" for name in names}}]
    (run / "eval" / "eval.json").write_text(
        json.dumps({**measured, "models": models, "samples": samples, "differences": {}, "gap_closed": None})
    )
    text = write_report(run, tmp_path / "out").read_text(encoding="utf-8")
    titles = [name.replace("_", " ").capitalize() for name in names]
    assert re.findall(r'<th scope="col" class="number"><span class="dot [\w-]+"></span>(.*?)</th>', text) == titles
    assert re.findall(r"<p>(\w+) goes on</p>", text) == list(names)
    assert "Gap closed" not in text
    assert ("the ratio to the teacher" in text) == ("teacher" in names)
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(facts["comparison"][0]["cells"]) == list(names)
    assert ("Perplexity" in [tile["title"] for tile in facts["headline"]]) == ("teacher" in names)


def test_stages_that_the_report_does_not_know_come_in_the_order_of_the_run(run: Path, tmp_path: Path) -> None:
    manifest = json.loads((run / "stages" / "prune.json").read_text())
    for name in ("quantize", "align"):
        (run / "stages" / f"{name}.json").write_text(json.dumps(manifest | {"stage": name, "facts": {"bits": 4}}))
    (run / "status.json").write_text(json.dumps({"stages": {"align": {}, "prune": {}, "quantize": {}}}))
    write_report(run, tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [stage["stage"] for stage in facts["stages"]] == ["align", "prune", "quantize"]


def test_the_pruning_section_shows_every_kind_of_score(run: Path, tmp_path: Path) -> None:
    plan = json.loads((run / "plan.json").read_text())
    (only,) = plan["candidates"]
    masked = {"loss": 5.0, "kl": 1.25, "teacher_loss": 4.0, "tokens": 512, "compensate": "ridge"}
    figures = dict.fromkeys(("score_error", "accuracy", "accuracy_error", "behind", "behind_error"), 0.125)
    task = {**figures, "score": 0.625, "teacher_score": 0.75, "teacher_accuracy": 0.5, "items": 9}
    first = only | {
        "decode_ms": 12.5,
        "prefill_ms": 80.0,
        "masked": masked | {"task": task},
        "probes": [{"tokens": 64, "loss": 0.75}],
    }
    first["masked"]["acceptance"] = 0.4375
    plan["candidates"] = [first, only | {"ffn": 32, "masked": masked | {"kl": 2.5}}]
    plan["target"] |= {"kind": "decode", "asked": "13ms"}
    plan["methods"]["search"] = "probes"
    (run / "plan.json").write_text(json.dumps(plan))
    rows = [
        {"layer": layer, "role": role, "before": 0.5, "after": 0.25, "kept": 64, "of": 128}
        for layer in range(4) for role in ("down", "o")
    ]  # fmt: skip
    (run / "repair.json").write_text(json.dumps({"version": 1, "layers": rows}))
    text = write_report(run, tmp_path / "out").read_text(encoding="utf-8")
    for words in (
        "13ms per decoded token",
        "by short distillations",
        "12.5 ms",
        "0.7500",
        "2.5000",
        "down 50% → 25%",
        "over 9 items",
        "0.625 ± 0.125",
        "12.5 ± 12.5 %",
        "43.8 %",
    ):
        assert words in text, words
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    assert facts["repair"]["layers"] == rows
    curve = facts["cumulative"]["ffn"]
    assert curve["units"][0] == curve["mean"][0] == 0
    assert curve["mean"][-1] == pytest.approx(1)
    position = min(range(len(curve["units"])), key=lambda i: abs(curve["units"][i] - 0.5))
    assert curve["mean"][position] == pytest.approx(plan["retained"]["ffn"], abs=0.05)  # 64 of 128 units


def test_a_student_far_below_its_teacher_is_warned_about(run: Path, tmp_path: Path) -> None:
    plan = json.loads((run / "plan.json").read_text())
    plan["teacher_params"]["total"] = 5 * plan["student_params"]["total"]
    (run / "plan.json").write_text(json.dumps(plan))
    text = write_report(run, tmp_path / "out").read_text(encoding="utf-8")
    assert "5.0 times the student" in text
    assert json.loads((tmp_path / "out" / "report.json").read_text())["capacity"]["ratio"] == pytest.approx(5)


def test_the_plots_mark_every_axis_that_was_cut(run: Path, tmp_path: Path, tiny_llama_dir: Path) -> None:
    teacher = json.loads((tiny_llama_dir / "config.json").read_text())
    settings = {"heads": 3, "kv_heads": 1, "ffn": 64}
    config = build_config({"name": "t", "run_dir": "r", "teacher": {"path": "t"}, "prune": settings}, "here")
    scores = load_file(run / "importance" / "scores.safetensors")
    scores["kv_heads.output_energy"] = np.random.default_rng(2).random((4, 2), dtype=np.float32)
    save_file(scores, run / "importance" / "scores.safetensors")
    summary = json.loads((run / "importance" / "scores.json").read_text())
    summary["units"]["kv_heads.output_energy"] = "energy"
    (run / "importance" / "scores.json").write_text(json.dumps(summary))
    make_plan(teacher, load_family(teacher, "t"), scores, config.prune).save(run / "plan.json")
    text = write_report(run, tmp_path / "out").read_text(encoding="utf-8")
    assert "Crosses mark the 12 of 24 that were cut" in text  # query heads
    assert "Crosses mark the 4 of 8 that were cut" in text  # kv heads


def test_the_same_files_give_the_same_bytes(run: Path, tmp_path: Path) -> None:
    first, second = (write_report(run, tmp_path / name).read_bytes() for name in ("a", "b"))
    assert first == second


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (["eval/eval.json"], "have not been evaluated yet"),
        (["eval/eval.json", "logs/metrics.jsonl"], "has not been distilled yet"),
        (["eval/eval.json", "logs/metrics.jsonl", "plan.json"], "no plan yet"),
        (
            ["eval/eval.json", "logs/metrics.jsonl", "plan.json", "importance/scores.safetensors", "config.yaml"],
            "no importance scores",
        ),
    ],
)
def test_an_unfinished_run_says_what_is_missing(run: Path, tmp_path: Path, gone: list[str], said: str) -> None:
    for name in gone:
        (run / name).unlink()
    text = write_report(run, tmp_path / "out").read_text(encoding="utf-8")
    assert said in text
    assert set(SECTIONS) <= set(Page(text).ids)


def test_a_damaged_file_is_named(run: Path, tmp_path: Path) -> None:
    (run / "eval" / "eval.json").write_text("{")
    with pytest.raises(FileError, match=r"eval\.json"):
        write_report(run, tmp_path / "out")
    with pytest.raises(RunFolderError, match="does not exist"):
        write_report(tmp_path / "nowhere", tmp_path / "out")


def test_the_report_needs_no_torch() -> None:
    code = "import sys; import kdscale.report.html; raise SystemExit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_experts_have_a_row_and_a_map_of_their_own() -> None:
    from kdscale.report.facts import _kept, _shape
    from kdscale.report.importance_plots import importance

    lists = {"ffn": [[0], [0], [1], [1]], "heads": [[0], [0]], "kv_heads": [[0], [0]], "hidden": [0, 1]}
    plan = {
        "teacher": {"layers": 2, "ffn": 2, "experts": 3},
        "student": {"layers": 2, "ffn": 1, "experts": 2},
        "methods": {"experts": "output_norm"},
        "kept": {"layers": [0, 1], "experts": [[0, 2], [1, 2]], **lists},
    }
    rows = {row["axis"]: (row["teacher"], row["student"]) for row in _shape(plan)}
    assert rows["experts"] == (3, 2)
    scores = {"experts.output_norm": [[3.0, 1.0, 2.0], [0.5, 1.0, 2.0]]}
    (plot,) = importance({"importance": {"scores": scores}, "plan": plan, "kept": _kept(plan)})
    assert "2 of 6 that were cut" in plot.caption
    dense = {**plan, "teacher": {"layers": 2, "experts": 0}, "student": {"layers": 2, "experts": 0}}
    assert [row["axis"] for row in _shape(dense)] == ["layers"]
