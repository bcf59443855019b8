"""Evaluation against naive computations with whole logits in fp64."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdscale.config.data import DataConfig, SourceConfig
from kdscale.config.evaluation.settings import EvalConfig
from kdscale.config.root import RuntimeConfig
from kdscale.data.batches import Batch
from kdscale.data.heldout import eval_batches
from kdscale.data.token_store import TokenStore
from kdscale.errors import CheckpointError, ConfigError, DataError
from kdscale.eval.quality import ScoringOptions, evaluate, score_models
from kdscale.eval.samples import Sampling, continue_prompts
from kdscale.eval.summary import (
    Scores,
    bits_per_byte,
    calibration_error,
    compare,
    headline,
    mean_and_error,
    perplexity_by_tag,
    summarise,
)
from kdscale.eval.token_stats import TokenStats, of_same_tokens, token_stats
from kdscale.models.head import OutputHead
from kdscale.runtime.progress import Reporter

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path, tiny_texts: list[str]) -> TokenStore:
    folder = tmp_path_factory.mktemp("eval-data")
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in tiny_texts))
    data = DataConfig(sources=(SourceConfig(path=str(folder / "text.jsonl")),), heldout_fraction=0.4)
    return TokenStore.build(
        folder / "data", data, AutoTokenizer.from_pretrained(tiny_llama_dir),
        eos_id=0, reporter=QUIET,
    )  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> dict[str, Path]:
    """The tiny teacher, and a student that is the teacher plus noise."""
    folder = tmp_path_factory.mktemp("noisy")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama_dir / name, folder / name)
    return {"teacher": tiny_llama_dir, "pruned": folder}


@pytest.fixture(scope="module")
def batches(store: TokenStore) -> list[Batch]:
    return list(eval_batches(store.split("heldout"), 48, 2, 400))


def naive_logprobs(folder: Path, batches: list[Batch]) -> torch.Tensor:
    """log q of every scored position over the whole vocabulary, [N, V] fp64."""
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    rows = []
    with torch.no_grad():
        for batch in batches:
            logits = model(input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False).logits
            rows.append(logits[batch.labels_BS != -100].log_softmax(-1))
    return torch.cat(rows)


def test_every_figure_is_what_whole_logits_give(models: dict[str, Path], batches: list[Batch]) -> None:
    settings = ScoringOptions(torch.device("cpu"), torch.float32, chunk_bytes=320 * 4 * 7)  # seven rows a chunk
    scores, _ = score_models(models, batches, settings, QUIET)
    text_bytes = sum(batch.text_bytes for batch in batches)
    labels = torch.cat([batch.labels_BS[batch.labels_BS != -100] for batch in batches])
    p, q = (naive_logprobs(models[name], batches) for name in ("teacher", "pruned"))
    found = summarise(scores["pruned"], text_bytes)
    ce = -q.gather(1, labels[:, None]).mean().item()
    assert found["ce"] == pytest.approx(ce, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(ce), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(ce * len(labels) / math.log(2) / text_bytes, rel=1e-6)
    assert found["kl_to_teacher"] == pytest.approx((p.exp() * (p - q)).sum(1).mean().item(), rel=1e-4)
    assert found["top1_agreement"] == (p.argmax(1) == q.argmax(1)).double().mean().item()
    assert found["top1_accuracy"] == (q.argmax(1) == labels).double().mean().item()
    confidence, choice = q.exp().max(1)
    bins = (confidence * 15).ceil().clamp(1, 15).long() - 1
    error = 0.0
    for index in range(15):
        inside = bins == index
        if inside.any():
            gap = (choice == labels)[inside].double().mean() - confidence[inside].mean()
            error += inside.double().mean().item() * abs(gap.item())
    assert found["expected_calibration_error"] == pytest.approx(error, abs=1e-6)
    assert summarise(scores["teacher"], text_bytes)["kl_to_teacher"] is None


def test_rows_of_no_token_change_no_figure() -> None:
    """Two heads of one tokenizer, of which the teacher's has 16 large rows more: they get no probability."""
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(rows, 8, generator=generator) for rows in (40, 40)]
    padded = OutputHead(torch.cat([weights[0], torch.full((16, 8), 3.0)]))
    hidden_NH, labels_N = torch.randn(11, 8, generator=generator), torch.arange(11)
    found = []
    for teacher in (OutputHead(weights[0]), padded):
        own, student = of_same_tokens({"teacher": teacher, "start": OutputHead(weights[1])}, lambda: 40)
        of_teacher, (of_student,) = token_stats(own, hidden_NH, [(student, hidden_NH)], labels_N)
        found.append((of_teacher.as_columns(False), of_student.as_columns(True)))
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(plain, other)
    with pytest.raises(CheckpointError, match="differ in vocabulary"):
        of_same_tokens({"teacher": padded, "start": OutputHead(weights[1])}, lambda: 41)


def test_scored_bytes_are_those_of_the_text(store: TokenStore, batches: list[Batch], tiny_llama_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    labels = torch.cat([batch.labels_BS[batch.labels_BS != -100] for batch in batches]).tolist()
    text = "".join(tokenizer.decode([label]) for label in labels if label != 0)
    assert sum(batch.text_bytes for batch in batches) == len(text.encode())


def test_figures_do_not_depend_on_the_batch_size(models: dict[str, Path], store: TokenStore) -> None:
    settings = ScoringOptions(torch.device("cpu"), torch.float32)
    found = []
    for micro_batch in (1, 3):
        batches = list(eval_batches(store.split("heldout"), 48, micro_batch, 400))
        scores, _ = score_models(models, batches, settings, QUIET)
        found.append(summarise(scores["pruned"], sum(batch.text_bytes for batch in batches)))
    for key, value in found[0].items():
        assert found[1][key] == pytest.approx(value, rel=1e-5), key


def test_a_whole_evaluation_compares_and_samples(models: dict[str, Path], store: TokenStore, tmp_path: Path) -> None:
    config = EvalConfig(
        tokens=200,
        seq_len=32,
        prompts=("The river", "And the"),
        sample_tokens=5,
        sample_temperature=0.0,
        efficiency=False,
    )
    result = evaluate(models, store.folder, config, RuntimeConfig(threads=1), tmp_path / "eval.json", QUIET)
    assert json.loads((tmp_path / "eval.json").read_text()) == result
    assert result["settings"]["tokens"] == 200
    assert result["differences"]["pruned_minus_teacher"]["ce"] == pytest.approx(
        result["models"]["pruned"]["quality"]["ce"] - result["models"]["teacher"]["quality"]["ce"]
    )
    tokenizer = AutoTokenizer.from_pretrained(models["teacher"])
    model = AutoModelForCausalLM.from_pretrained(models["teacher"]).eval()
    inputs = tokenizer("The river", return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    expected = tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert result["samples"][0]["outputs"]["teacher"] == expected


def test_samples_begin_as_the_documents_do_and_do_not_end(tiny_llama_dir: Path) -> None:
    """The store's prefix comes before a prompt, and a suffix of the tokenizer does not follow it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<|end|> $A <|end|>", special_tokens=[("<|end|>", 0)])
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()
    ids = torch.tensor([[0, *tokenizer("The river", add_special_tokens=False)["input_ids"]]])
    generated = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    expected = tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)
    assert continue_prompts(model, tokenizer, ["The river"], 5, Sampling(), prefix_ids=(0,)) == [expected]
    assert continue_prompts(model, tokenizer, ["The river"], 5, Sampling()) != [expected]
    tokenizer.add_tokens(["<beyond>"])
    with pytest.raises(DataError, match=r"eval.prompts(.|\n)*below 320"):
        continue_prompts(model, tokenizer, ["see <beyond>"], 5, Sampling())


def test_any_list_of_models_is_evaluated(models: dict[str, Path], store: TokenStore, tmp_path: Path) -> None:
    config = EvalConfig(tokens=100, seq_len=32, prompts=(), efficiency=False)
    many = {"teacher": models["teacher"], **dict.fromkeys(("pruned", "distilled", "quantized"), models["pruned"])}
    result = evaluate(many, store.folder, config, RuntimeConfig(threads=1), tmp_path / "eval.json", QUIET)
    assert list(result["models"]) == list(many)
    assert result["models"]["quantized"]["quality"] == result["models"]["pruned"]["quality"]
    assert result["gap_closed"] == 0
    assert len(result["differences"]) == 6
    assert list(headline(result)) == [*(f"{name} perplexity" for name in many), "gap closed"]
    with pytest.raises(ConfigError, match="one named teacher"):
        evaluate({"pruned": models["pruned"]}, store.folder, config, RuntimeConfig(), tmp_path / "e.json", QUIET)


def test_sampling_is_seeded_and_stays_in_the_nucleus() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()[[2, 0, 3, 1]]
    draws = [Sampling(temperature=1.0, top_p=0.75, seed=4).chooser() for _ in range(2)]
    first, second = ([choose(logits) for _ in range(200)] for choose in draws)
    assert first == second
    assert set(first) == {1, 3}  # 0.5, and 0.3 which crosses 0.75
    assert Sampling().chooser()(logits) == 1


def test_a_model_with_nan_is_refused(models: dict[str, Path], batches: list[Batch], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(models["pruned"])
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    model.save_pretrained(tmp_path)
    settings = ScoringOptions(torch.device("cpu"), torch.float32)
    with pytest.raises(CheckpointError, match="pruned model gives a loss that is not finite"):
        score_models({**models, "pruned": tmp_path}, batches, settings, QUIET)


def test_standard_error_counts_documents_not_tokens() -> None:
    rng = np.random.default_rng(0)
    documents = rng.normal(3.0, 0.5, size=200)
    values, clusters = np.repeat(documents, 50), np.repeat(np.arange(200), 50)
    mean, error = mean_and_error(values, clusters)
    assert mean == pytest.approx(documents.mean())
    assert error == pytest.approx(documents.std(ddof=1) / math.sqrt(200), rel=1e-6)
    assert mean_and_error(values[:50], clusters[:50])[1] is None


def test_differences_are_paired_and_their_errors_are_those_of_repeated_samples() -> None:
    """Documents drawn again and again spread as far as the standard errors of one draw say, also for calibration."""
    rng = np.random.default_rng(3)
    gaps, errors = [], []
    for _ in range(200):
        cluster_N = np.repeat(np.arange(60), 20)
        shared_N, level_N = rng.normal(size=1200), np.repeat(rng.normal(0, 0.05, size=60), 20)
        both = []
        for worse in (0.0, 0.1):
            confidence_N = np.clip(0.5 + 0.1 * shared_N + worse, 0.02, 0.98)
            correct_N = rng.random(1200) < np.clip(confidence_N - worse - 0.2 + level_N, 0, 1)
            stats = TokenStats(*(torch.tensor(x) for x in (3 + shared_N + level_N * worse, confidence_N, correct_N)))
            both.append(Scores(stats, np.zeros(1200), cluster_N))
        found = compare({"pruned": both[0], "distilled": both[1]})["distilled_minus_pruned"]
        gaps.append([found[key] for key in ("ce", "top1_accuracy", "expected_calibration_error")])
        errors.append([found[f"{key}_standard_error"] for key in ("ce", "top1_accuracy", "expected_calibration_error")])
    assert np.mean(errors, 0) == pytest.approx(np.std(gaps, 0), rel=0.2)
    ece = [calibration_error(scores.stats) for scores in both]
    assert found["expected_calibration_error"] == pytest.approx(ece[1] - ece[0], abs=1e-6)
    assert "kl_to_teacher" not in found


def test_each_source_has_its_own_perplexity() -> None:
    ce_N = torch.tensor([1.0, 3.0, 2.0, 5.0])
    scores = Scores(TokenStats(ce_N, ce_N, ce_N > 0), np.zeros(4, int), np.zeros(4, int))
    found = perplexity_by_tag(scores, np.asarray([2, 2, 0, 2]), ("books", "nothing", "chats"))
    assert list(found) == ["chats", "books"], "the most tokens first"
    assert found == pytest.approx({"chats": math.exp(3.0), "books": math.exp(2.0)})
    assert perplexity_by_tag(scores, np.zeros(4, int), ("books", "chats")) == {}, "one source is the whole"
    many = Scores(TokenStats(ce_N.repeat(25), ce_N, ce_N > 0), np.zeros(100, int), np.zeros(100, int))
    assert len(perplexity_by_tag(many, np.arange(100), [str(n) for n in range(100)])) == 12


def test_bits_per_byte_of_no_text_is_unknown() -> None:
    assert bits_per_byte(np.array([1.0]), 0) is None
