"""The service's pages as people who mean harm use them: forms, what others wrote, and the way through a sign-in."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlencode, urljoin, urlsplit

import pytest

from tests.hostile.nasty import HostileCases
from tests.hostile.service_app import MARKUP, Target, attacked, guarded


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with attacked(tmp_path_factory.mktemp("service") / "home") as target:
        yield target


FORMS: dict[str, dict[str, str]] = {
    "nothing": {}, "a bomb": {"config": "a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]"},
    "a tag": {"config": "!!python/name:os.system"},
    "brackets": {"config": "[" * 100_000}, "a list": {"config": "- a"}, "long": {"config": "a: " + "x" * 300_000},
    "trust": {"config_name": "quick", "overrides": "teacher.trust_remote_code=true"},
    "outside": {"config_name": "quick", "overrides": "teacher.path=/etc"},
    "engine": {"config_name": "quick", "engine": "../x"},
    "name": {"config_name": "quick", "name": MARKUP}, "priority": {"config_name": "quick", "priority": "9" * 5000},
    "config by path": {"config_name": "/etc/passwd"}, "run_dir": {"config_name": "quick", "overrides": "run_dir=/etc"},
    "another's run": {"config_name": "1hf7yatz8-0000000"}, "no setting": {"config_name": "quick", "overrides": "\x00"},
}  # fmt: skip


def test_forms(service: Target, hostile: HostileCases) -> None:
    session = service.sessions.read(service.cookie)
    assert session is not None
    headers = {"Cookie": f"kdscale={service.cookie}", "X-CSRF-Token": service.sessions.csrf_token(session)}
    before = service.app.state.runs.counts()
    for name, form in FORMS.items():
        for path in ("/runs/new", f"/runs/{service.run_id}/fork"):
            sent = form if "new" in path else {**form, "overrides": form.get("overrides") or "teacher.path=/etc"}
            ask = lambda f=sent, p=path: service.ask("POST", p, data=f, headers=headers)  # noqa: E731
            hostile.run(f"{path.rpartition('/')[2]}: {name}", ask, must="refuse")
    assert service.app.state.runs.counts() == before


def test_pages_show_what_others_wrote_as_text(service: Target, hostile: HostileCases) -> None:
    run_id = service.add_run(MARKUP)
    service.app.state.runs.ask(run_id, "cancel", f"{MARKUP} \x1b[2J {MARKUP}")
    for route, method, _ in guarded(service):
        if method == "GET" and not route.path.startswith("/v1"):
            path = service.path_of(route).replace(service.run_id, run_id)
            shown = service.client.get(f"{path}?search={MARKUP}&runs={run_id}", headers=service.bearer("admin"))
            assert shown.status_code < 500, path
            assert MARKUP not in shown.text, path
            assert "\x1b" not in shown.text, path
    for name in ("next", "search", "owner", "state", "runs"):
        for path in ("/sign-in", "/runs", "/compare", "/machine", "/none", f"/runs/{MARKUP}"):
            for value in (MARKUP, '"><img src=x onerror=alert(1)>', "{{7*7}}", "javascript:alert(1)"):
                query = urlencode({name: value})
                ask = lambda a=f"{path}?{query}": service.ask("GET", a, headers=service.bearer("read"))  # noqa: E731
                answer = hostile.run(f"{path}?{query}", ask)
                shown = "" if answer is None else answer.text
                assert "<" not in value or value not in shown
                assert not any(word in shown for word in (">49<", 'href="javascript', 'action="javascript'))


FORM = {"Content-Type": "application/x-www-form-urlencoded"}
NEXT = [
    "https://evil.example", "//evil.example", "///evil.example", "/\\evil.example", "\\\\evil.example",
    "/\t/evil.example", "\t//evil.example", "http:evil.example", "javascript:alert(1)", "data:text/html,x",
    "/%0d%0aSet-Cookie:%20x=y",
    "/\r\nSet-Cookie: x=y", "", "runs", "/" + "x" * 5000, "https:/evil.example", "/.//evil.example",
]  # fmt: skip


def test_a_sign_in_leads_to_no_other_site(service: Target, hostile: HostileCases) -> None:
    for there in NEXT:
        form = {"token": service.secrets["read"], "next": there}
        answer = hostile.run(
            f"next {there[:40]}", lambda f=form: service.ask("POST", "/sign-in", data=f), must="accept"
        )
        place = urlsplit(urljoin("http://127.0.0.1:8765/sign-in", answer.headers["Location"]))
        assert place.netloc == "127.0.0.1:8765", there
        assert answer.headers.get_list("set-cookie")[0].startswith("kdscale=")
        assert len(answer.headers.get_list("set-cookie")) == 1
    service.client.cookies.clear()
    for origin in ("http://evil.example", "null"):
        form = {"token": service.secrets["read"]}
        ask = lambda f=form, o=origin: service.ask("POST", "/sign-in", data=f, headers={"Origin": o})  # noqa: E731
        hostile.run(f"a sign-in from {origin}", ask, must="refuse")
    for token in ("", "x", service.secrets["revoked"], "x" * 300_000, "\x00", "\ud800", "é", "' or 1=1--"):
        data = urlencode({"token": token}, errors="surrogatepass").encode()
        ask = lambda d=data: service.ask("POST", "/sign-in", content=d, headers=FORM)  # noqa: E731
        hostile.run(f"a sign-in with {token[:20]!r}", ask, must="refuse")
