"""Reading an adapter folder: everything is checked, and what cannot be served exactly is refused.

Only JSON and safetensors are read, never pickle. The folder holds what peft's `save_pretrained` writes on a
`transformers.AutoModel`, the classification head, and `adapter.json`.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import pydantic

from ft_resources.base_models import BaseModel
from ft_resources.errors import ServiceError

if TYPE_CHECKING:
    import torch

Form = TypeVar("Form", bound=pydantic.BaseModel)

KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
EXACT_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base weights as they are; the others (PiSSA, OLoRA, ...) change them."""
OTHER_BASE = "Serve it with the base model it was trained on."
HARMLESS = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
"""Settings of peft's LoraConfig that say nothing about inference, or that the engine honours."""


class BaseReference(pydantic.BaseModel):
    """The base model an adapter was trained on."""

    model: str
    digest: str

    @property
    def name(self) -> str:
        """What callers are told: of a folder no more than what it is called."""
        return self.model if ":" in self.model else PurePath(self.model).name


class Preparation(pydantic.BaseModel):
    """What `bento.preparation.prepare` does to a text, as it was done to the training rows."""

    pii: tuple[str, ...] = ()
    max_chars: Annotated[int, pydantic.Field(ge=1)] = 20_000


class Reference(pydantic.BaseModel):
    """What `adapter.json` of any adapter says about the engine it needs."""

    type: Literal["text-classification", "text-generation", "extraction"]
    base: BaseReference


class Manifest(pydantic.BaseModel):
    """`adapter.json`: how the adapter turns text into a label."""

    format: Literal[1]
    task: str
    type: Literal["text-classification"]
    labels: tuple[str, ...] = pydantic.Field(min_length=2)
    base: BaseReference
    max_tokens: int = pydantic.Field(ge=3)
    pooling: Literal["mean", "cls", "last"]
    temperature: float = pydantic.Field(gt=0, allow_inf_nan=False)
    preparation: Preparation = Preparation()

    @pydantic.field_validator("labels")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("labels must differ from each other")
        return value


@dataclass(frozen=True)
class LowRank:
    """The update of one linear layer: output += scale * (input @ a.T) @ b.T."""

    a: "torch.Tensor"
    """float32 [rank, in]"""
    b: "torch.Tensor"
    """float32 [out, rank]"""
    scale: float


@dataclass(frozen=True)
class AdapterFiles:
    """A folder that was read and found whole."""

    manifest: Manifest
    updates: Mapping[str, LowRank]
    """Module name in the base model -> its update."""
    head_weight: "torch.Tensor"
    """float32 [labels, hidden]"""
    head_bias: "torch.Tensor"
    """float32 [labels]"""


def read_manifest(folder: Path) -> Manifest:
    """`adapter.json` of a classifier in `folder`.

    Raises:
        ServiceError: The file is missing, not JSON, or a field is not what the format asks for.
    """
    return read_manifest_as(Manifest, folder)


def read_reference(folder: Path) -> Reference:
    """Type and base model of the adapter in `folder`, of whichever type.

    Raises:
        ServiceError: The file is missing, not JSON, or one of them is not there.
    """
    return read_manifest_as(Reference, folder)


def read_manifest_as(form: type[Form], folder: Path) -> Form:
    """`adapter.json` of `folder`, read as `form`.

    Raises:
        ServiceError: The file is missing, not JSON, or a field is not what the format asks for.
    """
    path = folder / "adapter.json"
    try:
        return form.model_validate(_json(path))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise _refuse(path, f"field '{field}': {first['msg']}" if field else first["msg"]) from None


def read_low_rank(folder: Path) -> dict[str, LowRank]:
    """The low-rank updates of the peft adapter in `folder`, by module name in the base model.

    Raises:
        ServiceError: A file is missing or damaged, a tensor is not finite, or the adapter uses something that
            cannot be served exactly (DoRA, trained modules or biases, an initialisation that changes the base).
    """
    path = folder / "adapter_config.json"
    config = _json(path)
    _check_config(path, config)
    return _updates(folder / "adapter_model.safetensors", config)


def read_adapter(folder: Path) -> AdapterFiles:
    """Every tensor and setting of the adapter in `folder`.

    Raises:
        ServiceError: A file is missing or damaged, a tensor is not finite, or the adapter uses something that
            cannot be served exactly (DoRA, trained modules or biases, an initialisation that changes the base).
    """
    manifest = read_manifest(folder)
    updates = read_low_rank(folder)
    head_path = folder / "head.safetensors"
    head = _tensors(head_path)
    if set(head) != {"weight", "bias"} or head["weight"].ndim != 2 or head["bias"].ndim != 1:
        raise _refuse(head_path, "the head needs exactly a 'weight' [labels, hidden] and a 'bias' [labels]")
    rows = (head["weight"].shape[0], head["bias"].shape[0])
    if rows != (len(manifest.labels), len(manifest.labels)):
        raise _refuse(head_path, f"the head has {rows[0]} rows and {rows[1]} biases for {len(manifest.labels)} labels")
    return AdapterFiles(
        manifest=manifest,
        updates=updates,
        head_weight=head["weight"].float(),
        head_bias=head["bias"].float(),
    )


def check_base(trained_on: BaseReference, base: BaseModel, folder: Path) -> None:
    """Raises:
    ServiceError: The adapter in `folder` was trained on another base model than `base`.
    """
    if trained_on.digest != base.digest:
        raise ServiceError(
            f"the adapter was trained on another base model ({trained_on.model}, {trained_on.digest[:12]}) "
            f"than the one in memory ({base.digest[:12]})",
            where=str(folder),
            mend=OTHER_BASE,
        )


def check_updates(updates: Mapping[str, LowRank], layers: "Mapping[str, torch.nn.Linear]", folder: Path) -> None:
    """Raises:
    ServiceError: An update in `folder` fits no layer of the base model; `layers` are the ones it may update.
    """
    for module, low in updates.items():
        layer = layers.get(module)
        if layer is None:
            raise ServiceError(
                f"the base model has no plain linear layer '{module}'", where=str(folder), mend=OTHER_BASE
            )
        if (low.a.shape[1], low.b.shape[0]) != (layer.in_features, layer.out_features):
            raise ServiceError(
                f"the update of '{module}' maps {low.a.shape[1]} to {low.b.shape[0]} values, "
                f"the layer {layer.in_features} to {layer.out_features}",
                where=str(folder),
                mend=OTHER_BASE,
            )


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise _refuse(path, f"peft_type is {config.get('peft_type')!r}, only LORA is served")
    if config.get("bias", "none") != "none":
        raise _refuse(path, "it was trained with biases (bias != 'none'), which other adapters would inherit")
    if config.get("init_lora_weights", True) not in EXACT_INITIALISATIONS:
        raise _refuse(
            path,
            f"init_lora_weights={config['init_lora_weights']!r} changes the base weights",
            "Convert it with peft's path_initial_model_for_weight_conversion, or train with another initialisation.",
        )
    unknown = sorted(key for key, value in config.items() if value and key not in HARMLESS and key != "bias")
    if unknown:
        raise _refuse(path, f"the setting '{unknown[0]}' cannot be served exactly")
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), int | float):
        raise _refuse(path, "'r' and 'lora_alpha' must be numbers")


def _updates(path: Path, config: Mapping[str, Any]) -> dict[str, LowRank]:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in _tensors(path).items():
        match = KEY.fullmatch(key)
        if match is None:
            raise _refuse(path, f"tensor '{key}' is not a low-rank update of a linear layer")
        parts.setdefault(match["module"], {})[match["part"]] = tensor.float()
    if not parts:
        raise _refuse(path, "it holds no low-rank update")
    return {module: _low_rank(path, module, pair, config) for module, pair in parts.items()}


def _low_rank(path: Path, module: str, pair: "Mapping[str, torch.Tensor]", config: Mapping[str, Any]) -> LowRank:
    if set(pair) != {"A", "B"}:
        raise _refuse(path, f"'{module}' has only lora_{next(iter(pair))}")
    a, b = pair["A"], pair["B"]
    rank = _pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise _refuse(path, f"'{module}' has shapes {list(a.shape)} and {list(b.shape)} for rank {rank}")
    return LowRank(a, b, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The first entry whose pattern matches the end of the module name, as peft picks rank and alpha."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise _refuse(path, f"the file cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise _refuse(path, f"it is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise _refuse(path, "it holds no JSON object")
    return value


def _tensors(path: Path) -> "dict[str, torch.Tensor]":
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(path.read_bytes())  # from bytes: a mapped file could change under a running service
    except OSError as error:
        raise _refuse(path, f"the file cannot be read: {error.strerror}") from None
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise _refuse(path, f"it is not a safetensors file: {error}") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise _refuse(path, f"tensor '{name}' holds values that are not finite numbers")
    return tensors


def _refuse(path: Path, what: str, mend: str = "Train or publish the adapter again.") -> ServiceError:
    return ServiceError(f"the adapter cannot be served: {what}", where=str(path), mend=mend)
