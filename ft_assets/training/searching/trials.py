"""A bounded, seeded hyper-parameter search: Optuna proposes with TPE (Bergstra et al., 2011) and ends lagging trials.

The search sees a training only through the figures of its epochs, so one that was done before can be replayed: the
same task, seed and budget give the same trials, whether a worker died on the way or not.
"""

import difflib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, get_args

import pydantic

from ft_assets.tasks import SEARCH_PATHS, SearchRange, SearchSpec, Task, Type
from ft_assets.training import jobs
from ft_assets.training.recipes import Merged, Plugged, Resolved, Settings, with_values
from ft_resources.environments import Environment
from ft_resources.errors import SpecError, TrainingError
from ft_resources.training_runs import TrainingRun

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

State = Literal["finished", "pruned", "stopped", "failed"]
STARTUP_TRIALS = 3
"""Trials that must have ended before the median prunes one: fewer say little, and budgets are small."""


@dataclass(frozen=True)
class Objective:
    """The validation figure that a search improves."""

    name: str
    maximise: bool

    @classmethod
    def of(cls, kind: Type) -> "Objective":
        return cls("macro_f1", True) if kind == "text-classification" else cls("loss", False)

    @property
    def title(self) -> str:
        """Its name as people write it."""
        return self.name.replace("macro_f1", "macro-F1")

    def order(self, measured: Mapping[str, float]) -> tuple[float, float]:
        """A better validation compares greater; equal scores are told apart by the loss, as the trainer does."""
        value = measured[self.name]
        return (value if self.maximise else -value), -measured["loss"]


@dataclass
class Attempt:
    """A training, done now or replayed, as a search sees it."""

    state: State
    epochs: list[dict[str, Any]]
    """`measured` (figures by name) and `seconds` (since the training began) of every epoch."""
    seconds: float
    """What it took, when it was done."""
    adapter: str | None = None
    """Digest of the adapter; None unless it finished."""
    reused: bool = False
    """Nothing was trained now."""
    why: str = ""
    """Of one that did not finish."""
    kept_epoch: int = 0
    """The epoch whose weights the adapter has, of one that finished; counted from 1."""
    trained_from: str = ""
    """Digest of everything its adapter is, or would be, made from."""
    course: dict[str, Any] = field(default_factory=dict)
    """`run_id` (of MLflow), `dagster_run_id`, `base_digest`, `started` and `ended` (ISO 8601), where they are known."""


Watch = Callable[[int, Mapping[str, float], float], tuple[State, str] | None]
"""Asked after every epoch but the last with its number, figures and the seconds so far: None to go on, else how and
why the training ends."""
Train = Callable[[str, Resolved, Watch], Attempt]
"""Trains settings under a name, such as `trial 3`."""


@dataclass
class Budget:
    """Seconds and money of a search, spent by what it trains, now or before it was interrupted."""

    seconds_allowed: float
    cost_allowed: float | None
    hourly_price: float
    """Of the device: of a GPU, or of all cores that are held."""
    currency: str
    seconds: float = 0.0

    @property
    def cost(self) -> float:
        return self.price_of(self.seconds)

    def price_of(self, seconds: float) -> float:
        """Money for `seconds` of the device."""
        return seconds / 3600 * self.hourly_price

    @contextmanager
    def charging(self) -> Iterator[None]:
        """Charge what is done inside."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - began

    def over(self, further: float = 0.0) -> str:
        """Which bound is passed once `further` seconds are spent too; empty: none."""
        if self.seconds + further > self.seconds_allowed:
            return f"{self.seconds_allowed / 60:g} minutes are spent"
        if self.cost_allowed is not None and self.price_of(self.seconds + further) > self.cost_allowed:
            return f"{self.cost_allowed:g} {self.currency} are spent"
        return ""


@dataclass
class Found:
    """What a search found."""

    trials: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    """Values of the best trial by path."""
    best_trial: int = 0
    ended: str = ""
    """Why there are no more trials."""


def check_space(task: Task, merged: Merged) -> None:
    """Check that the recipe knows what the task's search chooses from, and allows it.

    Raises:
        SpecError: An unknown path, or a value that is not allowed there, with its line; or a search with a plug-in
            trainer.
    """
    if isinstance(merged, Plugged) and (needed(task.spec.search) or task.spec.search.dimensions()):
        raise SpecError(
            f"a search trains adapters, and recipe {merged.template} is trained by a plug-in",
            where=task.file.where(("search",)),
            mend="Leave search out, and override the recipe's settings.",
        )
    known = sorted(merged.origins)
    for path, dimension in task.spec.search.dimensions().items():
        shorts = [short for short, long in SEARCH_PATHS.items() if long == path and short in task.file.values["search"]]
        loc: tuple[int | str, ...] = ("search", shorts[0]) if shorts else ("search", "space", path)
        if path not in known:
            near = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
            raise SpecError(
                f"field 'search.space': a recipe has no value '{path}'",
                where=task.file.where(loc),
                mend=(f"Did you mean '{near[0]}'? " if near else "") + f"Known: {', '.join(known)}.",
            )
        if path == "training.seed":
            raise SpecError(
                "field 'search.space': the seed is no setting to choose by its score",
                where=task.file.where(loc),
                mend="Leave it out: every trial starts from the recipe's training.seed.",
            )
        if isinstance(dimension, SearchRange):
            _check_range(path, dimension, task.file.where(loc))
            values: dict[int | str, Any] = {"low": dimension.low, "high": dimension.high}
        else:
            values = dict(enumerate(dimension))
        for place, value in values.items():
            with_values(merged, {path: value}, task.file.where((*loc, place)))


def _check_range(path: str, dimension: SearchRange, where: str) -> None:
    kinds = _kinds(path)
    if not kinds & {int, float}:
        raise SpecError(
            f"field 'search.space': '{path}' is no number, so it has no range",
            where=where,
            mend="List its choices: [one, another].",
        )
    if float not in kinds and not (isinstance(dimension.low, int) and isinstance(dimension.high, int)):
        raise SpecError(
            f"field 'search.space': '{path}' is a whole number, its range is {dimension.low} to {dimension.high}",
            where=where,
            mend="Write low and high without a decimal point.",
        )


def _kinds(path: str) -> set[type]:
    """The types that a recipe's value may have."""
    *parents, leaf = path.split(".")
    model: type[pydantic.BaseModel] = Settings
    for parent in parents:
        found = model.model_fields[parent].annotation
        assert isinstance(found, type) and issubclass(found, pydantic.BaseModel)
        model = found
    annotation: Any = model.model_fields[leaf].annotation
    return {kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)}


def needed(spec: SearchSpec) -> bool:
    """Whether there is anything to train before the adapter itself."""
    return spec.trials > 1 or spec.learning_curve


def untrained() -> dict[str, Any]:
    """What stands for the result where no search is asked: the recipe's values, which the adapter is trained with."""
    trial = {"trial": 1, "values": {}, "state": "untrained", "score": None, "seconds": 0.0, "cost": 0.0}
    return {
        "objective": None,
        "trials": [trial],
        "best": {},
        "best_trial": 1,
        "seconds": 0.0,
        "cost": 0.0,
        "currency": "",
        "ended": "no search is asked",
        "learning_curve": None,
    }


def job(
    made: Mapping[str, Any], task: Task, resolved: Resolved, environment: Environment, dagster_run: str
) -> dict[str, Any]:
    """What the worker of a search gets.

    Args:
        made: What an adapter of the recipe's own settings is made from.

    Raises:
        SpecError: The search space does not fit the recipe.
    """
    check_space(task, resolved)
    # trials run in one process, whatever trains the adapter of a task without a search
    made = {**made, "environment": {**made["environment"], "processes": "1"}}
    return {
        **jobs.job(made, resolved, environment, dagster_run),
        "run_name": f"search {made['task']}",
        "search": task.spec.search.model_dump(mode="json"),
    }


def run_trials(
    spec: SearchSpec, resolved: Resolved, objective: Objective, train: Train, budget: Budget, log: Callable[[str], None]
) -> Found:
    """Run the trials one after another and name the best.

    Raises:
        TrainingError: No trial finished.
    """
    study = _study(spec, resolved, objective)
    dimensions, found, best = spec.dimensions(), Found(ended=f"all {spec.trials} trials are done"), None
    distributions = {path: _distribution(path, dimension) for path, dimension in dimensions.items()}
    for number in range(1, spec.trials + 1):
        if number > 1 and (over := budget.over()):
            found.ended = f"stopped after {number - 1} of {spec.trials} trials: {over}"
            break
        trial = study.ask(distributions if spec.trials > 1 else {})
        values = {path: _value(dimensions[path], chosen) for path, chosen in sorted(trial.params.items())}
        settings = with_values(resolved, values, f"search trial {number}")
        attempt = train(f"trial {number}", settings, _watch(trial, settings, spec, objective, budget))
        order, measured = _end(study, trial, objective, attempt)
        seconds = (
            0.0 if attempt.reused and values in [earlier["values"] for earlier in found.trials] else attempt.seconds
        )
        budget.seconds += seconds
        found.trials.append(
            {
                "trial": number,
                "values": values,
                "state": attempt.state,
                "score": measured.get(objective.name),
                "measured": measured,
                "epochs": len(attempt.epochs),
                "seconds": seconds,
                "cost": budget.price_of(seconds),
                "adapter": attempt.adapter,
                "reused": attempt.reused,
                "why": attempt.why,
                "trained_from": attempt.trained_from,
                **attempt.course,
            }
        )
        log(_line(found.trials[-1], spec, objective))
        if order is not None and (best is None or order > best):
            best, found.best, found.best_trial = order, values, number
    if best is None:
        raise _nothing_finished(found)
    log(f"search {found.ended}; the best is trial {found.best_trial}")
    return found


def _study(spec: SearchSpec, resolved: Resolved, objective: Objective) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    epochs = spec.dimensions().get(SEARCH_PATHS["epochs"], [resolved.settings.training.epochs])
    most = int(epochs.high if isinstance(epochs, SearchRange) else max(epochs))
    pruner: optuna.pruners.BasePruner = {
        "none": optuna.pruners.NopPruner,
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS),
        "hyperband": lambda: optuna.pruners.HyperbandPruner(min_resource=1, max_resource=most, reduction_factor=3),
    }[spec.pruning]()
    return optuna.create_study(
        study_name="search",  # hyperband draws a trial's bracket from the name, which is random otherwise
        direction="maximize" if objective.maximise else "minimize",
        sampler=optuna.samplers.TPESampler(seed=resolved.settings.training.seed),
        pruner=pruner,
    )


def _distribution(path: str, dimension: SearchRange | Sequence[Any]) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(dimension, SearchRange):
        return CategoricalDistribution(tuple(range(len(dimension))))  # places: a choice may be a list
    if float in _kinds(path):
        return FloatDistribution(dimension.low, dimension.high, log=dimension.log)
    return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)


def _value(dimension: SearchRange | Sequence[Any], chosen: Any) -> Any:
    return chosen if isinstance(dimension, SearchRange) else dimension[chosen]


def _watch(trial: Any, settings: Resolved, spec: SearchSpec, objective: Objective, budget: Budget) -> Watch:
    reported: set[int] = set()

    def watch(epoch: int, measured: Mapping[str, float], seconds: float) -> tuple[State, str] | None:
        if epoch not in reported:  # a replay may turn out to say too little, and the training starts anew
            trial.report(measured[objective.name], epoch)
            reported.add(epoch)
        if spec.pruning != "none" and trial.should_prune():
            return "pruned", f"behind the others after epoch {epoch} of {settings.settings.training.epochs}"
        if over := budget.over(seconds):
            return "stopped", f"{over} after epoch {epoch} of {settings.settings.training.epochs}"
        return None

    return watch


def _end(
    study: Any, trial: Any, objective: Objective, attempt: Attempt
) -> tuple[tuple[float, float] | None, dict[str, float]]:
    """Tell the study how the trial ended; returns how it ranks, if it finished, and the figures of its kept epoch."""
    from optuna.trial import TrialState

    if not attempt.epochs or attempt.state == "failed":
        study.tell(trial, state=TrialState.FAIL)
        return None, {}
    if attempt.state != "finished":
        study.tell(trial, state=TrialState.PRUNED)
        return None, max((epoch["measured"] for epoch in attempt.epochs), key=objective.order)
    measured = attempt.epochs[attempt.kept_epoch - 1]["measured"]
    study.tell(trial, measured[objective.name])
    return objective.order(measured), measured


def _line(trial: Mapping[str, Any], spec: SearchSpec, objective: Objective) -> str:
    score = "no score" if trial["score"] is None else f"validation {objective.title} {trial['score']:.4f}"
    values = ", ".join(f"{path} {_short(value)}" for path, value in trial["values"].items()) or "the recipe's values"
    reused = ", replayed" if trial["reused"] else ""
    why = f" ({trial['why']})" if trial["why"] else ""
    ended = f"trial {trial['trial']}/{spec.trials} {trial['state']}{why}"
    return f"{ended}: {score} in {trial['seconds']:.1f} s{reused}, {values}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _nothing_finished(found: Found) -> TrainingError:
    last = found.trials[-1]
    failed = all(trial["state"] == "failed" for trial in found.trials)
    return TrainingError(
        f"none of {len(found.trials)} trials finished; the last {last['state']}: {last['why']}",
        where="search",
        mend="Correct what the search may choose from." if failed else "Raise search.max_minutes or search.max_cost.",
    )


def report(found: Found, objective: Objective, budget: Budget, curve: Mapping[str, Any] | None) -> dict[str, Any]:
    """`trials.json` of a search."""
    return {
        "objective": {**asdict(objective), "title": objective.title},
        **asdict(found),
        "seconds": budget.seconds,
        "cost": budget.cost,
        "currency": budget.currency,
        "learning_curve": curve,
    }


def training_runs(job: Mapping[str, Any], found: Mapping[str, Any]) -> list[TrainingRun]:
    """The ledger's rows of the trials in `found`, as the worker reports it; one that the budget stopped is `PRUNED`."""
    made, rows = job["made_from"], dict[str, TrainingRun]()
    for trial in found["trials"]:
        if "run_id" not in trial or trial["run_id"] in rows:  # trained outside of a search, or the same values again
            continue
        rows[trial["run_id"]] = TrainingRun(
            run_id=trial["run_id"],
            dagster_run_id=trial["dagster_run_id"],
            task=made["task"],
            status={"finished": "FINISHED", "failed": "FAILED"}.get(trial["state"], "PRUNED"),
            trained_from=trial["trained_from"],
            training_rows_digest=made["train_split"],
            validation_rows_digest=made["validation_split"],
            base=trial["values"].get("base.model", made["settings"]["base"]["model"]),
            base_digest=trial["base_digest"],
            template=job["template"],
            method=trial["values"].get("method", made["settings"]["method"]),
            started=datetime.fromisoformat(trial["started"]),
            ended=datetime.fromisoformat(trial["ended"]),
            adapter=trial["adapter"],
            wall_seconds=trial["seconds"],
            cost=trial["cost"],
            accuracy=trial["measured"].get("accuracy"),
            macro_f1=trial["measured"].get("macro_f1"),
            loss=trial["measured"].get("loss"),
            error=TrainingError.code if trial["state"] == "failed" else None,
        )
    return list(rows.values())
