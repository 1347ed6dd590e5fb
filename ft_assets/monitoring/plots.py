"""Charts of one drift report: what the champion answered at its evaluation, and what it answers now."""

from collections import Counter

import numpy as np

from ft_assets.monitoring.drift import Answers
from ft_assets.plots import BLUE, ORANGE, new_axes, png, shortened

MOST_LABELS = 15


def label_shares(reference: Answers, window: Answers) -> bytes:
    """PNG of the share of each answered label in reference and window; beyond 15 labels the most changed ones."""
    shares = [
        {label: count / max(len(side), 1) for label, count in Counter(side.labels).items()}
        for side in (reference, window)
    ]
    labels = sorted(set(shares[0]) | set(shares[1]))
    if len(labels) > MOST_LABELS:
        labels = sorted(labels, key=lambda label: -abs(shares[0].get(label, 0) - shares[1].get(label, 0)))[:MOST_LABELS]
    figure, axes = new_axes(6.4, 1.2 + 0.36 * max(len(labels), 1))
    at = np.arange(len(labels))
    for offset, side, colour, name in ((-0.19, 0, BLUE, "reference"), (0.19, 1, ORANGE, "window")):
        values = [100 * shares[side].get(label, 0) for label in labels]
        axes.barh(
            at + offset, values, height=0.36, color=colour, label=f"{name} ({len((reference, window)[side])} rows)"
        )
    axes.set_yticks(at, [shortened(label) for label in labels])
    axes.invert_yaxis()
    axes.set_xlabel("% of answers")
    axes.legend(frameon=False, fontsize=9)
    return png(figure)


def confidence_shift(reference: Answers, window: Answers) -> bytes:
    """PNG of the cumulative share of answers over confidence; the largest gap is the KS distance."""
    figure, axes = new_axes(6.4, 3.0)
    for side, colour, name in ((reference, BLUE, "reference"), (window, ORANGE, "window")):
        if len(side):
            values = np.sort(np.asarray(side.confidence, dtype=np.float64))
            share = np.arange(1, len(values) + 1) / len(values)
            axes.step(values, share, where="post", color=colour, linewidth=1.6, label=f"{name} ({len(side)} rows)")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("confidence")
    axes.set_ylabel("share of answers up to it")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return png(figure)
