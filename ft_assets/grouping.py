"""Words for what trainings are filtered and counted by, as the command line and the HTTP API take them."""

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ft_resources.training_runs import Grouping


class Status(StrEnum):
    """How a training ended."""

    finished = "FINISHED"
    failed = "FAILED"
    pruned = "PRUNED"


class Group(StrEnum):
    """What trainings are counted by."""

    base = "base"
    dataset = "dataset"
    recipe = "recipe"
    method = "method"
    task = "task"


GROUPS: "dict[Group, Grouping]" = {
    Group.base: "base",
    Group.dataset: "training_rows_digest",
    Group.recipe: "template",
    Group.method: "method",
    Group.task: "task",
}
