"""Reading a stored report back, with the identity it was made for."""

import pydantic

from ft_assets.evaluation.report import EvalReport
from ft_resources.errors import EvaluationError
from ft_resources.lake import Artefact, Lake, short


def read_report(lake: Lake, task: str) -> tuple[Artefact, EvalReport]:
    """The report that `task`'s eval_report points at, and its artefact.

    Raises:
        ArtefactError: It was never made, or its bytes were changed.
        EvaluationError: What the pointer names is no evaluation report of this platform.
    """
    artefact = lake.require(task, "eval_report")
    return artefact, parse_report(artefact)


def parse_report(artefact: Artefact) -> EvalReport:
    """The report inside an `eval_report` artefact; errors as of `read_report`."""
    if artefact.kind != "eval_report":
        raise EvaluationError(
            f"{short(artefact.digest)} is a {artefact.kind}, not an eval_report",
            where=artefact.uri,
            mend="Materialise eval_report again.",
        )
    try:
        return EvalReport.model_validate(artefact.json("report.json"))
    except pydantic.ValidationError as error:
        raise EvaluationError(
            f"report {short(artefact.digest)} does not have the agreed form: {error.error_count()} fields are wrong",
            where=artefact.uri,
            mend="Materialise eval_report again.",
        ) from error
