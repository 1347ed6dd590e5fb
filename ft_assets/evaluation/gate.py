"""The one decision about a candidate: from a report and a policy to a verdict, with nothing else looked at."""

import math
from collections.abc import Callable

import pydantic

from ft_assets.evaluation.consistency import require_consistent
from ft_assets.evaluation.report import EvalReport, Paired, Slice
from ft_assets.evaluation.statistics import holm, mcnemar_exact, paired_difference_interval, rows_for_margin
from ft_assets.tasks import GatePolicy
from ft_resources.errors import EvaluationError

ROUNDING = 1e-12
"""Slack of every comparison with a limit: .1 computed as .8 - .7 is not more than .1."""


class GateResult(pydantic.BaseModel):
    """What one gate says: `reason` in a sentence with the figures, `evidence` the figures by name."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    passed: bool
    reason: str
    evidence: dict[str, float | str]


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
            return f"May be released: all {len(self.gates)} gates pass."
        verb = "refuses" if len(self.refusals) == 1 else "refuse"
        return (
            f"Not to be released: {len(self.refusals)} of {len(self.gates)} gates {verb} ({', '.join(self.refusals)})."
        )


SETTINGS = {
    "meets_thresholds": "gates.thresholds",
    "not_worse_than_champion": "gates.non_inferiority_margin",
    "no_slice_regression": "gates.slice_margin",
    "calibrated": "gates.max_calibration_error",
    "within_latency_budget": "gates.latency_p95_ms",
    "serves_what_was_evaluated": "gates.min_serving_agreement",
    "no_forgetting": "gates.forgetting_margin",
}
"""Gate -> where its limit stands in the task file."""


def explained(name: str, gate: GateResult) -> str:
    """The gate's sentence; of a refusal also where its limit stands."""
    return gate.reason if gate.passed else f"{gate.reason} The limit is {SETTINGS[name]} of the task file."


def decide(report: EvalReport, policy: GatePolicy) -> Decision:
    """Ask every gate. A figure that is missing or NaN never passes.

    Raises:
        EvaluationError: The report contradicts itself.
    """
    require_consistent(report)
    gates = {name: gate(report, policy) for name, gate in GATES.items()}
    return Decision(passed=all(result.passed for result in gates.values()), gates=gates)


def meets_thresholds(report: EvalReport, policy: GatePolicy) -> GateResult:
    """Each metric the policy names reaches its least value, on enough test rows."""
    evidence: dict[str, float | str] = {"rows": float(report.rows), "min_test_rows": float(policy.min_test_rows)}
    if report.rows < policy.min_test_rows:
        reason = f"{report.rows} test rows are too few to decide on: the policy asks for {policy.min_test_rows}."
        return GateResult(passed=False, reason=reason, evidence=evidence)
    met, missed = [], []
    figures = report.models.get("candidate", {})
    for metric, least in policy.thresholds.items():
        value = figures[metric].value if metric in figures else math.nan
        evidence |= {metric: value, f"least_{metric}": least}
        if math.isnan(value):
            missed.append(f"{metric} was not measured")
        elif value >= least - ROUNDING:
            met.append(f"{metric} {_number(value, least)} reaches {least:g}")
        else:
            missed.append(f"{metric} {_number(value, least)} is below {least:g}")
    if not missed and _unmeasured(report, "candidate"):
        missed.append(f"{', '.join(_unmeasured(report, 'candidate'))} were not measured in full")
    listed = "; ".join(missed or met) or "No threshold is set"
    return GateResult(passed=not missed, reason=f"{listed} ({report.rows} rows).", evidence=evidence)


def not_worse_than_champion(report: EvalReport, policy: GatePolicy) -> GateResult:
    """Paired non-inferiority on the same rows: the one-sided lower bound of the gain lies above -margin."""
    compared = ("candidate", "champion" if report.champion else "majority")
    unmeasured = [f"{metric} of {name}" for name in (*compared, *report.models) for metric in _unmeasured(report, name)]
    if unmeasured:
        reason = f"A comparison needs every figure, and {unmeasured[0]} was not measured."
        return GateResult(passed=False, reason=reason, evidence={"unmeasured": ", ".join(dict.fromkeys(unmeasured))})
    if report.champion is not None:
        return _non_inferior(report.paired, policy.non_inferiority_margin, policy.confidence, "test rows")
    ours, theirs = (report.models[name]["accuracy"].value for name in compared)
    evidence: dict[str, float | str] = {"accuracy": ours, "majority_accuracy": theirs}
    first = "First release: there is no champion, so the candidate must beat the majority baseline instead"
    passed = ours > theirs + ROUNDING
    verb = "does" if passed else "does not"
    return GateResult(passed=passed, reason=f"{first}, and it {verb}: {ours:.3f} to {theirs:.3f}.", evidence=evidence)


def no_slice_regression(report: EvalReport, policy: GatePolicy) -> GateResult:
    """No slice of enough rows loses more than the margin beyond chance (exact McNemar, Holm over the judged slices)."""
    if report.champion is None:
        reason = "First release: there is no champion whose slices could regress."
        return GateResult(passed=True, reason=reason, evidence={"judged_slices": 0.0})
    judged = [each for each in report.slices if each.rows >= policy.slice_min_rows]
    evidence: dict[str, float | str] = {"judged_slices": float(len(judged)), "slice_margin": policy.slice_margin}
    uncounted = [_title(each) for each in judged if each.only_candidate_right is None]
    if uncounted or not report.slices:
        what = f"not for {', '.join(uncounted)}" if uncounted else "for no slice"
        reason = f"Candidate and champion were to be compared slice by slice, but the counts are there {what}."
        return GateResult(passed=False, reason=reason, evidence=evidence)
    adjusted = holm({_title(each): mcnemar_exact(*_discordant(each), one_sided=True) for each in judged})

    def p_of(each: Slice) -> float:
        return adjusted[_title(each)]

    worst = max(judged, key=_drop, default=None)
    if worst is not None:
        evidence |= {"worst_slice": _title(worst), "worst_drop": _drop(worst), "worst_p": p_of(worst)}
    alpha = 1 - policy.confidence
    regressed = [
        each for each in judged if _drop(each) > policy.slice_margin + ROUNDING and p_of(each) <= alpha + ROUNDING
    ]
    if regressed:
        parts = [
            f"{_title(each)} loses {100 * _drop(each):.1f} points on {each.rows} rows (p = {p_of(each):.2g})"
            for each in sorted(regressed, key=_drop, reverse=True)
        ]
        return GateResult(passed=False, reason=f"Worse than the champion where {'; '.join(parts)}.", evidence=evidence)
    if worst is None:
        reason = f"No slice has the {policy.slice_min_rows} rows it takes to be judged."
    elif _drop(worst) <= 0:
        reason = f"None of {len(judged)} slices loses accuracy against the champion."
    else:
        reason = (
            f"None of {len(judged)} slices loses more than {100 * policy.slice_margin:g} points beyond chance; the "
            f"largest loss is {100 * _drop(worst):.1f} points where {_title(worst)} (p = {p_of(worst):.2g})."
        )
    return GateResult(passed=True, reason=reason, evidence=evidence)


def calibrated(report: EvalReport, policy: GatePolicy) -> GateResult:
    """The expected calibration error stays within the policy."""
    figures = report.calibration
    parts = [each for bin_ in figures.bins for each in (bin_.low, bin_.high, bin_.confidence, bin_.accuracy)]
    measured = bool(parts) and not any(map(math.isnan, (figures.ece, figures.brier, figures.temperature, *parts)))
    return _within("ece", "Expected calibration error", figures.ece, policy.max_calibration_error, measured=measured)


def within_latency_budget(report: EvalReport, policy: GatePolicy) -> GateResult:
    """The 95th percentile of the engine's time for one request stays within the policy."""
    figures, limit = report.latency, policy.latency_p95_ms
    measured = figures.requests > 0 and not math.isnan(figures.p50_ms) and not math.isnan(figures.p95_ms)
    return _within("p95_ms", "Latency at the 95th percentile", figures.p95_ms, limit, unit=" ms", measured=measured)


def serves_what_was_evaluated(report: EvalReport, policy: GatePolicy) -> GateResult:
    """The serving engine gives the labels that plain peft gives."""
    serving, least = report.serving, policy.min_serving_agreement
    evidence: dict[str, float | str] = {
        "agreement": serving.agreement,
        "least_agreement": least,
        "rows": float(serving.rows),
        "precision": serving.precision,
        "max_probability_difference": serving.max_probability_difference,
    }
    unknown = math.isnan(serving.agreement) or math.isnan(serving.max_probability_difference)
    if unknown or serving.rows == 0:
        reason = f"The serving engine was compared with plain peft on {serving.rows} rows, which shows nothing."
        return GateResult(passed=False, reason=reason, evidence=evidence)
    passed = serving.agreement >= least - ROUNDING
    reason = (
        f"The serving engine ({serving.precision}) gives the label of plain peft on a share of "
        f"{_number(serving.agreement, least)} of {serving.rows} rows; the policy asks for {least:g}."
    )
    return GateResult(passed=passed, reason=reason, evidence=evidence)


def no_forgetting(report: EvalReport, policy: GatePolicy) -> GateResult:
    """Non-inferiority on the rows the champion itself was tested on."""
    if report.champion is None:
        reason = "First release: there is no champion whose knowledge could be forgotten."
        return GateResult(passed=True, reason=reason, evidence={"rows": 0.0})
    where = "rows the champion was tested on"
    return _non_inferior(report.retained, policy.forgetting_margin, policy.confidence, where)


GATES: dict[str, Callable[[EvalReport, GatePolicy], GateResult]] = {
    gate.__name__: gate
    for gate in (
        meets_thresholds,
        not_worse_than_champion,
        no_slice_regression,
        calibrated,
        within_latency_budget,
        serves_what_was_evaluated,
        no_forgetting,
    )
}


def _non_inferior(pair: Paired | None, margin: float, confidence: float, where: str) -> GateResult:
    evidence: dict[str, float | str] = {"rows": 0.0, "margin": margin, "confidence": confidence}
    if pair is None or pair.rows == 0:
        reason = f"Candidate and champion share no {where}, so nothing shows that the candidate is not worse."
        return GateResult(passed=False, reason=reason, evidence=evidence)
    gain = paired_difference_interval(
        pair.rows, pair.only_candidate_right, pair.only_champion_right, confidence, one_sided=True
    )
    evidence |= {
        "rows": float(pair.rows),
        "only_candidate_right": float(pair.only_candidate_right),
        "only_champion_right": float(pair.only_champion_right),
        "gain": gain.value,
        "lower_bound": gain.low,
    }
    passed = gain.low > -margin
    reason = (
        f"Accuracy against the champion {100 * gain.value:+.1f} points on {pair.rows} {where}, at {confidence:.0%} "
        f"confidence {'no' if passed else 'possibly'} worse than {100 * gain.low:+.1f}, "
        f"{'within' if passed else 'beyond'} the margin of {100 * margin:g}"
    )
    needed = rows_for_margin(margin, confidence)
    if not passed and pair.rows < needed:
        reason += f" (showing this margin takes at least {needed} rows)"
    return GateResult(passed=passed, reason=f"{reason}.", evidence=evidence)


def _within(name: str, title: str, value: float, limit: float, *, measured: bool, unit: str = "") -> GateResult:
    evidence: dict[str, float | str] = {name: value, f"limit_{name}": limit}
    if not measured:
        return GateResult(passed=False, reason=f"{title} was not measured in full.", evidence=evidence)
    passed = value <= limit + ROUNDING
    verb = "is within" if passed else "exceeds"
    reason = f"{title} {_number(value, limit, 1 if unit else 3)}{unit} {verb} {limit:g}{unit}."
    return GateResult(passed=passed, reason=reason, evidence=evidence)


def _unmeasured(report: EvalReport, model: str) -> list[str]:
    """Figures of a model that are missing or NaN, their intervals included."""
    figures = report.models.get(model, {})
    bad = [name for name, each in figures.items() if any(map(math.isnan, (each.value, each.low, each.high)))]
    bad += [] if "accuracy" in figures else ["accuracy"]
    if model == "candidate":
        for label in report.labels:
            each = report.per_label.get(label)
            if each is None or any(map(math.isnan, (each.precision, each.recall, each.f1))):
                bad.append(f"figures of {label}")
    return bad


def _number(value: float, limit: float, least_digits: int = 3) -> str:
    """With as many digits as it takes to see on which side of the limit the value lies."""
    for digits in range(least_digits, 12):
        shown = f"{value:.{digits}f}"
        if (float(shown) < limit) == (value < limit) and (float(shown) > limit) == (value > limit):
            return shown
    return repr(value)


def _title(each: Slice) -> str:
    return f"{each.name} = {each.value}"


def _discordant(each: Slice) -> tuple[int, int]:
    return each.only_candidate_right or 0, each.only_champion_right or 0


def _drop(each: Slice) -> float:
    won, lost = _discordant(each)
    return (lost - won) / each.rows
