"""What a user gets wrong: each stops with a sentence that says how to mend it, and nothing is released or damaged."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from ft_assets.platform import Outcome, Platform
from ft_resources.errors import SpecError
from tests.graph.small_task import TASK, TASK_FILE, open_home, write_task


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Outcome]:
    """Runs the whole graph of a task whose rows are `content` in the file `name`."""

    def start(content: bytes | str | None = None, name: str = "rows.jsonl", task: str = TASK_FILE) -> Outcome:
        platform = open_home(tmp_path / "home")
        path = write_task(tmp_path / "mine", task.replace("rows.jsonl", name))
        if content is not None:
            (tmp_path / "mine" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        platform.add_task(path)
        outcome = platform.materialise(TASK)
        assert platform.live(TASK) is None
        return outcome

    return start


def lines(rows: list[tuple[str, str]]) -> str:
    frame = pd.DataFrame(rows, columns=["text", "label"]).assign(at="2002-07-01T00:00:00+00:00")
    return frame.to_json(orient="records", lines=True)


def texts(count: int, label: str) -> list[tuple[str, str]]:
    words = [(n * 7919 % 1000, n * 104729 % 997) for n in range(count)]
    return [(f"{label} message number {n} about subject {a} and {b}", label) for n, (a, b) in enumerate(words)]


def test_no_file(run: Callable[..., Outcome]) -> None:
    assert "no such file" in run().failure or "no file matches" in run().failure


def test_an_empty_file(run: Callable[..., Outcome]) -> None:
    assert "the file is empty" in run("").failure


def test_a_missing_column_names_the_nearest(run: Callable[..., Outcome]) -> None:
    outcome = run("message,label,at\nhello there,ham,2002-07-01\n", name="rows.csv")
    assert "rows.csv" in outcome.failure
    assert "there is no column" in outcome.failure


def test_another_encoding_is_named_with_its_line(run: Callable[..., Outcome]) -> None:
    outcome = run("text,label,at\nplain,ham,2002-07-01\ncaf\xe9,ham,2002-07-01\n".encode("cp1252"), name="rows.csv")
    assert "rows.csv:3" in outcome.failure
    assert "encoding" in outcome.failure


def test_an_unknown_label_names_rows_and_the_nearest(run: Callable[..., Outcome]) -> None:
    outcome = run(lines([*texts(40, "ham"), *texts(40, "spam"), ("a spelling mistake in the label", "spamm")]))
    (refusal,) = outcome.refusals
    assert refusal.startswith("raw_dataset.labels_known")
    assert "'spamm' at" in refusal
    assert "#81" in refusal


def test_one_label_only(run: Callable[..., Outcome]) -> None:
    outcome = run(lines(texts(80, "ham")))
    assert any("every_class_present" in reason and "spam" in reason for reason in outcome.refusals)


def test_two_rows(run: Callable[..., Outcome]) -> None:
    outcome = run(lines([*texts(1, "ham"), *texts(1, "spam")]))
    assert any("enough_rows" in reason and "at least 50" in reason for reason in outcome.refusals)


def test_nul_bytes_and_a_ten_megabyte_line_are_rejected_rows(run: Callable[..., Outcome], tmp_path: Path) -> None:
    odd = [("bad \x00 bytes in the middle", "ham"), ("x" * 10_000_000, "spam")]
    task = TASK_FILE.replace("accuracy: 0.7", "accuracy: 1.0").replace("cleaning: {", "cleaning: {min_rows: 2000, ")
    outcome = run(lines([*texts(60, "ham"), *texts(60, "spam"), *odd]), task=task)
    assert any("enough_rows" in reason for reason in outcome.refusals)  # stops there: only the data stage is wanted
    platform = open_home(tmp_path / "home")
    assert platform.materialise(TASK, only=["clean_dataset"]).succeeded
    rejected = platform.lake.require(TASK, "clean_dataset").parquet("rejected.parquet")
    assert {"bad_encoding", "too_long_bytes"} <= set(rejected["reason"])


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "UPPER", "a b", "", "-x", "a" * 64])
def test_a_name_that_is_no_name(tmp_path: Path, name: str) -> None:
    platform = open_home(tmp_path / "home")
    with pytest.raises(SpecError, match=r"small-mail\.yaml:2: field 'name'"):
        platform.add_task(write_task(tmp_path / "mine", TASK_FILE.replace("name: small-mail", f"name: '{name}'")))
    assert not (tmp_path / "home" / "tasks").exists()


def test_an_unknown_task_names_the_nearest(tmp_path: Path) -> None:
    platform = open_home(tmp_path / "home")
    platform.add_task(write_task(tmp_path / "mine"))
    with pytest.raises(SpecError, match="Did you mean 'small-mail'"):
        platform.materialise("smal-mail")


def test_an_unknown_asset_names_the_nearest(tmp_path: Path) -> None:
    platform = open_home(tmp_path / "home")
    platform.add_task(write_task(tmp_path / "mine"))
    with pytest.raises(SpecError, match="Did you mean 'adapter'"):
        platform.materialise(TASK, only=["adaptor"])


def test_a_corrupted_adapter_answers_nobody(copied: Callable[[], Platform]) -> None:
    from ft_resources.errors import FtError

    platform = copied()
    weights = platform.lake.require(TASK, "adapter").path("adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(FtError):
        platform.predict(TASK, ["hello"])
    assert platform.ledger.traffic_days(TASK) == {}


def test_a_full_disk_while_publishing_leaves_the_earlier_state(copied: Callable[[], Platform]) -> None:
    """A file size limit in a child process stands for the full disk: both fail the write half-way."""
    import subprocess
    import sys

    platform = copied()
    before = platform.lake.require(TASK, "clean_dataset").digest
    code = f"""
import resource, signal
from pathlib import Path
from tests.graph.small_task import open_home
from ft_resources.errors import ArtefactError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
platform = open_home(Path({str(platform.environment.home)!r}))
raw = platform.lake.require({TASK!r}, "raw_dataset")
folder = Path({str(platform.environment.home)!r}) / "new"
folder.mkdir()
(folder / "big.bin").write_bytes(bytes(4_000_000))
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
try:
    platform.lake.publish("clean_dataset", folder, {{"from": "a full disk"}})
except ArtefactError as error:
    print("typed:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "typed:" in done.stdout
    assert "nothing was damaged" in done.stdout
    assert platform.lake.require(TASK, "clean_dataset").digest == before
    assert platform.lake.find("clean_dataset", {"from": "a full disk"}) is None
    assert not list((platform.environment.home / "lake" / "incoming").glob("*"))
