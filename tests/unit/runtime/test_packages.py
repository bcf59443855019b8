"""A missing optional package is one message, whatever needs it."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from kdscale.errors import ConfigError
from kdscale.runtime.packages import require_packages


def test_what_is_missing_is_named_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "of_a_test", SimpleNamespace())
    require_packages("the thing", ("sys", "of_a_test"), "extra")
    with pytest.raises(ConfigError) as caught:
        require_packages("the thing", ("sys", "no_such_a", "no_such_b"), "extra", "leave it out")
    assert caught.value.what == "the thing"
    assert caught.value.expected == "the package no_such_a and no_such_b"
    assert caught.value.hint == "pip install 'kdscale[extra]', or leave it out"
