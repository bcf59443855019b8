"""lm-evaluation-harness kept quiet, away from code that task files bring, and off the network when that is down."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from kdscale.errors import KdscaleError


@contextmanager
def explained(what: str, kind: type[KdscaleError], hint: str = "") -> Iterator[None]:
    """Turn whatever the harness raises within the block into an error of `kind`: it raises nearly every class."""
    try:
        yield
    except KdscaleError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise kind(what, got=f"{type(error).__name__}: {text}", hint=hint or None) from error


@contextmanager
def without_network() -> Iterator[None]:
    """Have the hub's libraries look into their cache alone, instead of trying each address for 20 seconds."""
    import datasets
    import huggingface_hub

    places: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what the harness and its libraries say of their own off the terminal; errors are raised.

    Templates of tasks are rendered in a sandbox: those of local files are not our own.
    """
    import datasets
    import lm_eval.api.task
    import lm_eval.utils
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from tqdm import tqdm

    sandbox: Any = ImmutableSandboxedEnvironment(undefined=lm_eval.utils.env.undefined, keep_trailing_newline=True)
    sandbox.filters |= lm_eval.utils.env.filters
    sandbox.from_string = cache(sandbox.from_string)  # the harness compiles a template anew for every item
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers", "huggingface_hub")]
    levels, bars = [logger.level for logger in loggers], datasets.are_progress_bars_disabled()
    kept = lm_eval.utils.env, lm_eval.api.task.tqdm
    lm_eval.utils.env, lm_eval.api.task.tqdm = sandbox, partial(tqdm, disable=True)
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        lm_eval.utils.env, lm_eval.api.task.tqdm = kept
        if not bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
