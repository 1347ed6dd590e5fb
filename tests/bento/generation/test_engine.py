import json
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bento.generation.adapters import GenerationAdapter
from bento.generation.engine import Generator
from bento.generation.interface import Completion, Sampling, TextGenerator
from bento.generation.scheduling import Request
from ft_resources.errors import RequestError, ServiceError
from tests.bento.generation.conftest import LORA, Tiny, write
from tests.bento.writers import while_a_model_loads

NAMES = (None, *LORA)
TEXT = "A house in the old town of Lund, 80 square metres, is for sale. " * 20


def prompt(generator: Generator, tokens: int, start: int = 0) -> list[int]:
    return generator.tokens(TEXT)[start : start + tokens]


def adapter(generator: Generator, name: str | None) -> GenerationAdapter | None:
    return generator.adapter(name) if name else None


def answered(request: Request) -> Completion:
    return request.future.result(60)


def text_of(generator: Generator, ids: list[int]) -> str:
    """As it is streamed: bytes that are no whole character at the end are left out."""
    return generator._prompts.tokenizer.decode(ids).rstrip("\N{REPLACEMENT CHARACTER}")


@pytest.fixture
def small(tiny: Tiny) -> Iterator[Callable[..., Generator]]:
    """Makes engines of one test, and closes them."""
    made: list[Generator] = []

    def make(**settings: Any) -> Generator:
        made.append(Generator(tiny.base, "fp32", **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_it_is_a_text_generator(generator: Generator) -> None:
    engine: TextGenerator = generator  # the type checker compares them
    assert engine.adapter("odd").nbytes == sum(
        tensor.nbytes for pair in generator.adapter("odd").updates.values() for tensor in pair
    )


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_greedy_answers_are_those_of_peft_alone_and_mixed(kind: str, make_tiny: Callable[[str], Tiny]) -> None:
    tiny = make_tiny(kind)
    engine = Generator(tiny.base, "fp32")
    for name, folder in tiny.adapters.items():
        engine.load(name, folder)
    # the longest prompt is read in several passes
    asked = [
        (name, prompt(engine, length, 3 * at))
        for at, (name, length) in enumerate(zip(NAMES, (5, 300, 1, 40, 70), strict=True))
    ]
    expected = [tiny.expected(name, ids, 24) for name, ids in asked]
    assert len({tuple(ids) for ids in expected}) == len(expected)
    mixed = [engine.submit(ids, adapter(engine, name), Sampling(max_tokens=24)) for name, ids in asked]
    for request, (name, ids), wanted in zip(mixed, asked, expected, strict=True):
        alone = answered(engine.submit(ids, adapter(engine, name), Sampling(max_tokens=24)))
        together = answered(request)
        assert together.text == alone.text == text_of(engine, wanted)
        assert together.completion_tokens == len(wanted)
        assert together.finish_reason == ("stop" if wanted[-1] == 0 else "length")
        assert together.mean_logprob == pytest.approx(alone.mean_logprob, abs=1e-4)
    engine.close()


def test_answers_do_not_depend_on_the_default_dtype(generator: Generator) -> None:
    asked = [
        (prompt(generator, 30, seed), adapter(generator, name), Sampling(12, temperature, top_p, seed=seed))
        for seed, (name, temperature, top_p) in enumerate(
            [(None, 0.0, 1.0), ("odd", 0.0, 1.0), ("everything", 1.0, 0.8)]
        )
    ]

    def answers() -> list[Completion]:
        return [answered(request) for request in [generator.submit(*one) for one in asked]]

    with while_a_model_loads():
        found, embedded = answers(), generator.embed(*asked[1][:2])
    assert found == answers()
    np.testing.assert_array_equal(embedded, generator.embed(*asked[1][:2]))


def test_answers_stay_the_same_while_others_join_and_leave(generator: Generator) -> None:
    chance = random.Random(5)
    asked = [
        (
            chance.choice(NAMES),
            prompt(generator, chance.randint(1, 200), chance.randint(0, 60)),
            Sampling(
                max_tokens=chance.randint(1, 40),
                temperature=chance.choice((0.0, 0.7, 1.3)),
                top_p=chance.choice((1.0, 0.8)),
                seed=number,
            ),
        )
        for number in range(40)
    ]
    alone = [answered(generator.submit(ids, adapter(generator, name), how)) for name, ids, how in asked]
    first = [generator.submit(ids, adapter(generator, name), how) for name, ids, how in asked[:20]]
    answered(first[3])
    more = [generator.submit(ids, adapter(generator, name), how) for name, ids, how in asked[20:]]
    given_up = [generator.submit(ids, adapter(generator, name), how) for name, ids, how in asked[::4]]
    for request in given_up:
        request.cancel()
    assert [answered(one).text for one in (*first, *more)] == [one.text for one in alone]


def test_the_seed_decides(generator: Generator) -> None:
    def sampled(seed: int | None) -> str:
        how = Sampling(max_tokens=30, temperature=1.5, seed=seed)
        return answered(generator.submit(prompt(generator, 20), generator.adapter("odd"), how)).text

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(5)}) == 5
    assert sampled(None) != sampled(None)


def test_pieces_make_up_the_text(generator: Generator) -> None:
    for seed in range(5):
        pieces: list[str] = []
        how = Sampling(max_tokens=60, temperature=1.0, seed=seed)
        done = answered(generator.submit(prompt(generator, 20), None, how, pieces.append))
        assert len(pieces) > 1
        assert "".join(pieces) == done.text


def test_a_stop_string_over_token_borders_ends_the_answer(generator: Generator) -> None:
    ids, name = prompt(generator, 40), generator.adapter("other")
    how = Sampling(max_tokens=60, temperature=1.0, seed=4)
    whole = answered(generator.submit(ids, name, how)).text
    at = next(at for at in range(10, 60) if whole[at : at + 4].isascii() and whole.find(whole[at : at + 4]) == at)
    stop = whole[at : at + 4]
    pieces: list[str] = []
    cut = Sampling(max_tokens=60, temperature=1.0, seed=4, stop=("never there", stop))
    done = answered(generator.submit(ids, name, cut, pieces.append))
    assert done.finish_reason == "stop"
    assert done.text == "".join(pieces) == whole[:at]


def test_cancelling_frees_the_slot(small: Callable[..., Generator]) -> None:
    engine = small(most_rows=1)
    begun = threading.Event()
    long = engine.submit(
        prompt(engine, 5), None, Sampling(max_tokens=400, temperature=1.0, seed=3), lambda _: begun.set()
    )
    assert begun.wait(60)
    waiting = engine.submit(prompt(engine, 5), None, Sampling(max_tokens=3))
    never = engine.submit(prompt(engine, 5), None, Sampling(max_tokens=400))
    never.cancel()
    long.cancel()
    assert answered(waiting).completion_tokens <= 3
    with pytest.raises(CancelledError):
        long.future.result(60)
    assert answered(engine.submit(prompt(engine, 5), None, Sampling(max_tokens=1))).completion_tokens == 1
    assert engine.waiting == 0


def test_requests_wait_for_memory_and_all_are_answered(small: Callable[..., Generator], generator: Generator) -> None:
    per_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes
    engine = small(cache_bytes=200 * per_token)
    asked = [prompt(engine, length) for length in (10, 100, 20, 30, 90, 40, 5, 60)]
    requests = [engine.submit(ids, None, Sampling(max_tokens=20)) for ids in asked]
    expected = [generator.submit(ids, None, Sampling(max_tokens=20)) for ids in asked]
    assert [answered(one).text for one in requests] == [answered(one).text for one in expected]
    assert 0 < engine.cache_bytes <= 200 * per_token
    assert engine.context == 128
    with pytest.raises(RequestError, match="more than the 128 tokens"):
        engine.submit(prompt(engine, 120), None, Sampling(max_tokens=20))


def test_what_has_no_room_is_refused(generator: Generator) -> None:
    with pytest.raises(RequestError, match="lower max_tokens") as refused:
        generator.submit(prompt(generator, 300), None, Sampling(max_tokens=213))
    assert refused.value.error_code == "input_too_large"
    assert answered(generator.submit(prompt(generator, 300), None, Sampling(max_tokens=212))).prompt_tokens == 300


@pytest.mark.parametrize(
    ("ids", "how"),
    [
        ([], Sampling()),
        ([1], Sampling(max_tokens=0)),
        ([1], Sampling(temperature=-1)),
        ([1], Sampling(top_p=0)),
        ([1], Sampling(json_schema={"type": "strin"})),
    ],
)
def test_impossible_requests_are_refused(generator: Generator, ids: list[int], how: Sampling) -> None:
    with pytest.raises(RequestError) as refused:
        generator.submit(ids, None, how)
    assert refused.value.error_code == "invalid_request"


def test_a_full_queue_refuses(small: Callable[..., Generator]) -> None:
    engine = small(most_rows=1, most_waiting=2)
    begun, go_on = threading.Event(), threading.Event()

    def hold(_: str) -> None:
        begun.set()
        go_on.wait(60)

    first = engine.submit(prompt(engine, 5), None, Sampling(max_tokens=50, temperature=1.0, seed=1), hold)
    assert begun.wait(60)
    waiting = [engine.submit(prompt(engine, 5), None, Sampling(max_tokens=2)) for _ in range(2)]
    with pytest.raises(RequestError, match="2 requests wait") as refused:
        engine.submit(prompt(engine, 5), None, Sampling(max_tokens=2))
    go_on.set()
    assert (refused.value.error_code, refused.value.status) == ("overloaded", 503)
    assert all(answered(one).completion_tokens for one in (first, *waiting))


def test_json_of_a_model_that_writes_rubbish_fits_its_schema(generator: Generator) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["house", "flat"]}, "rooms": {"type": "integer"}, "old": {"type": "boolean"}},
        "required": ["kind", "rooms", "old"],
        "additionalProperties": False,
    }
    ended = 0
    asked = [
        generator.submit(
            prompt(generator, 20, seed),
            adapter(generator, NAMES[seed % len(NAMES)]),
            Sampling(max_tokens=60, temperature=seed % 3, seed=seed, json_schema=schema),
        )
        for seed in range(30)
    ]
    for request in asked:
        done = answered(request)
        if done.finish_reason == "stop":
            ended += 1
            value = json.loads(done.text)
            assert list(value) == ["kind", "rooms", "old"]
            assert value["kind"] in ("house", "flat") and isinstance(value["rooms"], int)
            assert isinstance(value["old"], bool)
    assert ended > 5


def test_an_adapter_whose_output_is_not_finite_fails_alone(
    tiny: Tiny, small: Callable[..., Generator], tmp_path: Path
) -> None:
    folder = write(tmp_path / "huge", tiny.base, 9, LORA["everything"])
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: torch.full_like(tensor, 3e38) for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    engine = small()
    engine.load("huge", folder)
    engine.load("odd", tiny.adapters["odd"])
    expected = answered(engine.submit(prompt(engine, 30), engine.adapter("odd"), Sampling(max_tokens=20))).text
    how = Sampling(max_tokens=20)
    for bad in (how, Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.5)):  # later ones get its slots
        pair = [
            engine.submit(prompt(engine, 30), engine.adapter(name), one) for name, one in (("huge", bad), ("odd", how))
        ]
        with pytest.raises(ServiceError, match="not finite"):
            answered(pair[0])
        assert answered(pair[1]).text == expected


def test_a_callback_that_raises_fails_its_own_answer(generator: Generator) -> None:
    def broken(_: str) -> None:
        raise ValueError("connection lost")

    ids = prompt(generator, 10)
    bad = generator.submit(ids, None, Sampling(max_tokens=10), broken)
    good = generator.submit(ids, None, Sampling(max_tokens=10))
    with pytest.raises(ValueError, match="connection lost"):
        answered(bad)
    assert answered(good).completion_tokens


def test_unloading_spares_who_uses_it(tiny: Tiny, small: Callable[..., Generator]) -> None:
    engine = small()
    one = engine.load("a", tiny.adapters["attention"])
    assert engine.load("a", tiny.adapters["attention"]) is one
    request = engine.submit(prompt(engine, 30), one, Sampling(max_tokens=30))
    engine.unload("a")
    assert engine.loaded == ()
    with pytest.raises(ServiceError, match="not loaded"):
        engine.adapter("a")
    wanted = tiny.expected("attention", prompt(engine, 30), 30)
    assert answered(request).text == text_of(engine, wanted)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"base": {"model": "m", "digest": "0" * 64}}, "another base model"),
        ({"format": 2}, "format"),
        ({"type": "text-classification"}, "type"),
        ({"type": "extraction"}, "fields are declared"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_cannot_be_served_is_refused(
    tiny: Tiny, generator: Generator, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    folder = write(tmp_path / "bad", tiny.base, 1, LORA["attention"])
    about = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.json").write_text(json.dumps({**about, **change}))
    with pytest.raises(ServiceError, match=says):
        generator.load("bad", folder)
    assert "bad" not in generator.loaded


@pytest.mark.parametrize(("layer", "says"), [("x_proj", "no plain linear layer"), ("o_proj", "maps 32 to 16 values")])
def test_updates_that_do_not_fit_are_refused(
    tiny: Tiny, generator: Generator, tmp_path: Path, layer: str, says: str
) -> None:
    folder = write(tmp_path / "other", tiny.base, 1, {"r": 2, "target_modules": ["v_proj"]})
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("v_proj", layer): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    with pytest.raises(ServiceError, match=says):
        generator.load("other folder", folder)
    assert "other folder" not in generator.loaded


def test_embeddings_are_mean_states(tiny: Tiny, generator: Generator) -> None:
    texts = ["A house.", "Another, larger house in town."]
    running = generator.submit(
        prompt(generator, 30), generator.adapter("odd"), Sampling(max_tokens=100, temperature=1.0)
    )
    for name in (None, "everything"):
        chosen = adapter(generator, name)
        found = np.stack([generator.embed(generator.prompt_embedding(text, chosen), chosen) for text in texts])
        wanted = torch.stack([tiny.states(name, generator.tokens(text)).mean(0) for text in texts]).numpy()
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    answered(running)


@pytest.mark.parametrize(("part", "name"), [("_cache", "take"), ("_cache", "release"), ("_model", "logits")])
def test_a_fault_of_any_kind_fails_its_requests_and_no_later_ones(
    small: Callable[..., Generator], monkeypatch: pytest.MonkeyPatch, part: str, name: str
) -> None:
    engine = small()
    how = Sampling(max_tokens=5)
    expected = answered(engine.submit(prompt(engine, 10), None, how)).text

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("a fault")

    with monkeypatch.context() as patched:
        patched.setattr(getattr(engine, part), name, broken)
        request = engine.submit(prompt(engine, 10), None, how)
        if name == "release":  # the answer is there by then
            answered(request)
            request = engine.submit(prompt(engine, 10), None, how)
            wait([request.future], 60)
        else:
            with pytest.raises(ServiceError, match="could not be computed"):
                answered(request)
    assert answered(engine.submit(prompt(engine, 10), None, how)).text == expected
    assert engine.alive


def test_tasks_take_turns(tiny: Tiny, small: Callable[..., Generator]) -> None:
    engine = small(most_rows=1)
    for name in ("odd", "other"):
        engine.load(name, tiny.adapters[name])
    first = engine.submit(prompt(engine, 10), None, Sampling(max_tokens=200, temperature=1.0, seed=1))
    order = list[str]()
    later = []
    for name in ("odd", "odd", "odd", "other"):
        request = engine.submit(prompt(engine, 10), engine.adapter(name), Sampling(max_tokens=2))
        request.future.add_done_callback(lambda _, name=name: order.append(name))
        later.append(request)
    assert not first.future.done(), "the others were to wait for it"
    for request in later:
        answered(request)
    assert order == ["odd", "other", "odd", "odd"]


def test_who_was_given_up_takes_no_place_in_the_queue(small: Callable[..., Generator]) -> None:
    engine = small(most_rows=1, most_waiting=2)
    how = Sampling(max_tokens=400, temperature=1.0, seed=1)
    running = engine.submit(prompt(engine, 10), None, how)
    while not engine.running:
        assert not running.future.done()
    waiting = [engine.submit(prompt(engine, 10), None, how) for _ in range(2)]
    with pytest.raises(RequestError, match="wait already"):
        engine.submit(prompt(engine, 10), None, how)
    for request in waiting:
        request.cancel()
    last = engine.submit(prompt(engine, 10), None, Sampling(max_tokens=2))
    running.cancel()
    assert answered(last).completion_tokens


def test_closing_fails_what_was_not_answered(tiny: Tiny) -> None:
    engine = Generator(tiny.base, "fp32", most_rows=2)
    requests = [
        engine.submit(prompt(engine, 10), None, Sampling(max_tokens=400, temperature=1.0, seed=seed))
        for seed in range(6)
    ]
    engine.close()
    done = wait([one.future for one in requests], 60)
    assert not done.not_done
    assert any(isinstance(one.future.exception(), ServiceError) for one in requests)
    with pytest.raises(ServiceError, match="closed"):
        engine.submit([1], None, Sampling())
