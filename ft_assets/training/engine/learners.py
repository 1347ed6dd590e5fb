"""What is learned: the class of a text, or the answer to a conversation. Each knows its loss and its figures."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from ft_assets.training.engine.body import Body
from ft_assets.training.engine.examples import Example
from ft_assets.training.engine.vocabulary_loss import SlicedCrossEntropy
from ft_assets.training.recipes import Settings


class Learner(Protocol):
    """What the trainer asks of a kind of task."""

    body: Body
    outputs: int
    """Values that `output` gives per row."""
    measures_untrained: bool
    """Whether the base model alone can do the task, so that it is the least a training has to beat."""

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """What the optimiser changes, by name."""

    def loss(self, states: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor:
        """Summed loss of `examples` from their states [tokens, hidden], row after row."""

    def weight(self, examples: Sequence[Example]) -> float:
        """What the summed loss of these rows is divided by."""

    def output(self, states: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor:
        """float32 [rows, outputs]: what the figures of a validation are computed from."""

    def measured(self, outputs: np.ndarray, examples: Sequence[Example]) -> dict[str, float]:
        """Figures of a validation by name, `loss` among them."""

    def score(self, measured: Mapping[str, float]) -> tuple[float, ...]:
        """A better validation compares greater."""

    def errors(self, outputs: np.ndarray, examples: Sequence[Example]) -> np.ndarray:
        """float32 [rows]: how wrong each row is, for comparing two epochs row by row."""


def learner_of(
    kind: str, body: Body, settings: Settings, labels: Sequence[str], training: Sequence[Example]
) -> Learner:
    """What a task of type `kind` learns.

    Args:
        labels: Of a classification, in the order of the head.
        training: The rows trained on, whose classes give weights by frequency.
    """
    if kind == "text-classification":
        return ClassLearner(body, settings, len(labels), [one.target for one in training])
    return AnswerLearner(body, settings)


class ClassLearner:
    """Pooling over the states of a text and a linear head; cross-entropy of the classes.

    Args:
        classes: How many there are.
        targets: Class numbers of all training rows, for weights by frequency.
    """

    def __init__(self, body: Body, settings: Settings, classes: int, targets: Sequence[int]) -> None:
        self.body, self.outputs, self.measures_untrained = body, classes, False
        self._pooling = settings.base.pooling
        self._smoothing = settings.training.label_smoothing
        self.head = torch.nn.Linear(body.hidden, classes).to(body.device)
        self._weights: torch.Tensor | None = None
        if settings.training.class_weighting == "balanced":
            frequency = torch.bincount(torch.tensor(targets), minlength=classes).float()
            self._weights = (len(targets) / (classes * frequency)).to(body.device)

    def trained(self) -> dict[str, torch.nn.Parameter]:
        return {**self.body.trained(), **{f"head.{name}": weight for name, weight in self.head.named_parameters()}}

    def loss(self, states: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor:
        targets = torch.tensor([one.target for one in examples], device=self.body.device)
        return cross_entropy(
            self.output(states, examples), targets, self._weights, label_smoothing=self._smoothing, reduction="sum"
        )

    def weight(self, examples: Sequence[Example]) -> float:
        if self._weights is None:
            return float(len(examples))
        return float(self._weights[[one.target for one in examples]].sum())

    def output(self, states: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor:
        rows = states.float().split([len(one.ids) for one in examples])
        pooled = torch.stack([self._pool(row) for row in rows])
        with torch.autocast(self.body.device.type, enabled=False):  # as the service computes it
            logits: torch.Tensor = self.head(pooled)
        return logits

    def _pool(self, row: torch.Tensor) -> torch.Tensor:
        if self._pooling == "mean":
            return row.mean(0)
        return row[0 if self._pooling == "cls" else -1]

    def measured(self, outputs: np.ndarray, examples: Sequence[Example]) -> dict[str, float]:
        from sklearn.metrics import accuracy_score, f1_score

        targets = [one.target for one in examples]
        predicted = outputs.argmax(1)
        macro = f1_score(targets, predicted, labels=range(self.outputs), average="macro", zero_division=0)
        return {
            "loss": float(cross_entropy(torch.from_numpy(outputs), torch.tensor(targets))),
            "accuracy": float(accuracy_score(targets, predicted)),
            "macro_f1": float(macro),
        }

    def score(self, measured: Mapping[str, float]) -> tuple[float, ...]:
        return measured["macro_f1"], -measured["loss"]

    def errors(self, outputs: np.ndarray, examples: Sequence[Example]) -> np.ndarray:
        """Of a row whose class is not found its weight, else 0: classes weigh the same, as in macro-F1."""
        targets = np.array([one.target for one in examples], dtype=np.int64)
        frequency = np.bincount(targets, minlength=self.outputs)
        weights = len(targets) / (np.count_nonzero(frequency) * frequency[targets])
        wrong: np.ndarray = (outputs.argmax(1) != targets) * weights
        return wrong.astype(np.float32)


class AnswerLearner:
    """Next-token cross-entropy of the answers' tokens, averaged over tokens."""

    outputs = 2
    measures_untrained = True

    def __init__(self, body: Body, settings: Settings) -> None:
        self.body = body
        self._labelled_only = settings.speed.labelled_tokens_only
        self._sliced = settings.speed.fused_cross_entropy

    def trained(self) -> dict[str, torch.nn.Parameter]:
        return self.body.trained()

    def loss(self, states: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor:
        head = self.body.network.get_output_embeddings().weight
        places, targets = self._answers(examples)
        if not self._labelled_only:  # the usual way: logits of every token, most of them never looked at
            logits = (states.to(head.dtype) @ head.t()).float()
            return cross_entropy(logits[places], targets, reduction="sum")
        labelled = states[places].to(head.dtype)
        if self._sliced:
            loss: torch.Tensor = SlicedCrossEntropy.apply(labelled, head, targets)
            return loss
        return cross_entropy((labelled @ head.t()).float(), targets, reduction="sum")

    def weight(self, examples: Sequence[Example]) -> float:
        return float(sum(len(one.ids) - one.target for one in examples))

    def output(self, states: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor:
        """Per row: summed negative log-likelihood of the answer, and how many of its tokens come first."""
        head = self.body.network.get_output_embeddings().weight
        places, targets = self._answers(examples)
        lengths = [len(one.ids) - one.target for one in examples]
        rows = zip(states[places].to(head.dtype).split(lengths), targets.split(lengths), strict=True)
        found = []
        for row, wanted in rows:
            logits = (row @ head.t()).float()
            loss = cross_entropy(logits, wanted, reduction="sum")
            found.append(torch.stack([loss, (logits.argmax(-1) == wanted).sum().float()]))
        return torch.stack(found)

    def measured(self, outputs: np.ndarray, examples: Sequence[Example]) -> dict[str, float]:
        tokens = self.weight(examples)
        loss = float(outputs[:, 0].sum() / tokens)
        return {
            "loss": loss,
            "perplexity": float(np.exp(min(loss, 50.0))),
            "token_accuracy": float(outputs[:, 1].sum() / tokens),
        }

    def score(self, measured: Mapping[str, float]) -> tuple[float, ...]:
        return (-measured["loss"],)

    def errors(self, outputs: np.ndarray, examples: Sequence[Example]) -> np.ndarray:
        """Negative log-likelihood of the answer, per row."""
        return outputs[:, 0].astype(np.float32)

    def _answers(self, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """Places of the states that predict an answer's token, in the pack, and those tokens."""
        places, targets, at = list[int](), list[int](), 0
        for one in examples:
            places += range(at + one.target - 1, at + len(one.ids) - 1)
            targets += one.ids[one.target :]
            at += len(one.ids)
        return torch.tensor(places, device=self.body.device), torch.tensor(targets, device=self.body.device)
