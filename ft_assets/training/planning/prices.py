"""What an hour of a device costs, from `deployments/prices.yaml` or the file `FT_PRICES` names, and what a run cost."""

import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from ft_assets.specs import Strict, YamlFile
from ft_resources.environments import REPOSITORY, Environment
from ft_resources.errors import SpecError
from ft_resources.usage import Usage

PRICES = REPOSITORY / "deployments" / "prices.yaml"
CPU = "cpu"


class DevicePrice(Strict):
    """One device in the file."""

    amount: float = Field(ge=0, allow_inf_nan=False, description="Price of an hour: of one core, or of a GPU.")
    spot: bool = Field(False, description="The price of capacity that may be taken away at any time.")


class PriceList(Strict):
    """The file."""

    currency: str = Field(min_length=1, description="Of every amount, such as USD.")
    devices: dict[str, DevicePrice] = Field(min_length=1, description="Price by device: cpu, or words of a GPU's name.")


@dataclass(frozen=True)
class Price:
    """Price of an hour: of one core's time for `cpu`, of the device with the machine around it for a GPU."""

    amount: float
    currency: str
    spot: bool


def hourly_price(kind: str, file: Path = PRICES) -> Price:
    """The price of an hour of `kind`: `cpu`, or a GPU's name as its driver gives it.

    A GPU has the price of the entry with the most words that are all in its name, whatever their case.

    Raises:
        SpecError: The file is missing or not valid, or has no price for this device.
    """
    listed = YamlFile(file).parse(PriceList)
    price = _find(listed, kind)
    if price is None:
        raise SpecError(
            f"there is no price for '{kind}'",
            where=str(file),
            mend=f"Add it below devices, in {listed.currency} an hour. Known: {', '.join(listed.devices)}.",
        )
    return price


def cost(usage: Usage, environment: Environment, gpu: str = "") -> float | None:
    """What `usage` cost, in the currency of `environment.prices`; None where that has no price for the GPU.

    Args:
        gpu: Name of the GPU that was held, as its driver gives it. Its price covers the machine around it, so that
            cores are paid for only where no GPU was held.

    Raises:
        SpecError: The file is missing or not valid.
    """
    listed = YamlFile(environment.prices).parse(PriceList)
    price = _find(listed, gpu if usage.gpu_seconds else CPU)
    return None if price is None else (usage.gpu_seconds or usage.cpu_seconds) / 3600 * price.amount


def _find(listed: PriceList, kind: str) -> Price | None:
    words = _words(kind)
    fitting = [name for name in listed.devices if _words(name) and _words(name) <= words]
    if not fitting:
        return None
    found = listed.devices[max(fitting, key=lambda name: len(_words(name)))]
    return Price(found.amount, listed.currency, found.spot)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower()))
