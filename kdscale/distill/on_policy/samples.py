"""What the student writes: when, in place of which sequences, kept so that a killed run goes on with the same.

Steps are divided into rounds. What all sequences of a round learn from is written when it begins, with the weights of
that moment, and is on the disk before the first of its steps: a journal of records, keyed by all that they depend on.
A run that goes on in the middle of a round finds them there. Which sequences of a step are written, from which prompts
and by which random numbers, depends on nothing but the config, the text and the step.

S positions of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdscale.config.distill.on_policy import OnPolicyConfig
from kdscale.data.batches import Batch, WrittenSequence
from kdscale.distill.on_policy.packed_answers import Answer, held_out_batch, pack_answers
from kdscale.distill.on_policy.prompts import Prompt, PromptBook
from kdscale.distill.on_policy.writers import Asked, Writer
from kdscale.errors import RunFolderError, TrainingError
from kdscale.models.generation.drawing import Drawn
from kdscale.responses.journal import Journal, key_of
from kdscale.runtime.ranks import gather, rank
from kdscale_launch.watchdog import beat, enter

PHASE = "generation"  # of a step's clock
_DIGITS = 5  # of a log-probability


@dataclass(frozen=True)
class Share:
    """The run's steps and sequences, and which of these are one rank's: number `rank` of `ranks` that share them."""

    steps: int
    global_batch: int
    micro_batch: int
    seq_len: int
    rank: int
    ranks: int

    def numbers(self, step: int) -> range:
        """The numbers of the sequences of step `step` that are this rank's."""
        own = self.global_batch // self.ranks
        first = step * self.global_batch + self.rank * own
        return range(first, first + own)

    def takes(self, settings: OnPolicyConfig, number: int, step: int) -> bool:
        """Whether sequence `number` of step `step` stands in place of text: so many as `settings` say, evenly."""
        count = settings.sequences_at(step, self.steps, self.global_batch)
        row = number - step * self.global_batch
        return (row + 1) * count // self.global_batch > row * count // self.global_batch


class _Place(NamedTuple):
    number: int  # of the sequence, in the global order
    slot: int
    step: int


class _Kept(BaseModel):
    """What is learnt of a record."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    ids: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    logprobs: list[float]
    learnt: list[Annotated[int, Field(ge=0)]] | None = None


class Samples:
    """The sequences that the student writes in a run; data.batches.OwnSequences for the loader.

    `decode` makes text of ids, for people; `pad_id` fills what is left of a sequence.
    """

    def __init__(
        self, settings: OnPolicyConfig, share: Share, book: PromptBook, writer: Writer, folder: Path, *, seed: int,
        pad_id: int, vocab_size: int, decode: Callable[[Sequence[int]], str], say: Callable[[str], None],
    ):  # fmt: skip
        self._settings, self._share, self._book, self._writer = settings, share, book, writer
        self._seed, self._pad_id, self._decode, self._say, self._folder = seed, pad_id, decode, say, folder
        self._slots = settings.prompts_a_sequence(share.seq_len) * settings.answers  # of one answer each
        self._vocab_size = vocab_size
        self._journal: Journal | None = None
        self._round: int | None = None
        self._records: dict[tuple[int, int], dict[str, Any]] = {}  # of the round, by number and slot
        self._held_out = [
            prompt for prompt in book.held_out(settings.validate_prompts) for _ in range(settings.answers)
        ]

    # which sequences

    def takes(self, number: int, step: int) -> bool:
        """Whether the student writes sequence `number`, which belongs to step `step`."""
        return self._share.takes(self._settings, number, step)

    def lengths(self) -> list[int]:
        """Positions of each document in a sequence that is full, and what is left."""
        used = self._slots * self._settings.answers_a_sequence
        rest = [self._share.seq_len - used] if used < self._share.seq_len else []
        return [self._settings.answers_a_sequence] * self._slots + rest

    def holds(self, step: int) -> bool:
        """Whether what step `step` learns from is there already, or will need no writing."""
        return step < self._first or self._round_of(step) == self._round

    @property
    def _first(self) -> int:
        return self._settings.first_step(self._share.steps)

    def _round_of(self, step: int) -> int:
        return self._settings.round_of(step, self._share.steps)

    def _prompt(self, number: int, slot: int) -> Prompt:
        """What the answer in a slot goes on from; of a pair both have the same."""
        return self._book.of(number, slot // self._settings.answers)

    def _places(self, first: int, end: int) -> Iterator[_Place]:
        for step in range(first, end):
            for number in self._share.numbers(step):
                if self.takes(number, step):
                    yield from (_Place(number, slot, step) for slot in range(self._slots))

    # writing

    def prepare(self, step: int, look: Callable[[], None] = lambda: None) -> bool:
        """Have everything there that step `step` and the rest of its round learn from; whether it had to be found.

        A collective call. `look` is called before each batch; what it raises ends the writing. Raises RunFolderError
        where a round that began before is not in the journal: its weights are gone.
        """
        if self.holds(step):
            return False
        enter(PHASE)
        begun = self._round_of(step)
        if self._journal is None:
            self._journal = Journal(self._folder, f"rank-{rank()}", self._say)
        end = min(begun + self._settings.every, self._share.steps)
        places = {self._key(place, begun): place for place in self._places(step, end)}
        missing = sum(key not in self._journal for key in places)
        if begun < step and max(gather(missing)):
            raise RunFolderError(
                f"{self._folder} lacks what the student wrote after step {begun}",
                expected=f"its records, as the run goes on after step {step}",
                hint="put the folder back; or move away the checkpoints after that step, and the run begins there",
            )
        self._write(places, begun, look)
        found = {place: self._journal.get(key) for key, place in places.items()}
        self._records = {(place.number, place.slot): self._checked(record, place) for place, record in found.items()}
        self._round = begun
        return True

    def _write(self, places: dict[str, _Place], begun: int, look: Callable[[], None]) -> None:
        """Put all of `places` into the journal that is not there yet.

        A batch of which a kill left some is computed whole again: what is missing then has the bits that it had.
        """
        assert self._journal is not None
        journal, keys, size = self._journal, list(places), self._writer.at_once
        batches = [keys[first : first + size] for first in range(0, len(keys), size)]
        left = [batch for batch in batches if not all(key in journal for key in batch)]
        if not max(gather(len(left))):
            return
        with self._writer.weights():
            while max(gather(len(left))):
                look()
                batch = left[0] if left else []
                asked = batch if self._writer.whole_batches else [key for key in batch if key not in journal]
                prompts = [self._prompt(places[key].number, places[key].slot) for key in asked]
                for key, prompt, drawn in zip(asked, prompts, self._answers(asked, prompts), strict=True):
                    if drawn is not None and key not in journal:
                        journal.append(key, **self._record(places[key], begun, prompt, drawn))
                if all(key in journal for key in batch):
                    left = left[1:]
                beat()

    def _answers(self, keys: Sequence[str], prompts: Sequence[Prompt]) -> list[Drawn | None]:
        if not keys:
            return []
        return self._writer.write([Asked(prompt.ids, key) for key, prompt in zip(keys, prompts, strict=True)])

    def _key(self, place: _Place, begun: int) -> str:
        """Of all that a record depends on, but for the weights, which the training's own fingerprint stands for."""
        asked = self._settings
        drawn = [asked.max_new_tokens, asked.temperature, asked.top_p, asked.positions, asked.position_share]
        prompt = self._prompt(place.number, place.slot).ids
        return key_of("on_policy", self._seed, begun, place.number, place.slot, prompt, drawn)

    def _checked(self, record: dict[str, Any], place: _Place) -> dict[str, Any]:
        """The record, if it is one. Raises RunFolderError for one that people or a disk changed."""
        try:
            kept = _Kept.model_validate(record)
            sizes = {len(kept.ids), len(kept.logprobs)}
            learnt = [] if kept.learnt is None else kept.learnt
            good = len(sizes) == 1 and len(kept.ids) <= self._settings.max_new_tokens
            good = good and max(kept.ids) < self._vocab_size and max(learnt, default=0) < len(kept.ids)
        except ValidationError:
            good = False
        if not good:
            raise RunFolderError(
                f"{self._folder}: what was written for sequence {place.number}, prompt {place.slot}, is damaged",
                expected=f"1 to {self._settings.max_new_tokens} ids below {self._vocab_size}, each with a logprob",
                hint="put the folder back as it was",
            )
        return record

    def _record(self, place: _Place, begun: int, prompt: Prompt, drawn: Drawn) -> dict[str, Any]:
        if not all(map(math.isfinite, [*drawn.logprobs, *drawn.entropies])):
            raise TrainingError(
                f"after step {begun} the student writes by probabilities that are not finite",
                hint="its weights are damaged: lower distill.optimizer.lr, and go on from an earlier checkpoint",
            )
        record = {
            "weights_of_step": begun, "step": place.step + 1, "sequence": place.number, "slot": place.slot,
            "prompt": self._decode(prompt.ids), "text": self._decode(drawn.ids), "ended": drawn.ended,
            "prompt_tokens": len(prompt.ids), "answer_tokens": len(drawn.ids), "ids": drawn.ids,
            "logprobs": [round(value, _DIGITS) for value in drawn.logprobs],
        }  # fmt: skip
        if drawn.entropies:
            record["mean_entropy"] = round(sum(drawn.entropies) / len(drawn.entropies), _DIGITS)
        if self._settings.positions == "entropy":
            record["learnt"] = highest(drawn.entropies, self._settings.position_share)
        return record

    # sequences

    def sequence(self, number: int, step: int) -> WrittenSequence:
        """What the student wrote in place of sequence `number`.

        Of another rank's sequence, for reports, what the journal on the disk says; an empty sequence where that is
        nothing.
        """
        records = [self._records.get((number, slot)) for slot in range(self._slots)]
        if None in records:
            records = self._of_others(number, step)
        return self._packed(
            [(slot, self._prompt(number, slot), record) for slot, record in enumerate(records) if record]
        )

    def _of_others(self, number: int, step: int) -> list[dict[str, Any] | None]:
        journal, begun = Journal(self._folder), self._round_of(step)
        keys = [self._key(_Place(number, slot, step), begun) for slot in range(self._slots)]
        return [journal.get(key) if key in journal else None for key in keys]

    def _packed(self, written: Sequence[tuple[int, Prompt, dict[str, Any]]]) -> WrittenSequence:
        """Of the records of slots."""
        answers = [
            Answer(slot, prompt.ids, record["ids"], record["logprobs"], record.get("learnt"), prompt.tag)
            for slot, prompt, record in written
        ]
        return pack_answers(answers, self._share.seq_len, self._pad_id)

    # measuring

    def held_out_batches(self, look: Callable[[], None] = lambda: None) -> list[Batch]:
        """What the student writes now after held-out prompts, this rank's share in batches; as many on all ranks.

        Nothing of it is kept. A collective call. `look` is called before each batch.
        """
        prompts, share, at_once = self._held_out, self._share, self._writer.at_once
        rows = [prompts[first : first + self._slots] for first in range(0, len(prompts), self._slots)]
        if not rows:
            return []
        most = math.ceil(len(rows) / share.ranks)  # of a rank
        own = range(share.rank, len(rows), share.ranks)
        asked = [(row, slot, prompt) for row in own for slot, prompt in enumerate(rows[row])]
        written: dict[int, list[tuple[int, Prompt, dict[str, Any]]]] = {row: [] for row in own}
        enter(PHASE)
        with self._writer.weights():
            for first in range(0, most * self._slots, at_once):
                look()
                batch = asked[first : first + at_once]
                keys = [f"held-out {self._seed} {row} {slot}" for row, slot, _ in batch]
                answers = self._answers(keys, [prompt for *_, prompt in batch])
                for (row, slot, prompt), drawn in zip(batch, answers, strict=True):
                    if drawn is not None:
                        written[row].append((slot, prompt, {"ids": drawn.ids, "logprobs": drawn.logprobs}))
                beat()
        sequences = [(row, self._packed(written[row])) for row in own]
        return [
            # of nothing to learn where this rank has none left
            held_out_batch(sequences[first : first + share.micro_batch] or [(-1, self._packed([]))])
            for first in range(0, most, share.micro_batch)
        ]

    def close(self) -> None:
        """Let go of the journal and the writer."""
        if self._journal is not None:
            self._journal.close()
        self._writer.close()


def highest(entropies: Sequence[float], share: float) -> list[int]:
    """The places of the highest entropies, ascending: this share of them, at least one."""
    count = max(1, round(share * len(entropies)))
    order = sorted(range(len(entropies)), key=lambda place: (-entropies[place], place))
    return sorted(order[:count])
