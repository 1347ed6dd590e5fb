"""Who is let in, and as whom: keys of the environment and of a real ledger, tokens, this machine."""

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from bento.auth import LOCAL, Caller, Doorkeeper, permit
from bento.keys import KeyRing
from bento.limits import RateLimits
from bento.tokens import AUDIENCE, ISSUER, SECONDS, Tokens
from ft_resources import api_keys
from ft_resources.errors import RequestError, SpecError
from ft_resources.ledger import Ledger

KEYS = ("first-key", "second-key")
SECRET = b"0123456789abcdef0123456789abcdef"
OUTSIDE = "10.0.0.1"
HERE = {b"host": b"127.0.0.1:3000"}


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield ledger
    ledger.close()


def add(ledger: Ledger, name: str, role: str = "reader", **more: Any) -> str:
    key, shown = api_keys.make(name, role, created_by="test", **more)
    ledger.add_key(key)
    return shown


def bearer(shown: str | bytes) -> dict[bytes, bytes]:
    return {b"authorization": b"Bearer " + (shown.encode() if isinstance(shown, str) else shown)}


def doors(ledger: Ledger | None = None, mode: Any = "auto", **tokens: Any) -> Doorkeeper:
    keeper = Doorkeeper(KEYS, mode, Tokens(SECRET, **tokens))
    if ledger is not None:
        keeper.ring = KeyRing(ledger, every=0)
        keeper.ring.refresh()
    return keeper


class ToldOf(KeyRing):
    """A ring that says when it has read its keys."""

    def __init__(self, ledger: Ledger, every: float) -> None:
        super().__init__(ledger, every)
        self.read = threading.Condition()

    def refresh(self) -> None:
        with self.read:
            super().refresh()
            self.read.notify_all()


def refused(keeper: Doorkeeper, headers: dict[bytes, bytes], client: str | None = OUTSIDE) -> str:
    with pytest.raises(RequestError) as caught:
        keeper.identify(client, headers)
    assert (caught.value.error_code, caught.value.status) == ("unauthorized", 401)
    return caught.value.what


@pytest.mark.parametrize("client", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_this_machine_needs_no_key_unless_told_so(client: str) -> None:
    assert doors().identify(client, HERE) is LOCAL
    assert doors().identify(client, HERE | bearer("whatever a client library sends")) is LOCAL
    refused(doors(mode="always"), HERE, client)
    assert doors().trusts(client, HERE) and not doors(mode="always").trusts(client, HERE)


@pytest.mark.parametrize(
    "client", [OUTSIDE, "8.8.8.8", "::ffff:10.0.0.1", "fe80::1", "127.0.0.6", "localhost", "testclient", "", None]
)
def test_other_machines_need_a_key(client: str | None) -> None:
    refused(doors(), HERE, client)
    assert doors().identify(client, bearer("second-key")).role == "admin"


@pytest.mark.parametrize(
    "shown", [b"Bearer first-ke", b"Bearer", b"Bearer ", b"Basic first-key", b"first-key", b"Bearer \xff"]
)
def test_a_wrong_key_is_refused(shown: bytes) -> None:
    refused(doors(), {b"authorization": shown})


@pytest.mark.parametrize(
    "name",
    [
        *(b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-client-cert", b"forwarded", b"x-real-ip"),
        *(b"via", b"x-envoy-external-address"),
    ],
)
def test_what_came_through_a_proxy_is_not_from_this_machine(name: bytes) -> None:
    refused(doors(), HERE | {name: b"127.0.0.1"}, "127.0.0.1")


@pytest.mark.parametrize(
    "host", [b"", b"rebound.example:3000", b"10.0.0.1", b"127.0.0.1.evil.example", b"[::1", b"localhost.evil.example"]
)
def test_a_site_whose_name_was_made_to_point_to_this_machine_is_not_from_it(host: bytes) -> None:
    refused(doors(), {b"host": host}, "127.0.0.1")
    refused(doors(), {}, "127.0.0.1")
    for own in (b"localhost:3000", b"LOCALHOST", b"127.0.0.1", b"127.9.9.9:80", b"[::1]:3000"):
        assert doors().identify("127.0.0.1", {b"host": own}) is LOCAL


def test_a_page_from_elsewhere_in_a_browser_on_this_machine_is_not_from_this_machine() -> None:
    for origin in (b"https://evil.example", b"null", b"http://[", b"http://127.0.0.1.evil.example"):
        refused(doors(), HERE | {b"origin": origin}, "127.0.0.1")
    for origin in (b"http://localhost:3000", b"http://127.0.0.1:3000", b"http://[::1]"):
        assert doors().identify("127.0.0.1", HERE | {b"origin": origin}) is LOCAL


def test_a_key_of_the_ledger_stands_for_its_role_and_tasks(ledger: Ledger) -> None:
    shown = add(ledger, "shop", tasks=["mail", "news"], rate=30.0)
    caller = doors(ledger).identify(OUTSIDE, bearer(shown))
    assert (caller.name, caller.role, caller.tasks, caller.rate) == ("shop", "reader", frozenset({"mail", "news"}), 30)
    assert doors(ledger).identify("127.0.0.1", bearer(shown)) == caller, "who shows a key is held to it"
    refused(doors(ledger), bearer(shown[:-1] + ("A" if shown[-1] != "A" else "B")))
    refused(doors(ledger), bearer(shown[:-1] + "!"), "127.0.0.1")


def test_neither_the_ledger_nor_its_audit_holds_the_secret(ledger: Ledger, tmp_path: Path) -> None:
    secret = add(ledger, "shop").split("_", 2)[2]
    assert [event["action"] for event in ledger.audit_events()] == ["create_key"]
    for file in tmp_path.iterdir():
        assert secret.encode() not in file.read_bytes()


def test_a_revoked_and_an_expired_key_open_nothing(ledger: Ledger) -> None:
    shown = add(ledger, "shop")
    keeper = doors(ledger)
    token = keeper.tokens.issue(keeper.key_of(bearer(shown)))  # type: ignore[union-attr]
    assert keeper.identify(OUTSIDE, bearer(token)).name == "shop"
    with pytest.raises(SpecError, match="there is a key 'shop'"):
        add(ledger, "shop")
    ledger.revoke_key("shop", "test")
    assert keeper.ring is not None
    keeper.ring.refresh()
    refused(keeper, bearer(shown))
    assert "revoked" in refused(keeper, bearer(token)), "a token does not outlive its key"
    with pytest.raises(SpecError, match="no key 'shop'"):
        ledger.revoke_key("shop", "test")
    soon = add(ledger, "shop", expires_at=datetime.now(UTC) + timedelta(milliseconds=50))
    keeper.ring.refresh()
    stored = ledger.api_keys()[-1]
    assert stored.valid(datetime.now(UTC) - timedelta(seconds=1))
    assert not stored.valid(datetime.now(UTC) + timedelta(seconds=1))
    assert stored.fits(soon.encode())


def test_keys_are_read_again_and_again_whatever_else_the_service_does(ledger: Ledger) -> None:
    shown = add(ledger, "shop").encode()
    ring = ToldOf(ledger, every=0.001)
    ring.watcher.start()
    try:
        with ring.read:
            assert ring.read.wait_for(lambda: ring.find(shown) is not None, 10)
        ledger.revoke_key("shop", "test")
        with ring.read:
            assert ring.read.wait_for(lambda: ring.find(shown) is None, 10)
        assert ring.watcher.alive
    finally:
        ring.watcher.stop()
    assert not ring.watcher.alive


def test_keys_that_cannot_be_read_stay_in_force(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    from sqlalchemy.exc import OperationalError

    shown = add(ledger, "shop")
    keeper = doors(ledger)

    def fail() -> Any:
        raise OperationalError("SELECT", {}, Exception("gone"))

    monkeypatch.setattr(ledger, "api_keys", fail)
    assert keeper.ring is not None
    keeper.ring.refresh()
    assert keeper.identify(OUTSIDE, bearer(shown)).name == "shop"


def test_before_the_keys_are_read_a_key_is_neither_right_nor_wrong(ledger: Ledger) -> None:
    shown, keeper = add(ledger, "shop"), doors()
    with pytest.raises(RequestError) as caught:
        keeper.identify(OUTSIDE, bearer(shown))
    assert caught.value.status == 503


def test_what_makes_no_key_is_said() -> None:
    for name, more in (
        ("No Spaces", {}),
        ("x", {"role": "root"}),
        ("x", {"rate": 0.0}),
        ("x", {"tasks": []}),
        ("x", {"role": "admin", "tasks": ["t"]}),
        ("x", {"expires_at": datetime.now(UTC)}),
    ):
        with pytest.raises(SpecError):
            api_keys.make(name, **{"role": "reader", "created_by": "test", **more})


@pytest.mark.parametrize(
    ("caller", "task", "role", "let"),
    [
        (Caller("a", "reader"), "mail", "reader", True),
        (Caller("a", "reader"), "mail", "owner", False),
        (Caller("a", "reader", frozenset({"mail"})), "mail", "reader", True),
        (Caller("a", "reader", frozenset({"mail"})), "news", "reader", False),
        (Caller("a", "reader", frozenset({"mail"})), None, "reader", False),
        (Caller("a", "owner", frozenset({"mail"})), "mail", "owner", True),
        (Caller("a", "owner"), None, "owner", True),
        (Caller("a", "owner"), None, "admin", False),
        (Caller("a", "admin"), None, "admin", True),
    ],
)
def test_role_and_task_decide(caller: Caller, task: str | None, role: Any, let: bool) -> None:
    request = SimpleNamespace(state=SimpleNamespace(caller=caller))
    if let:
        permit(request, task, role)
        return
    with pytest.raises(RequestError) as caught:
        permit(request, task, role)
    assert (caught.value.error_code, caught.value.status) == ("forbidden", 403)


# -- tokens -------------------------------------------------------------------------------------------------------


def claims(**changed: Any) -> dict[str, Any]:
    at = int(datetime.now(UTC).timestamp())
    return {"iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "iat": at, "exp": at + 60, "role": "reader"} | changed


def signed(secret: Any = SECRET, algorithm: str = "HS256", **changed: Any) -> bytes:
    return jwt.encode(claims(**changed), secret, algorithm=algorithm).encode()


def test_a_token_says_what_its_key_says_for_half_an_hour(ledger: Ledger) -> None:
    shown = add(ledger, "shop", "owner", tasks=["mail"], rate=5.0)
    keeper = doors(ledger)
    assert keeper.tokens is not None
    caller = keeper.key_of(bearer(shown))
    token = keeper.tokens.issue(caller)
    assert keeper.identify(OUTSIDE, bearer(token)) == caller
    assert SECONDS == 30 * 60
    past = Tokens(SECRET, clock=lambda: datetime.now(UTC).timestamp() - SECONDS - 1).issue(caller)
    assert "expired" in refused(keeper, bearer(past))
    with pytest.raises(RequestError):
        keeper.key_of(bearer(token))  # a token cannot prolong itself


def test_a_token_ends_when_its_key_leaves_the_environment() -> None:
    before = doors()
    assert before.tokens is not None
    token = before.tokens.issue(before.key_of(bearer("second-key")))
    assert before.identify(OUTSIDE, bearer(token)).role == "admin"
    after = Doorkeeper(("another-key", "first-key"), "auto", Tokens(SECRET))
    after.ring = None
    refused(after, bearer(token))


UNSIGNED = jwt.encode(claims(role="admin"), None, algorithm="none").encode()


@pytest.mark.parametrize(
    "token",
    [
        signed(b"another secret that is long enough"),
        signed(aud="another-service"),
        signed(iss="another issuer"),
        signed(exp=1),
        signed(role="root"),
        signed(tasks=[]),
        signed(tasks="mail"),
        UNSIGNED,
        signed(SECRET * 2, "HS512"),
        signed()[:-2] + b"xx",
        b"a.b.c",
        b"..",
    ],
)
def test_a_forged_token_is_refused_typed(token: bytes) -> None:
    refused(doors(), bearer(token))


def test_a_token_without_an_end_is_refused() -> None:
    endless = claims()
    del endless["exp"]
    refused(doors(), bearer(jwt.encode(endless, SECRET, algorithm="HS256")))


PRIVATE = {
    "RS256": rsa.generate_private_key(65537, 2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}


@pytest.mark.parametrize("algorithm", PRIVATE)
def test_tokens_of_another_issuer_are_taken_by_its_public_key_only(algorithm: str) -> None:
    private = PRIVATE[algorithm]
    pem = private.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    keeper = doors(public_key=pem.decode(), issuer="https://login.example")
    good = signed(private, algorithm, iss="https://login.example", tasks=["mail"])
    assert keeper.identify(OUTSIDE, bearer(good)) == Caller("ann", "reader", frozenset({"mail"}))
    untold = signed(private, algorithm, iss="https://login.example")
    assert keeper.identify(OUTSIDE, bearer(untold)).tasks == frozenset(), "who is told of no task may use none"
    boss = signed(private, algorithm, iss="https://login.example", role="admin")
    assert keeper.identify(OUTSIDE, bearer(boss)).tasks is None
    refused(keeper, bearer(signed(private, algorithm)))  # our issuer's name
    refused(doors(), bearer(good))
    # the classic: the public key, which everybody has, taken as the secret of an HMAC
    header, body = (jwt.utils.base64url_encode(json.dumps(part).encode()) for part in ({"alg": "HS256"}, claims()))
    confused = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256).sign(header + b"." + body, pem)
    refused(keeper, bearer(header + b"." + body + b"." + jwt.utils.base64url_encode(confused)))


def test_a_key_that_is_no_public_key_is_named() -> None:
    with pytest.raises(SpecError, match="public key"):
        Tokens(SECRET, public_key="-----BEGIN PUBLIC KEY-----\nxx\n-----END PUBLIC KEY-----", issuer="x")


# -- rates --------------------------------------------------------------------------------------------------------


def test_a_caller_has_a_bucket_of_requests_that_fills_up_again() -> None:
    time = [0.0]
    limits = RateLimits(60.0, clock=lambda: time[0])
    ann, bob = Caller("ann", "reader", rate=2.0, key_id="a"), Caller("bob", "reader", key_id="b")
    limits.take(ann)
    limits.take(ann)
    with pytest.raises(RequestError) as caught:
        limits.take(ann)
    assert (caught.value.error_code, caught.value.status, caught.value.retry_after) == ("rate_limited", 429, 30)
    for _ in range(60):
        limits.take(bob)  # others are not concerned; the default is theirs
    with pytest.raises(RequestError):
        limits.take(bob)
    for _ in range(1000):
        limits.take(LOCAL)
    time[0] = 29.0
    with pytest.raises(RequestError) as caught:
        limits.take(ann)
    assert caught.value.retry_after == 1
    time[0] = 30.0
    limits.take(ann)


def test_workers_share_a_rate() -> None:
    limits = RateLimits(None, workers=2, clock=lambda: 0.0)
    caller = Caller("ann", "reader", rate=4.0, key_id="a")
    limits.take(caller)
    limits.take(caller)
    with pytest.raises(RequestError):
        limits.take(caller)
