"""Notices over real HTTP: taken once, tried again where that is safe, never waited for, and no URL in what is said."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from ft_resources import notifications
from ft_resources.notifications import ATTEMPT_SECONDS, ATTEMPTS, post
from ft_resources.serving import free_port
from tests.receiver import PATH, Receiver, receiving

NOTICE = {"text": "naïve: version 2 is live", "release": {"task": "naïve"}}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


def test_a_notice_is_taken_once(receiver: Receiver) -> None:
    assert post([receiver.url], NOTICE) == []
    assert receiver.asked == [("POST", PATH, NOTICE)]
    assert post([], NOTICE) == []


@pytest.mark.parametrize(("statuses", "taken"), [([500, 429, 204], True), ([503], False)])
def test_one_that_did_not_take_it_is_asked_three_times(receiver: Receiver, statuses: list[int], taken: bool) -> None:
    receiver.status = statuses
    told = post([receiver.url], NOTICE)
    assert told == ([] if taken else ["webhook 1 of 1 answered 503, at attempt 3 of 3"])
    assert len(receiver.asked) == ATTEMPTS


def test_one_that_refuses_it_is_not_asked_again(receiver: Receiver) -> None:
    receiver.status = [404]
    assert post([receiver.url], NOTICE) == ["webhook 1 of 1 answered 404"]
    assert len(receiver.asked) == 1


def test_redirects_are_not_followed(receiver: Receiver) -> None:
    with receiving() as elsewhere:
        receiver.status, receiver.location = [302], elsewhere.url
        assert post([receiver.url], NOTICE) == ["webhook 1 of 1 answered 302"]
        assert elsewhere.asked == []


def test_one_that_is_silent_may_have_it_and_is_not_asked_again(receiver: Receiver) -> None:
    receiver.delay = ATTEMPT_SECONDS + 1
    began = time.monotonic()
    (told,) = post([receiver.url], NOTICE)
    assert told == "webhook 1 of 1 gave no answer (TimeoutError); it may have the notice all the same"
    assert time.monotonic() - began < ATTEMPT_SECONDS + 1
    assert len(receiver.asked) == 1


def test_an_answer_that_trickles_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte is in time for the socket; the whole never comes."""
    monkeypatch.setattr(notifications, "TOTAL_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def trickle() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\n")
                for _ in range(8):
                    connection.sendall(b"x: y\r\n")
                    time.sleep(0.25)

        thread = threading.Thread(target=trickle)
        thread.start()
        began = time.monotonic()
        (told,) = post([f"http://127.0.0.1:{server.getsockname()[1]}{PATH}"], NOTICE)
        assert "did not answer in time" in told
        assert time.monotonic() - began < 1.5
        thread.join()


def test_one_that_is_down_holds_up_no_other_and_is_not_named(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    with caplog.at_level("DEBUG"):
        (told,) = post([f"http://127.0.0.1:{port}{PATH}", receiver.url], NOTICE)
    assert told == "webhook 1 of 2 could not be reached (ConnectionRefusedError), at attempt 3 of 3"
    assert receiver.notices == [NOTICE]
    assert "secret-path" not in caplog.text and str(port) not in caplog.text
