"""Texts by a model of this process, through transformers' `generate`, in batches.

B prompts of a batch, S positions, N answers to each prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kdscale.config.responses.settings import SamplingConfig
from kdscale.errors import DataError
from kdscale.models.generation.drawing import end_ids
from kdscale.responses.journal import key_of


class Generator:
    """A model and its tokenizer, and how texts are drawn.

    A text is drawn from the seed and its whole batch: the same prompts in the same order give the same texts, however
    many ranks share the batches and wherever a killed run begins again. `section` of the config says how many tokens.
    """

    def __init__(self, model: Any, tokenizer: Any, sampling: SamplingConfig, seed: int, section: str):
        self._model, self._sampling, self._seed, self._section = model, sampling, seed, section
        self._tokenizer = tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:  # Llama's has none; what pads is masked out
            tokenizer.pad_token = tokenizer.eos_token
        self._ends = end_ids(model.generation_config, tokenizer)
        # generate() takes from here whatever its own argument leaves open: the checkpoint may penalise repetition
        model.generation_config = self._generation()

    @torch.inference_mode()
    def write(self, ids: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        """A record for each prompt of a batch, given as token ids."""
        tokenizer, model = self._tokenizer, self._model
        padded = tokenizer.pad({"input_ids": [list(own) for own in ids]}, padding=True, return_tensors="pt")
        padded = padded.to(model.device)
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(int(key_of(self._seed, [list(own) for own in ids])[:15], 16))
            made_BNS = model.generate(**padded, generation_config=model.generation_config)
        made_BNS = made_BNS[:, padded["input_ids"].shape[1] :].reshape(len(ids), self._sampling.n, -1).tolist()
        return [self._record(len(own), made_NS) for own, made_NS in zip(ids, made_BNS, strict=True)]

    def check_room(self, ids: Sequence[int], where: str) -> None:
        """Raises DataError for a prompt that leaves no room for an answer."""
        limit = getattr(self._model.config, "max_position_embeddings", None)
        if isinstance(limit, int) and len(ids) + self._sampling.max_tokens > limit:
            raise DataError(
                f"{where}: the prompt and its answer", expected=f"at most {limit:,} tokens, as the model has",
                got=f"{len(ids):,} and {self._section} = {self._sampling.max_tokens:,}",
                hint=f"lower {self._section}, or shorten the prompt",
            )  # fmt: skip

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


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The token ids of a chat that waits for its answer."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
