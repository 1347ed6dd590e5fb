"""What a training worker is told, and what an adapter is made from: the key under which it is found again."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from ft_assets.tasks import Task
from ft_assets.training.identity import TRAINER, environment_of_training
from ft_assets.training.recipes import Resolved
from ft_resources.base_models import resolve as resolve_base
from ft_resources.environments import Environment
from ft_resources.lake import Lake, digest_of
from ft_resources.provenance import code
from ft_resources.tracking import TRAINED_FROM

ACTOR = "ft/actor"
"""Tag of a Dagster run: who asked for it through the Python API or `ft`."""
TRIGGERS = {
    "user": ACTOR,
    "sensor": "dagster/sensor_name",
    "schedule": "dagster/schedule_name",
    "backfill": "dagster/backfill",
}
"""What starts a run -> the tag of the run that names it."""
SPLITS = ("train_split", "validation_split")


def inputs_of(lake: Lake, task: Task) -> dict[str, str]:
    """Digests of the splits a training reads."""
    return {split: lake.require(task.name, split).digest for split in SPLITS}


def made_from(task: Task, resolved: Resolved, inputs: Mapping[str, str], environment: Environment) -> dict[str, Any]:
    """Everything that decides the bytes of an adapter of fresh weights.

    One that starts from another adapter's is made from `parent` as well, that one's digest.
    """
    spec = task.spec
    return {
        **inputs,
        "task": task.name,
        "type": spec.type,
        "labels": spec.labels,
        "fields": {name: field.model_dump(mode="json") for name, field in spec.fields.items()},
        "field_order": list(spec.fields),  # it is the order of the answer, and canonical JSON keeps none of keys
        "instruction": spec.instruction,
        **({"system": spec.system} if spec.system else {}),
        "preparation": {"pii": list(spec.cleaning.pii), "max_chars": spec.cleaning.max_chars},
        "settings": resolved.settings.model_dump(mode="json"),
        "template": resolved.template_digest,
        "base": resolve_base(resolved.settings.base.model).digest,
        "trainer": TRAINER,
        "environment": environment_of_training(environment),
    }


def job(made: Mapping[str, Any], resolved: Resolved, environment: Environment, dagster_run: str) -> dict[str, Any]:
    """What the worker gets.

    Args:
        made: What the adapter is made from.
    """
    key = digest_of(dict(made))
    return {
        "made_from": dict(made),
        "key": key,
        "trace": {},
        "origins": dict(resolved.origins),
        "template": resolved.template,
        "lake": environment.lake,
        "mlflow": environment.mlflow,
        "run_name": f"{made['task']} {dagster_run[:8]}",
        "tags": {
            "dagster_run_id": dagster_run,
            "task": made["task"],
            TRAINED_FROM: key,
            **{split: made[split] for split in SPLITS},
        },
    }


def traced(job: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """`job` with the trace record of its run, which its MLflow run carries as tags `trace.NAME`."""
    tags = {f"trace.{name}": str(value) for name, value in record.items()}
    return {**job, "trace": dict(record), "tags": {**job["tags"], **tags}}


def trace_record(
    resolved: Resolved, dagster_run: str, run_tags: Mapping[str, str], submitted: datetime, config: str
) -> dict[str, Any]:
    """Who asked for a run, when, of which code and recipe, and where its merged settings are.

    Args:
        run_tags: Tags of the Dagster run.
        submitted: When that was created, aware.
        config: Path of the merged settings.
    """
    commit = code()
    return {
        "job_id": dagster_run,
        "template": resolved.template,
        "template_digest": resolved.template_digest,
        "config": config,
        "commit": commit["commit"],
        "dirty": commit["dirty"],
        "triggered_by": triggered_by(run_tags),
        "submit_time": submitted.isoformat(),
    }


def triggered_by(run_tags: Mapping[str, str]) -> str:
    """What started a Dagster run, read from its tags: a user, a sensor, a schedule or a backfill."""
    for kind, tag in TRIGGERS.items():
        if tag in run_tags:
            return f"{kind} {run_tags[tag]}"
    return "user, through the Dagster UI or API"
