"""Which variables are sent to the ranks, and which are hidden."""

from __future__ import annotations

import pytest

from kdscale_launch import LaunchError
from kdscale_launch.environment import (
    check_text,
    forwarded_variables,
    has_credentials,
    is_secret,
    masked_lines,
    without_credentials,
    without_secrets,
)


def test_only_listed_variables_are_sent_and_secrets_are_masked():
    environment = {"PATH": "/x", "HF_TOKEN": "t", "HF_HOME": "/h", "OMP_NUM_THREADS": "2", "MY_FLAG": "1"}
    assert forwarded_variables(environment) == {"HF_HOME": "/h", "HF_TOKEN": "t", "OMP_NUM_THREADS": "2"}
    assert "MY_FLAG" in forwarded_variables(environment, ["MY_*"])
    assert without_secrets(forwarded_variables(environment)) == {"HF_HOME": "/h", "OMP_NUM_THREADS": "2"}
    assert "HF_TOKEN=***" in masked_lines(forwarded_variables(environment))


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "PGPASSWORD", "DB_PW", "PROXY_AUTH", "AWS_ACCESS_KEY_ID", "WANDB_API_KEY", "X_PASS"]
)
def test_a_name_tells_a_secret(name):
    assert is_secret(name)
    assert masked_lines({name: "s"}) == [f"{name}=***"]


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "OMP_PLACES", "MY_PWM", "AUTHOR", "KEYBOARD", "HF_HOME"])
def test_a_name_that_only_resembles_one_is_none(name):
    assert not is_secret(name, "https://host/a?b=c")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:pass@host:5000/x", "http://***@host:5000/x"),
        ("postgresql://u:p@ss@db/mlflow", "postgresql://***@db/mlflow"),
        ("see https://ghp_token@host, then", "see https://***@host, then"),
        ("https://host/x?a=1&access_token=abc&sig=d#e", "https://host/x?a=1&access_token=***&sig=***#e"),
    ],
)
def test_credentials_in_urls_are_masked(text, shown):
    assert without_credentials(text) == shown
    assert has_credentials(text)
    assert is_secret("MLFLOW_TRACKING_URI", text)
    assert not without_secrets({"MLFLOW_TRACKING_URI": text})
    assert not has_credentials(shown.replace("***@", "").replace("=***", "="))


@pytest.mark.parametrize("environment", [{"HF_X;reboot": "1"}, {"HF_X": "a\nb"}, {"HF_X": "\x1b]0;x"}])
def test_variables_that_a_script_cannot_hold_are_refused(environment):
    with pytest.raises(LaunchError, match="environment variable"):
        forwarded_variables(environment)


def test_a_refused_secret_is_not_shown():
    with pytest.raises(LaunchError) as caught:
        forwarded_variables({"HF_TOKEN": "hf_abc\n"})
    assert "hf_abc" not in str(caught.value)
    with pytest.raises(LaunchError, match="run_dir"):
        check_text("run_dir", "a\u2028b")
