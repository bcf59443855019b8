"""What a smaller encoder keeps: the similarities of held-out sentences, and how well it tells hidden tokens or classes.

Similarity kept is Spearman's rank correlation, over all pairs of held-out documents (sentences, where data.sentences
cuts the text into them), of the cosines between their embeddings in the student and in the teacher: what searches and
clusters use of embeddings. Where the models tell hidden tokens, these are scored as quality.py scores next tokens: the
exponential of their mean loss is called pseudo-perplexity (arXiv 1910.14659, though of many tokens hidden at once).

M documents, H hidden size, P pairs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kdscale.config.distill.masking import MaskingConfig
from kdscale.config.evaluation.settings import EvalConfig
from kdscale.config.root import RuntimeConfig
from kdscale.data.batches import Batch
from kdscale.data.heldout import eval_batches
from kdscale.data.packing import IGNORED_LABEL
from kdscale.data.token_store import TokenStore
from kdscale.errors import ConfigError, DataError
from kdscale.eval.classes import tell_classes
from kdscale.eval.quality import SCHEMA_VERSION, ScoringOptions, score_models
from kdscale.eval.sizes import model_sizes
from kdscale.eval.summary import Scores, compare, gap_closed, perplexity_by_tag, scored_tags, summarise
from kdscale.families import load_family
from kdscale.files import write_json
from kdscale.models.attention import documents_apart
from kdscale.models.documents import Documents
from kdscale.models.head import final_hidden
from kdscale.models.layer_records import FinalStates
from kdscale.models.loading import load_model
from kdscale.runs.models import TEACHER
from kdscale.runtime.device import device_name, release_memory, resolve_device, resolve_dtype, set_threads
from kdscale.runtime.progress import Bar, Reporter
from kdscale.runtime.ranks import gather_rows, place_in_group
from kdscale.weights import read_config
from kdscale.weights.sentence_files import pooling_of

_GROUPS = 10  # of documents, whose figures' spread gives a standard error
_FEWEST = 3 * _GROUPS  # documents: a group needs more than one pair
_WITHOUT_TOKENS = dict.fromkeys(("perplexity", "bits_per_byte", "kl_to_teacher", "top1_agreement"))


def evaluate_encoders(
    models: Mapping[str, Path],
    data_dir: Path,
    cfg: EvalConfig,
    runtime: RuntimeConfig,
    out_path: Path | None,
    reporter: Reporter,
    *,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Measure `models` ("teacher" and any students) and write `out_path`; returns what it wrote, as quality.evaluate.

    Raises ConfigError without a teacher, DataError for fewer than 30 held-out documents.
    """
    if TEACHER not in models:
        raise ConfigError("the models to evaluate", expected="one named teacher", got=", ".join(models))
    started = time.monotonic()
    threads = set_threads(runtime.threads, place_in_group()[1])
    device = device or resolve_device(runtime.device)
    options = ScoringOptions(device, resolve_dtype(cfg.dtype, device))
    split = TokenStore.open(data_dir).split("heldout")
    batches = eval_batches(split, cfg.seq_len, cfg.micro_batch, cfg.tokens)
    config = read_config(models[TEACHER])
    family = load_family(config, str(models[TEACHER] / "config.json"))
    pooling = pooling_of(models[TEACHER]) or "mean"
    scores: dict[str, Scores] = {}
    masked: list[Batch] = []
    differences: dict[str, dict[str, Any]] = {}
    if family.head == "classes":
        of_texts = eval_batches(split, cfg.seq_len, cfg.micro_batch, cfg.tokens, task="classes")
        told, sizes, differences = tell_classes(models, of_texts, options, reporter)
        measured, documents = told, sum(batch.token_count for batch in of_texts)
    else:
        embedded, sizes = _embed_all(models, batches, pooling, options, reporter)
        measured = {name: similarity_kept(embedded[TEACHER], embedded[name]) for name in models if name != TEACHER}
        documents = len(embedded[TEACHER])
    if family.head == "masked_lm" and split.encoder is not None and split.encoder.mask_id is not None:
        masked = eval_batches(split, cfg.seq_len, cfg.micro_batch, cfg.tokens, task=MaskingConfig())
        scores, _ = score_models(models, masked, options, reporter)
        differences = compare(scores)
    if out_path is None:
        return {}
    quality = {
        name: {**(summarise(scores[name], 0) if name in scores else _WITHOUT_TOKENS), **measured.get(name, {})}
        for name in models
    }
    by_source = {name: perplexity_by_tag(score, scored_tags(masked), split.tags) for name, score in scores.items()}
    result = {
        "schema_version": SCHEMA_VERSION,
        "settings": {
            "split": "heldout", "tokens": sum(batch.token_count for batch in batches), "document_pieces": documents,
            "sequences": sum(len(batch.input_ids_BS) for batch in batches), "seq_len": cfg.seq_len,
            "micro_batch": cfg.micro_batch, "dtype": str(options.dtype).removeprefix("torch."), "device": device.type,
            "device_name": device_name(device.type), "threads": threads, "pooling": pooling,
            "hidden_tokens": sum(batch.token_count for batch in masked), "torch": str(torch.__version__),
        },
        "models": {
            name: {"path": str(models[name]), "quality": quality[name], "by_source": by_source.get(name, {}),
                   "size": {**sizes[name], "kv_cache_bytes_per_token": None}}
            for name in models
        },
        "differences": differences,
        "gap_closed": gap_closed({name: quality[name]["ce"] for name in scores}) if scores else None,
        "samples": [],
        "seconds": {"total": time.monotonic() - started},
    }  # fmt: skip
    write_json(out_path, result)
    return result


def similarity_kept(teacher_MG: np.ndarray, student_MH: np.ndarray) -> dict[str, float | None]:
    """What of the similarities between documents a student keeps, from embeddings of length 1.

    `similarity_kept`: Spearman's correlation of their cosines, with its standard error over groups of documents;
    `neighbour_kept`: the share of documents whose nearest other document is the teacher's; `embedding_cosine`: the mean
    cosine to the teacher's embedding, None where the widths differ.
    """
    kept = _spearman(*(_pairs(vectors) for vectors in (teacher_MG, student_MH)))
    groups = [
        _spearman(_pairs(teacher_MG[start::_GROUPS]), _pairs(student_MH[start::_GROUPS])) for start in range(_GROUPS)
    ]
    nearest = [_nearest(vectors) for vectors in (teacher_MG, student_MH)]
    same = teacher_MG.shape == student_MH.shape
    return {
        "similarity_kept": kept,
        "similarity_kept_standard_error": float(np.std(groups, ddof=1) / _GROUPS**0.5),
        "neighbour_kept": float(np.mean(nearest[0] == nearest[1])),
        "embedding_cosine": float((teacher_MG * student_MH).sum(1).mean()) if same else None,
    }


def _embed_all(
    models: Mapping[str, Path],
    batches: Sequence[Batch],
    pooling: Literal["mean", "cls"],
    options: ScoringOptions,
    reporter: Reporter,
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """Embeddings [M, H] fp64 of length 1 of the documents of all batches, and the sizes of each model."""
    rank, ranks = place_in_group()
    share = batches[rank::ranks]
    embedded, sizes = {}, {}
    total = sum(batch.input_ids_BS.numel() for batch in share) * len(models)
    with reporter.bar("embed", total) as bar:
        for name, path in models.items():
            model: Any = load_model(path, dtype=options.dtype, device=options.device)
            sizes[name] = model_sizes(model, path)
            own = [embed(model, batch, pooling, options.device) for batch in _counted(share, bar)]
            rows = torch.cat(own) if own else torch.empty(0, model.config.hidden_size)
            embedded[name] = torch.cat(gather_rows(rows)).double().numpy()
            del model
            release_memory()
    if len(embedded[TEACHER]) < _FEWEST:
        raise DataError(
            "the held-out text has too few documents to compare", expected=f"at least {_FEWEST}",
            got=str(len(embedded[TEACHER])), hint="raise eval.tokens or data.heldout_fraction",
        )  # fmt: skip
    return embedded, sizes


def _counted(batches: Sequence[Batch], bar: Bar) -> Any:
    for batch in batches:
        yield batch
        bar.advance(batch.input_ids_BS.numel())


def embed(model: Any, batch: Batch, pooling: Literal["mean", "cls"], device: torch.device) -> Tensor:
    """One vector of length 1, fp32 on the CPU, of each document of a batch: [M, H]."""
    documents = Documents.of(batch.position_ids_BS).to(device)
    with torch.inference_mode(), documents_apart(model), FinalStates(model) as final:
        final_hidden(model, batch.input_ids_BS.to(device), batch.position_ids_BS.to(device), documents)
    hidden_TH = final.hidden_BSH.flatten(0, 1).float().cpu()
    labelled_T = batch.labels_BS.flatten() != IGNORED_LABEL
    ends = np.cumsum(documents.lengths)
    out = []
    for begin, end in zip(ends - np.asarray(documents.lengths), ends, strict=True):
        if labelled_T[begin]:  # not padding
            out.append(hidden_TH[begin] if pooling == "cls" else hidden_TH[begin:end].mean(0))
    return F.normalize(torch.stack(out), dim=1)


def _pairs(unit_MH: np.ndarray) -> np.ndarray:
    """The cosines of all pairs, [P]."""
    return np.asarray((unit_MH @ unit_MH.T)[np.triu_indices(len(unit_MH), 1)])


def _spearman(one_P: np.ndarray, other_P: np.ndarray) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks."""
    return float(np.corrcoef(_ranks(one_P), _ranks(other_P))[0, 1])


def _ranks(values_P: np.ndarray) -> np.ndarray:
    _, of_value_P, counts = np.unique(values_P, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[of_value_P])


def _nearest(unit_MH: np.ndarray) -> np.ndarray:
    cosines_MM = unit_MH @ unit_MH.T
    np.fill_diagonal(cosines_MM, -np.inf)
    return np.asarray(cosines_MM.argmax(1))
