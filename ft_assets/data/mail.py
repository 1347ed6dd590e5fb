"""RFC 822 mail to text and event time; made for mail as it is found, not as the standards want it."""

import codecs
import html
import re
from datetime import UTC, datetime
from email import message_from_bytes
from email.errors import HeaderParseError
from email.header import decode_header
from email.message import Message
from email.utils import parsedate_to_datetime

# Decoders that are no charset of mail: they interpret escapes, or take quadratic time.
_NO_CHARSETS = {"idna", "punycode", "raw-unicode-escape", "unicode-escape", "undefined"}
# What senders declare, and the superset that their bytes really need.
_SUPERSETS = {"gb2312": "gb18030", "gbk": "gb18030", "ascii": "cp1252", "iso8859-1": "cp1252", "big5": "big5hkscs"}

_TAG = re.compile(r"</?([A-Za-z][A-Za-z0-9]*)")
_BREAKING = re.compile(
    r"address|article|blockquote|br|center|dd|div|dl|dt|fieldset|footer|form|h1|h2|h3|h4|"
    r"h5|h6|header|hr|li|main|nav|ol|option|p|pre|section|table|td|th|title|tr|ul"
)
_SILENT = {name: re.compile(rf"</{name}[\s>/]", re.IGNORECASE) for name in ("script", "style")}
_BLANKS = re.compile(r"[^\S\n]+")
_LINES = re.compile(r"\s*\n\s*")


def read_mail(content: bytes) -> tuple[str, datetime | None]:
    """Subject, an empty line and the body; and when the mail arrived (UTC).

    The body is the inline text/plain parts, or, where those are blank, the text/html parts without markup. Transfer
    encodings and charsets are honoured; bytes that fit no declared charset are read as UTF-8, else as Windows-1252.
    The time is that of the topmost Received header, else of Date, else None. Any bytes are accepted, and time grows
    linearly with them.
    """
    try:
        message = message_from_bytes(content)
        text = f"{_header(message, 'subject')}\n\n{_body(message)}"
    except RecursionError:  # parts nested by the hundred, which no mail program writes
        head, _, rest = content.replace(b"\r\n", b"\n").partition(b"\n\n")
        message = message_from_bytes(head + b"\n\n")
        text = f"{_header(message, 'subject')}\n\n{_decode(rest, None)}"
    return text.strip(), _arrival(message)


def strip_html(page: str) -> str:
    """The readable text of `page`: no tags, comments, scripts or styles; entities resolved; blanks folded.

    An unfinished comment, script or tag hides the rest of the page, as in a browser.
    """
    pieces: list[str] = []
    at = 0
    while (tag := page.find("<", at)) >= 0:
        pieces.append(page[at:tag])
        if page.startswith("<!--", tag):
            end = page.find("-->", tag + 4)
            at = len(page) if end < 0 else end + 3
            continue
        named = _TAG.match(page, tag)
        if named is None and page[tag + 1 : tag + 2] not in ("!", "?"):
            pieces.append("<")
            at = tag + 1
            continue
        end = page.find(">", tag)
        at = len(page) if end < 0 else end + 1
        name = named[1].lower() if named else ""
        if name in _SILENT and page[tag + 1] != "/":
            closing = _SILENT[name].search(page, at)
            at = closing.start() if closing else len(page)
        elif _BREAKING.fullmatch(name):
            pieces.append("\n")
    pieces.append(page[at:])
    text = html.unescape("".join(pieces)).replace("\r", "\n")
    return _LINES.sub("\n", _BLANKS.sub(" ", text)).strip()


def _arrival(message: Message) -> datetime | None:
    stamps = [str(value).rpartition(";")[2] for value in (message.get_all("received") or [])[:1]]
    stamps += [str(value) for value in (message.get_all("date") or [])[:1]]
    for stamp in stamps:
        try:
            moment = parsedate_to_datetime(stamp.strip())
            # "-0000" says that the zone is unknown; RFC 5322 lets such a time be read as UTC.
            return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
        except (ValueError, TypeError, IndexError, OverflowError):
            continue
    return None


def _body(message: Message) -> str:
    plain: list[str] = []
    marked: list[str] = []
    for part in message.walk():
        if part.is_multipart() or str(part.get("content-disposition", "")).lstrip().lower().startswith("attachment"):
            continue
        kind = part.get_content_type()
        if kind == "text/html":
            marked.append(strip_html(_payload(part)))
        elif kind.startswith(("text/", "multipart/")):  # a multipart without its boundary was left as one string
            plain.append(_payload(part))
    return "\n".join(plain) if any(text.strip() for text in plain) else "\n".join(marked)


def _payload(part: Message) -> str:
    try:
        payload = part.get_payload(decode=True)
    except (ValueError, LookupError, AssertionError):
        payload = str(part.get_payload()).encode("utf-8", "surrogateescape")
    try:
        charset = part.get_content_charset()
    except (ValueError, LookupError):
        charset = None
    return _decode(payload, charset).replace("\r\n", "\n") if isinstance(payload, bytes) else ""


def _header(message: Message, name: str) -> str:
    value = message.get(name, "")
    try:
        pieces = decode_header(value)
    except (HeaderParseError, ValueError):
        pieces = [(str(value), None)]
    decoded = [piece if isinstance(piece, str) else _decode(piece, charset) for piece, charset in pieces]
    return " ".join("".join(decoded).split())


def _decode(data: bytes, charset: str | None) -> str:
    declared = _charset(charset)
    for name in (declared, "utf-8"):
        try:
            if name:
                return data.decode(name)
        except (ValueError, LookupError):  # LookupError: a codec that is not one of text, such as base64
            continue
    # Characters are lost either way; a declared multi-byte charset loses the fewest.
    if declared and declared not in ("utf-8", "utf-7", "cp1252"):
        try:
            return data.decode(declared, "replace")
        except (ValueError, LookupError):
            pass
    return data.decode("cp1252", "replace")


def _charset(declared: str | None) -> str | None:
    try:
        name = codecs.lookup((declared or "").strip("\"' ")).name
    except (LookupError, ValueError):
        return None
    return None if name.replace("_", "-") in _NO_CHARSETS else _SUPERSETS.get(name, name)
