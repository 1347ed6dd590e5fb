"""An encoder that turns token ids into one vector per text, with another low-rank update for each segment of texts."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from transformers import AutoModel
from transformers.activations import GELUActivation

from bento.bf16 import Bf16Weight
from bento.devices import DTYPES, Precision, fast_matmul, native_bf16
from bento.int8 import Int8Weight
from bento.loading import load_network
from bento.memory import keep_memory
from bento.multi_lora import MultiLora, Pairs, Products, Segments, Update, families_of, wrap_linears
from bento.native.products import NativeProducts
from bento.packing import PACKED, Layout, first_place, laid_out, pack, probe_rows
from bento.shared_weights import share_weights
from bento.stacked_products import StackedProducts
from ft_resources.base_models import BaseModel
from ft_resources.errors import ServiceError

EXACT = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Largest difference between packed and padded states that counts as rounding, relative to their size."""
WINDOWS = ("sliding_window", "local_attention", "attention_window", "attn_logit_softcapping")
"""Settings of models whose attention is more than a softmax over the whole text."""


class Encoder:
    """A base model in one precision on one device.

    Args:
        precision: `int8`: linear layers in int8, attention and updates in bf16 where the CPU has it, the rest in
            float32; `bf16`, `fp32`: everything.

    Raises:
        ServiceError: The base model cannot be loaded.
    """

    def __init__(self, base: BaseModel, precision: Precision, device: torch.device) -> None:
        keep_memory()
        self.precision, self.device, self.dtype = precision, device, DTYPES[precision]
        self._model: Any = load_network(AutoModel, base, self.dtype, device)
        self.config: Any = self._model.config
        update_dtype = torch.bfloat16 if precision == "int8" and native_bf16(device) else self.dtype
        self._segments = Segments()
        self.layers: dict[str, MultiLora] = wrap_linears(self._model, self._segments)
        if getattr(self._model, "pooler", None) is not None:
            self._model.pooler = None  # not on the way to the hidden states
        self._attention = self.dtype
        self._pad = int(getattr(self.config, "pad_token_id", None) or 0)
        self._first_place = first_place(self._model)
        self.packed = False
        try:
            families = families_of(self.layers, self._probe)
        except (RuntimeError, TypeError) as error:
            raise ServiceError(
                f"base model '{base.reference}' cannot be computed in {precision}: {error}",
                where=str(base.path),
                mend="Use fp32, or another base model.",
            ) from error
        padded = self._probe()
        self._activate_in_place(padded)
        self.packed = device.type == "cpu" and self._packs(padded)
        if precision == "int8":
            for layer in self.layers.values():
                layer.take(Int8Weight)
            self._attention = update_dtype
        elif precision == "bf16" and device.type == "cpu" and native_bf16(device):
            for layer in self.layers.values():
                layer.take(Bf16Weight)
        native = self.dtype == update_dtype and not NativeProducts.missing(self.layers.values(), self.dtype, device)
        self._products: Products[Any] = (
            NativeProducts(families, self.dtype) if native else StackedProducts(families, update_dtype, device)
        )
        self._segments.products = self._products
        share_weights(f"{base.digest}-encoder-{precision}", (*self._model.parameters(), *self._model.buffers()))

    @property
    def hidden(self) -> int:
        """Width of a vector."""
        return int(self.config.hidden_size)

    def update(self, pairs: Pairs) -> Update:
        """An adapter with these matrices, for `pooled`."""
        return self._products.update(pairs)

    def pooled(
        self,
        texts: Sequence[Sequence[int]],
        segments: Sequence[tuple[int, int, Update]],
        poolings: Sequence[str],
    ) -> torch.Tensor:
        """float32 [texts, hidden]: per text the mean over its tokens (`mean`), its first (`cls`) or `last` one.

        Args:
            texts: Token ids.
            segments: (first text, text after the last, update); texts outside of all get none. Neighbours of equal
                form and like length are computed together.
            poolings: Of each text.

        Raises:
            ServiceError: The model does not keep texts apart, so that updates cannot be mixed in it.
        """
        with torch.inference_mode(), fast_matmul(self.device, self.dtype):
            states = self._run(texts, segments)
            lengths = torch.tensor([len(text) for text in texts], device=self.device)
            if self.packed:
                ends = lengths.cumsum(0)
                starts = ends - lengths
            else:
                starts = torch.arange(len(texts), device=self.device) * (len(states) // len(texts))
                ends = starts + lengths
            pooled = torch.empty(len(texts), states.shape[-1], dtype=torch.float32, device=self.device)
            for pooling in set(poolings):
                chosen = torch.tensor([each == pooling for each in poolings], device=self.device).nonzero().flatten()
                if pooling == "mean":
                    pooled[chosen] = self._means(states, lengths)[chosen]
                else:
                    places = starts if pooling == "cls" else ends - 1
                    pooled[chosen] = states[places[chosen]].float()
            return pooled

    def _means(self, states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        texts = torch.arange(len(lengths), device=self.device)
        if self.packed:
            total = torch.zeros(len(lengths), states.shape[-1], dtype=torch.float32, device=self.device)
            owners = texts.repeat_interleave(lengths)
            total.index_add_(0, owners, states[: len(owners)].float())
        else:
            padded = states.float().view(len(lengths), -1, states.shape[-1])
            there = torch.arange(padded.shape[1], device=self.device) < lengths[:, None]
            total = (padded * there[..., None]).sum(1)
        return total / lengths[:, None]

    def _run(self, texts: Sequence[Sequence[int]], segments: Sequence[tuple[int, int, Update]]) -> torch.Tensor:
        """Last hidden states, text after text: of every token of a pack, or of every place of a padded batch."""
        states = self._packed(texts, segments) if self.packed else self._padded(texts, segments)
        return states.view(-1, states.shape[-1])

    def _packed(self, texts: Sequence[Sequence[int]], segments: Sequence[tuple[int, int, Update]]) -> torch.Tensor:
        lengths = [len(text) for text in texts]
        how, starts = Layout(tuple(lengths), self._attention, self.device), [0, *accumulate(lengths)]
        parts = [(starts[first], starts[after], update) for first, after, update in segments]
        ids, places = pack(texts, self._first_place, self.device)
        with self._segments.batch(how.tokens, parts), laid_out(how):
            return self._model(input_ids=ids, position_ids=places).last_hidden_state

    def _padded(self, texts: Sequence[Sequence[int]], segments: Sequence[tuple[int, int, Update]]) -> torch.Tensor:
        lengths = [len(text) for text in texts]
        width = max(lengths)
        ids = torch.full((len(texts), width), self._pad, dtype=torch.long)
        for row, text in enumerate(texts):
            ids[row, : lengths[row]] = torch.tensor(text, dtype=torch.long)
        mask = None
        if min(lengths) < width:
            mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long().to(self.device)
        with self._segments.batch(len(texts), segments):
            return self._model(input_ids=ids.to(self.device), attention_mask=mask).last_hidden_state

    def _probe(self, step: int = 5) -> torch.Tensor:
        """Means of the two texts of `probe_rows`."""
        return self.pooled(probe_rows(int(self.config.vocab_size), step), (), ("mean", "mean"))

    def _activate_in_place(self, usually: torch.Tensor) -> None:
        """Let GELU write where it reads, which is the largest tensor of a layer, unless the model still needs that.

        Args:
            usually: What `_probe` gives.
        """
        activations = [module for module in self._model.modules() if isinstance(module, GELUActivation)]
        usual = [activation.act for activation in activations]
        for activation in activations:
            activation.act = torch.ops.aten.gelu_
        if not torch.equal(self._probe(), usually):
            for activation, act in zip(activations, usual, strict=True):
                activation.act = act

    def _packs(self, padded: torch.Tensor) -> bool:
        """Whether two texts in a pack get the states they get in a padded batch; leaves the attention that fits."""
        standard = self.config._attn_implementation
        if any(isinstance(getattr(self.config, name, None), int | float) for name in WINDOWS):
            return False
        try:
            self._model.set_attn_implementation(PACKED)
            self.packed = True
            packed = self._probe()
            # a model that attends its own way sees both, which rounding could hide
            apart = torch.equal(packed[0], self._probe(step=9)[0])
            if apart and bool((packed - padded).norm() <= EXACT[self.dtype] * padded.norm()):
                return True
        except (TypeError, ValueError, RuntimeError, IndexError, LookupError):
            pass  # it takes no positions, or has another kind of attention
        self.packed = False
        self._model.set_attn_implementation(standard)
        return False
