"""Hooks of schemathesis: requests name tasks that are there, more often than by chance."""

import schemathesis

TASKS = ("t1", "t2", "chat", "read")


@schemathesis.hook
def map_body(context, body):  # type: ignore[no-untyped-def]
    if not isinstance(body, dict):
        return body
    for name in ("task", "model"):
        if isinstance(body.get(name), str) and 1 <= len(body[name]) <= 128:  # what is wrong stays wrong
            body[name] = TASKS[len(body[name]) % len(TASKS)]
    parameters = body.get("parameters")
    if isinstance(parameters, dict) and parameters.get("max_tokens") in range(16, 32_769):  # quick answers
        parameters["max_tokens"] = 16
    return body
