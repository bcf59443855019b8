"""A loaded transformers model as lm-evaluation-harness wants it, in bounded memory and shared by ranks.

The harness's own class for such models makes the logits of every position in the dtype of the model. Here sequences lie
in one row without padding, the head sees only positions whose tokens are scored, and log-probabilities are fp32.

B sequences of a batch, S positions of all of them, N scored tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from kdscale.errors import CheckpointError, DataError
from kdscale.eval.token_stats import CHUNK_BYTES, checked_head
from kdscale.models.attention import documents_apart
from kdscale.models.documents import Documents
from kdscale.models.head import OutputHead, final_hidden
from kdscale.runtime.progress import Bar
from kdscale.runtime.ranks import all_reduce_sum, gather, place_in_group, unequal_work

_BATCHES = 8  # between two signs of progress while texts are generated
_Request = tuple[tuple[str, str], list[int], list[int]]  # the two texts, and the ids of each


class LanguageModel(HFLM):
    """Answers the harness's requests; every rank is given all of them, answers a share, and gets all answers."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, bar: Bar | None = None):
        # the harness gives the tokenizer a padding token, and the model's caller may not want one
        super().__init__(pretrained=model, tokenizer=copy.copy(tokenizer), batch_size=batch_size, backend="causal")
        self._bar = bar

    def count(self, requests: float) -> None:
        """Show that so many requests are answered."""
        if self._bar is not None:
            self._bar.advance(requests)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Natural logarithm of the probability of each continuation, and whether it is the most likely one."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(
        self, requests: list[_Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """As `loglikelihood`, of tokens. Continuations that differ in their last token alone share one forward.

        Raises CheckpointError for a model with a likelihood that is not finite.
        """
        inputs = self.inputs(requests)
        longest_first = list(inputs)
        rank, ranks = place_in_group()
        answers = torch.zeros(len(requests), 2, dtype=torch.float64)
        head = checked_head(self.model, "the model").detached()
        share = longest_first[rank::ranks]
        each = len(requests) / max(1, sum(len(inputs[ids]) for ids in share))  # of all ranks, for one of this rank's
        with unequal_work():
            for batch in _batches(share, self.batch_size):
                numbers = [number for ids in batch for number in inputs[ids]]
                conts = [[requests[number][2] for number in inputs[ids]] for ids in batch]
                answers[numbers] = self._score(head, batch, conts)
                self.count(each * len(numbers))
        all_reduce_sum(answers)  # each rank left zeros for what others answered
        if not bool(torch.isfinite(answers).all()):
            raise CheckpointError(
                f"the answers of {self.model.name_or_path} have no finite likelihood",
                hint="its weights hold NaN or Inf, or eval.dtype is too narrow for it: try --set eval.dtype=float32",
            )
        return [(float(value), bool(greedy)) for value, greedy in answers]

    def inputs(self, requests: Sequence[_Request]) -> dict[tuple[int, ...], list[int]]:
        """What the model has to read, longest first, and the numbers of the requests that it then can answer.

        The scored tokens stand at its end, and the last of them is not read. Raises DataError for an answer without
        tokens, or with more than the model reads.
        """
        found: dict[tuple[int, ...], list[int]] = {}
        for number, (texts, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise DataError(
                    "an answer cannot be scored", expected=f"1 to {self.max_length:,} tokens",
                    got=f"{len(continuation):,}: {texts[1]!r:.80}",
                )  # fmt: skip
            ids = (context + continuation)[-(self.max_length + 1) :][:-1]
            found.setdefault(tuple(ids), []).append(number)
        return {ids: found[ids] for ids in sorted(found, key=lambda ids: (-len(ids), ids))}

    @torch.inference_mode()
    def _score(self, head: OutputHead, batch: Sequence[tuple[int, ...]], conts: list[list[list[int]]]) -> Tensor:
        """Log-likelihood and whether it is the greedy answer, fp64 [requests of the batch, 2]."""
        ids_1S = torch.tensor([[token for ids in batch for token in ids]])
        places_1S = torch.cat([torch.arange(len(ids)) for ids in batch])[None]
        rows: list[int] = []
        labels: list[int] = []
        lengths: list[int] = []
        end = 0
        for ids, answers in zip(batch, conts, strict=True):
            end += len(ids)
            for answer in answers:
                rows += range(end - len(answer), end)
                labels += answer
                lengths.append(len(answer))
        with documents_apart(self.model):
            hidden_1SH = final_hidden(
                self.model, ids_1S.to(self.device), places_1S.to(self.device),
                Documents.of(places_1S).to(self.device),
            )  # fmt: skip
        hidden_NH = hidden_1SH[0, torch.tensor(rows, device=hidden_1SH.device)]
        labels_N1 = torch.tensor(labels, device=hidden_NH.device)[:, None]
        parts = []
        size = max(1, CHUNK_BYTES // (4 * head.vocab))
        for first in range(0, len(labels), size):
            chunk = slice(first, first + size)
            logits_CV = head.logits(hidden_NH[chunk])
            value_C = logits_CV.gather(1, labels_N1[chunk])[:, 0] - logits_CV.logsumexp(1)
            parts.append(torch.stack([value_C, (logits_CV.argmax(1) == labels_N1[chunk, 0]).float()], 1))
        by_token_N2 = torch.cat(parts).cpu().double()
        answers_of = [torch.stack([part[:, 0].sum(), part[:, 1].min()]) for part in by_token_N2.split(lengths)]
        return torch.stack(answers_of)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """What the model writes after each prompt; where a task has texts drawn, every model gets the same draws."""
        rank, ranks = place_in_group()
        mine = requests[rank::ranks]
        written: list[str] = []
        with unequal_work():
            for number, batch in enumerate(_batches(mine, self.batch_size * _BATCHES)):
                with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                    torch.manual_seed(number * ranks + rank)  # another for each batch: a prompt may come several times
                    written += super().generate_until(list(batch), disable_tqdm=True)
                self.count(len(batch) * len(requests) / len(mine))
        by_rank = gather(written)
        return [by_rank[i % ranks][i // ranks] for i in range(len(requests))]


def _batches(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(values), size):
        yield values[first : first + size]
