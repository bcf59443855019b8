"""The page in a real browser: Debian's Chromium, driven by playwright. Runs are moved by hand; none of them trains."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kdscale.service.app import make_app
from kdscale.service.database.connection import open_database
from kdscale.service.database.runs import NewRun, Run, Runs
from kdscale.service.settings import ServiceSettings

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the extra service is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")

CONFIG = "name: tiny\nrun_dir: anywhere\nteacher:\n  path: models/tiny\nprune:\n  target_params: 50%\n"
_PATIENCE = 15_000  # milliseconds in which something must be seen


@dataclass(frozen=True)
class Service:
    """A service that listens, and a token for it."""

    address: str
    runs: Runs
    secret: str
    folder: Path

    def add(self, name: str) -> Run:
        """A run in the queue."""
        new = NewRun(name=name, owner="alice", config={"name": name}, folder=self.folder / name)
        return self.runs.add(new)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("home")
    settings = ServiceSettings(home=str(home))
    database = open_database(settings)
    app = make_app(settings, database)
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="error", lifespan="on", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    _, secret = app.state.accounts.new_token("first", "alice", ["admin"])
    yield Service(f"http://127.0.0.1:{port}", app.state.runs, secret, home / "runs")
    server.should_exit = server.force_exit = True
    thread.join(30)
    database.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


@dataclass
class Tab:
    """A page of a signed-in person; `complaints` are errors of scripts and refusals of the content policy."""

    page: Any
    service: Service
    complaints: list[str]

    def open(self, path: str) -> None:
        """Go to an address of the service."""
        self.page.goto(self.service.address + path)

    def sees(self, text: str, where: str = "main") -> None:
        """Wait until a text is shown, without loading the page again."""
        api.expect(self.page.locator(where)).to_contain_text(text, timeout=_PATIENCE)


@pytest.fixture(scope="module")
def signed_in(browser: Any, service: Service) -> Any:
    """The cookie of somebody who signed in by the keyboard."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{service.address}/runs")
    page.wait_for_function("document.activeElement.id === 'token'")  # nothing is to be clicked first
    page.keyboard.type(service.secret)
    page.keyboard.press("Enter")
    page.wait_for_url("**/runs")
    state = context.storage_state()
    context.close()
    return state


def _tab(browser: Any, service: Service, state: Any, **options: Any) -> Iterator[Tab]:
    context = browser.new_context(storage_state=state, **options)
    page, complaints = context.new_page(), list[str]()
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    yield Tab(page, service, complaints)
    context.close()
    assert complaints == []


@pytest.fixture
def tab(browser: Any, service: Service, signed_in: Any) -> Iterator[Tab]:
    yield from _tab(browser, service, signed_in)


@pytest.fixture
def without_scripts(browser: Any, service: Service, signed_in: Any) -> Iterator[Tab]:
    yield from _tab(browser, service, signed_in, java_script_enabled=False)


@pytest.fixture
def phone(browser: Any, service: Service, signed_in: Any) -> Iterator[Tab]:
    yield from _tab(browser, service, signed_in, viewport={"width": 375, "height": 700}, color_scheme="dark")


def press(tab: Tab, button: str) -> None:
    """Press a button, and again where it is asked whether that is meant."""
    tab.page.get_by_role("button", name=button, exact=True).click()
    tab.page.wait_for_url("**/runs/*/*")
    tab.page.get_by_role("button", name=button, exact=True).click()
    tab.page.wait_for_url(lambda address: address.count("/") == 4)


def test_a_run_is_submitted_watched_paused_and_resumed(tab: Tab) -> None:
    tab.open("/runs")
    tab.page.get_by_role("link", name="New run").first.click()
    tab.page.get_by_role("textbox", name="YAML").fill(CONFIG)
    tab.page.get_by_role("textbox", name="Name").fill("from-the-page")
    tab.page.get_by_role("button", name="Submit").click()
    tab.page.wait_for_url(lambda address: len(address.rsplit("/", 1)[1]) == 17)
    run_id = tab.page.url.rsplit("/", 1)[1]
    api.expect(tab.page.locator("h1")).to_have_text("from-the-page")
    state = "[role=status]"
    tab.sees("queued", state)
    assert tab.service.runs.get(run_id).state == "queued"
    tab.service.runs.move(run_id, "starting")
    tab.sees("starting", state)
    tab.service.runs.move(run_id, "running")
    tab.sees("running", state)
    press(tab, "Pause")
    tab.sees("pausing", state)
    tab.service.runs.move(run_id, "paused")
    tab.sees("paused", state)
    press(tab, "Resume")
    tab.sees("queued", state)
    assert "pause was asked for by alice" in tab.page.locator(".events").inner_text()


def test_what_changes_leaves_ticks_and_focus_where_they_are(tab: Tab) -> None:
    first = tab.service.add("ticked")
    tab.open("/runs")
    tick = tab.page.get_by_role("checkbox", name="Compare ticked")
    tick.check()
    tick.focus()
    tab.service.add("came later")
    tab.sees("came later")
    tab.service.runs.move(first.id, "starting")
    tab.sees("starting", f"#run-{first.id}")
    assert tick.is_checked()
    assert tab.page.evaluate("document.activeElement.getAttribute('aria-label')") == "Compare ticked"


def test_a_page_whose_sign_in_has_ended_asks_for_another(tab: Tab) -> None:
    tab.open("/runs")
    tab.page.context.clear_cookies()
    tab.service.add("for-nobody")  # the page asks for what changed
    tab.page.wait_for_url("**/sign-in*", timeout=_PATIENCE)
    tab.complaints[:] = [text for text in tab.complaints if "401" not in text]


def test_a_config_is_checked_while_it_is_typed(tab: Tab) -> None:
    tab.open("/runs/new")
    tab.page.get_by_role("textbox", name="YAML").fill("name: tiny\nprune: {}\n")
    tab.sees("This cannot run yet", "#estimate")
    tab.sees("teacher", "#estimate")


def test_everything_works_without_scripts(without_scripts: Tab) -> None:
    tab = without_scripts
    run = tab.service.add("plain")
    tab.open(f"/runs/{run.id}")
    press(tab, "Pause")
    tab.sees("paused")
    press(tab, "Cancel")
    tab.sees("cancelled")
    tab.open("/runs?state=cancelled")
    tab.sees("plain")
    tab.open("/runs/new")
    tab.page.get_by_role("textbox", name="YAML").fill("name: tiny\n")
    tab.page.get_by_role("button", name="Check").click()
    tab.sees("This cannot run yet")
    assert tab.page.get_by_role("textbox", name="YAML").input_value() == "name: tiny\n"


def test_the_keyboard_alone_reaches_the_list_and_a_button(tab: Tab) -> None:
    run = tab.service.add("by keyboard")
    tab.open(f"/runs/{run.id}")
    focused = "document.activeElement.textContent.trim()"
    tab.page.keyboard.press("Tab")
    assert tab.page.evaluate(focused) == "Skip to the content"
    assert tab.page.evaluate("document.activeElement.getBoundingClientRect().top >= 0")
    tab.page.keyboard.press("Enter")
    for _ in range(10):
        tab.page.keyboard.press("Tab")
        if tab.page.evaluate(focused) == "Pause":
            break
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert tab.page.evaluate(outline) == "solid"
    tab.page.keyboard.press("Enter")
    tab.page.wait_for_url("**/pause?")


def test_a_phone_shows_every_page_in_its_width_and_in_the_dark(phone: Tab) -> None:
    run = phone.service.add("a-name-without-any-place-to-break-it-" + "x" * 150)
    other = phone.service.add("another")
    other.folder.mkdir(parents=True)
    run.folder.mkdir()
    paths = ("/runs", f"/runs/{run.id}", f"/runs/{run.id}/fork", "/runs/new", "/machine", "/runs/zzz",
             f"/compare?run={run.id}&run={other.id}")  # fmt: skip
    for path in paths:
        phone.open(path)
        assert phone.page.evaluate("document.documentElement.scrollWidth") <= 375, path
        colour = phone.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) < 100
    phone.complaints[:] = [text for text in phone.complaints if "404" not in text]
