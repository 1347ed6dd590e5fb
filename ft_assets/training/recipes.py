"""Recipes: versioned training templates, and merging one with what a task overrides."""

import difflib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from ft_assets.specs import Strict, YamlFile
from ft_assets.tasks import Task, Type
from ft_assets.training.plugins.interface import Plugin, find
from ft_resources.environments import RECIPES
from ft_resources.errors import SpecError
from ft_resources.lake import Lake, canonical, digest_of


class BaseSettings(Strict):
    """The model below the adapter."""

    model: str = Field(description="package:MODULE/FOLDER, hub:ORG/NAME, a local folder, or a GGUF file.")
    max_tokens: int = Field(128, ge=8, le=32768, description="Longer inputs are cut to this many tokens.")
    pooling: Literal["mean", "cls", "last"] = Field(
        "mean", description="How token states become one vector for a classifier; last suits decoders."
    )


class LoraSettings(Strict):
    """Low-rank adaptation (Hu et al., 2021), as peft names its options."""

    rank: int = Field(16, ge=1, le=512, description="Rank of the update.")
    alpha: int = Field(32, ge=1, description="Scale: the update is multiplied by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: list[str] | Literal["all-linear"] = Field("all-linear", description="Layers that are adapted.")
    top_layers: int | None = Field(
        None, ge=1, description="Adapt only this many of the last layers; what is below is computed once and cached."
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) (Kalajdzievski, 2023).")
    use_dora: bool = Field(False, description="Magnitude and direction apart (DoRA, Liu et al., 2024).")


class TrainingSettings(Strict):
    """The optimiser, its schedule and what it may use."""

    epochs: int = Field(2, ge=1, le=100, description="Passes over the training rows.")
    kept_epoch: Literal["best", "last_as_good"] = Field(
        "best",
        description="best: the one with the best validation score; last_as_good: the last one that is not clearly "
        "worse, by more than two standard errors over the validation rows, in which classes weigh the same.",
    )
    first_epoch_tokens: int | None = Field(
        None,
        ge=8,
        description="Rows are cut to this many tokens in the first epoch, which takes less time then (sequence length "
        "warm-up, Li et al., 2022); of text-classification.",
    )
    batch_size: int = Field(16, ge=1, le=4096, description="Rows per optimiser step.")
    micro_batch_tokens: int | None = Field(
        None, ge=8, description="A step is computed in parts of at most this many tokens; the result stays the same."
    )
    learning_rate: float = Field(1e-3, gt=0, le=1, description="Peak rate of the adapter weights (AdamW).")
    head_learning_rate: float = Field(5e-3, gt=0, le=1, description="Peak rate of the classification head.")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="Rate after the warm-up.")
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW weight decay.")
    warmup_share: float = Field(0.1, ge=0, lt=1, description="Share of steps with a rising rate.")
    averaged_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="The adapter is a moving average of the weights over about this share of the steps; none: the "
        "weights after the last step.",
    )
    label_smoothing: float = Field(0.05, ge=0, lt=1, description="Label smoothing of a classifier's cross-entropy.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    class_weighting: Literal["none", "balanced"] = Field("none", description="balanced: weight by inverse frequency.")
    early_stopping: int | None = Field(
        None, ge=1, description="Stop after this many epochs without a better validation score."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the device is fast at it.")
    gradient_checkpointing: bool = Field(False, description="Less memory for about a third more time.")
    checkpoint_minutes: float = Field(1, gt=0, description="Between two checkpoints within an epoch.")
    seed: int = Field(0, ge=0, description="Seed of initialisation and order.")


class SpeedSettings(Strict):
    """Switches of what makes training fast; each gives the same losses up to rounding."""

    packing: Literal["auto", "on", "off"] = Field(
        "auto", description="Rows one after another without padding; auto: on CPUs, where the model allows it."
    )
    segment_attention: bool = Field(True, description="Own attention within packed rows; off: the library's, per row.")
    fused_lora: bool = Field(True, description="One operation for a linear layer with its low-rank update.")
    labelled_tokens_only: bool = Field(True, description="Vocabulary logits of the answer's tokens only.")
    fused_cross_entropy: bool = Field(True, description="Loss and gradient of the vocabulary logits in slices.")
    sharding: bool = Field(
        False, description="Divide the frozen base among the processes that train together (FSDP): less memory each."
    )
    cache_frozen: bool = Field(True, description="Keep what the layers below lora.top_layers give for each row.")


class Settings(Strict):
    """Everything a training run is told."""

    method: Literal["lora", "full"] = Field("lora", description="full: every weight of the base model is trained.")
    base: BaseSettings
    lora: LoraSettings = Field(default_factory=LoraSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    speed: SpeedSettings = Field(default_factory=SpeedSettings)


class Recipe(Strict):
    """A template that tasks share."""

    name: str = Field(description="Name, as in NAME@VERSION.")
    version: int = Field(ge=1, description="A published version never changes.")
    description: str = Field("", description="One sentence for people.")
    types: list[Type] = Field(min_length=1, description="Task types it trains.")
    trainer: str = Field(
        "", description="package.module:Class of a plug-in trainer; default: the platform's own, of adapters."
    )
    settings: dict[str, Any] = Field(description="What the trainer is told; the values that a task may override.")

    @property
    def base_model(self) -> str | None:
        """Reference of the model below the adapter; a plug-in trainer has none."""
        return None if self.trainer else str(self.settings["base"]["model"])


@dataclass(frozen=True)
class Merged:
    """A recipe merged with a task's overrides."""

    template: str
    """NAME@VERSION."""
    template_digest: str
    settings: Strict
    origins: Mapping[str, str]
    """Dotted path of every value -> `recipe ...`, `task FILE:LINE`, `form`, `search trial N` or `default`."""


@dataclass(frozen=True)
class Resolved(Merged):
    """One for the platform's own trainer."""

    settings: Settings


@dataclass(frozen=True)
class Plugged(Merged):
    """One for a plug-in trainer."""

    plugin: Plugin


AnyMerged = TypeVar("AnyMerged", bound=Merged)


def of_transformers(merged: Merged) -> Resolved:
    """`merged`, as that of the platform's own trainer.

    Raises:
        SpecError: It is a plug-in's.
    """
    if isinstance(merged, Resolved):
        return merged
    raise SpecError(
        f"recipe {merged.template} is trained by a plug-in, and this is for adapters on a base model",
        where="recipe",
        mend="Name a recipe without `trainer` in the task file.",
    )


def resolve(task: Task, folder: Path = RECIPES) -> Merged:
    """The settings `task` trains with, and where each of them comes from.

    Raises:
        SpecError: No such recipe, a recipe for another task type, an override that the recipe does not know, or a
            trainer that is not there or none.
    """
    reference = task.spec.recipe
    where = task.file.where(("recipe",))
    template = load(reference, folder, where=where)
    if task.spec.type not in template.recipe.types:
        raise SpecError(
            f"recipe {reference} does not train {task.spec.type}",
            where=where,
            mend=f"It trains {', '.join(template.recipe.types)}.",
        )
    merged = merge(template.recipe.settings, task.spec.overrides)
    settings = task.file.validate(template.model, merged, below=("overrides",))
    if (
        isinstance(settings, Settings)
        and settings.training.first_epoch_tokens is not None
        and task.spec.type != "text-classification"
    ):
        raise SpecError(
            f"rows of {task.spec.type} are not cut shorter in the first epoch: their answers stand at the end",
            where=task.file.where(("overrides", "training", "first_epoch_tokens")),
            mend="Leave training.first_epoch_tokens out.",
        )
    origin = f"task {task.path.name}:"
    return template.merged(
        settings, task.spec.overrides, lambda path: f"{origin}{task.file.line(('overrides', *path))}"
    )


def known(folder: Path = RECIPES) -> list[str]:
    """Every published recipe, as NAME@VERSION."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


@dataclass(frozen=True)
class Template:
    """A recipe that was read and found valid."""

    file: YamlFile
    recipe: Recipe
    plugin: Plugin | None
    settings: Strict
    """Its own, with the defaults of what it leaves out."""

    @property
    def model(self) -> type[Strict]:
        """What settings may hold."""
        return type(self.settings)

    def merged(self, settings: Strict, given: Mapping[str, Any], origin: Callable[[tuple[str, ...]], str]) -> Merged:
        """`settings` with their origins; `origin` tells that of a value that `given` has."""
        reference = f"{self.recipe.name}@{self.recipe.version}"
        digest = digest_of(self.file.values)
        origins = _origins(reference, settings, self.recipe.settings, given, origin)
        if self.plugin is not None:
            return Plugged(reference, digest, settings, origins, self.plugin)
        assert isinstance(settings, Settings)  # `model` is it where there is no plug-in
        return Resolved(reference, digest, settings, origins)


def load(reference: str, folder: Path = RECIPES, *, where: str = "recipe") -> Template:
    """The recipe with this name and version.

    Raises:
        SpecError: There is no such recipe, its file declares another one, its trainer is not there or none, or its
            settings are not what the trainer takes.
    """
    if reference not in known(folder):
        near = difflib.get_close_matches(reference, known(folder), n=1, cutoff=0.3)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        mend = f"{hint}Known: {', '.join(known(folder))}."
        raise SpecError(f"there is no recipe '{reference}'", where=where, mend=mend)
    file = YamlFile(folder / f"{reference}.yaml")
    recipe = file.parse(Recipe)
    if f"{recipe.name}@{recipe.version}" != reference:
        raise SpecError(
            f"the file declares {recipe.name}@{recipe.version}", where=str(file.path), mend="Rename the file to match."
        )
    plugin = None
    if recipe.trainer:
        if recipe.types != ["text-classification"]:
            raise SpecError(
                f"a plug-in trainer trains text-classification, not {', '.join(recipe.types)}",
                where=file.where(("types",)),
                mend="Write types: [text-classification].",
            )
        plugin = find(recipe.trainer, where=file.where(("trainer",)))
    model = plugin.trainer.settings if plugin else Settings
    return Template(file, recipe, plugin, file.validate(model, recipe.settings, below=("settings",)))


PUBLISHED = "recipe"
"""Artefact of a recipe as it was when it was first trained with."""


def require_published(lake: Lake, reference: str, folder: Path = RECIPES, *, publish: bool = True) -> None:
    """Check that a recipe is what it was when it was first used, and keep it as that on the first use.

    Args:
        publish: Whether this is a use; False only checks.

    Raises:
        SpecError: It was changed since.
    """
    file = load(reference, folder).file
    first = lake.find(PUBLISHED, {"recipe": reference})
    if first is None:
        if publish:
            with tempfile.TemporaryDirectory(prefix="ft-") as scratch:
                (Path(scratch) / "recipe.json").write_bytes(canonical(file.values))
                lake.publish(PUBLISHED, Path(scratch), {"recipe": reference})
        return
    if first.read("recipe.json") != canonical(file.values):
        raise SpecError(
            f"recipe {reference} is not what it was when it was first trained with",
            where=str(file.path),
            mend=f"Give what changed a new version; {first.uri}/recipe.json holds the published one.",
        )


def with_values(merged: AnyMerged, values: Mapping[str, Any], origin: str) -> AnyMerged:
    """`merged` with some dotted paths replaced, as a search trial does.

    Raises:
        SpecError: A value is not allowed there.
    """
    tree = merged.settings.model_dump()
    for path, value in values.items():
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    try:
        settings = type(merged.settings).model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise SpecError(
            f"'{'.'.join(map(str, first['loc']))}' is {first['input']!r}: {first['msg']}",
            where=origin,
            mend="Correct what the search may choose from.",
        ) from None
    return replace(merged, settings=settings, origins={**merged.origins, **dict.fromkeys(values, origin)})


def _origins(
    reference: str,
    settings: Strict,
    template: Mapping[str, Any],
    given: Mapping[str, Any],
    origin: Callable[[tuple[str, ...]], str],
) -> dict[str, str]:
    """Dotted path of every value -> where it comes from; `origin` tells it of those that `given` has."""
    return {
        ".".join(path): origin(path)
        if _has(given, path)
        else f"recipe {reference}"
        if _has(template, path)
        else "default"
        for path in _leaves(settings.model_dump())
    }


def merge(template: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`template` with the values of `overrides` in their places; nested mappings are merged."""
    merged = dict(template)
    for key, value in overrides.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _leaves(tree: Mapping[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for key, value in tree.items():
        found += _leaves(value, (*above, key)) if isinstance(value, Mapping) else [(*above, key)]
    return found


def _has(tree: Mapping[str, Any], path: tuple[str, ...]) -> bool:
    node: Any = tree
    for part in path:
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return True
