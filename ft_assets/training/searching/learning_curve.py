"""What more rows, more steps or more rank would bring: trainings on shares of the rows, a power law through them.

The error on validation rows falls as a + b n^-c with the number n of training rows (Cortes et al., 1993; Hestness et
al., 2017). Intervals are percentiles of a bootstrap over the validation rows, with the same draws for every training:
how much another training seed would change is not in them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ft_assets.evaluation.statistics import overall_figures
from ft_assets.training.recipes import Resolved, Settings, with_values
from ft_assets.training.searching.trials import Objective
from ft_resources.errors import SpecError

SHARES = (0.125, 0.25, 0.5)
FEWEST_POINTS = 3
"""A curve with three unknowns needs as many."""
DRAWS = 400
CONFIDENCE = 0.95

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Variant:
    """The best values, changed in one respect."""

    name: str
    """`all` where nothing is changed, else `rows`, `epochs` or `rank`."""
    share: float
    """Of the training rows."""
    resolved: Resolved


@dataclass(frozen=True)
class Run:
    """A training and what it answers on the validation rows."""

    name: str
    """Of its variant."""
    rows: int
    """Training rows."""
    seconds: float
    outputs: NDArray[np.float32]
    """[validation rows, outputs] of the best epoch, as the trainer gives them."""


def variants(best: Resolved) -> list[Variant]:
    """The trainings that tell, cheapest first; a change that the recipe does not allow is left out."""
    settings = best.settings
    found = [Variant("all", 1.0, best), *(Variant("rows", share, best) for share in SHARES)]
    changes: dict[str, dict[str, Any]] = {"epochs": {"training.epochs": 2 * settings.training.epochs}}
    if settings.method == "lora":  # alpha too: the scale of the update stays the same
        changes["rank"] = {"lora.rank": 2 * settings.lora.rank, "lora.alpha": 2 * settings.lora.alpha}
    for name, values in changes.items():
        try:
            found.append(Variant(name, 1.0, with_values(best, values, f"learning curve, twice the {name}")))
        except SpecError:  # twice as much is more than a recipe may ask for
            continue
    return found


def share_of(classes: Sequence[int], share: float, seed: int) -> list[int]:
    """Places of a seeded share of the rows, ascending; a smaller share is part of a larger one.

    Args:
        classes: Of every row, the class within which the share is taken; at least one row of each is kept.
    """
    order = np.random.default_rng(seed).permutation(len(classes))
    groups: dict[int, list[int]] = {}
    for place in order:
        groups.setdefault(classes[place], []).append(int(place))
    return sorted(place for group in groups.values() for place in group[: math.ceil(share * len(group))])


def answer(
    runs: Sequence[Run], targets: Sequence[int], objective: Objective, settings: Settings, ended: str = ""
) -> dict[str, Any]:
    """What twice the rows, steps or rank would bring, with figures and in a sentence.

    Args:
        runs: `all` (the best values on all rows) and trainings of `variants`, as far as they were done.
        targets: Per validation row its class, or for a conversation the number of its answer's tokens.
        ended: Why some are missing.
    """
    full = next((run for run in runs if run.name == "all"), None)
    found: dict[str, Any] = {
        "error": f"1 - {objective.title}" if objective.maximise else objective.title,
        "validation_rows": len(targets),
        "ended": ended,
    }
    if full is None:
        return {**found, "points": [], "power_law": None, "gains": {}, "sentence": _sentence({}, objective, 0, ended)}
    others = [run for run in runs if run is not full]
    drawn = np.random.default_rng(settings.training.seed).multinomial(
        len(targets), np.full(len(targets), 1 / len(targets)), size=DRAWS
    )
    # the first row of weights counts every validation row once: the value itself
    weights = np.vstack([np.ones(len(targets)), drawn.astype(np.float64)])
    errors = {id(run): _errors(run, np.asarray(targets), objective, weights) for run in (full, *others)}
    curve = sorted([*(run for run in others if run.name == "rows"), full], key=lambda run: run.rows)
    points = [{"rows": run.rows, "seconds": run.seconds, **_interval(errors[id(run)], "error")} for run in curve]
    gains: dict[str, dict[str, Any]] = {}
    power: dict[str, float] | None = None
    if len(curve) >= FEWEST_POINTS:
        shares = np.array([run.rows / full.rows for run in curve])
        fits = np.array([_fit(shares, column) for column in np.stack([errors[id(run)] for run in curve], axis=1)])
        a, b, c = fits.T
        power = {"a": float(a[0]), "b": float(b[0] * full.rows ** c[0]), "c": float(c[0])}
        gains["rows"] = {**_interval(b * (1 - 2.0**-c), "gain"), "from": full.rows, "to": 2 * full.rows}
    for run in others:
        if run.name in ("epochs", "rank"):
            factor = run.seconds / full.seconds if full.seconds else None
            gains[run.name] = {**_interval(errors[id(full)] - errors[id(run)], "gain"), "cost_factor": factor}
    return {
        **found,
        "points": points,
        "power_law": power,
        "gains": gains,
        "sentence": _sentence(gains, objective, len(targets), ended),
    }


def _errors(run: Run, targets: NDArray[np.int64], objective: Objective, weights: Floats) -> Floats:
    """[draws] errors of a run: 1 - macro-F1, or the mean loss of an answer's token."""
    if not objective.maximise:
        return (weights @ run.outputs[:, 0].astype(np.float64)) / (weights @ targets.astype(np.float64))
    classes = run.outputs.shape[1]
    cells = np.zeros((len(targets), classes * classes))
    cells[np.arange(len(targets)), targets * classes + run.outputs.argmax(1)] = 1
    return 1 - overall_figures((weights @ cells).reshape(-1, classes, classes))[objective.name]


def _fit(shares: Floats, errors: Floats) -> tuple[float, float, float]:
    """a, b and c of error = a + b share^-c, by least squares; no error is below 0, and rows never harm."""
    from scipy.optimize import least_squares

    least, most = float(errors.min()), float(errors.max())
    fit = least_squares(
        lambda x: x[0] + x[1] * shares ** -x[2] - errors,
        x0=(least / 2, least / 2 + 1e-6, 0.5),
        bounds=([0, 0, 0.05], [least + 1e-6, most + 1e-3, 2]),
    )
    a, b, c = map(float, fit.x)
    return a, b, c


def _interval(draws: Floats, name: str) -> dict[str, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws[1:], [tail, 1 - tail])
    return {name: float(draws[0]), "low": float(low), "high": float(high)}


def _sentence(gains: Mapping[str, Mapping[str, Any]], objective: Objective, rows: int, ended: str) -> str:
    parts = []
    if "rows" in gains:
        rows_now, rows_then = gains["rows"]["from"], gains["rows"]["to"]
        change = _change(gains["rows"], objective)
        parts.append(f"twice the rows ({rows_now:,} to {rows_then:,}): expected {objective.title} {change}")
    for name in ("epochs", "rank"):
        if name in gains:
            what = {"epochs": "twice the steps", "rank": "twice the rank"}[name]
            factor = gains[name]["cost_factor"]
            cost = f" at {factor:.1f} times the cost" if factor else ""
            parts.append(f"{what}: {_change(gains[name], objective)}{cost}")
    sure = {name: gain["gain"] for name, gain in gains.items() if gain["low"] > 0}
    best = max(sure, key=lambda name: sure[name]) if sure else None
    told = "; ".join(parts)
    verdict = {
        "rows": "More rows promise the most.",
        "epochs": "More steps promise the most.",
        "rank": "A higher rank promises the most.",
        None: "None of them is shown to help.",
    }[best]
    missing = f" Not all was measured: {ended}." if ended else ""
    if not parts:
        return f"Nothing can be said of more rows, steps or rank.{missing}"
    return (
        f"{told[0].upper()}{told[1:]}. {verdict} In brackets: {CONFIDENCE:.0%} bootstrap over the {rows:,} validation "
        f"rows; another training seed is not in it.{missing}"
    )


def _change(gain: Mapping[str, Any], objective: Objective) -> str:
    """What is gained, as a change of the figure: a loss falls."""
    low, middle, high = gain["low"], gain["gain"], gain["high"]
    if not objective.maximise:
        low, middle, high = -high, -middle, -low
    return f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]"
