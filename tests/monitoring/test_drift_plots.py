import numpy as np

from ft_assets.monitoring.drift import Reference, Window
from ft_assets.monitoring.plots import confidence_shift, label_shares


def test_charts_show_the_window_beside_the_reference():
    rng = np.random.default_rng(0)
    reference = Reference(rng.normal(size=(90, 3)), ["a", "b", "c"] * 30, rng.uniform(size=90))
    same = Window(reference.embeddings, reference.labels, reference.confidence)
    other = Window(reference.embeddings, ["a"] * 89 + ["z"], reference.confidence / 2)
    for chart in (label_shares, confidence_shift):
        assert chart(reference, same).startswith(b"\x89PNG")
        assert chart(reference, same) != chart(reference, other)


def test_many_labels_and_an_empty_window_draw():
    reference = Reference(np.zeros((40, 1)), [f"label {at}" for at in range(40)], np.full(40, 0.5))
    empty = Window(np.zeros((0, 1)), [], np.zeros(0))
    assert label_shares(reference, empty).startswith(b"\x89PNG")
    assert confidence_shift(reference, empty).startswith(b"\x89PNG")
