"""Calibration, training and held-out text of one corpus, and how far a student is from its teacher on the held-out.

    python benchmarks/quality/texts.py TEACHER CORPUS --seed 1 STUDENT...       one JSON row for each model
    python benchmarks/quality/texts.py TEACHER CORPUS --seed 1 --training train.jsonl

CORPUS is a .jsonl or .jsonl.gz of documents with a `source`, which is their kind. The kinds named OTHER are held out
whole: no student sees them in calibration or in training. An eighth of the documents of every KNOWN kind, drawn anew
for each seed, is held out too; calibration and training text come from the rest. A sequence is the start of a
document, after the tokenizer's BOS where it has one, and the kinds take turns.

In another script of this folder:

    texts = Texts.read(corpus, teacher, seed=1, calibration_tokens=24_576)
    texts.calibration_NS, texts.known_NS, texts.other_NS       # ids, int64
    texts.write_training("train.jsonl")
    yardstick = Yardstick.read(teacher, texts, "/tmp/me/teacher-1.safetensors")   # the teacher runs once
    yardstick.measure(folder_or_model)     # {"known": {"perplexity", "ratio", "kl", "agreement"}, "other": {...}}

Letters: N sequences, S their length, T scored tokens, C tokens of one block, V vocabulary, K kept entries.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdscale.config.data import SourceConfig
from kdscale.data.sources import Document, read_documents
from kdscale.files import sha256_file, write_text
from kdscale.models.head import final_hidden, head_of
from kdscale.models.loading import load_model, load_tokenizer, read_tokenizer_config, special_tokens
from kdscale.runtime.device import resolve_dtype, set_threads

OTHER = ("gcide", "git_doc", "jargon", "kjv", "py_stdlib_code")
HELD_OUT_SHARE = 8  # one document in so many
SEQ_LEN = 512
KEPT = 512  # of the teacher's logits, for each scored token
BLOCK_BYTES = 64 << 20  # of one fp32 block of logits
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Texts:
    """Token ids of one seed, each [N, S] int64 and beginning with BOS where the tokenizer has one."""

    calibration_NS: Tensor
    known_NS: Tensor
    other_NS: Tensor
    known_kinds: tuple[str, ...]  # of each sequence
    other_kinds: tuple[str, ...]
    training: tuple[Document, ...]  # of KNOWN kinds, none of them held out
    identity: str  # changes with whatever the ids depend on

    @classmethod
    def read(
        cls,
        corpus: Path | str,
        tokenizer_folder: Path | str,
        *,
        seed: int = 1,
        other: Sequence[str] = OTHER,
        calibration_kinds: Sequence[str] | None = None,
        calibration_tokens: int = 24_576,
        known_rows: int = 1,
        other_rows: int = 2,
        seq_len: int = SEQ_LEN,
    ) -> Texts:
        """`*_rows`: held-out sequences of each kind; `calibration_kinds`: all KNOWN ones unless it names some."""
        by_kind: dict[str, list[Document]] = {}
        for document in read_documents(SourceConfig(path=str(corpus))):
            by_kind.setdefault(document.source, []).append(document)
        if missing := set(other) - set(by_kind):
            raise SystemExit(f"no documents of kind {', '.join(sorted(missing))} in {corpus}")
        tokenizer = load_tokenizer(Path(tokenizer_folder))
        prefix = special_tokens(tokenizer, read_tokenizer_config(Path(tokenizer_folder))).prefix
        rng = random.Random(seed)
        held, rest = {}, {}
        for kind in sorted(by_kind):
            documents = by_kind[kind]
            rng.shuffle(documents)
            border = len(documents) // HELD_OUT_SHARE
            held[kind], rest[kind] = documents[:border], documents[border:]
        known = [kind for kind in sorted(by_kind) if kind not in other]

        def ids(kinds: Sequence[str], of: dict[str, list[Document]], rows: int) -> dict[str, Tensor]:
            return {kind: sequences(tokenizer, prefix, of[kind], seq_len, rows) for kind in kinds}

        count = calibration_tokens // seq_len
        calibrating = list(calibration_kinds or known)
        rows = ids(calibrating, rest, -(-count // len(calibrating))).values()
        turns = [ids_NS[i] for i in range(max(map(len, rows))) for ids_NS in rows if i < len(ids_NS)][:count]
        known_ids, other_ids = ids(known, held, known_rows), ids(list(other), held, other_rows)
        return cls(
            torch.stack(turns),
            torch.cat(list(known_ids.values())),
            torch.cat(list(other_ids.values())),
            tuple(kind for kind, ids_NS in known_ids.items() for _ in ids_NS),
            tuple(kind for kind, ids_NS in other_ids.items() for _ in ids_NS),
            tuple(document for kind in known for document in rest[kind]),
            f"{sha256_file(Path(corpus))[:12]} {sha256_file(Path(tokenizer_folder) / 'tokenizer.json')[:12]} {seed} "
            f"{seq_len} {known_rows} {other_rows} {','.join(other)}",
        )

    def write_training(self, path: Path | str, kinds: Sequence[str] | None = None, chars: int | None = None) -> Path:
        """One JSON line for each training document, with `text` and `source`.

        `kinds`: of these alone; `chars`: no more documents of a kind once it has so many characters.
        """
        path, rows, taken = Path(path), [], dict.fromkeys(set(self.known_kinds), 0)
        for document in self.training:
            kind = document.source
            if (kinds is None or kind in kinds) and (chars is None or taken[kind] < chars):
                taken[kind] += len(document.text)
                rows.append(json.dumps({"text": document.text, "source": kind}))
        write_text(path, "\n".join(rows) + "\n")
        return path


def sequences(tokenizer: Any, prefix: Sequence[int], documents: Sequence[Document], length: int, count: int) -> Tensor:
    """`count` sequences [N, S]: `prefix` and the start of a document; short documents are joined with the next ones."""
    out: list[list[int]] = []
    ids = list(prefix)
    for document in documents:
        ids += tokenizer(document.text[: 12 * length], add_special_tokens=False).input_ids
        if len(ids) >= length:
            out.append(ids[:length])
            ids = list(prefix)
        if len(out) == count:
            break
    return torch.tensor(out, dtype=torch.long).view(-1, length)


class Row(NamedTuple):
    """What is kept of the teacher's distribution, for T tokens: its K largest log-probabilities and their ids."""

    ids_TK: Tensor
    logprobs_TK: Tensor
    ce_T: Tensor


@dataclass(frozen=True)
class Yardstick:
    """The teacher on the held-out ids, beside which students are measured.

    Agreement is of the most likely token. KL is that between distributions over the teacher's `KEPT` most likely
    tokens and one more outcome for all the rest: a little less than over the whole vocabulary, for every student alike.
    """

    texts: Texts
    known: Row
    other: Row

    @classmethod
    def read(cls, teacher: Path | str, texts: Texts, cache: Path | str | None = None) -> Yardstick:
        """From the file `cache` where it is of these texts, else from the teacher; then `cache` is written."""
        cache = None if cache is None else Path(cache)
        identity = f"{texts.identity} {sha256_file(Path(teacher) / 'config.json')[:12]} {KEPT}"
        if cache is not None and cache.exists():
            kept = load_file(cache)
            if bytes(kept.pop("identity").tolist()).decode() == identity:
                return cls(texts, *(Row(*(kept[f"{name}.{field}"] for field in Row._fields)) for name in _NAMES))
        model = load(teacher)
        rows = {name: _kept(model, getattr(texts, f"{name}_NS")) for name in _NAMES}
        if cache is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            tensors = {f"{name}.{field}": tensor for name in _NAMES for field, tensor in rows[name]._asdict().items()}
            part = cache.with_name(cache.name + ".part")
            save_file(tensors | {"identity": torch.tensor(list(identity.encode()), dtype=torch.uint8)}, part)
            part.replace(cache)
        return cls(texts, **rows)

    def measure(self, student: Path | str | Any) -> dict[str, dict[str, float]]:
        """Perplexity, its ratio to the teacher's, KL and agreement, for `known` and `other`; folder or loaded model."""
        model = load(student) if isinstance(student, Path | str) else student
        return {name: compare(model, getattr(self.texts, f"{name}_NS"), getattr(self, name)) for name in _NAMES}

    def teacher_perplexity(self) -> dict[str, float]:
        """Of the teacher itself, for `known` and `other`."""
        return {name: float(getattr(self, name).ce_T.double().mean().exp()) for name in _NAMES}


_NAMES = ("known", "other")


def load(folder: Path | str) -> Any:
    """The model of a folder, ready to measure."""
    return load_model(Path(folder), dtype=resolve_dtype("auto", CPU), device=CPU).eval()


@torch.inference_mode()
def compare(model: Any, ids_NS: Tensor, teacher: Row) -> dict[str, float]:
    """A model's perplexity, the ratio, KL and agreement on sequences of which `teacher` has what the teacher said."""
    ce, kl, agrees, start = [], [], [], 0
    for logprobs_CV, labels_C in blocks(model, ids_NS):
        rows = slice(start, start := start + len(labels_C))
        ids_CK, teacher_CK = teacher.ids_TK[rows].long(), teacher.logprobs_TK[rows].double()
        ce.append(-logprobs_CV.gather(-1, labels_C[:, None])[:, 0].double())
        # in bf16 the teacher's first two are often equal: either one agrees
        likeliest_CK = ids_CK.where(teacher_CK == teacher_CK[:, :1], -1)
        agrees.append((logprobs_CV.argmax(-1, keepdim=True) == likeliest_CK).any(-1))
        student_CK = logprobs_CV.gather(-1, ids_CK).double()
        p_C, q_C = ((1 - side.exp().sum(-1)).clamp(min=1e-9) for side in (teacher_CK, student_CK))
        kl.append((teacher_CK.exp() * (teacher_CK - student_CK)).sum(-1) + p_C * (p_C / q_C).log())
    perplexity, dense = (float(values.mean().exp()) for values in (torch.cat(ce), teacher.ce_T.double()))
    return {
        "perplexity": perplexity,
        "ratio": perplexity / dense,
        "kl": float(torch.cat(kl).mean()),
        "agreement": float(torch.cat(agrees).double().mean()),
    }


@torch.inference_mode()
def _kept(model: Any, ids_NS: Tensor) -> Row:
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for logprobs_CV, labels_C in blocks(model, ids_NS):
        top = logprobs_CV.topk(min(KEPT, logprobs_CV.shape[1]), dim=-1)
        rows.append((top.indices.int(), top.values, -logprobs_CV.gather(-1, labels_C[:, None])[:, 0]))
    return Row(*(torch.cat(column) for column in zip(*rows, strict=True)))


def blocks(model: Any, ids_NS: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities [C, V] in fp32 and labels [C], a few rows at a time: no N×V tensor of many tokens is made."""
    head = head_of(model)
    rows = max(1, BLOCK_BYTES // (4 * head.vocab))
    for ids_BS in ids_NS.split(4):
        hidden_TH = final_hidden(model, ids_BS)[:, :-1].flatten(0, 1)
        labels_T = ids_BS[:, 1:].flatten()
        for hidden_CH, labels_C in zip(hidden_TH.split(rows), labels_T.split(rows), strict=True):
            yield nn.functional.log_softmax(head.logits(hidden_CH), dim=-1), labels_C


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("students", type=Path, nargs="*")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--known-rows", type=int, default=1, help="held-out sequences of each KNOWN kind")
    parser.add_argument("--other-rows", type=int, default=2, help="held-out sequences of each OTHER kind")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, help="file for what is kept of the teacher")
    parser.add_argument("--training", type=Path, help="write the training text here and measure nothing")
    arguments = parser.parse_intermixed_args()
    set_threads(arguments.threads)
    texts = Texts.read(
        arguments.corpus,
        arguments.teacher,
        seed=arguments.seed,
        known_rows=arguments.known_rows,
        other_rows=arguments.other_rows,
    )
    if arguments.training:
        texts.write_training(arguments.training)
        return
    yardstick = Yardstick.read(arguments.teacher, texts, arguments.cache)
    print(json.dumps({"model": str(arguments.teacher), **yardstick.teacher_perplexity()}), flush=True)
    for student in arguments.students:
        print(json.dumps({"model": str(student), **yardstick.measure(student)}), flush=True)


if __name__ == "__main__":
    main()
