"""What a training worker is told, and what an adapter is made from: the key under which it is found again."""

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from ft_assets.tasks import Task
from ft_assets.training.identity import RUNNER, TRAINER, environment_of_plugin, environment_of_training
from ft_assets.training.recipes import Merged, Plugged, of_transformers
from ft_resources.base_models import resolve as resolve_base
from ft_resources.environments import Environment
from ft_resources.lake import Lake, digest_of
from ft_resources.provenance import code, provenance
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
CHECKPOINT = "checkpoint"
"""Kind of the artefacts that a training goes on from, and the first part of the heads that point at them."""
PLUGIN = "plugin"
"""Key in what something was made from: the plug-in trainer that made it. Adapters have none."""


def checkpoint_of(key: str) -> str:
    """The head of the checkpoint that the training with this key goes on from."""
    return f"{CHECKPOINT}/{key[:32]}"


def inputs_of(lake: Lake, task: Task) -> dict[str, str]:
    """Digests of the splits a training reads."""
    return {split: lake.require(task.name, split).digest for split in SPLITS}


def made_from(task: Task, merged: Merged, inputs: Mapping[str, str], environment: Environment) -> dict[str, Any]:
    """Everything that decides the bytes of what is trained, from fresh weights.

    An adapter that starts from another one's weights is made from `parent` as well, that one's digest.

    Raises:
        SpecError: The base model is not there, or a package that a plug-in trainer needs.
    """
    spec = task.spec
    shared = {
        **inputs,
        "task": task.name,
        "type": spec.type,
        "labels": spec.labels,
        "preparation": {"pii": list(spec.cleaning.pii), "max_chars": spec.cleaning.max_chars},
        "settings": merged.settings.model_dump(mode="json"),
        "template": merged.template_digest,
    }
    if isinstance(merged, Plugged):
        return {
            **shared,
            PLUGIN: merged.plugin.identity,
            "trainer": RUNNER,
            "environment": environment_of_plugin(environment, merged.plugin.packages()),
        }
    return {
        **shared,
        "fields": {name: field.model_dump(mode="json") for name, field in spec.fields.items()},
        "field_order": list(spec.fields),  # it is the order of the answer, and canonical JSON keeps none of keys
        "instruction": spec.instruction,
        **({"system": spec.system} if spec.system else {}),
        "base": resolve_base(of_transformers(merged).settings.base.model).digest,
        "trainer": TRAINER,
        "environment": environment_of_training(environment),
    }


def key_of(made: Mapping[str, Any]) -> str:
    """The key of the training of what is made from this."""
    return digest_of(dict(made))


def job(made: Mapping[str, Any], merged: Merged, environment: Environment, dagster_run: str) -> dict[str, Any]:
    """What the worker gets.

    Args:
        made: What the adapter is made from.
    """
    key = key_of(made)
    return {
        "made_from": dict(made),
        "key": key,
        "trace": {},
        "origins": dict(merged.origins),
        "template": merged.template,
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


def without_lines(origins: Mapping[str, str]) -> dict[str, str]:
    """Origins of settings without the numbers of lines: a comment more in a task file makes no other adapter."""
    return {path: re.sub(r":\d+$", "", origin) for path, origin in origins.items()}


def traced(job: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """`job` with the trace record of its run, which its MLflow run carries as tags `trace.NAME`."""
    tags = {f"trace.{name}": str(value) for name, value in record.items()}
    return {**job, "trace": dict(record), "tags": {**job["tags"], **tags}}


def made_on(job: Mapping[str, Any]) -> dict[str, Any]:
    """What a training ran on, who asked for it, and what of both decides the bytes: for its results folder."""
    made = job["made_from"]
    plugin = {PLUGIN: made[PLUGIN]} if PLUGIN in made else {}
    return {**provenance(), "trace": job["trace"], "decisive": made["environment"], **plugin}


def trace_record(
    merged: Merged, dagster_run: str, run_tags: Mapping[str, str], submitted: datetime, config: str
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
        "template": merged.template,
        "template_digest": merged.template_digest,
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
