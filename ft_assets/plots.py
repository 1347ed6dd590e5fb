"""Charts as PNG bytes, drawn without a display and without global state, so that threads may draw at once."""

import base64
import datetime as dt
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from ft_assets.evaluation.statistics import Bin
from ft_resources.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, LINE, BLUE, ORANGE, RED = "#22272e", "#6b7480", "#d9dee4", "#2f6fb2", "#c9822b", "#b3413a"
MOST_NAMED_LABELS = 20


def loss_curve(steps: Sequence[int], losses: Sequence[float], validation: Sequence[tuple[int, float]] = ()) -> bytes:
    """Training loss over optimiser steps, with the validation losses as (step, loss) points.

    Raises:
        DataError: `steps` and `losses` differ in length.
    """
    if len(steps) != len(losses):
        raise DataError(f"{len(losses)} losses for {len(steps)} steps", mend="Record one loss a step.")
    figure, axes = new_axes(6.4, 3.2)
    axes.plot(steps, losses, color=BLUE, alpha=0.35 if len(steps) > 30 else 1, linewidth=1.4, label="training")
    if len(steps) > 30:
        axes.plot(steps, _smoothed(np.asarray(losses, dtype=np.float64)), color=BLUE, linewidth=1.8)
    if len(validation):
        at, values = zip(*validation, strict=True)
        axes.plot(at, values, color=ORANGE, marker="o", markersize=4, linewidth=1.4, label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False, fontsize=9)
    return png(figure)


def confusion(matrix: ArrayLike, labels: Sequence[str]) -> bytes:
    """Confusion matrix, rows the true label; colour is the share of the row, the number its count.

    Raises:
        DataError: The matrix is not [labels, labels].
    """
    counts = np.asarray(matrix, dtype=np.float64)
    if counts.shape != (len(labels), len(labels)):
        raise DataError(f"a matrix of shape {counts.shape} for {len(labels)} labels", mend="Count every label once.")
    side = min(2.2 + 0.55 * len(labels), 12.0)
    figure, axes = new_axes(side + 0.8, side)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(labels) <= MOST_NAMED_LABELS:
        for row, column in np.ndindex(counts.shape):
            if counts[row, column]:
                ink = "white" if shares[row, column] > 0.55 else INK
                axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", color=ink, fontsize=9)
    size = 9 if len(labels) <= MOST_NAMED_LABELS else 5
    axes.set_xticks(range(len(labels)), [shortened(label) for label in labels], rotation=45, ha="right", fontsize=size)
    axes.set_yticks(range(len(labels)), [shortened(label) for label in labels], fontsize=size)
    axes.set_xlabel("answered")
    axes.set_ylabel("true")
    axes.grid(visible=False)
    return png(figure)


def reliability(bins: Sequence[Bin]) -> bytes:
    """Share answered right over stated confidence; the diagonal is perfect honesty, a dot's area its share of rows."""
    figure, axes = new_axes(3.8, 3.6)
    axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle="--")
    rows = sum(each.count for each in bins) or 1
    sure, hit = [each.confidence for each in bins], [each.accuracy for each in bins]
    axes.plot(sure, hit, color=BLUE, linewidth=1.2)
    axes.scatter(sure, hit, s=[20 + 240 * each.count / rows for each in bins], color=BLUE, zorder=3)
    axes.set_xlim(0, 1.03)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    return png(figure)


def drift_over_days(days: Sequence[dt.date], adjusted_p: Mapping[str, Sequence[float | None]], alpha: float) -> bytes:
    """Adjusted p-value of each drift test by day, logarithmic; points below the line at `alpha` are alarms.

    Args:
        adjusted_p: Test to one value a day, None or NaN on days without a verdict.

    Raises:
        DataError: A test has not one value for each day.
    """
    figure, axes = new_axes(6.4, 3.2)
    for (name, values), colour in zip(adjusted_p.items(), (BLUE, ORANGE, "#4b8b5b", "#7a5aa6"), strict=False):
        if len(values) != len(days):
            raise DataError(f"{len(values)} p-values of '{name}' for {len(days)} days", mend="Pass one value a day.")
        numbers = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
        x = np.asarray(days, dtype="datetime64[D]")
        axes.plot(x, numbers, color=colour, marker="o", markersize=3.5, linewidth=1.3, label=name)
        alarms = numbers <= alpha
        axes.scatter(x[alarms], numbers[alarms], s=55, facecolor="none", edgecolor=RED, linewidth=1.6, zorder=4)
    axes.axhline(alpha, color=RED, linewidth=1, linestyle="--")
    axes.set_yscale("log")
    axes.set_ylim(top=1.6)
    axes.set_ylabel("adjusted p-value")
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    figure.autofmt_xdate()
    return png(figure)


def markdown(image: bytes, title: str) -> str:
    """The image as Markdown that carries it inside, for metadata of an asset."""
    safe = title.replace("[", "(").replace("]", ")")
    return f"![{safe}](data:image/png;base64,{base64.b64encode(image).decode()})"


def new_axes(width: float, height: float) -> "tuple[Figure, Axes]":
    """A figure of the house style, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LINE)
    axes.tick_params(colors=SOFT, labelsize=9)
    axes.grid(visible=True, color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_color(SOFT)
    axes.yaxis.label.set_color(SOFT)
    return figure, axes


def png(figure: "Figure") -> bytes:
    """The figure as PNG; equal figures give equal bytes."""
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=130, metadata={"Software": None})
    return target.getvalue()


def shortened(label: str, most: int = 18) -> str:
    """The label cut to `most` characters; a dollar sign is escaped, for matplotlib would read it as a formula."""
    text = label if len(label) <= most else label[: most - 1] + "…"
    return text.replace("$", r"\$")


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Exponentially weighted mean whose start is not biased to zero."""
    weight, total, mass = 0.9, 0.0, 0.0
    out = np.empty_like(values)
    for at, value in enumerate(values):
        total, mass = weight * total + (1 - weight) * value, weight * mass + (1 - weight)
        out[at] = total / mass
    return out
