"""The same prompts continued by every model: greedy, no chat template, no repetition penalty."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdscale.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.inference_mode()
def greedy_tokens(model: PreTrainedModel, input_ids_1S: Tensor) -> Iterator[int]:
    """Most likely next tokens, one at a time, with the model's own cache; never ends by itself.

    The generation config of the checkpoint is deliberately not read: it may sample or penalise repetition.
    """
    caller: Any = model
    output = caller(input_ids=input_ids_1S, use_cache=True, logits_to_keep=1)
    while True:
        next_11 = output.logits[:, -1:].argmax(dim=-1)
        yield int(next_11)
        output = caller(input_ids=next_11, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)


def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    tokens: int,
    done: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """The text each prompt is continued with: at most `tokens` tokens, fewer when the model ends the text.

    Raises DataError for a prompt that is empty after tokenization. `done` is told of tokens as they are made.
    """
    ends = _end_ids(model, tokenizer)
    continuations = []
    for prompt in prompts:
        prompt_ids: list[int] = list(tokenizer(prompt)["input_ids"])
        if not prompt_ids:
            raise DataError(f"eval.prompts: {prompt!r} has no tokens", expected="some text to continue")
        made: list[int] = []
        for token in greedy_tokens(model, torch.tensor([prompt_ids], device=model.device)):
            done(1)
            if token in ends:
                break
            made.append(token)
            if len(made) == tokens:
                break
        continuations.append(_decode_after(tokenizer, prompt_ids, made))
    return continuations


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    configured: Any = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list | tuple) else [configured]
    return {int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None}


def _decode_after(tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], made: list[int]) -> str:
    """Decode the whole, cut off the prompt: decoding the new tokens alone loses a leading space in some tokenizers."""
    options: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    whole, before = str(tokenizer.decode(prompt_ids + made, **options)), str(tokenizer.decode(prompt_ids, **options))
    return whole[len(before) :] if whole.startswith(before) else str(tokenizer.decode(made, **options))
