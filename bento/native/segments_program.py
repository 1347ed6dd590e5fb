"""The products of the segments of a batch, as a program for LLVM.

Each of many adapters multiplies a few rows with matrices of a few columns. A product of a library for each takes
longer to begin than to compute, and one product for many of them needs their rows padded and moved. Here one call goes
through all segments of a layer, as Punica's SGMV does on a GPU (arXiv:2310.18547), and its threads divide the rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from llvmlite import ir

from bento.native.kinds import WORD_BYTES, Kind
from bento.native.writing import NUMBER, Code, function, number


class Call(NamedTuple):
    """What `low` and `add` get, eight bytes each."""

    input: int
    """Address of the rows that are multiplied."""
    input_bytes: int
    """From one row to the next."""
    output: int
    """Address of the rows that get the products."""
    output_bytes: int
    size: int
    """`low`: words of a row of the input; `add`: registers of columns of the output."""
    bounds: int
    """Address of (first row, row after the last) of each segment, in order: the last one ends where the rows do that
    threads divide."""
    weights: int
    """Address of the `Weights` of the first segment."""
    weights_bytes: int
    """From those of a segment to the next one's."""
    segments: int


class Weights(NamedTuple):
    """The low-rank matrices of an adapter for a layer, eight bytes each.

    Matrices lie as `interleaved` has them and begin where a register of their kind may; each fills registers, for its
    rows fill words and its columns registers.
    """

    a: int
    """Address of A [in, columns] of all layers that read the same input; with the first of these layers."""
    registers: int
    """Of its columns; 0: there is none."""
    b: int
    """Address of B [rank, out]."""
    words: int
    """Of its rank; 0: there is none."""
    first: int
    """Word of a row of the product with A where those of this layer begin."""


def interleaved(matrix: torch.Tensor, kind: Kind, tiles: Mapping[int, Sequence[int]]) -> torch.Tensor:
    """`matrix` in the order in which the functions read it: [values].

    Columns that one tile computes lie together, and the values of a word are neighbours in a column.

    Args:
        matrix: [rows, columns], multiples of the values of a word and of the columns of a register.
        tiles: Those of the function.
    """
    words, parts = matrix.unflatten(0, (-1, kind.depth)), []
    for width in sorted(tiles, reverse=True):
        columns = words.shape[-1] // (width * kind.lanes) * width * kind.lanes
        if columns:
            tile = words[..., :columns].unflatten(-1, (-1, width * kind.lanes))
            parts.append(tile.permute(2, 0, 3, 1).flatten())
            words = words[..., columns:]
    return torch.cat(parts)


def program(kind: Kind) -> str:
    """Two functions, each of the address of a `Call`.

    low: output = input @ A of each segment; columns beyond those of its A are left alone.
    add: output += input @ B of each segment.
    """
    module = ir.Module("segments")
    _write_low(module, kind)
    _write_add(module, kind)
    return str(module)


def _write_low(module: ir.Module, kind: Kind) -> None:
    with function(module, "low", len(Call._fields), kind) as (code, fields):
        call = Call(*fields)
        for start, stop, adapter, _ in _segments(code, call):
            for column, width in code.chunks(adapter.registers, kind.low_tiles):
                weights = code.moved(code.pointer(adapter.a), code.build.mul(column, call.size), kind.line)
                for rows in code.tiles(start, stop, kind.low_tiles[width]):
                    inputs = code.addresses(call.input, call.input_bytes, rows)
                    sums = code.products(inputs, weights, call.size, width)
                    to = code.build.add(call.output, code.times(column, kind.short_line))
                    for output, row in zip(code.addresses(to, call.output_bytes, rows), sums, strict=True):
                        code.put(output, row)


def _write_add(module: ir.Module, kind: Kind) -> None:
    with function(module, "add", len(Call._fields), kind) as (code, fields):
        call = Call(*fields)
        for start, stop, adapter, following in _segments(code, call):
            there = code.build.icmp_signed(">", adapter.words, number(0))
            columns = code.build.select(there, call.size, number(0))
            for column, width in code.chunks(columns, kind.add_tiles):
                weights = code.moved(code.pointer(adapter.b), code.build.mul(column, adapter.words), kind.line)
                # few rows take less time than it takes to bring the next adapter's matrix from memory
                soon = code.moved(code.pointer(following.b), code.build.mul(column, adapter.words), kind.line)
                code.prefetch(soon, code.times(adapter.words, width))
                for rows in code.tiles(start, stop, kind.add_tiles[width]):
                    own = code.build.add(call.input, code.times(adapter.first, WORD_BYTES))
                    inputs = code.addresses(own, call.input_bytes, rows)
                    sums = code.products(inputs, weights, adapter.words, width)
                    to = code.build.add(call.output, code.times(column, kind.short_line))
                    outputs = code.addresses(to, call.output_bytes, rows)
                    before = [code.get(output, width) for output in outputs]  # all of them: some may be the same row
                    for output, old, row in zip(outputs, before, sums, strict=True):
                        code.put(output, list(map(code.build.fadd, old, row)))


def _segments(code: Code, call: Call) -> Iterator[tuple[ir.Value, ir.Value, Weights, Weights]]:
    """The rows of each segment that are this thread's, first and after the last, its weights and the next one's."""
    bounds = code.pointer(call.bounds)
    last = code.build.sub(call.segments, number(1))
    own, after = code.share(code.numbers(code.moved(bounds, last, 2 * NUMBER), 2)[1])
    for segment in code.loop(number(0), call.segments, 1):
        start, stop = code.numbers(code.moved(bounds, segment, 2 * NUMBER), 2)
        both = segment, code.smaller(code.build.add(segment, number(1)), last)
        places = code.addresses(call.weights, call.weights_bytes, both)
        adapter, following = (Weights(*code.numbers(place, len(Weights._fields))) for place in places)
        yield code.chosen(">", start, own), code.smaller(stop, after), adapter, following
