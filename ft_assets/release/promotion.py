"""Deciding a release: identity first, then the gates, asked again on the stored report."""

from dataclasses import dataclass
from typing import Any

from ft_assets.evaluation.gate import Decision, decide
from ft_assets.evaluation.stored import read_report
from ft_assets.tasks import TaskSpec
from ft_resources.errors import GateRefusal
from ft_resources.lake import Lake, short
from ft_resources.ledger import Ledger


@dataclass(frozen=True)
class Candidate:
    """Everything a release needs, all carrying one adapter digest."""

    adapter: str
    base: str
    report: str
    model_version: str
    bento: str
    decision: Decision


def examine(lake: Lake, ledger: Ledger, task: TaskSpec) -> Candidate:
    """The candidate that the newest artefacts describe together.

    Raises:
        GateRefusal: Adapter, report, model version and Bento are not of one adapter; the report is another task's,
            or compared the adapter with one that is no longer the champion; or the Bento's probe failed.
        ArtefactError: One of them is missing or its bytes were changed.
        EvaluationError: The report contradicts itself.
    """
    name = task.full_name
    adapter = lake.require(name, "adapter")
    report_artefact, report = read_report(lake, name)
    version, service = lake.require(name, "model_version"), lake.require(name, "bento_service")
    again = "Materialise eval_report, model_version, bento_service and release of this task in one run."
    if report.task != name or adapter.made_from["task"] != name:
        raise GateRefusal(f"the report is about task '{report.task}'", where=f"release of {name}", mend=again)
    for what, digest in (
        ("eval_report", report.adapter),
        ("model_version", version.json("version.json")["adapter"]),
        ("bento_service", service.json("service.json")["adapter"]),
    ):
        if digest != adapter.digest:
            raise GateRefusal(
                f"{what} is about adapter {short(digest)}, the newest adapter is {short(adapter.digest)}",
                where=f"release of {name}",
                mend=again,
            )
    if version.json("version.json")["report"] != report_artefact.digest:
        raise GateRefusal("model_version was registered on another report", where=f"release of {name}", mend=again)
    live = ledger.live_release(name)
    if live is not None and live["adapter"] not in (report.champion, adapter.digest):
        raise GateRefusal(
            f"the report compares with {short(report.champion) if report.champion else 'no champion'}, "
            f"but {short(live['adapter'])} is live",
            where=f"release of {name}",
            mend="The report is stale. " + again,
        )
    if not service.json("service.json")["answers_match"]:
        raise GateRefusal("the Bento did not give the evaluated answers", where=f"release of {name}", mend=again)
    return Candidate(
        adapter=adapter.digest,
        base=adapter.json("adapter.json")["base"]["model"],
        report=report_artefact.digest,
        model_version=version.json("version.json")["version"],
        bento=service.json("service.json")["tag"],
        decision=decide(report, task.gates),
    )


def release(
    lake: Lake, ledger: Ledger, task: TaskSpec, *, actor: str, because: str
) -> tuple[dict[str, Any], Candidate]:
    """Make the candidate live, or refuse.

    Returns:
        The release in force afterwards, and the candidate. A candidate that is live already makes no new release.

    Raises:
        GateRefusal: As `examine`; or a gate refuses and no person approved exactly this adapter on this report.
    """
    candidate = examine(lake, ledger, task)
    name = task.full_name
    live = ledger.live_release(name)
    if live is not None and live["adapter"] == candidate.adapter:
        return live, candidate
    approval = None
    if not candidate.decision.passed:
        approval = ledger.approval(task=name, adapter=candidate.adapter, report=candidate.report)
        if approval is None:
            reasons = "; ".join(
                f"{gate}: {candidate.decision.gate(gate).reason}" for gate in candidate.decision.refusals
            )
            raise GateRefusal(
                f"{candidate.decision.verdict} {reasons}",
                where=f"release of {name}",
                mend=f"Train a better adapter, or overrule with: ft release approve {name} --because TEXT",
            )
    recorded = ledger.record_release(
        task=name,
        kind="approval" if approval else "release",
        adapter=candidate.adapter,
        report=candidate.report,
        model_version=candidate.model_version,
        bento=candidate.bento,
        actor=approval["actor"] if approval else actor,
        because=approval["because"] if approval else because,
        decision=candidate.decision.model_dump(mode="json"),
        base=candidate.base,
        expected_live=live["id"] if live else None,
    )
    return recorded, candidate


def roll_back(lake: Lake, ledger: Ledger, task: str, *, to: str | None, actor: str, because: str) -> dict[str, Any]:
    """Make an earlier release's adapter live again: one row, effective in under a second.

    Args:
        to: A release id, or None for the adapter that was live before the present one.

    Raises:
        GateRefusal: There is no such earlier release.
        ArtefactError: Its adapter is no longer intact in the lake.
    """
    history = ledger.releases(task)
    live = ledger.live_release(task)
    earlier = [one for one in history if live is not None and one["adapter"] != live["adapter"]]
    wanted = [one for one in history if one["id"] == to] if to else earlier[-1:]
    if not wanted or live is None:
        raise GateRefusal(
            f"there is no release '{to}' of this task" if to else "there is no earlier adapter to go back to",
            where=f"rollback of {task}",
            mend=f"See: ft release history {task}",
        )
    target = wanted[0]
    adapter = lake.open(target["adapter"])
    return ledger.record_release(
        task=task,
        kind="rollback",
        adapter=target["adapter"],
        report=target["report"],
        model_version=target["model_version"],
        bento=target["bento"],
        actor=actor,
        because=because,
        decision={"rolled_back_from": live["id"], "to": target["id"]},
        base=adapter.json("adapter.json")["base"]["model"],
        expected_live=live["id"],
    )
