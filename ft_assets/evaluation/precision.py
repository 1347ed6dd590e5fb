"""In which precision an adapter is served: the fastest one that gives the answers of plain peft in float32."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bento.adapter_files import read_reference
from bento.adapters import BasePool
from bento.devices import pick_device, precisions_of, served_in
from bento.engine import Engine
from ft_assets.evaluation.policy import GatePolicy
from ft_assets.evaluation.report import Agreement, Serving
from ft_resources.base_models import BaseModel
from ft_resources.errors import ServiceError
from ft_resources.lake import Artefact

logger = logging.getLogger(__name__)

SHIFT_QUANTILE = 0.95
ALONE_ROWS = 64
"""Rows that are asked alone too: one by one they cost several times what they cost in a batch."""
BATCH = 16


def choose_engine(
    base: BaseModel, adapter: Artefact, texts: Sequence[str], policy: GatePolicy, device: str
) -> tuple[Engine, Serving]:
    """The engine that measures and serves, with the adapter loaded, and how it was found.

    Precisions are tried from the fastest on; the first that keeps the limits of `policy` is taken. Where none does it
    is the last one tried, and the gate `serves_what_was_evaluated` refuses it.

    Args:
        texts: Rows the adapter was not trained on.

    Raises:
        ServiceError: The adapter cannot be served.
    """
    plain = plain_probabilities(base, adapter.folder, adapter.json("adapter.json"), texts)
    tried: list[Agreement] = []
    engine = None
    for precision in precisions_of(pick_device(device)):
        if precision not in policy.precisions:
            continue
        try:
            engine = Engine(base, precision=precision, device=device)
        except ServiceError as error:  # some models cannot be computed in bf16
            logger.warning("not served in %s: %s", precision, error)
            continue
        engine.load(adapter.digest, adapter.folder)
        tried.append(agreement(engine, adapter.digest, texts, plain))
        if keeps(tried[-1], policy):
            break
    if engine is None:  # the policy names only what this machine has not: the gate says so
        engine = Engine(base, precision="fp32", device=device)
        engine.load(adapter.digest, adapter.folder)
        tried.append(agreement(engine, adapter.digest, texts, plain))
    return engine, Serving(**tried[-1].model_dump(), tried=tried)


def engine_of(champion: Artefact, precision: str, device: str, there: Engine | None) -> Engine:
    """The engine in which the service answers with `champion`; `there` where it is that one.

    Args:
        precision: Of its release, as in `BasePool.engine`.

    Raises:
        ServiceError: Its base model is not the one it was trained on.
        SpecError: Its base model is not on this machine.
    """
    wanted = read_reference(champion.folder)
    if (
        there is not None
        and wanted.base.digest == there.base.digest
        and served_in(precision, pick_device(device)) == there.precision
    ):
        return there
    engine = BasePool(device=device).engine(wanted, precision)
    assert isinstance(engine, Engine)
    return engine


def keeps(one: Agreement, policy: GatePolicy) -> bool:
    """Whether a precision answers as the policy asks for; NaN never does."""
    return one.agreement >= policy.min_serving_agreement and one.probability_shift <= policy.max_probability_shift


def agreement(engine: Engine, digest: str, texts: Sequence[str], plain: np.ndarray) -> Agreement:
    """The engine's answers against `plain`, float32 [texts, labels]; see `compare`."""

    def ask(some: Sequence[str]) -> np.ndarray:
        return np.stack([one.probabilities for one in engine.score([(text, digest) for text in some])])

    return compare(ask, engine.precision, texts, plain)


def compare(
    ask: Callable[[Sequence[str]], np.ndarray], precision: str, texts: Sequence[str], plain: np.ndarray
) -> Agreement:
    """The answers of `ask` against `plain`, float32 [texts, labels].

    A row agrees if its label is that of `plain` both among neighbours and, for `ALONE_ROWS` rows spread over `texts`,
    alone, so that an answer which depends on what else is in its batch counts as another answer.

    Args:
        ask: Texts -> probabilities, float32 [texts, labels]. It is asked for all of them first, then for one at a time.
        precision: What `ask` computes in.
    """
    together = ask(texts)
    places = np.unique(np.linspace(0, len(texts) - 1, min(ALONE_ROWS, len(texts))).astype(int))
    alone = together.copy()
    alone[places] = [ask([texts[place]])[0] for place in places]
    right = plain.argmax(1)
    differences = np.maximum(np.abs(together - plain).max(1), np.abs(alone - plain).max(1))
    return Agreement(
        precision=precision,
        rows=len(texts),
        agreement=float(((together.argmax(1) == right) & (alone.argmax(1) == right)).mean()),
        probability_shift=float(np.quantile(differences, SHIFT_QUANTILE)),
        max_probability_difference=float(differences.max()),
        mean_probability_difference=float(differences.mean()),
        changed_by_neighbours=int((together.argmax(1) != alone.argmax(1)).sum()),
    )


def plain_probabilities(base: BaseModel, adapter: Path, about: Mapping[str, Any], texts: Sequence[str]) -> np.ndarray:
    """What `Plain` answers: [texts, labels]."""
    return Plain(base, adapter, about)(texts)


class Plain:
    """`peft.PeftModel` in float32, the adapter folder loaded as anyone else would.

    Args:
        adapter: Its folder.
        about: What its `adapter.json` says.
    """

    def __init__(self, base: BaseModel, adapter: Path, about: Mapping[str, Any]) -> None:
        import torch
        from peft import PeftModel
        from safetensors.torch import load_file
        from transformers import AutoModel, AutoTokenizer

        network = AutoModel.from_pretrained(base.path, dtype=torch.float32)
        self._model = PeftModel.from_pretrained(network, adapter).eval()
        self._head = load_file(adapter / "head.safetensors")
        self._tokenizer = AutoTokenizer.from_pretrained(base.path)
        self._about = about

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Calibrated probabilities, float32 [texts, labels]."""
        import torch

        about, head = self._about, self._head
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        answers = np.empty((len(texts), len(about["labels"])), np.float32)
        with torch.inference_mode():
            for start in range(0, len(order), BATCH):
                places = order[start : start + BATCH]
                batch = self._tokenizer(
                    [texts[place] for place in places],
                    truncation=True,
                    max_length=about["max_tokens"],
                    padding=True,
                    return_tensors="pt",
                )
                states = self._model(**batch).last_hidden_state
                mask = batch["attention_mask"]
                first, last = torch.zeros(len(mask), dtype=torch.long), mask.sum(1) - 1
                if about["pooling"] == "mean":
                    pooled = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
                else:
                    pooled = states[torch.arange(len(mask)), first if about["pooling"] == "cls" else last]
                logits = pooled @ head["weight"].T + head["bias"]
                answers[places] = torch.softmax(logits / about["temperature"], -1).numpy()
        return answers
