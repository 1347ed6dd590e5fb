"""What an export says of itself: `export.json` and `parity.json`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pydantic

from bento.adapter_files import Preparation
from ft_assets.evaluation.report import Agreement

MODEL, TOKENIZER, CONFIGURATION = "model.onnx", "tokenizer.json", "export.json"
INPUTS, OUTPUT = ("input_ids", "attention_mask"), "probabilities"
ExportPrecision = Literal["fp32", "int8"]


class Configuration(pydantic.BaseModel):
    """`export.json`: what turns a text into the file's inputs, its outputs into labels, and where they come from."""

    format: Literal[1] = 1
    task: str
    labels: tuple[str, ...]
    """In the order of the file's probabilities."""
    precision: ExportPrecision
    max_tokens: int
    """Already set in the tokenizer, which pads too."""
    pooling: Literal["mean", "cls", "last"]
    """Already in the file, like the temperature."""
    temperature: float
    preparation: Preparation
    """What the service does to a text before it tokenises it."""
    base: str
    adapter: str
    """Digest, 64 hex digits."""
    release_id: str
    model_version: str


class Speed(pydantic.BaseModel):
    """Milliseconds per row, with the tokenizer's."""

    batched: float
    """All rows, in batches of 16 of like length."""
    alone: float
    """Median of rows that were asked one at a time."""


class Parity(pydantic.BaseModel):
    """`parity.json`: the exported file beside plain peft in fp32 on the task's validation rows."""

    task: str
    adapter: str
    model_version: str
    validation_split: str
    agreement: Agreement
    min_agreement: float
    max_probability_shift: float
    exported_mb: float
    """10^6 bytes of graph and weights."""
    plain_mb: float
    """10^6 bytes of the base model's and the adapter's weights."""
    exported_ms: Speed
    plain_ms: Speed
    cores: int
    versions: dict[str, str]

    def markdown(self) -> str:
        """The figures for people."""
        one = self.agreement
        return "\n".join(
            (
                f"# {self.task}, version {self.model_version}, as ONNX in {one.precision}",
                "",
                f"Adapter {self.adapter}. Compared with plain peft in fp32 on {one.rows} validation rows.",
                "",
                "| | measured | limit |",
                "|---|---|---|",
                f"| rows with the same label | {one.agreement:.4f} | at least {self.min_agreement:g} |",
                f"| shift of probability, 95 % of rows | {one.probability_shift:.2g} "
                f"| at most {self.max_probability_shift:g} |",
                f"| shift of probability, mean | {one.mean_probability_difference:.2g} | |",
                f"| shift of probability, largest | {one.max_probability_difference:.2g} | |",
                f"| rows whose label depends on their neighbours | {one.changed_by_neighbours} | |",
                "",
                f"| {self.cores} CPU cores | exported | plain peft |",
                "|---|---|---|",
                f"| size, MB | {self.exported_mb:.1f} | {self.plain_mb:.1f} |",
                f"| ms per row, in batches of 16 | {self.exported_ms.batched:.2f} | {self.plain_ms.batched:.2f} |",
                f"| ms per row, one at a time | {self.exported_ms.alone:.2f} | {self.plain_ms.alone:.2f} |",
                "",
                ", ".join(f"{name} {number}" for name, number in self.versions.items()),
                "",
            )
        )


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    folder: Path
    about: Configuration
    parity: Parity
