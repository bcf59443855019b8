"""What the settings of `prune` mean for an encoder, whose stream goes through a norm after every sublayer (BERT), and
for families with axes that cannot be cut or layers that scale all that they put out (Gemma 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdscale.config.prune import PruneConfig
from kdscale.errors import ConfigError
from kdscale.families import Family

# Criteria that compare distributions of the next token, which an encoder does not tell.
_OF_NEXT_TOKENS = ("one_by_one", "loss")


def settled(cfg: PruneConfig, family: Family, config: Mapping[str, Any]) -> PruneConfig:
    """The settings with what `auto` stands for in a model of this family; those of most decoders as they are.

    Gaps are not repaired where a layer scales its input too: no projection can give what a dropped one gave.

    In an encoder dropped layers are chosen by their place (DistilBERT took every second one) unless `layer_method` says
    otherwise, gaps are not repaired, and candidates are compared by prediction alone. Raises ConfigError for a setting
    that asks for something else.
    """
    if not family.is_encoder:
        return _settled_decoder(cfg, family, config)
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


def _settled_decoder(cfg: PruneConfig, family: Family, config: Mapping[str, Any]) -> PruneConfig:
    if fixed := [axis for axis in cfg.axes if axis in family.data.uncut]:
        raise ConfigError(
            "prune.axes", expected=f"axes that can be cut in {family.name}", got=fixed[0],
            hint=f"leave {fixed[0]} out: {family.data.uncut[fixed[0]]}",
        )  # fmt: skip
    _check_can_be_timed(cfg, family, config)
    if not any(template.role == "layer_scale" for template in family.data.tensors):
        return cfg
    if cfg.layer_repair == "linear":
        raise ConfigError(
            "prune.layer_repair: linear", expected="layers that only add to their input",
            got=f"those of {family.name}, which scale it too", hint="leave layer_repair out",
        )  # fmt: skip
    return cfg.model_copy(update={"layer_repair": "none"})


def _check_can_be_timed(cfg: PruneConfig, family: Family, config: Mapping[str, Any]) -> None:
    if cfg.target is None or not cfg.is_timed:
        return
    from kdscale.models.hidden_states import BesideStream  # imports torch, which timing needs and counting does not

    if BesideStream.of(family, config).reads_more:
        raise ConfigError(
            f"prune.{cfg.target[0]}", expected="a target that is counted, such as target_params",
            got=f"{family.name}, whose layers are not timed without those before them",
        )  # fmt: skip
