"""`ft export`: a released classifier as an ONNX file, for programs that are not this service."""

from pathlib import Path
from typing import Annotated

import typer

from ft_assets.terminal import HomeOption, TaskArgument, complaints, console, make_table, open_platform, told
from ft_resources.errors import GateRefusal

app = typer.Typer()


@app.command()
def export(
    task: TaskArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder to write, not there yet or empty.")],
    version: Annotated[
        str | None,
        typer.Option("--model-version", "--version", help="A released version instead of the live one."),
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Weights in 8 bits: a quarter of the size.")] = False,
    home: HomeOption = None,
) -> None:
    """Write a released classifier as ONNX with its tokenizer, compared with plain peft on the validation rows.

    Exit code 1 if it answers otherwise than the task's gates allow; nothing is written then.
    """
    with told():
        try:
            with console.status("exporting and comparing"):
                done = open_platform(home).export(task, out, version=version, int8=int8)
        except GateRefusal as error:
            complaints.print(f"refused: {error}", markup=False)
            raise typer.Exit(1) from None
        one, figures = done.parity, done.parity.agreement
        console.print(
            f"version {one.model_version} in {figures.precision}: the label of plain peft on a share of "
            f"{figures.agreement:.4f} of {figures.rows} validation rows; probabilities shift by "
            f"{figures.mean_probability_difference:.2g} in the mean, {figures.max_probability_difference:.2g} at most"
        )
        table = make_table("", "MB", "ms per row in batches of 16", "ms per row alone")
        for name, size, speed in (
            ("exported", one.exported_mb, one.exported_ms),
            ("plain peft", one.plain_mb, one.plain_ms),
        ):
            table.add_row(name, f"{size:.1f}", f"{speed.batched:.2f}", f"{speed.alone:.2f}")
        console.print(table)
        console.print(f"{done.folder}", markup=False)
