"""Attention within each text of a pack, as a program for LLVM.

softmax(scale * q k^T) v of a few queries at a time, whose scores stay in the cache (as in FlashAttention,
arXiv:2205.14135): a library's products need the texts gathered, padded and their scores written and read three times.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from llvmlite import ir

from bento.native.kinds import FLOAT, WIDE, WORD, Kind
from bento.native.writing import LONG, NUMBER, Code, function, number

NEVER = -math.inf
"""Score of a place behind the text."""


class Call(NamedTuple):
    """What `attend` gets, eight bytes each."""

    query: int
    """Address of the first token and head of the pack."""
    key: int
    value: int
    input_bytes: int
    """From a token to the next one in each of them; heads follow each other."""
    output: int
    """Address, likewise."""
    output_bytes: int
    bounds: int
    """Address of (first token, token after the last) of each text."""
    texts: int
    heads: int
    scale: int
    """Of scores; the bits of a float64."""
    room: int
    """Address of memory for intermediate results, where a register may begin."""
    room_bytes: int
    """Of it, for each thread: see `room_bytes`."""


def step(kind: Kind) -> int:
    """Widths of heads are multiples of it: what is computed together of the keys, and of the values."""
    return kind.lanes * max(kind.depth, WIDE)


def room_bytes(longest: int, kind: Kind, width: int) -> int:
    """Memory that a thread needs for texts of up to `longest` tokens, in registers."""
    blocks = -(-longest // kind.lanes)
    return blocks * (2 * _matrix(kind, width) + kind.query_tiles[0] * (kind.line + kind.short_line))


def program(kind: Kind, width: int) -> str:
    """The function `attend` of the address of a `Call`.

    Args:
        width: Of a head.
    """
    module = ir.Module("attention")
    with function(module, "attend", len(Call._fields), kind) as (code, fields):
        _Attention(code, Call(*fields), width).write()
    return str(module)


def _matrix(kind: Kind, width: int) -> int:
    """Bytes of the keys of a block of tokens, as many as a register has lanes, or of their values."""
    return kind.lanes * width * kind.value


class _Attention:
    """Writes the function."""

    def __init__(self, code: Code, call: Call, width: int) -> None:
        self.code, self.call, self.kind, self.width = code, call, code.kind, width
        self.matrix = _matrix(code.kind, width)
        self.block_words = code.kind.lanes // code.kind.depth

    def write(self) -> None:
        """Threads divide the heads, and texts where they are fewer."""
        code, call, kind, build = self.code, self.call, self.kind, self.code.build
        keys = build.add(call.room, build.mul(code.thread(), call.room_bytes))
        scale = build.fptrunc(build.bitcast(call.scale, ir.DoubleType()), FLOAT)
        scale = code.everywhere(build.fmul(scale, ir.Constant(FLOAT, math.log2(math.e))))
        first, after = code.share(build.mul(call.texts, call.heads))
        for task in code.loop(first, after, 1):
            head, text = build.sdiv(task, call.texts), build.srem(task, call.texts)
            start, stop = code.numbers(code.moved(code.pointer(call.bounds), text, 2 * NUMBER), 2)
            length = build.sub(stop, start)
            blocks = build.sdiv(build.add(length, number(kind.lanes - 1)), number(kind.lanes))
            values = build.add(keys, code.times(blocks, self.matrix))
            scores = build.add(values, code.times(blocks, self.matrix))
            weights = build.add(scores, code.times(blocks, kind.query_tiles[0] * kind.line))
            own = code.times(head, kind.value * self.width)
            self._copy(start, stop, own, code.pointer(keys), code.pointer(values), blocks)
            for rows in code.tiles(start, stop, kind.query_tiles):
                queries = code.addresses(build.add(call.query, own), call.input_bytes, rows)
                places = [number(row) for row in range(len(rows))]
                of_scores = code.addresses(scores, code.times(blocks, kind.line), places)
                of_weights = code.addresses(weights, code.times(blocks, kind.short_line), places)
                self._scores(queries, code.pointer(keys), length, blocks, scale, of_scores)
                for scored, weighed in zip(of_scores, of_weights, strict=True):
                    self._softmax(scored, weighed, blocks)
                outputs = code.addresses(build.add(call.output, own), call.output_bytes, rows)
                tile = kind.sums // WIDE
                for some in (slice(at, at + tile) for at in range(0, len(rows), tile)):
                    self._outputs(of_weights[some], code.pointer(values), blocks, of_scores[some], outputs[some])

    def _copy(
        self, start: ir.Value, stop: ir.Value, own: ir.Value, keys: ir.Value, values: ir.Value, blocks: ir.Value
    ) -> None:
        """Keys and values of a text, in the order in which `Code.products` reads matrices. Behind the text they are
        those of its last token."""
        code, call, kind, build = self.code, self.call, self.kind, self.code.build
        for rows in code.tiles(start, stop, (kind.lanes,)):
            block = build.sdiv(build.sub(rows[0], start), number(kind.lanes))
            key_rows, value_rows = (
                code.addresses(build.add(each, own), call.input_bytes, rows) for each in (call.key, call.value)
            )
            to = code.moved(keys, block, self.matrix)
            for part in range(self.width // (kind.lanes * kind.depth)):
                words = [
                    code.load(code.moved(row, number(part), kind.line), kind.words, kind.value) for row in key_rows
                ]
                for at, word in enumerate(_transposed(build, words)):
                    code.store(word, code.moved(to, number(part * kind.lanes + at), kind.line), kind.line)
            for part in range(self.width // (WIDE * kind.lanes)):
                before = build.add(code.times(blocks, part * self.block_words), code.times(block, self.block_words))
                columns = [code.moved(row, number(part), WIDE * kind.short_line) for row in value_rows]
                for word in range(self.block_words):
                    together = columns[word * kind.depth : (word + 1) * kind.depth]
                    row = code.moved(values, build.add(before, number(word)), WIDE * kind.line)
                    for at, register in enumerate(kind.interwoven(code, together)):
                        code.store(register, code.moved(row, number(at), kind.line), kind.line)

    def _scores(
        self,
        queries: list[ir.Value],
        keys: ir.Value,
        length: ir.Value,
        blocks: ir.Value,
        scale: ir.Value,
        to: list[ir.Value],
    ) -> None:
        """Logarithms to base 2 of the weights, up to a factor; float32 [queries, blocks x lanes]."""
        code, kind, build = self.code, self.kind, self.code.build
        lanes = ir.Constant(ir.VectorType(LONG, kind.lanes), list(range(kind.lanes)))
        never = ir.Constant(kind.floats, [NEVER] * kind.lanes)
        words = number(self.width // kind.depth)
        for block in code.loop(number(0), blocks, 1):
            places = build.add(code.everywhere(code.times(block, kind.lanes)), lanes)
            there = build.icmp_signed("<", places, code.everywhere(length))
            products = code.products(queries, code.moved(keys, block, self.matrix), words, width=1)
            for row, (product,) in zip(to, products, strict=True):
                score = build.select(there, build.fmul(product, scale), never)
                code.store(score, code.moved(row, block, kind.line), kind.line)

    def _softmax(self, scores: ir.Value, weights: ir.Value, blocks: ir.Value) -> None:
        """Weights of a query relative to the largest [blocks x lanes]; in place of its first scores 1 / sum."""
        code, kind, build = self.code, self.kind, self.code.build

        def larger(block: ir.Value, values: Sequence[ir.Value]) -> list[ir.Value]:
            score, (most,) = code.load(code.moved(scores, block, kind.line), kind.floats, kind.line), values
            return [build.select(build.fcmp_ordered(">", score, most), score, most)]

        (most,) = code.folded(blocks, [ir.Constant(kind.floats, [NEVER] * kind.lanes)], larger)
        most = code.everywhere(code.call(f"llvm.vector.reduce.fmax.v{kind.lanes}f32", FLOAT, most))

        def weigh(block: ir.Value, values: Sequence[ir.Value]) -> list[ir.Value]:
            score = code.load(code.moved(scores, block, kind.line), kind.floats, kind.line)
            weight = code.power_of_two(build.fsub(score, most))
            code.put(code.moved(weights, block, kind.short_line), [weight])
            return [build.fadd(*values, weight)]

        (total,) = code.folded(blocks, [ir.Constant(kind.floats, None)], weigh)
        name = f"llvm.vector.reduce.fadd.v{kind.lanes}f32"
        sum_ = code.call(name, FLOAT, ir.Constant(FLOAT, -0.0), total, fast=("reassoc",))
        code.store(code.everywhere(build.fdiv(ir.Constant(FLOAT, 1.0), sum_)), scores, kind.line)

    def _outputs(
        self, weights: list[ir.Value], values: ir.Value, blocks: ir.Value, inverse: list[ir.Value], to: list[ir.Value]
    ) -> None:
        code, kind, build = self.code, self.kind, self.code.build
        words = code.times(blocks, self.block_words)
        for part in range(self.width // (WIDE * kind.lanes)):
            of_part = code.moved(values, code.times(words, part), WIDE * kind.line)
            for row, factor, sums in zip(to, inverse, code.products(weights, of_part, words, WIDE), strict=True):
                scaled = [build.fmul(each, code.load(factor, kind.floats, kind.line)) for each in sums]
                code.put(code.moved(row, number(part), WIDE * kind.short_line), scaled)


def _transposed(build: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """As many registers as each has words, rows for columns: halves change places, then halves of halves."""
    rows, lanes = list(rows), len(rows)
    kind = ir.VectorType(WORD, lanes)
    span = lanes // 2
    while span:
        upper = [lane if not lane & span else lanes + lane - span for lane in range(lanes)]
        lower = [lane + span if not lane & span else lanes + lane for lane in range(lanes)]
        for at in range(lanes):
            if not at & span:
                pair = rows[at], rows[at | span]
                rows[at] = build.shuffle_vector(*pair, ir.Constant(kind, upper))
                rows[at | span] = build.shuffle_vector(*pair, ir.Constant(kind, lower))
        span //= 2
    return rows
