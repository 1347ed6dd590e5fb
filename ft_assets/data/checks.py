"""Checks of stage 1. Blocking ones keep bad rows from training."""

import difflib
from collections.abc import Iterator

import dagster as dg

from bento.preparation import find
from ft_assets.data.assets import SPLITS
from ft_assets.data.rows import ROW_COLUMNS, row_id
from ft_assets.data.splits import leaks
from ft_assets.materialising import check, table, task_named
from ft_assets.partitions import task_partitions
from ft_resources.environments import Environment
from ft_resources.lake import Lake

IMBALANCE_LIMIT = 3.0
NEIGHBOURS = 10


def specs(asset: str, *, blocking: tuple[str, ...] = (), informing: tuple[str, ...] = ()) -> list[dg.AssetCheckSpec]:
    """Partitioned check specs of one asset."""
    return [
        dg.AssetCheckSpec(name, asset=asset, blocking=name in blocking, partitions_def=task_partitions)
        for name in (*blocking, *informing)
    ]


@dg.multi_asset_check(specs=specs("raw_dataset", blocking=("schema_valid", "enough_rows", "labels_known")))
def raw_dataset_checks(
    context: dg.AssetCheckExecutionContext, environment: dg.ResourceParam[Environment], lake: dg.ResourceParam[Lake]
) -> Iterator[dg.AssetCheckResult]:
    """The snapshot has the agreed columns, enough rows, and no label that the task does not declare."""
    task = task_named(environment, context.partition_key)
    rows = lake.require(task.name, "raw_dataset").parquet("rows.parquet")
    wrong = list(rows.columns) != ROW_COLUMNS
    sample = rows.head(1000)
    bad_ids = 0 if wrong else int((sample["text"].map(row_id) != sample["row_id"]).sum())
    yield check(
        "schema_valid",
        "raw_dataset",
        not wrong and bad_ids == 0,
        "columns and row ids are as agreed"
        if not wrong and not bad_ids
        else f"columns {list(rows.columns)}, {bad_ids} wrong ids",
    )
    least = task.spec.cleaning.min_rows
    yield check(
        "enough_rows",
        "raw_dataset",
        len(rows) >= least,
        f"{len(rows)} rows, at least {least} are needed"
        + ("" if len(rows) >= least else ". Add rows, or lower cleaning.min_rows if you know what you do"),
        {"rows": len(rows)},
    )
    unknown = rows.loc[rows["label"].notna() & ~rows["label"].isin(task.spec.labels), ["label", "source"]]
    found = [
        {
            "label": label,
            "rows": len(group),
            "first": group["source"].iloc[0],
            "nearest": next(iter(difflib.get_close_matches(str(label), task.spec.labels, n=1)), "-"),
        }
        for label, group in unknown.groupby("label")
    ]
    first = f"; '{found[0]['label']}' at {found[0]['first']}" if found else ""
    yield check(
        "labels_known",
        "raw_dataset",
        not found,
        f"{len(unknown)} rows carry a label that `labels` of {task.path.name} does not list{first}"
        + (". Correct those rows or add the label to the task" if found else ""),
        {"unknown": table(found)},
    )


@dg.multi_asset_check(
    specs=specs(
        "clean_dataset", blocking=("no_pii_left",), informing=("rejects_within_budget", "class_balance", "label_noise")
    )
)
def clean_dataset_checks(
    context: dg.AssetCheckExecutionContext, environment: dg.ResourceParam[Environment], lake: dg.ResourceParam[Lake]
) -> Iterator[dg.AssetCheckResult]:
    """No personal data of the asked kinds is left; rejections, balance and label noise are within what is usual."""
    task = task_named(environment, context.partition_key)
    artefact = lake.require(task.name, "clean_dataset")
    kept, rejected = artefact.parquet("kept.parquet"), artefact.parquet("rejected.parquet")
    kinds = task.spec.cleaning.pii
    left = [(key, hit[0]) for key, text in zip(kept["row_id"], kept["text"], strict=True) for hit in find(text, kinds)]
    yield check(
        "no_pii_left",
        "clean_dataset",
        not left,
        f"{len(left)} personal data left in {len(kept)} rows (kinds looked for: {', '.join(kinds) or 'none'})",
        {"first": table([{"row_id": key, "kind": kind} for key, kind in left[:20]])},
    )
    share = len(rejected) / max(1, len(kept) + len(rejected))
    allowed = task.spec.cleaning.max_reject_share
    yield check(
        "rejects_within_budget",
        "clean_dataset",
        share <= allowed,
        f"{share:.1%} of the rows were rejected, {allowed:.0%} are allowed",
        {"share": share},
        warn=True,
    )
    counts = kept["label"].value_counts().reindex(task.spec.labels, fill_value=0)
    ratio = float(counts.max() / counts.min()) if counts.min() else float("inf")
    yield check(
        "class_balance",
        "clean_dataset",
        ratio <= IMBALANCE_LIMIT,
        f"the most frequent label has {ratio:.1f} times the rows of the rarest ({IMBALANCE_LIMIT:.0f} is the limit)",
        {"ratio": str(round(ratio, 2)), "rows": table([{"label": k, "rows": int(v)} for k, v in counts.items()])},
        warn=True,
    )
    suspects = _noise(kept["text"].tolist(), kept["label"].tolist())
    rate = len(suspects) / max(1, len(kept))
    yield check(
        "label_noise",
        "clean_dataset",
        rate <= 0.05,
        f"{len(suspects)} of {len(kept)} labels ({rate:.1%}) disagree with nearly all of their nearest rows",
        {
            "suspects": table(
                [{"row_id": kept["row_id"].iloc[i], "label": kept["label"].iloc[i]} for i in suspects[:20]]
            )
        },
        warn=True,
    )


@dg.multi_asset_check(
    specs=[
        *specs("train_split", blocking=("no_leakage",)),
        *specs("train_split", blocking=("every_class_present",)),
        *specs("validation_split", blocking=("every_class_present",)),
        *specs("test_split", blocking=("every_class_present",)),
    ]
)
def split_checks(
    context: dg.AssetCheckExecutionContext, environment: dg.ResourceParam[Environment], lake: dg.ResourceParam[Lake]
) -> Iterator[dg.AssetCheckResult]:
    """No row, and no near-copy of a row, stands in two splits; every split has rows of every label."""
    task = task_named(environment, context.partition_key)
    kept = lake.require(task.name, "clean_dataset").parquet("kept.parquet")
    parts = {split: lake.require(task.name, f"{split}_split").parquet("rows.parquet") for split in SPLITS}
    where = {key: split for split, rows in parts.items() for key in rows["row_id"]}
    total = sum(len(rows) for rows in parts.values())
    frame = kept.assign(split=kept["row_id"].map(where)).dropna(subset=["split"])
    leaking = leaks(frame, task.spec.split.cluster_similarity)
    twice = total - len(where)
    yield check(
        "no_leakage",
        "train_split",
        not leaking and not twice,
        f"{twice} rows stand in two splits, {len(leaking)} pairs of near-copies cross splits",
        {"pairs": table([{"a": a, "b": b, "jaccard": j} for a, b, j in leaking[:20]])},
    )
    for split in SPLITS:
        counts = frame.loc[frame["split"] == split, "label"].value_counts().reindex(task.spec.labels, fill_value=0)
        missing = [label for label, rows in counts.items() if rows == 0]
        yield check(
            "every_class_present",
            f"{split}_split",
            not missing,
            f"no rows of {missing} in the {split} split. Add rows of these labels"
            if missing
            else f"every label has at least {counts.min()} rows",
            {"rows": table([{"label": k, "rows": int(v)} for k, v in counts.items()])},
        )


def _noise(texts: list[str], labels: list[str]) -> list[int]:
    """Rows whose label at most one of their ten nearest TF-IDF neighbours shares, while the others agree on another."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.neighbors import NearestNeighbors

    if len(texts) <= NEIGHBOURS + 1:
        return []
    try:
        vectors = TfidfVectorizer(sublinear_tf=True, max_features=20_000).fit_transform(texts)
    except ValueError:  # only stop words or empty texts: nothing to compare
        return []
    nearest = NearestNeighbors(n_neighbors=NEIGHBOURS + 1, metric="cosine").fit(vectors)
    suspects = []
    for row, neighbours in enumerate(nearest.kneighbors(vectors, return_distance=False)):
        others = [labels[n] for n in neighbours if n != row][:NEIGHBOURS]
        top = max(set(others), key=others.count)
        if top != labels[row] and others.count(labels[row]) <= 1 and others.count(top) >= NEIGHBOURS - 1:
            suspects.append(row)
    return suspects
