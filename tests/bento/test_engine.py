"""The engine against plain peft, and adapters against each other."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel
from transformers.activations import GELUActivation
from transformers.models.bert.modeling_bert import BertIntermediate

from bento.classify import passes
from bento.devices import pick_device, pick_precision
from bento.encoder import Encoder
from bento.engine import Engine
from bento.int8 import Int8Weight, quantise
from bento.packing import Layout, exponentials
from ft_resources.base_models import BaseModel
from ft_resources.errors import ServiceError
from tests.bento.writers import while_a_model_loads

A, B, C = "a" * 64, "b" * 64, "c" * 64


@pytest.fixture(scope="module")
def folders(workshop: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        A: workshop.write(root / "a", task="t1", seed=1, rank=4),
        B: workshop.write(
            root / "b",
            task="t2",
            labels=("x", "y", "z"),
            seed=2,
            rank=8,
            targets="all-linear",
            rslora=True,
            pooling="cls",
            temperature=2.5,
        ),
        C: workshop.write(
            root / "c",
            task="t3",
            seed=3,
            rank=2,
            targets=("dense", "key"),
            max_tokens=24,
            rank_pattern={"layer.0.attention.self.key": 6},
            alpha_pattern={"layer.0.attention.self.key": 3, r"layer\.[12]\..*dense": 9},
        ),
    }


def loaded(base: BaseModel, precision: str, folders: dict[str, Path]) -> Engine:
    engine = Engine(base, precision=precision, device="cpu")
    for digest, folder in folders.items():
        engine.load(digest, folder)
    return engine


@pytest.fixture(scope="module")
def engine(workshop: Any, folders: dict[str, Path]) -> Engine:
    return loaded(workshop.base, "fp32", folders)


@pytest.fixture(scope="module")
def bf16(workshop: Any, folders: dict[str, Path]) -> Engine:
    return loaded(workshop.base, "bf16", folders)


@pytest.fixture(scope="module")
def int8(with_int8: None, workshop: Any, folders: dict[str, Path]) -> Engine:
    return loaded(workshop.base, "int8", folders)


def probabilities(engine: Engine, digest: str, texts: tuple[str, ...]) -> np.ndarray:
    return np.stack([one.probabilities for one in engine.score([(text, digest) for text in texts])])


@pytest.mark.parametrize("digest", [A, B, C])
def test_answers_are_those_of_plain_peft(workshop: Any, engine: Engine, folders: dict[str, Path], digest: str) -> None:
    expected = workshop.peft_probabilities(folders[digest], workshop.texts)
    assert np.ptp(expected, axis=0).max() > 0.1, "the random head should tell the texts apart"
    np.testing.assert_allclose(probabilities(engine, digest, workshop.texts), expected, atol=1e-5)


def test_a_mixed_batch_equals_single_answers_in_the_callers_order(workshop: Any, engine: Engine) -> None:
    items = [(text, digest) for text in workshop.texts for digest in (C, A, B)]
    mixed = engine.score(items)
    for item, answer in zip(items, mixed, strict=True):
        (alone,) = engine.score([item])
        assert answer.labels == alone.labels
        np.testing.assert_allclose(answer.probabilities, alone.probabilities, atol=1e-5)
        np.testing.assert_allclose(answer.embedding, alone.embedding, atol=2e-3)
        assert answer.confidence == pytest.approx(answer.probabilities.max())
        assert answer.label == answer.labels[int(answer.probabilities.argmax())]
        assert answer.embedding.dtype == np.float16
        assert answer.embedding.shape == (384,)


def shuffled(source: Path, target: Path, seed: int) -> Path:
    """An adapter of the form of `source`, with other weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    random = torch.Generator().manual_seed(seed)
    for name in ("adapter_model.safetensors", "head.safetensors"):
        tensors = load_file(source / name)
        for key, tensor in tensors.items():
            tensors[key] = tensor.flatten()[torch.randperm(tensor.numel(), generator=random)].view(tensor.shape)
        save_file(tensors, target / name)
    return target


def test_many_adapters_of_any_form_share_a_pass(workshop: Any, tmp_path: Path) -> None:
    """Some are computed together, some of these padded, some are alone."""
    forms = [
        workshop.write(tmp_path / f"form-{number}", task="t", seed=number, rank=rank, targets=targets, labels=labels)
        for number, (rank, targets, labels) in enumerate(
            [(4, "all-linear", ("a", "b")), (8, ("query", "value"), ("c", "d", "e")), (3, ("dense",), ("f", "g"))]
        )
    ]
    engine = Engine(workshop.base, precision="fp32", device="cpu")
    digests = [f"{seed:064x}" for seed in range(40)]
    for seed, digest in enumerate(digests):
        form = forms[0 if seed < 16 else seed % len(forms)]
        engine.load(digest, shuffled(form, tmp_path / str(seed), seed))
    words = workshop.texts[0].split() * 8
    texts = [" ".join(words[: 3 if at % 2 else 3 + at % 7]) for at in range(48)]
    items = [(text, digests[at % len(digests)]) for at, text in enumerate(texts)]
    for item, mixed in zip(items, engine.score(items), strict=True):
        (alone,) = engine.score([item])
        assert mixed.labels == alone.labels
        np.testing.assert_allclose(mixed.probabilities, alone.probabilities, atol=1e-5)
    of_one_text = [engine.score([(texts[0], digest)])[0].probabilities for digest in digests[:16]]
    assert np.ptp(of_one_text, axis=0).max() > 0.1, "adapters should differ"


def test_nothing_of_an_unloaded_adapter_stays(
    workshop: Any, engine: Engine, folders: dict[str, Path], tmp_path: Path
) -> None:
    other = workshop.write(tmp_path / "other", task="t1", seed=99, rank=4)
    before = probabilities(engine, A, workshop.texts)
    fresh = Engine(workshop.base, precision="fp32", device="cpu")
    fresh.load(A, folders[A])
    fresh.unload(A)
    with pytest.raises(ServiceError, match="not loaded"):
        fresh.score([("text", A)])
    fresh.load(B, other)
    np.testing.assert_allclose(
        probabilities(fresh, B, workshop.texts), workshop.peft_probabilities(other, workshop.texts), atol=1e-5
    )
    assert np.abs(probabilities(fresh, B, workshop.texts) - before).max() > 0.05


def test_a_text_encoded_before_the_unload_is_still_answered(
    workshop: Any, engine: Engine, folders: dict[str, Path]
) -> None:
    expected = engine.score([(workshop.texts[0], A)])[0].probabilities
    encoded = engine.encode([workshop.texts[0]], engine.adapter(A))
    engine.unload(A)
    try:
        np.testing.assert_allclose(engine.run(encoded)[0].probabilities, expected, atol=1e-5)
    finally:
        engine.load(A, folders[A])


def test_bf16_agrees_with_fp32_on_labels(workshop: Any, engine: Engine, bf16: Engine) -> None:
    exact, rounded = probabilities(engine, A, workshop.texts), probabilities(bf16, A, workshop.texts)
    clear = np.abs(exact[:, 0] - 0.5) > 0.1
    assert clear.sum() >= 3
    assert (exact.argmax(1) == rounded.argmax(1))[clear].all()
    assert np.abs(exact - rounded).max() < 0.1


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_answers_do_not_depend_on_the_default_dtype(
    workshop: Any, precision: str, request: pytest.FixtureRequest
) -> None:
    engine = request.getfixturevalue({"fp32": "engine"}.get(precision, precision))
    for digest in (A, B):
        with while_a_model_loads():
            found = probabilities(engine, digest, workshop.texts)
        np.testing.assert_array_equal(found, probabilities(engine, digest, workshop.texts))


@pytest.mark.parametrize("digest", [A, B, C])
def test_int8_agrees_with_fp32_on_labels(workshop: Any, engine: Engine, int8: Engine, digest: str) -> None:
    exact, rounded = probabilities(engine, digest, workshop.texts), probabilities(int8, digest, workshop.texts)
    assert 0 < np.abs(exact - rounded).max() < 0.3
    best = np.sort(exact, axis=1)
    clear = best[:, -1] - best[:, -2] > 0.3
    assert clear.sum() >= 2
    assert (exact.argmax(1) == rounded.argmax(1))[clear].all()


def test_in_int8_too_an_answer_depends_on_its_own_text_alone(workshop: Any, int8: Engine) -> None:
    loud = ("zzz " * 200, A)
    for item in [(text, digest) for text in workshop.texts[:4] for digest in (A, B)]:
        (alone,) = int8.score([item])
        among = int8.score([loud, item, loud, *((text, C) for text in workshop.texts)])[1]
        assert among.label == alone.label
        # attention rounds to bf16, and sums may have another order beside other texts
        np.testing.assert_allclose(among.probabilities, alone.probabilities, atol=0.05)


def test_a_tokens_int8_product_does_not_see_its_neighbours(with_int8: None) -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(40, 64), torch.randn(5, 64)
    layer = Int8Weight(weight, torch.randn(40))
    alone = layer.product(quantise(inputs[2:3]))
    inputs[0] *= 1000
    torch.testing.assert_close(layer.product(quantise(inputs))[2:3], alone, rtol=0, atol=0)
    expected = inputs @ weight.T + layer.product(quantise(torch.zeros(1, 64)))
    close = (layer.product(quantise(inputs)) - expected).norm(dim=1) / expected.norm(dim=1)
    assert close.max() < 0.02


def test_a_value_that_is_not_finite_stays_so_in_int8() -> None:
    layer = Int8Weight(torch.randn(8, 16), None)
    for bad in (float("nan"), float("inf")):
        inputs = torch.randn(2, 16)
        inputs[0, 3] = bad
        finite = layer.product(quantise(inputs)).isfinite().all(1)
        assert finite.tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1, 40, 400], ids=["as usual", "over the largest power", "under the smallest too"])
def test_attention_weights_are_a_softmax_at_any_size_of_scores(size: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, key = (torch.randn(6, 24, 32, dtype=dtype) for _ in range(2))
    query *= size / 32**0.5
    mask = torch.zeros(6, 24).masked_fill_(torch.arange(24) > torch.tensor([[23], [9]] * 3), -torch.inf)[:, None]
    weights, sums = exponentials(query, key, mask.to(dtype))
    scores = torch.baddbmm(mask.to(dtype), query, key.transpose(1, 2))
    torch.testing.assert_close((weights / sums).float(), torch.softmax(scores.float(), -1), rtol=0.02, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_that_attends_its_own_way_is_padded(workshop: Any, tmp_path: Path, precision: Any) -> None:
    """RoFormer ignores which attention it is told to use."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model("roformer", vocab_size=90, **small)).save_pretrained(tmp_path)
    encoder = Encoder(dataclasses.replace(workshop.base, source=tmp_path), precision, pick_device("cpu"))
    assert not encoder.packed


@pytest.mark.parametrize("needed", [False, True])
def test_activations_overwrite_only_what_nobody_needs(
    workshop: Any, needed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(layer: Any, states: torch.Tensor) -> torch.Tensor:
        wide = layer.dense(states)
        return layer.intermediate_act_fn(wide) + wide * 0.1

    if needed:
        monkeypatch.setattr(BertIntermediate, "forward", forward)
    encoder = Encoder(workshop.base, "fp32", pick_device("cpu"))
    used = {each.act for each in encoder._model.modules() if isinstance(each, GELUActivation)}
    assert used == {torch.nn.functional.gelu if needed else torch.ops.aten.gelu_}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_text_without_tokens_spoils_no_other(workshop: Any, precision: Any) -> None:
    encoder = Encoder(workshop.base, precision, pick_device("cpu"))
    assert encoder.packed
    found = encoder.pooled([[101, 2000, 102], [], [101, 102]], (), ("mean",) * 3)
    assert found.isfinite().all(1).tolist() == [True, False, True]


def test_an_update_too_large_for_its_precision_is_refused(
    workshop: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders[A], tmp_path / "large")
    put_tensor(tmp_path / "large" / "adapter_model.safetensors", QUERY + "B.weight", (384, 4), 3.0e38)
    engine = Engine(workshop.base, precision="bf16", device="cpu")
    with pytest.raises(ServiceError, match="too large for bf16"):
        engine.load("d" * 64, tmp_path / "large")
    assert not engine.loaded


@pytest.mark.parametrize("padded", [False, True])
def test_passes_stay_within_their_tokens(padded: bool) -> None:
    lengths = np.random.default_rng(0).integers(1, 129, 200).tolist()
    found = list(passes(lengths, 512, padded=padded))
    assert sorted(place for places in found for place in places) == list(range(200))
    sizes = [
        len(places) * max(lengths[place] for place in places) if padded else sum(lengths[place] for place in places)
        for places in found
    ]
    assert max(sizes) <= 512
    assert sum(sizes) > 0.9 * 512 * (len(sizes) - 1)


def test_new_lengths_make_few_new_shapes() -> None:
    """oneDNN compiles a kernel for each."""
    random = np.random.default_rng(0)
    shapes: set[tuple[int, ...]] = set()
    for _ in range(200):
        lengths = random.integers(10, 129, 24).tolist()
        how = Layout(tuple(lengths), torch.bfloat16, pick_device("cpu"))
        assert sum(lengths) <= how.tokens <= 1.07 * sum(lengths) + 8
        shapes |= {(how.tokens,), *((group.texts, group.width) for group in how.groups)}
    assert len(shapes) < 150


def test_texts_are_packed_where_that_gives_what_padding_gives(workshop: Any) -> None:
    packed = Encoder(workshop.base, "fp32", pick_device("cpu"))
    assert packed.packed
    padded = Encoder(workshop.base, "fp32", pick_device("cpu"))
    padded.packed = False
    padded.config._attn_implementation = "eager"
    texts = [[101, *range(2000, 2000 + length), 102] for length in (3, 40, 17, 16, 1)]
    for pooling in ("mean", "cls", "last"):
        poolings = [pooling] * len(texts)
        ours, theirs = (each.pooled(texts, (), poolings) for each in (packed, padded))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def drop_tensor(path: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    save_file({key: tensor for key, tensor in tensors.items() if not key.endswith(name)}, path)


def put_tensor(path: Path, name: str, shape: tuple[int, ...], value: float) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    save_file({**load_file(path), name: torch.full(shape, value)}, path)


QUERY = "base_model.model.encoder.layer.3.attention.self.query.lora_"
DAMAGE = {
    "cut short": lambda f: (f / "adapter_model.safetensors").write_bytes(
        (f / "adapter_model.safetensors").read_bytes()[:-100]
    ),
    "pickle in place of safetensors": lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x80\x04K*."),
    "A without B": lambda f: drop_tensor(f / "adapter_model.safetensors", "layer.3.attention.self.query.lora_B.weight"),
    "wrong width": lambda f: put_tensor(f / "adapter_model.safetensors", QUERY + "A.weight", (4, 383), 0.1),
    "not finite": lambda f: put_tensor(f / "adapter_model.safetensors", QUERY + "A.weight", (4, 384), float("nan")),
    "unknown layer": lambda f: [
        put_tensor(f / "adapter_model.safetensors", f"base_model.model.encoder.layer.9.dense.lora_{p}.weight", s, 0.1)
        for p, s in (("A", (4, 384)), ("B", (384, 4)))
    ],
    "head of another width": lambda f: put_tensor(f / "head.safetensors", "weight", (2, 100), 0.1),
    "head without a label": lambda f: edit_json(f / "adapter.json", labels=["a", "b", "c"]),
    "no labels": lambda f: edit_json(f / "adapter.json", labels=[]),
    "another base": lambda f: edit_json(f / "adapter.json", base={"model": "other", "digest": "0" * 64}),
    "too long": lambda f: edit_json(f / "adapter.json", max_tokens=100_000),
    "another type": lambda f: edit_json(f / "adapter.json", type="text-generation"),
    "no manifest": lambda f: (f / "adapter.json").unlink(),
    "dora": lambda f: edit_json(f / "adapter_config.json", use_dora=True),
    "trained bias": lambda f: edit_json(f / "adapter_config.json", bias="lora_only"),
    "trained modules": lambda f: edit_json(f / "adapter_config.json", modules_to_save=["pooler"]),
    "pissa": lambda f: edit_json(f / "adapter_config.json", init_lora_weights="pissa"),
    "an option of the future": lambda f: edit_json(f / "adapter_config.json", use_something_new=True),
    "another method": lambda f: edit_json(f / "adapter_config.json", peft_type="IA3"),
    "not JSON": lambda f: (f / "adapter_config.json").write_bytes(b"{"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_cannot_be_served_is_refused_and_changes_nothing(
    workshop: Any, engine: Engine, folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(folders[A], tmp_path / "adapter")
    before, loaded = probabilities(engine, A, workshop.texts), engine.loaded
    DAMAGE[name](folder)
    with pytest.raises(ServiceError) as caught:
        engine.load("d" * 64, folder)
    assert str(folder) in caught.value.where
    assert caught.value.mend
    assert engine.loaded == loaded
    np.testing.assert_array_equal(probabilities(engine, A, workshop.texts), before)


def test_an_absent_device_is_refused() -> None:
    with pytest.raises(ServiceError, match="is not available"):
        pick_device("tpu")
    assert pick_device("cpu").type == "cpu"


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ServiceError, match="not known") as caught:
        pick_precision("int4", pick_device("cpu"))
    assert "int8, bf16, fp32" in caught.value.mend


def test_int8_is_refused_where_it_cannot_be_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    device = pick_device("cpu")
    with pytest.raises(ServiceError, match="neither VNNI nor AMX"):
        pick_precision("int8", device)
    assert pick_precision("auto", device) == "fp32"
