"""Charts of a search, and the files of its artefact: what was tried, what it cost, which values did well."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ft_assets.plots import BLUE, INK, LINE, ORANGE, RED, SOFT, new_axes, png, shortened

Trials = Sequence[Mapping[str, Any]]
MARKERS = {"finished": (BLUE, "o"), "pruned": (SOFT, "x"), "stopped": (ORANGE, "s")}
"""Colour and shape of a trial by its state; one that failed has no score to show."""


def write(folder: Path, found: Mapping[str, Any]) -> None:
    """Write `trials.json` and, of a search that trained something, its charts."""
    (folder / "trials.json").write_text(json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False))
    if found["objective"] is None:
        return
    for name, image in charts(found).items():
        (folder / f"{name}.png").write_bytes(image)
    if found["learning_curve"]:
        (folder / "learning_curve.md").write_text(found["learning_curve"]["sentence"] + "\n")


def charts(found: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG by name: history, parallel_coordinates, pareto and, where one was asked for, learning_curve."""
    objective, trials = found["objective"], found["trials"]
    images = {
        "history": history(trials, objective),
        "parallel_coordinates": parallel_coordinates(trials, objective, found["best_trial"]),
        "pareto": pareto(trials, objective, found["currency"]),
    }
    curve = found["learning_curve"]
    return {**images, "learning_curve": learning_curve(curve)} if curve and curve["points"] else images


def leaderboard(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a table of trials, the best first, those that did not finish last."""
    objective, front = found["objective"], set()
    if objective is not None:
        front = {trial["trial"] for trial in pareto_front(found["trials"], objective)}
    maximise = objective is None or objective["maximise"]

    def order(trial: Mapping[str, Any]) -> tuple[bool, bool, float, float]:
        score = trial["score"]
        if score is None:
            return trial["state"] != "finished", True, 0.0, 0.0
        return trial["state"] != "finished", False, -score if maximise else score, trial["measured"]["loss"]

    name = objective["title"] if objective else "score"
    return [
        {
            "trial": trial["trial"],
            "state": trial["state"],
            name: "-" if trial["score"] is None else trial["score"],
            **{path: trial["values"].get(path, "-") for path in _paths(found["trials"])},
            "epochs": trial.get("epochs", "-"),
            "seconds": round(trial["seconds"], 1),
            f"cost {found['currency']}".strip(): trial["cost"],
            "front": "yes" if trial["trial"] in front else "",
        }
        for trial in sorted(found["trials"], key=order)
    ]


def pareto_front(trials: Trials, objective: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Finished trials that no other one beats in both quality and cost, cheapest first."""
    sign = 1 if objective["maximise"] else -1
    front: list[Mapping[str, Any]] = []
    for trial in sorted(_of(trials, "finished"), key=lambda one: (one["cost"], -sign * one["score"])):
        if not front or sign * trial["score"] > sign * front[-1]["score"]:
            front.append(trial)
    return front


def history(trials: Trials, objective: Mapping[str, Any]) -> bytes:
    """Score of every trial in the order they ran, with the best so far as a line."""
    figure, axes = new_axes(6.4, 3.2)
    _scatter(axes, trials, lambda trial: trial["trial"])
    finished = _of(trials, "finished")
    best = np.maximum.accumulate if objective["maximise"] else np.minimum.accumulate
    axes.step(
        [trial["trial"] for trial in finished],
        best([trial["score"] for trial in finished]),
        where="post",
        color=BLUE,
        linewidth=1.4,
        label="best so far",
    )
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("trial")
    axes.set_ylabel(_title(objective))
    axes.legend(frameon=False, fontsize=9)
    return png(figure)


def pareto(trials: Trials, objective: Mapping[str, Any], currency: str) -> bytes:
    """Score over cost; the front, trials that no other one beats in both, is marked and numbered."""
    figure, axes = new_axes(6.4, 3.6)
    _scatter(axes, trials, lambda trial: trial["cost"])
    front = pareto_front(trials, objective)
    axes.step(
        [trial["cost"] for trial in front],
        [trial["score"] for trial in front],
        where="post",
        color=RED,
        linewidth=1.2,
        linestyle="--",
    )
    axes.scatter(
        [trial["cost"] for trial in front],
        [trial["score"] for trial in front],
        s=90,
        facecolor="none",
        edgecolor=RED,
        linewidth=1.6,
        zorder=4,
        label="Pareto front",
    )
    for trial in front:
        axes.annotate(
            str(trial["trial"]),
            (trial["cost"], trial["score"]),
            xytext=(7, 5),
            textcoords="offset points",
            color=INK,
            fontsize=9,
        )
    axes.set_xlabel(f"cost of the trial, {shortened(currency)}")
    axes.set_ylabel(_title(objective))
    axes.legend(frameon=False, fontsize=9)
    return png(figure)


def parallel_coordinates(trials: Trials, objective: Mapping[str, Any], best: int) -> bytes:
    """One line a trial across its values to its score, coloured by the score; the best is drawn in red."""
    scored = [trial for trial in trials if trial["score"] is not None and trial["state"] != "failed"]
    columns = {path: [trial["values"][path] for trial in scored] for path in _paths(scored)}
    columns[_title(objective)] = [trial["score"] for trial in scored]
    places = {name: _places(values) for name, values in columns.items()}
    figure, axes = new_axes(max(4.0, 1.9 * len(columns)), 3.8)
    across = np.arange(len(columns))
    heights = np.array([positions for positions, _ in places.values()]).T
    colours = _colours()
    for trial, line in sorted(zip(scored, heights, strict=True), key=lambda one: one[0]["trial"] == best):
        score = line[-1] if objective["maximise"] else 1 - line[-1]
        axes.plot(
            across,
            line,
            color=RED if trial["trial"] == best else colours(score),
            linewidth=2.2 if trial["trial"] == best else 1.2,
            linestyle="-" if trial["state"] == "finished" else ":",
            alpha=1.0 if trial["trial"] == best else 0.8,
        )
    for at, (_, ticks) in enumerate(places.values()):
        axes.axvline(at, color=LINE, linewidth=1)
        for height, text in ticks:
            axes.text(at + 0.03, height, text, color=INK, fontsize=8, va="center")
    axes.set_xticks(across, [shortened(name, 28) for name in columns], fontsize=8)
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(columns) - 0.6)
    axes.set_ylim(-0.06, 1.06)
    axes.grid(visible=False)
    return png(figure)


def learning_curve(curve: Mapping[str, Any]) -> bytes:
    """Error over training rows with its intervals, both logarithmic, and the power law out to twice the rows."""
    figure, axes = new_axes(6.4, 3.6)
    points = curve["points"]
    rows, errors = [point["rows"] for point in points], np.array([point["error"] for point in points])
    below = np.maximum(errors - [point["low"] for point in points], 0)
    above = np.maximum([point["high"] for point in points] - errors, 0)
    axes.errorbar(rows, errors, yerr=[below, above], color=BLUE, fmt="o", capsize=3, label="measured")
    if curve["power_law"]:
        law = curve["power_law"]
        n = np.geomspace(rows[0], 2 * rows[-1], 60)
        axes.plot(n, law["a"] + law["b"] * n ** -law["c"], color=ORANGE, linewidth=1.4, label="a + b n^-c")
        axes.axvline(2 * rows[-1], color=SOFT, linewidth=1, linestyle="--")
    axes.set_xscale("log")
    axes.set_xticks(rows, [f"{one:,}" for one in rows])
    axes.minorticks_off()
    axes.set_xlabel("training rows")
    axes.set_ylabel(f"validation {curve['error']}")
    axes.legend(frameon=False, fontsize=9)
    return png(figure)


def _scatter(axes: Any, trials: Trials, across: Any) -> None:
    for state, (colour, marker) in MARKERS.items():
        shown = [trial for trial in _of(trials, state) if trial["score"] is not None]
        if shown:
            axes.scatter(
                [across(trial) for trial in shown],
                [trial["score"] for trial in shown],
                color=colour,
                marker=marker,
                s=28,
                zorder=3,
                label=state,
            )


def _places(values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights from 0 to 1 of values on their axis, and its labels: wide ranges are logarithmic, choices have places."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        numbers = [float(value) for value in values]
        low, high = min(numbers), max(numbers)
        if low == high:
            return [0.5] * len(numbers), [(0.5, f"{low:.3g}")]
        scale = math.log if low > 0 and high / low > 5 else float
        heights = [(scale(one) - scale(low)) / (scale(high) - scale(low)) for one in numbers]
        return heights, [(0.0, f"{low:.3g}"), (1.0, f"{high:.3g}")]
    names = sorted({json.dumps(value) for value in values})
    step = 1 / max(1, len(names) - 1)
    height = {name: at * step if len(names) > 1 else 0.5 for at, name in enumerate(names)}
    return [height[json.dumps(value)] for value in values], [
        (at, shortened(name.strip('"'))) for name, at in height.items()
    ]


def _paths(trials: Trials) -> list[str]:
    return sorted({path for trial in trials for path in trial["values"]})


def _of(trials: Trials, state: str) -> list[Mapping[str, Any]]:
    return [trial for trial in trials if trial["state"] == state]


def _title(objective: Mapping[str, Any]) -> str:
    return f"validation {objective['title']}"


def _colours() -> Any:
    from matplotlib import colormaps

    return colormaps["viridis_r"]
