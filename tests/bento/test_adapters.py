"""Which adapters are in memory, in which precision, and how much they take."""

import random
from pathlib import Path
from typing import Any

import pytest

from bento.adapters import AdapterStore, BasePool, LakeAdapters
from bento.engine import Engine

TEXT = "Please find the invoice attached."


class Everywhere:
    """One folder under every digest."""

    def __init__(self, folder: Path) -> None:
        self.path = folder

    def folder(self, digest: str) -> Path:
        return self.path


def test_hundreds_of_adapters_take_turns_in_bounded_memory(workshop: Any, adapter_folders: dict[str, Path]) -> None:
    bases = BasePool([workshop.base], precision="fp32", device="cpu")
    source = Everywhere(adapter_folders["first"])
    engine, adapter = AdapterStore(source, bases).get("one")
    memory = 8 * adapter.nbytes
    store = AdapterStore(source, bases, memory)
    digests = [f"{number:064x}" for number in range(100)]
    chosen = random.Random(0)
    for _ in range(150):
        digest = chosen.choice(digests)
        _, got = store.get(digest)
        assert got.digest == digest
        assert store.nbytes <= memory
    assert len(store.loaded) == 8
    assert set(engine.loaded) == {"one", *store.loaded}


def test_an_adapter_larger_than_the_memory_is_served_alone(workshop: Any, adapter_folders: dict[str, Path]) -> None:
    bases = BasePool([workshop.base], precision="fp32", device="cpu")
    store = AdapterStore(Everywhere(adapter_folders["first"]), bases, memory=1)
    for digest in ("one", "two"):
        engine, adapter = store.get(digest)
        assert engine.score([(TEXT, digest)])[0].labels == adapter.manifest.labels
        assert store.loaded == (digest,)


def test_an_adapter_that_is_unloaded_while_it_is_loaded_is_loaded_again(
    world: Any, workshop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases = BasePool([workshop.base], precision="fp32", device="cpu")
    store = AdapterStore(LakeAdapters(world.lake), bases)
    engine, before = store.get(world.first)
    load, loads = engine.load, list[str]()

    def load_late(digest: str, folder: Path) -> Any:
        adapter = load(digest, folder)
        loads.append(digest)
        if len(loads) == 1:  # another thread makes room: the place of `auto`, which shares the engine, goes
            engine.unload(digest)
        return adapter

    monkeypatch.setattr(engine, "load", load_late)
    again, after = store.get(world.first, "fp32")
    assert again is engine and after is not before
    assert engine.adapter(world.first) is after
    assert len(loads) == 2


def test_each_precision_has_its_engine_and_auto_shares_what_it_stands_for(
    with_bf16: None, world: Any, workshop: Any
) -> None:
    bases = BasePool([workshop.base], precision="fp32", device="cpu")
    store = AdapterStore(LakeAdapters(world.lake), bases)
    exact, _ = store.get(world.first)
    half, _ = store.get(world.first, "bf16")
    assert isinstance(exact, Engine)
    assert (exact.precision, half.precision) == ("fp32", "bf16")
    assert store.get(world.first, "fp32")[0] is exact
    assert store.peek(world.second, "bf16") is None
    one, other = (engine.score([(TEXT, world.first)])[0] for engine in (exact, half))
    assert one.label == other.label
    assert one.confidence != other.confidence


def test_int8_falls_back_to_fp32_where_it_cannot_be_computed(
    with_int8: None, world: Any, workshop: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    bases = BasePool([workshop.base], device="cpu")
    fast, _ = AdapterStore(LakeAdapters(world.lake), bases).get(world.first, "int8")
    assert fast.precision == "int8"
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    slow, _ = AdapterStore(LakeAdapters(world.lake), bases).get(world.first, "int8")
    assert slow.precision == "fp32"
    assert "neither VNNI nor AMX" in caplog.text
