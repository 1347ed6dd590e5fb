import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_assets.data.mail import read_mail, strip_html

RECEIVED = (
    b"Received: from a by b; Thu, 22 Aug 2002 12:36:16 +0100 (IST)\n"
    b"Received: from x by a; Thu, 22 Aug 2002 07:00:00 -0400\n"
)
ALTERNATIVE = b"""Subject: =?iso-8859-1?q?Gr=FC=DFe?= =?utf-8?b?4oKs?=
Content-Type: multipart/alternative; boundary=cut

--cut
Content-Type: text/html

<p>as a page</p>
--cut
Content-Type: text/plain; charset=iso-8859-15
Content-Transfer-Encoding: quoted-printable

10 =A4
--cut
Content-Type: text/plain
Content-Disposition: attachment; filename=a.txt

attached
--cut--
"""


def test_plain_part_comes_before_html_and_attachments_stay_out() -> None:
    assert read_mail(ALTERNATIVE)[0] == "Grüße€\n\n10 €"


def test_time_of_the_topmost_received_header_in_utc() -> None:
    mail = RECEIVED + b"Date: Mon, 1 Jan 2001 00:00:00 +0000\n\nbody"
    assert read_mail(mail)[1] == datetime(2002, 8, 22, 11, 36, 16, tzinfo=UTC)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (b"Received: nonsense\nDate: Mon, 1 Jan 2001 01:00:00 +0100", datetime(2001, 1, 1, tzinfo=UTC)),
        (b"Date: Mon, 1 Jan 2001 01:00:00 -0000", datetime(2001, 1, 1, 1, tzinfo=UTC)),
        (b"Date: Fri, 31 Dec 9999 23:00:00 -2300", None),
        (b"Date: some day", None),
        (b"Subject: none", None),
    ],
)
def test_time_without_a_usable_received_header(headers: bytes, expected: datetime | None) -> None:
    assert read_mail(headers + b"\n\nbody")[1] == expected


@pytest.mark.parametrize(
    ("charset", "body", "expected"),
    [
        ("us-ascii", "naïve €".encode("cp1252"), "naïve €"),
        ("iso-8859-1", b"\x93quoted\x94", "“quoted”"),
        ("gb2312", "拾金不昧".encode("gb18030"), "拾金不昧"),
        ("no-such-charset", "Grüße".encode(), "Grüße"),
        ("base64", "Grüße".encode(), "Grüße"),
        ("unicode_escape", rb"\x41", r"\x41"),
        ('"a\0b"', b"hello", "hello"),
    ],
)
def test_charsets_as_declared_and_as_they_are(charset: str, body: bytes, expected: str) -> None:
    mail = b"Content-Type: text/plain; charset=" + charset.encode() + b"\n\n" + body
    assert read_mail(mail)[0] == expected


def test_eight_bit_subject_without_a_charset() -> None:
    assert read_mail("Subject: Grüße\n\nbody".encode("latin-1"))[0] == "Grüße\n\nbody"


def test_html_only_mail_is_stripped() -> None:
    mail = (
        b"Content-Type: text/html\n\n<html><style>p {x: y}</style><script>if (a<b) {}</script ><p>Buy V<!-- x -->ia"
        b"gra &amp; more<br>2 < 3 &lt;now&gt;</p></html>"
    )
    assert read_mail(mail)[0] == "Buy Viagra & more\n2 < 3 <now>"


@pytest.mark.parametrize("unit", ["<!--", "<script", "<script>", "<", "<a ", "</style", "&", "<!", "<p>"])
def test_html_takes_linear_time(unit: str) -> None:
    started = time.process_time()
    strip_html(unit * (1_000_000 // len(unit)))
    assert time.process_time() - started < 3


def test_parts_nested_by_the_thousand() -> None:
    nested = b"".join(b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (n, n) for n in range(3000))
    text, moment = read_mail(b"Subject: deep\nDate: Mon, 1 Jan 2001 00:00:00 +0000\n" + nested)
    assert text.startswith("deep\n")
    assert moment == datetime(2001, 1, 1, tzinfo=UTC)


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.sampled_from(
                [*ALTERNATIVE.split(b"\n"), *RECEIVED.split(b"\n"), b"", b"begin 644 x", b"Subject: =?x?b?=?="]
            ),
        ),
        max_size=25,
    )
)
def test_any_bytes_are_read(lines: list[bytes]) -> None:
    text, moment = read_mail(b"\n".join(lines))
    assert text.encode().decode() == text
    assert moment is None or moment.utcoffset() == UTC.utcoffset(None)


def test_every_real_mail(spam_assassin: Path) -> None:
    contents = [path.read_bytes() for path in sorted(spam_assassin.glob("data/*/*.txt"))]
    started = time.process_time()
    mails = [read_mail(content) for content in contents]
    assert time.process_time() - started < 15
    assert sum(moment is not None for _, moment in mails) == 6_046
    assert min(moment for _, moment in mails if moment).year == 2001
    assert max(moment for _, moment in mails if moment) < datetime(2003, 1, 1, tzinfo=UTC)
    assert sum(len(text) >= 20 for text, _ in mails) >= 6_040
    assert sum("\ufffd" in text for text, _ in mails) <= 15
