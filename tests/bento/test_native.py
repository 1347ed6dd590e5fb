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
from llvmlite import ir
from torch import nn

from bento import packing
from bento.devices import native_bf16
from bento.engine import Engine
from bento.multi_lora import MultiLora, Pairs, Segments
from bento.native import machine_code
from bento.native.attention import attended, unfit
from bento.native.kinds import Avx512, Bf16, Kind
from bento.native.products import NativeProducts, NativeUpdate
from bento.native.writing import Code
from bento.stacked_products import StackedProducts

SIZES = {"query": (64, 64), "value": (64, 64), "up": (64, 160), "down": (160, 64), "narrow": (64, 16)}
FAMILIES = (("query", "value"), ("up",), ("down",), ("narrow",))
ROUNDING = {torch.bfloat16: 2**-7, torch.float32: 2**-19}
"""Two roundings to bfloat16, or some to float32, relative to the largest value."""
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    bool(machine_code.missing(torch.float32, CPU)), reason=machine_code.missing(torch.float32, CPU)
)


class Bf16Anywhere(Bf16):
    """What only some processors do is put together of what every one does; the programs are the same."""

    def product(self, code: Code, sums: ir.Value, left: ir.Value, right: ir.Value) -> ir.Value:
        left, right = (code.build.bitcast(each, self.words) for each in (left, right))
        for lower in (True, False):
            sums = code.fused(*(self._half(code, each, lower=lower) for each in (left, right)), sums)
        return sums

    def put(self, code: Code, address: ir.Value, values: ir.Value) -> None:
        build = code.build
        words = build.bitcast(values, self.words)
        odd = build.and_(build.lshr(words, self._word(16)), self._word(1))
        rounded = build.add(words, build.add(odd, self._word(0x7FFF)))
        kept = build.select(build.fcmp_unordered("uno", values, values), words, rounded)
        halves = build.trunc(build.lshr(kept, self._word(16)), ir.VectorType(ir.IntType(16), self.lanes))
        code.store(halves, address, self.value)

    def scaled(self, code: Code, values: ir.Value, exponents: ir.Value) -> ir.Value:
        return Avx512().scaled(code, values, exponents)

    def _half(self, code: Code, words: ir.Value, *, lower: bool) -> ir.Value:
        upper = code.build.shl(words, self._word(16)) if lower else code.build.and_(words, self._word(0xFFFF0000))
        return code.build.bitcast(upper, self.floats)

    def _word(self, value: int) -> ir.Constant:
        return ir.Constant(self.words, [value] * self.lanes)


TESTED = [*machine_code.KINDS, Bf16Anywhere()]


@pytest.fixture(params=TESTED, ids=lambda kind: type(kind).__name__)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kind:
    """The only one; LLVM lets any processor compute in registers of any length."""
    kind: Kind = request.param
    if type(kind) is Bf16 and kind not in machine_code.computed():
        pytest.skip(machine_code.missing(torch.bfloat16, CPU))
    monkeypatch.setattr(machine_code, "computed", lambda: [kind])
    return kind


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
    products = NativeProducts(FAMILIES, input.dtype)
    updates = [products.update(adapter) for adapter in ADAPTERS]
    products.begin(len(input), [(start, stop, updates[adapter]) for start, stop, adapter in parts])
    output = output.clone()
    products.add(layer(name), input, output, 1)
    return output


def example(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(99)
    input, output = (torch.randn(ROWS, size, generator=random).to(dtype) for size in SIZES[name])
    return input, output


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", SIZES)
def test_every_segment_gets_its_own_update_and_no_other_row_any(kind: Kind, name: str, count: int) -> None:
    torch.set_num_threads(count)
    input, output = example(name, kind.dtype)
    found = added(name, input, output, BOUNDS)
    expected = output.clone().float()
    touched = torch.zeros(ROWS, dtype=torch.bool)
    for start, stop, adapter in BOUNDS:
        if name in ADAPTERS[adapter]:
            a, b = (matrix.to(kind.dtype).float() for matrix in ADAPTERS[adapter][name])
            expected[start:stop] += (input[start:stop].float() @ a).to(kind.dtype).float() @ b
            touched[start:stop] = True
    assert 0 < touched.sum() < ROWS
    torch.testing.assert_close(found[~touched], output[~touched], rtol=0, atol=0)
    assert (found[touched] - output[touched]).abs().amax(1).min() > 0
    assert (found - expected).abs().max() <= ROUNDING[kind.dtype] * expected.abs().max()


@pytest.mark.parametrize("name", SIZES)
def test_a_row_does_not_see_its_neighbours_at_all(kind: Kind, name: str) -> None:
    """Not even their NaN; and neither the threads nor the place in a segment change a bit of it."""
    input, output = example(name, kind.dtype)
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


def test_layers_that_read_the_same_tensor_and_rows_of_several_tokens(kind: Kind) -> None:
    """In a padded batch a row has as many tokens as the longest text."""
    products = NativeProducts(FAMILIES, kind.dtype)
    update = products.update(ADAPTERS[0])
    products.begin(23, [(2, 5, update), (5, 20, update)])
    input, _ = example("query", kind.dtype)
    for name in ("query", "value"):
        output = torch.zeros(ROWS, 64, dtype=kind.dtype)
        products.add(layer(name), input.view(23, 10, 64), output, 10)
        a, b = ADAPTERS[0][name]
        expected = (input.float() @ a @ b)[20:200]
        assert (output[20:200] - expected).abs().max() <= 2 * ROUNDING[kind.dtype] * expected.abs().max()
        assert not output[:20].any() and not output[200:].any()


@pytest.mark.parametrize("rank", [4, 40])
def test_another_family_may_read_the_same_tensor(kind: Kind, rank: int) -> None:
    """As where attention and what follows it are parallel; the layer between them has no update."""
    random = torch.Generator().manual_seed(0)
    families = (("query",), ("dense",), ("up",))
    layers = {name: MultiLora(name, nn.Linear(64, 64), Segments()) for (name,) in families}
    products = NativeProducts(families, kind.dtype)
    update = products.update(
        {
            name: (torch.randn(64, size, generator=random) / 8, torch.randn(size, 64, generator=random) / 8)
            for name, size in (("query", 4), ("up", rank))
        }
    )
    input = torch.randn(8, 64, generator=random).to(kind.dtype)

    def output(*names: str) -> torch.Tensor:
        """Of the last of these layers, which follow each other."""
        products.begin(8, [(0, 8, update)])
        for name in names:
            sums = torch.zeros(8, 64, dtype=kind.dtype)
            products.add(layers[name], input.clone() if name == "dense" else input, sums, 1)
        return sums

    torch.testing.assert_close(output("query", "dense", "up"), output("up"), rtol=0, atol=0)


def test_nothing_is_computed_beyond_the_tensors(kind: Kind) -> None:
    products = NativeProducts(FAMILIES, kind.dtype)
    with pytest.raises(ValueError, match="row 9 of 8"):
        products.begin(8, [(0, 4, products.update(ADAPTERS[0])), (4, 9, products.update(ADAPTERS[1]))])
    with pytest.raises(ValueError, match="token 9 of 8"):
        attended(*projected(kind, 2, 32, tokens=8), 0.2, torch.tensor([[0, 4], [4, 9]]))


def test_an_update_of_no_layer(kind: Kind) -> None:
    update = NativeProducts(FAMILIES, kind.dtype).update({})
    assert update.finite and update.nbytes == 0


@pytest.mark.parametrize(
    ("sizes", "dtype", "device", "why"),
    [
        ((64, 64), torch.float64, "cpu", "for bfloat16"),
        ((64, 64), torch.float32, "meta", "on CPUs"),
        ((64, 308), torch.float32, "cpu", "odd is"),
        ((33, 64), torch.bfloat16, "cpu", "odd is"),
    ],
)
def test_what_it_is_not_for(
    sizes: tuple[int, int], dtype: torch.dtype, device: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_code, "computed", lambda: machine_code.KINDS)
    layers = [MultiLora(name, nn.Linear(*size), Segments()) for name, size in (("even", (64, 64)), ("odd", sizes))]
    assert why in NativeProducts.missing(layers, dtype, torch.device(device))


LENGTHS = (5, 1, 16, 0, 17, 90, 33, 12)


def projected(
    kind: Kind, heads: int, width: int, tokens: int = sum(LENGTHS) + 3, size: float = 1.0
) -> list[torch.Tensor]:
    """Queries, keys and values [1, heads, tokens, width], as a model has them."""
    random = torch.Generator().manual_seed(7)
    flat = (torch.randn(1, tokens, heads * width, generator=random).mul_(size).to(kind.dtype) for _ in range(3))
    return [each.view(1, tokens, heads, width).transpose(1, 2) for each in flat]


def bounds() -> torch.Tensor:
    return packing.Layout(LENGTHS, torch.float32, CPU).bounds


def by_torch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """[1, tokens, heads, width]"""
    expected = torch.zeros(query.shape, dtype=dtype).transpose(1, 2).contiguous()
    for start, stop in bounds().tolist():
        q, k, v = (each[0, :, start:stop].to(dtype) for each in (query, key, value))
        expected[0, start:stop] = (torch.softmax(scale * q @ k.transpose(1, 2), -1) @ v).transpose(0, 1)
    return expected


@pytest.mark.parametrize("size", [0.2, 1, 20], ids=["flat", "as usual", "only the largest counts"])
@pytest.mark.parametrize(("heads", "width"), [(12, 32), (3, 64), (2, 96), (1, 128)])
@pytest.mark.parametrize("count", [1, 3])
def test_every_token_attends_to_its_own_text(kind: Kind, heads: int, width: int, size: float, count: int) -> None:
    torch.set_num_threads(count)
    query, key, value = projected(kind, heads, width, size=size)
    scale = width**-0.5
    found = attended(query, key, value, scale, bounds())
    expected, single = (by_torch(query, key, value, scale, dtype) for dtype in (torch.float64, torch.float32))
    assert found.dtype == kind.dtype and found.shape == expected.shape
    of_torch = (single - expected).abs().max()  # large where scores are: their rounding is an exponent's
    assert (found - expected).abs().max() <= ROUNDING[kind.dtype] * expected.abs().max() + 2 * of_torch
    assert not found[:, sum(LENGTHS) :].any()


def test_a_text_does_not_see_its_neighbours_at_all(kind: Kind) -> None:
    query, key, value = projected(kind, 4, 32)
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


def test_a_query_without_a_finite_score_has_no_answer(kind: Kind) -> None:
    query, key, value = projected(kind, 2, 32)
    key.fill_(-torch.inf)
    query.fill_(1)
    found = attended(query, key, value, 0.2, bounds())
    assert found[:, : sum(LENGTHS)].isnan().all()


def test_projections_may_lie_in_one_tensor(kind: Kind) -> None:
    torch.manual_seed(0)
    tokens, heads, width = sum(LENGTHS), 3, 32
    for shape, at in (
        ((1, tokens, heads, 3, width), 3),
        ((1, tokens, heads, width, 3), 4),
        ((1, tokens, 3, heads, width), 2),
    ):
        fused = torch.randn(shape).to(kind.dtype)
        parts = [fused.select(at, which).transpose(1, 2) for which in range(3)]
        apart = [part.contiguous() for part in parts]
        assert parts[0].stride() != apart[0].stride()
        torch.testing.assert_close(attended(*parts, 0.2, bounds()), attended(*apart, 0.2, bounds()), rtol=0, atol=0)


def test_engines_in_several_threads(kind: Kind) -> None:
    """Each has a room of its own."""
    inputs = [projected(kind, 4, 32, size=size) for size in (0.5, 1.0, 2.0, 4.0)]
    alone = [attended(*each, 0.2, bounds()) for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for found, expected in zip(
                pool.map(lambda each: attended(*each, 0.2, bounds()), inputs), alone, strict=True
            ):
                torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_cpu_that_llvm_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llvmlite.binding, "get_host_cpu_features", dict)
    monkeypatch.setattr(machine_code, "computed", machine_code.computed.__wrapped__)
    assert "LLVM" in machine_code.missing(torch.float32, CPU)


@pytest.mark.parametrize(
    ("width", "dtype", "device", "why"),
    [
        (24, torch.float32, "cpu", "24 wide"),
        (32, torch.float64, "cpu", "bfloat16"),
        (32, torch.float32, "meta", "CPU"),
    ],
)
def test_which_attention_it_is_not_for(width: int, dtype: torch.dtype, device: str, why: str) -> None:
    assert why in unfit(width, dtype, torch.device(device))


@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-5), ("bf16", 0.05), ("int8", 0.3)])
def test_an_engine_answers_as_with_products_of_torch(
    workshop: Any,
    tmp_path: Path,
    precision: str,
    most: float,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Those are for machines without it. In int8 updates are native where they are of the type of their inputs."""
    if precision != "fp32":
        request.getfixturevalue(f"with_{precision}")
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

    mixed = precision == "int8" and native_bf16(CPU)
    ours = answers(precision, StackedProducts if mixed else NativeProducts)
    monkeypatch.setattr(NativeProducts, "missing", staticmethod(lambda *_: "as if it were"))
    monkeypatch.setattr(packing, "unfit", lambda *_: "as if it were")
    theirs, right = answers(precision, StackedProducts), answers("fp32", StackedProducts)
    assert not np.array_equal(ours, theirs)
    assert np.abs(ours - right).max() < most and np.abs(theirs - right).max() < most
    assert np.abs(ours - right).mean() < 1.5 * np.abs(theirs - right).mean() + 1e-6


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


@pytest.mark.parametrize("count", [1, 2])
def test_nothing_beyond_rows_and_matrices_is_touched(kind: Kind, count: int) -> None:
    torch.set_num_threads(count)
    guarded, products = Guarded(), NativeProducts(FAMILIES, kind.dtype)
    updates = []
    for adapter in ADAPTERS:
        update = products.update(adapter)
        moved = guarded(update.values, 64)
        table = update.table.clone()
        table[:, [0, 2]] += moved.data_ptr() - update.values.data_ptr()
        updates.append(NativeUpdate(moved, guarded(table, 8)))
    for name in SIZES:
        input, output = (each[:222] for each in example(name, kind.dtype))
        products.begin(222, [(start, stop, updates[adapter]) for start, stop, adapter in BOUNDS])
        found = guarded(output)
        products.add(layer(name), guarded(input, 4), found, 1)
        torch.testing.assert_close(found, added(name, input, output, BOUNDS), rtol=0, atol=0)
    whole = projected(kind, 3, 64, tokens=sum(LENGTHS))
    moved_parts = [guarded(each.transpose(1, 2).contiguous(), 4).transpose(1, 2) for each in whole]
    ours = attended(*moved_parts, 0.2, guarded(bounds(), 8))
    torch.testing.assert_close(ours, attended(*whole, 0.2, bounds()), rtol=0, atol=0)
