"""Writing what was trained: an adapter that plain peft loads, or a whole model that plain transformers loads."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ft_assets.training.engine.body import Body
from ft_assets.training.engine.trainer import History
from ft_assets.training.recipes import Settings
from ft_resources.base_models import BaseModel


def save(
    folder: Path,
    body: Body,
    head: torch.nn.Linear | None,
    history: History,
    *,
    base: BaseModel,
    settings: Settings,
    describe: dict[str, Any],
) -> None:
    """Write weights, head, `adapter.json` and `training.json` to `folder`.

    Args:
        head: A classifier's head.
        describe: Further entries of `adapter.json`, such as task, type and origins of the settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if body.adapted is not None:
        _save_adapter(folder, body, base)
    else:
        body.network.save_pretrained(folder)
    if head is not None:
        weights = {name: weight.detach().float().cpu().contiguous() for name, weight in head.state_dict().items()}
        save_file(weights, folder / "head.safetensors")
    adapter = {
        "format": 1,
        "method": settings.method,
        "base": {"model": base.reference, "digest": base.digest},
        "max_tokens": settings.base.max_tokens,
        "settings": settings.model_dump(),
        **describe,
    }
    about = json.loads(json.dumps(adapter, sort_keys=True))
    if "fields" in adapter:
        about["fields"] = adapter["fields"]  # in the order of the answer
    (folder / "adapter.json").write_text(json.dumps(about, indent=1, ensure_ascii=False))
    (folder / "training.json").write_text(json.dumps(asdict(history), indent=1, sort_keys=True))


def _save_adapter(folder: Path, body: Body, base: BaseModel) -> None:
    assert body.adapted is not None
    body.adapted.save_pretrained(str(folder))
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base.reference
    if isinstance(config["target_modules"], list):
        config["target_modules"] = sorted(config["target_modules"])  # peft keeps a set, whose order is not stable
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty card; the model card is the registry's
