"""The evaluation process: `python -m ft_assets.evaluation.worker`, launched through Dagster Pipes.

Candidate and champion answer the frozen test split in the engine that serves traffic; what a plug-in trained answers by
itself. Baselines answer beside them.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bento.classify import Scored
from bento.engine import Engine
from ft_assets.data.assembly import split_rows
from ft_assets.evaluation.baselines import linear_baseline, majority_baseline
from ft_assets.evaluation.gate import decide
from ft_assets.evaluation.html import render
from ft_assets.evaluation.policy import GatePolicy
from ft_assets.evaluation.precision import choose_engine, engine_of
from ft_assets.evaluation.report import Latency, build_report
from ft_assets.training.jobs import PLUGIN
from ft_assets.training.plugins.interface import find
from ft_assets.training.plugins.running import MODEL, Model
from ft_assets.worker import Progress, serve
from ft_resources.base_models import resolve
from ft_resources.environments import Environment
from ft_resources.lake import Artefact, Lake

Ask = Callable[[Sequence[str]], list[Scored]]
"""Texts -> the answer to each."""
CHUNK = 64
LATENCY_ROWS = 30
PARITY_ROWS = 200
REFERENCE_ROWS = 1000


def evaluate_job(job: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Score, compare, render and publish the report that `job` describes."""
    lake = Lake(job["lake"])
    candidate = lake.open(job["adapter"])
    champion = lake.open(job["champion"]) if job["champion"] else None
    about = candidate.json("adapter.json")
    labels: list[str] = about["labels"]
    test, training = split_rows(lake, job["test_split"]), split_rows(lake, job["train_split"])
    validation = split_rows(lake, job["validation_split"])
    policy = GatePolicy.model_validate(job["policy"])
    device, engine, serving = Environment.read().device, None, None
    if PLUGIN in candidate.made_from:
        ask = _plugged(candidate)
    else:
        progress("agreement of each serving precision with plain peft in fp32", force=True)
        base, parity = resolve(about["base"]["model"]), validation["text"].tolist()[:PARITY_ROWS]
        engine, serving = choose_engine(base, candidate, parity, policy, device)
        ask = _served(engine, candidate)
    measured_in = f" in {serving.precision}" if serving else ""
    progress(f"scoring {len(test)} test rows{measured_in}", force=True)
    answers = _score(ask, test["text"].tolist(), progress, "candidate")
    frame = test.drop(columns="masked", errors="ignore").assign(
        candidate_label=[answer.label for answer in answers],
        candidate_confidence=[answer.confidence for answer in answers],
        **{f"candidate_p_{name}": [float(a.probabilities[i]) for a in answers] for i, name in enumerate(labels)},
    )
    if champion is not None:
        live = engine_of(champion, job["champion_precision"], device, engine)
        theirs = _score(_served(live, champion), test["text"].tolist(), progress, "champion")
        tested = set(split_rows(lake, job["champion_test_split"])["row_id"]) if job["champion_test_split"] else set()
        frame = frame.assign(
            champion_label=[answer.label for answer in theirs],
            champion_confidence=[answer.confidence for answer in theirs],
            was_in_champion_test=frame["row_id"].isin(tested),
        )
    progress("baselines: majority, and TF-IDF with logistic regression", force=True)
    train_texts, train_labels = training["text"].tolist(), training["label"].tolist()
    frame["majority_label"] = majority_baseline(train_labels, len(frame)).labels
    frame["linear_label"] = linear_baseline(train_texts, train_labels, frame["text"].tolist()).labels
    progress("latency of single requests", force=True)
    report = build_report(
        frame,
        task=job["task"],
        adapter=candidate.digest,
        champion=champion.digest if champion else None,
        test_split=job["test_split"],
        labels=labels,
        temperature=about.get("temperature", 1.0),
        latency=_latency(ask, frame["text"].tolist()),
        serving=serving,
        created_from=job["made_from"],
        confidence=policy.confidence,
    )
    decision = decide(report, policy)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "report.json").write_text(report.model_dump_json(indent=1))
        (folder / "report.html").write_text(render(report, decision, frame), encoding="utf-8")
        frame.to_parquet(folder / "predictions.parquet", index=False)
        if serving is not None:  # what is never live needs nothing to measure its traffic against
            _reference(answers + ask(validation["text"].tolist()), folder / "reference.npz")
        artefact = lake.publish("eval_report", folder, job["made_from"])
    return {"report": artefact.digest}


def _served(engine: Engine, adapter: Artefact) -> Ask:
    """The engine's answers with an adapter."""
    engine.load(adapter.digest, adapter.folder)
    return lambda texts: engine.score([(text, adapter.digest) for text in texts])


def _plugged(trained: Artefact) -> Ask:
    """The answers of what a plug-in trained."""
    plugin = find(trained.made_from[PLUGIN]["trainer"], where=trained.uri)
    labels = tuple(trained.json("adapter.json")["labels"])
    model, none = Model(plugin, trained.folder / MODEL, labels), np.zeros(0, dtype=np.float16)

    def answer(texts: Sequence[str]) -> list[Scored]:
        given = model.probabilities(texts)
        return [Scored(labels[row.argmax()], float(row.max()), row, labels, none) for row in given]

    return answer


def _score(ask: Ask, texts: Sequence[str], progress: Progress, who: str) -> list[Scored]:
    answers: list[Scored] = []
    for start in range(0, len(texts), CHUNK):
        answers += ask(texts[start : start + CHUNK])
        progress(f"{who}: {len(answers)}/{len(texts)} rows scored")
    return answers


def _latency(ask: Ask, texts: Sequence[str]) -> Latency:
    """Time of one request at a time, over rows spread across the split, after a warm-up.

    Each row counts with the faster of three tries: what else the machine did meanwhile says nothing of the adapter.
    """
    chosen = [texts[i] for i in np.linspace(0, len(texts) - 1, min(LATENCY_ROWS, len(texts))).astype(int)]
    ask(chosen[:1])
    times = []
    for text in chosen:
        tries = []
        for _ in range(3):
            started = time.perf_counter()
            ask([text])
            tries.append((time.perf_counter() - started) * 1000)
        times.append(min(tries))
    return Latency(p50_ms=float(np.quantile(times, 0.5)), p95_ms=float(np.quantile(times, 0.95)), requests=len(times))


def _reference(held_out: Sequence[Scored], path: Path) -> None:
    """What drift is measured against: embeddings, labels and confidences on test and validation rows."""
    chosen = np.random.default_rng(0).permutation(len(held_out))[:REFERENCE_ROWS]
    np.savez(
        path,
        embeddings=np.stack([held_out[i].embedding for i in chosen]),
        labels=np.array([held_out[i].label for i in chosen]),
        confidence=np.array([held_out[i].confidence for i in chosen], dtype=np.float32),
    )


if __name__ == "__main__":
    serve(evaluate_job)
