"""The tokenizer of a checkpoint in GGUF's terms: tokens, types, merges or scores, and the name of the splitting rule.

GGUF carries no regular expressions, only the name of a rule that llama.cpp has built in. So the rule is recognised in
tokenizer.json, and a tokenizer with another one is refused: it would cut text otherwise, and nothing would say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdscale.errors import CheckpointError
from kdscale.files import read_json
from kdscale.models.loading import read_tokenizer_config, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # GGUF's types of tokens
SPACE = "\u2581"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_CASED_TOO = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|"
_ENDS = _CONTRACTIONS + "?"
_MARKS_TOO = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
_MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
# (regular expression of the split, whether whole words of the vocabulary skip the merges) → llama.cpp's name
SPLITS: dict[tuple[str, bool], str] = {
    (rf"{_WORDS}\p{{N}}{{1,3}}{_MARKS}{SPACES}", True): "llama-bpe",
    (rf"{_WORDS}\p{{N}}{{1,3}}{_MARKS}{SPACES}", False): "dbrx",
    (rf"{_WORDS}\p{{N}}{_MARKS}{SPACES}", False): "qwen2",
    (rf"{_CASED}{_ENDS}|{_CASED_TOO}{_ENDS}|\p{{N}}{{1,3}}{_MARKS_TOO}{SPACES}", False): "gpt-4o",
    (rf"{_CASED}|{_CASED_TOO}|\p{{N}}{_MARKS_TOO}{SPACES}", True): "tekken",
}
_KNOWN = "GPT-2's, SmolLM's, Llama 3's, Qwen2's, GPT-4o's and Tekken's byte-level rules, and SentencePiece's BPE"


@dataclass(frozen=True)
class GgufTokenizer:
    """What is written under `tokenizer.ggml`; `merges` or `scores` is empty."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    flags: dict[str, bool] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)
    chat_template: str | None = None
    notes: list[str] = field(default_factory=list)


def read_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, vocab: int, ends: Sequence[int]) -> GgufTokenizer:
    """Describe the tokenizer of `folder`, loaded as `tokenizer`, for an embedding of `vocab` rows.

    `ends` are the ids that end a generation. Raises CheckpointError for one that GGUF cannot hold.
    """
    tree = read_json(folder / "tokenizer.json", CheckpointError, expect=dict)
    where, model = folder / "tokenizer.json", tree.get("model") or {}
    if model.get("type") != "BPE":
        raise _refused(where, "a BPE model", f"model.type {model.get('type')!r}")
    byte_level = not model.get("byte_fallback")
    flags, notes = _flags(folder, tokenizer), list[str]()
    if byte_level:
        pre = _rule(where, tree)
        merges, scores = [" ".join(pair) for pair in _merges(model)], list[float]()
    else:
        pre, merges = "default", list[str]()
        flags["add_space_prefix"] = _adds_space(where, tree, notes)
        scores = _scores(where, tree)
    tokens, types = _tokens(tree, vocab, byte_level)
    without_row = sum(entry["id"] >= vocab for entry in tree.get("added_tokens") or [])
    if without_row:
        notes.append(f"{without_row} added token(s) without a row in the embedding are left out")
    if len(ends) > 3:
        notes.append(f"GGUF names three tokens that end an answer: {list(ends[3:])} are left out")
    return GgufTokenizer(
        model="gpt2" if byte_level else "llama",
        pre=pre,
        tokens=tokens,
        types=types,
        merges=merges,
        scores=scores + [0.0] * (vocab - len(scores)) if scores else [],
        flags=flags,
        ids=_special_ids(tokenizer, ends, vocab),
        chat_template=_template(tokenizer),
        notes=notes,
    )


def _refused(where: Path, expected: str, got: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: a tokenizer that GGUF cannot hold", expected=expected, got=got,
        hint="the standard folder runs in transformers and vLLM as it is",
    )  # fmt: skip


def _merges(model: Mapping[str, Any]) -> list[list[str]]:
    """The merges as pairs; older files have them as `a b`."""
    return [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]


def _steps(step: Any, name: str) -> list[dict[str, Any]]:
    """The parts of a sequence of pre-tokenizers or normalizers; one alone is a sequence of one."""
    if step is None:
        return []
    return [part for item in step[name] for part in _steps(item, name)] if step["type"] == "Sequence" else [step]


def _rule(where: Path, tree: Mapping[str, Any]) -> str:
    """llama.cpp's name for how tokenizer.json splits a text before byte-level BPE. Raises CheckpointError."""
    steps = _steps(tree.get("pre_tokenizer"), "pretokenizers")
    strange = [step["type"] for step in _steps(tree.get("normalizer"), "normalizers") if step["type"] != "NFC"]
    if strange:
        raise _refused(where, "no normalizer, or NFC", f"normalizer {', '.join(strange)}")
    kinds = [step["type"] for step in steps]
    byte_level = steps[-1] if kinds[-1:] == ["ByteLevel"] else {}
    splits_too = byte_level.get("use_regex", True)
    if byte_level and not byte_level.get("add_prefix_space", True):
        if kinds == ["ByteLevel"] and splits_too:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and splits_too and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not splits_too:
            ignores = bool(tree["model"].get("ignore_merges"))
            rule = SPLITS.get((steps[0]["pattern"].get("Regex"), ignores))
            if rule is not None and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
                return rule
    raise _refused(where, _KNOWN, f"pre_tokenizer {tree.get('pre_tokenizer')!r}"[:600])


def _adds_space(where: Path, tree: Mapping[str, Any], notes: list[str]) -> bool:
    """Whether a text gets a space in front; what llama.cpp does otherwise is noted.

    Raises CheckpointError where spaces are not SentencePiece's.
    """
    normal = _steps(tree.get("normalizer"), "normalizers")
    split = _steps(tree.get("pre_tokenizer"), "pretokenizers")
    kinds = [step["type"] for step in normal]
    # a split at spaces does nothing: the normalizer leaves none
    if all(step["type"] == "Split" and step["pattern"] == {"String": " "} for step in split):
        if kinds == ["Replace"] and _replaces_spaces(normal[0]):
            return False
        if kinds == ["Prepend", "Replace"] and normal[0]["prepend"] == SPACE and _replaces_spaces(normal[1]):
            return True
    metaspace = split[0] if not normal and [step["type"] for step in split] == ["Metaspace"] else {}
    if metaspace.get("replacement") == SPACE and not metaspace.get("split", True):
        scheme = metaspace.get("prepend_scheme", "always")
        if scheme != "never":
            after = ", and after special tokens" if scheme == "first" else ""
            notes.append(
                f"llama.cpp begins a text with a space, also where there is one already{after}: it differs then"
            )
        return bool(scheme != "never")
    raise _refused(where, _KNOWN, f"normalizer {normal}, pre_tokenizer {split}"[:600])


def _replaces_spaces(step: Mapping[str, Any]) -> bool:
    return step["pattern"] == {"String": " "} and step["content"] == SPACE


def _scores(where: Path, tree: Mapping[str, Any]) -> list[float]:
    """Scores that make SentencePiece's BPE merge as the merges say: a token's is minus the rank of its merge.

    SentencePiece joins any two neighbours that make a token. So every way to cut a token in two must be a merge of its
    own, of about the same rank, as in tokenizers that were converted from it; but for added tokens, which are found in
    the text before. Raises CheckpointError for others.
    """
    model, ranks = tree["model"], dict[str, int]()
    vocab, added = model["vocab"], {entry["content"] for entry in tree.get("added_tokens") or []}
    pairs = {(left, right) for left, right in _merges(model)}
    for rank, (left, right) in enumerate(_merges(model)):
        ranks.setdefault(left + right, rank)
    for token in dict.fromkeys([*ranks, *vocab]):
        for cut in range(1, 0 if token in added else len(token)):
            pair = (token[:cut], token[cut:])
            if pair[0] in vocab and pair[1] in vocab and pair not in pairs:
                raise _refused(
                    where, "merges for every way to join a token", f"no merge of {pair[0]!r} and {pair[1]!r}"
                )
    scores = [0.0] * (max(vocab.values()) + 1)
    for token, number in vocab.items():
        scores[number] = -float(ranks.get(token, 0))
    return scores


def _tokens(tree: Mapping[str, Any], vocab: int, byte_level: bool) -> tuple[list[str], list[int]]:
    """Every row's token and type; rows beyond the tokenizer are unused."""
    tokens, types = [f"[PAD{row}]" for row in range(vocab)], [UNUSED] * vocab
    unknown = tree["model"].get("unk_token")
    for token, number in tree["model"]["vocab"].items():
        if number < vocab:
            is_byte = not byte_level and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            tokens[number], types[number] = token, BYTE if is_byte else UNKNOWN if token == unknown else NORMAL
    for entry in tree.get("added_tokens") or []:
        number, text = entry["id"], entry["content"]
        if number < vocab:
            # llama.cpp finds added tokens in the text as it was written
            tokens[number] = text if byte_level else text.replace(SPACE, " ")
            if types[number] != UNKNOWN:
                types[number] = CONTROL if entry.get("special") else USER_DEFINED
    return tokens, types


def _flags(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """What the tokenizer adds to a text by itself. Raises CheckpointError for more than BOS and EOS."""
    added = special_tokens(tokenizer, read_tokenizer_config(folder))
    if added.prefix not in ((), (tokenizer.bos_token_id,)) or added.suffix not in ((), (tokenizer.eos_token_id,)):
        got = f"tokens {list(added.prefix)} before a text and {list(added.suffix)} after it"
        raise _refused(folder / "tokenizer.json", "BOS before a text, EOS after it, or neither", got)
    return {"add_bos_token": bool(added.prefix), "add_eos_token": bool(added.suffix)}


def _special_ids(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], vocab: int) -> dict[str, int]:
    known = {
        "bos": tokenizer.bos_token_id,
        "eos": ends[0] if ends else tokenizer.eos_token_id,
        "eot": ends[1] if len(ends) > 1 else None,
        "eom": ends[2] if len(ends) > 2 else None,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    return {name: int(number) for name, number in known.items() if number is not None and int(number) < vocab}


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template; of several the one called default."""
    template: Any = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template
