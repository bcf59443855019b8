"""The section `targets`: what a store can give, and what goes with it."""

from __future__ import annotations

from typing import Any

import pytest

from kdscale.config.load import build_config, dump_config, load_config, may_change
from kdscale.config.root import Config
from kdscale.config.target_store import CODECS, TargetsConfig
from kdscale.errors import ConfigError

TOP_K, SAMPLED, FULL = ({"name": "token_divergence", "targets": kind} for kind in ("topk", "sampled", "full"))


def config(targets: Any = None, objective: dict[str, Any] = SAMPLED, **distill: Any) -> Config:
    distill = {"teacher_placement": "cached", "objectives": [objective], **distill}
    tree = {"name": "t", "run_dir": "r", "teacher": {"path": "t"}, "prune": {"ffn": 8}, "distill": distill}
    return build_config({**tree, "targets": targets}, "test")


def codec(name: str, **settings: Any) -> dict[str, Any]:
    return {"codec": {"name": name, **settings}}


def test_settings_survive_the_runs_config(tmp_path: Any) -> None:
    cfg = config(codec("topk", top_k="1k", bits=8), {**TOP_K, "top_k": 500})
    (tmp_path / "config.yaml").write_text(dump_config(cfg), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == cfg
    assert cfg.decisive_for_student()["targets"]["codec"]["top_k"] == 1000


@pytest.mark.parametrize("objective", [TOP_K, {**TOP_K, "top_k": 12, "temperature": 2.0}, SAMPLED, FULL])
@pytest.mark.parametrize("name", CODECS)
def test_every_codec_with_every_kind_of_targets_works_or_is_refused_with_what_would(name: str, objective: Any) -> None:
    temperature = objective.get("temperature", 1.0)
    settings = {} if name == "hidden" else {"temperature": temperature}
    fits = name == "hidden" or name == objective["targets"]
    if fits:
        assert config(codec(name, **settings), objective).distill.source.name == "cached"
        return
    with pytest.raises(ConfigError, match=rf"targets.codec: {name} does not give .*; .*hidden"):
        config(codec(name, **settings), objective)


@pytest.mark.parametrize(
    ("targets", "more", "message"),
    [
        (None, {}, r"cached needs a section targets"),
        (codec("topk"), {"objective": {**TOP_K, "temperature": 2.0}}, r"targets at temperature 2.*; hidden can"),
        (codec("topk", top_k=32), {"objective": TOP_K}, r"the top 64 tokens \(it gives 32\)"),
        (codec("sampled", draws=12), {}, r"25 sampled tokens \(it gives 12\)"),
        (codec("zip"), {}, r"targets\.codec\.name: expected one of sampled, topk, hidden, got 'zip'"),
        (codec("topk", bit=6), {}, r"bit: unknown key \(did you mean 'bits'\?\)"),
        ({"teacher_placement": "cached"}, {}, r"a store is not made from a store"),
        ({"teacher_placement": "partitioned"}, {}, r"do not run forwards together"),
        ({"teacher_placement": "served"}, {}, r"teacher_placement \(served\) does not give 25 sampled tokens"),
        ({"share": 0.0}, {}, r"targets\.share"),
    ],
)
def test_what_does_not_go_together_is_refused(targets: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(targets, **more)


def test_probes_need_a_teacher_that_is_there() -> None:
    tree = config({}).resolved()
    tree["prune"] |= {"ffn": None, "target_params": "50%", "search": {**tree["prune"]["search"], "probe_tokens": 1000}}
    with pytest.raises(ConfigError, match=r"probe_tokens does not go with .*cached"):
        build_config(tree, "test")


def test_ranks_that_share_layers_read_a_store_and_draw_from_no_shard() -> None:
    shared = {"processes": 2, "tensor_parallel": 2}
    assert config({}, **shared).distill.data_parallel == 1
    with pytest.raises(ConfigError, match=r"sampled tokens .* of a teacher in the ranks"):
        config(teacher_placement="replicated", **shared)


def test_a_run_may_change_who_writes_a_store_and_not_what_is_in_it() -> None:
    assert may_change("targets.processes") and may_change("targets.path")
    assert not any(may_change(f"targets.{name}") for name in ("codec.draws", "positions", "share"))
    assert not may_change("targets")
    chosen = [TargetsConfig(share=share, positions=positions) for share, positions in ((0.2, "all"), (0.3, "entropy"))]
    assert [one.decisive()["share"] for one in chosen] == [1.0, 0.3]
