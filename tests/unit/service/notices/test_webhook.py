"""One signed request: what arrives, and what every way of failing is called."""

from __future__ import annotations

import base64
import hashlib
import hmac
import stat
from pathlib import Path
from typing import Any

import pytest

from kdscale.errors import ConfigError
from kdscale.service.notices.webhook import DeliveryError, load_secret, post, secret_of, sign

LOCAL = ("127.0.0.1", "hooks.example")


def local(host: str, port: int) -> list[str]:
    return ["127.0.0.1"]


def test_the_signature_is_the_published_example_s() -> None:
    """The vector of the Standard Webhooks specification's reference libraries."""
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signature = sign(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_the_body_and_headers_arrive(receiver: Any) -> None:
    post(f"http://127.0.0.1:{receiver.port}/a?b=c", b"{}", {"webhook-id": "n1"}, allowed=LOCAL)
    path, headers, body = receiver.got[0]
    assert (path, body, headers["webhook-id"]) == ("/a?b=c", b"{}", "n1")
    assert headers["content-type"] == "application/json" and headers["host"] == f"127.0.0.1:{receiver.port}"


def test_a_host_that_is_not_allowed_gets_no_connection(receiver: Any) -> None:
    with pytest.raises(DeliveryError, match="not a host on the public internet") as caught:
        post(f"http://hooks.example:{receiver.port}/", b"{}", {}, look_up=local)
    assert caught.value.final and receiver.got == []


def test_redirects_are_not_followed(receiver: Any) -> None:
    receiver.answer, receiver.headers = 307, {"location": f"http://127.0.0.1:{receiver.port}/other"}
    with pytest.raises(DeliveryError, match="redirects are not followed") as caught:
        post(f"http://127.0.0.1:{receiver.port}/", b"{}", {}, allowed=LOCAL)
    assert caught.value.final and len(receiver.got) == 1


@pytest.mark.parametrize(("status", "final"), [(500, False), (503, False), (404, False), (429, False), (410, True)])
def test_other_answers_are_tried_again_but_for_gone(receiver: Any, status: int, final: bool) -> None:
    receiver.answer = status
    with pytest.raises(DeliveryError, match=str(status)) as caught:
        post(f"http://127.0.0.1:{receiver.port}/", b"{}", {}, allowed=LOCAL)
    assert caught.value.final is final


@pytest.mark.parametrize("words", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 fine\r\n" + b"x: y\r\n" * 200])
def test_nonsense_in_the_place_of_an_answer(receiver: Any, words: bytes) -> None:
    receiver.answer = lambda handler: (handler.wfile.write(words), handler.connection.shutdown(2))
    with pytest.raises(DeliveryError):
        post(f"http://127.0.0.1:{receiver.port}/", b"{}", {}, allowed=LOCAL)


def test_an_answer_that_drips_is_cut_off(receiver: Any) -> None:
    def drip(handler: Any) -> None:
        """A header line that never ends, as long as the client listens."""
        import select

        handler.wfile.write(b"HTTP/1.1 200 fine\r\n")
        while not select.select([handler.connection], [], [], 0.02)[0]:
            handler.wfile.write(b"x")

    receiver.answer = drip
    with pytest.raises(DeliveryError, match=r"no answer within 0\.2 s"):
        post(f"http://127.0.0.1:{receiver.port}/", b"{}", {}, allowed=LOCAL, whole_seconds=0.2)


def test_nobody_listens() -> None:
    with pytest.raises(DeliveryError, match="ConnectionRefused") as caught:
        post("http://127.0.0.1:1/", b"{}", {}, allowed=LOCAL)
    assert not caught.value.final


def test_the_next_address_is_tried_where_one_does_not_answer(receiver: Any) -> None:
    look_up = lambda host, port: ["::1", "127.0.0.1"]  # noqa: E731 (nothing listens at the first)
    post(f"http://hooks.example:{receiver.port}/", b"{}", {}, allowed=LOCAL, look_up=look_up)
    assert len(receiver.got) == 1


def test_https_checks_the_certificate_of_the_name_and_connects_to_the_checked_address(
    https_receiver: Any, certificate: Any
) -> None:
    url = f"https://hooks.example:{https_receiver.port}/x"
    trusting = {"look_up": local, "tls": certificate.client}
    post(url, b"{}", {}, allowed=LOCAL, **trusting)
    assert https_receiver.got[0][1]["host"] == f"hooks.example:{https_receiver.port}"
    with pytest.raises(DeliveryError, match=r"(?i)certificate"):
        post(
            url.replace("hooks", "other"), b"{}", {}, allowed=("other.example",), look_up=local, tls=certificate.client
        )
    with pytest.raises(DeliveryError, match=r"(?i)certificate"):
        post(url, b"{}", {}, allowed=LOCAL, look_up=local)


def test_a_secret_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    first = secret_of(tmp_path, None)
    assert len(first) == 32 and secret_of(tmp_path, None) == first
    assert [path.name for path in tmp_path.iterdir()] == ["webhook.key"]
    assert stat.S_IMODE((tmp_path / "webhook.key").stat().st_mode) == 0o600
    body = hmac.new(first, b"n.1.{}", hashlib.sha256).digest()
    assert sign(first, "n", 1, b"{}") == "v1," + base64.b64encode(body).decode()


@pytest.mark.parametrize("words", ["", "short", "whsec_!!!", "whsec_c2hvcnQ="])
def test_a_weak_secret_is_refused(tmp_path: Path, words: str) -> None:
    (tmp_path / "key").write_text(words)
    with pytest.raises(ConfigError, match="webhook_secret_file") as caught:
        load_secret(tmp_path / "key", make=False)
    assert not words or words not in str(caught.value)


def test_a_secret_that_is_missing_is_not_made_where_the_settings_name_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="webhook_secret_file"):
        secret_of(tmp_path, str(tmp_path / "missing"))
