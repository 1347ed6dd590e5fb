"""Attention within each text of a pack in bfloat16, as a program for LLVM.

softmax(scale * q k^T) v of a few queries at a time, whose scores stay in the cache (as in FlashAttention,
arXiv:2205.14135): a library's products need the texts gathered, padded and their scores written and read three times.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from llvmlite import ir

from bento.native.writing import (
    FLOAT,
    FLOATS,
    HALF,
    LANES,
    LINE,
    LONG,
    NUMBER,
    SHORT_LINE,
    VALUE,
    WORD,
    WORDS,
    Code,
    function,
    number,
)

TILES = (12, 4)
"""Queries that are computed together."""
COLUMNS = 2
"""Registers of the output that are computed together."""
STEP = 2 * LANES
"""Widths of heads are multiples of it."""
NEVER = -math.inf
"""Score of a place behind the text."""
SHORTS = ir.VectorType(HALF, STEP)
INTERLEAVED = [
    ir.Constant(ir.VectorType(WORD, STEP), [half * LANES + lane // 2 + STEP * (lane % 2) for lane in range(STEP)])
    for half in range(COLUMNS)
]
"""Lanes of two registers of bfloat16, of which one of each makes a pair; by half."""


class Call(NamedTuple):
    """What `attend` gets, eight bytes each."""

    query: int
    """Address of the first token and head of the pack, bfloat16."""
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
    """Address of memory for intermediate results, a multiple of 64."""
    room_bytes: int
    """Of it, for each thread: see `room_bytes`."""


def room_bytes(longest: int, width: int) -> int:
    """Memory that a thread needs for texts of up to `longest` tokens, a multiple of `LINE`."""
    blocks = -(-longest // LANES)
    return blocks * (2 * _matrix(width) + TILES[0] * (LINE + SHORT_LINE))


def program(width: int) -> str:
    """The function `attend` of the address of a `Call`.

    Args:
        width: Of a head.
    """
    module = ir.Module("attention")
    with function(module, "attend", len(Call._fields)) as (code, fields):
        _Attention(code, Call(*fields), width).write()
    return str(module)


def _matrix(width: int) -> int:
    """Bytes of the keys of a block of tokens, or of their values."""
    return LANES * width * VALUE


class _Attention:
    """Writes the function."""

    def __init__(self, code: Code, call: Call, width: int) -> None:
        self.code, self.call, self.width = code, call, width

    def write(self) -> None:
        """Threads divide the heads, and texts where they are fewer."""
        code, call, build = self.code, self.call, self.code.build
        keys = build.add(call.room, build.mul(code.thread(), call.room_bytes))
        scale = build.fptrunc(build.bitcast(call.scale, ir.DoubleType()), FLOAT)
        scale = code.everywhere(build.fmul(scale, ir.Constant(FLOAT, math.log2(math.e))))
        first, after = code.share(build.mul(call.texts, call.heads))
        for task in code.loop(first, after, 1):
            head, text = build.sdiv(task, call.texts), build.srem(task, call.texts)
            start, stop = code.numbers(code.moved(code.pointer(call.bounds), text, 2 * NUMBER), 2)
            length = build.sub(stop, start)
            blocks = build.sdiv(build.add(length, number(LANES - 1)), number(LANES))
            values = build.add(keys, code.times(blocks, _matrix(self.width)))
            scores = build.add(values, code.times(blocks, _matrix(self.width)))
            weights = build.add(scores, code.times(blocks, TILES[0] * LINE))
            own = code.times(head, VALUE * self.width)
            self._copy(start, stop, own, code.pointer(keys), code.pointer(values), blocks)
            for rows in code.tiles(start, stop, TILES):
                queries = code.addresses(build.add(call.query, own), call.input_bytes, rows)
                places = [number(row) for row in range(len(rows))]
                of_scores = code.addresses(scores, code.times(blocks, LINE), places)
                of_weights = code.addresses(weights, code.times(blocks, SHORT_LINE), places)
                self._scores(queries, code.pointer(keys), length, blocks, scale, of_scores)
                for scored, weighed in zip(of_scores, of_weights, strict=True):
                    self._softmax(scored, weighed, blocks)
                outputs = code.addresses(build.add(call.output, own), call.output_bytes, rows)
                self._outputs(of_weights, code.pointer(values), blocks, of_scores, outputs)

    def _copy(
        self, start: ir.Value, stop: ir.Value, own: ir.Value, keys: ir.Value, values: ir.Value, blocks: ir.Value
    ) -> None:
        """Keys and values of a text, in the order in which `Code.products` reads matrices. Behind the text they are
        those of its last token."""
        code, call, build = self.code, self.call, self.code.build
        for rows in code.tiles(start, stop, (LANES,)):
            block = build.sdiv(build.sub(rows[0], start), number(LANES))
            key_rows, value_rows = (
                code.addresses(build.add(each, own), call.input_bytes, rows) for each in (call.key, call.value)
            )
            to = code.moved(keys, block, _matrix(self.width))
            for part in range(self.width // STEP):
                words = [code.load(code.moved(row, number(part), LINE), WORDS, VALUE) for row in key_rows]
                for at, word in enumerate(_transposed(build, words)):
                    code.store(word, code.moved(to, number(part * LANES + at), LINE), LINE)
                pairs = build.add(code.times(blocks, part * LANES // 2), code.times(block, LANES // 2))
                for at in range(0, LANES, 2):
                    first, second = (
                        code.load(code.moved(row, number(part), LINE), SHORTS, VALUE) for row in value_rows[at : at + 2]
                    )
                    pair = code.moved(values, build.add(pairs, number(at // 2)), COLUMNS * LINE)
                    for half in range(COLUMNS):
                        mixed = build.shuffle_vector(first, second, INTERLEAVED[half])
                        code.store(mixed, code.moved(pair, number(half), LINE), LINE)

    def _scores(
        self,
        queries: list[ir.Value],
        keys: ir.Value,
        length: ir.Value,
        blocks: ir.Value,
        scale: ir.Value,
        to: list[ir.Value],
    ) -> None:
        """Logarithms to base 2 of the weights, up to a factor; float32 [queries, blocks x 16]."""
        code, build = self.code, self.code.build
        lanes = ir.Constant(ir.VectorType(LONG, LANES), list(range(LANES)))
        never = ir.Constant(FLOATS, [NEVER] * LANES)
        for block in code.loop(number(0), blocks, 1):
            places = build.add(code.everywhere(code.times(block, LANES)), lanes)
            there = build.icmp_signed("<", places, code.everywhere(length))
            products = code.products(
                queries, code.moved(keys, block, _matrix(self.width)), number(self.width // 2), width=1
            )
            for row, (product,) in zip(to, products, strict=True):
                score = build.select(there, build.fmul(product, scale), never)
                code.store(score, code.moved(row, block, LINE), LINE)

    def _softmax(self, scores: ir.Value, weights: ir.Value, blocks: ir.Value) -> None:
        """Weights of a query relative to the largest, bfloat16 [blocks x 16]; in place of its first scores 1 / sum."""
        code, build = self.code, self.code.build

        def larger(block: ir.Value, values: Sequence[ir.Value]) -> list[ir.Value]:
            score, (most,) = code.load(code.moved(scores, block, LINE), FLOATS, LINE), values
            return [build.select(build.fcmp_ordered(">", score, most), score, most)]

        (most,) = code.folded(blocks, [ir.Constant(FLOATS, [NEVER] * LANES)], larger)
        most = code.everywhere(code.call("llvm.vector.reduce.fmax.v16f32", FLOAT, most))

        def weigh(block: ir.Value, values: Sequence[ir.Value]) -> list[ir.Value]:
            score = code.load(code.moved(scores, block, LINE), FLOATS, LINE)
            weight = code.power_of_two(build.fsub(score, most))
            code.put(code.moved(weights, block, SHORT_LINE), [weight])
            return [build.fadd(*values, weight)]

        (total,) = code.folded(blocks, [ir.Constant(FLOATS, None)], weigh)
        sum_ = code.call("llvm.vector.reduce.fadd.v16f32", FLOAT, ir.Constant(FLOAT, -0.0), total, fast=("reassoc",))
        code.store(code.everywhere(build.fdiv(ir.Constant(FLOAT, 1.0), sum_)), scores, LINE)

    def _outputs(
        self, weights: list[ir.Value], values: ir.Value, blocks: ir.Value, inverse: list[ir.Value], to: list[ir.Value]
    ) -> None:
        code, build = self.code, self.code.build
        pairs = code.times(blocks, LANES // 2)
        for part in range(self.width // STEP):
            of_part = code.moved(values, code.times(pairs, part), COLUMNS * LINE)
            for row, factor, sums in zip(to, inverse, code.products(weights, of_part, pairs, COLUMNS), strict=True):
                scaled = [build.fmul(each, code.load(factor, FLOATS, LINE)) for each in sums]
                code.put(code.moved(row, number(part), LINE), scaled)


def _transposed(build: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """16 registers of 16 words, rows for columns: halves change places, then halves of halves."""
    rows = list(rows)
    for span in (8, 4, 2, 1):
        upper = [lane if not lane & span else LANES + lane - span for lane in range(LANES)]
        lower = [lane + span if not lane & span else LANES + lane for lane in range(LANES)]
        for at in range(LANES):
            if not at & span:
                pair = rows[at], rows[at | span]
                rows[at] = build.shuffle_vector(*pair, ir.Constant(WORDS, upper))
                rows[at | span] = build.shuffle_vector(*pair, ir.Constant(WORDS, lower))
    return rows
