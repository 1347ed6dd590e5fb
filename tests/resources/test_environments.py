import os
from pathlib import Path

import pytest

from ft_resources.base_models import digest_of, resolve
from ft_resources.environments import Environment
from ft_resources.errors import SpecError


def test_home_holds_everything_by_default(tmp_path: Path) -> None:
    environment = Environment.read({}, home=tmp_path)
    assert environment.lake == str(tmp_path / "lake")
    assert environment.ledger == f"sqlite:///{tmp_path}/ledger.db"
    assert environment.dagster_home == tmp_path / "dagster"
    assert environment.task_folders[-1] == tmp_path / "tasks"
    assert (environment.compute, environment.max_adapters, environment.api_keys) == ("local", 64, ())


def test_each_variable_is_heard(tmp_path: Path) -> None:
    environment = Environment.read(
        {
            "FT_HOME": str(tmp_path),
            "FT_LAKE": "s3://bucket/lake",
            "FT_LEDGER": "postgresql+psycopg2://ft@db/ledger",
            "MLFLOW_TRACKING_URI": "http://mlflow:5000",
            "DAGSTER_HOME": "/dagster",
            "FT_TASKS": os.pathsep.join(["/one", "/two", ""]),
            "FT_PACKAGE_CACHE": "/packages",
            "FT_COMPUTE": "kubernetes",
            "FT_IMAGE": "registry/ft:1",
            "FT_NAMESPACE": "ml",
            "FT_DEVICE": "cpu",
            "FT_MAX_ADAPTERS": "8",
            "FT_API_KEYS": "one, two,",
            "FT_ACTOR": "ada",
        }
    )
    assert environment.lake == "s3://bucket/lake"
    assert environment.ledger == "postgresql+psycopg2://ft@db/ledger"
    assert environment.mlflow == "http://mlflow:5000"
    assert environment.dagster_home == Path("/dagster")
    assert environment.task_folders == (Path("/one"), Path("/two"))
    assert environment.packages == Path("/packages")
    assert (environment.compute, environment.image, environment.namespace) == ("kubernetes", "registry/ft:1", "ml")
    assert (environment.device, environment.max_adapters) == ("cpu", 8)
    assert environment.api_keys == ("one", "two")
    assert environment.actor == "ada"


@pytest.mark.parametrize(
    "variables", [{}, {"FT_DEVICE": "cpu", "FT_MAX_ADAPTERS": "8", "FT_IMAGE": "ft:1", "FT_NAMESPACE": "ml"}]
)
def test_a_child_process_reads_the_same_environment(tmp_path: Path, variables: dict[str, str]) -> None:
    environment = Environment.read({"FT_ACTOR": "ada", **variables}, home=tmp_path)
    assert Environment.read(environment.variables()) == environment


def test_api_keys_are_not_handed_on(tmp_path: Path) -> None:
    environment = Environment.read({"FT_API_KEYS": "secret"}, home=tmp_path)
    assert not any("secret" in value for value in environment.variables().values())


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
    [("FT_MAX_ADAPTERS", "many"), ("FT_MAX_ADAPTERS", "0"), ("FT_MAX_ADAPTERS", "-1"), ("FT_COMPUTE", "kubernets")],
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
