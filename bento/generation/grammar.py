"""Answers that fit a JSON schema: which tokens may follow. Grammars are llguidance's, compiled once per schema."""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import llguidance
import numpy as np
import torch
from tokenizers import Tokenizer

from ft_resources.errors import RequestError

KEPT = 128
"""Compiled grammars in memory."""
MOST_BYTES = 64 << 10
"""Of a schema."""
WRITTEN: Any = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A]{0,8}"}
"""For schemas that do not say it themselves, in `x-guidance`. Bounded: a weak model would write blanks for ever."""
LIMITS = llguidance.LLParserLimits(verbose_errors=False)


class Grammars:
    """Compiles schemas for one tokenizer. Safe in any thread.

    Args:
        tokenizer: Of the model; it may know tokens that the model does not.
        vocabulary: Tokens the model gives logits for.
        ends: Tokens that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: Iterable[int]) -> None:
        self._tokenizer, self._ends = tokenizer, sorted(ends)
        self._reader: llguidance.LLTokenizer | None = None
        self._vocabulary = vocabulary
        self._compiled: OrderedDict[bytes, llguidance.LLMatcher] = OrderedDict()
        """By SHA-256 of the schema."""
        self._lock = threading.Lock()
        self._compiling = threading.Lock()  # takes long; whoever asks for another schema does not wait for it

    def matcher(self, schema: Mapping[str, Any]) -> "Matcher":
        """A fresh matcher of answers that fit `schema`.

        Raises:
            RequestError: `invalid_request`, the schema cannot be followed, or no grammar can with this tokenizer.
        """
        text = written_schema(guided(schema))
        key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        found = self._find(key)
        if found is None:
            with self._compiling:
                found = self._find(key)  # another thread may have been faster
                if found is None:
                    compiled = self._compile(text)
                    with self._lock:
                        self._compiled[key] = compiled
                        while len(self._compiled) > KEPT:
                            self._compiled.popitem(last=False)
                    found = compiled.deep_copy()
        return Matcher(found, self._vocabulary)

    def _find(self, key: bytes) -> llguidance.LLMatcher | None:
        with self._lock:
            compiled = self._compiled.get(key)
            if compiled is None:
                return None
            self._compiled.move_to_end(key)
            return compiled.deep_copy()

    def _compile(self, text: str) -> llguidance.LLMatcher:
        if self._reader is None:
            known = max(self._vocabulary, self._tokenizer.get_vocab_size())
            try:
                self._reader = llguidance.LLTokenizer(self._tokenizer.to_str(), n_vocab=known, eos_token=self._ends)
            except ValueError as error:
                raise RequestError(
                    "invalid_request",
                    f"the base model's tokenizer cannot be held to a schema: {error}",
                    mend="Ask without a schema, or use a base model with a byte-level tokenizer.",
                ) from None
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(text)
            compiled = llguidance.LLMatcher(self._reader, grammar, log_level=0, limits=LIMITS)
        except ValueError as error:
            raise _refused(str(error)) from None
        if compiled.is_error():
            raise _refused(compiled.get_error())
        return compiled


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def allowed(self) -> torch.Tensor:
        """Tokens that may follow: bool [vocabulary], on the CPU."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._vocabulary]).bool()

    def accept(self, token: int) -> bool:
        """Go on by one token; False if the grammar does not allow it, or became too large to follow."""
        return bool(self._matcher.consume_token(token))

    @property
    def complete(self) -> bool:
        """Nothing may follow but the end."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()


def guided(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema with what it says about blanks, or `WRITTEN`; every backend on llguidance reads it there."""
    return schema if "x-guidance" in schema else {**schema, "x-guidance": WRITTEN}


def written_schema(schema: Mapping[str, Any]) -> str:
    """The schema as JSON.

    Raises:
        RequestError: `invalid_request`, it is no JSON, too deep, or larger than `MOST_BYTES`.
    """
    try:
        text = json.dumps(schema, ensure_ascii=False)
    except RecursionError:
        raise _refused("it is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise _refused(str(error)) from None
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MOST_BYTES:
        raise _refused(f"it has {size:,} bytes, at most {MOST_BYTES:,} are taken")
    return text


def _refused(what: str) -> RequestError:
    first = what.strip().splitlines()[0] if what.strip() else "it is not valid"
    return RequestError(
        "invalid_request",
        f"the JSON schema cannot be followed: {first[:300]}",
        mend="Use the keywords of JSON Schema that structured output knows: types, properties, required, enum, items.",
    )
