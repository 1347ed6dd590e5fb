"""vLLM needs a GPU; what is tested here is what it is given, and the refusals."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel

from bento.generation.vllm_engine import VllmGenerator, hand_over
from ft_resources.errors import ServiceError
from tests.bento.generation.conftest import Tiny, write


def test_the_folder_is_one_that_plain_peft_loads(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.adapters["attention"]
    monkeypatch.chdir(folder.parent)
    given = hand_over("d" * 64, Path(folder.name), tiny.base, 7)
    assert (given.digest, given.number, given.folder) == ("d" * 64, 7, folder)
    assert given.manifest.task == "attention"
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.base.path)
    loaded = PeftModel.from_pretrained(model, str(given.folder))
    weights = sum(tensor.numel() for name, tensor in loaded.named_parameters() if "lora" in name)
    assert given.nbytes == 2 * weights


def test_what_vllm_cannot_serve_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = write(tmp_path / "wide", tiny.base, 1, {"r": 65, "target_modules": ["q_proj"]})
    with pytest.raises(ServiceError, match="rank is 65"):
        hand_over("d", folder, tiny.base, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(tiny: Tiny) -> None:
    with pytest.raises(ServiceError, match="FT_GENERATION_ENGINE=torch"):
        VllmGenerator(tiny.base)


def test_without_vllm_it_says_what_to_do(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # stands for the GPU that is not here
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ServiceError, match="not installed"):
        VllmGenerator(tiny.base)
