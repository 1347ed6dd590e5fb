"""`ft key`: keys of callers of the prediction service."""

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated

import typer

from ft_assets.terminal import HomeOption, console, make_table, open_platform, told
from ft_resources import api_keys

app = typer.Typer(no_args_is_help=True, help="Keys of callers of the service: create, list, revoke.")


class RoleName(StrEnum):
    """What a key is good for."""

    reader = "reader"
    owner = "owner"
    admin = "admin"


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Name; it appears in logs and in the list.")],
    role: Annotated[
        RoleName,
        typer.Option(help="reader: ask; owner: also keep readers' keys of its tasks; admin: everything."),
    ] = RoleName.reader,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="A task it is for; may be repeated. Default: all.")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Requests per minute. Default: FT_RATE_LIMIT.")] = None,
    days: Annotated[float | None, typer.Option(help="Days until it expires. Default: never.")] = None,
    home: HomeOption = None,
) -> None:
    """Make a key and show it, this once: the ledger keeps a salted hash only."""
    with told():
        platform = open_platform(home)
        expires = None if days is None else datetime.now(UTC) + timedelta(days=days)
        key, shown = api_keys.make(
            name, role.value, tasks=task or None, rate=rate, expires_at=expires, created_by=platform.environment.actor
        )
        platform.ledger.add_key(key)
        console.print(shown, markup=False)


@app.command("list")
def show(home: HomeOption = None) -> None:
    """Every key ever made, and whether it still opens anything."""
    with told():
        table = make_table("name", "id", "role", "tasks", "per minute", "made", "by", "state")
        now = datetime.now(UTC)
        for key in open_platform(home).ledger.api_keys():
            state = "valid" if key.valid(now) else "revoked" if key.revoked_at else "expired"
            until = f" until {key.expires_at:%Y-%m-%d %H:%M}" if key.expires_at and state == "valid" else ""
            table.add_row(
                key.name,
                key.id,
                key.role,
                "all" if key.tasks is None else ", ".join(sorted(key.tasks)),
                "-" if key.rate is None else f"{key.rate:g}",
                f"{key.created_at:%Y-%m-%d %H:%M}",
                key.created_by,
                state + until,
            )
        console.print(table)


@app.command("revoke")
def revoke(name: Annotated[str, typer.Argument(help="Name of the key.")], home: HomeOption = None) -> None:
    """Close a key and the keys made with it: services refuse them, and their tokens, within a second or two."""
    with told():
        platform = open_platform(home)
        for one in (name, *platform.ledger.revoke_key(name, platform.environment.actor)):
            console.print(f"key {one} is [yellow]revoked[/yellow]")
