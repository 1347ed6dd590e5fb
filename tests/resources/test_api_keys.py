"""Keys in the ledger, on SQLite and on a real PostgreSQL server."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

from ft_resources import api_keys
from ft_resources.errors import SpecError
from ft_resources.ledger import Ledger


def test_a_key_is_kept_without_its_secret_and_has_its_name_alone(ledger: Ledger) -> None:
    until = datetime.now(UTC) + timedelta(days=1)
    key, shown = api_keys.make("shop", "reader", tasks=["b", "a"], rate=2.5, expires_at=until, created_by="ada")
    ledger.add_key(key)
    everything, _ = api_keys.make("all", "owner", created_by="ada")
    ledger.add_key(everything)
    assert ledger.api_keys() == [key, everything]
    assert key.fits(shown.encode()) and not everything.fits(shown.encode())
    with ThreadPoolExecutor(4) as pool:
        same = [api_keys.make("same", "reader", created_by="ada")[0] for _ in range(4)]
        failures = [one.exception() for one in [pool.submit(ledger.add_key, key) for key in same]]
    assert sum(isinstance(failure, SpecError) for failure in failures) == 3
    ledger.revoke_key("shop", "ada")
    ledger.add_key(api_keys.make("shop", "reader", created_by="ada")[0])
    assert [one.revoked_at is None for one in ledger.api_keys() if one.name == "shop"] == [False, True]
    assert [event["subject"] for event in ledger.audit_events()] == ["shop", "all", "same", "shop", "shop"]


def test_keys_that_were_made_with_a_key_end_with_it(ledger: Ledger) -> None:
    def add(name: str, role: str, by: str) -> api_keys.ApiKey:
        key, _ = api_keys.make(name, role, created_by=by)
        ledger.add_key(key)
        return key

    boss = add("boss", "admin", "ada")
    owner = add("owner", "owner", api_keys.made_by("boss", boss.id))
    add("reader", "reader", api_keys.made_by("owner", owner.id))
    add("by-hand", "reader", "boss")  # a person of that name, at the command line
    assert ledger.revoke_key("reader", "ada") == []
    add("reader", "reader", api_keys.made_by("owner", owner.id))
    assert ledger.revoke_key("boss", "ada") == ["owner", "reader"]
    assert [key.name for key in ledger.api_keys() if key.revoked_at is None] == ["by-hand"]
    assert json.loads(ledger.audit_events()[-1]["detail"]) == {"made_with_it": ["owner", "reader"]}
