"""Updates of mixed adapters and attention in machine code, against the same in float32 and in torch."""

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llvmlite.binding
import numpy as np
import pytest
import torch
from torch import nn

from bento import packing
from bento.engine import Engine
from bento.multi_lora import MultiLora, Pairs, Segments
from bento.native import machine_code
from bento.native.attention import attended, unfit
from bento.native.products import NativeProducts, NativeUpdate
from bento.stacked_products import StackedProducts

SIZES = {"query": (64, 64), "value": (64, 64), "up": (64, 160), "down": (160, 64), "narrow": (64, 16)}
FAMILIES = (("query", "value"), ("up",), ("down",), ("narrow",))
ROUNDING = 2**-7
"""Two roundings to bfloat16, relative to the largest value."""
needs_it = pytest.mark.skipif(bool(machine_code.missing()), reason=machine_code.missing())


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pairs(ranks: dict[str, int], seed: int) -> Pairs:
    random = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(SIZES[name][0], rank, generator=random) / 8,
            torch.randn(rank, SIZES[name][1], generator=random) / 8,
        )
        for name, rank in ranks.items()
    }


ADAPTERS = [
    pairs(ranks, seed)
    for seed, ranks in enumerate(
        [
            dict.fromkeys(SIZES, 16),
            {"query": 8, "value": 8},
            {"value": 3, "up": 1, "down": 70, "narrow": 5},
            {"query": 33, "value": 2, "narrow": 16},
            {"up": 64},
            {},
        ]
    )
]
BOUNDS = [
    (0, 5, 0),
    (5, 6, 1),
    (6, 47, 2),
    (47, 47, 3),
    (50, 71, 3),
    (71, 200, 4),
    (200, 203, 5),
    (203, 220, 2),
    (221, 222, 0),
]
"""First row, row after the last, adapter; rows between them have none."""
ROWS = 230


def layer(name: str) -> MultiLora:
    made = MultiLora(name, nn.Linear(*SIZES[name]), Segments())
    made.family = next(family[0] for family in FAMILIES if name in family)
    return made


def added(name: str, input: torch.Tensor, output: torch.Tensor, parts: Sequence[tuple[int, int, int]]) -> torch.Tensor:
    """`output` and the updates of `parts`, in machine code."""
    products = NativeProducts(FAMILIES)
    updates = [products.update(adapter) for adapter in ADAPTERS]
    products.begin(len(input), [(start, stop, updates[adapter]) for start, stop, adapter in parts])
    output = output.clone()
    products.add(layer(name), input, output, 1)
    return output


def example(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(99)
    input, output = (torch.randn(ROWS, size, generator=random).bfloat16() for size in SIZES[name])
    return input, output


@needs_it
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", SIZES)
def test_every_segment_gets_its_own_update_and_no_other_row_any(name: str, count: int) -> None:
    torch.set_num_threads(count)
    input, output = example(name)
    found = added(name, input, output, BOUNDS)
    expected = output.float()
    touched = torch.zeros(ROWS, dtype=torch.bool)
    for start, stop, adapter in BOUNDS:
        if name in ADAPTERS[adapter]:
            a, b = (matrix.bfloat16().float() for matrix in ADAPTERS[adapter][name])
            expected[start:stop] += (input[start:stop].float() @ a).bfloat16().float() @ b
            touched[start:stop] = True
    assert 0 < touched.sum() < ROWS
    torch.testing.assert_close(found[~touched], output[~touched], rtol=0, atol=0)
    assert (found[touched] - output[touched]).abs().amax(1).min() > 0
    assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()


@needs_it
@pytest.mark.parametrize("name", SIZES)
def test_a_row_does_not_see_its_neighbours_at_all(name: str) -> None:
    """Not even their NaN; and neither the threads nor the place in a segment change a bit of it."""
    input, output = example(name)
    torch.set_num_threads(2)
    together = added(name, input, output, BOUNDS)
    torch.set_num_threads(1)
    for start, stop, adapter in BOUNDS:
        for row in {start, (start + stop) // 2, stop - 1} if start < stop else ():
            alone = added(name, input[row : row + 1], output[row : row + 1], [(0, 1, adapter)])
            torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=0)
    spoiled = input.clone()
    spoiled[50:71] = torch.nan
    others = torch.ones(ROWS, dtype=torch.bool)
    others[50:71] = False
    torch.testing.assert_close(added(name, spoiled, output, BOUNDS)[others], together[others], rtol=0, atol=0)


@needs_it
def test_layers_that_read_the_same_tensor_and_rows_of_several_tokens() -> None:
    """In a padded batch a row has as many tokens as the longest text."""
    products = NativeProducts(FAMILIES)
    update = products.update(ADAPTERS[0])
    products.begin(23, [(2, 5, update), (5, 20, update)])
    input, _ = example("query")
    for name in ("query", "value"):
        output = torch.zeros(ROWS, 64, dtype=torch.bfloat16)
        products.add(layer(name), input.view(23, 10, 64), output, 10)
        a, b = ADAPTERS[0][name]
        expected = (input.float() @ a @ b)[20:200]
        assert (output[20:200] - expected).abs().max() <= 2 * ROUNDING * expected.abs().max()
        assert not output[:20].any() and not output[200:].any()


@needs_it
@pytest.mark.parametrize("rank", [4, 40])
def test_another_family_may_read_the_same_tensor(rank: int) -> None:
    """As where attention and what follows it are parallel; the layer between them has no update."""
    random = torch.Generator().manual_seed(0)
    families = (("query",), ("dense",), ("up",))
    layers = {name: MultiLora(name, nn.Linear(64, 64), Segments()) for (name,) in families}
    products = NativeProducts(families)
    update = products.update(
        {
            name: (torch.randn(64, size, generator=random) / 8, torch.randn(size, 64, generator=random) / 8)
            for name, size in (("query", 4), ("up", rank))
        }
    )
    input = torch.randn(8, 64, generator=random).bfloat16()

    def output(*names: str) -> torch.Tensor:
        """Of the last of these layers, which follow each other."""
        products.begin(8, [(0, 8, update)])
        for name in names:
            sums = torch.zeros(8, 64, dtype=torch.bfloat16)
            products.add(layers[name], input.clone() if name == "dense" else input, sums, 1)
        return sums

    torch.testing.assert_close(output("query", "dense", "up"), output("up"), rtol=0, atol=0)


@needs_it
def test_nothing_is_computed_beyond_the_tensors() -> None:
    products = NativeProducts(FAMILIES)
    with pytest.raises(ValueError, match="row 9 of 8"):
        products.begin(8, [(0, 4, products.update(ADAPTERS[0])), (4, 9, products.update(ADAPTERS[1]))])
    with pytest.raises(ValueError, match="token 9 of 8"):
        attended(*projected(2, 32, tokens=8), 0.2, torch.tensor([[0, 4], [4, 9]]))


@needs_it
def test_an_update_of_no_layer() -> None:
    update = NativeProducts(FAMILIES).update({})
    assert update.finite and update.nbytes == 0


@pytest.mark.parametrize(
    ("sizes", "dtype", "device", "why"),
    [
        ((64, 64), torch.float32, "cpu", "for bfloat16"),
        ((64, 64), torch.bfloat16, "meta", "on CPUs"),
        ((64, 312), torch.bfloat16, "cpu", "odd is"),
        ((33, 64), torch.bfloat16, "cpu", "odd is"),
    ],
)
def test_what_it_is_not_for(sizes: tuple[int, int], dtype: torch.dtype, device: str, why: str) -> None:
    layers = [MultiLora(name, nn.Linear(*size), Segments()) for name, size in (("even", (64, 64)), ("odd", sizes))]
    assert why in NativeProducts.missing(layers, dtype, torch.device(device))


LENGTHS = (5, 1, 16, 0, 17, 90, 33, 12)


def projected(heads: int, width: int, tokens: int = sum(LENGTHS) + 3, size: float = 1.0) -> list[torch.Tensor]:
    """Queries, keys and values [1, heads, tokens, width], as a model has them."""
    random = torch.Generator().manual_seed(7)
    flat = (torch.randn(1, tokens, heads * width, generator=random).mul_(size).bfloat16() for _ in range(3))
    return [each.view(1, tokens, heads, width).transpose(1, 2) for each in flat]


def bounds() -> torch.Tensor:
    return packing.Layout(LENGTHS, torch.bfloat16, torch.device("cpu")).bounds


def exactly(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """[1, tokens, heads, width], float32."""
    expected = torch.zeros(query.shape).transpose(1, 2).contiguous()
    for start, stop in bounds().tolist():
        q, k, v = (each[0, :, start:stop].float() for each in (query, key, value))
        expected[0, start:stop] = (torch.softmax(scale * q @ k.transpose(1, 2), -1) @ v).transpose(0, 1)
    return expected


@needs_it
@pytest.mark.parametrize("size", [0.2, 1, 20], ids=["flat", "as usual", "only the largest counts"])
@pytest.mark.parametrize(("heads", "width"), [(12, 32), (3, 64), (2, 96), (1, 128)])
@pytest.mark.parametrize("count", [1, 3])
def test_every_token_attends_to_its_own_text(heads: int, width: int, size: float, count: int) -> None:
    torch.set_num_threads(count)
    query, key, value = projected(heads, width, size=size)
    scale = width**-0.5
    found = attended(query, key, value, scale, bounds())
    expected = exactly(query, key, value, scale)
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape
    assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()
    assert not found[:, sum(LENGTHS) :].any()


@needs_it
def test_a_text_does_not_see_its_neighbours_at_all() -> None:
    query, key, value = projected(4, 32)
    torch.set_num_threads(2)
    together = attended(query, key, value, 0.2, bounds())
    torch.set_num_threads(1)
    for start, stop in bounds().tolist():
        alone = [each[:, :, start:stop] for each in (query, key, value)]
        if start < stop:
            found = attended(*alone, 0.2, torch.tensor([[0, stop - start]]))
            torch.testing.assert_close(found, together[:, start:stop], rtol=0, atol=0)
    start, stop = bounds()[4].tolist()
    for bad in (torch.nan, torch.inf):
        for spoiled in (query, key, value):
            kept = spoiled.clone()
            spoiled[:, 0, start] = bad
            found = attended(query, key, value, 0.2, bounds())
            spoiled.copy_(kept)
            others = torch.ones(found.shape[1], dtype=torch.bool)
            others[start:stop] = False
            torch.testing.assert_close(found[:, others], together[:, others], rtol=0, atol=0)
            assert not found[0, start, 0].isfinite().all(), "what is wrong must be seen"


@needs_it
def test_a_query_without_a_finite_score_has_no_answer() -> None:
    query, key, value = projected(2, 32)
    key.fill_(-torch.inf)
    query.fill_(1)
    found = attended(query, key, value, 0.2, bounds())
    assert found[:, : sum(LENGTHS)].isnan().all()


@needs_it
def test_projections_may_lie_in_one_tensor() -> None:
    torch.manual_seed(0)
    tokens, heads, width = sum(LENGTHS), 3, 32
    for shape, at in (
        ((1, tokens, heads, 3, width), 3),
        ((1, tokens, heads, width, 3), 4),
        ((1, tokens, 3, heads, width), 2),
    ):
        fused = torch.randn(shape).bfloat16()
        parts = [fused.select(at, which).transpose(1, 2) for which in range(3)]
        apart = [part.contiguous() for part in parts]
        assert parts[0].stride() != apart[0].stride()
        torch.testing.assert_close(attended(*parts, 0.2, bounds()), attended(*apart, 0.2, bounds()), rtol=0, atol=0)


@needs_it
def test_engines_in_several_threads() -> None:
    """Each has a room of its own."""
    inputs = [projected(4, 32, size=size) for size in (0.5, 1.0, 2.0, 4.0)]
    alone = [attended(*each, 0.2, bounds()) for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for found, expected in zip(
                pool.map(lambda each: attended(*each, 0.2, bounds()), inputs), alone, strict=True
            ):
                torch.testing.assert_close(found, expected, rtol=0, atol=0)


@needs_it
def test_a_cpu_that_llvm_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llvmlite.binding, "get_host_cpu_features", dict)
    assert "LLVM" in machine_code.missing.__wrapped__()


@pytest.mark.parametrize(
    ("width", "dtype", "device", "why"),
    [
        (48, torch.bfloat16, "cpu", "48 wide"),
        (32, torch.float32, "cpu", "bfloat16"),
        (32, torch.bfloat16, "meta", "CPU"),
    ],
)
def test_which_attention_it_is_not_for(width: int, dtype: torch.dtype, device: str, why: str) -> None:
    assert why in unfit(width, dtype, torch.device(device))


@needs_it
@pytest.mark.parametrize(("precision", "most"), [("bf16", 0.05), ("int8", 0.3)])
def test_an_engine_answers_as_with_products_of_torch(
    workshop: Any, tmp_path: Path, precision: str, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those are for machines without it. In int8 only attention is in bfloat16 with its inputs."""
    folders = {
        f"{seed:064x}": workshop.write(tmp_path / str(seed), task="t", seed=seed, rank=rank, targets=targets)
        for seed, (rank, targets) in enumerate([(4, "all-linear"), (8, ("query", "value")), (3, ("dense",))])
    }
    items = [(text, digest) for text in workshop.texts for digest in folders]

    def answers(precision: str, products: type[object]) -> np.ndarray:
        engine = Engine(workshop.base, precision=precision, device="cpu")
        assert type(engine._encoder._products) is products
        for digest, folder in folders.items():
            engine.load(digest, folder)
        return np.stack([one.probabilities for one in engine.score(items)])

    ours = answers(precision, NativeProducts if precision == "bf16" else StackedProducts)
    monkeypatch.setattr(NativeProducts, "missing", staticmethod(lambda *_: "as if it were"))
    monkeypatch.setattr(packing, "unfit", lambda *_: "as if it were")
    theirs, right = answers(precision, StackedProducts), answers("fp32", StackedProducts)
    assert not np.array_equal(ours, theirs)
    assert np.abs(ours - right).max() < most and np.abs(theirs - right).max() < most
    assert np.abs(ours - right).mean() < 1.5 * np.abs(theirs - right).mean()


class Guarded:
    """Memory that ends where none may be touched: what reads or writes beyond it ends the process."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._kept: list[mmap.mmap] = []

    def __call__(self, tensor: torch.Tensor, align: int = 2) -> torch.Tensor:
        """`tensor`, contiguous, in such memory."""
        size = tensor.numel() * tensor.element_size()
        pages = mmap.mmap(-1, (-(-size // mmap.PAGESIZE) + 1) * mmap.PAGESIZE)
        self._kept.append(pages)
        last = len(pages) - mmap.PAGESIZE
        moved = torch.frombuffer(pages, dtype=torch.uint8)[(last - size) // align * align :][:size]
        moved = moved.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        begins = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        assert self._libc.mprotect(begins + last, mmap.PAGESIZE, 0) == 0
        return moved


@needs_it
@pytest.mark.parametrize("count", [1, 2])
def test_nothing_beyond_rows_and_matrices_is_touched(count: int) -> None:
    torch.set_num_threads(count)
    guarded, products = Guarded(), NativeProducts(FAMILIES)
    updates = []
    for adapter in ADAPTERS:
        update = products.update(adapter)
        moved = guarded(update.values, 64)
        table = update.table.clone()
        table[:, [0, 2]] += moved.data_ptr() - update.values.data_ptr()
        updates.append(NativeUpdate(moved, guarded(table, 8)))
    for name in SIZES:
        input, output = (each[:222] for each in example(name))
        products.begin(222, [(start, stop, updates[adapter]) for start, stop, adapter in BOUNDS])
        found = guarded(output)
        products.add(layer(name), guarded(input, 4), found, 1)
        torch.testing.assert_close(found, added(name, input, output, BOUNDS), rtol=0, atol=0)
    whole = projected(3, 64, tokens=sum(LENGTHS))
    moved_parts = [guarded(each.transpose(1, 2).contiguous(), 4).transpose(1, 2) for each in whole]
    ours = attended(*moved_parts, 0.2, guarded(bounds(), 8))
    torch.testing.assert_close(ours, attended(*whole, 0.2, bounds()), rtol=0, atol=0)
