"""Notices to webhooks of a chat: an HTTP POST of JSON, which nothing waits for longer than a few seconds.

urllib and not httpx, which logs the URL of every request; a webhook's URL is a secret.
"""

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

ATTEMPTS = 3
ATTEMPT_SECONDS = 2.0
PAUSE_SECONDS = 0.3
TOTAL_SECONDS = 5.0
"""A webhook that has not answered by then is left alone, however often it was tried."""
AGAIN = (429, *range(500, 600))
"""Statuses of a receiver that did not take the notice and may take it later."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """None: what a notice says is for the host that was named."""


_OPENER = urllib.request.build_opener(_NoRedirects)


def post(urls: Sequence[str], notice: Mapping[str, Any]) -> list[str]:
    """Send `notice` to every URL at the same time, each at most once.

    A webhook that cannot be reached, or says that it did not take the notice (429, 5xx), is tried three times. One that
    was sent it and says nothing is not tried again: it may have taken it. Redirects are not followed.

    Args:
        urls: As `Environment.notify_urls` has them.

    Returns:
        One sentence for each webhook that did not take it, without its URL; after `TOTAL_SECONDS` at the latest.
    """
    body, until = json.dumps(notice).encode(), time.monotonic() + TOTAL_SECONDS
    told = ["did not answer in time; it may have the notice all the same"] * len(urls)

    def deliver(place: int) -> None:
        told[place] = _delivered(urls[place], body, until)

    # a slow lookup of a name, or an answer that trickles, has no timeout of its own
    threads = [threading.Thread(target=deliver, args=(place,), daemon=True) for place in range(len(urls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return [f"webhook {place} of {len(urls)} {why}" for place, why in enumerate(list(told), start=1) if why]


def _delivered(url: str, body: bytes, until: float) -> str:
    """Why the notice was not taken; empty when it was."""
    why = ""
    for attempt in range(1, ATTEMPTS + 1):
        seconds = min(ATTEMPT_SECONDS, until - time.monotonic())
        if seconds <= 0:
            break
        why, again = _attempt(url, body, seconds)
        if not again:
            return why
        why = f"{why}, at attempt {attempt} of {ATTEMPTS}"
        if attempt < ATTEMPTS:
            time.sleep(PAUSE_SECONDS * attempt)
    return why


def _attempt(url: str, body: bytes, seconds: float) -> tuple[str, bool]:
    """Why it was not taken (empty: it was), and whether it is safe and worth while to try again.

    The texts of exceptions are not used: some hold the URL or its host.
    """
    headers = {"content-type": "application/json", "user-agent": "ft-assets"}
    request = urllib.request.Request(url, data=body, headers=headers)
    try:
        with _OPENER.open(request, timeout=seconds):
            return "", False
    except urllib.error.HTTPError as error:
        with error:
            return f"answered {error.code}", error.code in AGAIN
    except urllib.error.URLError as error:  # raised until the request is sent, not while its answer is read
        return f"could not be reached ({type(error.reason).__name__})", True
    except (OSError, http.client.HTTPException) as error:
        return f"gave no answer ({type(error).__name__}); it may have the notice all the same", False
