"""A built Bento as the context of an image: whole, pinned, and serving where nothing else is."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ft_resources import images
from ft_resources.environments import Environment
from ft_resources.errors import ServiceError
from ft_resources.serving import REQUIREMENTS, BentoStore, free_port
from tests import isolation

NOBODY = 65534
SHARED = all(folder.stat().st_mode & 0o005 == 0o005 for folder in Path(sys.executable).resolve().parents)
"""Whether another user may run this Python."""
DIGEST = "ab" * 32
CLIENT = """
import json, socket, sys, time, urllib.error, urllib.request
url, body, key = sys.argv[1:]
for _ in range(400):
    try:
        urllib.request.urlopen(url + "/readyz", timeout=5)
        break
    except OSError:
        time.sleep(0.1)
request = urllib.request.Request(url + "/predict", body.encode(), {"content-type": "application/json"})
try:
    urllib.request.urlopen(request, timeout=60)
    without_key = 200
except urllib.error.HTTPError as error:
    without_key = error.code
request.add_header("authorization", "Bearer " + key)
answer = json.loads(urllib.request.urlopen(request, timeout=60).read())
answer["without_key"] = without_key
try:
    socket.create_connection(("192.0.2.1", 80), 0.2).close()
    answer["network"] = True
except TimeoutError:
    answer["network"] = True
except OSError:
    answer["network"] = False
print(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder that other users may enter, which those of pytest are not."""
    folder = Path(tempfile.mkdtemp(prefix="ft-image-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def built(workshop: Any, place: Path) -> tuple[BentoStore, str]:
    """A Bento of a small adapter, and the store it is in."""
    store = BentoStore(Environment.read({}, home=place / "home"))
    folder = workshop.write(place / "adapter", task="t1", seed=5)
    release = {"task": "t1", "release_id": "bento-test", "model_version": "7", "adapter": DIGEST, "base": "minilm"}
    return store, store.build("t1", folder, workshop.base, release)


def test_everything_an_image_needs_is_in_the_context(built: tuple[BentoStore, str]) -> None:
    store, tag = built
    folder = store.folder(tag)
    for path in ("src/release.json", "src/models/adapter/head.safetensors", "src/models/base/tokenizer.json"):
        assert (folder / path).is_file(), path
    dockerfile = (folder / "env" / "docker" / "Dockerfile").read_text()
    assert dockerfile.startswith("\n#") or dockerfile.startswith("#")
    assert f"FROM python:{sys.version_info.major}.{sys.version_info.minor}-" in dockerfile
    users = re.findall(r"^USER (\S+)$", dockerfile, re.M)
    assert users, "it would run as root"
    assert users[-1] not in ("root", "0")
    assert dockerfile.index("ARG UV_INDEX_STRATEGY") < dockerfile.index("pip install -r"), "set before it is needed"
    assert "ARG HF_HUB_OFFLINE=1" in dockerfile
    lines = (folder / "env" / "python" / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("--")]
    assert {"torch", "starlette", "uvicorn", "pydantic-core"} <= {re.split("==", line)[0].lower() for line in pins}
    assert all(re.fullmatch(r"[\w.-]+==\S+", line) for line in pins), pins
    size = store.image_bytes(tag)
    assert size["bento"] > 80e6, "the base model is in it"
    assert size["packages"] > 200e6, "torch is in it"


def test_a_package_that_is_not_here_cannot_be_pinned(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("numpy==1.0  # whatever is installed counts\nno-such-package==1\n")
    with pytest.raises(ServiceError, match="no-such-package"):
        images.packages(tmp_path / "requirements.txt")


def test_pins_are_the_installed_versions_of_the_whole_tree() -> None:
    found = images.packages(REQUIREMENTS)
    listed = {line.partition("==")[0].lower() for line in images.pinned(found).splitlines()}
    assert {"anyio", "click", "numpy"} <= listed, "dependencies of dependencies too"
    assert "pytest" not in listed
    assert "dagster" not in listed


@pytest.mark.slow
def test_the_context_serves_alone(built: tuple[BentoStore, str], place: Path) -> None:
    """Copied elsewhere, in an empty home, without a network and as nobody where that can be arranged."""
    store, tag = built
    context, home = place / "copy", place / "empty"
    shutil.copytree(store.folder(tag), context)
    subprocess.run(["chmod", "-R", "a+rX", str(context)], check=True)  # the Dockerfile gives it to its own user
    home.mkdir(mode=0o777)
    home.chmod(0o777)
    port = free_port()
    cut = list(isolation.CUT_OFF)
    if SHARED:
        cut += ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    serve = [str(Path(sys.executable).with_name("bentoml")), "serve", str(context)]
    variables = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "BENTOML_HOME": str(home / "bentoml"),
        **{name: value for name, value in images.VARIABLES.items() if name != "FT_HOME"},
        "FT_HOME": str(home / "ft"),
        "FT_API_KEYS": "key-of-the-test",
    }
    log = place / "serve.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*(cut if isolation.POSSIBLE else []), *serve, "--host", "127.0.0.1", "--port", str(port)],
            cwd=home,
            env=variables,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        inside = ["nsenter", f"--net=/proc/{process.pid}/ns/net"] if isolation.POSSIBLE else []
        body = json.dumps({"task": "t1", "inputs": ["Your invoice is attached."]})
        said = subprocess.run(
            [*inside, sys.executable, "-c", CLIENT, f"http://127.0.0.1:{port}", body, "key-of-the-test"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert said.returncode == 0, said.stderr + log.read_text(errors="replace")[-3000:]
        answer = json.loads(said.stdout)
        assert (answer["status"], answer["model"], answer["adapter"]) == ("ok", "t1@7", DIGEST)
        assert answer["results"][0]["label"] in ("ham", "spam")
        assert answer["without_key"] == 401, "in an image nobody is trusted for where they stand"
        assert (home / "ft" / "ledger.db").is_file(), "answers are recorded in the home"
        if isolation.POSSIBLE:
            assert answer["network"] is False
            users = {one.uids().real for one in psutil.Process(process.pid).children(recursive=True)}
            assert users == {NOBODY if SHARED else 0}
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
        for one in family:
            if one.is_running():
                one.kill()
