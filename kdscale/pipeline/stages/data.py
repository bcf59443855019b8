"""The data stage: tokenise the text."""

from __future__ import annotations

from kdscale.config.root import Config
from kdscale.errors import DataError
from kdscale.pipeline.stage import Facts, StageContext
from kdscale.runs.folder import RunFolder


def tokenize(context: StageContext) -> Facts:
    """Tokenise the text into the token store, training and held-out part."""
    from kdscale.data.store_cache import StoreCache, cache_folder
    from kdscale.data.token_store import TokenStore
    from kdscale.data.tokenizing import NO_SPECIAL_TOKENS, document_end_id, special_tokens
    from kdscale.families import load_family
    from kdscale.models.loading import check_loadable, load_tokenizer, read_tokenizer_config
    from kdscale.weights import read_config

    data = context.config.data
    check_loadable(context.teacher, context.config.teacher.trust_remote_code)
    tokenizer = load_tokenizer(context.teacher, context.config.teacher.trust_remote_code)
    teacher_config = read_config(context.teacher)
    special = NO_SPECIAL_TOKENS
    if data.add_special == "auto":
        special = special_tokens(tokenizer, read_tokenizer_config(context.teacher))
    store = TokenStore.build(
        context.run.data,
        data.sources,
        tokenizer,
        eos_id=document_end_id(tokenizer),
        reporter=context.reporter,
        special=special,
        heldout_fraction=data.heldout_fraction,
        heldout_sources=data.heldout_sources,
        vocab_size=load_family(teacher_config, str(context.teacher)).dims(teacher_config).vocab,
        max_document_tokens=data.max_document_tokens,
        processes=data.processes,
        cache=StoreCache(cache_folder()) if data.share else None,
    )
    return {f"{name} tokens": f"{store.split(name).tokens:,}" for name in ("train", "heldout")}


def check_enough_text(config: Config, run: RunFolder) -> None:
    """Raises DataError when the tokenised text is too short for what the stages after `data` read of it."""
    from kdscale.data.packing import epoch_tokens
    from kdscale.data.token_store import TokenStore
    from kdscale.pipeline.checks import lengths_used

    tokens = epoch_tokens(TokenStore.open(run.data).split("train"))
    needed = {"importance.calibration_tokens": config.importance.calibration_tokens}
    needed |= {name: size for name, size in lengths_used(config, 0).items() if name.startswith("distill.seq_len")}
    if too_long := [f"{name} = {size:,}" for name, size in needed.items() if size > tokens]:
        raise DataError(
            f"the training text has {tokens:,} tokens, fewer than the config asks for",
            expected=f"at most {tokens:,}",
            got=", ".join(too_long),
            hint="lower them, or add text to data.sources",
        )
