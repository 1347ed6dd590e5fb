"""Prices by device, and what a run cost."""

from pathlib import Path

import pytest

from ft_assets.training.planning.prices import cost, hourly_price
from ft_resources.environments import Environment
from ft_resources.errors import SpecError
from ft_resources.usage import Usage

OWN = """
currency: EUR
devices:
  cpu: {amount: 0.1}
  A100: {amount: 3, spot: true}
  A100 80GB: {amount: 4}
  L4: {amount: 0.5}
"""


@pytest.fixture
def prices(tmp_path: Path) -> Path:
    file = tmp_path / "prices.yaml"
    file.write_text(OWN)
    return file


def usage(cpu: float, gpu: float) -> Usage:
    return Usage(1800.0, cpu, gpu, 1, 0, 0.0, "estimate")


@pytest.mark.parametrize(
    ("name", "amount", "spot"),
    [
        ("cpu", 0.1, False),
        ("NVIDIA A100-SXM4-40GB", 3, True),
        ("NVIDIA A100-SXM4-80GB", 4, False),
        ("nvidia l4", 0.5, False),
    ],
)
def test_the_entry_with_the_most_fitting_words_counts(prices: Path, name: str, amount: float, spot: bool) -> None:
    price = hourly_price(name, prices)
    assert (price.amount, price.currency, price.spot) == (amount, "EUR", spot)


def test_an_unknown_gpu_names_those_with_a_price(prices: Path) -> None:
    with pytest.raises(SpecError, match=r"no price for 'NVIDIA L40S'.*Known: cpu, A100, A100 80GB, L4"):
        hourly_price("NVIDIA L40S", prices)


def test_the_file_that_comes_with_the_platform_prices_common_devices() -> None:
    names = ("Tesla T4", "NVIDIA L40S", "NVIDIA A10G", "NVIDIA H100 80GB HBM3", "NVIDIA H200")
    assert hourly_price("cpu").amount < min(hourly_price(name).amount for name in names)


@pytest.mark.parametrize(
    ("text", "says"),
    [("currency: EUR\ndevices: {cpu: {amount: -1}}", "prices.yaml:2"), ("currency: EUR", "devices")],
)
def test_a_wrong_file_is_refused_where_it_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "prices.yaml").write_text(text)
    with pytest.raises(SpecError, match=says):
        hourly_price("cpu", tmp_path / "prices.yaml")


def test_a_run_costs_its_cores_or_the_gpu_it_held(prices: Path, tmp_path: Path) -> None:
    environment = Environment.read({"FT_PRICES": str(prices)}, home=tmp_path)
    assert cost(usage(7200, 0), environment) == pytest.approx(0.2)
    assert cost(usage(7200, 1800), environment, "NVIDIA A100-SXM4-80GB") == pytest.approx(2.0)
    assert cost(usage(7200, 1800), environment, "NVIDIA H900") is None
