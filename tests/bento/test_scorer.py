"""The path without HTTP, over a real lake and ledger: routes, adapters, log, a release that lies beside the service."""

import json
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bento.adapters import AdapterStore, BakedAdapter, BasePool, LakeAdapters
from bento.protocol import FeedbackRequest
from bento.route_watcher import Routes, RouteWatcher
from bento.routing import read_baked
from bento.scorer import Scorer
from ft_resources.errors import ArtefactError, RequestError, ServiceError
from ft_resources.files import file_hashes
from ft_resources.lake import Lake
from ft_resources.ledger import Ledger

TEXT = "Please find the invoice attached."


@pytest.fixture(scope="module")
def bases(workshop: Any) -> BasePool:
    return BasePool([workshop.base], precision="fp32", device="cpu")


@pytest.fixture
def scorer(world: Any, bases: BasePool) -> Iterator[Scorer]:
    store = AdapterStore(LakeAdapters(world.lake), bases)
    yield Scorer(Routes(world.ledger, store), store, bases, world.ledger)
    for digest in store.loaded:
        store.get(digest)[0].unload(digest)


def test_an_answer_is_recorded_as_it_was_given(world: Any, scorer: Scorer) -> None:
    release = world.release("t1", world.first, "1")
    at = datetime(2024, 5, 1, 12, tzinfo=UTC)
    given = scorer.predict("t1", [TEXT, "Win a prize"], user="ann", event_time=at, trace_id="trace-0001")
    stored = world.stored()
    assert len(stored) == 2
    for prediction in given:
        row = stored[prediction.prediction_id]
        assert (row["task"], row["release_id"], row["adapter"]) == ("t1", release, world.first)
        assert (row["input"], row["label"], row["caller"]) == (prediction.input, prediction.label, "ann")
        assert (row["model_version"], row["trace_id"]) == ("1", "trace-0001")
        assert json.loads(row["probabilities"]) == prediction.probabilities
        assert row["event_time"].startswith("2024-05-01 12:00")
        assert row["confidence"] == max(prediction.probabilities.values())
        np.testing.assert_array_equal(np.frombuffer(row["embedding"], np.float16), prediction.embedding)


def test_a_changed_route_is_followed_at_the_next_request(world: Any, scorer: Scorer) -> None:
    world.release("t1", world.first, "1")
    assert scorer.predict("t1", [TEXT])[0].adapter == world.first
    world.release("t1", world.second, "2")
    assert scorer.predict("t1", [TEXT])[0].adapter == world.second
    assert scorer.predict("t1", [TEXT], model_version="1")[0].adapter == world.first
    assert scorer.predict("t1", [TEXT], model_version=world.first[:8])[0].model_version == "1"
    world.release("t1", world.first, "1", kind="rollback")
    assert scorer.predict("t1", [TEXT])[0].adapter == world.first


def test_a_damaged_adapter_leaves_the_old_route_and_is_tried_again(world: Any, scorer: Scorer, damaged: str) -> None:
    world.release("t1", world.first, "1")
    scorer.predict("t1", [TEXT])
    world.release("t1", damaged, "2")
    assert scorer.predict("t1", [TEXT])[0].adapter == world.first
    assert "damaged" in scorer.routes.errors["t1"]
    assert scorer.routes.ready
    with pytest.raises(ArtefactError):
        scorer.store.get(damaged)
    world.release("t2", world.other, "1")
    assert scorer.predict("t2", [TEXT])[0].adapter == world.other, "other tasks move on"
    world.release("t1", world.second, "3")
    assert scorer.predict("t1", [TEXT])[0].adapter == world.second
    assert scorer.routes.errors == {}


def test_a_task_whose_only_adapter_is_damaged_is_not_ready(world: Any, scorer: Scorer, damaged: str) -> None:
    world.release("t1", damaged, "1")
    with pytest.raises(RequestError) as caught:
        scorer.predict("t1", [TEXT])
    assert caught.value.error_code == "not_ready"
    assert not scorer.routes.ready


def test_a_failing_route_is_tried_again_after_growing_pauses(world: Any, bases: BasePool, damaged: str) -> None:
    tries: list[float] = []
    now = 0.0

    class Counted(LakeAdapters):
        def folder(self, digest: str) -> Path:
            tries.append(now)
            return super().folder(digest)

    store = AdapterStore(Counted(world.lake), bases)
    routes = Routes(world.ledger, store, clock=lambda: now)
    world.release("t1", damaged, "1")
    for step in range(1000):
        now = step / 10
        routes.refresh()
    pauses = np.diff(tries)
    assert tries[0] == 0.0
    np.testing.assert_allclose(pauses, [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30], atol=0.11)


def test_what_cannot_be_recorded_is_not_answered(world: Any, scorer: Scorer) -> None:
    world.release("t1", world.first, "1")
    scorer.predict("t1", [TEXT])
    before = world.stored()
    with sqlite3.connect(world.home / "ledger.db") as connection:
        connection.execute("ALTER TABLE predictions RENAME TO elsewhere")
    with pytest.raises(RequestError) as caught:
        scorer.predict("t1", [TEXT])
    assert (caught.value.error_code, caught.value.status) == ("log_unavailable", 503)
    with sqlite3.connect(world.home / "ledger.db") as connection:
        connection.execute("ALTER TABLE elsewhere RENAME TO predictions")
    assert world.stored() == before
    assert scorer.predict("t1", [TEXT])[0].prediction_id in world.stored()


def test_the_least_recently_used_adapter_goes(world: Any, bases: BasePool) -> None:
    wide = AdapterStore(LakeAdapters(world.lake), bases)
    for digest in (world.first, world.second):
        wide.get(digest)
    store = AdapterStore(LakeAdapters(world.lake), bases, memory=wide.nbytes)
    engine, _ = store.get(world.first)
    store.get(world.second)
    store.get(world.first)
    store.get(world.other)
    assert store.loaded == (world.first, world.other)
    assert set(engine.loaded) == {world.first, world.other}
    assert store.peek(world.second) is None
    store.get(world.second)
    assert store.loaded == (world.other, world.second)
    for digest in store.loaded:
        engine.unload(digest)


def test_many_threads_share_few_places(world: Any, workshop: Any, bases: BasePool) -> None:
    store = AdapterStore(LakeAdapters(world.lake), bases, memory=1)
    digests = [world.first, world.second, world.other]
    expected = {}
    for digest in digests:
        engine, adapter = store.get(digest)
        expected[digest] = engine.run(engine.encode([TEXT], adapter))[0].probabilities
    wrong: list[str] = []

    def work(offset: int) -> None:
        for turn in range(12):
            digest = digests[(offset + turn) % 3]
            engine, adapter = store.get(digest)
            got = engine.run(engine.encode([TEXT], adapter))[0].probabilities
            if not np.allclose(got, expected[digest], atol=1e-5):
                wrong.append(digest)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(store.loaded) == 1
    engine.unload(store.loaded[0])


def test_a_bad_request_is_refused_before_any_work(world: Any, scorer: Scorer) -> None:
    world.release("t1", world.first, "1")
    refused = {"invalid_request": ([], [" "], ["a\0b"], ["\ud800"]), "input_too_large": (["x" * 100_001], ["x"] * 257)}
    for code, requests in refused.items():
        for inputs in requests:
            with pytest.raises(RequestError) as caught:
                scorer.predict("t1", inputs)
            assert caught.value.error_code == code
    assert world.stored() == {}


def test_the_watcher_follows_until_it_is_stopped(world: Any, scorer: Scorer) -> None:
    looked = threading.Semaphore(0)
    watcher = RouteWatcher(scorer.routes, every=0.01, after=looked.release)
    watcher.start()
    world.release("t2", world.other, "1")
    for _ in range(3):  # the look that was under way, the one that sees the release, and one more
        assert looked.acquire(timeout=20)
    assert scorer.table.route("t2").entries[0].adapter == world.other
    watcher.stop()
    assert not watcher.alive


def test_a_release_beside_the_service_answers_alone(
    world: Any, workshop: Any, adapter_folders: dict[str, Path], tmp_path: Path
) -> None:
    root = tmp_path / "src"
    shutil.copytree(adapter_folders["first"], root / "models" / "adapter")
    (root / "models").mkdir(exist_ok=True)
    (root / "models" / "base").symlink_to(workshop.base.path)
    release = {"task": "t1", "release_id": "rel-baked", "model_version": "7", "adapter": world.first, "base": "gone"}
    release |= {"files": file_hashes(root / "models" / "adapter"), "review_below": 1}
    (root / "release.json").write_text(json.dumps(release))
    empty = tmp_path / "empty"
    ledger = Ledger(f"sqlite:///{empty / 'ledger.db'}")
    scorer = Scorer.open(Lake(empty / "lake"), ledger, baked=root, precision="fp32", device="cpu")
    (prediction,) = scorer.predict("t1", [TEXT])
    assert (prediction.release_id, prediction.model_version) == ("rel-baked", "7")
    assert prediction.decision == "review"
    assert ledger.prediction(prediction.prediction_id)["adapter"] == world.first
    assert scorer.predict("t1", [TEXT], model_version="7")[0].adapter == world.first
    ledger.close()
    live = Scorer.open(world.lake, world.ledger, baked=root, precision="fp32", device="cpu")
    live_release = world.release("t1", world.second, "8")
    assert live.predict("t1", [TEXT])[0].release_id == live_release, "a route in the ledger wins"
    head = root / "models" / "adapter" / "head.safetensors"
    head.write_bytes(head.read_bytes()[:-1] + b"x")
    baked = read_baked(root)
    assert baked is not None
    with pytest.raises(ServiceError, match=r"not the one that was built in: head\.safetensors"):
        BakedAdapter(baked, LakeAdapters(world.lake)).folder(world.first)


def test_a_text_for_an_answer_whose_adapter_is_gone_is_refused_typed(world: Any, scorer: Scorer) -> None:
    world.release("t1", world.first, "1")
    (prediction,) = scorer.predict("t1", [TEXT])
    row = world.ledger.prediction(prediction.prediction_id)
    world.ledger.log_predictions([row | {"id": "written", "output": "a text", "adapter": "f" * 64, "release_id": "r"}])
    with pytest.raises(RequestError) as caught:
        scorer.feedback(FeedbackRequest(prediction_id="written", text="another text"))
    assert (caught.value.error_code, caught.value.status) == ("not_ready", 503)
