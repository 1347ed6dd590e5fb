"""A hook that looks at what comes in and what was written, and may refuse it.

FT_CONTENT_FILTER names a function `module:function` with the signature of `Filter`. `word_list` is one.
"""

import importlib
import logging
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, Protocol, cast

from ft_resources.environments import ServiceSettings
from ft_resources.errors import RequestError, SpecError

logger = logging.getLogger(__name__)

Direction = Literal["input", "output"]


class Filter(Protocol):
    """Looks at texts of one request of a task: inputs before anything is computed, written texts before they are sent.

    Returns None to let them pass, else why not, in words for the caller. Called in any thread.
    """

    def __call__(self, task: str, texts: Sequence[str], direction: Direction, /) -> str | None: ...


class ContentFilter:
    """Turns what a filter says into a refusal; a filter that fails refuses, too."""

    def __init__(self, function: Filter) -> None:
        self._function = function

    def check(self, task: str, texts: Sequence[str], direction: Direction) -> None:
        """Let the texts pass or refuse the request.

        Raises:
            RequestError: `content_filtered` (422).
                `internal` (500): the filter failed, so nothing passes.
        """
        try:
            reason = self._function(task, texts, direction)
        except Exception as error:  # somebody else's code: whatever it raises must not let a text through
            logger.error("the content filter failed", exc_info=error)
            raise RequestError(
                "internal",
                "the content filter failed",
                status=500,
                mend="The operator finds the cause in the service's log.",
            ) from error
        if reason is not None:
            subject = "the input" if direction == "input" else "the answer"
            raise RequestError(
                "content_filtered", f"{subject} is not allowed: {reason[:300]}", status=422, mend="Ask differently."
            )


def load_filter(reference: str) -> ContentFilter | None:
    """The filter that `module:function` names; None for an empty reference.

    Raises:
        SpecError: There is no such function.
    """
    if not reference:
        return None
    module, _, name = reference.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SpecError(
            f"'{reference}' cannot be imported: {error}", where="FT_CONTENT_FILTER", mend="Write module:function."
        ) from error
    if not callable(function):
        raise SpecError(f"'{reference}' is no function", where="FT_CONTENT_FILTER", mend="Write module:function.")
    return ContentFilter(cast(Callable[..., str | None], function))


def word_list(task: str, texts: Sequence[str], direction: Direction, /) -> str | None:
    """Refuse texts with a word or phrase of the file FT_CONTENT_WORDS (one a line, `#` starts a comment).

    Case, compatibility forms (NFKC) and white space do not matter; words match as a whole.

    Raises:
        SpecError: The file cannot be read.
    """
    pattern = _words(ServiceSettings.read().content_words)
    for text in texts:
        if pattern is not None and pattern.search(_fold(text)):
            return "it holds a word of the operator's list"
    return None


@cache
def _words(path: str) -> "re.Pattern[str] | None":
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise SpecError(
            f"'{path}' cannot be read", where="FT_CONTENT_WORDS", mend="Name a UTF-8 file, one word a line."
        ) from None
    words = [_fold(line.partition("#")[0]) for line in lines]
    found = [re.escape(word) for word in sorted(set(words), key=len, reverse=True) if word]
    return re.compile(rf"(?<!\w)(?:{'|'.join(found)})(?!\w)") if found else None


def _fold(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
