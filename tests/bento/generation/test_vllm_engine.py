"""What vLLM is given, the refusals, and, where it is installed, that it answers as the torch engine does."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from bento.conversation import Field, answer_schema, parse_answer
from bento.generation.engine import Generator
from bento.generation.interface import Completion, Sampling, TextGenerator
from bento.generation.vllm_engine import VllmGenerator, hand_over
from ft_resources.errors import RequestError, ServiceError
from tests.bento.generation.conftest import LORA, Tiny, loaded, write
from tests.bento.servers import end, start
from tests.bento.writers import write_adapter

NAMES = (None, *LORA)
TEXT = "A house in the old town of Lund, 80 square metres, is for sale. " * 20
FIELDS = {"kind": Field(type="string", enum=["house", "flat"]), "rooms": Field(type="integer", enum=[1, 2, 3])}


def test_the_folder_is_one_that_plain_peft_loads(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.adapters["attention"]
    monkeypatch.chdir(folder.parent)
    given = hand_over("d" * 64, Path(folder.name), tiny.base, 7)
    assert (given.digest, given.number, given.folder) == ("d" * 64, 7, folder)
    assert given.manifest.task == "attention"
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.base.path)
    loaded = PeftModel.from_pretrained(model, str(given.folder))
    weights = sum(tensor.numel() for name, tensor in loaded.named_parameters() if "lora" in name)
    assert given.nbytes == 2 * weights


def test_what_vllm_cannot_serve_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = write(tmp_path / "wide", tiny.base, 1, {"r": 65, "target_modules": ["q_proj"]})
    with pytest.raises(ServiceError, match="rank is 65"):
        hand_over("d", folder, tiny.base, 1)


def test_without_vllm_it_says_what_to_do(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vllm", "vllm.platforms"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ServiceError, match=r"not installed.*pip install.*FT_GENERATION_ENGINE=torch"):
        VllmGenerator(tiny.base)


@pytest.mark.parametrize(
    ("found", "wanted", "says"),
    [("", "", "needs a CUDA GPU, and there is none"), ("cpu", "cuda", "computes on cpu, not on cuda")],
)
def test_a_device_that_vllm_does_not_compute_on_is_refused(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, found: str, wanted: str, says: str
) -> None:
    platforms = SimpleNamespace(current_platform=SimpleNamespace(device_type=found))
    fake: dict[str, Any] = {name: SimpleNamespace() for name in ("vllm", "vllm.v1", "vllm.v1.engine")}
    fake |= {"vllm.platforms": platforms, "vllm.v1.engine.async_llm": SimpleNamespace(AsyncLLM=None)}
    for name, module in fake.items():  # stands for builds of vLLM that are not here
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ServiceError, match=f"{says}.*FT_GENERATION_ENGINE=torch"):
        VllmGenerator(tiny.base, device=wanted)


@pytest.fixture(scope="module")
def wide(make_tiny: Callable[[str], Tiny]) -> Tiny:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    return make_tiny("wide")


@pytest.fixture(scope="module")
def vllm(wide: Tiny) -> Iterator[VllmGenerator]:
    """vLLM in fp32 with all adapters loaded, each under its name."""
    yield from loaded(VllmGenerator, wide)


@pytest.fixture(scope="module")
def torch_engine(wide: Tiny) -> Iterator[Generator]:
    yield from loaded(Generator, wide)


def prompt(engine: TextGenerator, tokens: int, first: int = 0) -> list[int]:
    return engine.tokens(TEXT)[first : first + tokens]


def asked(engine: TextGenerator, requests: list[tuple[str | None, list[int], Sampling]]) -> list[Completion]:
    """Answers to requests that come at once."""
    given = [engine.submit(ids, engine.adapter(name) if name else None, how) for name, ids, how in requests]
    return [one.future.result(120) for one in given]


def same(one: Completion, other: Completion) -> bool:
    facts = ("text", "finish_reason", "prompt_tokens", "completion_tokens", "token_ids")
    return all(getattr(one, fact) == getattr(other, fact) for fact in facts)


def unfinished(engine: VllmGenerator) -> int:
    return int(engine._engine.get_num_unfinished_requests())


def test_greedy_answers_are_those_of_peft_alone_and_mixed(
    wide: Tiny, vllm: VllmGenerator, torch_engine: Generator
) -> None:
    requests = [
        (name, prompt(vllm, length, 3 * at), Sampling(max_tokens=24))
        for at, (name, length) in enumerate(zip(NAMES, (5, 300, 1, 40, 70), strict=True))
    ]
    expected = [wide.expected(name, ids, 24) for name, ids, _ in requests]
    assert len({tuple(ids) for ids in expected}) == len(expected)
    mixed, known = asked(vllm, requests), asked(torch_engine, requests)
    for request, together, reference, wanted in zip(requests, mixed, known, expected, strict=True):
        (alone,) = asked(vllm, [request])
        assert list(together.token_ids) == wanted
        assert same(together, alone) and same(together, reference)
        assert together.mean_logprob == pytest.approx(reference.mean_logprob, abs=1e-4)


def test_the_seed_decides(vllm: VllmGenerator) -> None:
    ids = prompt(vllm, 30)
    how = [Sampling(max_tokens=20, temperature=1.0, seed=seed) for seed in (1, 2, 1)]
    first, other, again = asked(vllm, [("odd", ids, each) for each in how])
    assert first.text == again.text != other.text
    assert asked(vllm, [("odd", ids, how[0])])[0].text == first.text
    nucleus = Sampling(max_tokens=20, temperature=1.0, top_p=1e-6, seed=1)
    assert same(*asked(vllm, [("odd", ids, nucleus), ("odd", ids, Sampling(max_tokens=20))]))


def test_answers_end_and_are_streamed_as_those_of_the_torch_engine(
    vllm: VllmGenerator, torch_engine: Generator
) -> None:
    ids = prompt(vllm, 40)
    (whole,) = asked(torch_engine, [("everything", ids, Sampling(max_tokens=60))])
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 3]
    for how in (Sampling(max_tokens=7), Sampling(max_tokens=60, stop=(stop, "never said")), Sampling(max_tokens=1)):
        pieces: list[str] = []
        streamed = vllm.submit(ids, vllm.adapter("everything"), how, pieces.append).future.result(60)
        (reference,) = asked(torch_engine, [("everything", ids, how)])
        assert same(streamed, reference)
        assert "".join(pieces) == streamed.text
        assert not how.stop or (streamed.finish_reason == "stop" and stop not in streamed.text and len(pieces) > 1)
    asked(vllm, [(None, ids, Sampling(max_tokens=1))])
    assert unfinished(vllm) == 0, "one that was stopped goes on"


def test_json_of_a_model_that_writes_rubbish_fits_its_schema(vllm: VllmGenerator, torch_engine: Generator) -> None:
    schemas = [answer_schema(FIELDS), {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3, "minItems": 1}]
    for schema in schemas:
        greedy = Sampling(max_tokens=300, json_schema=schema)
        requests = [("odd", prompt(vllm, 30), greedy), (None, prompt(vllm, 9), greedy)]
        for found, wanted in zip(asked(vllm, requests), asked(torch_engine, requests), strict=True):
            assert same(found, wanted)
    drawn = [
        ("odd", prompt(vllm, 30), Sampling(max_tokens=300, temperature=1.5, seed=seed, json_schema=schemas[0]))
        for seed in range(6)
    ]
    for answer in asked(vllm, drawn):
        assert answer.finish_reason == "stop"
        assert list(parse_answer(answer.text, FIELDS)) == list(FIELDS)
        assert answer.text == json.dumps(json.loads(answer.text), separators=(",", ":"))
    with pytest.raises(RequestError, match="cannot be followed"):
        vllm.prepare(Sampling(json_schema={"type": "strin"}))


def test_who_gives_up_leaves(vllm: VllmGenerator) -> None:
    came: list[str] = []
    given = vllm.submit(prompt(vllm, 10), None, Sampling(max_tokens=400, temperature=1.0, seed=1), came.append)
    while not came:
        assert not given.future.done()
    given.cancel()
    with pytest.raises(CancelledError):
        given.future.result(60)
    known = len(came)
    (answer,) = asked(vllm, [("odd", prompt(vllm, 10), Sampling(max_tokens=5))])
    assert answer.completion_tokens and unfinished(vllm) == 0
    assert len(came) == known


def test_a_callback_that_raises_fails_its_own_answer(vllm: VllmGenerator) -> None:
    def broken(_: str) -> None:
        raise ValueError("connection lost")

    bad = vllm.submit(prompt(vllm, 10), None, Sampling(max_tokens=40), broken)
    good = vllm.submit(prompt(vllm, 10), None, Sampling(max_tokens=10))
    with pytest.raises(ValueError, match="connection lost"):
        bad.future.result(60)
    assert good.future.result(60).completion_tokens == 10


def test_what_has_no_room_is_refused(vllm: VllmGenerator) -> None:
    assert vllm.context == 512
    with pytest.raises(RequestError, match="512 tokens there is room for"):
        vllm.submit(prompt(vllm, 400), None, Sampling(max_tokens=200))
    with pytest.raises(RequestError, match="no embeddings"):
        vllm.prompt_embedding("A house", None)


def test_unloading_spares_who_uses_it(wide: Tiny, vllm: VllmGenerator, tmp_path: Path) -> None:
    folder = write(tmp_path / "new", wide.base, 9, LORA["attention"])
    one = vllm.load("new", folder)
    assert vllm.load("new", folder) is one
    ids, how = prompt(vllm, 30), Sampling(max_tokens=30)
    (before,) = asked(vllm, [("new", ids, how)])
    running = [vllm.submit(ids, one, how) for _ in range(2)]
    vllm.unload("new")
    with pytest.raises(ServiceError, match="not loaded"):
        vllm.adapter("new")
    assert [request.future.result(60).text for request in running] == [before.text] * 2
    again = vllm.load("new", folder)
    assert again.number > one.number
    assert same(asked(vllm, [("new", ids, how)])[0], before)
    held = vllm._wait(vllm._engine.list_loras())
    assert again.number in held and one.number not in held
    vllm.unload("new")


@pytest.mark.parametrize("layer", ["x_proj", "o_proj"])
def test_updates_that_do_not_fit_are_refused(wide: Tiny, vllm: VllmGenerator, tmp_path: Path, layer: str) -> None:
    folder = write(tmp_path / "other", wide.base, 1, {"r": 2, "target_modules": ["v_proj"]})
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("v_proj", layer): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    with pytest.raises(ServiceError, match="vLLM"):
        vllm.load("other folder", folder)
    with pytest.raises(ServiceError, match="not loaded"):
        vllm.adapter("other folder")
    assert vllm.alive
    (answer,) = asked(vllm, [("odd", prompt(vllm, 10), Sampling(max_tokens=5))])
    assert answer.completion_tokens == 5


def test_an_adapter_that_is_not_finite_fails_its_own_answers(wide: Tiny, vllm: VllmGenerator, tmp_path: Path) -> None:
    folder = write(tmp_path / "huge", wide.base, 1, LORA["attention"])
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: torch.full_like(one, 3e38) for name, one in tensors.items()}, folder / "adapter_model.safetensors")
    ids, how = prompt(vllm, 30), Sampling(max_tokens=10)
    (expected,) = asked(vllm, [("odd", ids, how)])
    bad = vllm.submit(ids, vllm.load("huge", folder), how)
    (good,) = asked(vllm, [("odd", ids, how)])
    with pytest.raises(ServiceError, match="not finite"):
        bad.future.result(60)
    assert same(good, expected)
    vllm.unload("huge")


def test_it_ends_with_all_its_processes(wide: Tiny) -> None:
    before = set(psutil.Process().children(recursive=True))
    engine = VllmGenerator(wide.base, "fp32", threads=1)
    mine = [
        one for one in set(psutil.Process().children(recursive=True)) - before if "tracker" not in str(one.cmdline())
    ]
    assert len(mine) >= 2
    how = [Sampling(max_tokens=400, temperature=1.0, seed=seed) for seed in range(3)]
    running = [engine.submit(prompt(engine, 10), None, each) for each in how]
    engine.close()
    assert not wait([one.future for one in running], 60).not_done
    assert all(isinstance(one.future.exception(), ServiceError) for one in running)
    assert not engine.alive
    with pytest.raises(ServiceError, match="closed"):
        engine.submit([1], None, Sampling())
    assert not psutil.wait_procs(mine, timeout=30)[1]


def test_its_processes_end_with_one_that_is_killed(wide: Tiny) -> None:
    lines = [
        "import os, psutil",
        "from bento.generation.vllm_engine import VllmGenerator",
        "from ft_resources.base_models import resolve",
        f"engine = VllmGenerator(resolve({str(wide.base.path)!r}), 'fp32', threads=1)",
        "print('started', *[one.pid for one in psutil.Process().children(recursive=True)])",
        "os.kill(os.getpid(), 9)",
    ]
    done = subprocess.run(
        [sys.executable, "-u", "-c", "\n".join(lines)], check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-4000:]
    (told,) = [line for line in done.stdout.splitlines() if line.startswith("started")]
    _, *numbers = told.split()
    assert len(numbers) >= 3
    left = [psutil.Process(int(number)) for number in numbers if psutil.pid_exists(int(number))]
    assert not psutil.wait_procs(left, timeout=60)[1]


def test_when_its_process_dies_its_requests_fail(wide: Tiny) -> None:
    before = set(psutil.Process().children(recursive=True))
    engine = VllmGenerator(wide.base, "fp32", threads=1)
    (core,) = [one for one in set(psutil.Process().children()) - before if "EngineCore" in " ".join(one.cmdline())]
    drawn = Sampling(max_tokens=400, temperature=1.0, seed=1)
    core.send_signal(signal.SIGTERM)  # as a supervisor does, while there is still something to answer
    assert engine.submit(prompt(engine, 10), None, drawn).future.result(60).text
    came: list[str] = []
    running = engine.submit(prompt(engine, 10), None, drawn, came.append)
    while not came:
        assert not running.future.done()
    core.send_signal(signal.SIGKILL)
    with pytest.raises(ServiceError, match="vLLM failed"):
        running.future.result(60)
    assert not engine.alive
    with pytest.raises(ServiceError, match="vLLM failed"):
        engine.submit(prompt(engine, 10), None, Sampling()).future.result(60)
    engine.close()


def test_a_service_answers_with_it_and_leaves_nothing_behind(wide: Tiny, make_world: Any, tmp_path: Path) -> None:
    world = make_world(tmp_path / "home")
    for task, extraction in (("chat", False), ("read", True)):
        folder = write_adapter(tmp_path / task, str(wide.base.path), task=task, seed=len(task), extraction=extraction)
        world.release(task, world.lake.publish("adapter", folder, {"name": task}).digest, "1")
    world.ledger.close()
    chat = {"model": "chat", "messages": [{"role": "user", "content": "What is for sale?"}], "max_tokens": 400}
    told = []
    for engine in ("torch", "vllm"):
        server = start(tmp_path / "home", FT_GENERATION_ENGINE=engine)
        try:
            family = psutil.Process(server.process.pid).children(recursive=True)
            assert any("EngineCore" in str(one.cmdline()) for one in family) == (engine == "vllm")
            read = server.ask(task="read", inputs=["A house with 2 rooms."]).json()["results"][0]["fields"]
            whole = server.ask("/v1/chat/completions", **chat).json()["choices"][0]["message"]["content"]
            told.append(read)
            with server.client.stream("POST", "/v1/chat/completions", json={**chat, "stream": True}) as lines:
                rest = lines.iter_lines()
                came = [next(rest)]
                server.signal(signal.SIGTERM)  # what is on its way is answered
                came += rest
            pieces = [json.loads(one[6:])["choices"][0]["delta"] for one in came if one[6:7] == "{"]
            assert "".join(one.get("content") or "" for one in pieces) == whole
            assert server.process.wait(60) == 0
            assert not psutil.wait_procs(family, timeout=60)[1]
        finally:
            end(server)
    assert told[0] == told[1]
