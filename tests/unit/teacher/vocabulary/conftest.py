"""Three small tokenizers of the same text: byte-level ones with many and few merges, and one like SentencePiece's."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kdscale.models.tokenizer.token_bytes import Vocabulary

TEXTS = [
    "the river ran past an old mill and the children who lived there knew every stone of it by name",
    "winter light fell slowly on fields of barley; the miller counted 127 sacks of flour: naïve café, 東京 🙂",
] * 3


def byte_level(size: int) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def sentence_piece(size: int, texts: list[str] = TEXTS) -> Any:
    """With ▁ for a space, bytes for what it has no piece for, and a token before each text."""
    specials = ["<pad>", "<eos>", "<bos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    plain = [text for text in texts if text.isascii()]
    trained.train_from_iterator(plain, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    learned = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    vocabulary = {piece: number for number, piece in enumerate([*specials, *learned])}
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>"
    )  # fmt: skip


@pytest.fixture(scope="module")
def vocabularies() -> Callable[[str], Vocabulary]:
    made = {
        "few": Vocabulary(byte_level(280), (), 0),
        "many": Vocabulary(byte_level(400), (), 0),
        "sentence": Vocabulary(sentence_piece(90), (2,), 1),
    }
    return made.__getitem__
