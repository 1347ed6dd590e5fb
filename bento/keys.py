"""The keys of the ledger, as the service knows them: read again every second, so that a revoked key soon opens nothing.

They are read in a thread of their own: routes, which wait for models to load, may be late; a revocation may not.
Where the ledger cannot be read the keys known so far stay in force, as the routes do; what expires still expires.
"""

import logging
from datetime import UTC, datetime

from sqlalchemy.exc import SQLAlchemyError

from bento.repeating import Repeating
from ft_resources.api_keys import ApiKey, key_id
from ft_resources.ledger import Ledger

logger = logging.getLogger(__name__)


class KeyRing:
    """Keys by id; any number of threads may look them up while one refreshes.

    Args:
        every: Seconds between two readings by `watcher`.

    Attributes:
        watcher: Reads the keys again and again; started and stopped by the service.
    """

    def __init__(self, ledger: Ledger, every: float = 1.0) -> None:
        self._ledger = ledger
        self._keys: dict[str, ApiKey] | None = None
        self.watcher = Repeating("key-watcher", self.refresh, every)

    @property
    def loaded(self) -> bool:
        return self._keys is not None

    def refresh(self) -> None:
        """Read the keys again."""
        try:
            keys = self._ledger.api_keys()
        except SQLAlchemyError as error:
            logger.warning("API keys cannot be read, the old ones stay in force: %s", type(error).__name__)
            return
        self._keys = {key.id: key for key in keys if key.revoked_at is None}

    def by_id(self, number: str) -> ApiKey | None:
        """The key, while it is valid."""
        key = (self._keys or {}).get(number)
        return key if key is not None and key.valid(datetime.now(UTC)) else None

    def find(self, shown: bytes) -> ApiKey | None:
        """The valid key that a caller shows."""
        number = key_id(shown)
        key = None if number is None else self.by_id(number)
        return key if key is not None and key.fits(shown) else None
