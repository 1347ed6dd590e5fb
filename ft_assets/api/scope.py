"""What a request is about: the platform behind it, and whose tasks its answer may tell of."""

from collections.abc import Collection

from fastapi import Request

from bento.auth import Caller, permit
from ft_assets.platform import Platform
from ft_assets.tasks import UnknownTask
from ft_resources.errors import RequestError


def platform_of(request: Request) -> Platform:
    platform = request.app.state.platform
    assert isinstance(platform, Platform)
    return platform


def tasks_of(request: Request, task: str | None) -> Collection[str] | None:
    """Tasks that an answer may tell of: the one asked for, else all of the caller's; None: every one.

    Raises:
        RequestError: `forbidden`.
    """
    caller: Caller = request.state.caller
    if task is None:
        return caller.tasks
    permit(request, task)
    return (task,)


def unknown_task(request: Request, error: UnknownTask) -> RequestError:
    """The refusal of a task that no file declares: who may use some is not told of others."""
    caller: Caller = request.state.caller
    mend = error.mend if caller.tasks is None else f"Your tasks: {', '.join(sorted(caller.tasks))}."
    return RequestError("unknown_task", error.what, status=404, mend=mend, field="task")


def actor_of(request: Request) -> str:
    """Whom the audit names: the caller's key, or whoever runs the API for callers that need none."""
    caller: Caller = request.state.caller
    return platform_of(request).environment.actor if caller.local else caller.name
