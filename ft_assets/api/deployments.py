"""Deployments over HTTP: one call to an address that answers for a task, and its end."""

import pydantic
from fastapi import APIRouter, Request

from bento.auth import permit
from bento.protocol import Name
from bento.protocol import Request as Body
from ft_assets.api.refusals import errors
from ft_assets.api.scope import platform_of, unknown_task
from ft_assets.deploying import NothingLive
from ft_assets.tasks import UnknownTask

router = APIRouter(tags=["deployments"])


class DeployRequest(Body):
    """A task that is to be answered."""

    task: Name = pydantic.Field(description="Full name of a task with a live release.", examples=["mail-triage"])


class Deployed(pydantic.BaseModel):
    """Where a task is answered."""

    model_config = pydantic.ConfigDict(protected_namespaces=())

    url: str = pydantic.Field(
        description="The service: POST `url`/predict. It listens on the API's machine only, unless "
        "FT_SERVICE_URL names another one."
    )
    page: str = pydantic.Field(description="A page where a person tries the task.")
    task: str
    model_version: str
    release: str = pydantic.Field(description="The release in force.")
    ready: bool = pydantic.Field(description="Whether the service answers with it; one of FT_SERVICE_URL may not yet.")


class Stopped(pydantic.BaseModel):
    """What became of the service."""

    stopped: bool = pydantic.Field(description="false: none was running.")


@router.post("/deployments", summary="Deploy a task", responses=errors(400, 404, 409))
def deploy(body: DeployRequest, request: Request) -> Deployed:
    """Answer with the address of a service that answers for the task's live release. Takes an owner of the task.

    The service of FT_SERVICE_URL, else one of the API's machine: it is found when it runs, or started, which takes ten
    seconds or more, and goes on when the API ends. Asking again changes nothing.
    """
    permit(request, body.task, "owner")
    platform = platform_of(request)
    try:
        return Deployed(**vars(platform.deploy(body.task)))
    except NothingLive:
        try:
            platform.tasks.get(body.task)
        except UnknownTask as error:
            raise unknown_task(request, error) from None
        raise


@router.delete("/deployments", summary="End the service", responses=errors(409))
def undeploy(request: Request) -> Stopped:
    """End the service that a deployment started, for all tasks; takes an owner of all.

    What it is answering is answered first, within 20 seconds.
    """
    permit(request, role="owner")
    return Stopped(stopped=platform_of(request).undeploy())
