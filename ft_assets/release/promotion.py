"""Deciding a release: identity first, then every blocking demand again, on exactly the stored artefacts."""

from dataclasses import dataclass
from typing import Any

from ft_assets.data.assembly import split_rows
from ft_assets.data.verdicts import of_clean, of_raw, of_splits
from ft_assets.evaluation.decision import Decision
from ft_assets.evaluation.gate import decide, explained
from ft_assets.evaluation.generation.report import GenerationReport
from ft_assets.evaluation.stored import read_report, require_engine, require_recounted, served_precision
from ft_assets.release import golden
from ft_assets.tasks import TaskSpec
from ft_assets.training.verdicts import of_adapter
from ft_resources.errors import GateRefusal
from ft_resources.lake import Artefact, Lake, short
from ft_resources.ledger import Ledger


@dataclass(frozen=True)
class Candidate:
    """Everything a release needs, all carrying one adapter digest."""

    adapter: str
    base: str
    report: str
    model_version: str
    bento: str
    precision: str
    """What it was evaluated in and is served in."""
    engine: str
    """What writes its texts, `torch` or `vllm`: evaluated and served by the same one."""
    decision: Decision
    refusals: dict[str, str]
    """What speaks against it, demand -> reason: gates of the report, and checks of the rows and the adapter."""


def examine(lake: Lake, ledger: Ledger, task: TaskSpec, *, engine: str = "torch") -> Candidate:
    """The candidate that the newest artefacts describe together, and everything that speaks against it.

    Args:
        engine: What writes texts in the service, `torch` or `vllm`.

    Raises:
        GateRefusal: Adapter, report, model version and Bento are not of one adapter; the report is another task's, of
            other rows, of another engine, or compared the adapter with one that is no longer the champion; or the
            Bento answered a golden request or a test request of the task file wrongly, or was asked other ones.
        ArtefactError: One of them is missing or its bytes were changed.
        EvaluationError: The report contradicts itself or its own rows.
    """
    name = task.full_name
    adapter = lake.require(name, "adapter")
    report_artefact, report = read_report(lake, name)
    version = lake.require(name, "model_version").json("version.json")
    service_artefact = lake.require(name, "bento_service")
    service = service_artefact.json("service.json")
    live = ledger.live_release(name)
    if report.task != name or adapter.made_from["task"] != name:
        raise _unfit(name, f"the report is about task '{report.task}'")
    for what, digest in (
        ("eval_report", report.adapter),
        ("model_version", version["adapter"]),
        ("bento_service", service["adapter"]),
    ):
        if digest != adapter.digest:
            raise _unfit(
                name, f"{what} is about adapter {short(digest)}, the newest adapter is {short(adapter.digest)}"
            )
    if not version["report"] == service["eval_report"] == report_artefact.digest:
        raise _unfit(name, "model_version or bento_service was made on another report")
    if isinstance(report, GenerationReport):
        same = list(report.fields.items()) == list(task.fields.items())
    else:
        same = report.labels == task.labels
    if report.test_split != lake.require(name, "test_split").digest or not same:
        raise _unfit(name, "the report is stale: test rows, labels or fields of the task have changed since")
    if live is not None and live["adapter"] not in (report.champion, adapter.digest):
        against = short(report.champion) if report.champion else "no champion"
        raise _unfit(name, f"the report is stale: it compares with {against}, but {short(live['adapter'])} is live")
    if service_artefact.made_from.get("test_requests", []) != golden.listed(task.serving.test_requests):
        raise _unfit(name, "the Bento was not asked the test requests that the task file lists now")
    told = golden.complaints(service)
    if told or not service["answers_match"]:
        raise GateRefusal(
            "; ".join(["the Bento did not answer as it must", *told]),
            where=f"release of {name}",
            mend=golden.mend(service),
        )
    require_engine(report, engine)
    require_recounted(report_artefact, report)
    decision = decide(report, task.gates)
    gates = {gate: explained(gate, decision.gate(gate)) for gate in decision.refusals}
    return Candidate(
        adapter=adapter.digest,
        base=adapter.json("adapter.json")["base"]["model"],
        report=report_artefact.digest,
        model_version=version["version"],
        bento=service["tag"],
        precision=served_precision(report),
        engine=engine,
        decision=decision,
        refusals=gates | _upstream(lake, adapter, report.test_split, task),
    )


def _upstream(lake: Lake, adapter: Artefact, test_split: str, task: TaskSpec) -> dict[str, str]:
    """Blocking checks of stages 1 and 2 that fail on exactly the rows behind this adapter and its test."""
    splits = {
        "train": lake.open(adapter.made_from["train_split"]),
        "validation": lake.open(adapter.made_from["validation_split"]),
        "test": lake.open(test_split),
    }
    clean = lake.open(splits["train"].made_from["clean_dataset"])
    raw = lake.open(clean.made_from["raw_dataset"])
    kept = clean.parquet("kept.parquet")
    parts = {name: split.parquet("rows.parquet") for name, split in splits.items()}
    verdicts = {
        **of_raw(raw.parquet("rows.parquet"), task),
        **of_clean(kept, task),
        **{f"{split}_split.{name}": verdict for (split, name), verdict in of_splits(kept, parts, task).items()},
        **of_adapter(adapter.json("training.json"), split_rows(lake, splits["validation"].digest)),
    }
    return {name: verdict.reason for name, verdict in verdicts.items() if not verdict.passed}


def _unfit(task: str, what: str) -> GateRefusal:
    again = "Materialise eval_report, model_version, bento_service and release of this task in one run."
    return GateRefusal(what, where=f"release of {task}", mend=again)


@dataclass(frozen=True)
class Decided:
    """What answers after a decision."""

    release: dict[str, Any]
    """The release in force."""
    replaced: dict[str, Any] | None
    """The release that was in force before; None where this is the first one."""
    new: bool
    """False where the adapter was live already, so that no release was recorded."""


def release(
    lake: Lake, ledger: Ledger, task: TaskSpec, *, actor: str, because: str, engine: str = "torch"
) -> tuple[Decided, Candidate]:
    """Make the candidate live, or refuse.

    Args:
        engine: See `examine`.

    Returns:
        The release in force afterwards, and the candidate. A candidate that is live already makes no new release; what
        the task says of `serving` is put in force.

    Raises:
        GateRefusal: As `examine`; or something speaks against the candidate, or it was rolled back, and no person
            approved exactly this adapter on this report since.
    """
    candidate = examine(lake, ledger, task, engine=engine)
    name = task.full_name
    live = ledger.live_release(name)
    if live is not None and live["adapter"] == candidate.adapter:
        ledger.set_review_below(name, task.serving.review_below, actor=actor)
        return Decided(live, live, new=False), candidate
    refusals = dict(candidate.refusals)
    rolled_back = _rolled_back(ledger.releases(name)).get(candidate.adapter)
    if rolled_back is not None:
        refusals["rolled_back"] = f"this adapter was rolled back by {rolled_back['actor']}: {rolled_back['because']}"
    approval = None
    if refusals:
        approval = ledger.approval(task=name, adapter=candidate.adapter, report=candidate.report)
        if approval is None or (rolled_back is not None and approval["created_at"] < rolled_back["created_at"]):
            reasons = "; ".join(f"{demand}: {reason}" for demand, reason in refusals.items())
            raise GateRefusal(
                f"not to be released, {len(refusals)} demands are not met. {reasons}",
                where=f"release of {name}",
                mend=f"Train a better adapter, or overrule with: ft release approve {name} --because TEXT",
            )
    recorded = ledger.record_release(
        task=name,
        kind="approval" if approval else "release",
        adapter=candidate.adapter,
        base=candidate.base,
        report=candidate.report,
        model_version=candidate.model_version,
        bento=candidate.bento,
        actor=approval["actor"] if approval else actor,
        because=approval["because"] if approval else because,
        decision=candidate.decision.model_dump(mode="json")
        | {"refusals": refusals, "precision": candidate.precision, "engine": candidate.engine},
        precision=candidate.precision,
        expected_live=live["id"] if live else None,
        review_below=task.serving.review_below,
    )
    return Decided(recorded, live, new=True), candidate


def _rolled_back(history: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Adapters that a rollback took off the route and nothing put back since -> that rollback."""
    away: dict[str, dict[str, Any]] = {}
    adapter_of = {one["id"]: one["adapter"] for one in history}
    for one in history:
        away.pop(one["adapter"], None)
        if one["kind"] == "rollback":
            away[adapter_of[one["decision"]["rolled_back_from"]]] = one
    return away


def roll_back(lake: Lake, ledger: Ledger, task: str, *, to: str | None, actor: str, because: str) -> Decided:
    """Make an earlier release's adapter live again: one row, effective in under a second.

    Args:
        to: A release id, or None for the adapter that was live before the present one.

    Raises:
        GateRefusal: There is no such earlier release.
        ArtefactError: Its adapter is no longer intact in the lake.
    """
    history = ledger.releases(task)
    live = ledger.live_release(task)
    away = _rolled_back(history)
    if not because.strip():
        raise GateRefusal("a rollback needs a reason", where=f"rollback of {task}", mend="Say why with --because.")
    earlier = [one for one in history if live is not None and one["adapter"] not in (live["adapter"], *away)]
    wanted = [one for one in history if one["id"] == to] if to else earlier[-1:]
    if not wanted or live is None:
        raise GateRefusal(
            f"there is no release '{to}' of this task" if to else "there is no earlier adapter to go back to",
            where=f"rollback of {task}",
            mend=f"Name a release of 'ft release history {task}' with --to.",
        )
    target = wanted[0]
    adapter = lake.open(target["adapter"])
    precision = target["decision"].get("precision", "auto")
    recorded = ledger.record_release(
        task=task,
        kind="rollback",
        adapter=target["adapter"],
        report=target["report"],
        model_version=target["model_version"],
        bento=target["bento"],
        actor=actor,
        because=because,
        decision={"rolled_back_from": live["id"], "to": target["id"], "precision": precision},
        precision=precision,
        base=adapter.json("adapter.json")["base"]["model"],
        expected_live=live["id"],
    )
    return Decided(recorded, live, new=True)
