"""What people decide about releases: a candidate is approved over its gates, an earlier release made live again."""

import logging
from typing import Any

from ft_assets.home import Home
from ft_assets.release import announcing, promotion
from ft_assets.release.golden import listed
from ft_assets.runs import Runs
from ft_assets.tasks import TaskSpec
from ft_resources.errors import GateRefusal

logger = logging.getLogger(__name__)


def approve(home: Home, runs: Runs, task: str, *, because: str) -> dict[str, Any]:
    """See `Platform.approve`."""
    spec, environment = home.tasks.get(task).spec, home.environment
    if not because.strip():
        raise GateRefusal("an approval needs a reason", where=f"task {spec.full_name}", mend="Say why with --because.")
    _complete(home, runs, spec)
    engine = environment.generation_engine
    candidate = promotion.examine(home.lake, home.ledger, spec, engine=engine)
    live = home.ledger.live_release(spec.full_name)
    if live is not None and live["adapter"] == candidate.adapter:
        raise GateRefusal(
            f"version {live['model_version']} is live already, nothing was recorded",
            where=f"approval for {spec.full_name}",
            mend="There is nothing to overrule.",
        )
    home.ledger.approve(
        task=spec.full_name,
        adapter=candidate.adapter,
        report=candidate.report,
        actor=environment.actor,
        because=because,
    )
    decided, _ = promotion.release(
        home.lake, home.ledger, spec, actor=environment.actor, because=because, engine=engine
    )
    return _in_force(home, decided)


def _complete(home: Home, runs: Runs, spec: TaskSpec) -> None:
    """Register and build the newest evaluated adapter: a run that a gate stopped did not get that far. And ask what the
    task file lists now.

    Raises:
        GateRefusal: That failed.
    """
    task = spec.full_name
    report = home.lake.require(task, "eval_report").digest
    version, service = home.lake.head(task, "model_version"), home.lake.head(task, "bento_service")
    made = all(one is not None and one.made_from["eval_report"] == report for one in (version, service))
    asked = service is not None and service.made_from.get("test_requests", []) == listed(spec.serving.test_requests)
    if made and asked:
        return
    result = runs.execute("train_and_release", task, ("model_version", "bento_service"), {}, None)
    if not result.succeeded:
        raise GateRefusal(
            f"the candidate could not be registered and built: {result.failure or result.refusals}",
            where=f"approval for {task}",
            mend="Mend that and approve again.",
        )


def roll_back(home: Home, task: str, *, to: str | None, because: str) -> dict[str, Any]:
    """See `Platform.roll_back`."""
    name = home.tasks.get(task).name
    decided = promotion.roll_back(home.lake, home.ledger, name, to=to, actor=home.environment.actor, because=because)
    return _in_force(home, decided)


def _in_force(home: Home, decided: promotion.Decided) -> dict[str, Any]:
    """Tell who wants to know of it, and MLflow; the release."""
    release = decided.release
    for failure in announcing.announce(home.lake, home.environment.notify_urls, decided).failures:
        logger.warning("launch notice of %s: %s", release["id"], failure)
    home.registry.set_alias(release["task"], "champion", release["model_version"])
    return release
