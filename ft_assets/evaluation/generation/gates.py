"""The gates of a report of written answers: scores within 0..1, compared row by row."""

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
)
from ft_assets.evaluation.generation.metrics import METRICS
from ft_assets.evaluation.generation.paired import Gain, gain_interval, p_worse, rows_for_margin
from ft_assets.evaluation.generation.report import GenerationReport
from ft_assets.evaluation.policy import GatePolicy


def meets_thresholds(report: GenerationReport, policy: GatePolicy) -> GateResult:
    """Each metric the policy names reaches its least value, on enough test rows."""
    figures = {name: each.value for name, each in report.models.get("candidate", {}).items()}
    least = {str(metric): limit for metric, limit in policy.thresholds.items()}
    return thresholds_met(report.rows, policy.min_test_rows, least, figures, _unmeasured(report, "candidate"))


def not_worse_than_champion(report: GenerationReport, policy: GatePolicy) -> GateResult:
    """Paired non-inferiority on the same rows; without a champion, better than the untrained base beyond chance."""
    unmeasured = [f"{metric} of {name}" for name in report.models for metric in _unmeasured(report, name)]
    if unmeasured:
        reason = f"A comparison needs every figure, and {unmeasured[0]} was not measured."
        return GateResult(passed=False, reason=reason, evidence={"unmeasured": ", ".join(unmeasured)})
    if report.champion is not None:
        return _non_inferior(
            report, report.paired, policy.non_inferiority_margin, policy.confidence, "test rows", "the champion"
        )
    over = gain_interval(report.over_base, policy.confidence, one_sided=True)
    ours, theirs = (report.models[name][report.score].value for name in ("candidate", "base"))
    passed = over.low > ROUNDING
    evidence: dict[str, float | str] = {
        report.score: ours,
        f"base_{report.score}": theirs,
        "gain": over.value,
        "lower_bound": over.low,
    }
    reason = (
        "First release: there is no champion, so the candidate must be better than the base model without an adapter, "
        f"and it {'is' if passed else 'is not, beyond chance'}: {report.score} {ours:.3f} to {theirs:.3f}, at "
        f"{policy.confidence:.0%} confidence at least {100 * over.low:+.1f} points."
    )
    return GateResult(passed=passed, reason=reason, evidence=evidence)


def no_slice_regression(report: GenerationReport, policy: GatePolicy) -> GateResult:
    """No slice of enough rows loses more than the margin beyond chance (paired score test, Holm over the slices)."""
    if report.champion is None:
        return not_applicable("First release: there is no champion whose slices could regress.")
    judged = [
        (each, each.gain) for each in report.slices if each.rows >= policy.slice_min_rows and each.gain is not None
    ]
    evidence: dict[str, float | str] = {"judged_slices": float(len(judged)), "slice_margin": policy.slice_margin}
    if not report.slices:
        reason = "Candidate and champion were to be compared slice by slice, but there are no slices."
        return GateResult(passed=False, reason=reason, evidence=evidence)
    if any(math.isnan(gain.mean + gain.mean_square) for _, gain in judged):
        return GateResult(passed=False, reason="A slice was not measured in full.", evidence=evidence)
    losses = [SliceLoss(each.title, each.rows, -gain.mean, p_worse(gain)) for each, gain in judged]
    return no_loss_beyond_chance(losses, policy, report.score)


def calibrated(report: GenerationReport, policy: GatePolicy) -> GateResult:
    """Written answers have no probability of being right that could be calibrated."""
    return not_applicable(
        "Does not apply: the confidence of a written answer is the mean probability of its tokens, which promises "
        "nothing about how often such answers are right."
    )


def within_latency_budget(report: GenerationReport, policy: GatePolicy) -> GateResult:
    """One request gets its first text soon enough, and its tokens fast enough."""
    figures = report.latency
    values = (figures.first_token_p50_ms, figures.first_token_p95_ms, figures.tokens_per_second)
    evidence: dict[str, float | str] = {
        "first_token_p95_ms": figures.first_token_p95_ms,
        "limit_first_token_p95_ms": policy.first_token_p95_ms,
        "tokens_per_second": figures.tokens_per_second,
        "least_tokens_per_second": policy.min_tokens_per_second,
    }
    setting = "gates.first_token_p95_ms and gates.min_tokens_per_second"
    if figures.requests < 1 or any(map(math.isnan, values)):
        reason = "The time of single requests was not measured in full."
        return GateResult(passed=False, reason=reason, evidence=evidence, setting=setting)
    soon = figures.first_token_p95_ms <= policy.first_token_p95_ms + ROUNDING
    fast = figures.tokens_per_second >= policy.min_tokens_per_second - ROUNDING
    first = shown(figures.first_token_p95_ms, policy.first_token_p95_ms, 1)
    speed = shown(figures.tokens_per_second, policy.min_tokens_per_second, 1)
    reason = (
        f"First text after {first} ms at the 95th percentile {'is within' if soon else 'exceeds'} "
        f"{policy.first_token_p95_ms:g} ms; {speed} tokens per second {'reach' if fast else 'are below'} "
        f"{policy.min_tokens_per_second:g}."
    )
    return GateResult(passed=soon and fast, reason=reason, evidence=evidence, setting=setting)


def serves_what_was_evaluated(report: GenerationReport, policy: GatePolicy) -> GateResult:
    """The serving engine writes the tokens that plain peft would have written in their place."""
    serving, least = report.serving, policy.min_serving_agreement
    evidence: dict[str, float | str] = {
        "agreement": serving.agreement,
        "same": serving.same,
        "least_agreement": least,
        "tokens": float(serving.tokens),
        "rows": float(serving.rows),
        "engine": serving.engine,
        "precision": serving.precision,
        "max_logprob_difference": serving.max_logprob_difference,
    }
    unknown = any(map(math.isnan, (serving.agreement, serving.same, serving.max_logprob_difference)))
    if unknown or serving.tokens == 0:
        reason = f"The serving engine was compared with plain peft on {serving.tokens} tokens, which shows nothing."
        return GateResult(passed=False, reason=reason, evidence=evidence)
    reason = (
        f"The serving engine ({serving.engine}, {serving.precision}) wrote {serving.tokens} tokens, of which plain "
        f"peft in fp32 agrees with a share of {shown(serving.agreement, least)}; the policy asks for {least:g}."
    )
    return GateResult(passed=serving.agreement >= least - ROUNDING, reason=reason, evidence=evidence)


def no_forgetting(report: GenerationReport, policy: GatePolicy) -> GateResult:
    """What the base model knew and what the champion could are still there."""
    setting = "gates.max_loss_increase (general questions) or gates.forgetting_margin (rows of the champion)"
    parts: list[GateResult] = []
    if report.type == "text-generation":
        parts.append(_general(report, policy.max_loss_increase))
    if report.champion is not None:
        where = "rows the champion was tested on"
        parts.append(
            _non_inferior(report, report.retained, policy.forgetting_margin, policy.confidence, where, "the champion")
        )
    if not parts:
        return not_applicable(
            "First release of an extraction: there is no champion whose knowledge could be forgotten, and the adapter "
            "answers nothing but its task."
        )
    evidence: dict[str, float | str] = {}
    for part in parts:
        evidence |= part.evidence
    reason = " ".join(part.reason for part in parts)
    return GateResult(passed=all(part.passed for part in parts), reason=reason, evidence=evidence, setting=setting)


GATES: dict[str, Callable[[GenerationReport, GatePolicy], GateResult]] = {
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


def _general(report: GenerationReport, limit: float) -> GateResult:
    found = report.forgetting
    if found is None or found.questions < 1 or math.isnan(found.increase):
        return GateResult(passed=False, reason="The loss on general questions was not measured.", evidence={})
    passed = found.increase <= limit + ROUNDING
    evidence: dict[str, float | str] = {
        "general_questions": float(found.questions),
        "general_loss": found.candidate_loss,
        "base_general_loss": found.base_loss,
        "loss_increase": found.increase,
        "limit_loss_increase": limit,
    }
    reason = (
        f"On {found.questions} general questions the loss is {found.candidate_loss:.3f} nats per token, "
        f"{shown(found.increase, limit)} more than without the adapter, {'within' if passed else 'beyond'} {limit:g}."
    )
    return GateResult(passed=passed, reason=reason, evidence=evidence)


def _non_inferior(
    report: GenerationReport, gain: Gain | None, margin: float, confidence: float, where: str, other: str
) -> GateResult:
    if gain is None or gain.rows == 0 or math.isnan(gain.mean + gain.mean_square):
        evidence: dict[str, float | str] = {"rows": 0.0, "margin": margin, "confidence": confidence}
        reason = f"Candidate and {other} share no measured {where}, so nothing shows that the candidate is not worse."
        return GateResult(passed=False, reason=reason, evidence=evidence)
    bound = gain_interval(gain, confidence, one_sided=True)
    needed = rows_for_margin(margin, confidence)
    return not_inferior(report.score, other, bound, gain.rows, where, margin, needed, {})


def _unmeasured(report: GenerationReport, model: str) -> list[str]:
    """Figures of a model that are missing or NaN, their intervals included."""
    figures = report.models.get(model, {})
    wanted = [name for name, metric in METRICS.items() if report.type in metric.kinds]
    return [
        name
        for name in wanted
        if name not in figures or any(map(math.isnan, (figures[name].value, figures[name].low, figures[name].high)))
    ]
