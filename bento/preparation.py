"""What happens to a text before a model sees it. Training rows and requests take the same path.

Masking knows kinds of personal data that have a form: addresses, numbers with check digits. It knows no names.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Pattern:
    """One kind of personal data: how it looks, and how much of a look-alike it really is."""

    token: str
    before: str
    """What must not stand before it: a lookbehind."""
    form: str
    measure: Callable[[str], int]
    """Length of the valid part at the start of a match; 0: none."""
    ignore_case: bool = False
    anywhere: re.Pattern[str] = field(init=False)
    adjacent: re.Pattern[str] = field(init=False)
    """The form without its lookbehind, for what follows a masked match at once."""

    def __post_init__(self) -> None:
        flags = re.IGNORECASE if self.ignore_case else re.NOFLAG
        object.__setattr__(self, "anywhere", re.compile(self.before + self.form, flags))
        object.__setattr__(self, "adjacent", re.compile(self.form, flags))

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Start and end of every valid match. A look-alike that is not valid may have a valid one inside."""
        at, after_match = 0, False
        while True:
            match = (self.adjacent.match(text, at) if after_match else None) or self.anywhere.search(text, at)
            if match is None:
                return
            length = self.measure(match.group())
            after_match = length > 0
            at = match.start() + (length or 1)
            if length:
                yield match.start(), at


_DOUBLED = {str(digit): str(sum(divmod(2 * digit, 10))) for digit in range(10)}
_DOUBLE = str.maketrans(_DOUBLED)
_SEPARATORS = str.maketrans("", "", " -")


def _luhn(text: str) -> bool:
    """Luhn checksum (ISO/IEC 7812-1) of the 13 to 19 digits in `text`."""
    digits = text.translate(_SEPARATORS)
    total = sum(map(int, digits[::-2])) + sum(map(int, digits[-2::-2].translate(_DOUBLE)))
    return 13 <= len(digits) <= 19 and total % 10 == 0 and len(set(digits)) > 1


def _card(text: str) -> int:
    """What looks like the last group may be another number that follows the card's."""
    if _luhn(text):
        return len(text)
    groups = max(text.rfind(" "), text.rfind("-"), 0)
    return groups if _luhn(text[:groups]) else 0


def _chinese_id(text: str) -> int:
    """Check character of an 18-character Chinese identity number (GB 11643-1999, ISO 7064 MOD 11-2)."""
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    total = sum(weight * int(char) for weight, char in zip(weights, text[:17], strict=True))
    return len(text) if "10X98765432"[total % 11] == text[17].upper() else 0


def _octets(text: str) -> int:
    return len(text) if all(int(part) <= 255 for part in text.split(".")) else 0


def _phone(text: str) -> int:
    return len(text) if 8 <= sum(char.isdigit() for char in text) <= 15 else 0


# Every form repeats a bounded number of times, or one kind of character up to its end: time grows linearly.
PATTERNS: dict[str, Pattern] = {
    "url": Pattern("<URL>", "", r"(?:https?://|www\.)[^\s<>\"']+", len, ignore_case=True),
    "email": Pattern(
        "<EMAIL>",
        r"(?<![\w.%+-])",
        r"[\w.%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9])",
        len,
    ),
    "cn_id": Pattern("<CN_ID>", r"(?<![0-9A-Za-z])", r"[1-9][0-9]{16}[0-9Xx](?![0-9A-Za-z])", _chinese_id),
    "credit_card": Pattern(
        "<CREDIT_CARD>",
        r"(?<![0-9-])",
        r"(?:[0-9]{13,19}"
        r"|[0-9]{4}([ -]?)[0-9]{6}\1[0-9]{4,5}"
        r"|[0-9]{4}(?:[ -]?[0-9]{4}){2}[ -]?[0-9]{1,4}(?:[ -][0-9]{1,3})?)(?![0-9])",
        _card,
    ),
    "ip": Pattern("<IP>", r"(?<![0-9.])", r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![0-9]|\.[0-9])", _octets),
    "phone": Pattern(
        "<PHONE>",
        r"(?<![\w.+-])",
        r"(?:1[3-9][0-9]{9}|\+[0-9]{8,15}"
        r"|(?:\+[0-9]{1,3}[ .-]?)?(?:\([0-9]{2,4}\)[ .-]?|[0-9]{2,4}[ .-])[0-9]{3,4}[ .-]?[0-9]{3,4})(?![\w-])",
        _phone,
    ),
}


def find(text: str, kinds: Sequence[str]) -> list[tuple[str, int, int]]:
    """Personal data of the given kinds: (kind, start, end), kinds in the order they are masked."""
    return [
        (kind, start, end) for kind, pattern in PATTERNS.items() if kind in kinds for start, end in pattern.spans(text)
    ]


def mask(text: str, kinds: Sequence[str]) -> tuple[str, dict[str, int]]:
    """`text` with personal data replaced by typed tokens, and how many of each kind. Masking twice changes nothing."""
    counts: dict[str, int] = {}
    while True:  # a token frees what stands beside it: what one kind hides from another takes a second or third round
        before = text
        for kind, pattern in PATTERNS.items():
            if kind not in kinds:
                continue
            pieces, at = [], 0
            for start, end in pattern.spans(text):
                pieces += [text[at:start], pattern.token]
                at = end
                counts[kind] = counts.get(kind, 0) + 1
            if pieces:
                text = "".join(pieces) + text[at:]
        if text == before:
            return text, counts


MOST_MARKS = 30
"""Combining marks on one character (UAX #15, Stream-Safe Text Format); more are dropped, ordering them is quadratic."""
_MARKS_OF_CLASS_0 = frozenset("\u0344\u0f73\u0f75\u0f81")
"""Marks that fall apart into several when they are normalised; all others have a combining class."""
_BLANK_CONTROLS = re.compile("[\x0b\x0c\x1c-\x1f\x85]")
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")


def normalise(text: str) -> str:
    """NFC, control characters out, runs of blanks and of empty lines folded. Twice changes nothing."""
    lines = (" ".join(line.split()) for line in tidy(text).split("\n"))
    return "\n".join(line for line in lines if line)


def tidy(text: str) -> str:
    """NFC, control characters out, line breaks as one character; blanks stay. Twice changes nothing."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # first, for a control character can part a letter from its accent
    text = _CONTROLS.sub("", _BLANK_CONTROLS.sub(" ", text))
    return text if text.isascii() else _stream_safe(unicodedata.normalize("NFC", _stream_safe(text)))


def _stream_safe(text: str) -> str:
    pieces, kept_from, marks = [], 0, 0
    for at, char in enumerate(text):
        if char < "\u0300" or not (unicodedata.combining(char) or char in _MARKS_OF_CLASS_0):
            if marks > MOST_MARKS:
                kept_from = at
            marks = 0
            continue
        marks += 1
        if marks == MOST_MARKS + 1:
            pieces.append(text[kept_from:at])
    return "".join(pieces) + ("" if marks > MOST_MARKS else text[kept_from:])


def prepare(text: str, kinds: Sequence[str], max_chars: int | None = None) -> tuple[str, dict[str, int]]:
    """The text a model sees, cut after `max_chars` characters, and how many personal data of each kind were masked.

    Preparing twice changes nothing.
    """
    return _settled(text, kinds, max_chars, normalise)


def prepare_content(text: str, kinds: Sequence[str], max_chars: int | None = None) -> tuple[str, dict[str, int]]:
    """`prepare` for a content whose blanks mean something, such as code: only those at its ends are left out."""
    return _settled(text, kinds, max_chars, lambda content: tidy(content).lstrip("\n"))


def _settled(
    text: str, kinds: Sequence[str], max_chars: int | None, form: Callable[[str], str]
) -> tuple[str, dict[str, int]]:
    counts: dict[str, int] = {}
    while True:  # a cut may leave what looks like personal data, and an accent may join the token before it
        before = text
        text, masked = mask(form(text), kinds)
        text = text[:max_chars].rstrip()
        counts = {kind: counts.get(kind, 0) + masked.get(kind, 0) for kind in (*counts, *masked)}
        if text == before:
            return text, counts
