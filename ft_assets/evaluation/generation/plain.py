"""The base model with adapters as plain peft has them, in fp32: the reference that what is served is held against."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from bento.conversation import Message
from bento.devices import fast_matmul
from ft_assets.training.engine.examples import conversations
from ft_resources.base_models import BaseModel

Pair = tuple[list[int], list[int]]
"""Token ids of a prompt and of an answer to it."""

BATCH_TOKENS = 2048
"""Padded tokens of one pass."""
BASE = ""
"""The name under which the base model answers without any adapter."""


@dataclass(frozen=True)
class TokenScores:
    """The tokens of one answer after its prompt, as the model sees them: float32 [tokens] each."""

    logprobs: NDArray[np.float32]
    """Log-probability of the token that stands there."""
    behind: NDArray[np.float32]
    """How much less that is than of the most probable token; 0 where it is that one."""

    @property
    def loss(self) -> float:
        """Nats, summed over the tokens."""
        return -float(self.logprobs.sum(dtype=np.float64))


class PlainModel:
    """A base model with named adapters, loaded by transformers and peft alone.

    Args:
        adapters: Name -> adapter folder, at least one.
    """

    def __init__(self, base: BaseModel, adapters: Mapping[str, Path]) -> None:
        network = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
        first, *others = adapters
        self._model = PeftModel.from_pretrained(network, adapters[first], adapter_name=first)
        for name in others:
            self._model.load_adapter(adapters[name], adapter_name=name)
        self._model.eval()
        self._tokenizer = AutoTokenizer.from_pretrained(base.path)

    def references(self, rows: Sequence[tuple[list[Message], str]], max_tokens: int) -> list[Pair]:
        """Conversations and their answers as they are trained on; both empty where a row does not fit."""
        pairs = list[Pair]()
        for row in rows:
            fitting = conversations(self._tokenizer, [row], max_tokens).examples
            pairs += [(one.ids[: one.target], one.ids[one.target :]) for one in fitting] or [([], [])]
        return pairs

    def losses(self, who: str, pairs: Sequence[Pair]) -> tuple[list[float], list[int]]:
        """Nats summed over the tokens of each answer, and their number; 0 of an empty one."""
        there = [place for place, (_, answer) in enumerate(pairs) if answer]
        losses = [0.0] * len(pairs)
        for place, scores in zip(there, self.score(who, [pairs[place] for place in there]), strict=True):
            losses[place] = scores.loss
        return losses, [len(answer) for _, answer in pairs]

    def score(self, who: str, pairs: Sequence[Pair]) -> list[TokenScores]:
        """The answers of (prompt, answer) token ids, none of them empty, scored token by token.

        Args:
            who: Name of an adapter, or `BASE`.
        """
        found: list[TokenScores | None] = [None] * len(pairs)
        with self._as(who), torch.inference_mode(), fast_matmul(torch.device("cpu"), torch.float32):
            for places in _batches([len(prompt) + len(answer) for prompt, answer in pairs]):
                for place, scores in zip(places, self._batch([pairs[place] for place in places]), strict=True):
                    found[place] = scores
        return [scores for scores in found if scores is not None]

    def _batch(self, pairs: Sequence[Pair]) -> Iterator[TokenScores]:
        """Padded on the left, so that all answers end together and logits are wanted of the last places only."""
        wide = max(len(prompt) + len(answer) for prompt, answer in pairs)
        ids = torch.zeros(len(pairs), wide, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (prompt, answer) in enumerate(pairs):
            ids[row, wide - len(prompt) - len(answer) :] = torch.tensor(prompt + answer)
            mask[row, wide - len(prompt) - len(answer) :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        keep = max(len(answer) for _, answer in pairs) + 1
        logits = self._model(
            input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep, use_cache=False
        ).logits
        for row, (_, answer) in enumerate(pairs):
            given = logits[row, -len(answer) - 1 : -1].float()
            chosen = given.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
            yield TokenScores(
                (chosen - given.logsumexp(1)).numpy(),
                (given.max(dim=1).values - chosen).numpy(),
            )

    @contextmanager
    def _as(self, who: str) -> Iterator[None]:
        if who == BASE:
            with self._model.disable_adapter():
                yield
            return
        self._model.set_adapter(who)
        yield


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places of rows, longest first, in batches of at most `BATCH_TOKENS` padded tokens."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
