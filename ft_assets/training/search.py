"""A bounded, seeded hyper-parameter search with Optuna's TPE sampler (Bergstra et al., 2011)."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from ft_assets.tasks import SearchSpec
from ft_resources.lake import Artefact

Train = Callable[[Mapping[str, Any], int], tuple[Artefact, float]]


def run_trials(spec: SearchSpec, seed: int, train: Train, log: Callable[[str], None]) -> dict[str, Any]:
    """Trials in the order they ran, the values of the best by validation macro-F1, and the seconds spent.

    Without a search there is one trial with no values and no score: the adapter itself is trained next.
    No trial starts once `max_minutes` are spent.
    """
    if spec.trials == 1:
        return {"trials": [{"trial": 1, "values": {}, "macro_f1": None, "seconds": 0.0}], "best": {}, "seconds": 0.0}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    started, trials = time.monotonic(), []
    for number in range(1, spec.trials + 1):
        if number > 1 and time.monotonic() - started > spec.max_minutes * 60:
            log(f"search stopped after {number - 1} of {spec.trials} trials: {spec.max_minutes} minutes are spent")
            break
        trial = study.ask(_distributions(spec))
        artefact, seconds = train(trial.params, number)
        history = artefact.json("training.json")
        score = history["validation"][history["best_epoch"] - 1]["macro_f1"]
        study.tell(trial, score)
        log(f"trial {number}/{spec.trials}: validation macro-F1 {score:.4f} with {trial.params}")
        trials.append({"trial": number, "values": trial.params, "macro_f1": score, "seconds": seconds})
    return {"trials": trials, "best": study.best_trial.params, "seconds": time.monotonic() - started}


def _distributions(spec: SearchSpec) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    space: dict[str, Any] = {}
    if spec.learning_rate:
        space["training.learning_rate"] = FloatDistribution(*spec.learning_rate, log=True)
    if spec.rank:
        space["lora.rank"] = CategoricalDistribution(spec.rank)
    if spec.epochs:
        space["training.epochs"] = CategoricalDistribution(spec.epochs)
    return space
