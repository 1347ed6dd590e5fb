"""Filters: found by name, asked about texts, and never passed around by failing."""

from pathlib import Path
from typing import Any

import pytest

from bento.content_filter import ContentFilter, load_filter, word_list
from ft_resources.errors import RequestError, SpecError


def no_secrets(task: str, texts: Any, direction: str, /) -> str | None:
    return f"{task} keeps its secrets" if direction == "output" and "secret" in texts else None


def broken(task: str, texts: Any, direction: str, /) -> str | None:
    raise ZeroDivisionError


def test_a_filter_is_found_by_its_name_and_looks_at_both_directions() -> None:
    found = load_filter("tests.bento.test_content_filter:no_secrets")
    assert found is not None
    found.check("mail", ["secret"], "input")
    found.check("mail", ["fine"], "output")
    with pytest.raises(RequestError, match="mail keeps its secrets") as caught:
        found.check("mail", ["fine", "secret"], "output")
    assert (caught.value.error_code, caught.value.status) == ("content_filtered", 422)
    assert load_filter("") is None


@pytest.mark.parametrize("reference", ["nowhere:function", "bento.content_filter:nothing", "bento.content_filter", ":"])
def test_a_filter_that_is_not_there_is_named(reference: str) -> None:
    with pytest.raises(SpecError, match="FT_CONTENT_FILTER"):
        load_filter(reference)


def test_a_filter_that_fails_lets_nothing_through() -> None:
    with pytest.raises(RequestError) as caught:
        ContentFilter(broken).check("mail", ["fine"], "input")
    assert (caught.value.error_code, caught.value.status) == ("internal", 500)


def test_words_match_as_a_whole_in_any_case_and_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = tmp_path / "words"
    words.write_text("# comment\n\nbad apple  # of the tree\nc++\nStraße\n", encoding="utf-8")
    monkeypatch.setenv("FT_CONTENT_WORDS", str(words))
    for text in ("one BAD\n apple.", "bad\u00a0apple", "I write C++!", "STRASSE", "ｂａｄ apple"):
        assert word_list("t", ["fine", text], "input"), text
    for text in ("bad apples", "badapple", "comment", "of the tree", ""):
        assert word_list("t", [text], "input") is None, text
    monkeypatch.setenv("FT_CONTENT_WORDS", str(tmp_path / "missing"))
    with pytest.raises(SpecError, match="FT_CONTENT_WORDS"):
        word_list("t", ["x"], "input")
