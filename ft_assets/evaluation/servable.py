"""Which adapters the service can serve; others are trained, and that is where their run ends."""


def unserved(method: str, *, dora: bool) -> str:
    """Why the service cannot serve what a recipe's `method` (lora or full) trains; empty where it can."""
    if method != "lora":
        return "full fine-tuning makes a model of its own, and the service puts adapters on one base model"
    if dora:
        return "DoRA rescales the base model's weights, and the service shares them between adapters"
    return ""
