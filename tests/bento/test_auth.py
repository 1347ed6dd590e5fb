"""Who is let in."""

import pytest

from bento.auth import authorise
from ft_resources.errors import RequestError

KEYS = ("first-key", "second-key")


@pytest.mark.parametrize("client", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_this_machine_needs_no_key(client: str) -> None:
    authorise(client, {}, ())


@pytest.mark.parametrize("client", ["10.0.0.1", "8.8.8.8", "::ffff:10.0.0.1", "fe80::1", "testclient", "", None])
def test_other_machines_need_a_key(client: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        authorise(client, {}, KEYS)
    assert (caught.value.error_code, caught.value.status) == ("unauthorized", 401)
    authorise(client, {b"authorization": b"Bearer second-key"}, KEYS)


@pytest.mark.parametrize(
    "shown", [b"Bearer first-ke", b"Bearer", b"Bearer ", b"Basic first-key", b"first-key", b"Bearer \xff"]
)
def test_a_wrong_key_is_refused(shown: bytes) -> None:
    with pytest.raises(RequestError):
        authorise("10.0.0.1", {b"authorization": shown}, KEYS)


def test_without_keys_nobody_from_outside_is_let_in() -> None:
    with pytest.raises(RequestError, match="key"):
        authorise("10.0.0.1", {b"authorization": b"Bearer "}, ())


@pytest.mark.parametrize("name", [b"x-forwarded-for", b"forwarded", b"x-real-ip"])
def test_what_came_through_a_proxy_is_not_from_this_machine(name: bytes) -> None:
    with pytest.raises(RequestError):
        authorise("127.0.0.1", {name: b"127.0.0.1"}, KEYS)
