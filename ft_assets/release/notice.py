"""The launch notice: what goes live, what it replaces and what differs, for people and for programs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ft_resources.lake import short

MOST_SETTINGS = 20
LONGEST_REASON = 1000
UNKNOWN = "What it replaces is no longer in the store, so nothing is compared."
MISSING = object()


@dataclass(frozen=True)
class Facts:
    """What is behind a release."""

    adapter: str
    metrics: Mapping[str, float]
    """Of its own report, by name."""
    compared_with: str | None
    """Adapter that the report compares it with."""
    compared_metrics: Mapping[str, float]
    """Metrics of that adapter, on the same rows."""
    rows: frozenset[str]
    """Row ids of its training split."""
    settings: Mapping[str, Any]
    """Every setting of its training by path in the recipe."""


def build(
    release: Mapping[str, Any], replaced: Mapping[str, Any] | None, new: Facts | None, former: Facts | None
) -> dict[str, Any]:
    """The JSON that a webhook is sent: `text` is what chats show, `release` the same as facts.

    Args:
        release: The release that goes live, as the ledger keeps it.
        replaced: The one it replaces; None when nothing was live.
        new: What is behind `release`; None where it is not in the lake.
        former: What is behind `replaced`, likewise.
    """
    facts: dict[str, Any] = {
        "task": release["task"],
        "id": release["id"],
        "kind": release["kind"],
        "at": release["created_at"].isoformat(),
        "actor": release["actor"],
        "because": release["because"],
        "version": {"new": release["model_version"], "former": replaced["model_version"] if replaced else None},
        "adapter": {"new": release["adapter"], "former": replaced["adapter"] if replaced else None},
        "overruled": dict(release["decision"].get("refusals", {})) if release["kind"] == "approval" else {},
        "metrics": _metrics(new, former) if new else {},
        "same_test_rows": bool(new and former and _same_rows(new, former)),
        "rows": _rows(new, former) if new else None,
        "settings": _changed(former.settings, new.settings) if new and former else {},
    }
    lost = replaced is not None and (new is None or former is None)
    return {"text": "\n".join([*_headline(facts), *([UNKNOWN] if lost else []), *_changes(facts)]), "release": facts}


def _same_rows(new: Facts, former: Facts) -> bool:
    return new.compared_with == former.adapter or former.compared_with == new.adapter


def _metrics(new: Facts, former: Facts | None) -> dict[str, dict[str, float | None]]:
    """Metrics of both by name, on the same test rows where one report has both, else each of its own report."""
    after, before = new.metrics, former.metrics if former else {}
    if former and new.compared_with == former.adapter:
        before = new.compared_metrics
    elif former and former.compared_with == new.adapter:
        after = former.compared_metrics
    found: dict[str, dict[str, float | None]] = {}
    for name, value in after.items():
        was = before.get(name)
        found[name] = {"new": value, "former": was, "difference": None if was is None else value - was}
    return found


def _rows(new: Facts, former: Facts | None) -> dict[str, int | None]:
    """Counts of training rows."""
    return {
        "now": len(new.rows),
        "added": len(new.rows - former.rows) if former else None,
        "removed": len(former.rows - new.rows) if former else None,
    }


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings that differ, by path; one that only one of them has is None in the other."""
    paths = sorted(before.keys() | after.keys())
    return {
        path: {"new": after.get(path), "former": before.get(path)}
        for path in paths
        if before.get(path, MISSING) != after.get(path, MISSING)
    }


def _headline(facts: Mapping[str, Any]) -> list[str]:
    version, adapter = facts["version"], facts["adapter"]
    again = " again" if facts["kind"] == "rollback" else ""
    place = f", in place of version {version['former']}" if version["former"] else ", the first one"
    was = f", before {short(adapter['former'])}" if adapter["former"] else ""
    because = facts["because"]
    shown = because if len(because) <= LONGEST_REASON else because[: LONGEST_REASON - 3] + "..."
    return [
        _plain(f"{facts['task']}: version {version['new']} is live{again}{place}"),
        _plain(f"{facts['kind']} by {facts['actor']}: {shown}"),
        f"adapter {short(adapter['new'])}{was}",
    ]


def _changes(facts: Mapping[str, Any]) -> list[str]:
    lines = []
    measured = [_measured(name, one) for name, one in facts["metrics"].items()]
    if measured:
        compared = any(one["former"] is not None for one in facts["metrics"].values())
        rows = "on the same test rows" if facts["same_test_rows"] else "each on the test rows of its report"
        lines.append(f"test{f' ({rows})' if compared else ''}: {', '.join(measured)}")
    rows = facts["rows"]
    if rows is not None:
        differing = "" if rows["added"] is None else f", {rows['added']} added, {rows['removed']} removed"
        lines.append(f"training rows: {rows['now']}{differing}")
    settings = [f"{path} {one['new']} (was {one['former']})" for path, one in facts["settings"].items()]
    if settings:
        more = f", and {len(settings) - MOST_SETTINGS} more" if len(settings) > MOST_SETTINGS else ""
        lines.append(_plain(f"settings: {', '.join(settings[:MOST_SETTINGS])}{more}"))
    lines += [_plain(f"overruled {demand}: {reason}") for demand, reason in facts["overruled"].items()]
    return lines


def _measured(name: str, one: Mapping[str, float | None]) -> str:
    was = f" ({one['difference']:+.4f})" if one["difference"] is not None else ""
    return f"{name} {one['new']:.4f}{was}"


def _plain(text: str) -> str:
    """What people wrote cannot call a channel or make links: Slack's control characters, escaped as it documents."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
