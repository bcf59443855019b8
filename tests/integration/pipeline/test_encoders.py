"""Runs on a tiny BERT: pruned, distilled, evaluated, reported and exported with the head that it came with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdscale.config.load import build_config
from kdscale.config.root import Config
from kdscale.data.encoders.reading import check_reading
from kdscale.errors import ConfigError
from kdscale.pipeline.runner import run_until
from kdscale.runs.metrics_log import read_metrics
from kdscale.runtime.progress import Reporter
from tests.integration.prune.family_table import save_teacher
from tests.tiny_encoder import save_tiny_encoder

MASKED = {
    "masking": {"share": 0.3},
    "objectives": [
        {"name": "token_divergence", "targets": "full", "temperature": 2.0, "ce_weight": 0.3},
        {"name": "hidden_states", "distance": "cosine", "layers": {1: 3}},
        {"name": "attention", "layers": {1: 3}},
    ],
}
TOLD_CLASSES = {"objectives": [{"name": "classification", "ce_weight": 0.2}], "tokens": 4 * 4 * 48, "dropout": False}
EMBEDDED = {"objectives": [{"name": "sentence_embeddings"}], "dropout": False}


@pytest.fixture(scope="module")
def texts(tiny_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    pairs = zip(tiny_texts, tiny_texts[::-1], strict=True)
    file.write_text("".join(json.dumps({"text": f"{one} {other}"}) + "\n" for one, other in pairs))
    return file


@pytest.fixture(scope="module")
def make_config(texts: Path, tiny_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """A run in `folder` of a teacher with this head, which is made once."""
    made: dict[str, Path] = {}

    def make(folder: Path, architecture: str, distill: dict[str, Any], **sections: Any) -> Config:
        if architecture not in made:
            pooling = "cls" if architecture == "BertModel" else None
            made[architecture] = save_tiny_encoder(
                tmp_path_factory.mktemp(architecture), tiny_texts, architecture, pooling
            )
        settings = {
            "tokens": 8 * 4 * 48, "seq_len": 48, "global_batch": 4, "micro_batch": 2, "dtype": "float32",
            "optimizer": {"lr": 3e-3, "warmup_steps": 2}, "validate_every": 4, "validate_tokens": 400,
            "checkpoint_every": 3, **distill,
        }  # fmt: skip
        tree = {
            "name": "tiny", "run_dir": str(folder), "seed": 5, "teacher": {"path": str(made[architecture])},
            "data": {"sources": [{"path": str(texts)}], "heldout_fraction": 0.4, "sentences": True, "share": False},
            "importance": {"calibration_tokens": 480, "seq_len": 48}, "prune": {"layers": 2, "ffn": 32},
            "distill": settings, "eval": {"tokens": 1200, "seq_len": 48, "prompts": [], "efficiency": False},
            "runtime": {"device": "cpu", "threads": 1}, **sections,
        }  # fmt: skip
        return build_config(tree, "test")

    return make


@pytest.fixture(scope="module")
def told(make_config, tmp_path_factory) -> Config:
    """A finished run of an encoder that tells hidden tokens."""
    config = make_config(tmp_path_factory.mktemp("told") / "run", "BertForMaskedLM", MASKED)
    run_until(config, "report", Reporter(quiet=True))
    return config


def validations(config: Config) -> list[dict[str, Any]]:
    return [row for row in read_metrics(Path(config.run_dir) / "logs" / "metrics.jsonl") if row["kind"] == "validation"]


def test_an_encoder_learns_to_tell_hidden_tokens_as_its_teacher_does(told) -> None:
    before, *_, after = validations(told)
    for name in ("kd", "ce", "attention_kl"):
        assert after[name] < before[name], name
    assert after["hidden_cosine"] > before["hidden_cosine"]
    evaluation = json.loads((Path(told.run_dir) / "eval" / "eval.json").read_text())
    pruned, distilled = (evaluation["models"][name]["quality"] for name in ("pruned", "distilled"))
    assert distilled["kl_to_teacher"] < pruned["kl_to_teacher"]
    assert distilled["perplexity"] < pruned["perplexity"]
    assert evaluation["settings"]["hidden_tokens"] < 0.25 * evaluation["settings"]["tokens"]
    page = (Path(told.run_dir) / "report" / "report.html").read_text()
    assert "Similarity kept" in page


def test_the_student_is_a_bert_that_transformers_loads_with_its_head(told) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    folder = Path(told.run_dir) / "student"
    model, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (2, 32)
    kept = json.loads((Path(told.run_dir) / "plan.json").read_text())["kept"]["layers"]
    assert kept == [0, 3]  # spread over the depth
    text = AutoTokenizer.from_pretrained(folder)("the [MASK] ran past an old mill.", return_tensors="pt")
    with torch.no_grad():
        assert model(text["input_ids"]).logits.isfinite().all()


def test_a_killed_run_hides_the_same_tokens_and_ends_with_the_same_bytes(told, make_config, tmp_path, dies_at_step):
    shutil.copytree(told.run_dir, tmp_path / "run")
    for item in ("student", "checkpoints", "stages/distill.json"):
        path = tmp_path / "run" / item
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    config = make_config(tmp_path / "run", "BertForMaskedLM", MASKED)
    with dies_at_step(5):
        run_until(config, "distill", Reporter(quiet=True))
    run_until(config, "distill", Reporter(quiet=True))
    resumed, whole = (Path(folder) / "student" / "model.safetensors" for folder in (config.run_dir, told.run_dir))
    assert resumed.read_bytes() == whole.read_bytes()


def test_a_sentence_encoder_comes_nearer_to_its_teacher_and_keeps_its_files(make_config, tmp_path) -> None:
    config = make_config(tmp_path / "run", "BertModel", EMBEDDED)
    run_until(config, "report", Reporter(quiet=True))
    before, *_, after = validations(config)
    assert after["embedding_cosine"] > before["embedding_cosine"]
    evaluation = json.loads((tmp_path / "run" / "eval" / "eval.json").read_text())
    assert evaluation["settings"]["pooling"] == "cls"
    pruned, distilled = (evaluation["models"][name]["quality"] for name in ("pruned", "distilled"))
    assert distilled["similarity_kept"] > pruned["similarity_kept"]
    assert distilled["perplexity"] is None
    teacher, student = Path(config.teacher.path), tmp_path / "run" / "student"
    for name in ("modules.json", "1_Pooling/config.json", "tokenizer.json"):
        assert (student / name).read_bytes() == (teacher / name).read_bytes(), name
    tensors, own = load_file(student / "model.safetensors"), load_file(teacher / "model.safetensors")
    assert torch.equal(tensors["pooler.dense.weight"], own["pooler.dense.weight"])  # not trained
    assert not torch.equal(tensors["encoder.layer.0.output.dense.bias"], own["encoder.layer.0.output.dense.bias"])


def test_a_classifier_comes_nearer_to_its_teacher_with_and_without_the_classes_of_texts(
    make_config, texts, tmp_path
) -> None:
    lines = [json.loads(line) for line in texts.read_text().splitlines()]
    for number, line in enumerate(lines):
        line["kind"] = [0, "LABEL_1", None][number % 3]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"sources": [{"path": str(tmp_path / "texts.jsonl"), "class_field": "kind"}], "heldout_fraction": 0.4}
    config = make_config(tmp_path / "run", "BertForSequenceClassification", TOLD_CLASSES, data={**data, "share": False})
    run_until(config, "eval", Reporter(quiet=True))
    before, *_, after = validations(config)
    assert after["class_kl"] < before["class_kl"]
    models = json.loads((tmp_path / "run" / "eval" / "eval.json").read_text())["models"]
    teacher, pruned, distilled = (models[name]["quality"] for name in ("teacher", "pruned", "distilled"))
    assert distilled["class_kl"] < pruned["class_kl"]
    assert 0 < teacher["texts_of_known_class"] < teacher["texts"]
    assert teacher["class_agreement"] is None and 0 < teacher["class_accuracy"] < 1
    weights, cut = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("student", "pruned"))
    for name in ("classifier.weight", "bert.pooler.dense.weight"):  # the head is trained and exported
        assert not torch.equal(weights[name], cut[name]), name


@pytest.mark.long
@pytest.mark.parametrize(
    ("architecture", "distill"),
    [("ModernBertForMaskedLM", MASKED), ("XLMRobertaForMaskedLM", MASKED), ("XLMRobertaModel", EMBEDDED)],
)
def test_encoders_of_other_families_come_nearer_to_their_teacher(make_config, tmp_path, architecture, distill) -> None:
    config = make_config(tmp_path / "run", architecture, distill)
    run_until(config, "report", Reporter(quiet=True))
    before, *_, after = validations(config)
    assert after["loss"] < before["loss"]
    embed = next(name for name in load_file(tmp_path / "run" / "student" / "model.safetensors") if "mbeddings" in name)
    student, pruned = (load_file(tmp_path / "run" / f / "model.safetensors")[embed] for f in ("student", "pruned"))
    assert not torch.equal(student, pruned)  # a tied embedding is trained, by whichever name


@pytest.mark.parametrize(
    ("architecture", "distill", "sections", "named"),
    [
        ("BertModel", {}, {}, "token_divergence"),
        ("BertForMaskedLM", {}, {}, "distill.masking"),
        ("BertForMaskedLM", {"on_policy": {"prompt_tokens": 8, "max_new_tokens": 8}}, {}, "distill.on_policy"),
        ("BertForSequenceClassification", EMBEDDED, {}, "classification among them"),
        ("BertModel", TOLD_CLASSES, {}, "tells none"),
        ("BertModel", EMBEDDED, {"data": {"sources": [{"path": "x", "class_field": "kind"}]}}, "class_field"),
        ("BertModel", EMBEDDED, {"quantize": {"forms": [{"name": "int8"}]}}, "quantize"),
        ("BertModel", EMBEDDED, {"eval": {"prompts": ["Once upon a time"]}}, "eval.prompts"),
        ("BertModel", EMBEDDED, {"prune": {"target_kv_bytes": "50%"}}, "target_kv_bytes"),
    ],
)
def test_what_an_encoder_cannot_do_is_refused_before_any_work(
    make_config, tmp_path, architecture, distill, sections, named
) -> None:
    config = make_config(tmp_path / "run", architecture, distill, **sections)
    with pytest.raises(ConfigError) as refused:
        check_reading(config, Path(config.teacher.path))
    assert named in str(refused.value)


def test_a_reranker_which_tells_one_number_is_refused(make_config, tmp_path) -> None:
    teacher = save_teacher("bert", tmp_path / "teacher", "BertForSequenceClassification", num_labels=1)
    with pytest.raises(ConfigError, match="two classes or more"):
        check_reading(make_config(tmp_path / "run", "BertForSequenceClassification", TOLD_CLASSES), teacher)


def test_what_only_an_encoder_can_do_is_refused_for_a_decoder(make_config, tmp_path, tiny_llama_dir) -> None:
    config = make_config(tmp_path / "run", "BertForMaskedLM", MASKED)
    with pytest.raises(ConfigError, match=r"distill\.masking; data\.sentences"):
        check_reading(config, tiny_llama_dir)
