"""llama.cpp cuts text as the tokenizer in tokenizer.json does, for each splitting rule that is written."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kdscale.models.loading import load_tokenizer
from kdscale.packaging.gguf_teacher.folder import import_gguf
from kdscale.packaging.gguf_tokenizer import SPLITS
from kdscale.packaging.gguf_writer import write_gguf
from kdscale.runtime.progress import Reporter
from tests.integration.prune.family_table import save_teacher

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from tests.integration.packaging.llama_cpp import LlamaCpp

QUIET = Reporter(quiet=True)
TEXTS = (
    "The river ran past the mill; the miller's 1984 sacks cost 12,345.67, or 3x less.",
    "I'LL say DON'T and we've: HelloWorld camelCase  two  spaces\n\n\tnaive café — 東京 🙂",
    " leading and trailing \n<|turn|>user\nhi<|turn|>  x",
)


def byte_level(rule: str) -> Tokenizer:
    by_regex = {name: split for split, name in SPLITS.items()}
    expression, ignores = by_regex.get(rule, ("", False))
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignores))
    if expression:
        split = pre_tokenizers.Split(Regex(expression), "isolated")
        steps: list[Any] = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    elif rule == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*TEXTS, "19842000 1999 " * 3] * 4, trainer)
    return tokenizer


def sentencepiece(spaces: str) -> Tokenizer:
    """As those that were converted from SentencePiece: every way to cut a token in two is a merge."""
    words = ["▁the", "▁mill", "er", "▁river", "▁s", "ack", "▁▁", "ran", "▁r"]
    pieces = sorted(
        {word[:end] for word in words for end in range(2, len(word) + 1)}, key=lambda piece: (len(piece), piece)
    )
    random.Random(3).shuffle(pieces)
    pieces.sort(key=len)
    alphabet = sorted({c for text in TEXTS for c in text if c.isascii() and c not in " \n\t"} | {"▁"})
    vocab: dict[str, int] = {"<unk>": 0, "<s>": 1}
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), *alphabet, *pieces]:
        vocab.setdefault(token, len(vocab))
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    if spaces == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    elif spaces == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    else:
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    **{name: (lambda name=name: byte_level(name)) for name in ("gpt-2", "smollm", *SPLITS.values())},  # type: ignore[misc]
    "sentencepiece, no space in front": lambda: sentencepiece("none"),
    "sentencepiece, space in front": lambda: sentencepiece("prepend"),
    "sentencepiece, metaspace": lambda: sentencepiece("metaspace"),
}


@pytest.mark.parametrize("rule", MAKERS)
def test_llama_cpp_cuts_text_alike(rule: str, tmp_path: Path) -> None:
    tokenizer = MAKERS[rule]()
    tokenizer.add_special_tokens([AddedToken("<|turn|>", special=True, normalized=False)])
    vocab = tokenizer.get_vocab_size() + 3  # padded, as embeddings often are
    save_teacher("llama", tmp_path / "model", vocab_size=vocab)
    bos = "<s>" if rule.startswith("sentencepiece") else "<|turn|>"
    loaded = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token="<|turn|>")
    loaded.save_pretrained(tmp_path / "model")
    written = write_gguf(tmp_path / "model", tmp_path / "model.gguf", "bf16", QUIET)
    llama_cpp = LlamaCpp(written.path)
    # with Metaspace transformers adds no second space where a text begins with one, and the notice says so
    texts = TEXTS[:2] if rule.endswith("metaspace") else TEXTS
    assert len(written.notes) == len(TEXTS) - len(texts)
    back = load_tokenizer(import_gguf(written.path, tmp_path / "back", QUIET))
    for text in texts:
        ids = loaded(text)["input_ids"]
        assert llama_cpp.tokenize(text) == ids, text
        assert back(text)["input_ids"] == ids, text
        if "<|turn|>" not in text:  # after a token of its own a space comes in front again
            assert back.decode(back(text, add_special_tokens=False)["input_ids"]) == text
