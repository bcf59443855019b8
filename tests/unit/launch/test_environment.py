"""Which variables are sent to the ranks, and which are hidden."""

from __future__ import annotations

from kdscale_launch.environment import forwarded_variables, masked_lines, without_secrets


def test_only_listed_variables_are_sent_and_secrets_are_masked():
    environment = {"PATH": "/x", "HF_TOKEN": "t", "HF_HOME": "/h", "OMP_NUM_THREADS": "2", "MY_FLAG": "1"}
    assert forwarded_variables(environment) == {"HF_HOME": "/h", "HF_TOKEN": "t", "OMP_NUM_THREADS": "2"}
    assert "MY_FLAG" in forwarded_variables(environment, ["MY_*"])
    assert without_secrets(forwarded_variables(environment)) == {"HF_HOME": "/h", "OMP_NUM_THREADS": "2"}
    assert "HF_TOKEN=***" in masked_lines(forwarded_variables(environment))
