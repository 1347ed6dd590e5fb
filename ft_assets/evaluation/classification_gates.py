"""The gates of a classifier's report: right and wrong labels, counted."""

import math
from collections.abc import Callable

from ft_assets.evaluation.decision import (
    ROUNDING,
    GateResult,
    SliceLoss,
    no_loss_beyond_chance,
    not_applicable,
    not_inferior,
    shown,
    thresholds_met,
    within,
)
from ft_assets.evaluation.policy import GatePolicy
from ft_assets.evaluation.report import EvalReport, Paired, Slice
from ft_assets.evaluation.statistics import mcnemar_exact, paired_difference_interval, rows_for_margin


def meets_thresholds(report: EvalReport, policy: GatePolicy) -> GateResult:
    """Each metric the policy names reaches its least value, on enough test rows."""
    figures = {name: each.value for name, each in report.models.get("candidate", {}).items()}
    least = {str(metric): limit for metric, limit in policy.thresholds.items()}
    return thresholds_met(report.rows, policy.min_test_rows, least, figures, _unmeasured(report, "candidate"))


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
    uncounted = [each.title for each in judged if each.only_candidate_right is None]
    if uncounted or not report.slices:
        what = f"not for {', '.join(uncounted)}" if uncounted else "for no slice"
        reason = f"Candidate and champion were to be compared slice by slice, but the counts are there {what}."
        return GateResult(passed=False, reason=reason, evidence=evidence)
    losses = [
        SliceLoss(each.title, each.rows, _drop(each), mcnemar_exact(*_discordant(each), one_sided=True))
        for each in judged
    ]
    return no_loss_beyond_chance(losses, policy, "accuracy")


def calibrated(report: EvalReport, policy: GatePolicy) -> GateResult:
    """The expected calibration error stays within the policy."""
    figures = report.calibration
    parts = [each for bin_ in figures.bins for each in (bin_.low, bin_.high, bin_.confidence, bin_.accuracy)]
    measured = bool(parts) and not any(map(math.isnan, (figures.ece, figures.brier, figures.temperature, *parts)))
    return within("ece", "Expected calibration error", figures.ece, policy.max_calibration_error, measured=measured)


def within_latency_budget(report: EvalReport, policy: GatePolicy) -> GateResult:
    """The 95th percentile of the engine's time for one request stays within the policy."""
    figures, limit = report.latency, policy.latency_p95_ms
    measured = figures.requests > 0 and not math.isnan(figures.p50_ms) and not math.isnan(figures.p95_ms)
    return within("p95_ms", "Latency at the 95th percentile", figures.p95_ms, limit, unit=" ms", measured=measured)


def serves_what_was_evaluated(report: EvalReport, policy: GatePolicy) -> GateResult:
    """The serving engine gives the labels that plain peft gives."""
    serving, least = report.serving, policy.min_serving_agreement
    if serving is None:
        return not_applicable("What was trained cannot be served; it was measured as its trainer answers.")
    evidence: dict[str, float | str] = {
        "agreement": serving.agreement,
        "least_agreement": least,
        "rows": float(serving.rows),
        "precision": serving.precision,
        "max_probability_difference": serving.max_probability_difference,
        "probability_shift": serving.probability_shift,
        "most_probability_shift": policy.max_probability_shift,
        "tried": ", ".join(f"{one.precision} {one.agreement:.4f}" for one in serving.tried),
    }
    figures = (
        serving.agreement,
        serving.max_probability_difference,
        serving.mean_probability_difference,
        serving.probability_shift,
    )
    unknown = any(map(math.isnan, figures))
    if unknown or serving.rows == 0:
        reason = f"The serving engine was compared with plain peft on {serving.rows} rows, which shows nothing."
        return GateResult(passed=False, reason=reason, evidence=evidence)
    if serving.precision not in policy.precisions:
        reason = f"It was measured in {serving.precision}, and the policy allows {', '.join(policy.precisions)} only."
        return GateResult(passed=False, reason=reason, evidence=evidence, setting="gates.precisions")
    agrees = serving.agreement >= least - ROUNDING
    steady = serving.probability_shift <= policy.max_probability_shift + ROUNDING
    reason = (
        f"The serving engine ({serving.precision}) gives the label of plain peft on a share of "
        f"{shown(serving.agreement, least)} of {serving.rows} rows, and shifts probabilities by up to "
        f"{shown(serving.probability_shift, policy.max_probability_shift)} on 95 % of them; the policy asks for "
        f"{least:g} and {policy.max_probability_shift:g}."
    )
    setting = "gates.max_probability_shift" if agrees and not steady else ""
    return GateResult(passed=agrees and steady, reason=reason, evidence=evidence, setting=setting)


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
    if pair is None or pair.rows == 0:
        evidence: dict[str, float | str] = {"rows": 0.0, "margin": margin, "confidence": confidence}
        reason = f"Candidate and champion share no {where}, so nothing shows that the candidate is not worse."
        return GateResult(passed=False, reason=reason, evidence=evidence)
    gain = paired_difference_interval(
        pair.rows, pair.only_candidate_right, pair.only_champion_right, confidence, one_sided=True
    )
    counts = {
        "only_candidate_right": float(pair.only_candidate_right),
        "only_champion_right": float(pair.only_champion_right),
    }
    needed = rows_for_margin(margin, confidence)
    return not_inferior("Accuracy", "the champion", gain, pair.rows, where, margin, needed, counts)


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


def _discordant(each: Slice) -> tuple[int, int]:
    return each.only_candidate_right or 0, each.only_champion_right or 0


def _drop(each: Slice) -> float:
    won, lost = _discordant(each)
    return (lost - won) / each.rows
