"""The two dimensions of the graph: the task, and for monitoring the day of the traffic."""

import warnings

import dagster as dg

# checks by partition are a preview of dagster 1.13; without them a check answers for another task's partition
warnings.filterwarnings("ignore", category=dg.PreviewWarning, message=".*partitions_def.*")

FIRST_DAY = "2002-01-01"

task_partitions = dg.DynamicPartitionsDefinition(name="task")
day_partitions = dg.DailyPartitionsDefinition(start_date=FIRST_DAY, end_offset=1)
task_day_partitions = dg.MultiPartitionsDefinition({"task": task_partitions, "day": day_partitions})


def task_and_day(partition_key: str) -> tuple[str, str]:
    """Task and ISO day of a monitoring partition key, which is `DAY|TASK`."""
    day, task = partition_key.split("|")
    return task, day


def monitoring_key(task: str, day: str) -> dg.MultiPartitionKey:
    return dg.MultiPartitionKey({"task": task, "day": day})
