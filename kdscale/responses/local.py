"""The run's own teacher answers prompts, through transformers' `generate`, in batches.

B prompts of a batch, S positions, N answers to each prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kdscale.config.responses.settings import ResponsesConfig, SamplingConfig
from kdscale.errors import ConfigError, DataError
from kdscale.responses.journal import Journal, key_of
from kdscale.responses.prompts import Prompt
from kdscale.runtime.progress import Bar
from kdscale.weights import checkpoint_identity


class LocalTeacher:
    """A teacher in this process.

    An answer is drawn from the seed and its whole batch: the same prompts in the same order give the same answers,
    however many ranks share the batches and wherever a killed run begins again.
    """

    def __init__(self, model: Any, tokenizer: Any, sampling: SamplingConfig, seed: int):
        """Raises ConfigError for a tokenizer without a chat template."""
        if not tokenizer.chat_template:
            raise ConfigError(
                "responses.teacher: local", expected="a teacher whose tokenizer has a chat template", got="none",
                hint="use the instruct model of its family, name a template in data.chat_template, or use an endpoint",
            )  # fmt: skip
        self._model, self._sampling, self._seed = model, sampling, seed
        self._tokenizer = tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:  # Llama's has none; what pads is masked out
            tokenizer.pad_token = tokenizer.eos_token
        self._ends = _end_ids(model, tokenizer)
        # generate() takes from here whatever its own argument leaves open: the checkpoint may penalise repetition
        model.generation_config = self._generation()

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """A record for each prompt. Raises DataError for a prompt that leaves no room for an answer."""
        tokenizer, model = self._tokenizer, self._model
        ids = [self._prompt_ids(prompt) for prompt in prompts]
        padded = tokenizer.pad({"input_ids": ids}, padding=True, return_tensors="pt").to(model.device)
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(int(key_of(self._seed, ids)[:15], 16))
            made_BNS = model.generate(**padded, generation_config=model.generation_config)
        made_BNS = made_BNS[:, padded["input_ids"].shape[1] :].reshape(len(prompts), self._sampling.n, -1).tolist()
        return [self._record(len(own), made_NS) for own, made_NS in zip(ids, made_BNS, strict=True)]

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        text = self._tokenizer.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        limit = getattr(self._model.config, "max_position_embeddings", None)
        if isinstance(limit, int) and len(ids) + self._sampling.max_tokens > limit:
            raise DataError(
                f"{prompt.where}: the prompt and its answer", expected=f"at most {limit:,} tokens, as the teacher has",
                got=f"{len(ids):,} and responses.sampling.max_tokens = {self._sampling.max_tokens:,}",
                hint="lower max_tokens, or shorten the prompt",
            )  # fmt: skip
        return ids

    def _generation(self) -> Any:
        from transformers import GenerationConfig

        sampling = self._sampling
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=sampling.max_tokens,
            num_return_sequences=sampling.n,
            eos_token_id=self._ends,
            pad_token_id=self._tokenizer.pad_token_id,
            **(drawn if sampling.temperature > 0 else {"do_sample": False}),
        )

    def _record(self, prompt_tokens: int, made_NS: Sequence[Sequence[int]]) -> dict[str, Any]:
        answers, tokens = [], 0
        for made_S in made_NS:
            end = next((i for i, token in enumerate(made_S) if token in self._ends), None)
            own = made_S[:end]
            tokens += len(own)
            text = self._tokenizer.decode(own, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            answers.append({"text": text, "finish_reason": "length" if end is None else "stop"})
        return {"answers": answers, "prompt_tokens": prompt_tokens, "answer_tokens": tokens}


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


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list | tuple) else [configured]
    return sorted({int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None})
