"""What a training worker is told, and what an adapter is made from: the key under which it is found again."""

from collections.abc import Mapping
from typing import Any

from ft_assets.tasks import Task
from ft_assets.training.identity import TRAINER, environment_of_training
from ft_assets.training.recipes import Resolved
from ft_resources.base_models import resolve as resolve_base
from ft_resources.environments import Environment
from ft_resources.lake import Lake, digest_of
from ft_resources.tracking import TRAINED_FROM

SPLITS = ("train_split", "validation_split")


def inputs_of(lake: Lake, task: Task) -> dict[str, str]:
    """Digests of the splits a training reads."""
    return {split: lake.require(task.name, split).digest for split in SPLITS}


def made_from(task: Task, resolved: Resolved, inputs: Mapping[str, str], environment: Environment) -> dict[str, Any]:
    """Everything that decides the bytes of an adapter."""
    spec = task.spec
    return {
        **inputs,
        "task": task.name,
        "type": spec.type,
        "labels": spec.labels,
        "fields": {name: field.model_dump(mode="json") for name, field in spec.fields.items()},
        "instruction": spec.instruction,
        "preparation": {"pii": list(spec.cleaning.pii), "max_chars": spec.cleaning.max_chars},
        "settings": resolved.settings.model_dump(mode="json"),
        "template": resolved.template_digest,
        "base": resolve_base(resolved.settings.base.model).digest,
        "trainer": TRAINER,
        "environment": environment_of_training(environment),
    }


def job(
    made: Mapping[str, Any], resolved: Resolved, environment: Environment, dagster_run: str, *, resume: str = ""
) -> dict[str, Any]:
    """What the worker gets.

    Args:
        made: What the adapter is made from.
        resume: Key of a run whose checkpoint this one may start from, when its own has none.
    """
    return {
        "made_from": dict(made),
        "key": digest_of(dict(made)),
        "resume": resume,
        "origins": dict(resolved.origins),
        "template": resolved.template,
        "lake": environment.lake,
        "mlflow": environment.mlflow,
        "run_name": f"{made['task']} {dagster_run[:8]}",
        "tags": {
            "dagster_run_id": dagster_run,
            "task": made["task"],
            TRAINED_FROM: digest_of(dict(made)),
            **{split: made[split] for split in SPLITS},
        },
    }
