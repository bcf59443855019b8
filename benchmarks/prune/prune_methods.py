"""Perplexity right after pruning, one JSON row for each shape and method, and the teacher's own in the first row.

    python benchmarks/prune/prune_methods.py TEACHER CORPUS --work /tmp/m --shape ffn=768,heads=6 --methods default
    python benchmarks/prune/prune_methods.py TEACHER CORPUS --work /tmp/m --shape hidden=512 --as-mistral
    python benchmarks/prune/prune_methods.py TEACHER CORPUS --work /tmp/m --shape layers=24 --methods loss,loss+linear

CORPUS is a .jsonl or .jsonl.gz of documents with a `source`. The first eighth of each source's documents (in a seeded
order) is held out; the calibration text comes from the rest: one sequence from the start of a document, the sources
taking turns. Held-out text comes in the same way from all sources, and from those named in --also.

--as-mistral labels a Llama checkpoint as Mistral in its own folder: the tensors, their names and the logits are the
same, and MistralConfig takes a hidden size that its number of heads does not divide, which LlamaConfig refuses.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from kdscale.config.data import SourceConfig
from kdscale.config.prune import ImportanceConfig, PruneConfig
from kdscale.data.sources import read_documents
from kdscale.files import write_json
from kdscale.models.loading import load_model, load_tokenizer, open_teacher
from kdscale.prune.apply import apply_plan
from kdscale.prune.importance import collect
from kdscale.prune.rotation import rotated_teacher
from kdscale.prune.search.hidden_basis import hidden_bases
from kdscale.prune.search.planning import make_plan
from kdscale.prune.stream_cut import StreamBasis
from kdscale.runs.importance_scores import load_scores
from kdscale.runtime.device import resolve_dtype, set_threads
from kdscale.runtime.progress import Reporter

CPU = torch.device("cpu")
_SLICED = {"compensate": "none", "hidden_method": "activation"}
_RIDGE = {"compensate": "ridge", "hidden_method": "activation"}
METHODS: dict[str, dict[str, Any]] = {
    "minitron": {**_SLICED, "ffn_method": "activation", "head_method": "activation"},
    "minitron+gamma": {**_RIDGE, "ffn_method": "activation", "head_method": "activation"},
    "energy": _SLICED,
    "energy+ridge": _RIDGE,
    "obs+ridge": {**_RIDGE, "ffn_method": "obs", "head_method": "obs"},
    "pca": {"compensate": "ridge", "hidden_method": "pca"},
    "refit": {"compensate": "two_stream", "hidden_method": "refit"},
    "two_stream b=0": {"compensate": "two_stream", "stream_correction": 0.0},
    "two_stream b=0.5": {"compensate": "two_stream", "stream_correction": 0.5},
    "two_stream b=1": {"compensate": "two_stream", "stream_correction": 1.0},
    "default": {},
}
_DEPTH: dict[str, dict[str, Any]] = {
    "block_influence": {"layer_method": "block_influence", "contiguous_layers": False},
    "block_influence block": {"layer_method": "block_influence", "contiguous_layers": True},
    "loss": {"layer_method": "loss", "contiguous_layers": False},
    "loss block": {"layer_method": "loss", "contiguous_layers": True},
    "angular": {"layer_method": "angular"},
    "last": {"layer_method": "last"},
}
METHODS |= _DEPTH | {f"{name}+linear": {**cfg, "layer_repair": "linear"} for name, cfg in _DEPTH.items()}


def main() -> None:
    arguments = parse()
    set_threads(arguments.threads)
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    folder = as_mistral(Path(arguments.teacher), work / "teacher") if arguments.as_mistral else Path(arguments.teacher)
    calibration, heldout = texts(arguments, folder)
    batches = [SimpleNamespace(input_ids_BS=ids, position_ids_BS=positions(ids)) for ids in calibration.split(4)]
    dense = {name: perplexity(folder, ids) for name, ids in heldout.items()}
    show({"method": "teacher", "perplexity": dense, "calibration_tokens": calibration.numel()})
    scores: dict[str, Any] = {}  # scores of the teacher hold for every shape
    for shape in arguments.shape:
        sizes = {axis: int(size) for axis, size in (item.split("=") for item in shape.split(","))}
        for name in arguments.methods.split(","):
            cfg = PruneConfig(**sizes, **METHODS[name])
            teacher, family = open_teacher(folder)
            if not set(needed(cfg)) <= set(scores):
                scores |= measure_scores(folder, batches, cfg, work / "scores", arguments.layer_tokens)
            started = time.monotonic()
            for basis in hidden_bases(teacher.config, family, cfg):
                plan = make_plan(basis.config, family, scores, basis.cfg)
                if basis.suits(plan):
                    break
            if plan.methods.hidden == "pca":
                teacher = rotated_teacher(teacher, family, scores)
            refits = plan.methods.hidden == "refit"
            stream_basis = StreamBasis.of(scores, plan.student.hidden) if refits else None
            out = work / "student"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            dtype = resolve_dtype("auto", CPU)
            apply_plan(
                teacher, family, plan, out, cfg,
                batches=batches, dtype=dtype, reporter=Reporter(quiet=True), basis=stream_basis,
            )  # fmt: skip
            seconds = time.monotonic() - started
            student = {text: perplexity(out, ids) for text, ids in heldout.items()}
            show(
                {
                    "shape": shape,
                    "method": name,
                    "perplexity": student,
                    "ratio": {text: student[text] / dense[text] for text in student},
                    "layers": plan.kept.layers,
                    "non_embedding": plan.student_params.non_embedding,
                    "total": plan.student_params.total,
                    "prune_seconds": round(seconds, 1),
                }
            )


def needed(cfg: PruneConfig) -> list[str]:
    """The score arrays that rank the axes that `cfg` cuts."""
    criteria = [cfg.criterion(axis) for axis in ("ffn", "heads", "layers") if getattr(cfg, axis)]
    return [row.name for row in criteria if row.collect] + (["hidden.activation"] if cfg.hidden else [])


def measure_scores(
    folder: Path, batches: list[Any], cfg: PruneConfig, out: Path, layer_tokens: int = 16384
) -> dict[str, Any]:
    """The importance scores of the model in `folder`, by way of their files in `out`."""
    teacher, family = open_teacher(folder)
    silent = Reporter(quiet=True)
    collect.score_teacher(teacher, family, batches, ImportanceConfig(layer_tokens=layer_tokens), cfg, out, CPU, silent)
    return dict(load_scores(out))


def as_mistral(teacher: Path, folder: Path) -> Path:
    """A folder with links to the teacher's weights, and a config that says Mistral."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for item in teacher.iterdir():
        if item.suffix == ".safetensors":
            (folder / item.name).symlink_to(item.resolve())
        elif item.is_file() and item.name != "config.json":  # what a student gets along must be no link
            shutil.copy2(item, folder / item.name)
    config = json.loads((teacher / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "llama":
        raise SystemExit(f"--as-mistral is for a llama checkpoint, this is {config['model_type']}")
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    write_json(folder / "config.json", config)
    return folder


def texts(arguments: argparse.Namespace, teacher: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Calibration ids [N, S] and held-out ids by name."""
    tokenizer, length = load_tokenizer(teacher), arguments.seq_len
    by_source: dict[str, list[str]] = {}
    for document in read_documents(SourceConfig(path=arguments.corpus)):
        by_source.setdefault(document.source, []).append(document.text)
    rng = random.Random(arguments.seed)
    heldout, rest = {}, {}
    for source in sorted(by_source):
        documents = by_source[source]
        rng.shuffle(documents)
        border = len(documents) // 8
        heldout[source] = rows(tokenizer, documents[:border], length, arguments.heldout_rows)
        sequences = -(-arguments.calibration_tokens // (length * len(by_source)))
        rest[source] = rows(tokenizer, documents[border:], length, sequences)
    turns = [ids[i] for i in range(max(map(len, rest.values()))) for ids in rest.values() if i < len(ids)]
    named = {"all": torch.cat(list(heldout.values()))}
    if arguments.also:
        named["also"] = torch.cat([heldout[source] for source in arguments.also.split(",")])
    return torch.stack(turns[: arguments.calibration_tokens // length]), named


def rows(tokenizer: Any, documents: list[str], length: int, count: int) -> Tensor:
    """The first `length` tokens of `count` documents; short documents are joined with the next ones."""
    out: list[list[int]] = []
    ids: list[int] = []
    for text in documents:
        ids += tokenizer(text[: 12 * length], add_special_tokens=False).input_ids
        if len(ids) >= length:
            out.append(ids[:length])
            ids = []
        if len(out) == count:
            break
    return torch.tensor(out, dtype=torch.long).view(-1, length)


def positions(ids_BS: Tensor) -> Tensor:
    """Position ids of sequences with one document each."""
    return torch.arange(ids_BS.shape[1]).expand_as(ids_BS)


@torch.inference_mode()
def perplexity(folder: Path, ids_NS: Tensor) -> float:
    """Of the model in `folder` on the sequences."""
    model = load_model(folder, dtype=resolve_dtype("auto", CPU), device=CPU)
    total = 0.0
    for ids_BS in ids_NS.split(4):
        logits = model(input_ids=ids_BS, use_cache=False).logits[:, :-1].float()
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), ids_BS[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / (ids_NS.shape[0] * (ids_NS.shape[1] - 1)))


def show(row: dict[str, Any]) -> None:
    """Print one JSON row."""
    print(json.dumps(row), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher")
    parser.add_argument("corpus")
    parser.add_argument("--work", required=True, help="folder for the scores and the student that is measured")
    parser.add_argument("--shape", action="append", required=True, help="sizes such as ffn=768,heads=6; repeatable")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"from: {', '.join(METHODS)}")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--layer-tokens", type=int, default=16384, help="of those, for layers by loss and by angle")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--heldout-rows", type=int, default=1, help="sequences of each source")
    parser.add_argument("--also", default="", help="sources to report on their own, by name, separated by commas")
    parser.add_argument("--as-mistral", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
