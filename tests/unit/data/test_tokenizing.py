"""Bytes of tokens: exact for byte-level tokenizers, adding up for all others."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from kdscale.errors import DataError
from kdscale.models.loading import special_tokens
from kdscale.models.tokenizer import tokenizing
from kdscale.models.tokenizer.tokenizing import BatchEncoder, document_end_id


def test_byte_level_bytes_are_exact(tokenizer: Any):
    """Every prefix of the tokens stands for exactly that many bytes, also inside the bytes of one character."""
    encoder = BatchEncoder.of(tokenizer)
    alphabet = {char: byte for byte, char in _byte_alphabet().items()}

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.text(max_size=40))
    def check(text: str) -> None:
        (encoded,) = encoder.encode([text])
        raw = text.encode("utf-8")
        pieces = [bytes(alphabet[c] for c in token) for token in tokenizer.convert_ids_to_tokens(encoded.ids.tolist())]
        assert [len(piece) for piece in pieces] == encoded.bytes.tolist()
        assert b"".join(pieces) == raw

    check()


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's table: printable Latin-1 stands for itself, the rest for 256, 257, ... in order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(other)}


@pytest.mark.parametrize("text", ["plain words", "naïve café", "東京 🙂", "ﬁne ① text", "  two  spaces ", ""])
def test_other_tokenizers_add_up(text: str):
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    backend.train_from_iterator(["plain words and two spaces naive cafe text fine"], trainer)
    (encoded,) = BatchEncoder.of(SimpleNamespace(backend_tokenizer=backend)).encode([text])
    assert int(encoded.bytes.sum()) == len(text.encode("utf-8"))
    assert (encoded.bytes >= 0).all()


def test_private_copy_ignores_truncation_and_padding(tokenizer: Any):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    text = "the river ran past an old mill"
    (encoded,) = BatchEncoder.of(SimpleNamespace(backend_tokenizer=backend)).encode([text])
    assert tokenizer.decode(encoded.ids) == text
    assert backend.truncation is not None, "the caller's tokenizer must not change"


def test_document_end_prefers_end_of_text(tokenizer: Any):
    assert document_end_id(tokenizer) == 0
    chat = SimpleNamespace(get_vocab=lambda: {"<|endoftext|>": 0, "<|im_end|>": 2}, eos_token_id=2)
    assert document_end_id(chat) == 0
    gemma = SimpleNamespace(get_vocab=lambda: {"<eos>": 1, "<end_of_turn>": 106}, eos_token_id=106)
    assert document_end_id(gemma) == 1
    with pytest.raises(DataError, match="end-of-text"):
        document_end_id(SimpleNamespace(get_vocab=dict, eos_token_id=None))


def _bos_tokenizer(tokenizer: Any, template: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<|end|>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|end|>", eos_token="<|end|>")


@pytest.mark.parametrize(
    ("template", "prefix", "suffix"),
    [("$A", (), ()), ("<|end|> $A", (0,), ()), ("<|end|> <|end|> $A <|end|>", (0, 0), (0,))],
)
def test_what_a_tokenizer_adds_is_found(tokenizer: Any, template: str, prefix: tuple, suffix: tuple):
    assert special_tokens(_bos_tokenizer(tokenizer, template), {}) == (prefix, suffix)


def test_what_the_config_asks_for_is_added_where_transformers_leaves_it_out(tokenizer: Any):
    asked = {"add_bos_token": True, "add_eos_token": True}
    plain, framed = _bos_tokenizer(tokenizer, "$A"), _bos_tokenizer(tokenizer, "<|end|> $A <|end|>")
    assert special_tokens(plain, asked) == ((0,), (0,))
    assert special_tokens(framed, asked) == ((0,), (0,))
    assert special_tokens(plain, {"add_bos_token": False, "add_eos_token": None}) == ((), ())


def test_a_tokenizer_that_changes_the_text_is_refused():
    strange = Mock(side_effect=lambda _, add_special_tokens: {"input_ids": [9, 9] if add_special_tokens else [5]})
    with pytest.raises(DataError, match="add_special: never"):
        special_tokens(strange, {})


def _metaspace_tokenizer(texts: list[str]) -> Tokenizer:
    """Like SentencePiece: merges run over the whole text, and the text gets a space of its own in front."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False))
    return backend


@pytest.mark.parametrize("family", ["byte level", "metaspace"])
def test_long_texts_are_encoded_in_spans_to_the_same_tokens(
    tokenizer: Any, tiny_texts: list[str], family: str, monkeypatch: pytest.MonkeyPatch
):
    backend = tokenizer.backend_tokenizer if family == "byte level" else _metaspace_tokenizer(tiny_texts[:20])
    encoder = BatchEncoder(backend.to_str().encode())
    rng = random.Random(3)
    extras = ["naïve 東京 🙂", "a" * 900, " " * 300, "<|end|>", "\n\n", "ﬁ①"]
    text = "".join(f"{rng.choice(tiny_texts)}{rng.choice(['', *extras])}" for _ in range(200))
    texts = [text, "x" * 5000, tiny_texts[0]]
    at_once = encoder.encode(texts)
    encode_long = Mock(wraps=encoder._encode_long)
    monkeypatch.setattr(encoder, "_encode_long", encode_long)
    monkeypatch.setattr(tokenizing, "_SPAN_CHARS", 2000)
    monkeypatch.setattr(tokenizing, "_OVERLAP_CHARS", 400)
    for expected, got in zip(at_once, encoder.encode(texts), strict=True):
        assert np.array_equal(expected.ids, got.ids)
        assert np.array_equal(expected.bytes, got.bytes)
    assert encode_long.call_count == 2


def test_slow_tokenizer_is_refused():
    with pytest.raises(DataError, match="fast"):
        BatchEncoder.of(SimpleNamespace())
