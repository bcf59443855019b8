"""The same prompts continued by every model, without chat template, repetition penalty or choice of answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdscale.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: the most likely one at temperature 0, else by nucleus sampling.

    Source: Holtzman et al. 2020, arXiv 1904.09751, section 3.1.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def chooser(self) -> Callable[[Tensor], int]:
        """From logits [V] to a token id. Each has its own generator: all models and all runs get the same draws.

        It raises CheckpointError for logits that are no numbers.
        """
        generator = torch.Generator().manual_seed(self.seed)

        def choose(logits_V: Tensor) -> int:
            if bool(logits_V.isnan().any()):
                hint = "its weights hold NaN or Inf, or eval.dtype is too narrow for it: try --set eval.dtype=float32"
                raise CheckpointError(
                    "the model that continues the prompts gives logits that are not finite", hint=hint
                )
            if self.temperature == 0:
                return int(logits_V.argmax())
            p_V, ids_V = (logits_V.double().cpu() / self.temperature).softmax(-1).sort(descending=True, stable=True)
            p_V[p_V.cumsum(-1) - p_V >= self.top_p] = 0.0  # the token that crosses top_p still belongs
            return int(ids_V[torch.multinomial(p_V, 1, generator=generator)])

        return choose


@torch.inference_mode()
def next_tokens(model: PreTrainedModel, input_ids_1S: Tensor, sampling: Sampling) -> Iterator[int]:
    """Next tokens, one at a time and without end, with the model's own KV cache.

    The checkpoint's generation config is ignored on purpose: it may sample or penalise repetition.
    """
    caller: Any = model
    choose = sampling.chooser()
    output = caller(input_ids=input_ids_1S, use_cache=True, logits_to_keep=1)
    while True:
        token = choose(output.logits[0, -1])
        yield token
        next_11 = torch.tensor([[token]], device=input_ids_1S.device)
        output = caller(input_ids=next_11, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)


def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    tokens: int,
    sampling: Sampling,
    done: Callable[[int], None] = lambda _: None,
    prefix_ids: Sequence[int] = (),
) -> list[str]:
    """The text each prompt is continued with: at most `tokens` tokens, fewer when the model ends the text.

    `prefix_ids` begin each prompt as they began each document (BOS); what a tokenizer appends to a text is left out.
    `done` is called with the number of tokens after each one. Raises DataError for a prompt without tokens, and for one
    with a token that the model has no embedding for.
    """
    embedding: Any = model.get_input_embeddings()
    embedded = int(embedding.weight.shape[0])
    ends = end_ids(model, tokenizer)
    continuations = []
    for prompt in prompts:
        prompt_ids = prompt_tokens(tokenizer, prompt, prefix_ids)
        if max(prompt_ids) >= embedded:
            raise DataError(
                f"eval.prompts: {prompt!r}", expected=f"token ids below {embedded}", got=str(max(prompt_ids))
            )
        made: list[int] = []
        for token in next_tokens(model, torch.tensor([prompt_ids], device=model.device), sampling):
            done(1)
            if token in ends:
                break
            made.append(token)
            if len(made) == tokens:
                break
        continuations.append(decode_after(tokenizer, prompt_ids, made))
    return continuations


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, prefix_ids: Sequence[int] = ()) -> list[int]:
    """The prompt's token ids after `prefix_ids`. Raises DataError for a prompt without tokens."""
    text_ids: list[int] = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if not text_ids:
        raise DataError(f"eval.prompts: {prompt!r} has no tokens", expected="some text to continue")
    return [*prefix_ids, *text_ids]


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a text: those of the generation config, and the tokenizer's own."""
    configured: Any = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list | tuple) else [configured]
    return {int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None}


def decode_after(tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], made: list[int]) -> str:
    """Decode prompt and answer together, then cut off the prompt: some tokenizers drop a leading space otherwise."""
    options: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    text, prompt = str(tokenizer.decode(prompt_ids + made, **options)), str(tokenizer.decode(prompt_ids, **options))
    return text[len(prompt) :] if text.startswith(prompt) else str(tokenizer.decode(made, **options))
