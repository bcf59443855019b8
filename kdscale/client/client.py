"""`Client`: the calls of a service's API, one method each."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from kdscale.client.connection import Connection, Patience, Tries
from kdscale.client.downloads import download, place_in
from kdscale.client.events import Message, messages
from kdscale.client.models import (
    ENDED,
    Artifact,
    Event,
    Metrics,
    Page,
    Run,
    RunDetail,
    RunState,
    Verdict,
)
from kdscale.client.problems import BusyError, ChangedError, UnreachableError
from kdscale.errors import ConfigError, ServiceError

Model = TypeVar("Model", bound=BaseModel)
_RUN_ID = re.compile(r"[a-z0-9-]{1,64}")
_SILENCE = 60.0  # seconds: the service says something on an idle stream more often
_BETWEEN_STREAMS = 1.0
_CHANGES = 3  # of a file, after which its download is given up
_HASHING_SECONDS = 600.0  # that the SHA-256 of a large file may take


class Client:
    """One service. Every method raises a subclass of kdscale.errors.ServiceError when the service refuses.

    `token`: by default KDSCALE_TOKEN, or the one that `kdscale login` kept for this address. Calls are tried again for
    `patience.seconds` when the connection fails, or the service is busy or away. Use it in one thread, and close it.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        allow_http: bool = False,
        timeout: float = 30.0,
        patience: Patience | None = None,
        transport: httpx.BaseTransport | None = None,
    ):
        """`allow_http`: plain HTTP to another machine. Raises ConfigError for a wrong address or token."""
        self._connection = Connection(
            url, token, allow_http=allow_http, timeout=timeout, patience=patience, transport=transport
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()

    @property
    def url(self) -> str:
        """The service's address."""
        return self._connection.url

    @property
    def has_token(self) -> bool:
        """Whether there is a token to send."""
        return self._connection.token is not None

    def submit(
        self,
        config: Mapping[str, Any] | None = None,
        *,
        config_name: str | None = None,
        set: Sequence[str] = (),
        name: str | None = None,
        priority: int = 0,
        target: Mapping[str, Any] | None = None,
        notify: Sequence[str] = (),
        key: str | None = None,
    ) -> Run:
        """Make a run of a config's settings, or of the one that the service knows as `config_name`.

        `set` changes fields, as `dotted.key=value`. `key` tells this submission from others: sent again with the same
        key it makes no second run. Left out, it is made here, and the tries of this call share it. `notify`: https
        addresses that take webhooks, and mailto: addresses, which are told of the run.
        """
        body = (
            _spec(config, config_name, set, name)
            | {"priority": priority}
            | ({"target": dict(target)} if target else {})
            | ({"notify": [{"to": address} for address in notify]} if notify else {})
        )
        return self._post(Run, "/v1/runs", body, key)

    def validate(
        self,
        config: Mapping[str, Any] | None = None,
        *,
        config_name: str | None = None,
        set: Sequence[str] = (),
        gpu: str | None = None,
        nodes: int = 1,
        gpus_per_node: int | None = None,
    ) -> Verdict:
        """Check a config without making a run; the estimate is for these GPUs, by default the service's own."""
        cluster = {"gpu": gpu, "nodes": nodes, "gpus_per_node": gpus_per_node}
        return self._post(Verdict, "/v1/runs:validate", _spec(config, config_name, set, None) | cluster)

    def runs(
        self, *, states: Collection[RunState] = (), owner: str | None = None, search: str | None = None, page: int = 100
    ) -> Iterator[Run]:
        """Every run that fits, the newest first; pages of `page` runs are asked for as they are needed."""
        query = {"state": sorted(states) or None, "owner": owner, "search": search, "limit": page}
        return self._all(Run, "/v1/runs", query)

    def run(self, run_id: str) -> RunDetail:
        """All about one run."""
        return self._get(RunDetail, _path(run_id))

    def pause(self, run_id: str) -> Run:
        """Have a run save and leave its devices; `resume` goes on from there."""
        return self._post(Run, _path(run_id, "pause"))

    def resume(self, run_id: str) -> Run:
        """Queue a paused, failed or cancelled run again; it goes on with what it saved."""
        return self._post(Run, _path(run_id, "resume"))

    def cancel(self, run_id: str) -> Run:
        """Stop a run; what it saved is kept."""
        return self._post(Run, _path(run_id, "cancel"))

    def rerun(self, run_id: str, *, key: str | None = None, **changes: Any) -> Run:
        """Make a new run with the spec of another one; `changes` are arguments of `submit`, but not its config."""
        return self._post(Run, _path(run_id, "rerun"), _changes(changes), key)

    def fork(self, run_id: str, *, key: str | None = None, **changes: Any) -> Run:
        """As `rerun`, but begin with what the other run has finished, up to the first stage that `changes` touch."""
        return self._post(Run, _path(run_id, "fork"), _changes(changes), key)

    def events(self, run_id: str, *, after: int = 0, follow: bool = True) -> Iterator[Event]:
        """What happens to a run, from the first event behind number `after` on.

        With `follow` the iterator waits for more until the run has ended, and connects again where a stream breaks off.
        """
        return self._followed(run_id, after) if follow else self._all(Event, _path(run_id, "events"), {"after": after})

    def wait(
        self, run_id: str, *, told: Callable[[RunDetail], None] = lambda _run: None, seconds: float = 2.0
    ) -> RunDetail:
        """Wait until a run has ended and return it; `told` is given it every `seconds` as it is by then."""
        while not (run := self.run(run_id)).has_ended:
            told(run)
            self._connection.patience.sleep(seconds)
        told(run)
        return run

    def metrics(
        self, run_id: str, *, names: Sequence[str] = (), since_step: int | None = None, max_points: int | None = None
    ) -> Metrics:
        """Series of a run, thinned to `max_points`; without `names`, all of them."""
        query = {"names": ",".join(names) or None, "since_step": since_step, "max_points": max_points}
        return self._get(Metrics, _path(run_id, "metrics"), query)

    def logs(
        self, run_id: str, *, tail: int = 200, rank: int | None = None, attempt: int | None = None, follow: bool = False
    ) -> Iterator[str]:
        """Lines that a run printed: the last `tail` ones, and with `follow` those that it prints until it has ended.

        `attempt`: of which start of the run; `rank`: of one process of its training.
        """
        path, query = _path(run_id, "logs"), {"tail": tail, "rank": rank, "attempt": attempt}
        if not follow:
            text = self._connection.call("GET", path, params=query).body.decode("utf-8", "replace")
            yield from text.removesuffix("\n").split("\n") if text else ()
            return
        for message in self._messages(path, query | {"follow": "true"}, None, lambda: False):
            if message.event == "end":
                return
            yield from message.data.split("\n")

    def artifacts(self, run_id: str, under: str = "") -> Iterator[Artifact]:
        """The files of a run, or those of one of its folders, by path."""
        return self._all(Artifact, _path(run_id, "artifacts"), {"under": under or None})

    def artifact(self, run_id: str, path: str) -> Artifact:
        """One file of a run, with its SHA-256, which the service may have to compute first."""
        address = _path(run_id, "artifacts", path)
        with self._connection.open("HEAD", address, silence=_HASHING_SECONDS) as response:
            headers = response.headers
            told = {
                "path": path, "bytes": headers.get("content-length"), "sha256": headers.get("etag", "").strip('"'),
                "modified": parsedate_to_datetime(headers.get("last-modified", "")),
            }  # fmt: skip
        return _checked(Artifact, json.dumps(told, default=str), self.url)

    def download(
        self, run_id: str, file: Artifact | str, folder: Path, *, said: Callable[[int], None] = lambda _bytes: None
    ) -> Path:
        """Bring a file of a run into `folder`, under its path in the run; `said` is told how many bytes are there.

        It appears whole, with the SHA-256 that the service told, or not at all; the next call goes on with what came.
        Raises FileError for a name that leads out of the folder.
        """
        found = self.artifact(run_id, file) if isinstance(file, str) else file
        digest = found.sha256 or self.artifact(run_id, found.path).sha256
        if not digest:
            raise ServiceError(f"{found.path} of run {run_id}", expected="its SHA-256", got="none")
        address, target = _path(run_id, "artifacts", found.path), place_in(folder, found.path)
        for left in reversed(range(_CHANGES)):
            try:
                return download(self._connection, address, target, sha256=digest, size=found.bytes, said=said)
            except ChangedError:  # such as a log of a run that goes on
                if not left:
                    raise
                found = self.artifact(run_id, found.path)
                digest = found.sha256 or digest
        raise AssertionError("the last try returns or raises")

    def compare(self, run_ids: Sequence[str]) -> dict[str, Any]:
        """Figures of several runs side by side, as `kdscale compare` writes them into compare.json."""
        for run_id in run_ids:
            _path(run_id)
        return self._object("/v1/compare", {"runs": ",".join(run_ids)})

    def machine(self) -> dict[str, Any]:
        """What the service's machine has, and who holds it."""
        return self._object("/v1/machine", {})

    def report(self, run_id: str) -> bytes:
        """The run's report, as HTML."""
        return self._connection.call("GET", _path(run_id, "report")).body

    def _followed(self, run_id: str, after: int) -> Iterator[Event]:
        path, last = _path(run_id, "events"), after

        def has_ended() -> bool:
            return self.run(run_id).has_ended

        for message in self._messages(path, {}, str(after), has_ended):
            event = _checked(Event, message.data, self.url)
            if event.seq > last:  # a stream that begins anew may say something again
                last = event.seq
                yield event
            # one that ended may have been queued again since
            if event.type == "state" and event.data.get("state") in ENDED and has_ended():
                return
        yield from self._all(Event, path, {"after": last})  # what the stream left out, which ended before the run did

    def _messages(
        self, path: str, query: Mapping[str, Any], last: str | None, is_over: Callable[[], bool]
    ) -> Iterator[Message]:
        """A stream over as many connections as it takes, each behind message `last` of the one before.

        One that the service ends goes on too, until there `is_over` nothing more to come.
        """
        tries = Tries(self._connection.patience)
        while True:
            headers = {"accept": "text/event-stream"} | ({} if last is None else {"last-event-id": last})
            try:
                with self._connection.open("GET", path, params=query, headers=headers, silence=_SILENCE) as stream:
                    if stream.status_code == httpx.codes.NO_CONTENT:  # there is no more, and there will be none
                        return
                    for message in messages(_heard(stream, tries)):
                        last = message.id or last
                        yield message
            except BusyError as error:
                tries.wait(error)
            except UnreachableError as error:
                if error.for_good:
                    raise
                tries.wait(error)
            else:
                if is_over():
                    return
                self._connection.patience.sleep(_BETWEEN_STREAMS)

    def _object(self, path: str, query: Mapping[str, Any]) -> dict[str, Any]:
        tree = self._connection.call("GET", path, params=query).tree(self.url)
        if not isinstance(tree, dict):
            raise ServiceError(f"the answer of {self.url}{path}", expected="an object", got=type(tree).__name__)
        return tree

    def _get(self, model: type[Model], path: str, query: Mapping[str, Any] | None = None) -> Model:
        return _checked(model, self._connection.call("GET", path, params=query).body, self.url)

    def _post(self, model: type[Model], path: str, body: Any = None, key: str | None = None) -> Model:
        # made once a call, so that a try whose answer was lost and the next one are the same request to the service
        headers = {"idempotency-key": key or str(uuid.uuid4())}
        answer = self._connection.call("POST", path, body={} if body is None else body, headers=headers)
        return _checked(model, answer.body, self.url)

    def _all(self, model: type[Model], path: str, query: Mapping[str, Any]) -> Iterator[Model]:
        page_of, asked = Page[model], dict(query)  # type: ignore[valid-type]
        while True:
            page = self._get(page_of, path, asked)
            yield from page.items
            if page.next is None:
                return
            if page.next == asked.get("after"):
                raise ServiceError(f"{self.url}{path}", expected="a cursor that moves on", got=page.next[:100])
            asked["after"] = page.next


def _heard(stream: httpx.Response, tries: Tries) -> Iterator[bytes]:
    """The bytes of a stream; whatever comes, also if it only keeps the connection alive, ends a failure."""
    for chunk in stream.iter_bytes():
        tries.begin_again()
        yield chunk


def _path(run_id: str, *rest: str) -> str:
    """The path of a run, or of something of it. Raises ConfigError for a text that is no id."""
    if _RUN_ID.fullmatch(run_id) is None:
        raise ConfigError(
            "the run",
            expected="an id such as 1hc9xqv3z-7m2k0ft",
            got=repr(run_id)[:100],
            hint="kdscale runs lists them",
        )
    for text in rest:  # a client would shorten them to the address of something else
        if {".", ".."} & set(text.split("/")):
            raise ConfigError("the path", expected="one below the run, without . and ..", got=repr(text)[:200])
    return "/".join(("/v1/runs", run_id, *(quote(part, safe="/") for part in rest)))


def _spec(
    config: Mapping[str, Any] | None, config_name: str | None, changes: Sequence[str], name: str | None
) -> dict[str, Any]:
    if (config is None) == (config_name is None):
        raise ConfigError("the submission", expected="either a config or a config_name")
    spec = {"config": None if config is None else dict(config), "config_name": config_name, "name": name}
    return {**{key: value for key, value in spec.items() if value is not None}, "set": list(changes)}


def _changes(changes: Mapping[str, Any]) -> dict[str, Any]:
    known = {"set", "name", "priority", "target"}
    if unknown := sorted(changes.keys() - known):
        raise ConfigError("what the new run has otherwise", expected=", ".join(sorted(known)), got=", ".join(unknown))
    return {key: value for key, value in changes.items() if value is not None}


def _checked(model: type[Model], body: bytes | str, url: str) -> Model:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise ServiceError(
            f"the answer of {url}", expected="what a kdscale service of this version tells",
            got=f"{'.'.join(map(str, first['loc']))}: {first['msg']}"[:300],
            hint="check the address; a service and its clients should be of one version",
        ) from error  # fmt: skip
