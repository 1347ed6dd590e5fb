"""A verdict on a candidate: what each gate says, and what follows from all of them."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pydantic

from ft_assets.evaluation.policy import GatePolicy
from ft_assets.evaluation.statistics import Interval, holm
from ft_resources.errors import EvaluationError

SERVING = "serves_what_was_evaluated"
"""The gate that does not apply to what the service cannot serve."""
ROUNDING = 1e-12
"""Slack of every comparison with a limit: .1 computed as .8 - .7 is not more than .1."""


class GateResult(pydantic.BaseModel):
    """What one gate says: `reason` in a sentence with the figures, `evidence` the figures by name."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    passed: bool
    reason: str
    evidence: dict[str, float | str]
    applies: bool = True
    """False: there is nothing to ask of this candidate. Such a gate refuses nothing, and is not said to pass."""
    setting: str = ""
    """Where its limit stands in the task file, where that is not the same for every type of task."""

    @property
    def word(self) -> str:
        """pass, refuse or n/a, for people."""
        return ("pass" if self.passed else "refuse") if self.applies else "n/a"


def not_applicable(reason: str) -> GateResult:
    """A gate that has nothing to ask; `reason` says why."""
    return GateResult(passed=True, reason=reason, evidence={}, applies=False)


class Decision(pydantic.BaseModel):
    """The verdict over all gates."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    passed: bool
    gates: dict[str, GateResult]

    def gate(self, name: str) -> GateResult:
        """The result of one gate.

        Raises:
            EvaluationError: There is no such gate.
        """
        if name not in self.gates:
            raise EvaluationError(f"there is no gate '{name}'", mend=f"Gates: {', '.join(self.gates)}.")
        return self.gates[name]

    @property
    def refusals(self) -> list[str]:
        """Names of the gates that refuse."""
        return [name for name, result in self.gates.items() if not result.passed]

    @property
    def verdict(self) -> str:
        """One sentence for people."""
        if self.passed:
            if not self.gates[SERVING].applies:
                return "Keeps what the gates ask; it cannot be served, so there is no release."
            idle = [name for name, result in self.gates.items() if not result.applies]
            if not idle:
                return f"May be released: all {len(self.gates)} gates pass."
            verb = "does" if len(idle) == 1 else "do"
            return f"May be released: {len(self.gates) - len(idle)} gates pass; {', '.join(idle)} {verb} not apply."
        verb = "refuses" if len(self.refusals) == 1 else "refuse"
        return (
            f"Not to be released: {len(self.refusals)} of {len(self.gates)} gates {verb} ({', '.join(self.refusals)})."
        )


def within(name: str, title: str, value: float, limit: float, *, measured: bool, unit: str = "") -> GateResult:
    """A figure that may not exceed its limit."""
    evidence: dict[str, float | str] = {name: value, f"limit_{name}": limit}
    if not measured:
        return GateResult(passed=False, reason=f"{title} was not measured in full.", evidence=evidence)
    passed = value <= limit + ROUNDING
    verb = "is within" if passed else "exceeds"
    reason = f"{title} {shown(value, limit, 1 if unit else 3)}{unit} {verb} {limit:g}{unit}."
    return GateResult(passed=passed, reason=reason, evidence=evidence)


def thresholds_met(
    rows: int, least_rows: int, least: dict[str, float], figures: dict[str, float], unmeasured: list[str]
) -> GateResult:
    """Each metric reaches its least value, on enough test rows.

    Args:
        least: Metric to its least value.
        figures: Metric to what was measured.
        unmeasured: Names of what should have been measured and was not.
    """
    evidence: dict[str, float | str] = {"rows": float(rows), "min_test_rows": float(least_rows)}
    if rows < least_rows:
        reason = f"{rows} test rows are too few to decide on: the policy asks for {least_rows}."
        return GateResult(passed=False, reason=reason, evidence=evidence)
    met, missed = [], []
    for metric, limit in least.items():
        value = figures.get(metric, math.nan)
        evidence |= {metric: value, f"least_{metric}": limit}
        if math.isnan(value):
            missed.append(f"{metric} was not measured")
        elif value >= limit - ROUNDING:
            met.append(f"{metric} {shown(value, limit)} reaches {limit:g}")
        else:
            missed.append(f"{metric} {shown(value, limit)} is below {limit:g}")
    if not missed and unmeasured:
        missed.append(f"{', '.join(unmeasured)} were not measured in full")
    listed = "; ".join(missed or met) or "No threshold is set"
    return GateResult(passed=not missed, reason=f"{listed} ({rows} rows).", evidence=evidence)


def not_inferior(
    figure: str,
    other: str,
    gain: Interval,
    rows: int,
    where: str,
    margin: float,
    needed: int,
    counts: Mapping[str, float],
) -> GateResult:
    """The lower bound of a gain lies above minus the margin.

    Args:
        gain: Of the candidate over `other`, with its one-sided bound, in points of `figure` / 100.
        needed: Rows on which two models that are alike could be shown to differ by less than the margin.
        counts: Further evidence.
    """
    evidence: dict[str, float | str] = {
        "rows": float(rows),
        "margin": margin,
        "confidence": gain.confidence,
        **counts,
        "gain": gain.value,
        "lower_bound": gain.low,
    }
    passed = gain.low > -margin
    reason = (
        f"{figure} against {other} {100 * gain.value:+.1f} points on {rows} {where}, at {gain.confidence:.0%} "
        f"confidence {'no' if passed else 'possibly'} worse than {100 * gain.low:+.1f}, "
        f"{'within' if passed else 'beyond'} the margin of {100 * margin:g}"
    )
    if not passed and rows < needed:
        reason += f" (showing this margin takes at least {needed} rows)"
    return GateResult(passed=passed, reason=f"{reason}.", evidence=evidence)


class SliceLoss(NamedTuple):
    """What the candidate loses against the champion on a group of rows."""

    title: str
    rows: int
    drop: float
    """In points of the figure / 100; below 0: it wins."""
    p: float
    """P-value against "the candidate is not worse", before it is adjusted for the number of slices."""


def no_loss_beyond_chance(losses: Sequence[SliceLoss], policy: GatePolicy, figure: str) -> GateResult:
    """No slice loses more of `figure` than the policy's margin beyond chance (Holm over the slices)."""
    evidence: dict[str, float | str] = {"judged_slices": float(len(losses)), "slice_margin": policy.slice_margin}
    if not losses:
        reason = f"No slice has the {policy.slice_min_rows} rows it takes to be judged."
        return GateResult(passed=True, reason=reason, evidence=evidence)
    adjusted = holm({each.title: each.p for each in losses})
    losses = sorted((each._replace(p=adjusted[each.title]) for each in losses), key=lambda each: -each.drop)
    worst, alpha = losses[0], 1 - policy.confidence
    evidence |= {"worst_slice": worst.title, "worst_drop": worst.drop, "worst_p": worst.p}
    regressed = [each for each in losses if each.drop > policy.slice_margin + ROUNDING and each.p <= alpha + ROUNDING]
    if regressed:
        parts = [
            f"{each.title} loses {100 * each.drop:.1f} points on {each.rows} rows (p = {each.p:.2g})"
            for each in regressed
        ]
        return GateResult(passed=False, reason=f"Worse than the champion where {'; '.join(parts)}.", evidence=evidence)
    if worst.drop <= 0:
        reason = f"None of {len(losses)} slices loses {figure} against the champion."
    else:
        reason = (
            f"None of {len(losses)} slices loses more than {100 * policy.slice_margin:g} points beyond chance; the "
            f"largest loss is {100 * worst.drop:.1f} points where {worst.title} (p = {worst.p:.2g})."
        )
    return GateResult(passed=True, reason=reason, evidence=evidence)


def shown(value: float, limit: float, least_digits: int = 3) -> str:
    """With as many digits as it takes to see on which side of the limit the value lies."""
    for digits in range(least_digits, 12):
        text = f"{value:.{digits}f}"
        if (float(text) < limit) == (value < limit) and (float(text) > limit) == (value > limit):
            return text
    return repr(value)
