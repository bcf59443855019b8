"""Reading a stream of server-sent events (WHATWG HTML, section 9.2) without keeping more than one of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kdscale.errors import ServiceError

MOST_BYTES = 4 << 20  # of one event


@dataclass(frozen=True)
class Message:
    """One message of a stream; `id` is the last one that was sent, also with a message before."""

    id: str
    event: str
    data: str


def messages(chunks: Iterable[bytes]) -> Iterator[Message]:
    """The messages in the bytes of a stream; one that the end cuts off is left out.

    Raises ServiceError for a message that is too large. Lines end where the standard says, and nowhere else: JSON may
    hold other characters that Python takes for the end of a line.
    """
    last_id, event, data = "", "", list[str]()
    for line in _lines(chunks):
        if not line:
            if data:
                yield Message(last_id, event or "message", "\n".join(data))
            event, data = "", []
            continue
        name, _, value = line.partition(":")  # a comment has no name
        value = value.removeprefix(" ")
        if name == "id" and "\0" not in value:
            last_id = value
        elif name == "event":
            event = value
        elif name == "data":
            data.append(value)
            if sum(map(len, data)) > MOST_BYTES:
                raise _too_large()


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    rest, after_return = b"", False
    for chunk in chunks:
        if not chunk:
            continue
        new = chunk[1:] if after_return and chunk.startswith(b"\n") else chunk  # the second half of a line's end
        after_return = chunk.endswith(b"\r")
        *lines, rest = (rest + new).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        yield from (line.decode("utf-8", "replace") for line in lines)
        if len(rest) > MOST_BYTES:
            raise _too_large()


def _too_large() -> ServiceError:
    return ServiceError("an event of the service", expected=f"at most {MOST_BYTES:,} bytes", got="more")
