"""Which adapters the service can serve; others are trained, and that is where their run ends.

What a plug-in trained is evaluated as well: it answers by itself.
"""

from collections.abc import Mapping
from typing import Any

PLUGGED = "a plug-in trainer makes a model of its own, and the service puts adapters on one base model"


def why_unserved(about: Mapping[str, Any]) -> str:
    """Why the service cannot serve what was trained; empty where it can.

    Args:
        about: Its `adapter.json`.
    """
    return PLUGGED if "trainer" in about else unserved(about["method"], dora=about["settings"]["lora"]["use_dora"])


def unserved(method: str, *, dora: bool) -> str:
    """Why the service cannot serve what a recipe's `method` (lora or full) trains; empty where it can."""
    if method != "lora":
        return "full fine-tuning makes a model of its own, and the service puts adapters on one base model"
    if dora:
        return "DoRA rescales the base model's weights, and the service shares them between adapters"
    return ""
