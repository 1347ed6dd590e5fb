"""The page at /: served to anyone within limits, holds nothing from elsewhere, and asks the service for real."""

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bento.try_page import FILE, policy
from ft_resources import api_keys
from tests.bento.browser import PROGRAM, Browser, browser
from tests.bento.servers import Server, end, start

OUTSIDE = {"x-forwarded-for": "10.1.2.3"}
"""Behind a proxy nobody is from this machine."""
RATE = 40
with_browser = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium here")


@pytest.fixture(scope="module")
def world(make_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    world = make_world(tmp_path_factory.mktemp("page"))
    world.release("t1", world.first, "1")
    world.release("t1", world.second, "2")
    world.release("t2", world.other, "1")
    world.ledger.set_review_below("t2", 1.0, actor="test")
    yield world
    world.ledger.close()


@pytest.fixture(scope="module")
def key(world: Any) -> str:
    """Of a reader of t2."""
    stored, shown = api_keys.make("reader-t2", "reader", tasks=["t2"], rate=6000, created_by="test")
    world.ledger.add_key(stored)
    return shown


@pytest.fixture(scope="module")
def server(world: Any, key: str) -> Iterator[Server]:
    server = start(world.home, FT_RATE_LIMIT=str(RATE))
    yield server
    end(server)


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Browser]:
    with browser(tmp_path) as opened:
        yield opened
    assert opened.complaints == []


def test_the_page_needs_no_key_and_nothing_else_became_open(server: Server) -> None:
    page = server.client.get("/?task=t1", headers=OUTSIDE)
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert page.text == FILE.read_text(encoding="utf-8")
    assert len(page.headers["x-trace-id"]) == 32
    assert server.client.head("/", headers=OUTSIDE).status_code == 200
    for path in ("/docs", "/metrics", "/v1/models", "/openapi.json", "/index.html", "/static_content/"):
        assert server.client.get(path, headers=OUTSIDE).status_code == 401, path
    refused = server.client.post("/", content=b"x" * 100_000, headers=OUTSIDE)
    assert (refused.status_code, refused.json()["error_code"]) == (405, "invalid_request")


def test_the_policy_allows_the_pages_own_script_and_style_and_nothing_from_elsewhere(server: Server) -> None:
    page = server.client.get("/")
    rules = dict(rule.split(" ", 1) for rule in page.headers["content-security-policy"].split("; "))
    assert page.headers["content-security-policy"] == policy(page.text)
    assert (rules["default-src"], rules["connect-src"], rules["frame-ancestors"]) == ("'none'", "'self'", "'none'")
    assert "unsafe" not in str(rules)
    assert (rules["script-src"].count("sha256-"), rules["style-src"].count("sha256-")) == (1, 1)
    assert len(re.findall("<script|<style", page.text)) == 2
    assert not re.search(r"https?:|//\w|\bsrc=|@import|url\(", page.text)
    assert not re.search(r"innerHTML|localStorage|sessionStorage|document\.cookie|\son\w+=", page.text)


@with_browser
def test_a_person_asks_and_sees_the_answer(server: Server, world: Any, tab: Browser) -> None:
    tab.open(f"{server.client.base_url}/?task=t2")
    tab.until("document.querySelectorAll('#task option').length === 2")
    assert tab.value("document.getElementById('task').value") == "t2"
    tab.value("document.querySelector('[value=lines]').click()")
    tab.write("texts", "it's <b>here</b>\n\nand there")
    tab.press("Enter", modifiers=2, windowsVirtualKeyCode=13)
    tab.until("document.querySelectorAll('#answers > li').length === 2")
    said = tab.value("document.getElementById('answers').innerText")
    assert "it's <b>here</b>" in said and "review" in said
    stored = world.stored()
    shown = tab.value("document.getElementById('answer').innerText")
    names = re.findall(r"prediction (\w+)", shown)
    assert len(names) == 2
    for name in names:
        assert stored[name]["label"] in said and stored[name]["adapter"] in shown
    assert stored[names[0]]["trace_id"] in shown and stored[names[0]]["release_id"] in shown
    assert tab.value("document.querySelectorAll('.bars dt').length") == 6
    widths = tab.value(
        "[...document.querySelectorAll('li:first-child .fill')].map((one) => parseFloat(one.style.width))"
    )
    assert sum(widths) == pytest.approx(100, abs=0.1) and widths == sorted(widths, reverse=True)
    command = tab.value("document.getElementById('curl').textContent").replace("\\\n", " ")
    body = json.loads(shlex.split(command)[-1])
    assert body == {"task": "t2", "inputs": ["it's <b>here</b>", "and there"]}
    again = subprocess.run(["bash", "-c", f"{command} --noproxy '*'"], capture_output=True, check=True)
    assert json.loads(again.stdout)["status"] == "ok"
    assert {one.split("?")[0] for one in tab.asked if one.startswith(("http", "ws"))} == {
        str(server.client.base_url.join(path)) for path in ("/", "/v1/models", "/predict")
    }


@with_browser
def test_a_person_chooses_a_version_and_reads_why_there_is_no_answer(server: Server, world: Any, tab: Browser) -> None:
    tab.open(f"{server.client.base_url}/?task=t3")
    tab.until("document.getElementById('refusal').innerText.includes(\"'t3'\")")
    tab.value("document.getElementById('task').value = 't1'")
    tab.value("document.getElementById('task').dispatchEvent(new Event('change'))")
    assert tab.value("[...document.getElementById('version').options].map((one) => one.text)") == ["live (2)", "2", "1"]
    tab.value("document.getElementById('version').value = '1'")
    tab.write("texts", "some text")
    tab.value("document.getElementById('ask').click()")
    tab.until("!document.getElementById('answer').hidden")
    assert world.first in tab.value("document.getElementById('facts').innerText")
    tab.value("document.getElementById('texts').value = 'x'.repeat(100001)")
    tab.value("document.getElementById('ask').click()")
    tab.until("document.getElementById('refusal').innerText.includes('input_too_large')")
    assert "Send at most" in tab.value("document.getElementById('refusal').innerText")
    assert tab.value("document.getElementById('answer').hidden") is True
    tab.complaints = [one for one in tab.complaints if "413" not in one]  # the browser tells of every refused request


@with_browser
def test_a_key_shows_its_tasks_only_and_stays_in_memory(server: Server, key: str, tab: Browser) -> None:
    tab.send("Network.setExtraHTTPHeaders", headers=OUTSIDE)
    tab.open(f"{server.client.base_url}/?task=t2")
    tab.until("document.getElementById('refusal').innerText.includes('unauthorized')")
    assert tab.value("document.activeElement.id") == "key"
    assert tab.value("document.querySelectorAll('#task option').length") == 0
    tab.write("key", key)
    tab.press("Tab", windowsVirtualKeyCode=9)
    tab.until("document.querySelectorAll('#task option').length === 1")
    assert tab.value("document.getElementById('task').value") == "t2"
    assert tab.value("document.getElementById('refusal').innerText") == ""
    tab.write("texts", "some text")
    tab.value("document.getElementById('ask').click()")
    tab.until("!document.getElementById('answer').hidden")
    assert key not in tab.value("document.getElementById('curl').textContent")
    assert not any(key in address for address in [*tab.asked, tab.value("location.href")])
    assert tab.value("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    assert key.rsplit("_", 1)[-1] not in (server.home / "serve.log").read_text(errors="replace")
    tab.complaints = [one for one in tab.complaints if "401" not in one]


def test_who_asks_for_the_page_too_often_is_refused_and_nobody_else(server: Server) -> None:
    last = [server.client.get("/", headers=OUTSIDE) for _ in range(RATE + 5)][-1]
    assert (last.status_code, last.json()["error_code"]) == (429, "rate_limited")
    assert int(last.headers["retry-after"]) >= 1
    assert server.client.get("/").status_code == 200
