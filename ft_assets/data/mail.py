"""RFC 822 mail to text and event time."""

import email
import email.header
import html
import re
from datetime import UTC, datetime
from email.message import Message
from email.utils import parsedate_to_datetime

DROPPED = re.compile(r"<(script|style|head)\b.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
TAG = re.compile(r"<[^<>]{1,2000}>")


def read_mail(content: bytes) -> tuple[str, datetime | None]:
    """Subject, an empty line and the body; and when the mail arrived (UTC).

    The body is the first text part, plain before HTML; the time is that of the topmost Received header, else of Date,
    else None. Never raises: mail in the wild breaks every rule.
    """
    message = email.message_from_bytes(content)
    return f"{_header(message, 'subject')}\n\n{_body(message)}".strip(), _arrival(message)


def _header(message: Message, name: str) -> str:
    value = str(message.get(name, ""))
    try:
        parts = email.header.decode_header(value)
    except (email.errors.HeaderParseError, ValueError):
        return value
    return "".join(_decode(part, charset) if isinstance(part, bytes) else part for part, charset in parts).strip()


def _body(message: Message) -> str:
    texts = {"plain": [], "html": []}  # type: dict[str, list[str]]
    for part in message.walk():
        if part.get_content_maintype() != "text" or part.is_multipart():
            continue
        try:
            payload = part.get_payload(decode=True)
        except (ValueError, AssertionError):
            payload = str(part.get_payload()).encode("utf-8", "replace")
        if isinstance(payload, bytes):
            kind = "html" if part.get_content_subtype() == "html" else "plain"
            texts[kind].append(_decode(payload, part.get_content_charset()))
    plain = "\n".join(texts["plain"]).strip()
    return plain or _without_tags("\n".join(texts["html"]))


def _without_tags(page: str) -> str:
    return html.unescape(TAG.sub(" ", DROPPED.sub(" ", COMMENT.sub(" ", page))))


def _decode(content: bytes, charset: str | None) -> str:
    for candidate in (charset, "utf-8"):
        if candidate:
            try:
                return content.decode(candidate)
            except (LookupError, UnicodeError, ValueError):
                continue
    return content.decode("latin-1")


def _arrival(message: Message) -> datetime | None:
    stamps = [str(value).rsplit(";", 1)[-1] for value in (message.get_all("received") or [])[:1]]
    for stamp in [*stamps, str(message.get("date", ""))]:
        try:
            moment = parsedate_to_datetime(stamp.strip())
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
        except (ValueError, TypeError, IndexError, OverflowError):
            continue
    return None
