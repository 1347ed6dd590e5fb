"""What the commands of `ft` share: consoles, tables, arguments, and how errors are told."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ft_resources.errors import FtError

WIDE = None if sys.stdout.isatty() else 200  # nothing is cut for a file or a pipe
console = Console(highlight=False, soft_wrap=True, width=WIDE)
complaints = Console(stderr=True, highlight=False, soft_wrap=True)

MARKS = {
    "made": "[green]made[/green]    ",
    "passed": "[green]pass[/green]    ",
    "refused": "[bold red]REFUSED[/bold red] ",
    "warned": "[yellow]note[/yellow]    ",
    "failed": "[bold red]FAILED[/bold red]  ",
    "note": "        ",
}

HomeOption = Annotated[Path | None, typer.Option("--home", help="Platform home; default FT_HOME, else .ft here.")]
TaskArgument = Annotated[str, typer.Argument(help="Task name, as in its file.")]


def make_table(*columns: str) -> Table:
    """A table whose cells fold rather than being cut."""
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


@contextmanager
def told() -> Iterator[None]:
    """Typed errors end the command with a sentence and exit code 2, without a stack trace."""
    try:
        yield
    except FtError as error:
        complaints.print(f"[bold red]{type(error).__name__}[/bold red] {escape(str(error))}")
        raise typer.Exit(2) from None


def open_platform(home: Path | None) -> Any:
    """The platform of `home`."""
    from ft_assets.platform import Platform

    return Platform.open(home)


def show_line(line: Any) -> None:
    """One line of a run, as `ft run` and the demo print it."""
    subject = f"{line.subject}: " if line.subject and line.kind != "note" else ""
    console.print(f"[dim]{line.seconds:6.1f}s[/dim]  {MARKS[line.kind]}{escape(subject + line.text)}")
