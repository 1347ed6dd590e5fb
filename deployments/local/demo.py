"""The platform's main job on real mail, end to end, through its Python API and a real service and daemon.

Run it with `make demo`. Mail up to August 2002 trains the first release; the mail after it is replayed day by day as
traffic; the labels of every other mail come back; drift is measured each day; the sensor asks for a retraining run.
"""

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import dagster as dg
import pandas as pd

from ft_assets.automation import ACTIVE, train_and_release
from ft_assets.data.sources import read_sources
from ft_assets.following import Follower, Line
from ft_assets.monitoring.assets import read_drift
from ft_assets.platform import Outcome, Platform, outcome
from ft_assets.terminal import console, show_line
from ft_resources.errors import FtError, ServiceError
from ft_resources.serving import ServerProcess

TASK = "mail-triage"
WORKERS = 16
SAMPLE = 4
"""Of the later mails every fourth is asked, of both releases."""
LAST_REPLAYED_DAY = date(2002, 9, 30)


@dataclass(frozen=True)
class Step:
    """A finished step, for the table at the end."""

    name: str
    verdict: str
    seconds: float


STEPS: list[Step] = []


@contextmanager
def step(title: str) -> Iterator[list[str]]:
    """Announce a step, time it, and print the verdict that the body appends."""
    console.print(f"\n[bold]{len(STEPS) + 1}. {title}[/bold]")
    verdict: list[str] = []
    started = time.monotonic()
    yield verdict
    seconds = time.monotonic() - started
    STEPS.append(Step(title, "; ".join(verdict), seconds))
    console.print(f"   [bold green]ok[/bold green] in {seconds:.0f} s: {'; '.join(verdict)}")


def main() -> None:
    """Run the steps and print what each took."""
    platform = Platform.open()
    task = platform.tasks.get(TASK)
    if platform.ledger.route(TASK) is not None:
        console.print(f"{platform.environment.home} holds this demo already. Start over with: make clean demo")
        sys.exit(2)
    cut = task.spec.sources[0].until  # type: ignore[union-attr]

    with step("Read, clean, split, train, evaluate, register, build and release") as verdict:
        _require(platform.materialise(TASK, because="demo: first release", show=show_line))
        first = platform.live(TASK)
        assert first is not None
        report = platform.report(TASK)
        accuracy = {model: f"{metrics['accuracy'].value:.3f}" for model, metrics in report.models.items()}
        verdict.append(
            f"version {first['model_version']} is live, test accuracy {accuracy['candidate']} "
            f"(linear baseline {accuracy['linear']}, majority {accuracy['majority']})"
        )

    mails = _mails_after(platform, cut)
    with step("Serve it: a bentoml serve process, asked over HTTP") as verdict:
        server = platform.serve()
        for _, mail in mails.groupby("label").head(1).iterrows():
            answer = _ask(server, mail)
            console.print(
                f"   {mail['text'].splitlines()[0][:60]!r} -> {answer['results'][0]['label']} "
                f"({answer['results'][0]['confidence']:.2f}), truly {mail['label']}"
            )
        verdict.append(f"answers at {server.url}")

    try:
        with step(f"Replay the mail after {cut} as traffic; every other label comes back; measure drift") as verdict:
            alarm = _replay(platform, server, mails, cut)
            verdict.append(alarm)

        later = mails[mails["event_time"].dt.date > _last_day(platform)].iloc[::SAMPLE]
        with step("The daemon's sensor asks for retraining; the candidate passes its gates and is released") as verdict:
            with platform.daemon():
                _require(_wait_for_retraining(platform))
            second = platform.live(TASK)
            assert second is not None
            if second["adapter"] == first["adapter"]:
                raise SystemExit("the retrained adapter did not go live")
            verdict.append(f"version {second['model_version']} is live because: {second['because'][:160]}")

        with step("The same service, never restarted, answers with the new release: before and after") as verdict:
            _wait_for_release(server, mails.iloc[0], second["id"])
            before, after = (
                _accuracy(server, later, version) for version in (first["model_version"], second["model_version"])
            )
            verdict.append(
                f"on the same {len(later)} later mails: accuracy {before:.3f} before, {after:.3f} after retraining"
            )

        with step("Trace an answer back to its rows") as verdict:
            found = platform.trace(_ask(server, later.iloc[0])["results"][0]["prediction_id"])
            fed_back = int((found.rows["origin"] == "feedback").sum())
            verdict.append(
                f"answered by {found.release['id'] if found.release else '-'}, trained on {len(found.rows)} rows, "
                f"{fed_back} of them labelled traffic"
            )
    finally:
        server.stop()
    _closing(platform)


def _mails_after(platform: Platform, cut: date) -> pd.DataFrame:
    """The package's mail from `cut` on, oldest first, each text once."""
    task = platform.tasks.get(TASK)
    package = task.spec.sources[0].model_copy(update={"since": cut, "until": date(2003, 1, 1)})
    spec = task.spec.model_copy(update={"sources": [package]})
    rows = read_sources(spec, task.path.parent, platform.environment.packages, pd.DataFrame)
    usable = rows["text"].str.strip().ne("") & ~rows["text"].str.contains("\x00", regex=False)
    return rows[usable].drop_duplicates("row_id").sort_values(["event_time", "row_id"], ignore_index=True)


def _ask(server: ServerProcess, mail: Any, version: str | None = None) -> Any:
    body = {"task": TASK, "inputs": [mail["text"][:100_000]], "event_time": mail["event_time"].isoformat()}
    return server.ask("/predict", body | ({"model_version": version} if version else {}))


def _replay(platform: Platform, server: ServerProcess, mails: pd.DataFrame, cut: date) -> str:
    """Send the mail day by day until drift is confirmed and enough labels came back."""
    needed = platform.tasks.get(TASK).spec.monitoring.retrain.min_new_labels
    day, sent, labels = cut, 0, 0
    with ThreadPoolExecutor(WORKERS) as pool:
        while day <= LAST_REPLAYED_DAY:
            todays = [mail for _, mail in mails[mails["event_time"].dt.date == day].iterrows()]
            answers = list(pool.map(lambda mail: _ask(server, mail)["results"][0], todays))
            sent += len(answers)
            for mail, answer in zip(todays, answers, strict=True):
                if int(mail["row_id"], 16) % 2 == 0:
                    said = {"prediction_id": answer["prediction_id"], "label": mail["label"], "author": "replay"}
                    server.ask("/feedback", said)
                    labels += 1
            if todays:
                _require(platform.monitor(TASK, day.isoformat()))
                found = read_drift(platform.lake, TASK, day.isoformat())
                right = sum(answer["label"] == mail["label"] for mail, answer in zip(todays, answers, strict=True))
                console.print(
                    f"   {day}: {len(todays):3} mails, accuracy {right / len(todays):.3f}, {labels:4} labels back; "
                    + (
                        "[yellow]drift: " + ", ".join(found["drift"]["alarmed"]) + "[/yellow]"
                        if found["alarm"]
                        else found["drift"]["verdict"]
                    )
                )
                if found["alarm"] and labels >= needed:
                    return f"{sent} mails answered, {labels} labels back, drift confirmed on {day}"
            day += timedelta(days=1)
    raise SystemExit("no drift was found in the replayed mail")


def _last_day(platform: Platform) -> date:
    return date.fromisoformat(platform.lake.heads(TASK, "drift_report")[-1])


def _wait_for_retraining(platform: Platform) -> Outcome:
    """Follow the run that the sensor asks for, to its end."""
    wanted = dg.RunsFilter(job_name=train_and_release.name, tags={"ft/trigger": "drift"})
    deadline = time.monotonic() + 600
    follower, lines = None, list[Line]()
    while time.monotonic() < deadline:
        runs = platform.instance.get_runs(wanted, limit=1)
        if runs:
            if follower is None:
                console.print(f"   the sensor asked: {runs[0].tags['ft/because'][:200]}")
                follower = Follower(platform.instance, runs[0].run_id)
            for line in follower.lines():
                lines.append(line)
                show_line(line)
            if runs[0].status not in ACTIVE:
                return outcome(runs[0].run_id, runs[0].status == dg.DagsterRunStatus.SUCCESS, lines)
        time.sleep(0.5)
    raise SystemExit(f"the sensor asked for no run; see {platform.environment.home / 'daemon.log'}")


def _wait_for_release(server: ServerProcess, mail: Any, release: str) -> None:
    deadline = time.monotonic() + 10
    while _ask(server, mail)["release"] != release:
        if time.monotonic() > deadline:
            raise ServiceError(f"the service did not take over {release}", where=server.url, mend=f"See {server.log}.")
        time.sleep(0.1)


def _accuracy(server: ServerProcess, mails: pd.DataFrame, version: str) -> float:
    def right(mail: Any) -> bool:
        return bool(_ask(server, mail, version)["results"][0]["label"] == mail["label"])

    with ThreadPoolExecutor(WORKERS) as pool:
        answers = list(pool.map(right, [mail for _, mail in mails.iterrows()]))
    return sum(answers) / len(answers)


def _require(result: Outcome) -> None:
    if not result.succeeded:
        raise SystemExit("stopped: " + "; ".join([*result.refusals, result.failure]))


def _closing(platform: Platform) -> None:
    console.print("\n[bold]What took how long[/bold]")
    for number, one in enumerate(STEPS, start=1):
        console.print(f"   {number}. {one.seconds:5.0f} s  {one.name}")
        console.print(f"            [dim]{one.verdict}[/dim]")
    console.print(f"   [bold]{sum(one.seconds for one in STEPS):8.0f} s  in all[/bold]")
    console.print(
        f"\nReport         {platform.report_page(TASK)}"
        "\nDagster UI     make dev     then http://127.0.0.1:3001 (the same state: assets, checks, plots)"
        "\nMLflow         .venv/bin/ft mlflow"
        "\nServe          make serve   then http://127.0.0.1:3000/docs"
        "\nHistory        .venv/bin/ft release history mail-triage"
        "\nYour own data  .venv/bin/ft task add my-task.yaml && .venv/bin/ft run my-task   (see README)"
    )


if __name__ == "__main__":
    try:
        main()
    except FtError as error:
        console.print(f"[bold red]{type(error).__name__}[/bold red] {error}", markup=True)
        sys.exit(1)
