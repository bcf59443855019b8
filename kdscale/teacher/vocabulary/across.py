"""A source of targets from a teacher with another tokenizer: it reads the same text in its own tokens.

The text of a batch is cut again on the host, one batch ahead; the teacher is asked at its own positions, and what it
says is put into the student's tokens (mapped.py), so that everything after that knows no difference.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from kdscale.config.distill.settings import DistillConfig
from kdscale.config.distill.targets import Needs
from kdscale.config.distill.teachers import AlignmentConfig
from kdscale.errors import CheckpointError, ConfigError
from kdscale.models.documents import Documents
from kdscale.models.loading import load_tokenizer
from kdscale.models.tokenizer.token_bytes import Vocabulary, VocabularyMap
from kdscale.teacher.source import MicroBatch, OpenedSource, SourceRequest, TargetSource
from kdscale.teacher.targets import Targets, TopKTargets
from kdscale.teacher.vocabulary.alignment import Retold, retell
from kdscale.teacher.vocabulary.mapped import Alignment, mapped, measured, unmatched

ABLE = ("online", "served")  # sources that can be asked about a text cut otherwise


class AcrossTokenizers:
    """A source around one whose tokens are others; it gives the top K, of which each row has one entry more."""

    def __init__(self, source: TargetSource, vocabularies: VocabularyMap, gives: Needs):
        self.model, self.gives = source.model, gives
        self._source, self._vocabularies = source, vocabularies
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="retelling")
        self._coming: dict[tuple[tuple[str, int], ...], Future[Retold]] = {}

    def prefetch(self, batch: MicroBatch) -> None:
        """Begin to cut the text of a batch that is on the CPU."""
        if batch.sequences and batch.sequences not in self._coming:
            self._coming[batch.sequences] = self._pool.submit(self._retell, batch)

    def targets(self, batch: MicroBatch) -> Targets:
        """The teacher's top K in the student's tokens, for the batch's rows."""
        retold, asked = self._asked(batch)
        rest = None
        if self.gives.unmatched:
            rest = unmatched(asked, retold, self._vocabularies, batch.labels_N)
        return Targets(rows=batch.rows, top_k=mapped(asked, retold, self._vocabularies, batch.labels_N), unmatched=rest)

    def alignment(self, batch: MicroBatch) -> Alignment:
        """How much of the teacher's top K has its match in the student's vocabulary, on the batch's rows."""
        retold, top_k = self._asked(batch)
        return measured(top_k, retold, self._vocabularies, batch.labels_N)

    def close(self) -> None:
        """Cut no more text, and close the teacher's source."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._source.close()

    def _retell(self, batch: MicroBatch) -> Retold:
        tensors = (batch.input_ids_BS, batch.position_ids_BS, batch.rows_N, batch.labels_N)
        return retell(self._vocabularies, *(tensor.cpu().numpy() for tensor in tensors))

    def _asked(self, batch: MicroBatch) -> tuple[Retold, TopKTargets]:
        coming = self._coming.pop(batch.sequences, None)
        retold = self._retell(batch) if coming is None else coming.result()
        if len(retold.rows["place"]) != batch.rows:  # it was begun for other rows of these sequences
            retold = self._retell(batch)
        device = batch.rows_N.device
        positions = torch.from_numpy(retold.positions_BP)
        ids, rows = (torch.from_numpy(array).to(device) for array in (retold.ids_BP, retold.rows_M))
        asked = replace(
            batch, input_ids_BS=ids, position_ids_BS=positions.to(device), rows_N=rows, labels_N=torch.zeros_like(rows),
            documents=Documents.of(positions).to(device), tags_N=None,
        )  # fmt: skip
        top_k = self._source.targets(asked).top_k
        assert top_k is not None, "the config has checked that the source gives it"
        return retold, top_k


def has_other_tokens(settings: DistillConfig, folder: Path, request: SourceRequest) -> bool:
    """Whether the teacher in `folder`, which comes from the source of `settings`, has other tokens than the student."""
    if folder == request.teacher_dir or settings.source.name not in ABLE:
        return False
    trust = request.cfg.teacher.trust_remote_code
    own, other = (load_tokenizer(path, trust).get_vocab() for path in (request.student_dir, folder))
    return own != other


def check_across(distill: DistillConfig, name: str) -> None:
    """Raises ConfigError where the teacher of this name, whose tokens are not the student's, cannot teach it."""
    settings, needs = distill.by_teacher()[name], distill.needs
    problems = [
        words
        for words, wrong in (
            (f"teacher_placement: {settings.teacher_placement}", settings.source.name not in ABLE),
            ("tensor_parallel above 1", distill.tensor_parallel > 1),
            ("sequence_parallel above 1", distill.sequence_parallel > 1),
            ("teacher_overlap", distill.teacher_overlap),
            ("targets: full", needs.full),
            ("targets: sampled", needs.sampled > 0),
            ("objectives on the probability of the text's own tokens", needs.label),
            ("tail: renormalised", needs.top_k > 0 and not needs.mass),
        )
        if wrong
    ]
    if problems:
        raise ConfigError(
            f"distill.teachers ({name}): its tokens are not the student's",
            expected="the teacher's top K (targets: topk, tail: bucket or truncated), asked in the ranks or served",
            got=", ".join(problems),
        )


def across_tokenizers(opened: OpenedSource, request: SourceRequest, settings: AlignmentConfig) -> OpenedSource:
    """The opened source of a teacher whose tokens differ from the student's, as one of the student's tokens.

    Raises CheckpointError for tokenizers that cannot be used.
    """
    trust = request.cfg.teacher.trust_remote_code
    teacher, student = (Vocabulary.open(folder, trust) for folder in (request.teacher_dir, request.student_dir))
    rows = teacher.size if opened.rows is None else min(opened.rows, teacher.size)
    if beyond := [token for token in (*teacher.prefix, teacher.end) if token >= rows]:
        raise CheckpointError(
            f"{request.teacher_dir}: the tokens that begin and end a text",
            expected=f"ids below the model's {rows} rows", got=", ".join(map(str, beyond)),
            hint="tokenizer_config.json names a token that the model was not trained with",
        )  # fmt: skip
    vocabularies = VocabularyMap(teacher, student, settings.other_pieces == "first_token", rows)

    def start(vocab_size: int) -> AcrossTokenizers:
        del vocab_size  # of the student's tokens, which the map knows
        source = opened.start(rows)
        gives = Needs(top_k=request.needs.top_k, temperature=None, unmatched=request.needs.unmatched)
        return AcrossTokenizers(source, vocabularies, gives)

    return OpenedSource(student.size, start)
