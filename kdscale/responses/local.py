"""The run's own teacher answers prompts, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kdscale.config.responses.settings import ResponsesConfig, SamplingConfig
from kdscale.errors import ConfigError
from kdscale.responses.generating import Generator, chat_ids
from kdscale.responses.journal import Journal, key_of
from kdscale.responses.prompts import Prompt
from kdscale.runtime.progress import Bar
from kdscale.weights import checkpoint_identity


class LocalTeacher:
    """A teacher in this process that answers chats, as `Generator` draws them."""

    def __init__(self, model: Any, tokenizer: Any, sampling: SamplingConfig, seed: int):
        """Raises ConfigError for a tokenizer without a chat template."""
        if not tokenizer.chat_template:
            raise ConfigError(
                "responses.teacher: local", expected="a teacher whose tokenizer has a chat template", got="none",
                hint="use the instruct model of its family, name a template in data.chat_template, or use an endpoint",
            )  # fmt: skip
        self._tokenizer = tokenizer
        self._generator = Generator(model, tokenizer, sampling, seed, "responses.sampling.max_tokens")

    def answer(self, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """A record for each prompt. Raises DataError for a prompt that leaves no room for an answer."""
        ids = [chat_ids(self._tokenizer, prompt.messages) for prompt in prompts]
        for prompt, own in zip(prompts, ids, strict=True):
            self._generator.check_room(own, prompt.where)
        return self._generator.write(ids)


def local_key(settings: ResponsesConfig, seed: int, teacher: Path, template: str | None) -> Callable[[Prompt], str]:
    """What gives the key of the teacher's answers to a prompt that this chat template writes."""
    sampling = {**settings.sampling.model_dump(mode="json"), "seed": seed}
    asked = [checkpoint_identity(teacher), template, sampling, settings.dtype, settings.micro_batch]
    return lambda prompt: key_of("local", prompt.messages, *asked)


def answer_share(
    teacher: LocalTeacher, prompts: Iterable[tuple[str, Prompt]], journal: Journal, micro_batch: int, bar: Bar, *,
    rank: int, ranks: int,
) -> None:  # fmt: skip
    """Answer this rank's batches of the (key, prompt) pairs, except what is in the journal.

    A batch of which a kill left some answers is computed whole again: what is missing is then drawn as it was.
    """
    for number, batch in enumerate(_batches(prompts, micro_batch)):
        missing = [key for key, _ in batch if key not in journal]
        if number % ranks == rank and missing:
            records = teacher.answer([prompt for _, prompt in batch])
            for (key, _), record in zip(batch, records, strict=True):
                if key in missing:
                    journal.append(key, **record)
            bar.advance(len(missing))


def _batches(prompts: Iterable[tuple[str, Prompt]], size: int) -> Iterator[list[tuple[str, Prompt]]]:
    """Batches of different prompts, in order."""
    seen, batch = set(), []
    for key, prompt in prompts:
        if key not in seen:
            seen.add(key)
            batch.append((key, prompt))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
