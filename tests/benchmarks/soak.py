"""The service under load for minutes while adapters come, change and go: every answer is checked.

    python tests/benchmarks/soak.py --minutes 10 --out /tmp/soak

A share of the measured capacity is asked of a real server, in requests that arrive at fixed times. Meanwhile tasks
are added, get new adapters and go back to earlier ones, and the memory for adapters is too small for all of them. Each
adapter has a fingerprint: label names of its own, and probabilities that were computed beforehand in fp32 by an engine
that held one adapter at a time. An answer is wrong when its adapter was not live, its labels are another adapter's,
or its probabilities are far from its own or nearer to another one's. Exits with 1 when a request failed, an answer was
wrong, or memory grew.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from serving import OURS, console, ours, requests_of
from serving_load import Answer, Turn, connected, post, run_load
from serving_processes import LOAD_CORE, Server
from serving_world import BASE, LABELS, World, news

STALE = 2.0
"""Seconds after a release in which the adapter before it may still answer."""
TEXTS, CONNECTIONS, TASKS, MOST_TASKS = 12, 32, 8, 40
MEMORY_MB = 8
LONG = 120.0
"""Seconds of load from which on growth of memory counts."""
GROWTH = 0.05
TOLERANCE = 0.2
"""Difference of a probability from fp32 that int8 may make; other adapters differ by more, see `separation`."""


@dataclass
class Term:
    """A time in which an adapter may answer for a task, in seconds of `time.perf_counter`."""

    digest: str
    begins: float
    ends: float = float("inf")


@dataclass(frozen=True)
class Asked:
    """What a request was about."""

    task: str
    text: int
    digest: str
    """The adapter it named; empty: it follows the route."""


@dataclass
class Findings:
    """What was seen."""

    answers: int = 0
    failures: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    changes: dict[str, int] = field(default_factory=dict)
    latency: list[tuple[float, float]] = field(default_factory=list)
    """(seconds since the start, seconds)"""
    memory: list[tuple[float, int]] = field(default_factory=list)
    """(seconds since the start, bytes)"""

    def growth(self) -> float:
        """Growth of memory over the later two thirds, by a straight line through them, relative to its mean."""
        times, sizes = np.array(self.memory[len(self.memory) // 3 :], dtype=float).T
        slope = np.polyfit(times - times[0], sizes, 1)[0]
        return float(slope * (times[-1] - times[0]) / sizes.mean())


class Soak:
    """One run.

    Args:
        world: Without tasks yet.
    """

    def __init__(self, world: World, texts: Sequence[str], seed: int) -> None:
        from bento.engine import Engine
        from ft_resources.base_models import resolve

        self.world, self.texts, self.found = world, texts, Findings()
        self._random = random.Random(seed)
        self._engine = Engine(resolve(BASE), "fp32", threads=1)
        self._terms: dict[str, list[Term]] = {}
        self._seeds: dict[str, int] = {}
        self._expected = np.zeros((0, len(texts), len(LABELS)), np.float32)
        self._rows: dict[str, int] = {}
        self._asked: list[Asked] = []
        for number in range(TASKS):
            self._release(f"topics-{number}")

    # -- changes ----------------------------------------------------------------------------------------------------

    def change(self) -> None:
        """One change of the routes: a new task, a new adapter of a task, or an earlier one again."""
        task = self._random.choice(list(self._terms))
        kind = self._random.choice(("add", "renew", "return"))
        if kind == "add" and len(self._terms) < MOST_TASKS:
            self._release(f"topics-{len(self._terms)}")
        elif kind == "return" and len({term.digest for term in self._terms[task]}) > 1:
            earlier = [term.digest for term in self._terms[task] if term.digest != self._terms[task][-1].digest]
            self._release(task, self._random.choice(earlier))
        else:
            kind = "renew"
            self._release(task)
        self.found.changes[kind] = self.found.changes.get(kind, 0) + 1

    def _release(self, task: str, digest: str = "") -> None:
        digest = digest or self._publish(task)
        terms = self._terms.setdefault(task, [])
        new = Term(digest, time.perf_counter())
        terms.append(new)
        self.world.release(task, digest)
        if len(terms) > 1:
            terms[-2].ends = time.perf_counter() + STALE

    def _publish(self, task: str) -> str:
        """A new adapter in the lake, whose answers are computed before anyone can ask for it."""
        digest, folder, seed = self.world.publish(task)
        adapter = self._engine.load(digest, folder)
        scored = self._engine.run(self._engine.encode(self.texts, adapter))
        self._engine.unload(digest)
        self._rows[digest], self._seeds[digest] = len(self._expected), seed
        rows = np.stack([one.probabilities for one in scored])
        self._expected = np.concatenate([self._expected, rows[None]])
        return digest

    # -- load -------------------------------------------------------------------------------------------------------

    def request(self, at: float) -> Turn:
        """A request to be sent at `at`; one in ten names an adapter, of all that were ever live."""
        task = self._random.choice([name for name, terms in self._terms.items() if terms[0].begins < at - STALE])
        digest = ""
        if self._random.random() < 0.1:
            digest = self._random.choice([term.digest for term in self._terms[task] if term.begins < at - STALE])
        text = self._random.randrange(len(self.texts))
        self._asked.append(Asked(task, text, digest))
        body = {"task": task, "inputs": [self.texts[text]]} | ({"model_version": digest} if digest else {})
        return Turn(len(self._asked) - 1, post("/predict", body), at)

    def check(self, answer: Answer, began: float) -> None:
        """Judge one answer."""
        self.found.answers += 1
        self.found.latency.append((answer.sent_at - began, answer.seconds))
        if answer.status != 200:
            self.found.failures.append(f"{answer.status} {answer.body[:300]!r}")
            return
        complaint = self._complaint(self._asked[answer.request], answer)
        if complaint:
            self.found.wrong.append(complaint)

    def _complaint(self, asked: Asked, answer: Answer) -> str:
        said = answer.json()
        digest, result = said["adapter"], said["results"][0]
        received = answer.sent_at + answer.seconds
        live = {one.digest for one in self._terms[asked.task] if one.begins <= received and one.ends >= answer.sent_at}
        if digest not in ({asked.digest} if asked.digest else live):
            return f"{asked} was answered by {digest[:12]}"
        names = [f"{label}-{self._seeds[digest]}" for label in LABELS]
        if list(result["probabilities"]) != names:
            return f"{asked}: labels {list(result['probabilities'])} are not those of {digest[:12]}"
        given = np.array(list(result["probabilities"].values()), np.float32)
        distance = np.abs(self._expected[:, asked.text] - given).max(1)
        off = distance[self._rows[digest]]
        if off > TOLERANCE or distance.min() < off - TOLERANCE / 2:
            return f"{asked}: the numbers of {digest[:12]} are {off:.3f} off, those of another one {distance.min():.3f}"
        return ""

    def separation(self) -> float:
        """Share of (text, two adapters) whose probabilities differ by more than the tolerance: what a mix-up shows."""
        rows = len(self._expected)
        apart = [np.abs(self._expected[one + 1 :] - self._expected[one]).max(2) > TOLERANCE for one in range(rows - 1)]
        return float(np.concatenate(apart).mean())

    async def run(self, server: Server, rate: float, seconds: float, every: float) -> None:
        """Ask `rate` times a second for `seconds`, with a change of routes after `every` of them."""
        began = time.perf_counter()
        place = 0

        def following() -> Turn | None:
            nonlocal place
            at = began + place / rate
            place += 1
            return None if at >= began + seconds else self.request(at)

        async def changing() -> None:
            while time.perf_counter() < began + seconds - STALE:
                await asyncio.sleep(every)
                await asyncio.to_thread(self.change)

        async def watching() -> None:
            while True:
                self.found.memory.append((time.perf_counter() - began, server.memory()))
                await asyncio.sleep(0.5)

        changes, watch = asyncio.create_task(changing()), asyncio.create_task(watching())
        await connected(server.port, CONNECTIONS, following, lambda answer: self.check(answer, began))
        await changes
        watch.cancel()


def plot(found: Findings, path: Path) -> None:
    """Memory and latency over time."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(9, 5))
    upper.plot([at for at, _ in found.memory], [size / 1e6 for _, size in found.memory])
    upper.set_ylabel("resident memory, MB")
    upper.set_ylim(bottom=0)
    times, seconds = np.array(found.latency).T
    order = np.argsort(times)
    parts = np.array_split(order, max(1, min(100, len(order) // 50)))
    middle = [times[part].mean() for part in parts]
    for share in (50, 99):
        lower.plot(middle, [np.percentile(seconds[part], share) * 1e3 for part in parts], label=f"p{share}")
    lower.set_ylabel("latency, ms")
    lower.set_xlabel("seconds")
    lower.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def soak(home: Path, minutes: float, share: float, every: float, precision: str) -> tuple[Findings, dict[str, Any]]:
    """Run it; what was seen, and its summary."""
    world = World(home, targets="query,value", rank=8, precision=precision)
    run = Soak(world, news(TEXTS)["short"], seed=0)
    with ExitStack() as stack:
        server = ours(world, stack, variables={"FT_ADAPTER_MEMORY_MB": str(MEMORY_MB)})
        requests = requests_of(OURS, list(world.digests), list(run.texts))
        run_load(server.port, requests, CONNECTIONS, 2.0)
        capacity = run_load(server.port, requests, CONNECTIONS, 4.0)
        rate = share * len(capacity.answers) / capacity.seconds
        asyncio.run(run.run(server, rate, 60 * minutes, every))
    world.close()
    found = run.found
    seconds = np.array([one for _, one in found.latency])
    summary = {
        "answers": found.answers,
        "failures": len(found.failures),
        "wrong answers": len(found.wrong),
        "fingerprints told apart": round(run.separation(), 4),
        "changes of routes": found.changes,
        "requests per second": round(rate, 1),
        "p50 ms": round(float(np.median(seconds)) * 1e3, 1),
        "p99 ms": round(float(np.percentile(seconds, 99)) * 1e3, 1),
        "memory MB": round(found.memory[-1][1] / 1e6),
        "growth of memory": round(found.growth(), 4),
    }
    return found, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--share", type=float, default=0.8, help="of the measured capacity that is asked")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between changes of routes")
    parser.add_argument("--precision", default="int8", choices=["auto", "int8", "bf16", "fp32"])
    parser.add_argument("--out", type=Path, default=Path("soak"), help="folder of the report, the plot and the log")
    given = parser.parse_args()
    os.sched_setaffinity(0, {LOAD_CORE})
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ft-soak-") as home:
        found, summary = soak(Path(home), given.minutes, given.share, given.every, given.precision)
        shutil.copy(Path(home) / f"{OURS}.log", given.out / "serve.log")
    (given.out / "report.json").write_text(json.dumps(summary, indent=1))
    plot(found, given.out / "soak.png")
    for name, value in summary.items():
        console.print(f"{name:22} {value}")
    for problem in (*found.failures[:3], *found.wrong[:3]):
        console.print(f"[red]{problem}[/]")
    grew = found.memory[-1][0] >= LONG and found.growth() > GROWTH
    sys.exit(1 if found.failures or found.wrong or grew else 0)


if __name__ == "__main__":
    main()
