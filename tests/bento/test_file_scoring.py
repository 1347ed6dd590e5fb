"""Answering a file: over a real engine, lake and ledger; every format, bad rows, interruption."""

import csv
import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from bento.adapters import AdapterStore, BasePool, LakeAdapters
from bento.content_filter import load_filter
from bento.route_watcher import Routes
from bento.scorer import Scorer
from ft_assets import file_scoring
from ft_assets.cli import app
from ft_assets.file_scoring import ANSWER, _appending, _known, score_file
from ft_assets.platform import Platform
from ft_resources.errors import RequestError, SourceError, SpecError
from tests.bento.conftest import Workshop, World
from tests.bento.writers import write_adapter, write_base

TEXTS = ["Please pay the invoice.", "WIN a FREE cruise", 'naïve – café, "quoted"', "The meeting moves"]


@pytest.fixture
def scorer(world: World, workshop: Workshop) -> Iterator[Scorer]:
    world.release("t1", world.first, "1")
    bases = BasePool([workshop.base], precision="fp32", device="cpu")
    store = AdapterStore(LakeAdapters(world.lake), bases)
    yield Scorer(Routes(world.ledger, store), store, bases, world.ledger)
    bases.close()


def write(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    if file.suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8") as sink:
            writer = csv.DictWriter(sink, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return file


def read(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".csv":
        with file.open(newline="", encoding="utf-8") as source:
            return [{name: value or None for name, value in row.items()} for row in csv.DictReader(source)]
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text().splitlines()]
    rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    return rows


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_rows_come_out_with_their_answers(scorer: Scorer, world: World, tmp_path: Path, ending: str) -> None:
    rows = [{"id": str(number), "body": text} for number, text in enumerate([*TEXTS, " "])]
    file = write(tmp_path / f"mails.{ending}", rows)
    scored = score_file(scorer, "t1", file, column="body")
    assert (scored.out, scored.rows, scored.failed) == (tmp_path / f"mails.answers.{ending}", 5, 1)
    found = read(scored.out)
    assert [row["id"] for row in found] == ["0", "1", "2", "3", "4"]
    assert list(found[0]) == ["id", "body", *ANSWER]
    stored = world.stored()
    for row, text in zip(found, TEXTS, strict=False):
        known = stored[row["prediction_id"]]
        assert (
            (known["input"], known["label"]) == (text, row["predicted_label"]) == (row["body"], row["predicted_label"])
        )
        assert float(row["confidence"]) == pytest.approx(known["confidence"])
        assert row["error"] is None
    assert (found[4]["error_code"], found[4]["prediction_id"]) == ("invalid_request", None)
    assert not list(tmp_path.glob("*.journal"))


def test_bad_rows_stop_nothing_and_another_format_comes_out(scorer: Scorer, tmp_path: Path) -> None:
    file = tmp_path / "mails.jsonl"
    lines = [
        '{"text": "good one"}',
        "no json",
        '{"text": null}',
        '{"text": 7}',
        "[1]",
        '{"text": "a\\u0000b"}',
        '{"other": 1}',
    ]
    file.write_text("\n".join([*lines, '{"text": "good two"}']) + "\n")
    out = tmp_path / "answers.parquet"
    scored = score_file(scorer, "t1", file, out)
    assert (scored.rows, scored.failed) == (8, 6)
    found = read(out)
    assert [row["predicted_label"] is not None for row in found] == [True, *[False] * 6, True]
    assert "line 2" in found[1]["error"]


def test_what_spoils_a_request_is_told_beside_its_row(
    scorer: Scorer, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "words.txt").write_text("forbidden\n")
    monkeypatch.setenv("FT_CONTENT_WORDS", str(tmp_path / "words.txt"))
    scorer.content_filter = load_filter("bento.content_filter:word_list")
    conversation = [{"role": "user", "content": "hello"}]
    texts = ["one", conversation, "two", "a forbidden word", json.dumps(conversation), "x" * 200_000, "three"]
    file = write(tmp_path / "mails.jsonl", [{"text": text} for text in texts])
    found = read(score_file(scorer, "t1", file).out)
    assert [row["error_code"] for row in found] == [
        None,
        "invalid_input",
        None,
        "content_filtered",
        None,
        "input_too_large",
        None,
    ]
    cells = write(tmp_path / "mails.csv", [{"text": text} for text in texts[4:]])
    found = read(score_file(scorer, "t1", cells).out)
    assert [row["error_code"] for row in found] == [None, "input_too_large", None]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_any_character_comes_through_also_when_it_goes_on(
    scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(file_scoring, "AT_ONCE", 1)
    file = tmp_path / "mails.jsonl"
    texts = ["line\u2028separated\u0085text", "half \ud83d a pair", "a \udce4 byte", "plain"]
    file.write_text("".join(json.dumps({"text": text, "kept": text}) + "\n" for text in texts))
    out = tmp_path / f"answers.{ending}"

    class Answered(Exception):
        pass

    def stop(done: int, failed: int) -> None:
        raise Answered

    for _ in texts:
        with pytest.raises(Answered):
            score_file(scorer, "t1", file, out, show=stop)
    scored = score_file(scorer, "t1", file, out)
    assert (scored.rows, scored.resumed) == (4, 4)
    if ending == "csv":
        kept = [row["kept"].encode("utf-8") for row in csv.DictReader(out.open(encoding="latin-1", newline=""))]
        assert len(kept) == 4
        assert b"\xe4" in out.read_bytes()
    else:
        lines = out.read_bytes().decode("utf-8", "surrogateescape").split("\n") if ending == "jsonl" else []
        kept = [json.loads(line)["kept"] for line in lines if line] or [row["kept"] for row in read(out)]
        assert kept[0] == texts[0]
        assert kept[1] == (texts[1] if ending == "jsonl" else "half \ufffd a pair")


def test_an_answer_with_a_line_separator_is_one_line_of_the_journal(tmp_path: Path) -> None:
    journal, about = tmp_path / "journal", {"file": "x"}
    rows = [{"predicted_text": "one\u2028two"}, {"predicted_text": "\ud83d"}]
    with _appending(journal, about) as keep:
        keep(rows)
    journal.write_bytes(journal.read_bytes() + b'{"cut')
    before = journal.stat().st_ino
    assert _known(journal, about) == rows
    with _appending(journal, about) as keep:
        keep(rows[:1])
    assert _known(journal, about) == [*rows, rows[0]]
    assert journal.stat().st_ino == before


def test_an_interrupted_run_goes_on(
    scorer: Scorer,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(file_scoring, "AT_ONCE", 2)
    file = write(tmp_path / "mails.csv", [{"text": f"mail number {number}"} for number in range(7)])
    seen = []

    def stop(done: int, failed: int) -> None:
        seen.append(done)
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_file(scorer, "t1", file, show=stop)
    journal = tmp_path / "mails.answers.csv.journal"
    with journal.open("a") as sink:
        sink.write('{"half a li')
    assert len(world.stored()) == 4
    with pytest.raises(SourceError, match="model_version differs"):
        score_file(scorer, "t1", file, model_version="1")
    scored = score_file(scorer, "t1", file)
    assert (scored.rows, scored.failed, scored.resumed) == (7, 0, 4)
    assert len(world.stored()) == 7
    names = [row["prediction_id"] for row in read(scored.out)]
    assert set(names) == set(world.stored())
    assert len(set(names)) == 7


def test_what_was_answered_is_kept_when_the_log_fails(
    scorer: Scorer,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(file_scoring, "AT_ONCE", 2)
    file = write(tmp_path / "mails.csv", [{"text": f"mail number {number}"} for number in range(5)])

    def hide(done: int, failed: int) -> None:
        with sqlite3.connect(world.home / "ledger.db") as connection:
            connection.execute("ALTER TABLE predictions RENAME TO elsewhere")

    with pytest.raises(RequestError) as caught:
        score_file(scorer, "t1", file, show=hide)
    assert caught.value.error_code == "log_unavailable"
    with sqlite3.connect(world.home / "ledger.db") as connection:
        connection.execute("ALTER TABLE elsewhere RENAME TO predictions")
    assert score_file(scorer, "t1", file).resumed == 2


def test_texts_and_fields_are_written_too(scorer: Scorer, world: World, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    for task, extraction in (("chat", False), ("read", True)):
        folder = write_adapter(tmp_path / task, base, task=task, seed=1, extraction=extraction)
        world.release(task, world.lake.publish("adapter", folder, {"name": task}).digest, "1")
    conversation = json.dumps([{"role": "user", "content": "What is for sale?"}])
    file = write(tmp_path / "asked.csv", [{"text": "A house."}, {"text": conversation}])
    chats = read(score_file(scorer, "chat", file).out)
    assert {row["finish_reason"] for row in chats} <= {"stop", "length"}
    assert all(row["error"] is None and row["predicted_label"] is None for row in chats)
    file = write(tmp_path / "documents.csv", [{"text": "A house."}, {"text": '[{"a": 1}]'}])
    fields = read(score_file(scorer, "read", file, tmp_path / "fields.jsonl").out)
    assert set(json.loads(fields[0]["extracted"])) == {"kind", "furnished", "rooms"}
    assert fields[1]["error"] is None  # a document is a document, whatever it looks like


@pytest.mark.parametrize(
    ("name", "content", "column", "said"),
    [
        ("gone.csv", None, "text", "no such file"),
        ("rows.txt", "text\nx\n", "text", "no ending"),
        ("rows.csv", "txet\nx\n", "text", "Did you mean 'txet'"),
        ("rows.csv", "text,confidence\nx,1\n", "text", "'confidence' already"),
        ("rows.parquet", "no parquet", "text", "no Parquet"),
    ],
)
def test_a_file_that_cannot_be_answered(
    scorer: Scorer, tmp_path: Path, name: str, content: str | None, column: str, said: str
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    with pytest.raises(SourceError, match=said):
        score_file(scorer, "t1", file, column=column)


def test_an_unknown_version_stops_it(scorer: Scorer, tmp_path: Path) -> None:
    file = write(tmp_path / "mails.csv", [{"text": "x"}])
    with pytest.raises(RequestError) as caught:
        score_file(scorer, "t1", file, model_version="99")
    assert caught.value.error_code == "unknown_version"


def test_the_command_answers_files_and_texts(scorer: Scorer, world: World, tmp_path: Path) -> None:
    file = write(tmp_path / "mails.csv", [{"body": text} for text in TEXTS])
    home = ["--home", str(world.home)]
    result = CliRunner().invoke(app, ["predict", "t1", str(file), "--column", "body", "--model-version", "1", *home])
    assert result.exit_code == 0, result.output
    assert len(read(tmp_path / "mails.answers.csv")) == 4
    result = CliRunner().invoke(app, ["predict", "t1", "Please pay", *home])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].split()[0] in ("ham", "spam")
    assert CliRunner().invoke(app, ["predict", "t1", "nowhere.csv", *home]).exit_code == 2


def test_the_platform_answers_as_the_environment_asks(
    scorer: Scorer, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "words.txt").write_text("forbidden\n")
    monkeypatch.setenv("FT_CONTENT_WORDS", str(tmp_path / "words.txt"))
    monkeypatch.setenv("FT_CONTENT_FILTER", "bento.content_filter:word_list")
    platform = Platform.open(world.home)
    assert platform.predict("t1", ["allowed"])[0].label in ("ham", "spam")
    with pytest.raises(RequestError) as caught:
        platform.predict("t1", ["a forbidden word"])
    assert caught.value.error_code == "content_filtered"
    monkeypatch.setenv("FT_GENERATION_ENGINE", "pen")
    with pytest.raises(SpecError, match="FT_GENERATION_ENGINE"):
        Platform.open(world.home)
