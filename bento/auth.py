"""Who may ask: anyone on this machine; from other machines only with one of the configured keys."""

import hmac
import ipaddress
from collections.abc import Mapping, Sequence

from ft_resources.errors import RequestError

FORWARDING = (b"x-forwarded-for", b"x-real-ip", b"forwarded")
"""Headers that a proxy adds. They are never believed; a request with one is not from this machine."""


def authorise(client: str | None, headers: Mapping[bytes, bytes], keys: Sequence[str]) -> None:
    """Let the request through or refuse it.

    Args:
        client: Address of the peer; None where it is not known.
        headers: Names in lower case.
        keys: Accepted keys; with none, nobody from another machine is let in.

    Raises:
        RequestError: `unauthorized`.
    """
    if is_local(client, headers):
        return
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    shown = key.strip()
    # every key is compared, so that the time taken does not tell which one nearly matched
    accepted = [hmac.compare_digest(shown, known.encode()) for known in keys]
    if scheme.lower() == b"bearer" and any(accepted):
        return
    raise RequestError(
        "unauthorized",
        "callers from other machines need a key",
        status=401,
        mend="Send 'Authorization: Bearer KEY' with a key of FT_API_KEYS."
        if keys
        else "The operator has configured no keys (FT_API_KEYS).",
    )


def is_local(client: str | None, headers: Mapping[bytes, bytes]) -> bool:
    """Whether the request certainly comes from this machine."""
    if client is None or any(name in headers for name in FORWARDING):
        return False
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
