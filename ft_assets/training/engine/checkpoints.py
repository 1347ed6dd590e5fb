"""Checkpoints on the lake: everything a run needs to go on as if nothing had happened. No pickle.

Kept are the last one, the best epoch by validation and the epoch that took the least time; the others are removed.
"""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ft_assets.training.jobs import CHECKPOINT, checkpoint_of
from ft_resources.lake import Lake

THIS = "this"
"""Stands for a checkpoint's own digest, which it cannot contain."""


@dataclass
class Snapshot:
    """A moment of a run."""

    progress: dict[str, Any]
    """What is no tensor: epoch, batch, step, history. JSON."""
    tensors: dict[str, torch.Tensor]
    """Weights, optimiser moments, trace, outputs of the last validation."""


@dataclass
class Checkpoints:
    """The checkpoints of one run.

    Args:
        key: Digest of everything the adapter is made from: a run resumes from its own.
    """

    lake: Lake
    task: str
    key: str
    kept: dict[str, str] = field(default_factory=dict)
    """Role (last, best, fastest) to digest."""
    _fastest: float | None = None

    def latest(self) -> Snapshot | None:
        """Where the run stood when it was last saved; None when it starts anew."""
        last = self.lake.head(self.task, checkpoint_of(self.key))
        if last is None:
            return None
        stored = last.json("progress.json")
        self.kept = {role: last.digest if digest == THIS else digest for role, digest in stored["kept"].items()}
        self._fastest = stored["fastest_seconds"]
        return Snapshot(stored["progress"], load_file(last.path("state.safetensors")))

    def best(self) -> Snapshot:
        """The best epoch so far."""
        artefact = self.lake.open(self.kept["best"])
        return Snapshot(artefact.json("progress.json")["progress"], load_file(artefact.path("state.safetensors")))

    def save(self, snapshot: Snapshot, *, epoch_seconds: float | None = None, best: bool = False) -> None:
        """Store a snapshot as the last, and after an epoch as the best or fastest if it is; remove what is outlived.

        Args:
            epoch_seconds: What the epoch that just ended took; None within an epoch.
        """
        roles = {**self.kept, "last": THIS}
        if best:
            roles["best"] = THIS
        if epoch_seconds is not None and (self._fastest is None or epoch_seconds < self._fastest):
            roles["fastest"], self._fastest = THIS, epoch_seconds
        stored = {"progress": snapshot.progress, "kept": roles, "fastest_seconds": self._fastest}
        with tempfile.TemporaryDirectory(prefix="ft-") as scratch:
            folder = Path(scratch)
            tensors = {name: value.contiguous() for name, value in snapshot.tensors.items()}
            save_file(tensors, folder / "state.safetensors")
            (folder / "progress.json").write_text(json.dumps(stored))
            digest = self.lake.publish(CHECKPOINT, folder, {"run": self.key, **_place(snapshot.progress)}).digest
        self.lake.set_head(self.task, checkpoint_of(self.key), digest, self.key)
        before, self.kept = self.kept, {role: digest if name == THIS else name for role, name in roles.items()}
        for outlived in set(before.values()) - set(self.kept.values()):
            if self.lake.open(outlived).made_from["run"] == self.key:  # else another training goes on from it too
                self.lake.discard(outlived)


def _place(progress: dict[str, Any]) -> dict[str, int]:
    return {name: progress[name] for name in ("epoch", "batch", "step")}
