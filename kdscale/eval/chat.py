"""Several models answer the same questions, each in a conversation of its own.

Where the tokenizer has a chat template a question is a message of the user. Else a model simply goes on from it, and
from what was said before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kdscale.config.data import DataConfig
from kdscale.data.readers.chat import ChatTemplate, chat_template
from kdscale.errors import CheckpointError, ConfigError, DataError, LackOfMemoryError
from kdscale.eval.samples import Sampling, decode_after, end_ids, next_tokens
from kdscale.eval.sizes import fit_together
from kdscale.models.loading import check_writes_text, load_model, load_tokenizer, read_tokenizer_config, special_tokens
from kdscale.runtime.device import is_lack_of_memory, release_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Answer:
    """What one model has said to the last question so far."""

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0  # of this model's own work
    finished: bool = False  # by an end token, not by the limit


@dataclass
class _Speaker:
    """One model's side: how it reads, and what was said. `turns` are questions with its answers to them."""

    name: str
    path: Path
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    prefix_ids: tuple[int, ...]
    turns: list[tuple[str, str]] = field(default_factory=list)

    def prompt_ids(self, question: str) -> list[int]:
        """The conversation with a new question as token ids. Raises DataError for one without tokens."""
        if self.template.text:
            messages = []
            for asked, said in self.turns:
                messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            text = self.template.prompt([*messages, {"role": "user", "content": question}], "the conversation")
            prefix: tuple[int, ...] = ()  # the template writes what begins a text
        else:
            text, prefix = "\n".join([*(asked + said for asked, said in self.turns), question]), self.prefix_ids
        ids: list[int] = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise DataError("the question has no tokens", expected="some text")
        return [*prefix, *ids]


class Chat:
    """The models of a conversation. All of them stay loaded where they fit in memory together, else one at a time.

    Raises CheckpointError for a model or tokenizer that cannot be read, ConfigError for an encoder.
    """

    def __init__(
        self,
        models: Mapping[str, Path],
        *,
        dtype: torch.dtype,
        device: torch.device,
        data: DataConfig,
        trust_remote_code: bool = False,
    ):
        self._options: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
        self._speakers = {}
        for name, path in models.items():
            check_writes_text(path, f"the {name} model of a chat")
            tokenizer = load_tokenizer(path, trust_remote_code)
            prefix_ids = special_tokens(tokenizer, read_tokenizer_config(path)).prefix
            self._speakers[name] = _Speaker(name, path, tokenizer, chat_template(data, tokenizer), prefix_ids)
        self.together = fit_together(models, str(dtype).removeprefix("torch."), device.type)
        self._loaded: dict[str, PreTrainedModel] = {}

    @property
    def names(self) -> list[str]:
        """All models, in the order to show them."""
        return list(self._speakers)

    @property
    def templated(self) -> bool:
        """Whether the models are asked through a chat template."""
        return all(bool(speaker.template.text) for speaker in self._speakers.values())

    def forget(self) -> None:
        """Begin new conversations."""
        for speaker in self._speakers.values():
            speaker.turns.clear()

    def ask(self, question: str, names: list[str], tokens: int, sampling: Sampling) -> Iterator[dict[str, Answer]]:
        """The answers so far, after each token, until all have at most `tokens`; the same objects every time.

        Models that are loaded together take turns, a token each. What was said is remembered, also where the caller
        stops early. Raises ConfigError for an unknown model, DataError for a conversation longer than a model reads,
        LackOfMemoryError where memory does not suffice.
        """
        if unknown := [name for name in names if name not in self._speakers]:
            raise ConfigError("models", expected=", ".join(self._speakers), got=", ".join(unknown))
        answers = {name: Answer() for name in names}
        prompts = {name: self._speakers[name].prompt_ids(question) for name in names}
        try:
            groups = [names] if self.together else [[name] for name in names]
            for group in groups:
                speaking = {name: self._words(name, prompts[name], tokens, sampling, answers[name]) for name in group}
                while speaking:
                    speaking = {name: words for name, words in speaking.items() if next(words, None) is not None}
                    yield answers
                self._release()
        except (MemoryError, RuntimeError) as error:  # torch's is a RuntimeError
            if not is_lack_of_memory(error):
                raise
            self._loaded.clear()
            what = str(error).strip().partition("\n")[0][:300]
            raise LackOfMemoryError(
                "out of memory while models answered", got=what or type(error).__name__,
                hint="let fewer of them answer (--models, /models), or begin a new conversation (/reset)",
            ) from error  # fmt: skip
        finally:
            self._release()
            for name, answer in answers.items():
                if answer.tokens:
                    self._speakers[name].turns.append((question, answer.text))

    def _release(self) -> None:
        if not self.together:
            self._loaded.clear()
            release_memory()

    def _words(
        self, name: str, prompt_ids: list[int], tokens: int, sampling: Sampling, answer: Answer
    ) -> Iterator[Answer]:
        speaker = self._speakers[name]
        model = self._model(name)
        limit = getattr(model.config, "max_position_embeddings", None)
        if isinstance(limit, int) and len(prompt_ids) >= limit:
            raise DataError(
                f"the conversation with the {name} model", expected=f"fewer than {limit:,} tokens, which it reads",
                got=f"{len(prompt_ids):,}", hint="/reset begins a new one",
            )  # fmt: skip
        embedding: Any = model.get_input_embeddings()
        if max(prompt_ids) >= (rows := int(embedding.weight.shape[0])):
            raise CheckpointError(f"{speaker.path}", expected=f"token ids below {rows}", got=str(max(prompt_ids)))
        tokens = tokens if not isinstance(limit, int) else min(tokens, limit - len(prompt_ids))
        ends, made = end_ids(model, speaker.tokenizer), list[int]()
        started = time.perf_counter()
        for token in next_tokens(model, torch.tensor([prompt_ids], device=model.device), sampling):
            answer.seconds += time.perf_counter() - started
            answer.finished = token in ends
            if answer.finished:
                return
            made.append(token)
            answer.tokens = len(made)
            answer.text = decode_after(speaker.tokenizer, prompt_ids, made)
            yield answer
            if len(made) == tokens:
                return
            started = time.perf_counter()

    def _model(self, name: str) -> PreTrainedModel:
        if name not in self._loaded:
            self._loaded[name] = load_model(self._speakers[name].path, **self._options)
        return self._loaded[name]
