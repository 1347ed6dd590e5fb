"""The base model with what is trained in it, and how rows pass through it: packed, or padded where that is exacter.

`Body.states` gives the last hidden state of every real token, row after row, whichever way they went.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from bento.devices import fast_matmul
from bento.memory import keep_memory
from bento.packing import Layout, first_place, pack, pack_tokens, probe_rows
from ft_assets.training.engine import attention
from ft_assets.training.engine.examples import Example
from ft_assets.training.engine.frozen import LowerLayers, layers_of
from ft_assets.training.engine.fused_lora import fuse
from ft_assets.training.recipes import Settings
from ft_resources.base_models import BaseModel
from ft_resources.errors import TrainingError

DROPOUTS = ("dropout", "attention_dropout", "hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob")
EXACT = 0.05
"""Largest difference between packed and padded states that counts as rounding, relative to their size."""


class Body:
    """A base model whose adapter, or whose every weight, is trained.

    Args:
        causal: Load it with its vocabulary head, for generation.
        kept: What the frozen lower layers gave in an earlier run, shared with it; see `runs.fit`.

    Raises:
        TrainingError: `lora.target_modules` or `lora.top_layers` does not fit the base model.
    """

    def __init__(
        self,
        base: BaseModel,
        settings: Settings,
        device: torch.device,
        dtype: torch.dtype,
        *,
        causal: bool,
        kept: dict[int, torch.Tensor] | None = None,
    ) -> None:
        keep_memory()
        self.device, self.dtype, self.settings = device, dtype, settings
        self.network = _load(base, settings, dtype, causal=causal)
        self.adapted: PeftModel | None = None
        self._recomputes = False
        lower = None
        if settings.method == "lora":
            self.adapted, lower = _with_adapter(self.network, settings, causal=causal)
            if settings.speed.fused_lora:
                fuse(self.adapted)
        self.network.to(device)
        if settings.training.gradient_checkpointing:
            self.recompute()
        self.inner = getattr(self.network, self.network.base_model_prefix, self.network)
        self._first_place = first_place(self.inner)
        self.packed = self._packs()
        self._lower: LowerLayers | None = None
        if lower and settings.speed.cache_frozen:
            self._lower = LowerLayers(self.inner, lower, {} if kept is None else kept)

    @property
    def hidden(self) -> int:
        """Width of a state."""
        return int(self.network.config.hidden_size)

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """What the optimiser changes, by name."""
        return {name: weight for name, weight in self.network.named_parameters() if weight.requires_grad}

    def start_from(self, adapter: Path) -> None:
        """Take over the low-rank weights of the adapter in this folder, which has the shape of this one.

        Raises:
            TrainingError: It has others.
        """
        assert self.adapted is not None
        given, own = load_file(adapter / SAFETENSORS_WEIGHTS_NAME), get_peft_model_state_dict(self.adapted)
        if {name: one.shape for name, one in given.items()} != {name: one.shape for name, one in own.items()}:
            raise TrainingError(
                "the weights of the adapter to start from have other names or shapes",
                where=str(adapter),
                mend="Set retraining to full in the task file.",
            )
        set_peft_model_state_dict(self.adapted, given)

    def keep_lower(self, examples: Sequence[Example], budget: int) -> None:
        """Compute once what the frozen lower layers give for `examples`.

        Nothing is kept without `lora.top_layers` or where it would take more than `budget` bytes.
        """
        if self._lower is None or all(one.number in self._lower.kept for one in examples):
            return
        size = sum(len(one.ids) for one in examples) * self.hidden * self.dtype.itemsize
        if size > budget:
            return
        with torch.no_grad(), self._computing():
            for start in range(0, len(examples), 16):
                rows = examples[start : start + 16]
                with self._lower.recording() as recorded:
                    self._run([one.ids for one in rows])
                self._lower.keep(rows, self._flat(recorded.states, [one.ids for one in rows]))

    @contextmanager
    def states(self, examples: Sequence[Example]) -> Iterator[torch.Tensor]:
        """Last hidden states [tokens, hidden] of `examples`, row after row. The backward pass belongs inside."""
        rows = [one.ids for one in examples]
        with self._computing(), self._laid_out(rows):
            if self._lower is not None and self._lower.kept:
                with self._lower.replaying(self._batched(self._lower.of(examples), rows)):
                    output = self._forward(rows)
            else:
                output = self._forward(rows)
            yield self._flat(output, rows)

    def recompute(self) -> None:
        """Compute activations again in the backward pass, in place of keeping them.

        Raises:
            TrainingError: The base model cannot.
        """
        if not self.network.supports_gradient_checkpointing:
            raise TrainingError(
                f"a {self.network.config.model_type} model cannot recompute activations",
                where="training.gradient_checkpointing",
                mend="Lower base.max_tokens or training.micro_batch_tokens, or choose another base.model.",
            )
        if not self._recomputes:
            self.network.gradient_checkpointing_enable({"use_reentrant": False})
            self._recomputes = True

    def train(self) -> None:
        self.network.train()

    def eval(self) -> None:
        self.network.eval()

    @contextmanager
    def _computing(self) -> Iterator[None]:
        bf16 = self.dtype == torch.bfloat16
        with fast_matmul(self.device, self.dtype), torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            yield

    def _laid_out(self, rows: list[list[int]]) -> AbstractContextManager[None]:
        """Tells attention where the rows of a pack lie; covers the backward pass."""
        if not self.packed:
            return nullcontext()
        return attention.laid_out(Layout(tuple(map(len, rows)), self.dtype, self.device))

    def _run(self, rows: list[list[int]]) -> torch.Tensor:
        with self._laid_out(rows):
            return self._forward(rows)

    def _forward(self, rows: list[list[int]]) -> torch.Tensor:
        if self.packed:
            ids, places = pack(rows, self._first_place, self.device)
            output: torch.Tensor = self.inner(input_ids=ids, position_ids=places).last_hidden_state
            return output
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        for at, row in enumerate(rows):
            ids[at, : len(row)] = torch.tensor(row)
        mask = self._mask(rows)
        output = self.inner(input_ids=ids.to(self.device), attention_mask=mask.long()).last_hidden_state
        return output

    def _mask(self, rows: list[list[int]]) -> torch.Tensor:
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        return torch.arange(int(lengths.max()), device=self.device) < lengths[:, None]

    def _flat(self, states: torch.Tensor, rows: list[list[int]]) -> torch.Tensor:
        return states[0, : sum(map(len, rows))] if self.packed else states[self._mask(rows)]

    def _batched(self, flat: torch.Tensor, rows: list[list[int]]) -> torch.Tensor:
        if self.packed:
            return torch.nn.functional.pad(flat, (0, 0, 0, pack_tokens(len(flat)) - len(flat))).unsqueeze(0)
        mask = self._mask(rows)
        states = flat.new_zeros(*mask.shape, flat.shape[-1])
        states[mask] = flat
        return states

    def _looks_elsewhere(self) -> bool:
        """Whether attention is more than a softmax over the whole row: in windows shorter than it, or with a cap."""
        config = self.network.config
        windows = [getattr(config, name, None) for name in ("sliding_window", "local_attention", "attention_window")]
        if getattr(config, "use_sliding_window", True) and any(
            isinstance(window, int) and window < self.settings.base.max_tokens for window in windows
        ):
            return True
        return getattr(config, "attn_logit_softcapping", None) is not None

    def _packs(self) -> bool:
        """Whether rows are packed: as asked, but only where that gives what padding gives."""
        wanted = self.settings.speed.packing
        tried = wanted == "on" or (wanted == "auto" and self.device.type == "cpu")
        if tried and not self._looks_elsewhere() and self._packs_exactly():
            return True
        if wanted == "on":
            raise TrainingError(
                f"rows cannot be packed for a base model of type {self.network.config.model_type}",
                where="speed.packing",
                mend="Set it to auto: rows are padded then.",
            )
        self.network.set_attn_implementation(_padded_attention(self.device))
        return False

    def _packs_exactly(self) -> bool:
        """Whether two rows packed give the states of the same rows padded, and the first ones none of the second."""
        rows, others = (probe_rows(int(self.network.config.vocab_size), step) for step in (5, 9))
        name = attention.SEGMENTS if self.settings.speed.segment_attention else attention.SEGMENTS_LIBRARY
        self.network.eval()
        try:
            with torch.no_grad(), self._computing():
                self.packed = False
                padded = self._flat(self._run(rows), rows).float()
                self.network.set_attn_implementation(name)
                self.packed = True
                packed = self._flat(self._run(rows), rows).float()
                beside = self._flat(self._run(others), others).float()
            same = bool((packed - padded).norm() <= EXACT * padded.norm())
            return same and torch.equal(packed[: len(rows[0])], beside[: len(rows[0])])
        except (TypeError, ValueError, RuntimeError, IndexError):  # no positions, another attention, another shape
            return False


def _padded_attention(device: torch.device) -> str:
    """The fused kernel's backward pass is the slower one on CPUs."""
    return "eager" if device.type == "cpu" else "sdpa"


def _load(base: BaseModel, settings: Settings, dtype: torch.dtype, *, causal: bool) -> Any:
    config = AutoConfig.from_pretrained(base.path)
    for name in DROPOUTS:
        if isinstance(getattr(config, name, None), float):
            setattr(config, name, 0.0)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and settings.base.max_tokens > longest:
        raise TrainingError(
            f"max_tokens is {settings.base.max_tokens}, the base model reads {longest}",
            where="base.max_tokens",
            mend="Lower it.",
        )
    network = (AutoModelForCausalLM if causal else AutoModel).from_pretrained(
        base.path,
        config=config,
        dtype=torch.float32 if settings.method == "full" else dtype,
        attn_implementation="eager",
    )
    network.config.use_cache = False
    return network


def _with_adapter(network: Any, settings: Settings, *, causal: bool) -> tuple[PeftModel, int]:
    """`network` with a fresh adapter, and how many of its first layers stay frozen."""
    lora = settings.lora
    lower, targets = 0, lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    if lora.top_layers is not None:
        lower, targets = _upper_targets(network, targets, lora.top_layers)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=_poolers(network) or None,  # not on the way from the states to the head
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        task_type="CAUSAL_LM" if causal else None,
    )
    try:
        return get_peft_model(network, config), lower
    except ValueError as error:
        raise TrainingError(
            f"the adapter does not fit the base model: {error}",
            where="lora.target_modules",
            mend="Name linear layers of the base model, or use all-linear.",
        ) from error


def _poolers(network: Any) -> list[str]:
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and name.split(".")[0] == "pooler"
    ]


def _upper_targets(network: Any, targets: str | list[str], top: int) -> tuple[int, list[str]]:
    name, layers = layers_of(network)
    if top > len(layers):
        raise TrainingError(
            f"the base model has {len(layers)} layers, not {top}", where="lora.top_layers", mend="Lower it."
        )
    lower = len(layers) - top
    linear = [
        f"{name}.{number}.{inside}"
        for number in range(lower, len(layers))
        for inside, module in layers[number].named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    if isinstance(targets, str):
        return lower, linear
    return lower, [path for path in linear if any(path.endswith(f".{target}") for target in targets)]
