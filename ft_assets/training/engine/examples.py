"""Rows as token numbers: texts with a class, or conversations with the answer to learn. Tokenised once per run."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bento.conversation import ALPACA_TEMPLATE

Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """One row as a model reads it."""

    number: int
    """Unique within a run, training and validation rows together."""
    ids: list[int]
    target: int
    """The number of its class; for a conversation, the place of the answer's first token in `ids`."""
    closing: int = 0
    """Special tokens at its end, which a cut keeps."""

    def cut_to(self, tokens: int) -> "Example":
        """Itself if it is no longer; else its first tokens and what closes it, with a number of its own."""
        if len(self.ids) <= tokens:
            return self
        kept = max(1, tokens - self.closing)
        return replace(self, number=-1 - self.number, ids=self.ids[:kept] + self.ids[len(self.ids) - self.closing :])


@dataclass(frozen=True)
class Tokenised:
    """Examples, and what was lost on the way."""

    examples: list[Example]
    cut: int
    """Rows longer than `max_tokens`."""
    longest: int
    """Tokens of the longest row before it was cut."""
    dropped: int
    """Rows without a single token of the answer left."""


def classified(
    tokenizer: Any, texts: Sequence[str], classes: Sequence[int], max_tokens: int, start: int = 0
) -> Tokenised:
    """Texts and the numbers of their classes. `start`: number of the first example."""
    encoded: list[list[int]] = tokenizer(list(texts), truncation=False, verbose=False)["input_ids"] if texts else []
    short = _truncated(tokenizer, texts, encoded, max_tokens)
    closing = _closing(tokenizer)
    return Tokenised(
        [
            Example(start + at, ids, target, closing)
            for at, (ids, target) in enumerate(zip(short, classes, strict=True))
        ],
        cut=sum(len(ids) > max_tokens for ids in encoded),
        longest=max(map(len, encoded), default=0),
        dropped=0,
    )


def _closing(tokenizer: Any) -> int:
    """Special tokens that the tokenizer puts after every text."""
    special = set(tokenizer.all_special_ids)
    found = list(itertools.takewhile(special.__contains__, reversed(tokenizer("a")["input_ids"])))
    return len(found)


def _truncated(tokenizer: Any, texts: Sequence[str], encoded: list[list[int]], max_tokens: int) -> list[list[int]]:
    """The tokenizer cuts long rows itself, for it keeps the closing special token."""
    long = [at for at, ids in enumerate(encoded) if len(ids) > max_tokens]
    if long:
        again = tokenizer([texts[at] for at in long], truncation=True, max_length=max_tokens)["input_ids"]
        encoded = list(encoded)
        for at, ids in zip(long, again, strict=True):
            encoded[at] = ids
    return encoded


def conversations(
    tokenizer: Any, rows: Sequence[tuple[list[Message], str]], max_tokens: int, start: int = 0
) -> Tokenised:
    """Conversations (messages, answer) in the base model's own chat template; the loss is on the answer alone.

    A row that is too long is cut at its end. `start`: number of the first example.
    """
    examples = list[Example]()
    cut = longest = dropped = 0
    for messages, answer in rows:
        asked = _render(tokenizer, messages, add_generation_prompt=True)
        whole = _render(tokenizer, [*messages, {"role": "assistant", "content": answer}], add_generation_prompt=False)
        if not whole.startswith(asked):  # a template that shows earlier answers in another way
            whole = asked + answer + (tokenizer.eos_token or "")
        prompt: list[int] = tokenizer(asked, add_special_tokens=False)["input_ids"]
        reply: list[int] = tokenizer(whole[len(asked) :], add_special_tokens=False)["input_ids"]
        longest = max(longest, len(prompt) + len(reply))
        cut += len(prompt) + len(reply) > max_tokens
        if len(prompt) >= max_tokens or not reply:
            dropped += 1
            continue
        examples.append(Example(start + len(examples), (prompt + reply)[:max_tokens], len(prompt)))
    return Tokenised(examples, cut, longest, dropped)


def _render(tokenizer: Any, messages: list[Message], *, add_generation_prompt: bool) -> str:
    rendered: str = tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        chat_template=tokenizer.chat_template or ALPACA_TEMPLATE,
    )
    return rendered
