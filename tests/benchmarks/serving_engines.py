"""Engines without a server: reads questions, one JSON object a line, and answers each with texts per CPU second.

A process of its own, so that it stands on the servers' core beside them. The world it measures is in WORLD, a JSON
object {"tasks": {task: [digest, folder]}, "merged": [base folder, adapter folder], "precision": ...}.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)
BATCH = 64


class Engines:
    """What is measured; each is made when it is first asked for."""

    def __init__(self, world: dict[str, Any]) -> None:
        self.tasks: dict[str, tuple[str, str]] = world["tasks"]
        self.merged: tuple[str, str] = world["merged"]
        self.precision: str = world["precision"]

    @functools.cached_property
    def mixed(self) -> Any:
        """The service's engine with the adapters of all tasks."""
        from serving_world import BASE

        from bento.engine import Engine
        from ft_resources.base_models import resolve

        engine = Engine(resolve(BASE), self.precision, threads=1)
        for digest, folder in self.tasks.values():
            engine.load(digest, Path(folder))
        return engine

    @functools.cached_property
    def alone(self) -> Any:
        """The service's engine on a base into which one adapter was merged."""
        from bento.engine import Engine
        from ft_resources.base_models import resolve

        engine = Engine(resolve(self.merged[0]), self.precision, threads=1)
        engine.load("merged", Path(self.merged[1]))
        return engine

    @functools.cached_property
    def peft(self) -> Any:
        """transformers with all adapters in peft."""
        from serving_peers import PeftClassifier

        return PeftClassifier()

    def run(self, way: str, texts: Sequence[str], adapters: int, seconds: float) -> float:
        """Texts per CPU second.

        Args:
            way: `mixed`: batches of 64 texts, each tokenised as a request of its own, adapters take turns; `merged`;
                `set_adapter`: one text at a time.
            adapters: How many of them take turns.
        """
        tasks = list(self.tasks)[:adapters]
        batches = [texts[at : at + BATCH] for at in range(0, len(texts) - BATCH + 1, BATCH)]
        step: Callable[[Sequence[str]], object]
        if way == "set_adapter":
            from serving_peers import Item

            def step(batch: Sequence[str]) -> object:
                return [self.peft.predict(Item(task=tasks[at % adapters], text=one)) for at, one in enumerate(batch)]

        else:
            engine = self.mixed if way == "mixed" else self.alone
            digests = [self.tasks[task][0] for task in tasks] if way == "mixed" else ["merged"]
            loaded = [engine.adapter(digest) for digest in digests]

            def step(batch: Sequence[str]) -> object:
                encoded = [engine.encode([one], loaded[at % len(loaded)])[0] for at, one in enumerate(batch)]
                return engine.run(encoded)

        step(batches[0][:8])
        done, began = 0, time.process_time()
        while done == 0 or time.process_time() - began < seconds:
            batch = batches[(done // BATCH) % len(batches)]
            step(batch)
            done += len(batch)
        return done / (time.process_time() - began)


def main() -> None:
    engines = Engines(json.loads(os.environ["WORLD"]))
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(engines.run(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
