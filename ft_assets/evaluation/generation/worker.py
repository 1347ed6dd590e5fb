"""The evaluation process of written answers: `python -m ft_assets.evaluation.generation.worker`, through Dagster Pipes.

Candidate, champion and the base model without an adapter answer the frozen test split in the engine that serves
traffic; plain peft in fp32 tells what the references cost each of them, and whether the engine writes what it would.
"""

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bento.adapter_files import read_reference
from bento.adapters import BasePool
from bento.conversation import Field
from bento.devices import pick_device, served_in
from bento.texts import sampling_of
from ft_assets.data.assembly import split_rows
from ft_assets.evaluation.gate import decide
from ft_assets.evaluation.generation.asking import REFUSED, Answer, Question, ask, ask_alone
from ft_assets.evaluation.generation.html import render
from ft_assets.evaluation.generation.plain import BASE, PlainModel
from ft_assets.evaluation.generation.report import Forgetting, TokenAgreement, build_report
from ft_assets.evaluation.policy import GatePolicy
from ft_assets.worker import Progress, serve
from ft_resources.base_models import resolve
from ft_resources.environments import Environment
from ft_resources.lake import Artefact, Lake

ALONE_ROWS = 10
PARITY_ROWS = 32
TIE = 0.1
"""Nats between two tokens within which plain peft is undecided: what its own logits move in bf16."""


class Side:
    """One base model as it is served and as plain peft has it, with the adapters that stand on it.

    The engine is the one that a service in this environment makes.

    Args:
        adapters: Name -> adapter, at least one.
        precision: What they are released in.
    """

    def __init__(self, base: str, adapters: Mapping[str, Artefact], precision: str = "auto") -> None:
        resolved, environment = resolve(base), Environment.read()
        self.precision = served_in(precision, pick_device(environment.device))
        self.engine_name = environment.generation_engine
        pool = BasePool([resolved], device=environment.device, generation=self.engine_name)
        self.engine: Any = pool.engine(read_reference(next(iter(adapters.values())).folder), self.precision)
        self.loaded: dict[str, Any] = {BASE: None}
        self.loaded |= {name: self.engine.load(one.digest, one.folder) for name, one in adapters.items()}
        self.plain = PlainModel(resolved, {name: one.folder for name, one in adapters.items()})


def evaluate_job(job: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Ask, compare, render and publish the report that `job` describes."""
    lake, policy = Lake(job["lake"]), GatePolicy.model_validate(job["policy"])
    candidate = lake.open(job["adapter"])
    champion = lake.open(job["champion"]) if job["champion"] else None
    about = candidate.json("adapter.json")
    fields = {name: Field.model_validate(one) for name, one in about["fields"].items()}
    every = split_rows(lake, job["test_split"])
    test = every.head(policy.max_answered_rows)  # rows stand in the order of their ids, which are hashes
    question = Question(about["type"], fields, about["instruction"], test["text"].tolist())
    progress(f"loading the serving engine for {len(test)} of {len(every)} test rows", force=True)
    base, beside, asked, costs = about["base"]["model"], {"candidate": candidate}, {}, {}
    if champion is not None:
        reference, precision = champion.json("adapter.json")["base"]["model"], job["champion_precision"]
        device = pick_device(Environment.read().device)
        if reference == base and served_in(precision, device) == served_in("auto", device):
            beside["champion"] = champion
        else:  # it goes before the other engine comes: one alone may fill a GPU
            apart = Side(reference, {"champion": champion}, precision)
            asked["champion"] = _asked(apart, "champion", question, progress)
            costs["champion"] = _costs(apart, "champion", question, test["label"], about["max_tokens"], progress)
            apart.engine.close()
    side = Side(base, beside)
    asked |= {who: _asked(side, who, question, progress) for who in side.loaded}
    costs |= {who: _costs(side, who, question, test["label"], about["max_tokens"], progress) for who in side.loaded}
    frame = test.drop(columns="masked", errors="ignore").join(
        [_columns(asked[who], costs[who]).add_prefix(f"{who or 'base'}_").set_index(test.index) for who in asked]
    )
    if champion is not None:
        tested = set(split_rows(lake, job["champion_test_split"])["row_id"]) if job["champion_test_split"] else set()
        frame["was_in_champion_test"] = frame["row_id"].isin(tested)
    progress("requests one at a time, and agreement with plain peft in fp32", force=True)
    prompts, sampling = _prompts(side, "candidate", question), question.sampling(side.loaded["candidate"])
    chosen = np.unique(np.linspace(0, len(test) - 1, min(ALONE_ROWS, len(test))).astype(int)).tolist()
    latency, alone = ask_alone(side.engine, side.loaded["candidate"], [prompts[place] for place in chosen], sampling)
    report = build_report(
        frame,
        kind=question.kind,
        fields=fields,
        task=job["task"],
        adapter=candidate.digest,
        champion=champion.digest if champion else None,
        test_split=job["test_split"],
        test_rows=len(every),
        max_tokens=sampling.max_tokens,
        latency=latency,
        serving=_agreement(side, question, prompts, asked["candidate"]),
        forgetting=_forgetting(side, about["max_tokens"]) if question.kind == "text-generation" else None,
        created_from=job["made_from"],
        confidence=policy.confidence,
    )
    side.engine.close()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "report.json").write_text(report.model_dump_json(indent=1))
        (folder / "report.html").write_text(render(report, decide(report, policy), frame), encoding="utf-8")
        (folder / "golden.json").write_text(json.dumps(_golden(frame, chosen, alone), indent=1))
        frame.to_parquet(folder / "predictions.parquet", index=False)
        artefact = lake.publish("eval_report", folder, job["made_from"])
    return {"report": artefact.digest}


def _asked(side: Side, who: str, question: Question, progress: Progress) -> list[Answer]:
    """What a model answers to every row."""
    name, adapter, rows = who or "the base model", side.loaded[who], len(question.rows)
    return ask(
        side.engine,
        adapter,
        question.prompts(side.engine, adapter),
        question.sampling(adapter),
        lambda number: progress(f"{name}: row {number} of {rows}"),
    )


def _costs(
    side: Side, who: str, question: Question, references: Sequence[str], max_tokens: int, progress: Progress
) -> tuple[list[float], list[int]]:
    """What the references cost a model: nats and tokens of each row."""
    progress(f"{who or 'the base model'}: loss on the reference answers", force=True)
    rows = [(question.messages(row), wanted) for row, wanted in zip(question.rows, references, strict=True)]
    return side.plain.losses(who, side.plain.references(rows, max_tokens))


def _columns(answers: Sequence[Answer], costs: tuple[list[float], list[int]]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "answer": [one.text for one in answers],
            "finish": [one.finish for one in answers],
            "confidence": [one.confidence for one in answers],
            "loss": costs[0],
            "tokens": costs[1],
        }
    )


def _prompts(side: Side, who: str, question: Question) -> list[list[int]]:
    return question.prompts(side.engine, side.loaded[who])


def _agreement(
    side: Side, question: Question, prompts: Sequence[list[int]], answers: Sequence[Answer]
) -> TokenAgreement:
    """What the engine wrote, token by token, against what plain peft holds most probable in the same place.

    Each token is judged after the ones that the engine wrote before it, so that one near tie does not make all that
    follows count as different. An extraction is asked again without its grammar, which plain peft does not have.
    """
    if question.kind == "extraction":
        answers = ask(side.engine, side.loaded["candidate"], prompts[:PARITY_ROWS], sampling_of(None))
    there = [(prompt, one) for prompt, one in zip(prompts, answers, strict=False) if one.token_ids][:PARITY_ROWS]
    pairs = [(prompt, list(answer.token_ids)) for prompt, answer in there]
    sure = [math.log(max(answer.confidence, 1e-300)) for _, answer in there]
    scores = side.plain.score("candidate", pairs)
    behind = np.concatenate([one.behind for one in scores]) if scores else np.zeros(0)
    gaps = [abs(float(one.logprobs.mean()) - known) for one, known in zip(scores, sure, strict=True)]
    return TokenAgreement(
        engine=side.engine_name,
        precision=side.precision,
        rows=len(scores),
        tokens=len(behind),
        same=float((behind == 0).mean()) if len(behind) else math.nan,
        agreement=float((behind <= TIE).mean()) if len(behind) else math.nan,
        max_logprob_difference=max(gaps, default=math.nan),
    )


def _forgetting(side: Side, max_tokens: int) -> Forgetting:
    """Loss on questions that no task is about, with and without the adapter."""
    text = files(__package__).joinpath("general.jsonl").read_text(encoding="utf-8")
    asked = [json.loads(line) for line in text.splitlines()]
    rows = [([{"role": "user", "content": one["question"]}], one["answer"]) for one in asked]
    pairs = side.plain.references(rows, max_tokens)
    found = {}
    for who in (BASE, "candidate"):
        losses, tokens = side.plain.losses(who, pairs)
        found[who] = sum(losses) / sum(tokens) if sum(tokens) else math.nan
    return Forgetting(
        questions=sum(bool(answer) for _, answer in pairs), base_loss=found[BASE], candidate_loss=found["candidate"]
    )


def _golden(frame: pd.DataFrame, places: Sequence[int], alone: Sequence[Answer]) -> list[dict[str, Any]]:
    """What a started service is asked: rows whose answer is the same alone as among others, as rounding leaves it."""
    asked = [
        {
            "row_id": frame["row_id"].iloc[place],
            "text": frame["text"].iloc[place],
            "expected": answer.text,
            "expected_confidence": answer.confidence,
        }
        for place, answer in zip(places, alone, strict=True)
        if answer.finish != REFUSED
    ]
    said = dict(zip(frame["row_id"], frame["candidate_answer"], strict=True))
    return [one for one in asked if one["expected"] == said[one["row_id"]]] or asked


if __name__ == "__main__":
    serve(evaluate_job)
