"""`ft deploy`, `ft undeploy`: an address that answers, and its end."""

import json
import shlex

import typer

from ft_assets.terminal import HomeOption, TaskArgument, console, open_platform, told

app = typer.Typer()


@app.command()
def deploy(task: TaskArgument, home: HomeOption = None) -> None:
    """Print an address that answers for the task's live release, and a page to try it on.

    It is the service of FT_SERVICE_URL, else one of this home on this machine: it is started when none runs, and goes
    on until `ft undeploy`.
    """
    with told():
        with console.status("looking for the service, or starting it"):
            found = open_platform(home).deploy(task)
        body = json.dumps({"task": task, "inputs": ["your text"]}, ensure_ascii=False)
        json_type = shlex.quote("content-type: application/json")
        console.print(f"address  {found.url}", markup=False)
        console.print(f"page     {found.page}", markup=False)
        console.print(f"answers  version {found.model_version}, release {found.release}", markup=False)
        if not found.ready:
            console.print("         [yellow]not yet[/yellow]: the service is not ready, or follows its ledger late")
        console.print(f"curl -s {found.url}/predict -H {json_type} -d {shlex.quote(body)}", markup=False)


@app.command()
def undeploy(home: HomeOption = None) -> None:
    """End the service that `ft deploy` or the API started, for all tasks; what it is answering is answered first."""
    with told():
        console.print("the service has ended" if open_platform(home).undeploy() else "no service was running")
