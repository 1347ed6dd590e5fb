import json
from typing import Any

import pandas as pd
import pytest

from bento.conversation import Field, dump, load
from bento.preparation import find
from ft_assets.data.cleaning import Cleaned, clean
from ft_assets.data.forms import Extraction, Generation, form_of
from ft_assets.data.rows import frame
from ft_assets.data.splits import SPLITS, assign
from ft_assets.data.verdicts import of_clean, of_raw, of_splits
from ft_assets.tasks import CleaningSpec, SplitSpec, TaskSpec

FIELDS = {
    "sender": Field(type="string"),
    "kind": Field(type="string", enum=["bill", "letter"]),
    "amount": Field(type="number", required=False),
}
EXTRACTION = Extraction(FIELDS)
SYSTEM = "You are a helpful assistant of a large company that answers every question politely and in full sentences."
WORDS = [f"{a}{b}" for a in ("alpha", "beta", "gamma", "delta") for b in ("one", "two", "three", "four", "five")]


def spec_of(kind: str, **more: Any) -> TaskSpec:
    fields = {"fields": {name: field.model_dump() for name, field in FIELDS.items()}} if kind == "extraction" else {}
    sources = [{"kind": "files", "url": "a.jsonl"}]
    return TaskSpec.model_validate(
        {"name": "t", "type": kind, "recipe": "r@1", "sources": sources, "cleaning": {"min_rows": 2}} | fields | more
    )


def raw(*rows: tuple[str, str | None]) -> pd.DataFrame:
    lines = [f"a.jsonl#{line}" for line in range(1, len(rows) + 1)]
    return frame([text for text, _ in rows], [answer for _, answer in rows], lines, [None] * len(rows), "files")


def asked(question: str, system: str = "") -> str:
    head = [{"role": "system", "content": system}] if system else []
    return dump([*head, {"role": "user", "content": question}])


def question(number: int) -> str:
    """Questions of which no two share a run of three words."""
    return " ".join(f"{WORDS[(number * 7 + at * 3) % 20]}{number}" for at in range(6))


def answer(sender: str = "Ada", kind: str = "letter", amount: float | None = None) -> str:
    return json.dumps({"sender": sender, "kind": kind, "amount": amount})


def reasons(cleaned: Cleaned) -> list[str]:
    return cleaned.rejected["reason"].tolist()


def dealt(rows: pd.DataFrame, task: TaskSpec) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """Clean rows and their splits, as the assets make them."""
    form = form_of(task)
    kept = clean(rows, task.cleaning, form).kept
    given = kept.assign(text=kept["text"].map(form.compared), label=form.strata(kept["label"].tolist()))
    assigned = assign(given, SplitSpec(), None)
    return kept, {split: assigned[assigned["split"] == split] for split in SPLITS}


def test_code_keeps_its_indentation_and_answers_lose_personal_data() -> None:
    code = "def f(x):\n    return  x"
    rows = raw(
        (asked(f"Explain\n{code}"), f"{code}\n\nAsk ada@example.org."), (asked("What is it?"), "call\t+14155552671")
    )
    kept = clean(rows, CleaningSpec(), Generation()).kept
    assert load(kept["text"][0])[-1]["content"] == f"Explain\n{code}"
    assert kept["label"].tolist() == [f"{code}\n\nAsk <EMAIL>.", "call\t<PHONE>"]
    assert [json.loads(masked) for masked in kept["masked"]] == [{"email": 1}, {"phone": 1}]
    assert kept["row_id"].tolist() == rows["row_id"].tolist()
    again = clean(kept, CleaningSpec(), Generation()).kept
    assert again[["text", "label"]].equals(kept[["text", "label"]])


@pytest.mark.parametrize(
    ("text", "said", "reason", "detail"),
    [
        (asked("hello there"), None, "no_answer", ""),
        (asked("hello there"), "\x07 ", "no_answer", ""),
        (asked("hello there"), "x" * 51, "answer_too_long", "51 characters, 50 are allowed"),
        (asked("hello there"), "\ufffd", "bad_encoding", "of the answer"),
        (asked("hey"), "hi", "too_short", "3 characters"),
        ("hello there", "hi", "bad_conversation", "not a conversation in JSON"),
        ('[{"content":"x","role":"assistant"}]', "hi", "bad_conversation", "ends with 'assistant'"),
        (asked("\x07"), "hi", "bad_conversation", "message 1: its content is empty"),
    ],
)
def test_unfit_conversations(text: str, said: str | None, reason: str, detail: str) -> None:
    cleaned = clean(raw((text, said)), CleaningSpec(max_answer_chars=50), Generation())
    assert reasons(cleaned) == [reason]
    assert detail in cleaned.rejected["detail"][0]


@pytest.mark.parametrize(
    ("said", "reason", "detail"),
    [
        (None, "no_answer", ""),
        ("Ada", "answer_does_not_fit", "the answer is not JSON"),
        (answer(kind="parcel"), "answer_does_not_fit", "field 'kind': 'parcel' is not one of its values"),
        ('{"kind": "bill"}', "answer_does_not_fit", "field 'sender': it is missing"),
        (answer(sender="x" * 60), "answer_too_long", ""),
    ],
)
def test_unfit_answers_of_an_extraction(said: str | None, reason: str, detail: str) -> None:
    cleaned = clean(raw(("Dear Bob, pay me.", said)), CleaningSpec(max_answer_chars=60), EXTRACTION)
    assert reasons(cleaned) == [reason]
    assert detail in cleaned.rejected["detail"][0]


def test_extracted_values_are_canonical_and_masked_as_their_document() -> None:
    text = "From  Ada <ada@example.org>:\n\n pay 3"
    said = '{"amount": 3.0, "kind": "bill", "sender": "Ada  <ada@example.org>"}'
    kept = clean(raw((text, said)), CleaningSpec(), EXTRACTION).kept
    assert kept["text"][0] == "From Ada <<EMAIL>>:\npay 3"
    assert kept["label"][0] == '{"sender":"Ada <<EMAIL>>","kind":"bill","amount":3}'
    assert json.loads(kept["masked"][0]) == {"email": 2}


def test_of_several_answers_to_one_prompt_the_first_stays_and_of_extractions_none() -> None:
    task = spec_of("text-generation")
    rows = raw((asked("same question"), "one"), (asked("same question"), "two"), (asked("same question"), "one "))
    cleaned = clean(rows, task.cleaning, Generation())
    assert cleaned.kept["label"].tolist() == ["one"]
    assert reasons(cleaned) == ["other_answer", "exact_duplicate"]
    noise = Generation().noise(cleaned.kept, cleaned.rejected)
    assert not noise.passed and "1 rows (50.0%)" in noise.reason
    assert Generation().noise(cleaned.kept, cleaned.rejected.head(0)).passed
    documents = raw(("Dear Bob, pay.", answer()), ("Dear Bob, pay.", answer("Bob")), ("Dear Eve, come.", answer()))
    cleaned = clean(documents, CleaningSpec(), EXTRACTION)
    assert reasons(cleaned) == ["conflicting_answers"] * 2
    assert not EXTRACTION.noise(cleaned.kept, cleaned.rejected).passed


def test_a_long_system_prompt_makes_no_two_questions_alike() -> None:
    rows = raw(*((asked(question(n), SYSTEM), f"answer {n}") for n in range(40)))
    task = spec_of("text-generation")
    kept, parts = dealt(rows, task)
    assert len(kept) == 40
    assert [len(parts[split]) for split in SPLITS] == [28, 4, 8]
    verdicts = of_splits(kept, parts, task)
    assert all(verdict.passed for verdict in verdicts.values()), verdicts


def test_near_questions_share_a_split_whatever_their_answers() -> None:
    near = [
        (asked(f"{question(0)} please tell me now", SYSTEM), "a"),
        (asked(f"{question(0)} please tell me", ""), "b"),
    ]
    rows = raw(*near, *((asked(question(n), SYSTEM), f"answer {n}") for n in range(1, 30)))
    task = spec_of("text-generation")
    kept, parts = dealt(rows, task)
    where = {key: split for split, part in parts.items() for key in part["row_id"]}
    assert len(kept) == 31
    assert where[rows["row_id"][0]] == where[rows["row_id"][1]]
    torn = {**parts, "test": pd.concat([parts["test"], kept.head(1)])}
    torn |= {split: part[part["row_id"] != rows["row_id"][0]] for split, part in parts.items() if split != "test"}
    assert not of_splits(kept, torn, task)["train", "no_leakage"].passed


def test_every_split_gets_the_rare_value_of_an_enum() -> None:
    many = [(f"Document {question(n)}", answer(kind="bill" if n < 20 else "letter", amount=n)) for n in range(120)]
    task = spec_of("extraction")
    kept, parts = dealt(raw(*many), task)
    verdicts = of_splits(kept, parts, task)
    assert all(verdict.passed for verdict in verdicts.values()), verdicts
    bills = set(kept.loc[kept["label"].str.contains("bill"), "row_id"])
    without = {**parts, "test": parts["test"][~parts["test"]["row_id"].isin(bills)]}
    lost = of_splits(kept, without, task)["test", "every_class_present"]
    assert not lost.passed and "kind = bill" in lost.reason
    empty = of_splits(kept, {**parts, "test": parts["test"].head(0)}, task)["test", "every_class_present"]
    assert not empty.passed and "sender" in empty.reason


def test_raw_rows_without_the_answers_the_task_wants() -> None:
    task = spec_of("text-generation")
    fine = raw((asked("a question"), "x"), (asked("another one"), "y"), ("no conversation", None))
    assert all(verdict.passed for verdict in of_raw(fine, task).values())
    lacking = of_raw(raw((asked("a question"), "x"), (asked("another one"), None)), task)["labels_known"]
    assert not lacking.passed
    assert "1 of 2 rows have no answer, the first at a.jsonl#2" in lacking.reason
    task = spec_of("extraction")
    fine = raw(("a document", answer()), ("another one", None))
    assert of_raw(fine, task)["labels_known"].passed
    wrong = of_raw(raw(("a document", answer()), ("another one", answer(kind="leter"))), task)["labels_known"]
    assert not wrong.passed
    assert "a.jsonl#2: field 'kind': 'leter'" in wrong.reason
    assert wrong.rows[0]["source"] == "a.jsonl#2"


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("text-generation", asked("write to ada@example.org"), "x"),
        ("text-generation", asked("a question", "from ada@example.org"), "x"),
        ("text-generation", asked("a question"), "ada@example.org"),
        ("extraction", "a document", answer("ada@example.org")),
        ("extraction", "ada@example.org wrote", answer()),
    ],
)
def test_personal_data_is_found_wherever_it_stands(kind: str, text: str, said: str) -> None:
    task = spec_of(kind)
    verdict = of_clean(raw((text, said)), task)["no_pii_left"]
    assert not verdict.passed and "1 personal data left" in verdict.reason
    kept = clean(raw((text, said)), task.cleaning, form_of(task)).kept
    assert of_clean(kept, task)["no_pii_left"].passed
    assert find(kept["text"][0] + kept["label"][0], ["email"]) == []


def test_balance_looks_at_the_answers_of_the_type() -> None:
    same = pd.Series(["I do not know."] * 3 + [f"answer {n}" for n in range(7)])
    assert not Generation().balance(same).passed
    assert "30.0%" in Generation().balance(same).reason
    assert Generation().balance(same[2:]).passed
    assert [row["characters"] for row in Generation().overview(pd.Series(["a", "bbb", None]))] == [1, 1, 2, 2, 2, 3]
    nulls = pd.Series([answer(amount=None)] * 20)
    assert not EXTRACTION.balance(nulls).passed
    assert "'amount'" in EXTRACTION.balance(nulls).reason
    assert EXTRACTION.balance(pd.concat([nulls, pd.Series([answer(amount=1), answer(amount=2)])])).passed
    shown = EXTRACTION.overview(pd.Series([answer(), answer(amount=1), "nonsense", None]))
    assert [row["null"] for row in shown] == ["50.0%", "50.0%", "75.0%"]
