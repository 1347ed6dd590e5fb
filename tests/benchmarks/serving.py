"""How many requests a CPU second of the server answers: this service beside what people deploy today, in one run.

    python tests/benchmarks/serving.py                # every table
    python tests/benchmarks/serving.py classifier     # FastAPI + peft, BentoML, this service, its engine alone
    python tests/benchmarks/serving.py adapters       # 64 adapters mixed, one merged, set_adapter per request
    python tests/benchmarks/serving.py log            # what it costs to record every answer before it is sent
    python tests/benchmarks/serving.py load           # new adapters, and a thousand of them

Generation has `tests/benchmarks/generation.py`, a long run under changes `tests/benchmarks/soak.py`.

Servers are real processes on one core with one thread, the load generator is on another core. Each request is one
text: a newswire story of Reuters R8 cut at 128 tokens, or its first twelve words; tasks take turns, so that
neighbouring requests want different adapters. Rounds alternate between the servers; the best round counts. Ratios are
what to look at: machines vary.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from rich.console import Console
from rich.table import Table
from serving_load import Load, post, run_load
from serving_processes import HERE, LOAD_CORE, Engines, Server, program, server
from serving_world import World, news

CLIENTS = (1, 8, 64)
MANY, PASSES = 1000, 4
NAIVE, PLAIN, BATCHING = "FastAPI + peft", "BentoML + peft", "BentoML batching + peft"
OURS, ENGINE = "this service", "its engine, no HTTP"
console = Console(width=max(120, Console().width))


@dataclass(frozen=True)
class Options:
    """What a person may set."""

    rounds: int
    seconds: float
    targets: str
    rank: int
    precision: str
    servers: Sequence[str]


def body(kind: str, task: str, text: str) -> Mapping[str, object]:
    """The request as `kind` of server wants it."""
    if kind == BATCHING:
        return {"items": [{"task": task, "text": text}]}
    return {"task": task, "inputs": [text]} if kind == OURS else {"task": task, "text": text}


def requests_of(kind: str, tasks: Sequence[str], texts: Sequence[str]) -> list[bytes]:
    """One request per text; tasks take turns."""
    return [post("/predict", body(kind, tasks[at % len(tasks)], text)) for at, text in enumerate(texts)]


def ours(
    world: World,
    stack: ExitStack,
    name: str = OURS,
    target: str = "bento.service:AdapterService",
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Server:
    """The service of this checkout over `world`."""
    command = [program("bentoml"), "serve", target, "--host", "127.0.0.1", "--port", "{port}"]
    variables = {"FT_HOME": str(world.home), "FT_LAKE": "", "FT_LEDGER": "", **variables}
    return stack.enter_context(server(name, command, home=world.home, variables=variables, cwd=HERE))


def peers(world: World, stack: ExitStack, names: Sequence[str]) -> dict[str, Server]:
    """Those of the other servers that are in `names`, over the same adapters."""
    variables = {"PEERS": peers_setting(world)}
    bento = [program("bentoml"), "serve", "--host", "127.0.0.1", "--port", "{port}"]
    commands = {
        NAIVE: [program("uvicorn"), "--factory", "serving_peers:naive", "--port", "{port}", "--no-access-log"],
        PLAIN: [*bento, "serving_peers:Plain"],
        BATCHING: [*bento, "serving_peers:Batching"],
    }
    return {
        name: stack.enter_context(server(name, command, home=world.home, variables=variables))
        for name, command in commands.items()
        if name in names
    }


@dataclass(frozen=True)
class Figures:
    """One server under one load."""

    per_cpu: float
    """Answers per CPU second of the server's processes."""
    p50: float
    p99: float
    """Seconds."""


def observe(server: Server, requests: Sequence[bytes], clients: int, seconds: float, first: int) -> Figures:
    """One window of load.

    Raises:
        SystemExit: An answer was not 200.
    """
    before = server.cpu()
    load: Load = run_load(server.port, requests, clients, seconds, first)
    spent = server.cpu() - before
    if load.failures:
        sys.exit(f"{server.name}: {len(load.failures)} refusals, the first: {load.failures[0]}")
    return Figures(len(load.answers) / max(spent, 1e-3), load.latency(0.5), load.latency(0.99))


def best(rounds: Sequence[Figures]) -> Figures:
    """Each figure of its best round."""
    return Figures(max(one.per_cpu for one in rounds), min(one.p50 for one in rounds), min(one.p99 for one in rounds))


def target(what: str, value: float, wanted: float, *, at_most: bool = False, unit: str = "x") -> None:
    """One line: a figure beside what it should be."""
    held = value <= wanted if at_most else value >= wanted
    sign = "<=" if at_most else ">="
    console.print(
        f"  {'[green]holds[/]' if held else '[red]misses[/]'}  {what}: {value:.2f}{unit} ({sign} {wanted:g}{unit})"
    )


def show(title: str, rows: Mapping[tuple[str, int], Figures]) -> None:
    """One row per server and number of clients; ratios are to the first server."""
    table = Table(title=title)
    names = list(dict.fromkeys(name for name, _ in rows))
    for column in ("server", "clients", "answers/cpu-s", f"x {names[0]}", "p50 ms", "p99 ms"):
        table.add_column(column, justify="left" if column == "server" else "right")
    for clients in dict.fromkeys(clients for _, clients in rows):
        for name in names:
            if (name, clients) not in rows:
                continue
            one, first = rows[name, clients], rows[names[0], clients]
            latency = ["-", "-"] if one.p50 == 0 else [f"{one.p50 * 1e3:.1f}", f"{one.p99 * 1e3:.1f}"]
            table.add_row(name, str(clients), f"{one.per_cpu:.1f}", f"{one.per_cpu / first.per_cpu:.2f}", *latency)
        table.add_section()
    console.print(table)


def world_of(home: Path, options: Options) -> World:
    return World(home, targets=options.targets, rank=options.rank, precision=options.precision)


def peers_setting(world: World) -> str:
    adapters = {task: str(folder) for task, folder in world.folders.items()}
    return json.dumps({"base": str(world.template.base.path), "adapters": adapters})


def engines(world: World) -> Engines:
    """The engine of the service, and peft, over all adapters of `world`."""
    told = {
        "tasks": {task: (world.digests[task], str(folder)) for task, folder in world.folders.items()},
        "merged": [str(path) for path in world.merge(world.tasks[0])],
        "precision": world.precision,
    }
    return Engines(told, peers_setting(world))


def classifier(options: Options, home: Path) -> None:
    """Servers over 8 adapters that take turns, and the engine alone."""
    world, texts = world_of(home, options), news(256)
    world.add(8)
    found: dict[tuple[str, str, int], list[Figures]] = {}
    with ExitStack() as stack:
        bare = stack.enter_context(engines(world))
        servers = {**peers(world, stack, options.servers), OURS: ours(world, stack)}
        sent = {(name, length): requests_of(name, world.tasks, texts[length]) for name in servers for length in texts}
        for name, one in servers.items():
            for length in texts:
                run_load(one.port, sent[name, length], 8, 1.0)  # warm
        for number in range(options.rounds):
            for length in texts:
                for clients in CLIENTS:
                    for name, one in servers.items():
                        figures = observe(one, sent[name, length], clients, options.seconds, number * 37)
                        found.setdefault((name, length, clients), []).append(figures)
                rate = bare.run("mixed", texts[length], 8, options.seconds)
                found.setdefault((ENGINE, length, CLIENTS[-1]), []).append(Figures(rate, 0.0, 0.0))
    world.close()
    told = {key: best(rounds) for key, rounds in found.items()}
    for length in texts:
        rows = {(name, clients): one for (name, of, clients), one in told.items() if of == length}
        show(f"8 adapters mixed, {options.targets} r{options.rank}, {length} texts, {options.precision}", rows)
    base, most = next(iter(servers)), CLIENTS[-1]
    for length, share in (("full", 0.85), ("short", 0.6)):
        of = {name: told[name, length, most] for name in (base, OURS, ENGINE)}
        target(f"{length} texts, {most} clients, beside {base}", of[OURS].per_cpu / of[base].per_cpu, 4)
        target(f"{length} texts, HTTP beside the engine alone", of[OURS].per_cpu / of[ENGINE].per_cpu, share)
        idle = told[OURS, length, 1].p50 / told[base, length, 1].p50
        target(f"{length} texts, one client, p50 beside {base}", idle, 1, at_most=True)


def adapters(options: Options, home: Path) -> None:
    """The engine with 64 adapters that take turns, beside one merged adapter and `set_adapter` per request."""
    world, texts = world_of(home, options), news(256)
    world.add(64)
    ways = {"one merged adapter": ("merged", 1), "8 mixed": ("mixed", 8), "64 mixed": ("mixed", 64)}
    ways["peft, set_adapter per request, 64"] = ("set_adapter", 64)
    found: dict[tuple[str, str], list[float]] = {}
    with engines(world) as bare:
        for _ in range(options.rounds):
            for length in texts:
                for name, (way, count) in ways.items():
                    rate = bare.run(way, texts[length], count, options.seconds)
                    found.setdefault((name, length), []).append(rate)
    world.close()
    rate = {key: max(rounds) for key, rounds in found.items()}
    table = Table(title=f"Engine alone, {options.targets} r{options.rank}, {options.precision}: texts per CPU second")
    for column in ("", *texts):
        table.add_column(column, justify="right" if column else "left")
    for name in ways:
        table.add_row(name, *(f"{rate[name, length]:.1f}" for length in texts))
    console.print(table)
    for length, share in (("full", 0.85), ("short", 0.8)):
        merged, slow = rate["one merged adapter", length], rate["peft, set_adapter per request, 64", length]
        target(f"{length} texts, 64 mixed beside one merged", rate["64 mixed", length] / merged, share)
        target(f"{length} texts, 64 mixed beside set_adapter", rate["64 mixed", length] / slow, 10)


def log(options: Options, home: Path) -> None:
    """The service with its log of predictions and the same one without."""
    world, texts = world_of(home, options), news(256)
    world.add(8)
    names = {"recorded": "bento.service:AdapterService", "not recorded": "serving_unlogged:AdapterService"}
    found: dict[tuple[str, str], list[Figures]] = {}
    with ExitStack() as stack:
        servers = {name: ours(world, stack, name.replace(" ", "-"), target) for name, target in names.items()}
        sent = {length: requests_of(OURS, world.tasks, texts[length]) for length in texts}
        for one in servers.values():
            run_load(one.port, sent["short"], 8, 1.0)
        for number in range(max(3, options.rounds)):
            for length in texts:
                for name, one in servers.items():
                    figures = observe(one, sent[length], CLIENTS[-1], options.seconds, number * 37)
                    found.setdefault((name, length), []).append(figures)
    world.close()
    for length in texts:
        with_log, without = (best(found[name, length]) for name in names)
        console.print(f"{length} texts: {with_log.per_cpu:.1f} answers/cpu-s, {without.per_cpu:.1f} without the log")
        cost = 100 * (1 - with_log.per_cpu / without.per_cpu)
        target(f"{length} texts, cost of the log", cost, 10, at_most=True, unit=" %")


def load(options: Options, home: Path) -> None:
    """The first answer of a new adapter, and 1,000 adapters of which 64 stay in memory."""
    import random
    import time

    from bento.adapters import AdapterStore, BasePool, LakeAdapters

    world = World(home, targets="query,value", rank=8, precision=options.precision)
    world.add(64)
    bases = BasePool(threads=1)
    store = AdapterStore(LakeAdapters(world.lake), bases)
    digests = list(world.digests.values())
    store.get(digests[0], options.precision)  # the base model
    seconds = []
    for digest in digests[1:]:
        began = time.perf_counter()
        store.get(digest, options.precision)
        seconds.append(time.perf_counter() - began)
    middle = 1e3 * sorted(seconds)[len(seconds) // 2]
    target("read, verify and publish an adapter of the lake, median", middle, 10, at_most=True, unit=" ms")
    hot = store.nbytes
    world.add(MANY - len(world.tasks))
    with ExitStack() as stack:
        limit = max(1, round(hot / 2**20))
        one = ours(world, stack, variables={"FT_ADAPTER_MEMORY_MB": str(limit)})
        requests = requests_of(OURS, world.tasks, news(MANY)["short"])
        random.Random(0).shuffle(requests)
        memory: list[int] = []
        sent = 0
        while len(memory) < PASSES:
            run = run_load(one.port, requests, 8, options.seconds, sent)
            if run.failures:
                sys.exit(f"with {MANY} adapters: {run.failures[0]}")
            sent += len(run.answers)
            if sent >= MANY * (len(memory) + 1):
                memory.append(one.memory())
        console.print(
            f"{MANY} adapters registered, {limit} MB of them in memory, each asked {PASSES} times: RSS after each time "
            f"{' '.join(f'{one / 1e6:.0f}' for one in memory)} MB, no failure"
        )
        target("RSS at the end beside the second time", memory[-1] / memory[1], 1.05, at_most=True)
    world.close()


TABLES: dict[str, Callable[[Options, Path], None]] = {
    "classifier": classifier,
    "adapters": adapters,
    "log": log,
    "load": load,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help="which tables; default every one")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="of load in each round")
    parser.add_argument("--targets", default="all-linear", help="LoRA modules, with commas")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--precision", default="auto", choices=["auto", "int8", "bf16", "fp32"])
    parser.add_argument("--servers", nargs="*", default=[NAIVE, PLAIN, BATCHING], help="to be measured beside ours")
    given = parser.parse_args()
    options = Options(given.rounds, given.seconds, given.targets, given.rank, given.precision, given.servers)
    os.sched_setaffinity(0, {LOAD_CORE})
    for name in given.tables or TABLES:
        with tempfile.TemporaryDirectory(prefix="ft-serving-") as home:
            TABLES[name](options, Path(home))


if __name__ == "__main__":
    main()
