"""Which rows make a step, in a seeded order, and the parts a step is computed in."""

import random
from collections.abc import Sequence

MEGABATCHES = 20
PART_TOKENS = {"cpu": 4096, "mps": 16384, "cuda": 32768}
"""Tokens of one forward and backward pass where `training.micro_batch_tokens` says nothing."""


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Optimiser steps in which every one of `rows` rows is seen once; the last may be of fewer rows."""
    return -(-rows // batch_size)


def length_grouped(lengths: Sequence[int], batch_size: int, seed: int) -> list[list[int]]:
    """Row numbers in batches: shuffled, sorted by length within groups of 20 batches, batches shuffled again.

    Padding to the longest row of a batch then wastes little, while the order stays random between epochs
    (length grouping as in transformers' `LengthGroupedSampler`).
    """
    generator = random.Random(seed)
    order = list(range(len(lengths)))
    generator.shuffle(order)
    group = batch_size * MEGABATCHES
    batches = []
    for start in range(0, len(order), group):
        rows = sorted(order[start : start + group], key=lambda row: -lengths[row])
        batches += [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
    generator.shuffle(batches)
    return batches


def parts(lengths: Sequence[int], budget: int, *, padded: bool) -> list[list[int]]:
    """Row numbers, longest first, in groups of at most `budget` tokens; a longer row stands alone.

    Args:
        padded: Count every row of a group as long as its longest.
    """
    groups: list[list[int]] = []
    tokens = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        cost = lengths[groups[-1][0]] if padded and groups and tokens else lengths[row]
        if not groups or tokens + cost > budget:
            groups.append([])
            tokens, cost = 0, lengths[row]
        groups[-1].append(row)
        tokens += cost
    return groups
