"""The only place that reads environment variables: where this process finds its home, lake, ledger and tracker."""

import getpass
import hashlib
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast
from urllib.parse import urlsplit

from ft_resources.errors import SpecError

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPES = REPOSITORY / "deployments" / "recipes"
ADAPTER_MEMORY_MB = 512
REQUEST_TOKENS = 131_072
CREDENTIALS = ("FT_API_KEYS", "FT_JWT_SECRET")
"""Variables that a process which serves has, and that no run it starts needs."""


def source_digest(*names: str) -> str:
    """Digest of source files of this repository, and of all Python files below its folders; 12 hex digits."""
    total = hashlib.sha256()
    for name in names:
        path = REPOSITORY / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            total.update(f"{file.relative_to(REPOSITORY)}\0".encode() + file.read_bytes())
    return total.hexdigest()[:12]


@dataclass(frozen=True)
class Environment:
    """Where everything is. Each field names the variable that sets it and its default."""

    home: Path
    """`FT_HOME`, default `.ft` in the working directory: all state of one machine."""
    lake: str
    """`FT_LAKE`, default `FT_HOME/lake`: folder or fsspec URL of the artefact store."""
    ledger: str
    """`FT_LEDGER`, default SQLite in `FT_HOME/ledger.db`: SQLAlchemy URL."""
    mlflow: str
    """`MLFLOW_TRACKING_URI`, default SQLite in `FT_HOME/mlflow`."""
    mlflow_database: str
    """`MLFLOW_BACKEND_STORE_URI`, default `MLFLOW_TRACKING_URI`: SQLAlchemy URL of MLflow's database, for backups."""
    mlflow_artifacts: str
    """`MLFLOW_ARTIFACTS_DESTINATION`, default `artifacts` beside a SQLite database: where MLflow's artefacts are."""
    dagster_home: Path
    """`DAGSTER_HOME`, default `FT_HOME/dagster`."""
    task_folders: tuple[Path, ...]
    """`FT_TASKS`, path-separated, default `deployments/tasks` and `FT_HOME/tasks`."""
    packages: Path
    """`FT_PACKAGE_CACHE`, default `FT_HOME/packages`: data packages fetched by their client."""
    compute: str
    """`FT_COMPUTE`, `local` (default) or `kubernetes`."""
    image: str
    """`FT_IMAGE`: the image of training pods (kubernetes only)."""
    gpus: int
    """`FT_GPUS`, default 0: GPUs of a training pod (kubernetes only)."""
    namespace: str
    """`FT_NAMESPACE`, default `default` (kubernetes only)."""
    device: str
    """`FT_DEVICE`: `cuda`, `mps` or `cpu`; empty picks the best one there is."""
    generation_engine: str
    """`FT_GENERATION_ENGINE`, `torch` (default) or `vllm`: what writes the texts of a service."""
    processes: int
    """`FT_PROCESSES`, default 1: processes that train one adapter together; each computes its share of a batch."""
    memory_gb: float | None
    """`FT_MEMORY_GB`: memory a training may use; default what there is."""
    prices: Path
    """`FT_PRICES`, default `deployments/prices.yaml`: what an hour of each device costs."""
    adapter_memory_mb: int
    """`FT_ADAPTER_MEMORY_MB`, default 512: memory for the adapters of a service; the least recently used ones go."""
    api_keys: tuple[str, ...]
    """`FT_API_KEYS`, comma-separated: keys that callers from other machines must show."""
    actor: str
    """`FT_ACTOR`, default the login name: who the audit names."""
    notify_urls: tuple[str, ...] = field(repr=False)
    """`FT_NOTIFY_URL`, comma-separated: webhooks of a chat (Slack, Mattermost, Teams) that are told what goes live.
    They are secrets: who knows one may post."""
    service_url: str
    """`FT_SERVICE_URL`: the service that answers for released tasks, such as https://models.example; empty: one of this
    home on this machine, started when it is asked for."""

    @classmethod
    def read(cls, variables: Mapping[str, str] | None = None, *, home: str | Path | None = None) -> "Environment":
        """The environment as `variables` (default: of this process) describe it; `home` overrides `FT_HOME`.

        Relative paths start at the working directory, here and not where a child process happens to stand.

        Raises:
            SpecError: A variable that is a number, a choice, an address or a list of webhooks holds something else.
        """
        get = (os.environ if variables is None else variables).get
        root = Path(home or get("FT_HOME") or ".ft").expanduser().resolve()
        folders = get("FT_TASKS")
        mlflow = get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow' / 'mlflow.db'}"
        return cls(
            home=root,
            lake=_absolute_url(get("FT_LAKE") or str(root / "lake")),
            ledger=get("FT_LEDGER") or f"sqlite:///{root / 'ledger.db'}",
            mlflow=mlflow,
            mlflow_database=get("MLFLOW_BACKEND_STORE_URI") or mlflow,
            mlflow_artifacts=get("MLFLOW_ARTIFACTS_DESTINATION") or "",
            dagster_home=_absolute(get("DAGSTER_HOME") or root / "dagster"),
            task_folders=tuple(_absolute(part) for part in folders.split(os.pathsep) if part)
            if folders
            else (REPOSITORY / "deployments" / "tasks", root / "tasks"),
            packages=_absolute(get("FT_PACKAGE_CACHE") or root / "packages"),
            compute=_choice("FT_COMPUTE", get("FT_COMPUTE") or "local", ("local", "kubernetes")),
            image=get("FT_IMAGE") or "",
            gpus=int(get("FT_GPUS") or 0),
            namespace=get("FT_NAMESPACE") or "default",
            device=get("FT_DEVICE") or "",
            generation_engine=_choice(
                "FT_GENERATION_ENGINE", get("FT_GENERATION_ENGINE") or "torch", ("torch", "vllm")
            ),
            processes=_positive("FT_PROCESSES", get("FT_PROCESSES") or "1"),
            memory_gb=_amount("FT_MEMORY_GB", get("FT_MEMORY_GB")),
            prices=_absolute(get("FT_PRICES") or REPOSITORY / "deployments" / "prices.yaml"),
            adapter_memory_mb=_positive("FT_ADAPTER_MEMORY_MB", get("FT_ADAPTER_MEMORY_MB") or str(ADAPTER_MEMORY_MB)),
            api_keys=tuple(key.strip() for key in (get("FT_API_KEYS") or "").split(",") if key.strip()),
            actor=get("FT_ACTOR") or _login(),
            notify_urls=_webhooks("FT_NOTIFY_URL", get("FT_NOTIFY_URL") or ""),
            service_url=_address("FT_SERVICE_URL", get("FT_SERVICE_URL") or ""),
        )

    def variables(self) -> dict[str, str]:
        """The variables that give a child process this environment, offline and without telemetry.

        API keys and webhooks are left out: a service, or a run, has them from whoever starts it, a worker needs none.
        """
        chosen = {
            "FT_IMAGE": self.image,
            "FT_NAMESPACE": self.namespace,
            "FT_DEVICE": self.device,
            "FT_GENERATION_ENGINE": self.generation_engine if self.generation_engine != "torch" else "",
            "FT_PROCESSES": str(self.processes) if self.processes > 1 else "",
            "FT_SERVICE_URL": self.service_url,
            "FT_MEMORY_GB": "" if self.memory_gb is None else str(self.memory_gb),
            "FT_ADAPTER_MEMORY_MB": str(self.adapter_memory_mb),
        }
        return {
            "FT_HOME": str(self.home),
            "FT_LAKE": self.lake,
            "FT_LEDGER": self.ledger,
            "MLFLOW_TRACKING_URI": self.mlflow,
            "DAGSTER_HOME": str(self.dagster_home),
            "FT_TASKS": os.pathsep.join(map(str, self.task_folders)),
            "FT_PACKAGE_CACHE": str(self.packages),
            "FT_COMPUTE": self.compute,
            "FT_PRICES": str(self.prices),
            "FT_ACTOR": self.actor,
            "BENTOML_HOME": str(self.home / "bentoml"),
            "BENTOML_DO_NOT_TRACK": "True",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
            "DAGSTER_DISABLE_TELEMETRY": "yes",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TQDM_DISABLE": "1",
            **{name: value for name, value in chosen.items() if value not in ("", str(ADAPTER_MEMORY_MB))},
        }

    def export(self) -> None:
        """Give this process, and the processes it starts, this environment."""
        os.environ.update(self.variables())


@dataclass(frozen=True)
class ServiceSettings:
    """How the prediction service treats its callers. Only the service needs them: they are not handed on."""

    auth: Literal["auto", "always"]
    """`FT_AUTH`, `auto` (default): callers on this machine need no key; `always`: they do."""
    jwt_secret: bytes = field(repr=False)
    """`FT_JWT_SECRET`, 32 bytes or more: signs tokens. Without it the service makes one up (`share_secret`)."""
    jwt_public_key: str
    """`FT_JWT_PUBLIC_KEY`: PEM, or a path to it, of another issuer whose tokens are accepted."""
    jwt_issuer: str
    """`FT_JWT_ISSUER`: the `iss` of that issuer's tokens."""
    cors_origins: tuple[str, ...]
    """`FT_CORS_ORIGINS`, comma-separated, default none: sites whose pages may call."""
    rate_limit: float | None
    """`FT_RATE_LIMIT`, default none: requests per minute of a key that names no rate."""
    request_seconds: float
    """`FT_REQUEST_SECONDS`, default 300: longest time for one request; callers may ask for less with x-timeout-ms."""
    request_tokens: int
    """`FT_REQUEST_TOKENS`, default 131072: most tokens of one request."""
    content_filter: str
    """`FT_CONTENT_FILTER`: `module:function` that looks at inputs and written texts."""
    content_words: str
    """`FT_CONTENT_WORDS`: file of the words that `bento.content_filter:word_list` refuses."""
    drain_seconds: float
    """`FT_DRAIN_SECONDS`, default 2: time between SIGTERM and the end in which new requests get 503."""
    workers: int
    """`FT_WORKERS`, default 1: processes that serve, each with its share of the cores. The weights of base models
    they have in memory once, where they can (`bento.shared_weights`)."""
    log: Literal["text", "json"]
    """`FT_LOG`, `text` (default) or `json`: one JSON object per line, and one line per request."""
    otlp: str
    """`OTEL_EXPORTER_OTLP_ENDPOINT`: base URL of an OTLP receiver (HTTP) for traces; empty: no traces."""

    @classmethod
    def read(cls, variables: Mapping[str, str] | None = None) -> "ServiceSettings":
        """The settings as `variables` (default: of this process) describe them.

        Raises:
            SpecError: A variable holds something it cannot hold.
        """
        get = (os.environ if variables is None else variables).get
        public = get("FT_JWT_PUBLIC_KEY") or ""
        if public and not public.lstrip().startswith("-----BEGIN"):
            try:
                public = _absolute(public).read_text(encoding="ascii")
            except (OSError, UnicodeDecodeError):
                raise SpecError(
                    "FT_JWT_PUBLIC_KEY cannot be read", where="environment", mend="Give PEM, or a path to it."
                ) from None
        if public and not get("FT_JWT_ISSUER"):
            raise SpecError(
                "FT_JWT_PUBLIC_KEY is set without FT_JWT_ISSUER", where="environment", mend="Name whose tokens count."
            )
        secret = (get("FT_JWT_SECRET") or "").encode()
        if secret and len(secret) < 32:
            raise SpecError("FT_JWT_SECRET is shorter than 32 bytes", where="environment", mend="openssl rand -hex 32")
        origins = (get("FT_CORS_ORIGINS") or "").split(",")
        return cls(
            auth=cast(Literal["auto", "always"], _choice("FT_AUTH", get("FT_AUTH") or "auto", ("auto", "always"))),
            jwt_secret=secret,
            jwt_public_key=public,
            jwt_issuer=get("FT_JWT_ISSUER") or "",
            cors_origins=tuple(origin.strip() for origin in origins if origin.strip()),
            rate_limit=_amount("FT_RATE_LIMIT", get("FT_RATE_LIMIT")),
            request_seconds=_amount("FT_REQUEST_SECONDS", get("FT_REQUEST_SECONDS")) or 300.0,
            request_tokens=_positive("FT_REQUEST_TOKENS", get("FT_REQUEST_TOKENS") or str(REQUEST_TOKENS)),
            content_filter=get("FT_CONTENT_FILTER") or "",
            content_words=get("FT_CONTENT_WORDS") or "",
            drain_seconds=_amount("FT_DRAIN_SECONDS", get("FT_DRAIN_SECONDS")) or 2.0,
            workers=_positive("FT_WORKERS", get("FT_WORKERS") or "1"),
            log=cast(Literal["text", "json"], _choice("FT_LOG", get("FT_LOG") or "text", ("text", "json"))),
            otlp=get("OTEL_EXPORTER_OTLP_ENDPOINT") or "",
        )


def share_secret() -> None:
    """Make up FT_JWT_SECRET for this process and those it starts, unless it is set: their tokens fit each other."""
    if not os.environ.get("FT_JWT_SECRET"):
        os.environ["FT_JWT_SECRET"] = secrets.token_hex(32)


def _absolute(path: str | Path) -> Path:
    return Path(path).expanduser().absolute()


def _absolute_url(url: str) -> str:
    return url if "://" in url or "::" in url else str(_absolute(url))


def _positive(name: str, value: str) -> int:
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise SpecError(f"{name} is '{value}'", where="environment", mend="Set it to a whole number of 1 or more.")
    return int(value)


def _amount(name: str, value: str | None) -> float | None:
    if not value:
        return None
    try:
        amount = float(value)
    except ValueError:
        amount = 0.0
    if not 0 < amount < float("inf"):
        raise SpecError(f"{name} is '{value}'", where="environment", mend="Set it to a number above 0, or unset it.")
    return amount


def _webhooks(name: str, value: str) -> tuple[str, ...]:
    """The URLs in a list with commas; an error does not repeat them."""
    urls = tuple(url.strip() for url in value.split(",") if url.strip())
    for place, url in enumerate(urls, start=1):
        if not _is_http_url(url):
            raise SpecError(
                f"{name} holds no webhook" + (f" in place {place}" if len(urls) > 1 else ""),
                where="environment",
                mend="Set it to URLs with https:// or http:// and without user and password, or unset it; a comma "
                "inside a URL is written as %2C.",
            )
    return urls


def _address(name: str, value: str) -> str:
    """A URL without a slash at its end."""
    if value and (not _is_http_url(value) or "?" in value or "#" in value):
        raise SpecError(
            f"{name} is no address", where="environment", mend="Set it to http(s)://HOST:PORT, or unset it."
        )
    return value.rstrip("/")


def _is_http_url(url: str) -> bool:
    """Whether an HTTP client can ask it."""
    try:
        parts = urlsplit(url)
        (parts.hostname or "").encode("idna")
        usable = parts.hostname and parts.username is None and parts.password is None and parts.port != 0
    except ValueError:  # its port is no number, its host no host
        return False
    return bool(usable) and parts.scheme in ("http", "https") and all("!" <= character <= "~" for character in url)


def _login() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in some containers
        return f"uid {os.getuid()}"


def _choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise SpecError(f"{name} is '{value}'", where="environment", mend=f"Set it to {' or '.join(choices)}.")
    return value
