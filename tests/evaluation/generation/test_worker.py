"""Asking the serving engine and plain peft about the same rows, on a tiny decoder with random adapters."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from bento.conversation import Field, dump
from bento.devices import served_in
from bento.generation.interface import Sampling
from ft_assets.evaluation.generation.asking import REFUSED, Question, ask, ask_alone
from ft_assets.evaluation.generation.plain import BASE, PlainModel
from ft_assets.evaluation.generation.worker import Side, _agreement, _forgetting
from ft_resources.base_models import resolve
from ft_resources.lake import Artefact, Lake
from tests.graph.small_texts import tiny_chat

FIELDS = {"weather": Field(type="string", enum=["cold", "warm"]), "windy": Field(type="boolean")}
TEXTS = [f"How is it: {words}?" for words in ("ice snow", "sun beach at the river", "storm", "fire lava summer desert")]
SHORT = Sampling(max_tokens=24)


def adapter(lake: Lake, base: Path, folder: Path, kind: str, seed: int) -> Artefact:
    """An adapter whose weights are random and large enough to change what is written."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    about = {
        "format": 1,
        "task": "small",
        "type": kind,
        "base": {"model": str(base), "digest": resolve(str(base)).digest},
        "max_tokens": 160,
        "fields": {name: one.model_dump() for name, one in FIELDS.items()} if kind == "extraction" else {},
        "instruction": "",
    }
    (folder / "adapter.json").write_text(json.dumps(about))
    return lake.publish("adapter", folder, {"seed": seed, "type": kind})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artefact]:
    root = tmp_path_factory.mktemp("adapters")
    lake = Lake(str(root / "lake"))
    kinds = {"candidate": "text-generation", "other": "text-generation", "fields": "extraction"}
    return {name: adapter(lake, base, root / name, kind, seed) for seed, (name, kind) in enumerate(kinds.items())}


@pytest.fixture(scope="module")
def side(base: Path, made: dict[str, Artefact]) -> Iterator[Side]:
    side = Side(str(base), made)
    yield side
    side.engine.close()


@pytest.fixture(scope="module")
def question() -> Question:
    return Question("text-generation", {}, "", [dump([{"role": "user", "content": text}]) for text in TEXTS])


def test_answers_come_in_the_order_of_the_prompts_and_alone_as_among_others(side: Side, question: Question) -> None:
    chosen = side.loaded["candidate"]
    prompts = question.prompts(side.engine, chosen)
    together = ask(side.engine, chosen, prompts * 12, SHORT)  # more than are asked at once
    latency, alone = ask_alone(side.engine, chosen, prompts, SHORT)
    for place, answer in enumerate(together):
        assert answer.text[:4] == alone[place % len(prompts)].text[:4]
    assert len({answer.text for answer in alone}) > 1
    assert latency.requests == len(prompts)
    assert 0 < latency.first_token_p50_ms <= latency.first_token_p95_ms
    assert latency.tokens_per_second > 0


@pytest.mark.parametrize("released", ["bf16", "fp32"])
def test_a_side_computes_in_what_its_adapters_were_released_in(
    base: Path, made: dict[str, Artefact], question: Question, released: str
) -> None:
    side = Side(str(base), {"champion": made["other"]}, released)
    try:
        assert side.precision == side.engine.precision == served_in(released, torch.device("cpu"))
        prompts = question.prompts(side.engine, side.loaded["champion"])
        assert len(ask(side.engine, side.loaded["champion"], prompts, SHORT)) == len(prompts)
    finally:
        side.engine.close()


def test_a_prompt_that_is_too_long_is_answered_by_nothing(side: Side) -> None:
    prompts = [[5] * 2000, [5, 6, 7]]
    answers = ask(side.engine, None, prompts, SHORT)
    assert (answers[0].text, answers[0].finish) == ("", REFUSED)
    assert answers[1].finish != REFUSED
    latency, alone = ask_alone(side.engine, None, prompts, SHORT)
    assert latency.requests == 1
    assert [one.finish == REFUSED for one in alone] == [True, False]


def test_an_extraction_is_asked_with_its_schema_as_the_service_asks(side: Side) -> None:
    chosen = side.loaded["fields"]
    asked = Question("extraction", FIELDS, "", ["ice snow storm", "sun"])
    answers = ask(side.engine, chosen, asked.prompts(side.engine, chosen), asked.sampling(chosen))
    for answer in answers:
        assert answer.finish == "length" or set(json.loads(answer.text)) == set(FIELDS)
    # the base model is asked in the same words
    assert asked.prompts(side.engine, None) == asked.prompts(side.engine, chosen)
    assert asked.sampling(None) == asked.sampling(chosen)


def test_losses_are_those_of_plain_transformers_whatever_stands_beside_a_row(
    side: Side, base: Path, made: dict[str, Artefact], question: Question
) -> None:
    rows = [(question.messages(row), text * 3) for row, text in zip(question.rows, TEXTS, strict=True)]
    pairs = [*side.plain.references(rows, 160), ([], [])]
    network = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), made["candidate"].folder).eval()
    for who in ("candidate", BASE):
        losses, tokens = side.plain.losses(who, pairs)
        assert (losses[-1], tokens[-1]) == (0, 0)
        for (prompt, answer), loss in zip(pairs[:-1], losses, strict=False):
            ids = torch.tensor([prompt + answer])
            labels = torch.tensor([[-100] * len(prompt) + answer])
            with torch.no_grad():
                if who == BASE:
                    with network.disable_adapter():
                        wanted = network(input_ids=ids, labels=labels).loss
                else:
                    wanted = network(input_ids=ids, labels=labels).loss
            assert loss == pytest.approx(float(wanted) * len(answer), rel=1e-4)
    assert side.plain.references(rows, 12) == [([], [])] * len(rows)


def test_agreement_is_high_for_the_adapter_that_is_served_and_low_for_another(
    side: Side, base: Path, made: dict[str, Artefact], question: Question
) -> None:
    prompts = question.prompts(side.engine, side.loaded["candidate"])
    answers = ask(side.engine, side.loaded["candidate"], prompts, SHORT)
    right = _agreement(side, question, prompts, answers)
    assert right.rows == len(prompts)
    assert right.same <= right.agreement <= 1
    plain = side.plain
    try:
        side.plain = PlainModel(resolve(str(base)), {"candidate": made["other"].folder})
        wrong = _agreement(side, question, prompts, answers)
    finally:
        side.plain = plain
    assert right.agreement > 0.8
    assert wrong.agreement < right.agreement - 0.3
    assert wrong.max_logprob_difference > right.max_logprob_difference


def test_general_questions_cost_the_base_model_and_the_adapter_each_their_own(side: Side) -> None:
    found = _forgetting(side, 160)
    assert found.questions == 24
    assert math.isfinite(found.base_loss) and math.isfinite(found.candidate_loss)
    assert found.increase == found.candidate_loss - found.base_loss != 0
    assert _forgetting(side, 4).questions == 0
