"""Kinds of values and processors: how registers of them are read, multiplied and written.

A word of four bytes holds as many values as a processor multiplies and sums together: two of bfloat16, one of float32.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from llvmlite import ir

if TYPE_CHECKING:
    from bento.native.writing import Code

WORD_BYTES = 4
HALF, WORD = ir.IntType(16), ir.IntType(32)
FLOAT = ir.FloatType()
MANTISSA = 23
"""Bits of a float32 below its exponent."""
WIDE = 2
"""Registers of neighbouring columns that attention computes together."""


class _Bfloat(ir.Type):
    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bfloat)

    def __hash__(self) -> int:
        return hash(_Bfloat)


class Kind(ABC):
    """One of them.

    Tiles are by registers of columns: rows of a tile, the large tiles first. They are the fastest of those measured:
    their sums fit the registers, and are enough to hide how long one product takes.
    """

    dtype: torch.dtype
    feature: str
    """What LLVM calls what the processor needs."""
    needs: str
    """What people call it."""
    depth: int
    """Values of a word."""
    lanes: int
    """float32 values of a register."""
    sums: int
    """Registers of sums of a tile, at most."""
    low_tiles: Mapping[int, Sequence[int]]
    """Of long products with few columns."""
    add_tiles: Mapping[int, Sequence[int]]
    """Of short products with many columns."""
    query_tiles: Sequence[int]
    """Queries whose attention is computed together."""
    order: int
    """Of the polynomial that is 2^x."""

    def __init__(self) -> None:
        self.value = WORD_BYTES // self.depth
        """Bytes of a value."""
        self.line = self.lanes * WORD_BYTES
        """Bytes of a register; what is read by registers begins at multiples, but for rows of the model's tensors."""
        self.short_line = self.lanes * self.value
        """Bytes of as many values as a register has sums."""
        self.floats, self.words = ir.VectorType(FLOAT, self.lanes), ir.VectorType(WORD, self.lanes)

    @property
    @abstractmethod
    def factors(self) -> ir.Type:
        """A register of values that are multiplied."""

    @abstractmethod
    def product(self, code: "Code", sums: ir.Value, left: ir.Value, right: ir.Value) -> ir.Value:
        """sums + left * right, of the values of each word."""

    @abstractmethod
    def get(self, code: "Code", address: ir.Value) -> ir.Value:
        """`lanes` values, as float32."""

    @abstractmethod
    def put(self, code: "Code", address: ir.Value, values: ir.Value) -> None:
        """float32, as values."""

    @abstractmethod
    def interwoven(self, code: "Code", rows: Sequence[ir.Value]) -> list[ir.Value]:
        """`WIDE` registers of `depth` rows of a matrix, whose words hold a column's values.

        Args:
            rows: Addresses.
        """

    @abstractmethod
    def scaled(self, code: "Code", values: ir.Value, exponents: ir.Value) -> ir.Value:
        """values * 2^exponents, which are whole, not above zero and not below -126; NaN stays."""


class Bf16(Kind):
    """bfloat16 where the processor multiplies it itself; tiles as measured on Zen 5."""

    dtype = torch.bfloat16
    feature, needs = "avx512bf16", "AVX512-BF16"
    depth, lanes, sums = 2, 16, 24
    low_tiles = {3: (6, 3), 2: (12, 4), 1: (20, 8, 4)}
    add_tiles = {3: (6, 4, 2), 1: (8, 4)}
    query_tiles = (12, 4)
    order = 5

    def __init__(self) -> None:
        super().__init__()
        self._halves = ir.VectorType(HALF, self.lanes)
        self._rounded = ir.VectorType(_Bfloat(), self.lanes)
        self._pairs = ir.VectorType(_Bfloat(), 2 * self.lanes)

    @property
    def factors(self) -> ir.Type:
        return self._pairs

    def product(self, code: "Code", sums: ir.Value, left: ir.Value, right: ir.Value) -> ir.Value:
        return code.call("llvm.x86.avx512bf16.dpbf16ps.512", self.floats, sums, left, right)

    def get(self, code: "Code", address: ir.Value) -> ir.Value:
        words = code.build.zext(code.load(address, self._halves, self.value), self.words)
        upper = code.build.shl(words, ir.Constant(self.words, [16] * self.lanes))
        return code.build.bitcast(upper, self.floats)

    def put(self, code: "Code", address: ir.Value, values: ir.Value) -> None:
        code.store(code.build.fptrunc(values, self._rounded), address, self.value)

    def interwoven(self, code: "Code", rows: Sequence[ir.Value]) -> list[ir.Value]:
        columns = WIDE * self.lanes
        first, second = (code.load(row, ir.VectorType(HALF, columns), self.value) for row in rows)
        kind = ir.VectorType(WORD, columns)
        return [
            code.build.shuffle_vector(
                first,
                second,
                ir.Constant(kind, [half * self.lanes + at // 2 + columns * (at % 2) for at in range(columns)]),
            )
            for half in range(WIDE)
        ]

    def scaled(self, code: "Code", values: ir.Value, exponents: ir.Value) -> ir.Value:
        every_lane, usual_rounding = ir.Constant(HALF, -1), ir.Constant(WORD, 4)
        scale = "llvm.x86.avx512.mask.scalef.ps.512"
        return code.call(scale, self.floats, values, exponents, exponents, every_lane, usual_rounding)


class Float32(Kind):
    """float32 on any processor that multiplies and adds registers in one step."""

    dtype = torch.float32
    depth = 1
    order = 7

    @property
    def factors(self) -> ir.Type:
        return self.floats

    def product(self, code: "Code", sums: ir.Value, left: ir.Value, right: ir.Value) -> ir.Value:
        return code.fused(left, right, sums)

    def get(self, code: "Code", address: ir.Value) -> ir.Value:
        return code.load(address, self.floats, self.value)

    def put(self, code: "Code", address: ir.Value, values: ir.Value) -> None:
        code.store(values, address, self.value)

    def interwoven(self, code: "Code", rows: Sequence[ir.Value]) -> list[ir.Value]:
        (row,) = rows
        return code.get(row, WIDE)

    def scaled(self, code: "Code", values: ir.Value, exponents: ir.Value) -> ir.Value:
        build = code.build
        # the sum's lowest bits are the exponent, whole and signed; shifted they are the one of a float
        bits = build.bitcast(build.fadd(exponents, self._everywhere(1.5 * 2**MANTISSA)), self.words)
        shifted = build.shl(bits, ir.Constant(self.words, [MANTISSA] * self.lanes))
        power = build.add(shifted, build.bitcast(self._everywhere(1.0), self.words))
        return build.fmul(values, build.bitcast(power, self.floats))

    def _everywhere(self, value: float) -> ir.Constant:
        return ir.Constant(self.floats, [value] * self.lanes)


class Avx512(Float32):
    """Tiles of bfloat16's size: as many registers, as long to wait for a product."""

    feature, needs = "avx512f", "AVX512F"
    lanes, sums = 16, 24
    low_tiles, add_tiles, query_tiles = Bf16.low_tiles, Bf16.add_tiles, Bf16.query_tiles


class Avx2(Float32):
    """Tiles as measured on Zen 3."""

    feature, needs = "fma", "AVX2 and FMA"
    lanes, sums = 8, 12
    low_tiles = {2: (6, 2), 1: (8, 4)}
    add_tiles = {2: (4, 2), 1: (8, 4)}
    query_tiles = (6, 2)


KINDS: Sequence[Kind] = (Bf16(), Avx512(), Avx2())
"""All of them; of each type the fastest first."""
