"""The one decision about a candidate: from a report and a policy to a verdict, with nothing else looked at."""

from ft_assets.evaluation import classification_gates
from ft_assets.evaluation.consistency import require_consistent
from ft_assets.evaluation.decision import Decision, GateResult
from ft_assets.evaluation.generation import gates as generation_gates
from ft_assets.evaluation.generation.consistency import require_consistent as require_consistent_scores
from ft_assets.evaluation.generation.report import GenerationReport
from ft_assets.evaluation.policy import GatePolicy
from ft_assets.evaluation.report import EvalReport

GATES = tuple(classification_gates.GATES)
"""Names of the gates, the same for every type of task."""
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
    return (
        gate.reason if gate.passed else f"{gate.reason} The limit is {gate.setting or SETTINGS[name]} of the task file."
    )


def decide(report: EvalReport | GenerationReport, policy: GatePolicy) -> Decision:
    """Ask every gate. A figure that is missing or NaN never passes.

    Raises:
        EvaluationError: The report contradicts itself.
    """
    if isinstance(report, GenerationReport):
        require_consistent_scores(report)
        gates = {name: gate(report, policy) for name, gate in generation_gates.GATES.items()}
    else:
        require_consistent(report)
        gates = {name: gate(report, policy) for name, gate in classification_gates.GATES.items()}
    return Decision(passed=all(result.passed for result in gates.values()), gates=gates)
