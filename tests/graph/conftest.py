"""One small task on real mail, taken through the whole graph once; tests that change things work on a copy."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
from filelock import FileLock

from ft_assets.platform import Platform
from tests.graph.small_task import TASK, Built, open_home, write_task


@pytest.fixture(scope="session")
def mails(real_mails: pd.DataFrame) -> pd.DataFrame:
    """Real mail of July 2002 and later, both labels, in the order of time."""
    dated = real_mails[(real_mails["event_time"] >= "2002-07-01") & (real_mails["text"].str.len() > 100)]
    usable = dated[~dated["text"].str.contains("\x00", regex=False)]
    return usable.drop_duplicates("row_id").sort_values(["event_time", "row_id"], ignore_index=True)


@pytest.fixture(scope="session")
def training_mails(mails: pd.DataFrame) -> pd.DataFrame:
    """The first 260 mails of each label."""
    return mails.groupby("label").head(260).sort_values(["event_time", "row_id"], ignore_index=True)


@pytest.fixture(scope="session")
def built(common: Path, training_mails: pd.DataFrame) -> Built:
    """A home whose task went from its rows to a live release; made by the process that asks first."""
    home, ended = common / "platform", common / "platform.json"
    with FileLock(common / "platform.lock"):
        if not ended.exists():
            platform = open_home(home)
            platform.add_task(write_task(home / "mine", rows=training_mails))
            outcome = platform.materialise(TASK, because="the first one")
            assert outcome.succeeded, outcome
            shutil.copytree(home, common / "copied", symlinks=True, ignore=shutil.ignore_patterns("dagster"))
            ended.write_text(outcome.run_id)
    return Built(home, common / "copied", ended.read_text())


@pytest.fixture
def copied(built: Built, tmp_path: Path) -> Iterator[Callable[[], Platform]]:
    """Makes a platform on a private copy of the built home."""
    opened: list[Platform] = []

    def copy() -> Platform:
        home = tmp_path / f"copy-{len(opened)}"
        shutil.copytree(built.copy, home, symlinks=True)
        platform = open_home(home)
        platform.instance.add_dynamic_partitions("task", [TASK])
        opened.append(platform)
        return platform

    yield copy
    for platform in opened:
        platform.ledger.close()
        platform.instance.dispose()
