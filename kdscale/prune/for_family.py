"""What the settings of `prune` mean for an encoder, whose stream goes through a norm after every sublayer (BERT)."""

from __future__ import annotations

from kdscale.config.prune import PruneConfig
from kdscale.errors import ConfigError
from kdscale.families import Family

# Criteria that compare distributions of the next token, which an encoder does not tell.
_OF_NEXT_TOKENS = ("one_by_one", "loss")


def settled(cfg: PruneConfig, family: Family) -> PruneConfig:
    """The settings with what `auto` stands for in an encoder; those of a decoder as they are.

    Dropped layers are chosen by their place (DistilBERT took every second one) unless `layer_method` says otherwise,
    gaps are not repaired, and candidates are compared by prediction alone. Raises ConfigError for a setting that asks
    for something else.
    """
    if not family.is_encoder:
        return cfg
    if cfg.layer_method in _OF_NEXT_TOKENS:
        raise ConfigError(
            f"prune.layer_method: {cfg.layer_method}", expected="spread, block_influence, angular or last",
            got=f"an encoder ({family.name}), which does not tell the next token",
        )  # fmt: skip
    if cfg.layer_repair == "linear":
        raise ConfigError(
            "prune.layer_repair: linear", expected="a stream that sublayers only add to",
            got=f"an encoder ({family.name})", hint="leave layer_repair out",
        )  # fmt: skip
    if cfg.search.candidate_score.asks or cfg.search.probe_tokens is not None:
        raise ConfigError(
            "prune.search", expected="no tasks or probes, which are for models that write text",
            got=f"an encoder ({family.name})",
        )  # fmt: skip
    changes = {"layer_repair": "none", "search": cfg.search.model_copy(update={"masked_candidates": 0})}
    if cfg.layer_method == "auto" and not cfg.contiguous_layers:
        changes["layer_method"] = "spread"
    return cfg.model_copy(update=changes)
