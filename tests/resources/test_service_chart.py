"""The Helm chart of the prediction service: what it renders, what it refuses, and how its replicas follow the load."""

import itertools
import json
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import bentoml
import helm_python
import kubernetes_validate
import pytest
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.container import generate
from pydantic import BaseModel, ConfigDict, PositiveInt, TypeAdapter

from bento.front import PROBES, READ_SECONDS
from bento.metrics import LABELS, metrics
from bento.protocol import ErrorCode
from ft_resources import images
from ft_resources.environments import REPOSITORY, Environment, ServiceSettings
from tests.resources.charts import RELEASED, Chart, container, pod, variables
from tests.resources.scaling import LOOK, Autoscaler, Usage, traced

CHART = Chart(
    "service",
    "mail",
    {
        "image": {"repository": "registry/ft-mail", "tag": "7"},
        "ledger": {"secret": "service-ledger"},
        "access": {"secret": "service-access"},
        "lake": {"url": "s3://bucket/lake", "credentialsSecret": "service-bucket"},
    },
)
KEDA = {**CHART.values, "autoscaling": {"by": "requests", "prometheus": "http://prometheus.monitoring:9090"}}
INGRESS = {"host": "ft.example", "className": "nginx", "tlsSecret": "ft-tls", "annotations": {"example/a": "1"}}
EVERYTHING: dict[str, Any] = {
    **CHART.values,
    "lake": {"url": "s3://b/l", "serviceAccount": "ft", "endpoint": "http://minio:9000", "region": "x"},
    "imagePullSecrets": [{"name": "registry"}],
    "ingress": INGRESS,
}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Target(Strict):
    name: str


class HpaConfig(Strict):
    behavior: dict[str, Any]


class Advanced(Strict):
    horizontalPodAutoscalerConfig: HpaConfig


class Trigger(Strict):
    type: Literal["prometheus", "cpu"]
    metricType: Literal["AverageValue", "Utilization"]
    metadata: dict[str, str]


class ScaledObjectSpec(Strict):
    scaleTargetRef: Target
    minReplicaCount: PositiveInt
    maxReplicaCount: PositiveInt
    advanced: Advanced
    triggers: list[Trigger]


class ScaledObject(Strict):
    """The part of KEDA's `keda.sh/v1alpha1` that the chart uses; a trigger's metadata are strings."""

    apiVersion: Literal["keda.sh/v1alpha1"]
    kind: Literal["ScaledObject"]
    metadata: dict[str, Any]
    spec: ScaledObjectSpec


class Asked(Mapping[str, str]):
    """Variables that remember which names were asked for."""

    def __init__(self, given: Mapping[str, str]) -> None:
        self.given, self.names = given, set[str]()

    def __getitem__(self, name: str) -> str:
        self.names.add(name)
        return self.given[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.given)

    def __len__(self) -> int:
        return len(self.given)


def settings_of(values: Mapping[str, Any] | None = None) -> dict[str, str]:
    return dict(CHART.rendered(values)["ConfigMap"]["data"])


def test_replicas_share_everything_and_are_replaced_one_by_one() -> None:
    objects = CHART.rendered()
    assert sorted(objects) == ["ConfigMap", "Deployment", "HorizontalPodAutoscaler", "PodDisruptionBudget", "Service"]
    deployment = objects["Deployment"]
    assert "replicas" not in deployment["spec"], "an upgrade would undo what the autoscaler decided"
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert objects["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    (spread,) = pod(deployment)["topologySpreadConstraints"]
    assert spread["topologyKey"] == "kubernetes.io/hostname"
    for chosen in (
        objects["Service"]["spec"]["selector"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        deployment["spec"]["selector"]["matchLabels"],
        spread["labelSelector"]["matchLabels"],
    ):
        assert chosen and chosen.items() <= labels.items()
    fixed = CHART.rendered(CHART.with_("autoscaling.by", "none"))
    assert fixed["Deployment"]["spec"]["replicas"] == 2 and "HorizontalPodAutoscaler" not in fixed
    one = CHART.with_("highAvailability", False) | {"replicas": 1, "autoscaling": {"by": "none"}}
    assert CHART.rendered(one)["Deployment"]["spec"]["replicas"] == 1


def test_a_replica_has_time_to_answer_what_it_was_asked() -> None:
    deployment = CHART.rendered()["Deployment"]
    only = container(deployment)
    pause = int(only["lifecycle"]["preStop"]["exec"]["command"][1])
    settings = ServiceSettings.read(settings_of())
    least = pause + settings.drain_seconds + settings.request_seconds + READ_SECONDS
    assert pod(deployment)["terminationGracePeriodSeconds"] > least
    assert only["readinessProbe"]["httpGet"]["path"] == only["startupProbe"]["httpGet"]["path"] == "/readyz"
    assert only["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert {only[probe]["httpGet"]["path"] for probe in only if probe.endswith("Probe")} <= set(PROBES)
    longer = pod(CHART.rendered(CHART.with_("requestSeconds", 900))["Deployment"])
    assert longer["terminationGracePeriodSeconds"] - pod(deployment)["terminationGracePeriodSeconds"] == 600


def test_a_replica_is_what_the_image_is_made_for(tmp_path: Path) -> None:
    deployment = CHART.rendered()["Deployment"]
    only, where = container(deployment), pod(deployment)
    assert where["securityContext"]["runAsNonRoot"] and where["securityContext"]["runAsUser"] == generate.BENTO_UID_GID
    assert only["securityContext"]["readOnlyRootFilesystem"] and only["resources"]["limits"]["memory"]
    (mount,) = only["volumeMounts"]
    written = [variables(deployment)["HOME"], variables(deployment)["BENTOML_HOME"], settings_of()["FT_HOME"]]
    assert all(Path(folder).is_relative_to(mount["mountPath"]) for folder in written)
    assert where["volumes"][0].keys() == {"name", "emptyDir"}
    (port,) = only["ports"]
    assert port["containerPort"] == BentoMLContainer.http.port.get(), "which the Dockerfile exposes"
    assert settings_of()["FT_AUTH"] == images.VARIABLES["FT_AUTH"] == "always"
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert deployment["metadata"]["labels"]["app.kubernetes.io/version"] == project["version"]
    # the image's own entry point, with a program that says what it was asked
    program = tmp_path / "bentoml"
    program.write_text("#!/bin/sh\necho $@\n")
    program.chmod(0o755)
    entry = Path(bentoml.__file__).parent / "_internal/container/frontend/dockerfile/entrypoint.sh"
    said = subprocess.run(
        ["bash", str(entry), *only["args"]],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "BENTO_PATH": "/home/bentoml/bento"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.split() == ["serve", "--host=0.0.0.0", f"--port={port['containerPort']}", "/home/bentoml/bento"]


def test_every_variable_is_one_that_the_service_reads() -> None:
    schema = json.loads(Path(CHART.folder, "values.schema.json").read_text())
    allowed = schema["properties"]["settings"]["propertyNames"]["enum"]
    asked = Asked(settings_of())
    settings = ServiceSettings.read(asked)
    Environment.read(asked)
    deployed = {name for name in variables(CHART.rendered()["Deployment"]) if name.startswith("FT_")}
    assert deployed == {"FT_LEDGER", "FT_JWT_SECRET", "FT_API_KEYS"}
    assert asked.given.keys() | set(allowed) | deployed <= asked.names
    assert (settings.auth, settings.log, settings.drain_seconds, settings.request_seconds) == ("always", "json", 5, 300)
    more = settings_of(CHART.with_("settings", {"FT_RATE_LIMIT": "600", "FT_JWT_PUBLIC_KEY": "-----BEGIN\nPEM"}))
    assert more["FT_RATE_LIMIT"] == "600" and more["FT_JWT_PUBLIC_KEY"] == "-----BEGIN\nPEM"


def test_changed_settings_roll_out() -> None:
    def checksum(values: dict[str, Any]) -> str:
        template = CHART.rendered(values)["Deployment"]["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/config"])

    assert checksum(dict(CHART.values)) == checksum(CHART.with_("replicas", 3))
    assert checksum(dict(CHART.values)) != checksum(CHART.with_("settings", {"FT_RATE_LIMIT": "600"}))


def test_secrets_are_named_and_never_rendered() -> None:
    deployment = CHART.rendered()["Deployment"]
    references = {
        name: value["secretKeyRef"] for name, value in variables(deployment).items() if "secret" in str(value)
    }
    assert references == {
        "FT_LEDGER": {"name": "service-ledger", "key": "uri"},
        "FT_JWT_SECRET": {"name": "service-access", "key": "FT_JWT_SECRET"},
        "FT_API_KEYS": {"name": "service-access", "key": "FT_API_KEYS", "optional": True},
    }
    assert {"secretRef": {"name": "service-bucket"}} in container(deployment)["envFrom"]
    for path, value in (
        ("ledger.secret", "postgresql+psycopg2://ft:hidden-word@db/ft"),
        ("ledger.url", "postgresql+psycopg2://ft:hidden-word@db/ft"),
        ("access.secret", "Hidden/Word=="),
        ("settings.FT_JWT_SECRET", "hidden-word"),
        ("settings.FT_API_KEYS", "hidden-word"),
        ("settings.FT_LEDGER", "postgresql+psycopg2://ft:hidden-word@db/ft"),
        ("lake.endpoint", "https://key:hidden-word@minio:9000"),
    ):
        with pytest.raises(helm_python.HelmError, match=path.rpartition(".")[2]):
            CHART.rendered(CHART.with_(path, value))


@pytest.mark.parametrize("version", RELEASED)
@pytest.mark.parametrize("values", [CHART.values, CHART.with_("autoscaling.by", "none"), KEDA, EVERYTHING])
def test_every_object_is_one_that_kubernetes_takes(values: dict[str, Any], version: str) -> None:
    CHART.validate(values, version, own=("ScaledObject",))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("image.repository", "", "image.repository is required"),
        ("image.tag", "", "image.tag is required"),
        ("ledger.secret", "", "ledger.secret is required"),
        ("access.secret", "", "access.secret is required"),
        ("lake.url", "", "lake.url is required"),
        ("lake.url", "/mnt/lake", "lake.url is '/mnt/lake'.*not shared by the replicas"),
        ("lake.url", "file:///mnt/lake", "lake.url is 'file:///mnt/lake'.*not shared by the replicas"),
        ("lake.credentialsSecret", "", "lake.credentialsSecret or lake.serviceAccount is required"),
        ("replicas", 1, r"'/replicas': minimum: got 1, want 2"),
        ("autoscaling.most", 1, r"'/autoscaling/most': minimum: got 1, want 2"),
        ("replicas", 7, "autoscaling.most is 6, less than replicas, which is 7"),
        ("autoscaling.by", "memory", r"'/autoscaling/by': value must be one of 'cpu', 'requests', 'none'"),
        ("autoscaling.by", "requests", "autoscaling.prometheus is required"),
        ("autoscaling.cpu", 800, r"'/autoscaling/cpu': maximum: got 800, want 100"),
        (
            "resources",
            {"requests": {"cpu": 1}, "limits": {"memory": None}},
            r"'/resources/limits': missing property 'm",
        ),
        ("settings", {"FT_RATE_LIMITS": "600"}, "invalid propertyName 'FT_RATE_LIMITS'"),
        ("settings", {"FT_RATE_LIMIT": 600}, r"'/settings/FT_RATE_LIMIT': got number, want string"),
        ("drainSeconds", 0, r"'/drainSeconds': minimum: got 0, want 1"),
        ("replica", 3, "additional properties 'replica' not allowed"),
    ],
)
def test_what_is_missing_or_wrong_is_refused_by_name(path: str, value: Any, said: str) -> None:
    with pytest.raises(helm_python.HelmError, match=f"(?s){said}"):
        CHART.rendered(CHART.with_(path, value))


def test_cpu_decides_with_the_numbers_that_were_agreed() -> None:
    one = CHART.rendered()["HorizontalPodAutoscaler"]["spec"]
    assert (one["minReplicas"], one["maxReplicas"]) == (2, 6)
    assert one["scaleTargetRef"]["name"] == CHART.rendered()["Deployment"]["metadata"]["name"]
    (metric,) = one["metrics"]
    assert metric["resource"] == {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}}
    up, down = one["behavior"]["scaleUp"], one["behavior"]["scaleDown"]
    assert (up["stabilizationWindowSeconds"], down["stabilizationWindowSeconds"]) == (180, 300)
    assert down["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": 60}]


def test_requests_decide_by_the_services_own_counter_and_cpu_with_the_same_behavior() -> None:
    objects = CHART.rendered(KEDA)
    assert "HorizontalPodAutoscaler" not in objects, "KEDA makes one itself"
    found = TypeAdapter(ScaledObject).validate_python(objects["ScaledObject"])
    assert found.spec.scaleTargetRef.name == objects["Deployment"]["metadata"]["name"]
    assert (found.spec.minReplicaCount, found.spec.maxReplicaCount) == (2, 6)
    requests, cpu = found.spec.triggers
    assert (requests.type, requests.metricType, requests.metadata["threshold"]) == ("prometheus", "AverageValue", "50")
    assert requests.metadata["serverAddress"] == "http://prometheus.monitoring:9090"
    assert (cpu.type, cpu.metricType, cpu.metadata) == ("cpu", "Utilization", {"value": "80"})
    (counter,) = metrics().requests.describe()
    query = re.fullmatch(
        r'sum\(rate\((\w+)\{namespace="ml",pod=~"(.+)",outcome!~"(.+)"\}\[1m\]\)\)', requests.metadata["query"]
    )
    assert query is not None and query[1] == f"{counter.name}_total"
    assert {"namespace", "pod"}.isdisjoint(LABELS) and "outcome" in LABELS
    assert re.fullmatch(query[2], "mail-ft-service-5c9d8f7b6d-x2x7k")
    assert not re.fullmatch(query[2], "mail-ft-service-too-5c9d8f7b6d-x2x7k")
    assert set(query[3].split("|")) < set(get_args(ErrorCode))
    behavior = CHART.rendered()["HorizontalPodAutoscaler"]["spec"]["behavior"]
    assert found.spec.advanced.horizontalPodAutoscalerConfig.behavior == behavior
    kubernetes_validate.validate(
        {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": {"name": "as-keda-makes-it"},
            "spec": {
                "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "x"},
                "maxReplicas": found.spec.maxReplicaCount,
                "behavior": found.spec.advanced.horizontalPodAutoscalerConfig.behavior,
            },
        },
        RELEASED[0],
        strict=True,
    )


def cpu_of(cores: float, since: int = 0, until: int = 10**6, before: float = 0.4) -> Any:
    """Load that is worth `cores` replicas from `since` to `until`, and `before` ones else."""

    def load(now: int) -> Usage:
        return {"cpu": 100 * (cores if since < now <= until else before)}

    return load


def followed(load: Any, minutes: int, values: dict[str, Any] | None = None, replicas: int = 2) -> dict[int, int]:
    """Replicas over time, as the rendered autoscaler decides."""
    return traced(Autoscaler.of(CHART.rendered(values)["HorizontalPodAutoscaler"], replicas), load, minutes)


def test_two_minutes_of_load_change_nothing() -> None:
    assert set(followed(cpu_of(1.9, since=600, until=600 + 120), 30).values()) == {2}


def test_more_than_three_minutes_of_load_bring_replicas_and_the_load_is_met() -> None:
    found = followed(cpu_of(1.9, since=600), 30)
    first = min(now for now, replicas in found.items() if replicas > 2)
    assert 600 + 180 <= first <= 600 + 180 + 2 * LOOK
    assert found[1800] == 3, "1.9 replicas' worth of work is 63 % of three"


def test_replicas_never_exceed_the_most() -> None:
    """Of a replica that has more work than it can do, cpu says no more than 100 %: one more every three minutes."""
    found = followed(cpu_of(40), 60)
    assert max(found.values()) == found[3600] == 6
    assert [found[minutes * 60] for minutes in (2, 4, 7, 10, 13)] == [2, 3, 4, 5, 6]


def test_after_the_load_one_replica_goes_a_minute_and_the_least_stay() -> None:
    end = 3600
    found = followed(cpu_of(40, until=end), 90)
    changes = [now for now in found if now > LOOK and found[now] != found[now - LOOK] and now > end]
    assert found[end] == 6 and found[5400] == 2
    assert end + 300 <= changes[0] <= end + 300 + 2 * LOOK
    assert [after - before for before, after in itertools.pairwise(changes)] == [60, 60, 60]


def test_load_that_comes_and_goes_does_not_move_replicas() -> None:
    def flapping(now: int) -> Usage:
        return {"cpu": 100 * (1.95 if now // 60 % 2 else 0.5)}

    assert set(followed(flapping, 120).values()) == {2}
    from_four = followed(lambda now: {"cpu": 100 * (3.8 if now // 60 % 2 else 1.0)}, 120, replicas=4)
    assert set(from_four.values()) == {4}


def test_kubernetes_leaves_a_tenth_around_the_target() -> None:
    """Which is why the chart's README says how to scale from 80 % exactly."""
    assert set(followed(cpu_of(1.7), 30).values()) == {2}, "85 %"
    assert followed(cpu_of(1.8), 30)[1800] == 3, "90 %"
    exact = CHART.with_("autoscaling.cpu", 73)
    assert set(followed(cpu_of(1.6), 30, exact).values()) == {2}, "80 %"
    assert followed(cpu_of(1.62), 30, exact)[1800] == 3, "81 %"


def test_requests_bring_as_many_replicas_as_they_take() -> None:
    def asked(each_second: float) -> dict[int, int]:
        scaler = Autoscaler.of(CHART.rendered(KEDA)["ScaledObject"], 2)
        return traced(scaler, lambda now: {"requests": each_second if now > 600 else 20, "cpu": 60}, 30)

    found = asked(240)
    assert [found[600 + seconds] for seconds in (165, 180, 225, 240)] == [2, 4, 4, 5], "two a minute, to 50 for each"
    assert found[1800] == 5
    assert max(asked(10_000).values()) == 6
