"""The page at / where a person tries the released tasks: one file without anything from elsewhere."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import FastAPI, Response

PATH = "/"
FILE = Path(__file__).with_name("try_page.html")


def add_try_page(app: FastAPI) -> None:
    """The page at /. It holds nothing of anybody's: what it shows, it asks the service for like any caller."""
    content = FILE.read_text(encoding="utf-8")
    headers = {
        "content-security-policy": policy(content),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }

    async def page() -> Response:
        return Response(content, media_type="text/html", headers=headers)

    app.add_api_route(PATH, page, methods=["GET", "HEAD"], include_in_schema=False)


def policy(content: str) -> str:
    """The Content-Security-Policy of a page: its own script and style by their hashes, requests to its own service."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hashes('script', content)}",
            f"style-src {_hashes('style', content)}",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _hashes(tag: str, content: str) -> str:
    """The sources that allow every `<tag>` element of `content`, and nothing else."""
    bodies = re.findall(f"<{tag}>(.*?)</{tag}>", content, flags=re.DOTALL)
    digests = (hashlib.sha256(body.encode()).digest() for body in bodies)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
