"""What happens to a text before a model sees it. Training rows and requests take the same path.

Masking knows kinds of personal data that have a form: addresses, numbers with check digits. It knows no names.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    """One kind of personal data: how it looks, and what else must hold."""

    token: str
    form: re.Pattern[str]
    valid: Callable[[str], bool]


def _luhn(text: str) -> bool:
    """Luhn checksum (ISO/IEC 7812-1) of the 13 to 19 digits in `text`."""
    digits = [int(char) for char in text if char.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) if at % 2 else digit for at, digit in enumerate(reversed(digits))]
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and sum(doubled) % 10 == 0


def _chinese_id(text: str) -> bool:
    """Check character of an 18-character Chinese identity number (GB 11643-1999, ISO 7064 MOD 11-2)."""
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    total = sum(weight * int(char) for weight, char in zip(weights, text[:17], strict=True))
    return "10X98765432"[total % 11] == text[17].upper()


def _octets(text: str) -> bool:
    return all(int(part) <= 255 for part in text.split("."))


def _phone(text: str) -> bool:
    return 8 <= sum(char.isdigit() for char in text) <= 15


def _any(_: str) -> bool:
    return True


# every form starts at a boundary and repeats a bounded number of times: time grows linearly with the text
PATTERNS: dict[str, Pattern] = {
    "url": Pattern("<URL>", re.compile(r"\b(?:https?://|www\.)[^\s<>\"']{1,2000}", re.IGNORECASE), _any),
    "email": Pattern(
        "<EMAIL>",
        re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9])"),
        _any,
    ),
    "cn_id": Pattern("<CN_ID>", re.compile(r"(?<![0-9A-Za-z])[1-9][0-9]{16}[0-9Xx](?![0-9A-Za-z])"), _chinese_id),
    "credit_card": Pattern("<CREDIT_CARD>", re.compile(r"(?<![0-9-])[0-9](?:[ -]?[0-9]){12,18}(?![0-9-])"), _luhn),
    "ip": Pattern("<IP>", re.compile(r"(?<![0-9.])[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![0-9]|\.[0-9])"), _octets),
    "phone": Pattern(
        "<PHONE>",
        re.compile(
            r"(?<![\w.+-])(?:1[3-9][0-9]{9}"
            r"|(?:\+[0-9]{1,3}[ .-]?)?(?:\([0-9]{2,4}\)[ .-]?|[0-9]{2,4}[ .-])[0-9]{3,4}[ .-]?[0-9]{3,4})(?![\w-])"
        ),
        _phone,
    ),
}


def find(text: str, kinds: Sequence[str]) -> list[tuple[str, int, int]]:
    """Personal data of the given kinds: (kind, start, end), kinds in the order they are masked."""
    return [
        (kind, match.start(), match.end())
        for kind, pattern in PATTERNS.items()
        if kind in kinds
        for match in pattern.form.finditer(text)
        if pattern.valid(match.group())
    ]


def mask(text: str, kinds: Sequence[str]) -> tuple[str, dict[str, int]]:
    """`text` with personal data replaced by typed tokens, and how many of each kind. Masking twice changes nothing."""
    counts: dict[str, int] = {}
    while True:  # a replacement changes what stands beside the rest; at most a few rounds
        before = text
        for kind, pattern in PATTERNS.items():
            if kind not in kinds:
                continue

            def replace(match: re.Match[str], kind: str = kind, pattern: Pattern = pattern) -> str:
                if not pattern.valid(match.group()):
                    return match.group()
                counts[kind] = counts.get(kind, 0) + 1
                return pattern.token

            text = pattern.form.sub(replace, text)
        if text == before:
            return text, counts


def normalise(text: str) -> str:
    """NFC, control characters out, runs of blanks and of empty lines folded."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = "".join(char for char in text if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs"))
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def prepare(text: str, kinds: Sequence[str], max_chars: int) -> tuple[str, dict[str, int]]:
    """The text a model sees, and how many personal data of each kind were masked. Preparing twice changes nothing."""
    masked, counts = mask(normalise(text), kinds)
    return masked[:max_chars].rstrip(), counts
