"""The process that serves the API: `ft api`."""

from contextlib import suppress

import uvicorn

from bento.lifecycle import Drain
from bento.logs import use_json
from ft_assets.api.app import create_app
from ft_assets.platform import Platform
from ft_resources.environments import ServiceSettings

CLOSING_SECONDS = 10
"""From Ctrl-C to the end of requests that are still being answered; streams end by themselves."""


def serve(platform: Platform, host: str, port: int) -> None:
    """Serve the API of `platform` until the process is told to end.

    Raises:
        SpecError: A setting of the service holds what it cannot.
    """
    settings = ServiceSettings.read()
    if settings.log == "json":
        use_json()
    drain = Drain(settings.drain_seconds)
    config = uvicorn.Config(
        create_app(platform, settings, drain, lambda: drain.draining or server.should_exit),
        host=host,
        port=port,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # they are never believed
        timeout_graceful_shutdown=CLOSING_SECONDS,
        log_config=None if settings.log == "json" else uvicorn.config.LOGGING_CONFIG,
    )
    server = uvicorn.Server(config)
    with suppress(KeyboardInterrupt):  # which uvicorn raises again once it has ended
        server.run()
