"""Stage 4: a registered version with its card, a Bento that was started and asked, and the decision to go live."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from ft_assets.data.assembly import split_rows
from ft_assets.evaluation.servable import why_unserved
from ft_assets.evaluation.stored import parse_report, read_report, served_precision
from ft_assets.materialising import publish, result, table, task_named, typed_failures
from ft_assets.partitions import task_partitions
from ft_assets.release import announcing, golden, promotion
from ft_assets.release.model_card import as_markdown, model_card
from ft_resources.base_models import resolve as resolve_base
from ft_resources.environments import Environment
from ft_resources.errors import GateRefusal
from ft_resources.lake import Artefact, Lake, digest_of, short
from ft_resources.ledger import Ledger
from ft_resources.serving import BentoStore
from ft_resources.tracking import ModelRegistry

GROUP = "4_release"
BUILT_FROM = ("adapter", "model_version", "precision", "review_below", "service_code", "packages")
"""What decides the content of a Bento; with the same, a built one is only asked again."""


@dg.asset(partitions_def=task_partitions, deps=["eval_report"], group_name=GROUP, kinds={"mlflow"}, code_version="1")
def model_version(
    context: dg.AssetExecutionContext,
    environment: dg.ResourceParam[Environment],
    lake: dg.ResourceParam[Lake],
    registry: dg.ResourceParam[ModelRegistry],
) -> dg.MaterializeResult[Any]:
    """The adapter as a registered MLflow version, with its model card."""
    with typed_failures():
        task = task_named(environment, context.partition_key)
        report_artefact, report = read_report(lake, task.name)
        adapter = lake.open(report.adapter)
        if why := why_unserved(adapter.json("adapter.json")):
            raise GateRefusal(
                f"what was trained cannot be served, so it is not released: {why}",
                where=f"task {task.name}",
                mend=f"Read its report: ft report {task.name}. Or train plain LoRA.",
            )
        run_id = registry.run_of(task.name, digest_of(dict(adapter.made_from)))
        facts = {
            "report": report_artefact.digest,
            "mlflow_run": run_id,
            "made_from": dict(adapter.made_from),
            "rows": {
                split: len(split_rows(lake, digest))
                for split, digest in (
                    ("train", adapter.made_from["train_split"]),
                    ("validation", adapter.made_from["validation_split"]),
                    ("test", report.test_split),
                )
            },
        }
        card = model_card(task.spec, adapter.json("adapter.json"), report, facts)
        version = registry.register(
            task.name,
            adapter.digest,
            run_id=run_id,
            source=adapter.folder.as_uri() if lake.is_local else adapter.uri,
            card={"model_card.json": json.dumps(card, indent=1), "model_card.md": as_markdown(card)},
            tags={"report": report_artefact.digest, "task": task.name},
        )

        def write(folder: Path) -> None:
            about = {"task": task.name, "adapter": adapter.digest, "report": report_artefact.digest, "version": version}
            (folder / "version.json").write_text(json.dumps(about))

        made_from = {"adapter": adapter.digest, "eval_report": report_artefact.digest, "version": version}
        artefact = publish(context, lake, (task.name, "model_version"), "model_version", made_from, write)
        return result(
            artefact,
            {
                "version": version,
                "adapter": short(adapter.digest),
                "mlflow_run": run_id,
                "model_card": dg.MetadataValue.md(as_markdown(card)),
                "mlflow": f"registered model {task.name}, version {version}; see it with: ft mlflow",
            },
        )


@dg.asset(partitions_def=task_partitions, deps=[model_version], group_name=GROUP, kinds={"bentoml"}, code_version="1")
def bento_service(
    context: dg.AssetExecutionContext,
    environment: dg.ResourceParam[Environment],
    lake: dg.ResourceParam[Lake],
    bentos: dg.ResourceParam[BentoStore],
) -> dg.MaterializeResult[Any]:
    """A Bento that serves the adapter offline, started once as a real process and asked golden requests, and what the
    task file lists under `serving.test_requests`.
    """
    with typed_failures():
        task = task_named(environment, context.partition_key)
        version = lake.require(task.name, "model_version")
        about = version.json("version.json")
        adapter, report = lake.open(about["adapter"]), lake.open(about["report"])
        samples = task.spec.serving.test_requests
        made_from = {
            "adapter": adapter.digest,
            "eval_report": report.digest,
            "model_version": about["version"],
            "precision": served_precision(parse_report(report)),
            "review_below": task.spec.serving.review_below,
            "test_requests": golden.listed(samples),
            "service_code": bentos.code_digest(),
            "packages": bentos.packages_digest(),
        }

        def write(folder: Path) -> None:
            reference = adapter.json("adapter.json")["base"]["model"]
            release = {
                "task": task.name,
                "release_id": f"bento-{short(adapter.digest)}",
                "model_version": about["version"],
                "adapter": adapter.digest,
                "base": reference,
                "precision": made_from["precision"],
                "review_below": task.spec.serving.review_below,
            }
            tag = _built(lake, bentos, task.name, made_from)
            if tag is None:
                context.log.info("building the Bento")
                tag = bentos.build(task.name, adapter.folder, resolve_base(reference), release)
            context.log.info(f"starting {tag}, asking golden requests and {len(samples)} test requests")
            with bentos.serving(tag, home=folder / "probe-home") as server:
                answered = {
                    "golden": golden.ask(server, task.name, report),
                    "test_requests": golden.ask_samples(server, task.name, samples),
                }
            shutil.rmtree(folder / "probe-home")
            service = {
                **{key: made_from[key] for key in ("adapter", "eval_report", "model_version")},
                "task": task.name,
                "tag": tag,
                **answered,
                "answers_match": not golden.complaints(answered),
            }
            (folder / "service.json").write_text(json.dumps(service, indent=1))

        found = _standing(lake, bentos, task.name, made_from) or lake.find("bento_service", made_from)
        if found is not None:
            gone = not bentos.has(found.json("service.json")["tag"])  # the built Bento was removed from this machine
            made_from = made_from | {"rebuilt_in": context.run.run_id} if gone else dict(found.made_from)
        artefact = publish(context, lake, (task.name, "bento_service"), "bento_service", made_from, write)
        service = artefact.json("service.json")
        folder, size = bentos.folder(service["tag"]), bentos.image_bytes(service["tag"])
        return result(
            artefact,
            {
                "bento": service["tag"],
                "adapter": short(adapter.digest),
                "golden_requests": table(service["golden"]),
                "test_requests": table(service["test_requests"]),
                "bento_folder": dg.MetadataValue.path(str(folder)),
                "dockerfile": dg.MetadataValue.path(str(folder / "env" / "docker" / "Dockerfile")),
                "image_mb": {name: round(number / 1e6) for name, number in size.items()},
                "serve": f"BENTOML_HOME={bentos.home} bentoml serve {service['tag']}",
            },
        )


@dg.asset(partitions_def=task_partitions, deps=[bento_service], group_name=GROUP, kinds={"sqlite"}, code_version="1")
def release(
    context: dg.AssetExecutionContext,
    environment: dg.ResourceParam[Environment],
    lake: dg.ResourceParam[Lake],
    ledger: dg.ResourceParam[Ledger],
    registry: dg.ResourceParam[ModelRegistry],
) -> dg.MaterializeResult[Any]:
    """The decision to serve: refuses unless every gate passes, asked again on the stored report of this adapter.

    What newly goes live is told to the webhooks of `FT_NOTIFY_URL`.
    """
    with typed_failures():
        task = task_named(environment, context.partition_key)
        because = context.run.tags.get("ft/because", "materialised by hand")
        decided, candidate = promotion.release(
            lake,
            ledger,
            task.spec,
            actor=environment.actor,
            because=because,
            engine=environment.generation_engine,
        )
        live = decided.release
        told = announcing.announce(lake, environment.notify_urls, decided)
        for failure in told.failures:
            context.log.warning(f"launch notice: {failure}")
        registry.set_alias(task.name, "champion", live["model_version"])

        def write(folder: Path) -> None:
            about = {**live, "created_at": live["created_at"].isoformat()}
            (folder / "release.json").write_text(json.dumps(about, indent=1))

        made_from = {"release": live["id"], "adapter": candidate.adapter, "eval_report": candidate.report}
        artefact = publish(context, lake, (task.name, "release"), "release", made_from, write)
        history = [
            {
                "at": f"{one['created_at']:%Y-%m-%d %H:%M:%S}",
                "kind": one["kind"],
                "version": one["model_version"],
                "by": one["actor"],
                "because": one["because"],
            }
            for one in ledger.releases(task.name)
        ]
        return result(
            artefact,
            {
                "release": live["id"],
                "version": live["model_version"],
                "adapter": short(candidate.adapter),
                "decision": candidate.decision.verdict,
                "overruled": table([{"demand": k, "reason": v} for k, v in candidate.refusals.items()]),
                "because": live["because"],
                "launch_notice": told.summary,
                "history": table(history[-20:]),
            },
        )


def _built(lake: Lake, bentos: BentoStore, task: str, made_from: Mapping[str, Any]) -> str | None:
    """The tag of the present Bento, if it was built from the same, whatever it was asked then."""
    head = lake.head(task, "bento_service")
    if head is None or any(head.made_from.get(name) != made_from[name] for name in BUILT_FROM):
        return None
    tag = str(head.json("service.json")["tag"])
    return tag if bentos.has(tag) else None


def _standing(lake: Lake, bentos: BentoStore, task: str, made_from: Mapping[str, Any]) -> Artefact | None:
    """The present Bento, if it is of these inputs and still built, also when it had to be rebuilt once."""
    head = lake.head(task, "bento_service")
    if head is None or {name: head.made_from.get(name) for name in made_from} != made_from:
        return None
    return head if bentos.has(head.json("service.json")["tag"]) else None
