"""Shapley values of words against models whose values are known."""

import numpy as np
import pytest

from bento.explanation import EXACT, Question, visible
from ft_resources.errors import RequestError

LABELS = ("no", "yes")


def score(texts: list[str], weights: dict[str, float]) -> np.ndarray:
    """A model that adds up weights of words: its Shapley values are those weights."""
    yes = np.array([0.3 + sum(weights.get(word, 0.0) for word in text.split()) for text in texts])
    return np.stack([1 - yes, yes], axis=1)


@pytest.mark.parametrize("count", [1, EXACT, EXACT + 1, 16])
def test_an_additive_models_weights_are_found(count: int) -> None:
    words = [f"w{number}" for number in range(count)]
    weights = {word: 0.02 * number for number, word in enumerate(words)}
    question = Question("  ".join(words))
    found = question.explain(score(question.texts, weights), LABELS, "yes")
    assert [part.text for part in found.attributions] == words
    np.testing.assert_allclose([part.weight for part in found.attributions], list(weights.values()), atol=1e-12)


@pytest.mark.parametrize("count", [EXACT - 2, 40])
def test_any_models_values_add_up_and_one_text_has_one_explanation(count: int) -> None:
    question = Question(" ".join(f"word{number}" for number in range(count)))
    random = np.random.default_rng(0).dirichlet([1, 1], len(question.texts))
    found = question.explain(random, LABELS)
    assert found.label == LABELS[int(random[0].argmax())]
    assert found.base + sum(part.weight for part in found.attributions) == pytest.approx(found.probability)
    assert len(found.attributions) == min(count, 16)
    assert Question(" ".join(f"word{number}" for number in range(count))).texts == question.texts


def test_two_words_that_only_count_together_share_it() -> None:
    question = Question("not good really")
    yes = np.array([0.9 if {"not", "good"} <= set(text.split()) else 0.1 for text in question.texts])
    found = question.explain(np.stack([1 - yes, yes], axis=1), LABELS, "yes")
    np.testing.assert_allclose([part.weight for part in found.attributions], [0.4, 0.4, 0.0], atol=1e-12)


def test_writing_without_blanks_is_split_into_characters() -> None:
    question = Question("今天很好 ok")
    found = question.explain(score(question.texts, {}), LABELS)
    assert [part.text for part in found.attributions] == ["今", "天", "很", "好", "ok"]


def test_what_the_model_does_not_read_is_left_out() -> None:
    text = "a b c d e"
    assert visible(text, lambda given: [ord(char) for char in given.replace(" ", "")][:3]) == "a b c"
    assert visible(text, lambda given: [ord(char) for char in given]) == text


def test_a_label_that_there_is_not() -> None:
    question = Question("x")
    with pytest.raises(RequestError) as caught:
        question.explain(score(question.texts, {}), LABELS, "maybe")
    assert caught.value.error_code == "unknown_label"
