"""Stage 5: what was served on a day, whether it drifted, and what is worth a human label."""

import json
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd

from ft_assets.evaluation.generation.report import GenerationReport
from ft_assets.evaluation.stored import Report, parse_report
from ft_assets.materialising import image, publish, result, table, task_named, typed_failures
from ft_assets.monitoring import drift as drifting
from ft_assets.monitoring.plots import confidence_shift, label_shares
from ft_assets.monitoring.relabel import rank
from ft_assets.monitoring.texts import corrected, text_drift
from ft_assets.monitoring.traffic import COLUMNS, compacted, day_bounds, embeddings
from ft_assets.partitions import task_and_day, task_day_partitions
from ft_assets.plots import drift_over_days
from ft_resources.environments import Environment
from ft_resources.errors import DataError
from ft_resources.lake import Artefact, Lake, short
from ft_resources.ledger import Ledger

GROUP = "5_monitoring"
DRIFT_VERSION = "2"
TRAFFIC_VERSION = "2"


@dg.asset(
    partitions_def=task_day_partitions,
    deps=["release"],
    group_name=GROUP,
    kinds={"parquet"},
    code_version=TRAFFIC_VERSION,
)
def served_traffic(
    context: dg.AssetExecutionContext,
    lake: dg.ResourceParam[Lake],
    ledger: dg.ResourceParam[Ledger],
) -> dg.MaterializeResult[Any]:
    """The day's answered requests with the labels that came back, compacted to Parquet."""
    with typed_failures():
        task, day = task_and_day(context.partition_key)
        size = ledger.traffic_days(task).get(day, 0)  # before the rows: what arrives in between is asked for again
        rows = compacted(ledger.predictions_between(task, *day_bounds(day)))

        def write(folder: Path) -> None:
            rows.to_parquet(folder / "traffic.parquet", index=False)

        labelled = rows["true_label"].notna()
        written = rows["output"].notna()
        made_from = {
            "task": task,
            "day": day,
            "requests_and_labels": size,
            "rows": len(rows),
            "version": TRAFFIC_VERSION,
        }
        artefact = publish(context, lake, (task, f"served_traffic/{day}"), "served_traffic", made_from, write)
        right = (rows["label"] == rows["true_label"])[labelled]
        return result(
            artefact,
            {
                "requests": len(rows),
                "labelled": int((labelled | rows["true_text"].notna()).sum()),
                "accuracy_on_labelled": float(right.mean()) if len(right) else "no labels yet",
                "answers": table(_shares(rows["label"].where(~written, rows["finish_reason"]))),
                "latency_p95_ms": float(rows["latency_ms"].quantile(0.95)) if len(rows) else 0.0,
            },
        )


@dg.asset(
    partitions_def=task_day_partitions,
    deps=[served_traffic],
    group_name=GROUP,
    kinds={"scipy"},
    code_version=DRIFT_VERSION,
)
def drift_report(
    context: dg.AssetExecutionContext,
    environment: dg.ResourceParam[Environment],
    lake: dg.ResourceParam[Lake],
    ledger: dg.ResourceParam[Ledger],
) -> dg.MaterializeResult[Any]:
    """Drift of inputs, predictions and confidence against the champion's evaluation; accuracy where labels came back.

    Looks at the window of days that ends with the partition's day, and at the answers of the newest release that gave
    enough of them.
    """
    with typed_failures():
        name, day = task_and_day(context.partition_key)
        task = task_named(environment, name)
        policy = task.spec.monitoring
        parts = _window(lake, name, day, policy.window_days)
        traffic = pd.concat([part.parquet("traffic.parquet") for part in parts], ignore_index=True)
        if traffic.empty:
            raise DataError(
                "no request was answered in the window", where=f"{name}, {day}", mend="Nothing to compare yet."
            )
        release = _judged(ledger.releases(name), traffic, policy.min_rows)
        adapter = release["adapter"]
        rows = traffic[traffic["adapter"] == adapter]
        report = lake.open(release["report"])
        made_from = {
            "task": name,
            "day": day,
            "served_traffic": [part.digest for part in parts],
            "eval_report": report.digest,
            "policy": policy.model_dump(mode="json", exclude={"retrain", "relabel_below", "relabel_limit"}),
            "version": DRIFT_VERSION,
        }

        def write(folder: Path) -> None:
            evaluated = parse_report(report)
            if isinstance(evaluated, GenerationReport):
                answers = report.parquet("predictions.parquet")
                reference, window = text_drift(answers, rows, task.spec.cleaning.pii)
            else:
                reference = _reference(report)
                window = drifting.Window(embeddings(rows), rows["label"].tolist(), rows["confidence"].to_numpy())
            shift = drifting.drift(
                reference, window, policy.alpha, policy.permutations, seed=0, min_rows=policy.min_rows
            )
            accuracy = _accuracy(evaluated, rows, policy.accuracy_drop)
            found = {
                "task": name,
                "day": day,
                "adapter": adapter,
                "release": release["id"],
                "alarm": shift.alarm or accuracy.alarm,
                "drift": shift.model_dump(mode="json"),
                "accuracy": accuracy.model_dump(mode="json"),
            }
            (folder / "drift.json").write_text(json.dumps(found, indent=1))
            (folder / "labels.png").write_bytes(label_shares(reference, window))
            (folder / "confidence.png").write_bytes(confidence_shift(reference, window))

        artefact = publish(context, lake, (name, f"drift_report/{day}"), "drift_report", made_from, write)
        found = artefact.json("drift.json")
        return result(
            artefact,
            {
                "alarm": found["alarm"],
                "verdict": found["drift"]["verdict"],
                "reasons": table(
                    [{"reason": one} for one in [*found["drift"]["reasons"], found["accuracy"]["reason"]]]
                ),
                "tests": table([{"test": key, **one} for key, one in found["drift"]["tests"].items()]),
                "adapter": short(adapter),
                "answers": image(artefact.path("labels.png").read_bytes(), "answers"),
                "confidence": image(artefact.path("confidence.png").read_bytes(), "confidence"),
                "over_time": image(_history(lake, name, day, policy.alpha), "drift"),
            },
        )


@dg.asset(partitions_def=task_day_partitions, deps=[served_traffic, drift_report], group_name=GROUP, code_version="1")
def relabel_queue(
    context: dg.AssetExecutionContext, environment: dg.ResourceParam[Environment], lake: dg.ResourceParam[Lake]
) -> dg.MaterializeResult[Any]:
    """The day's answers that are worth a human label, most uncertain first."""
    with typed_failures():
        name, day = task_and_day(context.partition_key)
        policy = task_named(environment, name).spec.monitoring
        traffic = lake.require(name, f"served_traffic/{day}")
        answers = traffic.parquet("traffic.parquet").reindex(columns=COLUMNS)
        answers = answers[answers["finish_reason"] != "cancelled"]
        answers["true_label"] = answers["true_label"].fillna(answers["true_text"])
        queue = rank(answers, policy.relabel_below, policy.relabel_limit)

        def write(folder: Path) -> None:
            queue.drop(columns="embedding").to_parquet(folder / "queue.parquet", index=False)

        made_from = {"served_traffic": traffic.digest, "below": policy.relabel_below, "limit": policy.relabel_limit}
        artefact = publish(context, lake, (name, f"relabel_queue/{day}"), "relabel_queue", made_from, write)
        shown = queue.assign(answer=queue["output"].fillna(queue["label"]).str.slice(0, 80))
        first = shown.head(10)[["prediction_id", "answer", "confidence"]].to_dict("records")
        return result(artefact, {"rows": len(queue), "most_uncertain": table(first)})


def read_drift(lake: Lake, task: str, day: str) -> dict[str, Any]:
    """The drift report of a day as stored."""
    found: dict[str, Any] = lake.require(task, f"drift_report/{day}").json("drift.json")
    return found


def _judged(releases: list[dict[str, Any]], traffic: pd.DataFrame, min_rows: int) -> dict[str, Any]:
    """The newest release whose adapter gave at least `min_rows` of the answers, else the one that gave most."""
    counts = traffic["adapter"].value_counts()
    known = [one for one in reversed(releases) if one["report"] and one["adapter"] in counts.index]
    if not known:
        raise DataError(
            "none of the answers is of an evaluated release",
            where="ledger",
            mend="Release an adapter through the graph.",
        )
    enough = [one for one in known if counts[one["adapter"]] >= min_rows]
    return enough[0] if enough else max(known, key=lambda one: int(counts[one["adapter"]]))


def _window(lake: Lake, task: str, day: str, days: int) -> list[Artefact]:
    last = date.fromisoformat(day)
    wanted = [(last - timedelta(days=back)).isoformat() for back in reversed(range(days))]
    return [part for one in wanted if (part := lake.head(task, f"served_traffic/{one}")) is not None]


def _reference(report: Artefact) -> drifting.Reference:
    import numpy as np

    with np.load(report.path("reference.npz"), allow_pickle=False) as stored:
        return drifting.Reference(
            stored["embeddings"].astype(np.float32), [str(one) for one in stored["labels"]], stored["confidence"]
        )


def _accuracy(evaluated: Report, rows: pd.DataFrame, drop: float) -> drifting.AccuracyResult:
    if isinstance(evaluated, GenerationReport):
        return corrected(rows, evaluated.models["candidate"][evaluated.score].value)
    labelled = rows[rows["true_label"].notna()]
    return drifting.accuracy_on_labels(
        labelled["label"].tolist(),
        labelled["true_label"].tolist(),
        evaluated.models["candidate"]["accuracy"].value,
        drop,
    )


def _history(lake: Lake, task: str, last: str, alpha: float) -> bytes:
    days = [day for day in lake.heads(task, "drift_report") if day <= last][-60:]
    reports = [read_drift(lake, task, day) for day in days]
    series = {
        test: [one["drift"]["tests"].get(test, {}).get("adjusted_p") for one in reports] for test in drifting.TESTS
    }
    return drift_over_days([date.fromisoformat(day) for day in days], series, alpha)


def _shares(values: pd.Series) -> list[dict[str, Any]]:
    return [{"label": name, "share": f"{share:.1%}"} for name, share in values.value_counts(normalize=True).items()]
