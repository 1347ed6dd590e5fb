"""The command line, run as a person runs it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.graph.small_task import TASK_FILE

FT = str(Path(sys.executable).with_name("ft"))


def ft(*words: str, home: Path) -> "subprocess.CompletedProcess[str]":
    variables = {**os.environ, "FT_HOME": str(home), "FT_TASKS": str(home / "tasks"), "COLUMNS": "200"}
    return subprocess.run([FT, *words], capture_output=True, text=True, check=False, env=variables)


@pytest.mark.parametrize("command", [(), ("task",), ("release",), ("run",), ("trace",), ("serve",), ("api",)])
def test_help_explains_each_command(command: tuple[str, ...], tmp_path: Path) -> None:
    done = ft(*command, "--help", home=tmp_path)
    assert done.returncode == 0
    assert len(done.stdout) > 200
    assert "Traceback" not in done.stdout


def test_check_and_add_a_task(tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    file.write_text(TASK_FILE)
    checked = ft("task", "check", str(file), home=tmp_path / "home")
    assert checked.returncode == 0
    assert "task.yaml:8" in checked.stdout  # the override's line
    assert "recipe encoder-lora@1" in checked.stdout
    assert ft("task", "add", str(file), home=tmp_path / "home").returncode == 0
    listed = ft("task", "list", home=tmp_path / "home")
    assert "small-mail" in listed.stdout


def test_a_wrong_key_is_named_with_file_line_and_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    file.write_text(TASK_FILE.replace("window_days", "windw_days"))
    done = ft("task", "check", str(file), home=tmp_path / "home")
    assert done.returncode == 2
    line = TASK_FILE.splitlines().index("  window_days: 3") + 1
    assert f"task.yaml:{line}" in done.stderr
    assert "Did you mean 'window_days'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_task_is_an_error_without_a_stack_trace(tmp_path: Path) -> None:
    for words in (("run", "nothing"), ("report", "nothing"), ("release", "history", "nothing")):
        done = ft(*words, home=tmp_path)
        assert done.returncode == 2, words
        assert "Traceback" not in done.stderr
        assert "nothing" in done.stderr


def test_an_unknown_prediction_is_an_error(tmp_path: Path) -> None:
    done = ft("trace", "0" * 32, home=tmp_path)
    assert done.returncode == 2
    assert "there is no prediction" in done.stderr


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = ft("serve", "--port", port, home=tmp_path)
    assert done.returncode == 2
    assert f"port {port} cannot be used" in done.stderr
    assert "Traceback" not in done.stderr
