"""A service to attack: the whole application with people, a run of one of them, and things that nobody may see."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.testclient import TestClient

from kdscale.config.load import build_config, dump_config
from kdscale.errors import ServiceError
from kdscale.service.access.sessions import Sessions, secret_key
from kdscale.service.app import make_app
from kdscale.service.database.connection import Database, open_database
from kdscale.service.database.runs import NewRun
from kdscale.service.ids import new_run_id
from kdscale.service.settings import LimitSettings, ServiceSettings

BASE = "http://127.0.0.1:8765"
SECRET = "what-nobody-may-see"
MARKUP = "<script>alert(1)</script>"
# Routes that anybody may ask, and why.
PUBLIC = {
    "/healthz": "supervisors ask it", "/readyz": "supervisors ask it", "/openapi.json": "is the same everywhere",
    "/metrics": "asks for a token itself, unless the settings make it public", "/": "sends to /runs",
    "/static/{name}": "scripts and styles", "/sign-in": "asks for a token", "/sign-in/oidc": "sends to the provider",
    "/sign-in/oidc/callback": "lets in by the provider's word",
}  # fmt: skip

# Applications of their own, which ask for a token before anything else.
ASK_THEMSELVES = ("/mcp",)


def routes_of(routes: Any) -> Iterator[Any]:
    """All routes, also those of routers that were included."""
    for route in routes:
        inner = getattr(route, "original_router", None)
        yield from routes_of(inner.routes) if inner is not None else [route]


def scopes_of(dependant: Any) -> set[str]:
    """The scopes that a route's dependencies ask for."""
    own = {getattr(dependant.call, "scope", None)} - {None}
    return own.union(*(scopes_of(inner) for inner in dependant.dependencies))


class Target:
    """The service, and who asks it."""

    def __init__(self, home: Path, database: Database, settings: ServiceSettings):
        self.settings = settings
        self.app: FastAPI = make_app(settings, database)
        self.client = TestClient(self.app, BASE, raise_server_exceptions=False, follow_redirects=False)
        accounts = self.app.state.accounts
        self.secrets = {name: accounts.new_token(name, name, [name])[1] for name in ("read", "run", "admin")}
        self.secrets["expired"] = accounts.new_token("e", "run", ["admin"], 1.0)[1]
        revoked, self.secrets["revoked"] = accounts.new_token("r", "run", ["admin"])
        accounts.revoke(revoked.id)
        self.secrets["none"] = "kds_" + "x" * 43
        (home / "first-token").write_text(SECRET)
        (home / "serve.yaml").write_text(SECRET)
        secret_key(home)
        self.sessions = self.app.state.sessions = Sessions(SECRET.encode() * 2)
        token, _ = accounts.new_token("c", "run", ["run"])
        self.cookie = self.sessions.signed(token.id)
        self.run_id = self.add_run("ada")
        self.folder = settings.runs / self.run_id

    def add_run(self, owner: str, state: str = "") -> str:
        """A run with files of all kinds in its folder."""
        run_id = new_run_id()
        folder = self.settings.runs / run_id
        (folder / "logs").mkdir(parents=True)
        tree = {"name": "tiny", "run_dir": str(folder), "teacher": {"path": "t"}, "prune": {"target_params": "50%"}}
        config = build_config(tree, "test")
        (folder / "config.yaml").write_text(dump_config(config))
        (folder / "teacher.token").write_text(SECRET)
        (folder / "logs" / f"{MARKUP.replace('/', '')}.txt").write_text("x")
        (folder / "link").symlink_to(self.settings.folder / "first-token")
        (folder / "link-to-home").symlink_to(self.settings.folder)
        (folder / "loop").symlink_to("loop")
        (folder / "zero").symlink_to("/dev/zero")
        os.mkfifo(folder / "pipe")
        work = self.settings.jobs / run_id / "1"
        work.mkdir(parents=True)
        (work / "output.log").write_bytes(
            b"\x1b[2J" + MARKUP.encode() + b"\r\nid: 9\n\n\xff\xfe kds_" + b"y" * 43 + b"\n"
        )
        values: dict[str, Any] = {
            "id": run_id, "name": "tiny", "owner": owner, "config": config.resolved(), "folder": folder,
        }  # fmt: skip
        self.app.state.runs.add(NewRun(**values))
        self.app.state.events.append(
            run_id, "note\r\nid: 7", {"text": f"{MARKUP}\r\n\r\ndata: x\n\nid: 8", "\r\nid": 1}
        )
        return run_id

    def bearer(self, who: str) -> dict[str, str]:
        """The header of one of them."""
        return {"Authorization": f"Bearer {self.secrets[who]}"}

    def path_of(self, route: Any) -> str:
        """An address that the route answers."""
        given = {"run_id": self.run_id, "path": "config.yaml", "name": "demo"}
        path = str(route.path).replace(":path}", "}").replace("/runs/{run_id}/{name}", "/runs/{run_id}/cancel")
        return path.format_map(_Given(given))

    def ask(self, method: str, path: str, **options: Any) -> Any:
        """The answer. Raises ServiceError when it is a refusal, AssertionError when it is what no answer may be."""
        options.setdefault("headers", {})
        answer = self.client.request(method, path, **options)
        assert answer.status_code < 500, f"{answer.status_code}: {answer.text[:300]}"
        assert SECRET not in answer.text, "it shows a secret"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        if "html" in answer.headers.get("Content-Type", ""):
            assert "Content-Security-Policy" in answer.headers
            assert MARKUP not in answer.text, "it shows markup of others"
        if answer.headers.get("Location", "").startswith("/sign-in"):
            raise ServiceError("sent to the sign-in")
        if answer.status_code >= 400:
            kind = answer.headers["Content-Type"]
            assert kind.startswith(("text/html", "application/problem+json")), kind
            assert method == "HEAD" or kind.startswith("text/html") or answer.json()["title"]
            assert "Traceback" not in answer.text
            raise ServiceError(str(answer.status_code))
        return answer


class _Given(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return "x"


def settings_of(home: Path) -> ServiceSettings:
    """Settings with which the limits are not in the way of a thousand cases."""
    home.mkdir()
    limits = LimitSettings(requests_per_minute=60_000, failed_sign_ins_per_minute=60_000, body_seconds=0.5)
    return ServiceSettings(home=str(home), limits=limits)


@contextmanager
def attacked(home: Path) -> Iterator[Target]:
    """A service in a new home folder."""
    settings = settings_of(home)
    database = open_database(settings)
    target = Target(home, database, settings)
    yield target
    target.client.close()
    database.close()


def guarded(service: Target) -> Iterator[tuple[Any, str, str]]:
    """Every route with a scope, a method of it, and the scope."""
    for route in routes_of(service.app.routes):
        if route.path not in PUBLIC and hasattr(route, "dependant"):
            widest = max(scopes_of(route.dependant), key=("read", "run", "admin").index)
            for method in sorted(route.methods):
                yield route, method, widest
