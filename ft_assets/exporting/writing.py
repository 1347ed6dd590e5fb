"""Writing a classifier as one ONNX file: base model, merged LoRA, pooling, head and calibration in one graph."""

import logging
import shutil
import warnings
from pathlib import Path

import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from tokenizers import Tokenizer
from transformers import AutoModel

from bento.adapter_files import AdapterFiles, check_base, check_updates, read_adapter
from bento.loading import load_network
from bento.packing import probe_rows
from ft_assets.exporting.forms import INPUTS, MODEL, OUTPUT, TOKENIZER
from ft_resources.base_models import BaseModel
from ft_resources.errors import ServiceError

OPSET = 20
"""ONNX operator set of the file; onnxruntime reads it from version 1.17 on."""
LARGEST_MESSAGE = 1_500_000_000
"""Bytes of weights up to which the file holds them itself; a protobuf message ends at 2 GiB. Others lie beside it."""
BESIDE_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
"""Files that `transformers.AutoTokenizer` reads where a base model has them."""


class Classifier(torch.nn.Module):
    """From token ids to calibrated probabilities, with the LoRA update merged into the base model's weights.

    Args:
        network: The base model in float32, changed in place.
        files: The adapter, checked against `network`.
    """

    def __init__(self, network: torch.nn.Module, files: AdapterFiles) -> None:
        super().__init__()
        with torch.no_grad():
            for module, low in files.updates.items():
                network.get_parameter(f"{module}.weight").add_(low.b @ low.a, alpha=low.scale)
        self.network = network
        self.pooling = files.manifest.pooling
        # a softmax of logits that are divided by the temperature (Guo et al. 2017, On Calibration of Modern Networks)
        self.weight = torch.nn.Buffer(files.head_weight / files.manifest.temperature)
        self.bias = torch.nn.Buffer(files.head_bias / files.manifest.temperature)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """float32 [texts, labels]; takes int64 [texts, tokens] twice, padded on the right."""
        states = self.network(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "mean":
            there = attention_mask.unsqueeze(-1).to(states.dtype)
            pooled = (states * there).sum(1) / there.sum(1)
        elif self.pooling == "cls":
            pooled = states[:, 0]
        else:
            last = (attention_mask.sum(1) - 1).view(-1, 1, 1).expand(-1, 1, states.shape[-1])
            pooled = states.gather(1, last).squeeze(1)
        return torch.softmax(torch.nn.functional.linear(pooled, self.weight, self.bias), -1)


def write_model(base: BaseModel, adapter: Path, folder: Path, *, int8: bool) -> None:
    """`model.onnx` and the tokenizer in `folder`.

    Args:
        adapter: Its folder.
        int8: Weights of matrix products and embeddings in 8 bits, activations quantised as they come (dynamic
            quantisation).

    Raises:
        ServiceError: The adapter is damaged or belongs to another base model, or this kind of model cannot be written.
        OSError: The disk.
    """
    files = read_adapter(adapter)
    check_base(files.manifest.base, base, adapter)
    network = load_network(AutoModel, base, torch.float32, torch.device("cpu"), attn_implementation="eager")
    linears = {name: layer for name, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)}
    check_updates(files.updates, linears, adapter)
    vocabulary, pad = int(network.config.vocab_size), int(getattr(network.config, "pad_token_id", None) or 0)
    _write_tokenizer(base, folder, files.manifest.max_tokens, pad)
    classifier = Classifier(network, files).eval().requires_grad_(False)
    beside = sum(each.nbytes for each in classifier.state_dict().values()) > LARGEST_MESSAGE
    written = folder / (f"float-{MODEL}" if int8 else MODEL)
    _write_graph(classifier, written, base, vocabulary, beside=beside)
    if int8:
        quantize_dynamic(
            written,
            folder / MODEL,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,  # CPUs without VNNI add two products in 16 bits, which 8-bit weights can overflow
            use_external_data_format=beside,
        )
        for path in folder.glob(f"{written.name}*"):
            path.unlink()


def _write_graph(classifier: Classifier, path: Path, base: BaseModel, vocabulary: int, *, beside: bool) -> None:
    texts = probe_rows(vocabulary, 5)
    width = max(map(len, texts))
    ids, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which nothing here needs
    axes = {0: "batch", 1: "length"}
    with warnings.catch_warnings(action="ignore"):
        try:
            torch.onnx.export(
                classifier,
                (),
                path,
                kwargs=dict(zip(INPUTS, (ids, mask), strict=True)),
                input_names=INPUTS,
                output_names=(OUTPUT,),
                dynamic_shapes=dict.fromkeys(INPUTS, axes),
                opset_version=OPSET,
                external_data=beside,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ServiceError(
                f"base model '{base.reference}' cannot be written as ONNX: {str(error).splitlines()[0]}",
                where=str(base.path),
                mend="Serve the task with `ft serve`, or train it on another base model.",
            ) from error


def _write_tokenizer(base: BaseModel, folder: Path, max_tokens: int, pad: int) -> None:
    """The base model's tokenizer, which cuts and pads as the classifier needs it."""
    tokenizer = Tokenizer.from_file(str(base.path / TOKENIZER))
    tokenizer.enable_truncation(max_tokens)
    tokenizer.enable_padding(direction="right", pad_id=pad, pad_token=tokenizer.id_to_token(pad))
    tokenizer.save(str(folder / TOKENIZER))
    for name in BESIDE_TOKENIZER:
        if (base.path / name).is_file():
            shutil.copyfile(base.path / name, folder / name)
