"""What the trainer writes is what the engine of the service reads."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bento.conversation import Field
from bento.generation.engine import Generator
from bento.generation.interface import Sampling
from ft_assets.training.engine.runs import TaskRows, fit, tokenise
from ft_resources.base_models import resolve
from tests.training.small import settings


def test_a_trained_adapter_answers_with_its_system_prompt(
    answers: TaskRows, tiny: Callable[[str], str], tmp_path: Path
) -> None:
    rows = replace(answers, system="Be brief.")
    base, how = resolve(tiny("llama")), settings(tiny("llama"), training={"epochs": 1})
    fit(rows, tokenise(rows, base, 64), base, how, tmp_path / "adapter", describe={"task": "weather"}, device="cpu")
    engine = Generator(base, "fp32", device="cpu")
    adapter = engine.load("weather", tmp_path / "adapter")
    assert (adapter.manifest.type, adapter.manifest.system) == ("text-generation", "Be brief.")
    asked = [{"role": "user", "content": "How is it?"}]
    ids = engine.prompt(asked, adapter)
    assert ids == engine.prompt([{"role": "system", "content": "Be brief."}, *asked], None)
    assert engine.submit(ids, adapter, Sampling(max_tokens=3)).future.result(60).completion_tokens <= 3
    engine.close()


def test_a_trained_extraction_is_asked_as_it_was_trained(
    answers: TaskRows, tiny: Callable[[str], str], tmp_path: Path
) -> None:
    fields = {"mood": Field(type="string", enum=["cold", "warm"])}
    training, validation = (
        frame.assign(text="snow and ice", label='{"mood":"cold"}') for frame in (answers.training, answers.validation)
    )
    rows = TaskRows("extraction", training, validation, fields=fields, instruction="Read the mood.")
    base, how = resolve(tiny("llama")), settings(tiny("llama"), base={"max_tokens": 256}, training={"epochs": 1})
    data = tokenise(rows, base, 256)
    fit(rows, data, base, how, tmp_path / "adapter", describe={"task": "mood"}, device="cpu")
    engine = Generator(base, "fp32", device="cpu")
    adapter = engine.load("mood", tmp_path / "adapter")
    first = data.training.examples[0]
    assert engine.prompt_extraction("snow and ice", adapter) == first.ids[: first.target]
    engine.close()
