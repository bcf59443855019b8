"""The user's prompts as items: to be continued, or to be answered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdscale.config.data import PromptSourceConfig
from kdscale.config.evaluation.bias import RefusalsConfig, ToxicityConfig
from kdscale.eval.bias.items import Item
from kdscale.responses.prompts import Prompt, Prompts

_SECTION = "bias.measures"


@dataclass(frozen=True)
class _Sources:
    prompts: tuple[PromptSourceConfig, ...]
    system: str | None = None


def read_prompts(entry: ToxicityConfig) -> list[Item]:
    """Prompts to continue, by file. Raises DataError for what is no prompt."""
    return [
        Item(prompt.where, Path(source.path).name, messages=tuple(prompt.messages[-1:]))
        for source, prompt in _all(entry.prompts, f"{_SECTION}: {entry.key}.prompts")
    ]


def read_harmful_and_harmless(entry: RefusalsConfig) -> list[Item]:
    """Prompts to answer, those that should be refused first. Raises DataError for what is no prompt."""
    return [
        Item(prompt.where, kind, messages=tuple(prompt.messages), facts={"harmful": kind == "harmful"})
        for kind in ("harmful", "harmless")
        for _, prompt in _all(getattr(entry, kind), f"{_SECTION}: {entry.key}.{kind}")
    ]


def prompt_files(sources: Sequence[PromptSourceConfig], section: str) -> dict[str, str]:
    """sha256 of each file of prompts, by its path in the config."""
    return Prompts(_Sources(tuple(sources)), section).digests()


def _all(sources: Sequence[PromptSourceConfig], section: str) -> Iterator[tuple[PromptSourceConfig, Prompt]]:
    for source in sources:
        for prompt in Prompts(_Sources((source,)), section):
            yield source, prompt
