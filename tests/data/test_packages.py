"""Fetching by the real npm and pip from a registry on this machine."""

import base64
import hashlib
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ft_assets.data.packages import fetch_package
from ft_resources.errors import SourceError


class Registry:
    """An npm registry and a Python package index in one, and how often each path was asked."""

    def __init__(self) -> None:
        self.pages: dict[str, tuple[str, bytes]] = {}
        self.asked: list[str] = []
        registry = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                registry.asked.append(self.path)
                kind, body = registry.pages.get(self.path, ("text/plain", b""))
                self.send_response(200 if self.path in registry.pages else 404)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def npm(self, name: str, archive: bytes) -> str:
        path = f"/{name}/-/{name}-1.0.0.tgz"
        version = {
            "name": name,
            "version": "1.0.0",
            "dist": {
                "tarball": self.url + path,
                "integrity": sri(archive),
                "shasum": hashlib.sha1(archive).hexdigest(),
            },
        }
        page = {"name": name, "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}}
        self.pages[f"/{name}"] = ("application/json", json.dumps(page).encode())
        self.pages[path] = ("application/octet-stream", archive)
        return sri(archive)

    def pypi(self, name: str, file: str, archive: bytes) -> str:
        self.pages[f"/simple/{name}/"] = ("text/html", f'<a href="/files/{file}">{file}</a>'.encode())
        self.pages[f"/files/{file}"] = ("application/octet-stream", archive)
        return sri(archive)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Registry]:
    registry = Registry()
    thread = threading.Thread(target=registry.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    settings = {
        "npm_config_registry": registry.url,
        "npm_config_cache": str(tmp_path / "npm-cache"),
        "npm_config_fetch_retries": "0",
        "npm_config_update_notifier": "false",
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": f"{registry.url}/simple/",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
        "PIP_NO_CACHE_DIR": "1",
        "PIP_RETRIES": "0",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    yield registry
    registry.server.shutdown()
    registry.server.server_close()
    thread.join()


def sri(archive: bytes, algorithm: str = "sha512") -> str:
    return f"{algorithm}-{base64.b64encode(hashlib.new(algorithm, archive).digest()).decode()}"


def tgz(files: dict[str, bytes], link: tuple[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        if link:
            member = tarfile.TarInfo(link[0])
            member.type, member.linkname = tarfile.SYMTYPE, link[1]
            tar.addfile(member)
    return buffer.getvalue()


PACKAGE = {"package/package.json": b'{"name": "mails", "version": "1.0.0"}', "package/data/a.txt": b"hello"}


def test_npm_package_is_fetched_once(registry: Registry, tmp_path: Path) -> None:
    integrity = registry.npm("mails", tgz(PACKAGE))
    folder = fetch_package("npm", "mails", "1.0.0", integrity, tmp_path / "cache")
    assert (folder / "data" / "a.txt").read_bytes() == b"hello"
    asked = len(registry.asked)
    assert asked > 0
    assert fetch_package("npm", "mails", "1.0.0", integrity, tmp_path / "cache") == folder
    assert len(registry.asked) == asked
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


def test_another_checksum_unpacks_nothing(registry: Registry, tmp_path: Path) -> None:
    got, expected = registry.npm("mails", tgz(PACKAGE)), sri(b"what was expected")
    with pytest.raises(SourceError, match="nothing was unpacked") as caught:
        fetch_package("npm", "mails", "1.0.0", expected, tmp_path / "cache")
    assert got in str(caught.value)
    assert expected in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_failure_shows_the_last_lines_of_the_client(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="404") as caught:
        fetch_package("npm", "no-such-package", "1.0.0", sri(b""), tmp_path / "cache")
    assert caught.value.where == "npm package no-such-package@1.0.0"


@pytest.mark.parametrize(
    "archive",
    [
        tgz(PACKAGE | {"package/../../outside.txt": b"x"}),
        tgz(PACKAGE | {"/tmp/outside.txt": b"x"}),
        tgz(PACKAGE, link=("package/link", "/etc")),
        tgz(PACKAGE, link=("package/link", "data")),
    ],
    ids=["parent", "absolute", "link-out", "link-in"],
)
def test_unsafe_members_are_refused(registry: Registry, tmp_path: Path, archive: bytes) -> None:
    integrity = registry.npm("mails", archive)
    with pytest.raises(SourceError, match="was refused for its member"):
        fetch_package("npm", "mails", "1.0.0", integrity, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_callers_at_the_same_time_get_one_whole_folder(registry: Registry, tmp_path: Path) -> None:
    files = PACKAGE | {f"package/data/{n}.txt": b"%d" % n for n in range(300)}
    integrity = registry.npm("mails", tgz(files))
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(fetch_package, "npm", "mails", "1.0.0", integrity, tmp_path / "cache") for _ in range(3)]
        counts = [len(list((call.result() / "data").iterdir())) for call in calls]
    assert counts == [301, 301, 301]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_wheel_from_a_python_index(registry: Registry, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr("faq/rows.jsonl", '{"text": "a", "label": "b"}\n')
        wheel.writestr("faq-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: faq\nVersion: 1.0\n")
        wheel.writestr("faq-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("faq-1.0.dist-info/RECORD", "")
    registry.pypi("faq", "faq-1.0-py3-none-any.whl", buffer.getvalue())
    folder = fetch_package("pypi", "faq", "1.0", sri(buffer.getvalue(), "sha256"), tmp_path / "cache")
    assert (folder / "faq" / "rows.jsonl").is_file()


@pytest.mark.parametrize(
    ("member", "mode"), [("../outside.txt", 0o100644), ("/tmp/outside.txt", 0o100644), ("faq/link", 0o120777)]
)
def test_unsafe_members_of_a_wheel_are_refused(registry: Registry, tmp_path: Path, member: str, mode: int) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr("faq-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        info = zipfile.ZipInfo(member)
        info.external_attr = mode << 16
        wheel.writestr(info, "/etc/passwd")
        wheel.writestr("faq-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: faq\nVersion: 1.0\n")
    registry.pypi("faq", "faq-1.0-py3-none-any.whl", buffer.getvalue())
    with pytest.raises(SourceError, match="was refused for its member"):
        fetch_package("pypi", "faq", "1.0", sri(buffer.getvalue()), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_build_script_of_an_unverified_source_archive_never_runs(registry: Registry, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    script = f"open({str(ran)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='faq', version='1.0')\n"
    archive = tgz({"faq-1.0/setup.py": script.encode(), "faq-1.0/PKG-INFO": b"Name: faq\nVersion: 1.0\n"})
    got = registry.pypi("faq", "faq-1.0.tar.gz", archive)
    with pytest.raises(SourceError, match="nothing was unpacked") as caught:
        fetch_package("pypi", "faq", "1.0", sri(b"what was expected"), tmp_path / "cache")
    assert got in str(caught.value)
    assert not ran.exists()


def test_missing_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SourceError, match="the client 'npm' is not installed"):
        fetch_package("npm", "mails", "1.0.0", sri(b""), tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "version"), [("--help", "1.0.0"), ("file:/etc", "1.0.0"), ("mails", "-1"), ("../mails", "1")]
)
def test_names_that_mean_something_else_to_a_client(name: str, version: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not a package name with an exact version"):
        fetch_package("npm", name, version, sri(b""), tmp_path)


@pytest.mark.parametrize("integrity", ["sha512-AAAA", "md5-1B2M2Y8AsgTpgAmY7PhCfg==", "sha256-%%%", "nonsense"])
def test_malformed_checksum(integrity: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is no checksum"):
        fetch_package("npm", "mails", "1.0.0", integrity, tmp_path)


def test_the_real_package(spam_assassin: Path) -> None:
    assert len(list(spam_assassin.glob("data/*/*.txt"))) == 6_046
