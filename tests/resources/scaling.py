"""The algorithm of Kubernetes' HorizontalPodAutoscaler, and services that load comes to.

It is the one of the controller for `autoscaling/v2`: a look every 15 seconds, a tenth of tolerance around each target,
the largest of the metrics' wishes, stabilisation windows over the wishes, then what the most generous policy allows.
Left out is what depends on a real cluster: metrics lag by up to a minute, and replicas that start count as idle.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

LOOK = 15
"""Seconds between two looks."""
TOLERANCE = 0.1
Usage = Mapping[str, float]
"""What one replica uses by metric, in the units of the targets."""


class Autoscaler:
    """Decides how many replicas there are.

    Args:
        least: Replicas at least.
        most: Replicas at most.
        targets: What one replica should use, by metric.
        behavior: `spec.behavior` of an autoscaler.
        replicas: How many there are when it begins to look.
    """

    def __init__(
        self, least: int, most: int, targets: Usage, behavior: Mapping[str, Mapping[str, Any]], replicas: int
    ) -> None:
        self.least, self.most, self.targets, self.replicas = least, most, targets, replicas
        self._rules = behavior
        self._wishes = [(0, replicas)]
        self._changes: list[tuple[int, int]] = []

    @classmethod
    def of(cls, one: Mapping[str, Any], replicas: int) -> "Autoscaler":
        """As a rendered HorizontalPodAutoscaler or ScaledObject describes it."""
        spec = one["spec"]
        if one["kind"] == "ScaledObject":
            targets = {each["type"]: each["metadata"] for each in spec["triggers"]}
            return cls(
                spec["minReplicaCount"],
                spec["maxReplicaCount"],
                {"requests": float(targets["prometheus"]["threshold"]), "cpu": float(targets["cpu"]["value"])},
                spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"],
                replicas,
            )
        resources = [each["resource"] for each in spec["metrics"]]
        return cls(
            spec["minReplicas"],
            spec["maxReplicas"],
            {each["name"]: float(each["target"]["averageUtilization"]) for each in resources},
            spec["behavior"],
            replicas,
        )

    def look(self, now: int, usage: Usage) -> int:
        """The number of replicas from `now` (seconds) on."""
        wish = max(self._wish(usage[metric] / target) for metric, target in self.targets.items())
        allowed = self._allowed(now, self._stable(now, wish))
        self._wishes.append((now, wish))
        self._changes.append((now, allowed - self.replicas))
        self.replicas = allowed
        return allowed

    def _wish(self, ratio: float) -> int:
        return self.replicas if abs(ratio - 1) <= TOLERANCE else math.ceil(ratio * self.replicas)

    def _stable(self, now: int, wish: int) -> int:
        """More only if every wish of the window was for more, and as many as the least of them; fewer likewise."""

        def window(rules: str) -> list[int]:
            since = now - self._rules[rules]["stabilizationWindowSeconds"]
            return [wish, *(earlier for at, earlier in self._wishes if at > since)]

        return min(max(self.replicas, min(window("scaleUp"))), max(window("scaleDown")))

    def _allowed(self, now: int, wanted: int) -> int:
        if wanted > self.replicas:
            return min(wanted, self.most, max(self.replicas, *self._bounds(now, "scaleUp", 1)))
        return max(wanted, self.least, min(self.replicas, *self._bounds(now, "scaleDown", -1)))

    def _bounds(self, now: int, rules: str, sign: int) -> list[int]:
        """What each policy allows, from the replicas there were when its period began."""
        bounds = []
        for policy in self._rules[rules]["policies"]:
            began = self.replicas - sum(change for at, change in self._changes if at > now - policy["periodSeconds"])
            step = policy["value"] if policy["type"] == "Pods" else began * policy["value"] / 100
            bounds.append(math.ceil(began + step) if sign > 0 else int(began - step))
        return bounds


def traced(scaler: Autoscaler, load: Callable[[int], Usage], minutes: int) -> dict[int, int]:
    """Replicas by second, a look every `LOOK` seconds.

    Args:
        load: What all replicas together are asked for at a second; a replica does no more cpu than 100 %.
    """
    found = {}
    for now in range(LOOK, minutes * 60 + 1, LOOK):
        usage = {metric: total / scaler.replicas for metric, total in load(now).items()}
        usage["cpu"] = min(100.0, usage["cpu"])
        found[now] = scaler.look(now, usage)
    return found
