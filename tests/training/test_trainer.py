"""The trainer: fast ways give the losses of the plain one, runs repeat and resume to the byte, figures are kept."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from ft_assets.training.engine.averaging import WeightAverage
from ft_assets.training.engine.checkpoints import Checkpoints
from ft_assets.training.engine.runs import TaskRows, tokenise
from ft_resources.base_models import resolve
from ft_resources.environments import REPOSITORY
from ft_resources.errors import TrainingError
from ft_resources.lake import Lake
from tests.training import small_training
from tests.training.forked import forked, train_small
from tests.training.small import DECODERS, ENCODERS, LABELS, Died, dies_at, digests, settings, texts, train

Tiny = Callable[[str], str]
PLAIN = {
    "packing": "off",
    "segment_attention": False,
    "fused_lora": False,
    "labelled_tokens_only": False,
    "fused_cross_entropy": False,
    "cache_frozen": False,
}


# -- the fast ways give the same model ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
def test_a_classifier_learns_the_same_with_every_lever(
    kind: str, tiny: Tiny, classes: TaskRows, tmp_path: Path
) -> None:
    pooling = {"base": {"pooling": "last"}} if kind in DECODERS else {}
    fast = train(classes, settings(tiny(kind), **pooling), tmp_path / "fast")
    plain = train(classes, settings(tiny(kind), speed=PLAIN, **pooling), tmp_path / "plain")
    np.testing.assert_allclose(fast.history.loss, plain.history.loss, rtol=2e-5)
    assert fast.history.validation[-1]["loss"] < fast.history.validation[0]["loss"]
    for name, tensor in load_file(tmp_path / "fast" / "adapter_model.safetensors").items():
        twin = load_file(tmp_path / "plain" / "adapter_model.safetensors")[name]
        torch.testing.assert_close(tensor, twin, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("kind", DECODERS)
def test_answers_are_learned_the_same_with_every_lever(
    kind: str, tiny: Tiny, answers: TaskRows, tmp_path: Path
) -> None:
    fast = train(answers, settings(tiny(kind)), tmp_path / "fast")
    plain = train(answers, settings(tiny(kind), speed=PLAIN), tmp_path / "plain")
    np.testing.assert_allclose(fast.history.loss, plain.history.loss, rtol=2e-5)
    assert fast.history.loss[-1] < fast.history.loss[0]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_rows_are_packed_in_bf16_too(kind: str, method: str, tiny: Tiny, classes: TaskRows, tmp_path: Path) -> None:
    """With packing `on`, a base that cannot be packed is refused."""
    chosen = settings(tiny(kind), method=method, training={"precision": "bf16"}, speed={"packing": "on"})
    trained = train(classes, chosen, tmp_path / "packed")
    assert np.isfinite(trained.history.loss).all()


@pytest.mark.parametrize("lever", [name for name in PLAIN if name != "cache_frozen"])
def test_each_lever_alone_changes_no_loss(lever: str, tiny: Tiny, answers: TaskRows, tmp_path: Path) -> None:
    one = {**PLAIN, lever: "on" if lever == "packing" else True}
    alone = train(answers, settings(tiny("llama"), speed=one), tmp_path / "alone")
    plain = train(answers, settings(tiny("llama"), speed=PLAIN), tmp_path / "plain")
    np.testing.assert_allclose(alone.history.loss, plain.history.loss, rtol=2e-5)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_cached_frozen_layers_change_no_loss(kind: str, tiny: Tiny, classes: TaskRows, tmp_path: Path) -> None:
    cached = train(classes, settings(tiny(kind), lora={"top_layers": 1}), tmp_path / "cached")
    off = settings(tiny(kind), lora={"top_layers": 1}, speed={"cache_frozen": False})
    recomputed = train(classes, off, tmp_path / "recomputed")
    np.testing.assert_allclose(cached.history.loss, recomputed.history.loss, rtol=2e-5)
    adapted = load_file(tmp_path / "cached" / "adapter_model.safetensors")
    assert adapted and all(".2." in name for name in adapted)


@pytest.mark.parametrize("lora", [{}, {"top_layers": 1}])
def test_rows_are_shorter_in_the_first_epoch_alone(
    lora: dict[str, int], tiny: Tiny, classes: TaskRows, tmp_path: Path
) -> None:
    chosen = settings(tiny("bert"), lora=lora, training={"epochs": 2, "first_epoch_tokens": 8})
    data = tokenise(classes, resolve(tiny("bert")), chosen.base.max_tokens)
    cut = [one.cut_to(8) for one in data.training.examples]
    tokenizer = AutoTokenizer.from_pretrained(tiny("bert"))
    texts = classes.training["text"].tolist()
    assert [one.ids for one in cut] == tokenizer(texts, truncation=True, max_length=8)["input_ids"]
    lengths = [sum(len(one.ids) for one in examples) for examples in (cut, data.training.examples)]
    assert lengths[0] < 0.8 * lengths[1]
    warmed = train(classes, chosen, tmp_path / "warmed")
    assert warmed.history.tokens == sum(lengths)
    uncached = settings(
        tiny("bert"), lora=lora, training={"epochs": 2, "first_epoch_tokens": 8}, speed={"cache_frozen": False}
    )
    again = train(classes, uncached, tmp_path / "uncached")
    np.testing.assert_allclose(again.history.loss, warmed.history.loss, rtol=2e-5)


def test_a_cached_run_skips_the_layers_below(tiny: Tiny, classes: TaskRows, tmp_path: Path) -> None:
    counted = dict[str, int]()
    for name, cache in (("cached", True), ("recomputed", False)):
        calls = 0
        original = torch.nn.functional.gelu

        def counting(*arguments: object, original: object = original, **named: object) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return original(*arguments, **named)  # type: ignore[operator]

        torch.nn.functional.gelu = counting  # type: ignore[assignment]
        try:
            chosen = settings(tiny("bert"), lora={"top_layers": 1}, speed={"cache_frozen": cache})
            train(classes, chosen, tmp_path / name)
        finally:
            torch.nn.functional.gelu = original
        counted[name] = calls
    assert counted["cached"] < 0.75 * counted["recomputed"]


def test_parts_of_a_step_give_the_step(tiny: Tiny, classes: TaskRows, tmp_path: Path) -> None:
    balanced = {"class_weighting": "balanced", "label_smoothing": 0.1}
    whole = train(classes, settings(tiny("bert"), training=balanced), tmp_path / "whole")
    parts = train(classes, settings(tiny("bert"), training={**balanced, "micro_batch_tokens": 8}), tmp_path / "parts")
    np.testing.assert_allclose(parts.history.loss, whole.history.loss, rtol=1e-4)


def test_gradient_checkpointing_changes_no_loss(tiny: Tiny, answers: TaskRows, tmp_path: Path) -> None:
    kept = train(answers, settings(tiny("llama")), tmp_path / "kept")
    again = train(answers, settings(tiny("llama"), training={"gradient_checkpointing": True}), tmp_path / "again")
    np.testing.assert_allclose(again.history.loss, kept.history.loss, rtol=1e-5)


def test_bf16_follows_fp32(tiny: Tiny, answers: TaskRows, tmp_path: Path) -> None:
    exact = train(answers, settings(tiny("llama")), tmp_path / "fp32")
    rounded = train(answers, settings(tiny("llama"), training={"precision": "bf16"}), tmp_path / "bf16")
    np.testing.assert_allclose(rounded.history.loss, exact.history.loss, atol=0.02)
    assert rounded.history.loss != exact.history.loss


# -- methods --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lora", [{"use_rslora": True}, {"use_dora": True}, {"dropout": 0.1}, {"target_modules": ["query"]}]
)
def test_variants_of_lora_train(lora: dict[str, object], tiny: Tiny, classes: TaskRows, tmp_path: Path) -> None:
    trained = train(classes, settings(tiny("bert"), lora=lora), tmp_path / "one")
    assert trained.history.loss[-1] < trained.history.loss[0]
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["use_rslora"] == ("use_rslora" in lora) and config["use_dora"] == ("use_dora" in lora)


def test_the_adapter_is_as_large_as_its_matrices(tiny: Tiny, classes: TaskRows, tmp_path: Path) -> None:
    trained = train(classes, settings(tiny("bert")), tmp_path / "one")
    per_layer = 4 * (32 + 32) + 2 * (32 + 64)
    head = 32 * 2 + 2
    assert trained.history.trainable_parameters == 3 * 4 * per_layer + head
    stored = sum(tensor.numel() for tensor in load_file(tmp_path / "one" / "adapter_model.safetensors").values())
    assert stored == 3 * 4 * per_layer


def test_full_fine_tuning_trains_every_weight(tiny: Tiny, classes: TaskRows, tmp_path: Path) -> None:
    chosen = settings(tiny("bert"), method="full", training={"learning_rate": 1e-3})
    trained = train(classes, chosen, tmp_path / "full")
    assert trained.history.trainable_parameters == trained.history.total_parameters
    assert trained.history.validation[-1]["loss"] < trained.history.validation[0]["loss"]
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tmp_path / "full")
    before = AutoModel.from_pretrained(tiny("bert"))
    assert not torch.equal(model.embeddings.word_embeddings.weight, before.embeddings.word_embeddings.weight)
    assert not (tmp_path / "full" / "adapter_config.json").exists()


def test_settings_that_do_not_fit_the_base_are_refused(tiny: Tiny, classes: TaskRows, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="target_modules"):
        train(classes, settings(tiny("bert"), lora={"target_modules": ["nowhere"]}), tmp_path / "a")
    with pytest.raises(TrainingError, match="3 layers, not 9"):
        train(classes, settings(tiny("bert"), lora={"top_layers": 9}), tmp_path / "b")
    with pytest.raises(TrainingError, match="base model reads 130"):
        train(classes, settings(tiny("roberta"), base={"max_tokens": 200}), tmp_path / "c")


def test_a_loss_that_is_not_finite_ends_the_run(tiny: Tiny, classes: TaskRows, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny("bert"), damaged)
    weights = load_file(damaged / "model.safetensors")
    weights["encoder.layer.1.output.dense.bias"].fill_(float("inf"))
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainingError, match="loss became nan at step 1 of 12"):
        train(classes, settings(str(damaged)), tmp_path / "one")


# -- the same bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("step", [1, 5, 6, 9])
def test_an_interrupted_run_ends_with_the_same_bytes(
    precision: str, step: int, tiny: Tiny, classes: TaskRows, tmp_path: Path
) -> None:
    """Six steps an epoch: died after the first step, within and at the end of the first epoch, in the second."""
    often = {"precision": precision, "checkpoint_minutes": 1e-9, "averaged_share": 0.5 if precision == "bf16" else None}
    often["kept_epoch"] = "last_as_good" if precision == "bf16" else "best"
    chosen = settings(tiny("bert"), training=often, lora={"dropout": 0.1})
    lake = Lake(tmp_path / "lake")
    undisturbed = train(classes, chosen, tmp_path / "undisturbed")
    with pytest.raises(Died):
        train(classes, chosen, tmp_path / "died", checkpoints=Checkpoints(lake, "t", "key"), on_step=dies_at(step))
    resumed = train(classes, chosen, tmp_path / "resumed", checkpoints=Checkpoints(lake, "t", "key"))
    assert resumed.steps_now == undisturbed.steps_now - (step - 1)
    assert digests(tmp_path / "resumed") == digests(tmp_path / "undisturbed")
    assert torch.equal(resumed.trace, undisturbed.trace)


def test_an_average_is_of_the_weights_and_does_not_change_their_way(
    tiny: Tiny, classes: TaskRows, tmp_path: Path
) -> None:
    found = {}
    for share in (None, 1e-9, 0.5):
        chosen = settings(tiny("bert"), training={"averaged_share": share})
        found[share] = train(classes, chosen, tmp_path / str(share))
    assert torch.equal(found[None].trace, found[0.5].trace)
    weights = {share: digests(tmp_path / str(share))["adapter_model.safetensors"] for share in found}
    assert weights[1e-9] == weights[None], "of one step"
    assert weights[0.5] != weights[None]
    assert not np.array_equal(found[0.5].outputs, found[None].outputs), "the average is what is validated"


def test_a_weight_average_forgets_the_beginning() -> None:
    weight = torch.nn.Parameter(torch.tensor([8.0]))
    average = WeightAverage({"one": weight}, 0.5)
    for step, value in enumerate((1.0, 2.0, 3.0, 4.0), start=1):
        weight.data.fill_(value)
        average.follow(step)
    # windows of one step, one step, one and a half, two
    expected = (2.0 / 3 + 3.0 / 1.5) / 2 + 4.0 / 2
    assert average.tensors["one"].item() == pytest.approx(expected)
    with average.instead():
        assert weight.item() == pytest.approx(expected)
    assert weight.item() == 4.0


def test_another_seed_gives_other_bytes(tiny: Tiny, classes: TaskRows, tmp_path: Path) -> None:
    for seed in (0, 1):
        train(classes, settings(tiny("bert"), training={"seed": seed}), tmp_path / str(seed))
    first, second = (digests(tmp_path / str(seed))["adapter_model.safetensors"] for seed in (0, 1))
    assert first != second


def test_a_process_that_is_killed_again_and_again_ends_with_the_same_bytes(
    tiny: Tiny, processes: ForkServerContext, tmp_path: Path
) -> None:
    """SIGKILL at four moments of a packed bf16 run in a process of its own."""

    def run(name: str, kill_after: int | None) -> None:
        places = (tiny("bert"), str(tmp_path / f"lake-{name}"), str(tmp_path / name))
        with forked(processes, train_small, *places, "bf16") as (process, lines):
            for line in lines:
                if kill_after is not None and int(line.split()[1]) >= kill_after:
                    process.kill()
                    break
        assert (process.exitcode == 0) == (kill_after is None)

    run("undisturbed", None)
    for moment in (2, 7, 11, None):
        run("disturbed", moment)
    assert digests(tmp_path / "disturbed") == digests(tmp_path / "undisturbed")


def trained_by_two(processes: ForkServerContext, base: str, lake: str, folder: str) -> list[str]:
    """Two processes train together; returns what they told."""
    told, others = each_of_two(processes, base, lake, folder)
    return told + others


def each_of_two(
    processes: ForkServerContext, base: str, lake: str, folder: str, *, second: Mapping[str, str] | None = None
) -> tuple[list[str], list[str]]:
    """What the first told and what the second did, which has more variables in its environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    leader, other = (
        forked(processes, train_small, base, lake, folder, "fp32", variables={**world, "RANK": str(rank), **more})
        for rank, more in enumerate(({}, second or {}))
    )
    with leader as (first, lines), other as (last, more):
        told = list(lines), list(more)
    assert (first.exitcode, last.exitcode) == (0, 0)
    return told


def trained_by_torchrun(processes: ForkServerContext, base: str, lake: str, folder: str) -> list[str]:
    """The same under torchrun, sharded."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launcher, str(Path(small_training.__file__)), base, lake, folder]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, check=True, env=environment, timeout=300, capture_output=True, text=True)
    return done.stdout.splitlines()


def test_processes_that_train_together_run_out_of_memory_together(
    tiny: Tiny, processes: ForkServerContext, tmp_path: Path
) -> None:
    little = {"FT_MEMORY_GB": "0.001"}
    places = (tiny("bert"), str(tmp_path / "lake"), str(tmp_path / "two"))
    leader, other = each_of_two(processes, *places, second=little)
    assert leader[-1].startswith("out of memory: a process that trains along")
    assert other[-1].startswith("out of memory: a pass over")


@pytest.mark.parametrize(
    ("by_two", "share_held"),
    [(trained_by_two, None), pytest.param(trained_by_torchrun, 0.5, marks=pytest.mark.slow)],
)
def test_two_processes_train_what_one_trains(
    by_two: Callable[..., list[str]],
    share_held: float | None,
    tiny: Tiny,
    processes: ForkServerContext,
    tmp_path: Path,
) -> None:
    """With gloo, the same global batch: losses and weights within 1e-5. Sharded, each holds half the base."""
    base = tiny("bert")
    train(TaskRows("text-classification", texts(48, 1), texts(16, 2), LABELS), settings(base), tmp_path / "one")
    lines = by_two(processes, base, str(tmp_path / "lake"), str(tmp_path / "two"))
    held = [(int(line.split()[1]), int(line.split()[3])) for line in lines if line.startswith("held ")]
    assert len(held) == 2
    for own, whole in held:
        assert own == pytest.approx(share_held * whole, rel=0.1) if share_held else whole == 0
    histories = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("one", "two")]
    np.testing.assert_allclose(histories[0]["loss"], histories[1]["loss"], atol=1e-5)
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=1e-5, rtol=1e-5)


# -- rows -----------------------------------------------------------------------------------------------------------


def test_rows_that_are_too_long_are_counted(tiny: Tiny, answers: TaskRows) -> None:
    base = resolve(tiny("llama"))
    whole, cut = tokenise(answers, base, 512).training, tokenise(answers, base, 20).training
    assert whole.cut == whole.dropped == 0 and len(whole.examples) == 48
    assert cut.cut > 0 and cut.dropped > 0 and cut.longest == whole.longest > 20
    assert all(len(one.ids) <= 20 for one in cut.examples)
    with pytest.raises(TrainingError, match="within 8 tokens"):
        tokenise(answers, base, 8)


def test_the_loss_is_on_answers_only(tiny: Tiny, answers: TaskRows) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    examples = tokenise(answers, resolve(tiny("llama")), 512).training.examples
    for one, answer in zip(examples, answers.training["label"], strict=True):
        assert tokenizer.decode(one.ids[one.target :]).strip() == answer.lower()
        assert "how is" in tokenizer.decode(one.ids[: one.target])


def test_windows_of_attention_are_not_packed(tiny: Tiny, answers: TaskRows, tmp_path: Path) -> None:
    import transformers

    folder = tmp_path / "windowed"
    shutil.copytree(tiny("llama"), folder)
    config = transformers.MistralConfig(
        vocab_size=30600,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    own = train(answers, settings(str(folder)), tmp_path / "own")
    padded = train(answers, settings(str(folder), speed={"packing": "off"}), tmp_path / "padded")
    assert own.history.loss == padded.history.loss
    with pytest.raises(TrainingError, match="cannot be packed"):
        train(answers, settings(str(folder), speed={"packing": "on"}), tmp_path / "packed")
