"""Training an adapter again from what it was made from, and saying whether and where it came out different."""

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_assets.training.identity import RUNNER, TRAINER, environment_of_plugin, environment_of_training
from ft_assets.training.jobs import PLUGIN
from ft_assets.training.recipes import Settings
from ft_assets.training.relief import reliefs_of
from ft_resources.base_models import resolve
from ft_resources.environments import Environment
from ft_resources.errors import ArtefactError
from ft_resources.files import file_hashes
from ft_resources.lake import Artefact, Lake, short

WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "head.safetensors")
LOSS_TOLERANCE = 1e-3
"""Largest difference of a step's loss where the adapter does not claim to be bit-exact."""


@dataclass(frozen=True)
class Reproduction:
    """What came of training an adapter again."""

    adapter: str
    identical: bool
    """Everything that was compared has the same bytes."""
    acceptable: bool
    """Identical, or within the tolerance that the adapter declares."""
    exactness: str
    tensors: Mapping[str, tuple[str, str]]
    """Name of each tensor, or file, that differs -> SHA-256 then and now, 12 digits."""
    compared: int
    """How many were looked at."""
    first_step: int | None
    """The first step after which a trained tensor differed; None when none did or nobody kept the trace."""
    first_tensors: tuple[str, ...]
    """The tensors that differed after it."""
    largest_loss_difference: float
    changed: Mapping[str, tuple[str, str]]
    """What decides the bytes and is not as it was: name -> then and now. Such as versions of libraries."""
    things: str = "tensors"
    """What was compared: tensors, or the files of what a plug-in trained."""

    @property
    def verdict(self) -> str:
        """One sentence for people."""
        if self.identical:
            return f"Reproduced: all {self.compared} {self.things} have the same bytes."
        where = (
            f" It first diverged at step {self.first_step}, in {self.first_tensors[0]}"
            + (f" and {len(self.first_tensors) - 1} more" if len(self.first_tensors) > 1 else "")
            + "."
            if self.first_step
            else ""
        )
        because = f" Not as it was: {', '.join(self.changed)}." if self.changed else ""
        held = "within" if self.acceptable else "outside"
        return (
            f"{len(self.tensors)} of {self.compared} {self.things} differ.{where}{because} The largest difference of a "
            f"loss is {self.largest_loss_difference:.2g}, {held} what the adapter declares ({self.exactness})."
        )


def reproduce(
    lake: Lake, environment: Environment, adapter: str, show: Callable[[str], None] = lambda line: None
) -> Reproduction:
    """Train the adapter with this digest again and compare.

    Args:
        show: Told of the steps.

    Raises:
        ArtefactError: It is not an adapter of this platform, or the base model is another one now.
        TrainingError: As of any training.
    """
    original = lake.open(adapter)
    if original.kind != "adapter" or "settings" not in original.made_from:
        raise ArtefactError(
            f"{short(adapter)} is not an adapter that can be trained again",
            where=original.uri,
            mend="Give the digest that the asset 'adapter' shows.",
        )
    made = original.made_from
    if PLUGIN in made:
        return _of_plugin(lake, environment, original)
    settings = Settings.model_validate(made["settings"])
    base = resolve(settings.base.model)
    if base.digest != made["base"]:
        raise ArtefactError(
            f"the base model {base.reference} is not the one the adapter was trained on",
            where=f"{short(base.digest)} now, {short(made['base'])} then",
            mend="Bring that base model back.",
        )
    from ft_assets.training.engine.distributed import World
    from ft_assets.training.engine.runs import DESCRIBED, fit, memory_of, task_rows, tokenise, use_cores

    use_cores(World())
    rows = task_rows(lake, made)
    data = tokenise(rows, base, settings.base.max_tokens)
    about = original.json("adapter.json")
    parent = lake.open(made["parent"]) if "parent" in made else None
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        trained = fit(
            rows,
            data,
            base,
            settings,
            folder,
            describe={name: about[name] for name in DESCRIBED if name in about},
            device=environment.device,
            memory=memory_of(environment),
            relief=reliefs_of(made),
            parent=parent.folder if parent else None,
            on_step=lambda step: show(
                f"step {step.step}/{step.steps}, loss {step.loss:.4f}, about {step.eta_seconds:.0f} s left"
            ),
        )
        differing, compared = _differing(original, folder)
    step, names = _divergence(lake, adapter, trained)
    losses = zip(original.json("training.json")["loss"], trained.history.loss, strict=False)
    largest = max(abs(then - now) for then, now in losses)
    return Reproduction(
        adapter=adapter,
        identical=not differing,
        acceptable=not differing or (about.get("exactness", "bit-exact") != "bit-exact" and largest <= LOSS_TOLERANCE),
        exactness=about.get("exactness", "bit-exact"),
        tensors=differing,
        compared=compared,
        first_step=step,
        first_tensors=names,
        largest_loss_difference=largest,
        changed=_changed(made, environment),
    )


def _of_plugin(lake: Lake, environment: Environment, original: Artefact) -> Reproduction:
    """What a plug-in trainer makes of the same rows and settings now, file by file."""
    from ft_assets.training.plugins.interface import find
    from ft_assets.training.plugins.running import MODEL, fit, rows_of

    made = original.made_from
    plugin = find(made[PLUGIN]["trainer"], where=original.uri)
    settings = plugin.trainer.settings.model_validate(made["settings"])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "trained"
        history = fit(plugin, rows_of(lake, made), settings, folder, describe={})
        now = {f"{MODEL}/{name}": digest for name, digest in file_hashes(folder / MODEL).items()}
    then = {name: entry["sha256"] for name, entry in original.files.items() if name.startswith(f"{MODEL}/")}
    differing = {
        name: (then.get(name, "absent")[:12], now.get(name, "absent")[:12])
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    }
    losses = zip(original.json("training.json")["loss"], history["loss"], strict=False)
    return Reproduction(
        adapter=original.digest,
        identical=not differing,
        acceptable=not differing,
        exactness="bit-exact",
        tensors=differing,
        compared=len({*then, *now}),
        first_step=None,
        first_tensors=(),
        largest_loss_difference=max(abs(before - after) for before, after in losses),
        changed=_between(
            {**made[PLUGIN], "runner": made["trainer"], **made["environment"]},
            {**plugin.identity, "runner": RUNNER, **environment_of_plugin(environment, plugin.packages())},
        ),
        things="files",
    )


def _differing(original: Artefact, folder: Path) -> tuple[dict[str, tuple[str, str]], int]:
    from safetensors.numpy import load_file

    differing, compared = dict[str, tuple[str, str]](), 0
    for file in WEIGHTS:
        if file not in original.files:
            continue
        then, now = load_file(original.path(file)), load_file(folder / file)
        for name in sorted({*then, *now}):
            compared += 1
            before, after = (_digest(side.get(name)) for side in (then, now))
            if before != after:
                differing[name] = (before, after)
    return differing, compared


def _digest(tensor: Any) -> str:
    return "absent" if tensor is None else hashlib.sha256(tensor.tobytes()).hexdigest()[:12]


def _divergence(lake: Lake, adapter: str, trained: Any) -> tuple[int | None, tuple[str, ...]]:
    """The first step after which checksums of trained tensors differ, and whose."""
    from safetensors.torch import load_file

    from ft_assets.training.engine.runs import TRACE

    kept = lake.find(TRACE, {"adapter": adapter})
    if kept is None:
        return None, ()
    then, now = load_file(kept.path("trace.safetensors"))["checksums"], trained.trace
    for step in range(min(len(then), len(now))):
        other = (then[step] != now[step]).nonzero().flatten().tolist()
        if other:
            return step + 1, tuple(trained.names[at] for at in other)
    return None, ()


def _changed(made: Mapping[str, Any], environment: Environment) -> dict[str, tuple[str, str]]:
    """What decides the bytes and differs from then: the trainer's code, versions, device, threads."""
    return _between(
        {"trainer": made["trainer"], **made["environment"]},
        {"trainer": TRAINER, **environment_of_training(environment)},
    )


def _between(then: Mapping[str, str], now: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    return {
        name: (then.get(name, "-"), now.get(name, "-"))
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    }
