"""Writes functions for LLVM that compute with tiles of rows.

A tile of some rows and registers of columns is summed in registers. The last tile of a part may be larger than what is
left of it: its last row then stands for the missing ones too, which are read, computed and written as that row is.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product

from llvmlite import ir

from bento.native.kinds import WORD, WORD_BYTES, Kind

NUMBER = 8
"""Bytes of a field, an address or a row's number."""
ADDRESS = ir.PointerType()
LONG, BYTE = ir.IntType(64), ir.IntType(8)


class Code:
    """Writes one function. What iterates writes a loop around what its caller's loop writes."""

    def __init__(self, build: ir.IRBuilder, kind: Kind) -> None:
        self.build, self.kind = build, kind

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
        self, inputs: Sequence[ir.Value], weights: ir.Value, words: ir.Value, width: int
    ) -> list[list[ir.Value]]:
        """`width` registers of the product of each row; there is at least one word.

        Args:
            inputs: Addresses of the rows.
            weights: Address of these columns of the matrix.
            words: Of each row.
        """
        kind, line = self.kind, self.kind.line

        def add(word: ir.Value, sums: Sequence[ir.Value]) -> list[ir.Value]:
            start = self.moved(weights, word, width * line)
            columns = [self.load(self.moved(start, number(each), line), kind.factors, line) for each in range(width)]
            own = [self.load(self.moved(address, word, WORD_BYTES), WORD, WORD_BYTES) for address in inputs]
            values = [self.build.bitcast(self.everywhere(each), kind.factors) for each in own]
            factors = product(values, columns)
            return [kind.product(self, sum_, *both) for sum_, both in zip(sums, factors, strict=True)]

        sums = self.folded(words, [ir.Constant(kind.floats, None)] * (len(inputs) * width), add)
        return [sums[at : at + width] for at in range(0, len(sums), width)]

    def addresses(self, start: ir.Value, step: ir.Value, rows: Sequence[ir.Value]) -> list[ir.Value]:
        """Where `rows` begin that are `step` bytes apart, the first of all at the number `start`."""
        return [self.pointer(self.build.add(start, self.build.mul(row, step))) for row in rows]

    def prefetch(self, address: ir.Value, lines: ir.Value) -> None:
        """Ask for so many lines to be brought nearer to the processor."""
        read, near, data = (ir.Constant(WORD, value) for value in (0, 2, 1))
        for line in self.loop(number(0), lines, 1):
            self.call("llvm.prefetch.p0", ir.VoidType(), self.moved(address, line, self.kind.line), read, near, data)

    def get(self, address: ir.Value, width: int) -> list[ir.Value]:
        """As many values as `width` registers have sums, as float32."""
        places = [self.moved(address, number(each), self.kind.short_line) for each in range(width)]
        return [self.kind.get(self, place) for place in places]

    def put(self, address: ir.Value, values: Sequence[ir.Value]) -> None:
        """Registers of float32, as values."""
        for at, each in enumerate(values):
            self.kind.put(self, self.moved(address, number(at), self.kind.short_line), each)

    def power_of_two(self, exponents: ir.Value) -> ir.Value:
        """2^x of float32 that are not above zero, to 3e-6 of it or to 1e-7 where values are float32; what would be
        subnormal is the smallest normal number."""
        build, kind = self.build, self.kind
        least = ir.Constant(kind.floats, [-126.0] * kind.lanes)
        x = build.select(build.fcmp_ordered("<", exponents, least), least, exponents)  # NaN stays
        whole = self.call(f"llvm.rint.v{kind.lanes}f32", kind.floats, x)
        rest = build.fsub(x, whole)
        highest, *others = (
            ir.Constant(kind.floats, [math.log(2) ** order / math.factorial(order)] * kind.lanes)
            for order in range(kind.order, -1, -1)
        )
        power = highest
        for coefficient in others:
            power = self.fused(power, rest, coefficient)
        return kind.scaled(self, power, whole)

    def fused(self, left: ir.Value, right: ir.Value, more: ir.Value) -> ir.Value:
        """left * right + more of float32, rounded once."""
        return self.call(f"llvm.fma.v{self.kind.lanes}f32", self.kind.floats, left, right, more)

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
        register = ir.VectorType(value.type, self.kind.lanes)
        alone = self.build.insert_element(ir.Constant(register, ir.Undefined), value, ir.Constant(WORD, 0))
        return self.build.shuffle_vector(alone, alone, ir.Constant(self.kind.words, None))

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
def function(module: ir.Module, name: str, fields: int, kind: Kind) -> Iterator[tuple[Code, list[ir.Value]]]:
    """A function of that many numbers, each eight bytes wide, whose address it is called with."""
    written = ir.Function(module, ir.FunctionType(ir.VoidType(), (ADDRESS,)), name)
    code = Code(ir.IRBuilder(written.append_basic_block()), kind)
    yield code, code.numbers(written.args[0], fields)
    code.build.ret_void()


def number(value: int) -> ir.Constant:
    return ir.Constant(LONG, value)
