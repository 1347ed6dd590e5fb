"""A webhook's receiver: a real HTTP server in a thread that keeps what it is sent."""

import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

PATH = "/services/T0/B0/a-secret-path"


@dataclass
class Receiver:
    """What came, and how it is answered."""

    url: str = ""
    status: list[int] = field(default_factory=lambda: [200])
    """Of the answers, in their order; the last one stays."""
    delay: float = 0.0
    """Seconds before an answer."""
    location: str = ""
    """Of the answers: where else to ask."""
    asked: list[tuple[str, str, Any]] = field(default_factory=list)
    """Method, path and content of every request."""

    @property
    def notices(self) -> list[Any]:
        return [content for _, _, content in self.asked]


@contextmanager
def receiving() -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            receiver.asked.append((self.command, self.path, json.loads(body or b"null")))
            time.sleep(receiver.delay)
            status = receiver.status.pop(0) if len(receiver.status) > 1 else receiver.status[0]
            self.send_response(status)
            if receiver.location:
                self.send_header("location", receiver.location)
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    receiver.url = f"http://127.0.0.1:{server.server_port}{PATH}"
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
