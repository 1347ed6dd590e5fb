"""Hooks of schemathesis: requests name a task, a run and assets that are there, more often than by chance."""

import schemathesis

from tests.api.conftest import ENDED

TASKS = ("weather", "drizzle", "mail")
ASSETS = ("raw_dataset", "clean_dataset")


@schemathesis.hook
def map_body(context, body):  # type: ignore[no-untyped-def]
    if not isinstance(body, dict):
        return body
    if isinstance(body.get("task"), str) and 1 <= len(body["task"]) <= 128:  # what is wrong stays wrong
        body["task"] = TASKS[len(body["task"]) % len(TASKS)]
    if isinstance(body.get("only"), list) and all(isinstance(one, str) and one for one in body["only"]):
        body["only"] = [ASSETS[len(one) % len(ASSETS)] for one in body["only"]]
    return body


@schemathesis.hook
def map_path_parameters(context, path_parameters):  # type: ignore[no-untyped-def]
    for name in ("run_id", "task_id"):
        value = (path_parameters or {}).get(name)
        if isinstance(value, str) and len(value) % 2:
            path_parameters[name] = ENDED
    return path_parameters
