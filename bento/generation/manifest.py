"""`adapter.json` of an adapter that writes text."""

from pathlib import Path
from typing import Literal

import pydantic

from bento.adapter_files import BaseReference, Preparation, read_manifest_as
from bento.conversation import Field


class GenerationManifest(pydantic.BaseModel):
    """How the adapter is asked, and what it was made for."""

    format: Literal[1]
    task: str
    type: Literal["text-generation", "extraction"]
    base: BaseReference
    max_tokens: int = pydantic.Field(ge=3)
    """Longest training row, prompt and answer together."""
    preparation: Preparation = Preparation()
    """What happened to each content of the training conversations."""
    system: str = ""
    """System prompt of conversations that have none."""
    fields: dict[str, Field] = {}
    """Of an extraction, in the order of the answer."""
    instruction: str = ""
    """Of an extraction: what is said before the fields; empty: the platform's own sentence."""

    @pydantic.model_validator(mode="after")
    def _fields_of_extraction(self) -> "GenerationManifest":
        if (self.type == "extraction") != bool(self.fields):
            raise ValueError("fields are declared by an adapter of type extraction, and by no other")
        return self


def read_generation_manifest(folder: Path) -> GenerationManifest:
    """`adapter.json` of `folder`.

    Raises:
        ServiceError: The file is missing, not JSON, or a field is not what the format asks for.
    """
    return read_manifest_as(GenerationManifest, folder)
