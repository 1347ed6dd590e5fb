"""The training loop. Runs in training workers only: this module imports torch.

The same rows, settings and seed give the same adapter bytes on the same machine, interrupted or not: the seed is set
before model and adapter are created and again before every step, the order of rows is a function of seed and epoch,
kernels are deterministic, and a checkpoint holds weights, optimiser moments and the place in the data.
"""

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from ft_assets.training.engine.averaging import WeightAverage
from ft_assets.training.engine.batching import length_grouped, steps_per_epoch
from ft_assets.training.engine.checkpoints import Checkpoints, Snapshot
from ft_assets.training.engine.choosing import clearly_worse
from ft_assets.training.engine.distributed import World
from ft_assets.training.engine.examples import Example
from ft_assets.training.engine.interruption import ends_politely
from ft_assets.training.engine.learners import Learner
from ft_assets.training.engine.passes import Passes
from ft_assets.training.recipes import Settings, TrainingSettings
from ft_assets.training.relief import Relief
from ft_resources.errors import TrainingError

CACHE_BYTES = 4_000_000_000
"""Most that cached activations may take. No share of the memory there is: it would decide the bytes of an adapter."""


class Interrupted(Exception):
    """The process was asked to end; its state is saved and another one can go on."""


class Pruned(Exception):
    """Whoever watches the epochs wants no more of this run."""


@dataclass(frozen=True)
class Step:
    """One optimiser step, as it is streamed to the tracker."""

    step: int
    steps: int
    epoch: int
    loss: float
    learning_rate: float
    tokens: int
    """Real tokens of this step."""
    tokens_per_second: float
    """Since this process began to train."""
    eta_seconds: float
    """Until the last epoch ends, validations not counted."""


@dataclass
class History:
    """The deterministic part of a run, kept inside the adapter."""

    loss: list[float] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    untrained: dict[str, float] = field(default_factory=dict)
    """The validation before the first step, of a task that the base model can do alone."""
    best_epoch: int = 0
    tokens: int = 0
    """Real tokens trained on, padding not counted."""
    trainable_parameters: int = 0
    total_parameters: int = 0


@dataclass(frozen=True)
class Trained:
    """What a run leaves: the learner holds the weights of the best epoch."""

    history: History
    outputs: np.ndarray
    """float32 [validation rows, outputs] of the best epoch."""
    trace: torch.Tensor
    """int64 [steps, trained tensors]: a checksum of every trained tensor after every step."""
    names: list[str]
    """Names of the trained tensors, in the trace's order."""
    steps_now: int
    """Steps of this process; fewer than the history's when it resumed."""
    device: str
    precision: str


@dataclass
class _Moment:
    """Where a run stands."""

    epoch: int = 1
    batch: int = 0
    step: int = 0
    stale: int = 0
    """Epochs since the best."""
    seconds: float = 0.0
    """Of the epoch under way."""


def seeded(seed: int, device: torch.device) -> None:
    """Set every seed and require deterministic kernels: before the model is created."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    # nothing here reads memory before it is written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class Trainer:
    """Trains what a learner holds on examples, and keeps the best epoch.

    Args:
        checkpoints: Where to save and resume; None for runs too short to be worth it.
        memory: Bytes this process may use; None: no limit. Going over it is an `OutOfMemory`.
        relief: How later steps are computed, where this training ran out of memory before.
        on_epoch: Told of every validation; raises `Pruned` to end the run.
    """

    def __init__(
        self,
        learner: Learner,
        training: Sequence[Example],
        validation: Sequence[Example],
        settings: Settings,
        *,
        checkpoints: Checkpoints | None = None,
        world: World | None = None,
        memory: int | None = None,
        relief: Sequence[Relief] = (),
        on_step: Callable[[Step], None] = lambda step: None,
        on_epoch: Callable[[int, dict[str, float]], None] = lambda epoch, measured: None,
    ) -> None:
        self.learner, self.training, self.validation = learner, training, validation
        shorter = settings.training.first_epoch_tokens
        self._first = training if shorter is None else [one.cut_to(shorter) for one in training]
        self.options: TrainingSettings = settings.training
        self.checkpoints, self.world = checkpoints, world or World()
        self._passes = Passes(learner.body, settings, self.world, memory, relief)
        self.on_step, self.on_epoch = on_step, on_epoch
        self.weights = learner.trained()
        self._head = [weight for name, weight in self.weights.items() if name.startswith("head.")]
        self._others = [weight for name, weight in self.weights.items() if not name.startswith("head.")]
        self.optimizer = torch.optim.AdamW(self._groups(), weight_decay=self.options.weight_decay, fused=True)
        self.steps = self.options.epochs * steps_per_epoch(len(training), self.options.batch_size)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self.at = _Moment()
        network = learner.body.network
        self.history = History(
            trainable_parameters=sum(weight.numel() for weight in self.weights.values()),
            total_parameters=sum(weight.numel() for weight in (*network.parameters(), *self._head)),
        )
        self._tokens_before = 0
        self._trace: list[torch.Tensor] = []
        share = self.options.averaged_share
        self._average = None if share is None else WeightAverage(self.weights, share)
        self._best: tuple[dict[str, torch.Tensor], np.ndarray] | None = None
        self._outputs = np.zeros((0, learner.outputs), dtype=np.float32)
        self._best_errors = np.zeros(0, dtype=np.float32)

    def run(self) -> Trained:
        """Train to the end, or from where an earlier process stopped.

        Raises:
            TrainingError: The loss is not finite.
            OutOfMemory: More memory is needed than there is.
            Interrupted: SIGTERM or SIGINT came; the state is saved.
        """
        self._resume()
        self._passes.begin(self.at.step)
        shortened = [one for one in self._first if one.number < 0]
        self.learner.body.keep_lower([*self.training, *shortened, *self.validation], CACHE_BYTES)
        if self.learner.measures_untrained and not self.history.untrained and len(self.validation):
            self.history.untrained = self.learner.measured(self._outputs_on(self.validation), self.validation)
        began, first, self._tokens_before = time.perf_counter(), self.at.step, self.history.tokens
        with ends_politely() as asked:
            while self.at.epoch <= self.options.epochs and not self._patience_is_over():
                self._epoch(began, first, asked)
        weights, outputs = self._best_weights()
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(weights[name])
        return Trained(
            self.history,
            outputs,
            torch.stack(self._trace),
            list(self.weights),
            steps_now=len(self.history.loss) - first,
            device=self.learner.body.device.type,
            precision=str(self.learner.body.dtype).removeprefix("torch."),
        )

    def _epoch(self, began: float, first: int, asked: Callable[[], bool]) -> None:
        started, saved = time.perf_counter() - self.at.seconds, time.perf_counter()
        self.learner.body.train()
        training = self._first if self.at.epoch == 1 else self.training
        lengths = [len(one.ids) for one in training]
        batches = length_grouped(lengths, self.options.batch_size, self.options.seed + self.at.epoch)
        for batch in batches[self.at.batch :]:
            rows = [training[row] for row in batch]
            self._passes.relieve(self.at.step)
            rate = self._set_rate()
            loss = self._step(rows)
            self.at.step, self.at.batch = self.at.step + 1, self.at.batch + 1
            if self._average is not None:
                self._average.follow(self.at.step)
            self.history.loss.append(loss)
            tokens = sum(len(one.ids) for one in rows)
            self.history.tokens += tokens
            seen = self.history.tokens - self._tokens_before
            self._trace.append(self._checksums())
            now = time.perf_counter()
            self.on_step(
                Step(
                    self.at.step,
                    self.steps,
                    self.at.epoch,
                    loss,
                    rate,
                    tokens,
                    seen / (now - began),
                    (now - began) / (self.at.step - first) * (self.steps - self.at.step),
                )
            )
            if self.at.batch == len(batches):
                break  # what is saved next is the epoch with its validation
            interrupted = self.world.agree(asked())
            if interrupted or now - saved > self.options.checkpoint_minutes * 60:
                self.at.seconds = now - started
                self._save()
                saved = now
            if interrupted:
                raise Interrupted(f"saved at step {self.at.step} of {self.steps}")
        self._end_epoch(time.perf_counter() - started)
        if self.world.agree(asked()):
            raise Interrupted(f"saved at step {self.at.step} of {self.steps}")

    def _end_epoch(self, seconds: float) -> None:
        with nullcontext() if self._average is None else self._average.instead():
            outputs = self._outputs_on(self.validation)
        measured = self.learner.measured(outputs, self.validation) if len(self.validation) else {"loss": 0.0}
        score = self.learner.score(measured) if len(self.validation) else (float(self.at.epoch),)
        errors = self.learner.errors(outputs, self.validation)
        history = self.history
        best = not len(self.validation) or all(score > self.learner.score(one) for one in history.validation)
        kept = best or (self.options.kept_epoch == "last_as_good" and not clearly_worse(errors, self._best_errors))
        history.validation.append(measured)
        if best:
            self._best_errors = errors
        if kept:
            history.best_epoch = self.at.epoch
            learned = self.weights if self._average is None else self._average.tensors
            self._best = {name: weight.detach().clone() for name, weight in learned.items()}, outputs
        self.at.stale = 0 if best else self.at.stale + 1
        self.at.epoch, self.at.batch, self.at.seconds = self.at.epoch + 1, 0, 0.0
        self._outputs = outputs
        self._save(epoch_seconds=seconds, best=kept)
        self.on_epoch(self.at.epoch - 1, measured)

    def _step(self, rows: list[Example]) -> float:
        """One optimiser step on `rows`, computed in parts; returns the loss."""
        divisor = self.learner.weight(rows)
        total = torch.zeros((), dtype=torch.float64)
        # dropout is a function of the step, so that neither an interruption nor another process changes it
        torch.manual_seed(((self.options.seed * 1_000_003 + self.at.step) * 1_009 + self.world.rank) % 2**63)

        def backward(part: list[Example], counts: float) -> None:
            with self.learner.body.states(part) as states:
                loss = self.learner.loss(states, part) * (counts / divisor)
                loss.backward()
            total.add_(loss.detach().double().cpu())

        lacking = self._passes.each(rows, backward)
        for weight in self.weights.values():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        grads = (weight.grad for weight in self.weights.values() if weight.grad is not None)
        self.world.sum([total, lacking, *grads])
        self._passes.end_if_any(lacking)
        value = float(total)
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss became {value} at step {self.at.step + 1} of {self.steps}",
                where="training",
                mend="Lower training.learning_rate or set training.precision to fp32.",
            )
        torch.nn.utils.clip_grad_norm_(self._others, self.options.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value

    @torch.no_grad()
    def _outputs_on(self, examples: Sequence[Example]) -> np.ndarray:
        """float32 [rows, outputs] of `examples`, in their order."""
        self.learner.body.eval()
        outputs = torch.zeros(len(examples), self.learner.outputs)
        place = {one.number: at for at, one in enumerate(examples)}

        def forward(part: list[Example], counts: float) -> None:
            with self.learner.body.states(part) as states:
                if counts:
                    outputs[[place[one.number] for one in part]] = self.learner.output(states, part).float().cpu()

        lacking = self._passes.each(examples, forward)
        self.world.sum([outputs, lacking])
        self._passes.end_if_any(lacking)
        return outputs.numpy()

    def _groups(self) -> list[dict[str, Any]]:
        groups = [{"params": self._others, "lr": self.options.learning_rate}]
        if self._head:
            groups.append({"params": self._head, "lr": self.options.head_learning_rate})
        return groups

    def _set_rate(self) -> float:
        """The rate of the coming step: warm-up, then the schedule's fall. Returns that of the adapter's weights."""
        warmup = max(1, round(self.steps * self.options.warmup_share))
        step, left = self.at.step, max(1, self.steps - warmup)
        fall = {
            "linear": (self.steps - step) / left,
            "cosine": 0.5 * (1 + math.cos(math.pi * min(1.0, max(0, step - warmup) / left))),
            "constant": 1.0,
        }[self.options.schedule]
        factor = min((step + 1) / warmup, max(0.0, fall), 1.0)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        return self._rates[0] * factor

    def _patience_is_over(self) -> bool:
        patience = self.options.early_stopping
        return patience is not None and self.at.stale >= patience

    def _checksums(self) -> torch.Tensor:
        return torch.stack([weight.detach().view(torch.int32).sum() for weight in self.weights.values()]).cpu()

    # -- saving and resuming ------------------------------------------------------------------------------------

    def _save(self, *, epoch_seconds: float | None = None, best: bool = False) -> None:
        if self.checkpoints is None or not self.world.leads:
            return
        state = self.optimizer.state
        tensors = {f"weight/{name}": weight.detach() for name, weight in self.weights.items()}
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors |= {f"{moment}/{name}": state[weight][moment] for name, weight in self.weights.items()}
        if self._average is not None:
            tensors |= {f"average/{name}": value for name, value in self._average.tensors.items()}
        arrays = {"outputs": self._outputs, "best_errors": self._best_errors}
        tensors |= {"trace": torch.stack(self._trace), **{name: torch.from_numpy(one) for name, one in arrays.items()}}
        snapshot = Snapshot({**asdict(self.at), "history": asdict(self.history)}, tensors)
        self.checkpoints.save(snapshot, epoch_seconds=epoch_seconds, best=best)

    @torch.no_grad()
    def _resume(self) -> None:
        snapshot = self.checkpoints.latest() if self.checkpoints else None
        if snapshot is None:
            return
        progress = dict(snapshot.progress)
        self.history = History(**progress.pop("history"))
        self.at = _Moment(**progress)
        tensors = snapshot.tensors
        for name, weight in self.weights.items():
            weight.copy_(tensors[f"weight/{name}"])
            self.optimizer.state[weight] = {
                "step": torch.tensor(float(self.at.step), device=weight.device),
                **{moment: tensors[f"{moment}/{name}"].to(weight.device) for moment in ("exp_avg", "exp_avg_sq")},
            }
            if self._average is not None:
                self._average.tensors[name].copy_(tensors[f"average/{name}"])
        self._trace, self._best_errors = list(tensors["trace"]), tensors["best_errors"].numpy()

    def _best_weights(self) -> tuple[Mapping[str, torch.Tensor], np.ndarray]:
        if self._best is not None:
            return self._best
        assert self.checkpoints is not None  # the best epoch was before this process began
        tensors = self.checkpoints.best().tensors
        kind = "weight" if self._average is None else "average"
        return {name: tensors[f"{kind}/{name}"] for name in self.weights}, tensors["outputs"].numpy()
