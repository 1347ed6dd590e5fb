"""Sizes of products, rounded up.

oneDNN compiles a kernel for each shape it meets, which takes as long as answering a short text, and keeps only so
many. Texts of ever new lengths should make products of shapes that were there before.
"""


def rounded(count: int, step: int, parts: int) -> int:
    """`count` or a little more: a multiple of `step`, and of a `parts`-th of the next power of two."""
    step = max(step, (1 << (count - 1).bit_length()) // parts)
    return -(-count // step) * step
