"""The data stage: tokenise the text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kdscale.config.data import RESPONSES_SOURCE, DataConfig, SourceConfig
from kdscale.config.root import Config
from kdscale.errors import CheckpointError, DataError
from kdscale.pipeline.stage import Facts, StageContext
from kdscale.runs.folder import KEPT_RESPONSES, RunFolder

if TYPE_CHECKING:
    from kdscale.data.token_store import TokenSplit


def tokenize(context: StageContext) -> Facts:
    """Tokenise the text into the token store, training and held-out part."""
    from kdscale.data.store_cache import StoreCache, cache_folder
    from kdscale.data.token_store import TokenStore
    from kdscale.families import load_family
    from kdscale.models.loading import (
        NO_SPECIAL_TOKENS,
        check_loadable,
        load_tokenizer,
        read_tokenizer_config,
        special_tokens,
    )
    from kdscale.models.tokenizer.tokenizing import document_end_id, padding_id
    from kdscale.weights import read_config

    data = with_responses(context.config.data, context.run)
    check_loadable(context.teacher, context.config.teacher.trust_remote_code)
    tokenizer = load_tokenizer(context.teacher, context.config.teacher.trust_remote_code)
    teacher_config = read_config(context.teacher)
    special = NO_SPECIAL_TOKENS
    if data.add_special == "auto":
        special = special_tokens(tokenizer, read_tokenizer_config(context.teacher))
    family = load_family(teacher_config, str(context.teacher / "config.json"))
    store = TokenStore.build(
        context.run.data,
        data,
        tokenizer,
        eos_id=padding_id(tokenizer) if family.is_encoder else document_end_id(tokenizer),
        reporter=context.reporter,
        special=special,
        vocab_size=family.dims(teacher_config).vocab,
        cache=StoreCache(cache_folder()) if data.share else None,
        encoder=family.is_encoder,
        classes=class_names(teacher_config) if family.head == "classes" else (),
    )
    for line in blend_notices(store.split("train"), context.config.distill.tokens):
        context.reporter.say(line)
    return {f"{name} tokens": f"{store.split(name).tokens:,}" for name in ("train", "heldout")}


def what_it_depends_on(context: StageContext) -> Facts:
    """Settings that older versions did not have, where they say something."""
    return {"sentences": True} if context.config.data.sentences else {}


def class_names(config: dict[str, Any]) -> tuple[str, ...]:
    """The names of a model's classes, by their numbers, from its config.json; a number's own where there is none.

    Raises CheckpointError for names of other numbers than 0, 1, 2, …
    """
    named = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # as transformers has them
    numbers = {str(number): str(name) for number, name in named.items()} if isinstance(named, dict) else {}
    if not numbers or set(numbers) != {str(number) for number in range(len(numbers))}:
        raise CheckpointError("config.json: id2label", expected="a name for 0, 1, 2, …", got=repr(named)[:200])
    return tuple(numbers[str(number)] for number in range(len(numbers)))


def with_responses(data: DataConfig, run: RunFolder) -> DataConfig:
    """The config with the chats that the stage responses left, in place of the source `responses:`."""
    file = str(run.at(KEPT_RESPONSES))

    def found(sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        return tuple(
            source.model_copy(update={"path": file, "chat": True, "tag": source.name})
            if source.path == RESPONSES_SOURCE
            else source
            for source in sources
        )

    lists = ("sources", "heldout_sources", "leak_sources")
    return data.model_copy(update={name: found(getattr(data, name)) for name in lists})


_MANY_EPOCHS = 4  # up to which repeated text is nearly as good as new: arXiv 2305.16264


def blend_notices(split: TokenSplit, tokens: int) -> list[str]:
    """How often a training of `tokens` tokens reads each source of a blend."""
    from kdscale.data.packing import epoch_tokens

    lines = []
    for share in split.blend:
        there = epoch_tokens(split, split.documents_of(share))
        epochs = share.share * tokens / max(there, 1)
        lines.append(
            f"  {share.share:.1%} of the training is {share.name}: {there:,} tokens, read {epochs:,.2f} times in "
            f"{tokens:,} tokens"
        )
        if epochs > _MANY_EPOCHS:
            lines.append(
                f"  note: more than {_MANY_EPOCHS} readings of {share.name} teach little that is new: "
                "give more of it, or a lower weight"
            )
    return lines


def check_text(config: Config, run: RunFolder) -> None:
    """Raises DataError for too little text, ConfigError for a source of text without a teacher."""
    from kdscale.data.token_store import TokenStore
    from kdscale.teacher.several import check_tags

    store = TokenStore.open(run.data)
    check_enough_text(config, store.split("train"))
    if config.distill.teachers:
        check_tags(config.distill.teachers, store.tags_in_use)


def check_enough_text(config: Config, split: TokenSplit) -> None:
    """Raises DataError when the training text is too short for what the stages after `data` read of it."""
    from kdscale.data.packing import epoch_tokens
    from kdscale.pipeline.checks import lengths_used

    tokens, lengths = epoch_tokens(split), lengths_used(config, 0)
    needed = {"importance.calibration_tokens": config.importance.calibration_tokens}
    needed |= {name: size for name, size in lengths.items() if name.startswith(("distill.seq_len", "quantize.seq_len"))}
    if too_long := [f"{name} = {size:,}" for name, size in needed.items() if size > tokens]:
        raise DataError(
            f"the training text has {tokens:,} tokens, fewer than the config asks for",
            expected=f"at most {tokens:,}",
            got=", ".join(too_long),
            hint="lower them, or add text to data.sources",
        )
    longest = max(size for name, size in lengths.items() if name.startswith(("distill.seq_len", "importance.seq_len")))
    sizes = {share.name: epoch_tokens(split, split.documents_of(share)) for share in split.blend}
    if too_short := [f"{name} has {size:,}" for name, size in sizes.items() if size < longest]:
        raise DataError(
            "data.blend: a source is shorter than one sequence",
            expected=f"at least the {longest:,} tokens of the longest sequence of each",
            got=", ".join(too_short),
            hint="lower distill.seq_len and importance.seq_len, or give two sources one tag",
        )
