"""Helm charts as their tests see them: rendered by Helm's own library, refused or taken by Kubernetes' own schemas."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import helm_python
import kubernetes_validate
import yaml

from ft_resources.environments import REPOSITORY

RELEASED = ("1.27", "1.30", "1.37")
"""Versions of Kubernetes from the oldest that the charts name to the newest whose schemas are here."""


@dataclass(frozen=True)
class Chart:
    """A chart of this repository, the name it is released under, and values with which it can be."""

    name: str
    release: str
    values: Mapping[str, Any]

    @property
    def folder(self) -> str:
        return str(REPOSITORY / "deployments" / "helm" / self.name)

    def with_(self, path: str, value: Any) -> dict[str, Any]:
        """The values with another one at `path`."""
        changed = copy.deepcopy(dict(self.values))
        *parents, last = path.split(".")
        place = changed
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = value
        return changed

    def texts(self, values: Mapping[str, Any] | None = None) -> list[str]:
        """Every template of a release in the namespace `ml`, rendered; notes too."""
        with helm_python.Chart.load(self.folder) as chart:
            given = dict(self.values if values is None else values)
            return list(chart.render(given, name=self.release, namespace="ml").values())

    def rendered(self, values: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
        """The objects of a release by kind."""
        found = [yaml.safe_load(text) for text in self.texts(values) if "apiVersion:" in text]
        return {one["kind"]: one for one in found}

    def validate(self, values: Mapping[str, Any], version: str, *, own: tuple[str, ...] = ()) -> None:
        """Lint, and compare every object with the schemas of a version of Kubernetes; those of kinds in `own` not."""
        assert not helm_python.lint(self.folder, dict(values), strict=True)["errors"]
        for kind, one in self.rendered(values).items():
            if kind not in own:
                kubernetes_validate.validate(one, version, strict=True)


def pod(one: dict[str, Any]) -> dict[str, Any]:
    spec = one["spec"]["jobTemplate"]["spec"] if one["kind"] == "CronJob" else one["spec"]
    return dict(spec["template"]["spec"])


def container(one: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod(one)["containers"]
    return dict(only)


def variables(one: dict[str, Any]) -> dict[str, Any]:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container(one)["env"]}
