"""Loading a base model beside passes that are being computed."""

import threading
from typing import Any

import torch

from ft_resources.base_models import BaseModel
from ft_resources.errors import ServiceError

_one_at_a_time = threading.Lock()
"""While transformers builds a model, its dtype is the default one of the whole process. Two at a time could leave it
so; and whatever computes meanwhile names the dtype of each tensor that it makes."""


def load_network(kind: Any, base: BaseModel, dtype: torch.dtype, device: torch.device, **options: Any) -> Any:
    """The network in `base`, for answering only.

    Args:
        kind: A class of transformers with `from_pretrained`.
        options: For `from_pretrained`.

    Raises:
        ServiceError: The folder holds no such network.
    """
    try:
        with _one_at_a_time:
            network = kind.from_pretrained(
                base.path, dtype=dtype, local_files_only=True, use_safetensors=True, **options
            )
    except (OSError, ValueError) as error:
        raise ServiceError(
            f"base model '{base.reference}' cannot be loaded by {kind.__name__}: {error}",
            where=str(base.path),
            mend="Check that the folder was written by transformers' save_pretrained, and holds a model of this kind: "
            "an encoder for classification, a decoder for generation.",
        ) from error
    return network.to(device).eval().requires_grad_(False)
