"""The tokenizer of a GGUF file as a tokenizer.json: byte-level BPE whose rule is known, and SentencePiece's BPE.

GGUF names the rule that splits a text and carries no expression for it. Rules that are not known here are refused: a
tokenizer that splits otherwise gives other ids, and nothing would say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdscale.errors import CheckpointError
from kdscale.packaging.gguf_teacher.file import GgufFile
from kdscale.packaging.gguf_tokenizer import BYTE, CONTROL, SPACE, SPLITS, UNKNOWN, UNUSED, USER_DEFINED

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_GPT2, _DIGITS = "gpt-2", "smollm"
# Names that llama.cpp gives tokenizers which it splits by a rule that has another name here
_SAME_RULE = {
    "phi-2": _GPT2, "olmo": _GPT2, "mpt": _GPT2, "jais": _GPT2, "trillion": _GPT2, "exaone4": _GPT2,
    "starcoder": _DIGITS, "refact": _DIGITS, "command-r": _DIGITS, "codeshell": _DIGITS, "exaone": _DIGITS,
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "pixtral": "llama-bpe",
    "falcon-h1": "llama-bpe", "lfm2": "llama-bpe",
    "smaug-bpe": "dbrx", "deepseek-r1-qwen": "qwen2", "stablelm2": "qwen2", "megrez": "qwen2",
    "llama4": "gpt-4o",
}  # fmt: skip
_OWN_BOS = ("llama-bpe", "tekken")  # rules with which llama.cpp begins a text with BOS where the file says nothing
_COMPOSED = ("qwen2",)  # whose own tokenizers compose characters first, of which a file says nothing
_OF_RULE = {name: (expression, ignores) for (expression, ignores), name in SPLITS.items()}


@dataclass(frozen=True)
class Rebuilt:
    """The tokenizer, and what tokenizer_config.json says of it."""

    tokenizer: Tokenizer
    config: dict[str, Any]


def rebuild(file: GgufFile, context: int) -> Rebuilt:
    """The tokenizer of `file`, for a model of `context` positions.

    Raises CheckpointError for a kind of tokenizer, or a rule, that is not known; it says which are.
    """
    from tokenizers import processors

    model, tokens = str(file.field("tokenizer.ggml.model")), [str(token) for token in _list(file, "tokens")]
    types = [int(kind) for kind in file.get("tokenizer.ggml.token_type", [1] * len(tokens))]
    if len(types) != len(tokens):
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.token_type", expected=f"{len(tokens)} types", got=str(len(types))
        )
    if model == "gpt2":
        tokenizer, begins = _byte_level(file, tokens, types)
    elif model == "llama":
        tokenizer, begins = _sentencepiece(file, tokens, types), True
    else:
        raise _refused(file, "tokenizer.ggml.model", "gpt2 (byte-level BPE) or llama (SentencePiece's BPE)", model)
    _add_tokens(tokenizer, tokens, types, model == "llama")
    ids = {name: file.token_id(name) for name in ("bos", "eos", "eot", "eom", "unknown", "padding")}
    if beyond := [name for name, number in ids.items() if number is not None and number >= len(tokens)]:
        where = f"{file.path}: tokenizer.ggml.{beyond[0]}_token_id"
        raise CheckpointError(where, expected=f"below {len(tokens)}", got=str(ids[beyond[0]]))
    around = {
        "bos": bool(file.get("tokenizer.ggml.add_bos_token", begins)) and ids["bos"] is not None,
        "eos": bool(file.get("tokenizer.ggml.add_eos_token", False)) and ids["eos"] is not None,
    }
    used = {name: tokens[int(ids[name] or 0)] for name, wanted in around.items() if wanted}
    if used:
        single = [used.get("bos"), "$A", used.get("eos")]
        pair = [used.get("bos"), "$A", used.get("eos"), used.get("bos"), "$B:1", used.get("eos")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[part for part in single if part],
            pair=[part for part in pair if part],
            special_tokens=[(token, int(ids[name] or 0)) for name, token in used.items()],
        )
    names = {"bos_token": ids["bos"], "eos_token": ids["eos"], "unk_token": ids["unknown"], "pad_token": ids["padding"]}
    config: dict[str, Any] = {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        # not the family's own class: transformers gives some of these a pre-tokenizer of their own
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokens[number] for name, number in names.items() if number is not None},
    }
    return Rebuilt(tokenizer, dict(sorted(config.items())))


def _list(file: GgufFile, key: str) -> list[Any]:
    value = file.field(f"tokenizer.ggml.{key}")
    if not isinstance(value, list):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.{key}", expected="a list", got=repr(value)[:100])
    return value


def _refused(file: GgufFile, key: str, expected: str, got: str) -> CheckpointError:
    return CheckpointError(
        f"{file.path}: {key}", expected=expected, got=repr(got)[:100],
        hint="give the folder of the model's own tokenizer: kdscale get-teacher FILE.gguf FOLDER --tokenizer TOKENIZER",
    )  # fmt: skip


def _byte_level(file: GgufFile, tokens: list[str], types: list[int]) -> tuple[Tokenizer, bool]:
    """Byte-level BPE, and whether a text begins with BOS where the file does not say."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    said = str(file.get("tokenizer.ggml.pre", "default"))
    rule = _SAME_RULE.get(said, said)
    if rule not in (_GPT2, _DIGITS, *_OF_RULE):
        known = sorted({_GPT2, _DIGITS, *_OF_RULE, *_SAME_RULE})
        raise _refused(file, "tokenizer.ggml.pre", "one of " + ", ".join(known), said)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=rule not in _OF_RULE)
    ignores = False
    if rule == _DIGITS:
        splitter: Any = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif rule == _GPT2:
        splitter = byte_level
    else:
        expression, ignores = _OF_RULE[rule]
        split = pre_tokenizers.Split(Regex(expression), behavior="isolated")
        splitter = pre_tokenizers.Sequence([split, byte_level])
    vocab = {token: row for row, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_merges(file, vocab), ignore_merges=ignores))
    if said in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rule in _OWN_BOS


def _merges(file: GgufFile, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs, split at the first space after the first character, as llama.cpp splits them. Raises CheckpointError."""
    merges = []
    for text in _list(file, "merges"):
        at = str(text).find(" ", 1)
        left, right = str(text)[:at], str(text)[at + 1 :]
        if at < 0 or not {left, right, left + right} <= vocab.keys():
            raise CheckpointError(
                f"{file.path}: tokenizer.ggml.merges", expected="pairs of tokens", got=repr(text)[:100]
            )
        merges.append((left, right))
    return merges


def _sentencepiece(file: GgufFile, tokens: list[str], types: list[int]) -> Tokenizer:
    """SentencePiece's BPE: it joins the neighbours that make the token of the highest score, the leftmost first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: row for row, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
    scores = [float(score) for score in _list(file, "scores")]
    if len(scores) != len(tokens):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.scores", expected=f"{len(tokens)}", got=str(len(scores)))
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    # others are found in the text before anything is joined
    joined = {
        token: scores[row] for token, row in vocab.items() if types[row] not in (BYTE, CONTROL, UNKNOWN, USER_DEFINED)
    }
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab, merges=_merges_by_score(vocab, joined), unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )
    spaces, first = normalizers.Replace(" ", SPACE), bool(file.get("tokenizer.ggml.add_space_prefix", True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if first else spaces
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if first else [])])
    return tokenizer


def _merges_by_score(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to join two tokens to a third, tokens of higher scores first, in the order of the tokens' ids."""
    found = []
    for token, score in scores.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in scores and right in scores:
                found.append((-score, vocab[token], vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int], unknown_too: bool) -> None:
    """Tokens that are found in the text as they are: control tokens, and those that a user defined."""
    from tokenizers import AddedToken

    added = [
        AddedToken(token, special=kind != USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, USER_DEFINED) or (kind == UNKNOWN and unknown_too)
    ]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
