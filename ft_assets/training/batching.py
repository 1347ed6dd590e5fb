"""Batches of rows of similar length, in a seeded order."""

import random
from collections.abc import Sequence

MEGABATCHES = 20


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
