"""The store of decisions and events: releases, routes, predictions, feedback, training runs, keys, audit."""

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import pandas as pd
import sqlalchemy as sa

from ft_resources import ledger_schema as schema
from ft_resources.api_keys import KeyRecords
from ft_resources.errors import GateRefusal, RequestError
from ft_resources.ledger_store import now
from ft_resources.training_runs import TrainingRecords


class Ledger(KeyRecords, TrainingRecords):
    """Opens the ledger and brings its schema up to date. Keys and training runs are kept by the classes below it.

    Args:
        url: SQLAlchemy URL, such as `sqlite:////data/ledger.db` or `postgresql+psycopg2://...`.

    Raises:
        ArtefactError: The database cannot be opened.
    """

    # -- releases and routes ------------------------------------------------------------------------------------

    def record_release(
        self,
        *,
        task: str,
        kind: str,
        adapter: str,
        base: str,
        report: str | None,
        model_version: str,
        bento: str | None,
        actor: str,
        because: str,
        decision: Mapping[str, Any],
        expected_live: str | None,
        review_below: float | None = None,
        precision: str = "auto",
    ) -> dict[str, Any]:
        """One decision, its route and its audit event, in one transaction: from now on `adapter` answers.

        Args:
            kind: `release`, `approval` (a person overruled a gate) or `rollback`.
            adapter: Digest of the adapter; `base` the reference of its base model.
            expected_live: Release id the decision was taken against; None for a first release.
            review_below: Answers less confident than this are for a person to review; None: as in the route before.
            precision: `auto`, `int8`, `bf16` or `fp32`: what the adapter was evaluated in and is served in.

        Returns:
            The release.

        Raises:
            GateRefusal: Another release became live meanwhile.
        """
        release: dict[str, Any] = {
            "id": f"rel-{uuid.uuid4().hex[:12]}",
            "task": task,
            "kind": kind,
            "adapter": adapter,
            "report": report,
            "model_version": model_version,
            "bento": bento,
            "actor": actor,
            "because": because,
            "decision": dict(decision),
        }
        share = {
            "adapter": adapter,
            "model_version": model_version,
            "release_id": release["id"],
            "base": base,
            "share": 1.0,
            "precision": precision,
        }
        route: dict[str, Any] = {
            "task": task,
            "release_id": release["id"],
            "plan": {"shares": [share], "shadow": [], "review_below": review_below},
            "actor": actor,
        }
        newest = sa.select(schema.routes.c.release_id, schema.routes.c.plan).where(schema.routes.c.task == task)
        with self._write() as connection:
            self._serialise(connection)
            before = connection.execute(newest.order_by(schema.routes.c.revision.desc()).limit(1)).first()
            live = None if before is None else before.release_id
            if review_below is None:
                route["plan"]["review_below"] = 0.0 if before is None else before.plan.get("review_below", 0.0)
            if live != expected_live:
                raise GateRefusal(
                    f"release {live} became live while this one was decided against {expected_live}",
                    where=f"release of {task}",
                    mend="Evaluate again against the adapter that is live now.",
                )
            # the time is taken while others wait, so that times and revisions have one order
            release["created_at"] = route["created_at"] = now()
            connection.execute(schema.releases.insert().values(**release))
            connection.execute(schema.routes.insert().values(**route))
            self._audit(connection, actor, kind, task, str(release["id"]), {"adapter": adapter, "because": because})
        return release

    def set_review_below(self, task: str, bound: float, *, actor: str) -> bool:
        """Change the bound in the route in force; shares and release stay. False when it is that already.

        Raises:
            GateRefusal: Nothing is live for the task.
        """
        table = schema.routes
        newest = sa.select(table).where(table.c.task == task).order_by(table.c.revision.desc()).limit(1)
        with self._write() as connection:
            self._serialise(connection)
            row = connection.execute(newest).mappings().first()
            if row is None:
                raise GateRefusal("nothing is live", where=f"route of {task}", mend="Release an adapter first.")
            if row["plan"].get("review_below", 0.0) == bound:
                return False
            route = {
                "task": task,
                "release_id": row["release_id"],
                "plan": row["plan"] | {"review_below": bound},
                "actor": actor,
                "created_at": now(),
            }
            connection.execute(table.insert().values(**route))
            self._audit(connection, actor, "route", task, row["release_id"], {"review_below": bound})
        return True

    def releases(self, task: str) -> list[dict[str, Any]]:
        """Every decision of `task`, oldest first: the history of what was live when."""
        table = schema.releases
        return self._rows(sa.select(table).where(table.c.task == task).order_by(table.c.created_at, table.c.id))

    def route(self, task: str) -> dict[str, Any] | None:
        """The route in force, or None before the first release."""
        table = schema.routes
        query = sa.select(table).where(table.c.task == task).order_by(table.c.revision.desc()).limit(1)
        rows = self._rows(query)
        return rows[0] if rows else None

    def routes(self) -> dict[str, dict[str, Any]]:
        """The route in force of every task."""
        table = schema.routes
        newest = sa.select(sa.func.max(table.c.revision)).group_by(table.c.task)
        return {row["task"]: row for row in self._rows(sa.select(table).where(table.c.revision.in_(newest)))}

    def route_revision(self) -> int:
        """A number that grows with every change of any route; 0 before the first."""
        with self._read() as connection:
            return int(connection.execute(sa.select(sa.func.max(schema.routes.c.revision))).scalar() or 0)

    def live_release(self, task: str) -> dict[str, Any] | None:
        """The decision that the route in force comes from."""
        route = self.route(task)
        if route is None:
            return None
        table = schema.releases
        return self._rows(sa.select(table).where(table.c.id == route["release_id"]))[0]

    def live_at(self, task: str, moment: datetime) -> dict[str, Any] | None:
        """The route that was in force at `moment`."""
        table = schema.routes
        query = (
            sa.select(table)
            .where(table.c.task == task, table.c.created_at <= moment)
            .order_by(table.c.revision.desc())
            .limit(1)
        )
        rows = self._rows(query)
        return rows[0] if rows else None

    # -- approvals ----------------------------------------------------------------------------------------------

    def approve(self, *, task: str, adapter: str, report: str, actor: str, because: str) -> None:
        """Record that a person overrules the gates for exactly this adapter and report."""
        with self._write() as connection:
            connection.execute(
                schema.approvals.insert().values(
                    task=task, adapter=adapter, report=report, actor=actor, because=because, created_at=now()
                )
            )
            self._audit(connection, actor, "approve", task, adapter, {"report": report, "because": because})

    def approval(self, *, task: str, adapter: str, report: str) -> dict[str, Any] | None:
        """The newest approval of exactly this adapter on exactly this report."""
        table = schema.approvals
        query = (
            sa.select(table)
            .where(table.c.task == task, table.c.adapter == adapter, table.c.report == report)
            .order_by(table.c.id.desc())
            .limit(1)
        )
        rows = self._rows(query)
        return rows[0] if rows else None

    # -- predictions and feedback -------------------------------------------------------------------------------

    def log_predictions(self, predictions: Sequence[Mapping[str, Any]]) -> None:
        """Store answered requests, all or none, durable when this returns. Keys: the columns of `predictions`.

        Rows of one call have the same keys.
        """
        if not predictions:
            return
        with self._write() as connection:
            connection.execute(schema.predictions.insert(), [dict(row) for row in predictions])

    def prediction(self, prediction_id: str) -> dict[str, Any]:
        """One answered request.

        Raises:
            RequestError: `unknown_prediction`.
        """
        table = schema.predictions
        rows = self._rows(sa.select(table).where(table.c.id == prediction_id))
        if not rows:
            raise RequestError(
                "unknown_prediction",
                f"there is no prediction '{prediction_id[:64]}'",
                status=404,
                mend="Send the prediction_id of an answer; for a row use ft trace ROW --task TASK.",
            )
        return rows[0]

    def predictions_between(self, task: str, start: datetime, end: datetime) -> pd.DataFrame:
        """Answered requests with start <= event_time < end, oldest first, with feedback joined.

        Columns: those of `predictions`, and `true_label`, `rating`, `true_text` of the newest feedback (None without).
        """
        table = schema.predictions
        query = (
            sa.select(table)
            .where(table.c.task == task, table.c.event_time >= start, table.c.event_time < end)
            .order_by(table.c.event_time, table.c.id)
        )
        frame = pd.DataFrame(self._rows(query), columns=[column.name for column in table.c])
        feedback = self._feedback(task)
        for column in ("event_time", "answered_at"):
            frame[column] = frame[column].astype("datetime64[us, UTC]")
        for column, key in (("true_label", "label"), ("rating", "rating"), ("true_text", "text")):
            said = [feedback[one][key] if one in feedback else None for one in frame["id"]]
            frame[column] = pd.Series(said, index=frame.index, dtype=object)
        return frame

    def traffic_days(self, task: str) -> dict[str, int]:
        """Days (UTC, ISO) with answered requests -> its requests and labels; grows as labels arrive."""
        predictions, feedback = schema.predictions, schema.feedback
        day = sa.func.date(predictions.c.event_time, type_=sa.types.NullType()).label("day")
        answered = sa.select(day, sa.func.count().label("rows")).where(predictions.c.task == task).group_by(day)
        labelled = answered.join(feedback, feedback.c.prediction_id == predictions.c.id)
        days: dict[str, int] = {}
        for query in (answered, labelled):
            for row in self._rows(query):
                days[str(row["day"])] = days.get(str(row["day"]), 0) + row["rows"]
        return days

    def add_feedback(
        self,
        *,
        prediction_id: str,
        label: str | None,
        rating: int | None,
        author: str,
        text: str | None = None,
        at: datetime | None = None,
    ) -> bool:
        """Store what a person says of an answer; False when it is what `author` said of it last.

        Args:
            label: What it should have been; `text` for an answer that is a text.
            rating: 1: it was right; -1: it was wrong.

        Raises:
            RequestError: `unknown_prediction`.
        """
        prediction = self.prediction(prediction_id)
        table = schema.feedback
        last = (
            sa.select(table.c.label, table.c.rating, table.c.text)
            .where(table.c.prediction_id == prediction_id, table.c.author == author)
            .order_by(table.c.id.desc())
            .limit(1)
        )
        turn = sa.select(schema.predictions.c.id).where(schema.predictions.c.id == prediction_id).with_for_update()
        with self._write() as connection:
            connection.execute(turn)  # the same feedback sent twice at once is stored once
            known = connection.execute(last).first()
            if known is not None and tuple(known) == (label, rating, text):
                return False
            connection.execute(
                table.insert().values(
                    prediction_id=prediction_id,
                    task=prediction["task"],
                    label=label,
                    rating=rating,
                    text=text,
                    author=author,
                    created_at=at or now(),
                )
            )
        return True

    def _feedback(self, task: str) -> dict[str, dict[str, Any]]:
        table = schema.feedback
        newest: dict[str, dict[str, Any]] = {}
        for row in self._rows(sa.select(table).where(table.c.task == task).order_by(table.c.id)):
            nothing: dict[str, Any] = {"label": None, "text": None, "rating": None, "author": "", "version": 1}
            known = newest.setdefault(row["prediction_id"], nothing)
            known["rating"] = row["rating"] if row["rating"] is not None else known["rating"]
            if row["label"] is not None or row["text"] is not None:
                corrected = {"label": row["label"], "text": row["text"], "author": row["author"]}
                known.update(corrected, version=known["version"] + 1)
        return newest

    def feedback_rows(self, task: str) -> pd.DataFrame:
        """Requests whose label or text came back, as raw rows (see `ft_assets.data.rows`), oldest event first."""
        table, said = schema.predictions, self._feedback(task)
        labelled = {key: row for key, row in said.items() if row["label"] is not None or row["text"] is not None}
        answered = sa.select(schema.feedback.c.prediction_id).where(schema.feedback.c.task == task)
        query = sa.select(table.c.id, table.c.input, table.c.event_time).where(table.c.id.in_(answered))
        rows = [row for row in self._rows(query.order_by(table.c.event_time, table.c.id)) if row["id"] in labelled]
        return pd.DataFrame(
            {
                "row_id": [hashlib.sha256(row["input"].encode()).hexdigest()[:32] for row in rows],
                "text": [row["input"] for row in rows],
                "label": [labelled[row["id"]]["label"] or labelled[row["id"]]["text"] for row in rows],
                "source": [f"feedback:{row['id']}" for row in rows],
                "event_time": pd.Series([row["event_time"] for row in rows], dtype="datetime64[us, UTC]"),
                "label_version": pd.Series([labelled[row["id"]]["version"] for row in rows], dtype="int64"),
                "annotator": [labelled[row["id"]]["author"] for row in rows],
                "origin": ["feedback"] * len(rows),
            }
        )
