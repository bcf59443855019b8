"""The configuration: strict, typed, one message for all that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdscale.config.load import build_config, config_differences, dump_config, load_config
from kdscale.errors import ConfigError
from kdscale.units import parse_budget, parse_count

MINIMAL: dict[str, Any] = {
    "name": "t", "run_dir": "runs/t", "teacher": {"path": "teachers/t"}, "prune": {"target_params": "50%"}
}  # fmt: skip


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_then_file_then_set(tmp_path: Path) -> None:
    path = write(
        tmp_path, "name: a\nrun_dir: r\nteacher: {path: t}\nprune: {ffn: 640}\ndistill: {tokens: 2M, seq_len: 128}"
    )
    config = load_config(path, ["distill.tokens=3k", "distill.optimizer.lr=1e-3", "prune.target_params=4B"])
    assert (config.distill.tokens, config.distill.seq_len, config.distill.micro_batch) == (3000, 128, 4)
    assert config.distill.optimizer.lr == 1e-3
    assert config.prune.target_params == "4B"


def test_dump_and_load_give_the_same_config(tmp_path: Path) -> None:
    config = build_config(MINIMAL, "here")
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(
    ("patch", "needle"),
    [
        ({"prune": {"target_parms": "4B"}}, "prune.target_parms: unknown key (did you mean 'target_params'?)"),
        (
            {"prune": {"target_params": "400%"}},
            "prune.target_params: expected a count such as 4B or 135M, or a share such as 50%, got '400%' (str)",
        ),
        ({"prune": {"target_decode": "fast"}}, "prune.target_decode: expected a time such as 12ms"),
        (
            {"steps": [{"name": "a", "prune": {"target_bytes": "x"}}]},
            "  - steps (a): prune.target_bytes: expected a size",
        ),
        ({"distill": {"served": {"urls": ["host"]}}}, "distill.served.urls: expected http://HOST:PORT, got host"),
        ({"distill": {"objectives": [{"name": "x"}]}}, "distill.objectives.0.name: expected one of token_divergence"),
        ({"distill": {"objectives": []}}, "distill.objectives: expected at least one"),
        ({"distill": {"teacher_placement": "served"}}, "distill.teacher_placement: served needs served.urls"),
        (
            {
                "distill": {
                    "teacher_placement": "served",
                    "served": {"urls": ["http://h:1"]},
                    "teacher_dtype": "bfloat16",
                }
            },
            "distill.teacher_dtype (bfloat16) is for a teacher in the ranks, not for served targets",
        ),
        (
            {"distill": {"teacher_placement": "partitioned", "teacher_overlap": True}},
            "distill.teacher_overlap (true) needs teacher_placement: replicated, tensor_parallel: 1 and",
        ),
        (
            {"distill": {"teacher_placement": "offloaded", "teacher_dtype": "float8"}},
            "distill.teacher_dtype (float8) needs teacher_placement: replicated and tensor_parallel: 1, got offloaded",
        ),
        ({"distill": {"profile": {"steps": [3, 2]}}}, "distill.profile.steps: expected [first, last]"),
        ({"distill": {"zero": {"extra": {"bf16": 1}}}}, "distill.zero.extra.bf16: set by distill.dtype"),
        ({"prune": {}}, "prune: give target_params or another target, or at least one of"),
        ({"student": {"path": "s"}}, "student: a ready model is not pruned, so it does not go with prune.target_* and"),
        ({"prune": {"ffn": "many"}}, "prune.ffn: input should be a valid integer, got 'many' (str)"),
        ({"prune": {"ffn": 0}}, "prune.ffn: input should be greater than 0, got 0 (int)"),
        ({"teacher": {}}, "teacher.path: required, but not given"),
        (
            {"distill": {"global_batch": 3}},
            "distill.global_batch (3) must be a multiple of micro_batch × processes (4)",
        ),
        (
            {"distill": {"shorter_first": [{"seq_len": 96, "until": 0.5}]}},
            "distill.shorter_first: expected seq_len to divide 512",
        ),
        (
            {"distill": {"shorter_first": [{"seq_len": 64, "until": 0.5}, {"seq_len": 32, "until": 0.6}]}},
            "distill.shorter_first: expected seq_len to grow",
        ),
        (
            {"distill": {"shorter_first": [{"seq_len": 64, "until": 0.5}], "teacher_placement": "cached"}},
            "distill.shorter_first: does not go with teacher_placement: cached",
        ),
        ({"distill": {"optimizer": {"lr": "fast"}}}, "distill.optimizer.lr: input should be a valid number"),
        ({"distill": {"dtype": "float16"}}, "distill.dtype"),
        ({"data": {"sources": []}}, "data.sources"),
        (
            {"steps": [{"name": "6b", "prune": {"axes": ["ffn"]}}]},  # the config's own target is the last step's
            "steps (6b): prune: give target_params or another target, or at least one of",
        ),
        (
            {"steps": [{"name": "a", "prune": {"ffn": 8, "axis": []}}]},
            "steps (a): prune.axis: unknown key (did you mean 'axes'?)",
        ),
        ({"steps": [{"name": "a", "prune": {"ffn": 8}}] * 2}, "steps: every name once, got a, a"),
        ({"importance": {"processes": 50}}, "importance.processes (50) must be at most the calibration batches (16)"),
        (
            {"importance": {"calibration_tokens": 100}},
            "importance.calibration_tokens (100) must be at least seq_len (512)",
        ),
        ({"distill": {"tokens": 1}}, "tokens (1) must be at least one step, global_batch × seq_len (4,096)"),
        ({"runtime": {"threads": 100_000}}, "runtime.threads: input should be less than or equal to 1024"),
        ({"runtime": {"watchdog_seconds": float("inf")}}, "runtime.watchdog_seconds: input should be a finite number"),
        ({"distill": {"optimizer": {"lr": float("inf")}}}, "distill.optimizer.lr: input should be a finite number"),
        ({"run_dir": "runs/a\n#SBATCH x"}, "run_dir: expected text without control characters"),
        ({"data": {"sources": [{"path": "hf:"}]}}, "data.sources.0.path: expected hf:NAME"),
        ({"eval": {"prompts": [""]}}, "eval.prompts.0"),
        ({"name": "../up"}, "name: string should match pattern"),
        ({"seed": True}, "seed: input should be a valid integer"),
    ],
)
def test_a_wrong_field_is_named(patch: dict[str, Any], needle: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({**MINIMAL, **patch}, "c.yaml")
    assert needle in str(caught.value)
    assert caught.value.exit_code == 2


def test_every_wrong_field_is_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({**MINIMAL, "sed": 1, "eval": {"tokens": -1}, "distill": {"seq_len": 1.5}}, "c.yaml")
    assert all(name in str(caught.value) for name in ("sed", "eval.tokens", "distill.seq_len"))


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("a: [1", "not valid YAML"),
        ("just words", "holds no settings"),
        ("", "holds no settings"),
        ("name: a\nname: b", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, text: str, needle: str) -> None:
    with pytest.raises(ConfigError, match=needle):
        load_config(write(tmp_path, text))


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize("override", ["nothing", "=3", "a..b=1", "name.deep=1"])
def test_a_malformed_override(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load_config(write(tmp_path, dump_config(build_config(MINIMAL, "x"))), [override])


@given(st.integers(1, 999), st.sampled_from(["", "k", "M", "B", "T"]))
def test_counts_with_suffixes(number: int, suffix: str) -> None:
    scale = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}[suffix]
    assert parse_count(f"{number}{suffix}") == number * scale
    assert parse_budget(f"{number}{suffix}") == ("absolute", float(number * scale))


@given(st.text(max_size=8))
def test_parse_target_parses_or_refuses(text: str) -> None:
    try:
        kind, value = parse_budget(text)
    except ValueError:
        return
    assert value > 0
    assert kind == "absolute" or value < 1


def test_differences_name_dotted_fields() -> None:
    old = build_config(MINIMAL, "x").resolved()
    new = build_config({**MINIMAL, "seed": 3, "distill": {"optimizer": {"lr": 1e-3}}}, "x").resolved()
    assert list(map(str, config_differences(old, new))) == ["distill.optimizer.lr: 0.0001 → 0.001", "seed: 0 → 3"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tracking", {"mlflow": {"uri": "postgresql://user:s3cret@db/mlflow"}}),
        ("teacher", {"path": "https://s3cret@host/model"}),
        ("distill", {"teacher_placement": "served", "served": {"urls": ["http://h:1/?api_key=s3cret"]}}),
        ("distill", {"teacher_placement": "served", "served": {"urls": ["ftp://user:s3cret@h"]}}),
        ("data", {"https://s3cret@h": 1}),
        ("seed", "https://s3cret@h"),
    ],
)
def test_a_config_holds_no_credentials_and_the_message_does_not_show_them(field: str, value: Any) -> None:
    tree = {"name": "t", "run_dir": "r", "teacher": {"path": "t"}, "prune": {"ffn": 8}, field: value}
    with pytest.raises(ConfigError) as caught:
        build_config(tree, "test")
    assert "s3cret" not in str(caught.value)
