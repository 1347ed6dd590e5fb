"""The base model as the engine drives it: passes of tokens that belong to many requests and many adapters."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from bento.adapter_files import LowRank, check_updates
from bento.devices import fast_matmul, pick_device, pick_dtype
from bento.generation import attention
from bento.generation.attention import Plan, Rows, Run, lower_triangle, planned
from bento.generation.cache import Cache
from bento.generation.lora import Member, Pair, Updates, group_linears, place
from bento.loading import load_network
from bento.shared_weights import share_weights
from ft_resources.base_models import BaseModel
from ft_resources.errors import ServiceError

PROBE = 12
"""Tokens on which the engine is compared with the model itself."""
ROUNDING = 0.05
"""Largest difference of their logits that counts as rounding, relative to their size."""
NEIGHBOURLY = ("dynamic", "longrope")
"""Rotary embeddings that depend on the longest request of a pass."""
LAYERS = ("full_attention", "sliding_attention")


class Decoder:
    """A decoder of `transformers` with its vocabulary head.

    Raises:
        ServiceError: It cannot be loaded, or what the engine computes with it is not what it computes itself.
    """

    def __init__(self, base: BaseModel, precision: str, device: str) -> None:
        self.base = base
        self.device = pick_device(device)
        self.dtype = pick_dtype(precision, self.device)
        self._network: Any = load_network(
            AutoModelForCausalLM, base, self.dtype, self.device, attn_implementation="eager"
        )
        self._inner: Any = getattr(self._network, self._network.base_model_prefix)
        config = self._network.config.get_text_config(decoder=True)
        heads = int(config.num_attention_heads)
        self.hidden = int(config.hidden_size)
        """Width of a state."""
        self.shape = (
            int(config.num_hidden_layers),
            int(getattr(config, "num_key_value_heads", None) or heads),
            int(getattr(config, "head_dim", None) or self.hidden // heads),
        )
        """Layers, key heads, width of a head."""
        self.vocabulary = int(config.vocab_size)
        self.context = _context(config, base)
        """Most tokens of a request, prompt and answer together."""
        self.ends = ends_of(self._network.config, self._network.generation_config)
        """Tokens that end an answer."""
        self.updates = Updates()
        """Filled before each pass."""
        probe = [number * 7919 % self.vocabulary for number in range(PROBE)]
        expected, sharing = self._observed(probe)
        self.groups = group_linears(self._network, sharing, self.updates)
        self._linears: dict[str, Member] = {
            name: self._network.get_submodule(name) for group in self.groups for name in group.names
        }
        of_groups = [one for group in self.groups for one in (group.weight, group.bias) if one is not None]
        share_weights(
            f"{base.digest}-decoder-{str(self.dtype).removeprefix('torch.')}",
            (*self._network.parameters(), *self._network.buffers(), *of_groups),
        )
        self._network.set_attn_implementation(attention.NAME)
        self._compare(probe, expected)

    def cache(self, budget: int) -> Cache:
        """Room for keys and values in at most `budget` bytes."""
        return Cache(self.shape, self.context, budget, self.dtype, self.device)

    def place(self, updates: Mapping[str, LowRank], where: Path) -> dict[str, Pair]:
        """An adapter as the layers want it, on the device.

        Raises:
            ServiceError: An update does not fit a layer.
        """
        check_updates(updates, self._linears, where)
        return {module: place(low, self.dtype, self.device) for module, low in updates.items()}

    def logits(self, ids: Sequence[int], positions: Sequence[int], plan: Plan, wanted: Sequence[int]) -> torch.Tensor:
        """What follows the tokens number `wanted` of a pass: float32 [wanted, vocabulary], on the device."""
        with self._computing(plan):
            output = self._network(
                input_ids=self._row(ids),
                position_ids=self._row(positions),
                use_cache=False,
                logits_to_keep=torch.tensor(wanted, device=self.device),
            )
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def states(self, ids: Sequence[int], positions: Sequence[int], plan: Plan) -> torch.Tensor:
        """Last hidden states of a pass: float32 [tokens, hidden], on the device."""
        with self._computing(plan):
            output = self._inner(input_ids=self._row(ids), position_ids=self._row(positions), use_cache=False)
        states: torch.Tensor = output.last_hidden_state[0].float()
        return states

    def hidden_from(self, tokens: int, past: int) -> torch.Tensor | None:
        """`Run.hidden` for a run of `tokens` after `past` others."""
        if not past or tokens == 1:
            return None
        return lower_triangle(tokens, past, torch.empty(0, dtype=self.dtype, device=self.device))

    @contextmanager
    def _computing(self, plan: Plan) -> Iterator[None]:
        with torch.inference_mode(), fast_matmul(self.device, self.dtype), planned(plan):
            try:
                yield
            finally:
                for group in self.groups:
                    group.forget()

    def _row(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, device=self.device).unsqueeze(0)

    def _observed(self, ids: list[int]) -> tuple[torch.Tensor, list[list[str]]]:
        """Logits of the model as it was loaded, and its plain linear layers, those together that read one tensor.

        Layers that do not read every token once, such as experts, are left alone, and so is the vocabulary head.
        """
        read: dict[str, list[torch.Tensor]] = {}
        hooks = [
            module.register_forward_pre_hook(
                lambda _module, inputs, name=name: read.setdefault(name, []).append(inputs[0])
            )
            for name, module in self._network.named_modules()
            if type(module) is nn.Linear and name.startswith(self._network.base_model_prefix + ".")
        ]
        try:
            with torch.inference_mode():
                logits: torch.Tensor = self._network(input_ids=self._row(ids), use_cache=False).logits[0].float()
        finally:
            for hook in hooks:
                hook.remove()
        sharing: dict[int, list[str]] = {}
        for name, inputs in read.items():
            if len(inputs) == 1 and inputs[0].shape[:-1] == (1, len(ids)):
                sharing.setdefault(id(inputs[0]), []).append(name)
        return logits, list(sharing.values())

    def _compare(self, ids: list[int], expected: torch.Tensor) -> None:
        """Read the first part of a text, then a second one after it, then write its last token."""
        lane = self._probing()
        half, last = len(ids) // 2, len(ids) - 1
        places = torch.tensor([last], device=self.device)
        steps = [
            (0, half, Plan(runs=[Run(0, half, lane)])),
            (half, last, Plan(runs=[Run(0, last - half, lane, 0, half, self.hidden_from(last - half, half))])),
            (last, last + 1, Plan(rows=[Rows(0, lane, places, last + 1, None)])),
        ]
        for start, stop, plan in steps:
            found = self.logits(ids[start:stop], range(start, stop), plan, range(stop - start))
            difference = (found - expected[start:stop]).norm() / expected[start:stop].norm()
            if not bool(difference < ROUNDING):
                raise ServiceError(
                    "the base model cannot be served: in passes with other requests it would answer differently "
                    f"(relative difference {float(difference):.2g})",
                    where=str(self.base.path),
                    mend="Use a decoder with plain softmax attention.",
                )

    def _probing(self) -> Any:
        cache = self.cache(1 << 30)
        taken = cache.take(PROBE)
        assert taken is not None
        return taken.lane


def _context(config: Any, base: BaseModel) -> int:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in NEIGHBOURLY:
        raise ServiceError(
            f"its rotary embedding '{rope['rope_type']}' depends on the longest request of a batch",
            where=str(base.path),
            mend="Use another base model.",
        )
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - set(LAYERS):
        raise ServiceError(
            f"its layers are of kind {', '.join(sorted(kinds - set(LAYERS)))}",
            where=str(base.path),
            mend="Use a base model with full attention.",
        )
    context = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    if window and (not kinds or "sliding_attention" in kinds):
        return min(context, int(window))  # up to there a window shows everything
    return context


def ends_of(*configs: Any) -> frozenset[int]:
    """Tokens that end an answer, as a model's configurations name them."""
    ends: set[int] = set()
    for config in configs:
        given = getattr(config, "eos_token_id", None)
        ends |= {given} if isinstance(given, int) else set(given or ())
    return frozenset(ends)
