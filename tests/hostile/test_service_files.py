"""The files that a service reads when it starts: serve.yaml with every field and any content, and its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdscale.service.access.sessions import secret_key
from kdscale.service.settings import OidcSettings, ServiceSettings, load_settings
from tests.hostile.nasty import OUT_OF_ALL_RANGES, VALUES, HostileCases, damages, edited, leaves


def test_every_setting(hostile: HostileCases, tmp_path: Path) -> None:
    oidc = OidcSettings(issuer="https://x", client_id="x", client_secret_file="x")
    tree = ServiceSettings(home=str(tmp_path), oidc=oidc, max_running=1, slots=1, default_quota=1).model_dump(
        mode="json"
    )
    for path in leaves({name: value for name, value in tree.items() if name != "home"}):
        here = tree
        for key in path:
            here = here[key]
        number = isinstance(here, int | float) and not isinstance(here, bool)
        for name, value in VALUES.items():
            must = "refuse" if number and name in OUT_OF_ALL_RANGES else ""
            changed: Any = edited(tree, path, value)
            hostile.run(f"{'.'.join(map(str, path))} = {name}", lambda t=changed: load_settings(tmp_path, t), must=must)


@pytest.mark.parametrize("name", ["serve.yaml", "secret.key"])
def test_damaged_files(hostile: HostileCases, tmp_path: Path, name: str) -> None:
    read = {"serve.yaml": load_settings, "secret.key": secret_key}[name]
    for number, (what, damage) in enumerate(damages()):
        home = tmp_path / str(number)
        home.mkdir()
        (home / name).write_bytes(b"port: 8765\n" * 9)
        damage(home / name)
        hostile.run(f"{name}: {what}", lambda home=home: read(home))
