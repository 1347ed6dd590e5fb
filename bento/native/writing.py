"""Writes functions for LLVM that compute with tiles of bfloat16 rows; needs AVX512-BF16 where they run.

A tile of some rows and registers of columns is summed in registers. The last tile of a part may be larger than what is
left of it: its last row then stands for the missing ones too, which are read, computed and written as that row is.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product

from llvmlite import ir

LANES = 16
"""float32 values of a register."""
LINE = 64
"""Bytes of a register; what is read by the register begins at multiples, but for rows of the model's tensors."""
VALUE = 2
"""Bytes of a bfloat16."""
PAIR = 2 * VALUE
SHORT_LINE = LANES * VALUE
"""Bytes of a register's values, rounded."""
NUMBER = 8
"""Bytes of a field, an address or a row's number."""


class _Bf16(ir.Type):
    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bf16)

    def __hash__(self) -> int:
        return hash(_Bf16)


DOT = "llvm.x86.avx512bf16.dpbf16ps.512"
ADDRESS = ir.PointerType()
LONG, WORD, HALF, BYTE = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.IntType(8)
FLOAT = ir.FloatType()
FLOATS = ir.VectorType(FLOAT, LANES)
WORDS, HALVES = ir.VectorType(WORD, LANES), ir.VectorType(HALF, LANES)
PAIRS, ROUNDED = ir.VectorType(_Bf16(), 2 * LANES), ir.VectorType(_Bf16(), LANES)


class Code:
    """Writes one function. What iterates writes a loop around what its caller's loop writes."""

    def __init__(self, build: ir.IRBuilder) -> None:
        self.build = build

    def thread(self) -> ir.Value:
        """The number of this thread; needs OpenMP's functions, as `share` does."""
        return self.build.sext(self.call("omp_get_thread_num", WORD), LONG)

    def share(self, count: ir.Value) -> tuple[ir.Value, ir.Value]:
        """First and after the last of `count` things, as far as they are this thread's."""
        thread, threads = self.thread(), self.build.sext(self.call("omp_get_num_threads", WORD), LONG)
        start = self.build.sdiv(self.build.mul(count, thread), threads)
        return start, self.build.sdiv(self.build.mul(count, self.build.add(thread, number(1))), threads)

    def chunks(self, registers: ir.Value, widths: Mapping[int, object]) -> Iterator[tuple[ir.Value, int]]:
        """First register and how many, as many of them together as `widths` has."""
        return self._divided(number(0), registers, sorted(widths, reverse=True))

    def tiles(self, start: ir.Value, stop: ir.Value, sizes: Sequence[int]) -> Iterator[list[ir.Value]]:
        """The rows of each tile; those from `stop` on are the one before it."""
        last = self.build.sub(stop, number(1))
        for at, size in self._divided(start, stop, sizes):
            yield [self.smaller(self.build.add(at, number(row)), last) for row in range(size)]

    def products(
        self, inputs: Sequence[ir.Value], weights: ir.Value, pairs: ir.Value, width: int
    ) -> list[list[ir.Value]]:
        """`width` registers of the product of each row; there is at least one pair.

        Args:
            inputs: Addresses of the rows.
            weights: Address of these columns of the matrix.
            pairs: Of its rows.
        """

        def add(pair: ir.Value, sums: Sequence[ir.Value]) -> list[ir.Value]:
            start = self.moved(weights, pair, width * LINE)
            columns = [self.load(self.moved(start, number(each), LINE), PAIRS, LINE) for each in range(width)]
            words = [self.load(self.moved(address, pair, PAIR), WORD, PAIR) for address in inputs]
            values = [self.build.bitcast(self.everywhere(word), PAIRS) for word in words]
            factors = product(values, columns)
            return [self.call(DOT, FLOATS, sum_, *pair_) for sum_, pair_ in zip(sums, factors, strict=True)]

        sums = self.folded(pairs, [ir.Constant(FLOATS, None)] * (len(inputs) * width), add)
        return [sums[at : at + width] for at in range(0, len(sums), width)]

    def addresses(self, start: ir.Value, step: ir.Value, rows: Sequence[ir.Value]) -> list[ir.Value]:
        """Where `rows` begin that are `step` bytes apart, the first of all at the number `start`."""
        return [self.pointer(self.build.add(start, self.build.mul(row, step))) for row in rows]

    def prefetch(self, address: ir.Value, lines: ir.Value) -> None:
        """Ask for so many lines to be brought nearer to the processor."""
        read, near, data = (ir.Constant(WORD, value) for value in (0, 2, 1))
        for line in self.loop(number(0), lines, 1):
            self.call("llvm.prefetch.p0", ir.VoidType(), self.moved(address, line, LINE), read, near, data)

    def get(self, address: ir.Value, width: int) -> list[ir.Value]:
        """`width` registers of bfloat16, as float32."""
        halves = [self.load(self.moved(address, number(each), SHORT_LINE), HALVES, VALUE) for each in range(width)]
        words = [self.build.zext(each, WORDS) for each in halves]
        return [self.build.bitcast(self.build.shl(each, ir.Constant(WORDS, [16] * LANES)), FLOATS) for each in words]

    def put(self, address: ir.Value, values: Sequence[ir.Value]) -> None:
        """Registers of float32, as bfloat16."""
        for at, each in enumerate(values):
            to = self.moved(address, number(at), SHORT_LINE)
            self.store(self.build.fptrunc(each, ROUNDED), to, VALUE)

    def power_of_two(self, exponents: ir.Value) -> ir.Value:
        """2^x of float32, to 3e-6 of it; what would be subnormal is the smallest normal number."""
        build = self.build
        least = ir.Constant(FLOATS, [-126.0] * LANES)
        x = build.select(build.fcmp_ordered("<", exponents, least), least, exponents)  # NaN stays
        whole = self.call("llvm.rint.v16f32", FLOATS, x)
        rest = build.fsub(x, whole)
        power = ir.Constant(FLOATS, [math.log(2) ** 5 / math.factorial(5)] * LANES)
        for order in (4, 3, 2, 1, 0):
            coefficient = ir.Constant(FLOATS, [math.log(2) ** order / math.factorial(order)] * LANES)
            power = self.call("llvm.fma.v16f32", FLOATS, power, rest, coefficient)
        every_lane, usual_rounding = ir.Constant(HALF, -1), ir.Constant(WORD, 4)
        return self.call("llvm.x86.avx512.mask.scalef.ps.512", FLOATS, power, whole, whole, every_lane, usual_rounding)

    def folded(
        self, count: ir.Value, first: Sequence[ir.Value], step: Callable[[ir.Value, Sequence[ir.Value]], list[ir.Value]]
    ) -> list[ir.Value]:
        """`first` after `step(index, values)` for each index below `count`, which is at least 1."""
        build = self.build
        entry, body, end = build.block, build.append_basic_block(), build.append_basic_block()
        build.branch(body)
        build.position_at_end(body)
        at, values = build.phi(LONG), [build.phi(each.type) for each in first]
        following, new = build.add(at, number(1)), step(at, values)
        build.cbranch(build.icmp_signed("<", following, count), body, end)
        for phi, start, next_ in zip((at, *values), (number(0), *first), (following, *new), strict=True):
            phi.add_incoming(start, entry)
            phi.add_incoming(next_, body)
        build.position_at_end(end)
        return new

    def call(self, name: str, gives: ir.Type, *values: ir.Value, fast: Sequence[str] = ()) -> ir.Value:
        """What the function `name` from elsewhere gives."""
        module = self.build.module
        function = module.globals.get(name)
        if function is None:
            function = ir.Function(module, ir.FunctionType(gives, [value.type for value in values]), name)
        return self.build.call(function, values, fastmath=fast)

    def everywhere(self, value: ir.Value) -> ir.Value:
        """A register with `value` in every lane."""
        kind = ir.VectorType(value.type, LANES)
        alone = self.build.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(WORD, 0))
        return self.build.shuffle_vector(alone, alone, ir.Constant(WORDS, None))

    def times(self, value: ir.Value, factor: int) -> ir.Value:
        return self.build.mul(value, number(factor))

    def moved(self, address: ir.Value, count: ir.Value, size: int) -> ir.Value:
        """`count` things of `size` bytes later."""
        return self.build.gep(address, [self.times(count, size)], source_etype=BYTE)

    def pointer(self, number: ir.Value) -> ir.Value:
        return self.build.inttoptr(number, ADDRESS)

    def numbers(self, address: ir.Value, count: int) -> list[ir.Value]:
        return [self.load(self.moved(address, number(each), NUMBER), LONG, NUMBER) for each in range(count)]

    def load(self, address: ir.Value, what: ir.Type, align: int) -> ir.Value:
        return self.build.load(address, typ=what, align=align)

    def store(self, value: ir.Value, address: ir.Value, align: int) -> None:
        self.build.store(value, address).align = align

    def chosen(self, sign: str, left: ir.Value, right: ir.Value) -> ir.Value:
        return self.build.select(self.build.icmp_signed(sign, left, right), left, right)

    def smaller(self, left: ir.Value, right: ir.Value) -> ir.Value:
        return self.chosen("<", left, right)

    def _divided(self, start: ir.Value, stop: ir.Value, sizes: Sequence[int]) -> Iterator[tuple[ir.Value, int]]:
        """Parts of these sizes, as many of each as there are; one of the last size may reach beyond `stop`."""
        build = self.build
        for size in sizes:
            whole = stop
            if size != sizes[-1]:
                whole = build.add(start, self.times(build.sdiv(build.sub(stop, start), number(size)), size))
            for at in self.loop(start, whole, size):
                yield at, size
            start = whole

    def loop(self, start: ir.Value, stop: ir.Value, step: int) -> Iterator[ir.Value]:
        build = self.build
        entry, head, body, end = build.block, *(build.append_basic_block() for _ in range(3))
        build.branch(head)
        build.position_at_end(head)
        at = build.phi(LONG)
        build.cbranch(build.icmp_signed("<", at, stop), body, end)
        build.position_at_end(body)
        yield at
        at.add_incoming(start, entry)
        at.add_incoming(build.add(at, number(step)), build.block)
        build.branch(head)
        build.position_at_end(end)


@contextmanager
def function(module: ir.Module, name: str, fields: int) -> Iterator[tuple[Code, list[ir.Value]]]:
    """A function of that many numbers, each eight bytes wide, whose address it is called with."""
    written = ir.Function(module, ir.FunctionType(ir.VoidType(), (ADDRESS,)), name)
    code = Code(ir.IRBuilder(written.append_basic_block()))
    yield code, code.numbers(written.args[0], fields)
    code.build.ret_void()


def number(value: int) -> ir.Constant:
    return ir.Constant(LONG, value)
