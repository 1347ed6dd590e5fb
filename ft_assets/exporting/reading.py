"""Asking an exported classifier: its folder is all that is read, and torch is not needed for it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

from bento.preparation import prepare
from ft_assets.exporting.forms import CONFIGURATION, INPUTS, MODEL, OUTPUT, TOKENIZER, Configuration

BATCH = 16


class ExportedModel:
    """The classifier in `folder`, computed by onnxruntime on the CPU.

    Args:
        folder: As `ft export` writes it.
    """

    def __init__(self, folder: Path) -> None:
        self.about = Configuration.model_validate_json((folder / CONFIGURATION).read_bytes())
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        self._session = onnxruntime.InferenceSession(folder / MODEL, providers=["CPUExecutionProvider"])

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Calibrated probabilities, float32 [texts, labels]; labels as in `about`."""
        how = self.about.preparation
        prepared = [prepare(text, how.pii, how.max_chars)[0] for text in texts]
        order = sorted(range(len(texts)), key=lambda place: len(prepared[place]))
        answers = np.empty((len(texts), len(self.about.labels)), np.float32)
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            # the tokenizer cuts to `max_tokens` and pads to the longest text of the batch
            batch = self._tokenizer.encode_batch([prepared[place] for place in places])
            ids = np.array([one.ids for one in batch], dtype=np.int64)
            mask = np.array([one.attention_mask for one in batch], dtype=np.int64)
            (answers[places],) = self._session.run([OUTPUT], dict(zip(INPUTS, (ids, mask), strict=True)))
        return answers
