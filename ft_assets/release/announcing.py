"""Telling webhooks what went live: reads what is behind both releases, and sends the notice."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ft_assets.data.assembly import split_rows
from ft_assets.evaluation.statistics import Interval
from ft_assets.evaluation.stored import parse_report
from ft_assets.release.notice import Facts, build
from ft_assets.release.promotion import Decided
from ft_resources.errors import ArtefactError, EvaluationError
from ft_resources.lake import Lake
from ft_resources.masking import mask, mask_text
from ft_resources.notifications import post


@dataclass(frozen=True)
class Announced:
    """Who was told."""

    summary: str
    failures: Sequence[str] = ()
    """One sentence for each webhook that did not take the notice."""


def announce(lake: Lake, urls: Sequence[str], decided: Decided) -> Announced:
    """Send the launch notice of a release that was recorded a moment ago.

    At most once: a process that ends between the recording and this leaves nobody told, and no later one tells it.

    Args:
        urls: The webhooks; empty: nobody is told.
    """
    if not decided.new:
        return Announced("none: it was live already")
    if not urls:
        return Announced("none: FT_NOTIFY_URL is not set")
    release = {**decided.release, "because": mask_text(decided.release["because"])}
    former = facts_of(lake, decided.replaced) if decided.replaced else None
    failures = post(urls, build(release, decided.replaced, facts_of(lake, release), former))
    return Announced("; ".join([f"{len(urls) - len(failures)} of {len(urls)} webhooks were told", *failures]), failures)


def facts_of(lake: Lake, release: Mapping[str, Any]) -> Facts | None:
    """What is behind a release; None where its adapter or report is no longer in the lake, or is damaged."""
    try:
        adapter = lake.open(release["adapter"])
        report = parse_report(lake.open(release["report"] or ""))
        rows = split_rows(lake, adapter.made_from["train_split"])["row_id"]
    except (ArtefactError, EvaluationError):
        return None
    about = adapter.json("adapter.json")
    settings = {"recipe": about["template"], **_flat(about["settings"])}
    return Facts(
        adapter=adapter.digest,
        metrics=_values(report.models["candidate"]),
        compared_with=report.champion,
        compared_metrics=_values(report.models.get("champion", {})),
        rows=frozenset(rows),
        settings=mask(settings),
    )


def _values(metrics: Mapping[str, Interval]) -> dict[str, float]:
    """The finite ones: JSON has no other numbers."""
    return {name: one.value for name, one in metrics.items() if math.isfinite(one.value)}


def _flat(settings: Mapping[str, Any], below: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        inside = isinstance(value, Mapping) and value
        found |= _flat(value, f"{below}{name}.") if inside else {f"{below}{name}": value}
    return found
