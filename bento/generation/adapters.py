"""An adapter in the engine's memory."""

from collections.abc import Mapping
from dataclasses import dataclass

from bento.generation.lora import Mixture, Pair
from bento.generation.manifest import GenerationManifest


@dataclass(frozen=True, eq=False)
class GenerationAdapter:
    """A loaded adapter. It is complete when it becomes visible and never changes afterwards."""

    digest: str
    manifest: GenerationManifest
    alone: Mixture
    """Ready for tokens that are all its own."""
    updates: Mapping[str, Pair]
    """By module name; on the memory of `alone`."""

    @property
    def nbytes(self) -> int:
        """Memory it takes on the device, in bytes."""
        return self.alone.nbytes
