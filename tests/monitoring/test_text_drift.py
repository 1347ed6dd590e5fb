"""Drift of written answers: words of the inputs, lengths of the answers, confidence."""

import random

import numpy as np
import pandas as pd
import pytest

from bento.conversation import dump
from ft_assets.monitoring.drift import TESTS, drift
from ft_assets.monitoring.texts import corrected, text_drift

HOUSE = ["roof", "permit", "window", "door", "wall", "neighbour", "cost", "height", "garage", "fence", "rule", "plan"]
CAR = ["engine", "wheel", "brake", "oil", "tyre", "lane", "speed", "fuel", "gear", "clutch", "mirror", "seat"]


def asked(words: list[str], count: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    return ["How is " + " ".join(chance.choices(words, k=chance.randint(3, 12))) + "?" for _ in range(count)]


def evaluated(count: int = 120) -> pd.DataFrame:
    """Conversations with a system prompt, as rows are stored; answers of 20 to 119 characters."""
    rng = np.random.default_rng(0)
    system = {"role": "system", "content": "You answer questions about houses."}
    return pd.DataFrame(
        {
            "text": [dump([system, {"role": "user", "content": text}]) for text in asked(HOUSE, count, 0)],
            "candidate_answer": ["x" * int(n) for n in rng.integers(20, 120, count)],
            "candidate_confidence": rng.beta(8, 2, count),
            "candidate_finish": ["stop"] * (count - 2) + ["refused"] * 2,
        }
    )


def served(
    words: list[str] = HOUSE, *, longer: int = 0, sure: float = 8, count: int = 150, seed: int = 1
) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "input": [dump([{"role": "user", "content": text}]) for text in asked(words, count, seed)],
            "output": ["x" * int(n) for n in rng.integers(20 + longer, 120 + longer, count)],
            "confidence": rng.beta(sure, 2, count),
            "finish_reason": ["stop"] * count,
            "true_text": [None] * count,
        }
    )


def alarmed(traffic: pd.DataFrame) -> list[str]:
    return drift(*text_drift(evaluated(), traffic, ["email"]), alpha=0.01, permutations=999).alarmed


@pytest.mark.parametrize(
    ("traffic", "found"),
    [
        (served(CAR), ["inputs"]),
        (served(longer=60), ["predictions"]),
        (served(sure=2), ["confidence"]),
    ],
)
def test_each_shift_is_found_where_it_is(traffic, found):
    assert alarmed(traffic) == found


def test_traffic_like_the_evaluation_alarms_no_more_often_than_it_says():
    assert sum(bool(alarmed(served(seed=seed))) for seed in range(2, 14)) <= 1


def test_raw_texts_masked_data_and_answers_that_were_broken_off():
    traffic = served()
    traffic.loc[:74, "input"] = asked(HOUSE, 75, 5)
    traffic["input"] = [text.replace("How is", "How is a@b.se") for text in traffic["input"]]
    report = evaluated()
    report["text"] = [text.replace("How is", "How is <EMAIL>") for text in report["text"]]
    broken = traffic.head(50).assign(finish_reason="cancelled", output="", confidence=0.0)
    reference, window = text_drift(report, pd.concat([traffic, broken]), ["email"])
    assert (len(reference), len(window)) == (118, 150)
    assert drift(reference, window, permutations=999).alarmed == []


def test_few_rows_give_no_verdict_and_corrections_no_accuracy():
    found = drift(*text_drift(evaluated(), served(count=3), []), min_rows=50)
    assert found.verdict.startswith("no verdict")
    assert set(TESTS) >= set(found.tests)
    said = corrected(served().assign(true_text="better"), 0.5)
    assert said.rows == 150
    assert said.accuracy is None
    assert not said.alarm
