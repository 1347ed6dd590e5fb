"""Stage 1 as Dagster runs it, on tasks of each type that is not classification."""

import json
from pathlib import Path

import dagster as dg
import pytest

from ft_assets.data import assets, checks
from ft_assets.data.assembly import split_rows
from ft_resources.environments import Environment
from ft_resources.lake import Lake
from ft_resources.ledger import Ledger

HEAD = "name: small\nrecipe: chat-lora@1\nsources: [{kind: files, url: rows.jsonl}]\ncleaning: {min_rows: 40}\n"
GENERATION = HEAD + "type: text-generation\nsystem: Answer in one sentence.\n"
EXTRACTION = HEAD + "type: extraction\nfields:\n  number: {type: integer}\n  unit: {type: string, enum: [kg, m]}\n"


@pytest.mark.parametrize("kind", ["generation", "extraction"])
def test_rows_become_splits_and_every_blocking_check_passes(tmp_path: Path, kind: str) -> None:
    environment = Environment.read({"FT_TASKS": str(tmp_path / "tasks")}, home=tmp_path / "home")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "small.yaml").write_text(GENERATION if kind == "generation" else EXTRACTION)
    rows = []
    for n in range(60):
        text = f"item{n} weighs{n} or{n} measures{n} about{n} {n} units{n}"
        unit = "kg" if n % 3 else "m"
        rows.append(
            {"text": text, "label": f"It is {n} {unit}." if kind == "generation" else {"number": n, "unit": unit}}
        )
    (tmp_path / "tasks" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    lake, ledger = Lake(environment.lake), Ledger(environment.ledger)
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions("task", ["small"])
        done = dg.materialize(
            [*dg.load_assets_from_modules([assets]), *dg.load_asset_checks_from_modules([checks])],
            partition_key="small",
            instance=instance,
            resources={"environment": environment, "lake": lake, "ledger": ledger},
        )
    ledger.close()
    verdicts = {(each.asset_key.to_user_string(), each.check_name): each for each in done.get_asset_check_evaluations()}
    assert len(verdicts) == 11
    assert {name for name, each in verdicts.items() if not each.passed} == set()

    sizes = {split: split_rows(lake, lake.require("small", f"{split}_split").digest) for split in assets.SPLITS}
    assert [len(sizes[split]) for split in ("train", "validation", "test")] == [42, 6, 12]
    first = sizes["train"].iloc[0]
    if kind == "generation":
        assert json.loads(first["text"])[0] == {"role": "system", "content": "Answer in one sentence."}
        assert first["label"].startswith("It is ")
    else:
        assert list(json.loads(first["label"])) == ["number", "unit"]
