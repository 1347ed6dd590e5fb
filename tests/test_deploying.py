"""One call to an address that answers, through real processes: started once, found again, refused, ended."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from typer.testing import CliRunner

from ft_assets.cli import app
from ft_assets.deploying import STATE, CannotStop, LocalService, NothingLive, address, page_of
from ft_assets.platform import Platform
from ft_resources.errors import ServiceError, SpecError
from ft_resources.lake import Lake
from ft_resources.serving import free_port
from tests.api.conftest import OUTSIDE, Api, end, start
from tests.bento.conftest import World, adapter_folders, damage, make_world, workshop  # noqa: F401

pytestmark = pytest.mark.timeout(300)
TASK = {"task": "t1"}


@pytest.fixture(scope="module")
def world(make_world: Callable[[Path], World], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:  # noqa: F811
    world = make_world(tmp_path_factory.mktemp("deploying"))
    world.release("t1", world.first, "1")
    yield world
    world.ledger.close()


@pytest.fixture(scope="module")
def platform(world: World) -> Iterator[Platform]:
    platform = Platform.open(world.home)
    yield platform
    platform.undeploy()
    platform.ledger.close()


@pytest.fixture(scope="module")
def api(world: World, platform: Platform) -> Iterator[Api]:
    api = start(world.home, FT_API_KEYS="key-of-the-test")
    yield api
    if api.process.poll() is None:
        end(api)


def noted(world: World) -> LocalService:
    return LocalService(**json.loads((world.home / STATE).read_text()))


def servers(world: World) -> set[int]:
    """Every process that serves this home, BentoML's supervisors and workers alike."""
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or ())
        if "bento.service" in words or "bentoml" in words:
            try:
                mine = process.environ().get("FT_HOME") == str(world.home)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
    return found


def listens(url: str) -> bool:
    parts = urlsplit(url)
    with socket.socket() as probe:
        return probe.connect_ex((parts.hostname, parts.port)) == 0


def test_one_call_gives_an_address_that_answers_and_two_at_once_start_one_service(world: World, api: Api) -> None:
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(api.client.post, "/deployments", json=TASK, timeout=200) for _ in range(2)]
    first, second = (call.result() for call in calls)
    assert first.status_code == second.status_code == 200, first.text
    assert first.json() == second.json()
    told = first.json()
    live = world.ledger.live_release("t1")
    assert live is not None
    url = told["url"]
    assert told == {
        "url": url,
        "page": f"{url}/?task=t1",
        "task": "t1",
        "model_version": "1",
        "release": live["id"],
        "ready": True,
    }
    assert httpx.get(told["page"]).text.startswith("<!doctype html>")
    answer = httpx.post(f"{url}/predict", json=TASK | {"inputs": ["where is my parcel?"]})
    assert (answer.status_code, answer.json()["release"]) == (200, live["id"])
    assert httpx.get(f"{url}/v1/models", headers=OUTSIDE).status_code == 401
    assert httpx.get(f"{url}/v1/models", headers=OUTSIDE | {"authorization": "Bearer key-of-the-test"}).is_success
    supervisor = psutil.Process(noted(world).pid)
    assert servers(world) <= {supervisor.pid, *(one.pid for one in supervisor.children(recursive=True))}


def test_the_service_outlives_the_api_and_follows_releases(world: World, platform: Platform, api: Api) -> None:
    before = noted(world)
    end(api)
    release = world.release("t1", world.second, "2")
    found = platform.deploy("t1")
    assert (found.url, found.model_version, found.release) == (before.url, "2", release)
    answer = httpx.post(f"{found.url}/predict", json=TASK | {"inputs": ["x"]}).json()
    assert (answer["release"], answer["adapter"]) == (release, world.second)
    shown = CliRunner().invoke(app, ["deploy", "t1", "--home", str(world.home)])
    assert shown.exit_code == 0, shown.output
    assert found.url in shown.stdout and found.page in shown.stdout
    command = shown.stdout.splitlines()[-1]
    said = subprocess.run(["bash", "-c", f"{command} --noproxy '*'"], capture_output=True, check=True)
    assert json.loads(said.stdout)["release"] == release
    assert noted(world) == before


def test_what_cannot_be_answered_is_said(
    world: World,
    platform: Platform,
    damage: Callable[[Lake, str], None],  # noqa: F811
) -> None:
    with pytest.raises(NothingLive, match="ft run t2"):
        platform.deploy("t2")
    refused = CliRunner().invoke(app, ["deploy", "t2", "--home", str(world.home)])
    assert refused.exit_code == 2
    damage(world.lake, world.other)
    world.release("t2", world.other, "1")
    with pytest.raises(ServiceError, match="cannot load the live release of task 't2'"):
        platform.deploy("t2")
    assert platform.deploy("t1").ready


def test_a_service_elsewhere_is_named_and_never_ended(
    world: World, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = platform.deploy("t1").url
    monkeypatch.setenv("FT_SERVICE_URL", f"{url}/")
    elsewhere = Platform.open(world.home)
    assert elsewhere.deploy("t1") == platform.deploy("t1")
    with pytest.raises(CannotStop):
        elsewhere.undeploy()
    monkeypatch.setenv("FT_SERVICE_URL", f"http://127.0.0.1:{free_port()}")
    away = Platform.open(world.home)
    assert away.deploy("t1").ready is False
    for one in (elsewhere, away):
        one.ledger.close()
    monkeypatch.setenv("FT_SERVICE_URL", "models.example")
    with pytest.raises(SpecError, match="FT_SERVICE_URL"):
        Platform.open(world.home)


def test_the_service_ends_when_told_and_leaves_no_process(world: World, platform: Platform) -> None:
    service = noted(world)
    process = service.process()
    assert process is not None
    family = [process, *process.children(recursive=True)]
    assert listens(service.url)
    assert platform.undeploy() is True
    assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family)
    assert servers(world) == set()
    assert not listens(service.url)
    assert platform.undeploy() is False
    assert "no service" in CliRunner().invoke(app, ["undeploy", "--home", str(world.home)]).stdout


def test_a_service_that_does_not_come_up_says_why(
    world: World, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform.undeploy()
    monkeypatch.setenv("FT_WORKERS", "none")
    with pytest.raises(ServiceError, match="FT_WORKERS is 'none'") as refused:
        platform.deploy("t1")
    assert refused.value.where == noted(world).log
    assert servers(world) == set()


@pytest.mark.slow
def test_a_service_that_a_person_started_is_found_and_left_to_them(world: World, platform: Platform) -> None:
    port, log = free_port(), world.home / "by-hand.log"
    with log.open("wb") as sink:
        words = [str(Path(sys.executable).with_name("ft")), "serve", "--port", str(port), "--home", str(world.home)]
        by_hand = subprocess.Popen(words, stdout=sink, stderr=sink)
    try:
        deadline = time.monotonic() + 60
        while noted(world).pid != by_hand.pid:
            assert by_hand.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        assert platform.deploy("t1").url == address("0.0.0.0", port) == f"http://127.0.0.1:{port}"
        assert f"http://127.0.0.1:{port}/" in log.read_text()
        with pytest.raises(CannotStop, match="ft serve"):
            platform.undeploy()
    finally:
        by_hand.terminate()
        by_hand.wait(timeout=30)
    assert platform.undeploy() is False


def test_addresses_are_written_as_a_browser_reads_them() -> None:
    assert address("::", 3000) == "http://[::1]:3000"
    assert page_of("https://models.example", "a b&c") == "https://models.example/?task=a%20b%26c"
