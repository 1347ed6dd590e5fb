"""A verdict on a candidate: what each gate says, and what follows from all of them."""

import math

import pydantic

from ft_resources.errors import EvaluationError

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


def shown(value: float, limit: float, least_digits: int = 3) -> str:
    """With as many digits as it takes to see on which side of the limit the value lies."""
    for digits in range(least_digits, 12):
        text = f"{value:.{digits}f}"
        if (float(text) < limit) == (value < limit) and (float(text) > limit) == (value > limit):
            return text
    return repr(value)
