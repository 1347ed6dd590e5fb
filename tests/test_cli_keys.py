"""`ft key`: made, shown once, listed, revoked."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bento.keys import KeyRing
from ft_assets.cli import app
from ft_resources.ledger import Ledger


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FT_ACTOR", "ada")
    for name in ("FT_LEDGER", "FT_LAKE", "FT_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def ft(home: Path, *words: str) -> Result:
    return CliRunner().invoke(app, [*words, "--home", str(home)])


def test_a_key_is_made_shown_once_listed_and_revoked(home: Path) -> None:
    made = ft(home, "key", "create", "shop", "--role", "owner", "--task", "mail", "--task", "news", "--rate", "30")
    assert made.exit_code == 0, made.output
    shown = made.stdout.strip()
    assert re.fullmatch(r"ft_[0-9a-f]{12}_[A-Za-z0-9_-]{43}", shown)
    ledger = Ledger(f"sqlite:///{home / 'ledger.db'}")
    try:
        ring = KeyRing(ledger)
        ring.refresh()
        found = ring.find(shown.encode())
        assert found is not None
        assert (found.role, found.tasks, found.rate) == ("owner", frozenset({"mail", "news"}), 30)
        listed = ft(home, "key", "list").stdout
        assert "shop" in listed and "mail, news" in listed and "valid" in listed
        assert shown.split("_", 2)[-1] not in listed
        again = ft(home, "key", "create", "shop")
        assert again.exit_code == 2
        assert ft(home, "key", "revoke", "shop").exit_code == 0
        assert "revoked" in ft(home, "key", "list").stdout
        assert ft(home, "key", "revoke", "shop").exit_code == 2
        later = KeyRing(ledger)
        later.refresh()
        assert later.find(shown.encode()) is None
        assert [(one["action"], one["actor"], one["subject"]) for one in ledger.audit_events()] == [
            ("create_key", "ada", "shop"),
            ("revoke_key", "ada", "shop"),
        ]
    finally:
        ledger.close()


@pytest.mark.parametrize(
    "words", [("Bad Name",), ("x", "--rate", "0"), ("x", "--role", "admin", "--task", "mail"), ("x", "--days", "-1")]
)
def test_what_makes_no_key_is_said_without_a_stack_trace(home: Path, words: tuple[str, ...]) -> None:
    done = ft(home, "key", "create", *words)
    assert done.exit_code == 2
    assert "Traceback" not in done.output
