import base64
import datetime as dt
import io
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ft_assets import plots
from ft_assets.evaluation.statistics import reliability_bins
from ft_resources.errors import DataError


def pixels(image: bytes) -> np.ndarray:
    from matplotlib.image import imread

    return imread(io.BytesIO(image), format="png")


def test_charts_are_images_that_change_with_their_data():
    bins = reliability_bins([0.6, 0.7, 0.95], [True, False, True])
    days = [dt.date(2024, 5, day) for day in (1, 2, 3)]
    pairs = [
        (plots.loss_curve([1, 2], [2.0, 1.0], [(2, 1.1)]), plots.loss_curve([1, 2], [2.0, 1.5], [(2, 1.1)])),
        (plots.confusion([[3, 1], [0, 2]], ["a", "$x_"]), plots.confusion([[3, 0], [1, 2]], ["a", "$x_"])),
        (plots.reliability(bins), plots.reliability(bins[1:])),
        (
            plots.drift_over_days(days, {"inputs": [0.5, None, 0.003]}, 0.01),
            plots.drift_over_days(days, {"inputs": [0.5, None, 0.3]}, 0.01),
        ),
    ]
    for one, other in pairs:
        assert min(pixels(one).shape[:2]) > 150
        assert one != other


def test_equal_data_gives_equal_bytes_from_several_threads():
    def draw(_: int) -> bytes:
        return plots.confusion([[3, 1], [0, 2]], ["a", "b"])

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(draw, range(6)))) == 1


def test_many_labels_and_long_curves_draw():
    assert pixels(plots.confusion(np.eye(52), [f"a very long label number {at}" for at in range(52)])).size
    assert pixels(plots.loss_curve(range(200), np.linspace(2, 1, 200))).size


def test_days_without_a_verdict_draw():
    assert pixels(plots.drift_over_days([dt.date(2024, 5, 1)], {"inputs": [None], "predictions": [None]}, 0.01)).size


def test_markdown_carries_the_image():
    image = plots.reliability(reliability_bins([0.6], [True]))
    found = re.fullmatch(r"!\[a \(b\)\]?.*\(data:image/png;base64,(.+)\)", plots.markdown(image, "a [b]"))
    assert found and base64.b64decode(found[1]) == image


def test_data_that_does_not_fit_is_refused():
    for call in (
        lambda: plots.loss_curve([1], []),
        lambda: plots.confusion([[1]], ["a", "b"]),
        lambda: plots.drift_over_days([dt.date(2024, 5, 1)], {"inputs": []}, 0.01),
    ):
        with pytest.raises(DataError):
            call()
