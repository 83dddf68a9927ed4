"""A run, and the interface of its parts: what a feature of training does at each point of the loop.

`train_hf.py` calls the hooks of all parts in turn. A feature that a recipe does not ask for is no part of the run, so
the loop has no branch for it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from transformers.utils import ModelOutput

from mrl_redimnet.data.loaders import DrawnCrops, StreamedCrops
from mrl_redimnet.training.checkpoints import Progress
from mrl_redimnet.training.history import History
from mrl_redimnet.training.optimizer import build_optimizer
from mrl_redimnet.training.recipe import Recipe
from mrl_redimnet.training.schedules import Timing
from mrl_redimnet.training.tasks import Task


class Part:
    """A feature of a training run. Each hook does nothing by default."""

    def start(self, run: "Run", step: int, resumed: bool) -> None:
        """Before the optimiser is built: changes the model, registers state with the accelerator for checkpoints.

        step: the step that the run begins or goes on with, with the layers that a checkpoint of it has.
        """

    def phases(self, run: "Run") -> set[int]:
        """The steps before which what is trained changes."""
        return set()

    def begin_phase(self, run: "Run", step: int) -> None:
        """Sets what is trained from `step` on; a new optimiser follows."""

    def go_on(self, run: "Run", step: int) -> None:
        """After the checkpoint of `step` was loaded (0: a new run): forgets what was recorded after it."""

    def before_step(self, run: "Run", step: int) -> None:
        """Before the batches of a step are trained on."""

    def labels(self, run: "Run", labels: torch.Tensor, step: int) -> torch.Tensor:
        """labels [B] on the CPU -> those that the model is given."""
        return labels

    def asks(self, run: "Run") -> dict[str, bool]:
        """What the model's forward pass is asked for besides, by the names of its arguments."""
        return {}

    def loss(self, run: "Run", batch: dict, answer: ModelOutput, options: dict) -> torch.Tensor | float:
        """What is added to the model's own loss. batch: with its waveforms on the device; options: those of the forward
        pass.
        """
        return 0.0

    def numbers(self) -> dict[str, torch.Tensor]:
        """What the record keeps of the last batch's loss, by name: numbers [] on the device, the same names always."""
        return {}

    def after_optimizer(self, run: "Run", step: int, skipped: bool) -> None:
        """After the optimiser's step, with its gradients still there.

        skipped: in float16, the step was left out because gradients overflowed.
        """

    def after_step(self, run: "Run", step: int, answer: ModelOutput, history: History) -> None:
        """After the losses of a step were recorded."""

    def evaluating(self, run: "Run") -> AbstractContextManager:
        """The context in which the model is evaluated, and saved if it is the best."""
        return nullcontext()

    def saving(self, run: "Run") -> AbstractContextManager:
        """The context in which the model is written."""
        return nullcontext()

    def may_be_best(self, run: "Run", step: int) -> bool:
        """Whether the model of a step may be taken for the best."""
        return True

    def evaluated(self, run: "Run", progress: Progress) -> None:
        """After an evaluation, within its context."""


class Trained(Part, ABC):
    """The part that says what is trained: the model or a part of it, or an adapter on it."""

    @abstractmethod
    def save(self, run: "Run", folder: Path) -> None:
        """Writes what is trained as it now is."""


P = TypeVar("P", bound=Part)


@dataclass
class Run:
    """What the parts of a run share.

    model: without wrappers; prepared: the same, as Accelerate trains it. parts: one of them is `Trained`.
    """

    recipe: Recipe
    accelerator: Accelerator
    task: Task
    crops: DrawnCrops | StreamedCrops
    model: torch.nn.Module
    timing: Timing
    parts: list[Part] = field(default_factory=list)
    prepared: torch.nn.Module = field(init=False, repr=False)  # these two exist from the first `begin_phase` on
    optimizer: torch.optim.Optimizer = field(init=False, repr=False)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.timing.steps

    @property
    def output(self) -> Path:
        """The folder of the run."""
        return Path(self.recipe.run.output)

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.output / "checkpoints"

    def part(self, kind: type[P]) -> P | None:
        """The run's part of a kind, None where it has none."""
        return next((part for part in self.parts if isinstance(part, kind)), None)

    def on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A batch's tensor where the model is. A GPU fetches it from pinned memory while the host goes on."""
        device = self.accelerator.device
        return tensor.to(device, non_blocking=device.type == "cuda")

    def batch_on_device(self, batch: dict) -> dict:
        """A batch with its waveforms where the model is; labels and the rest stay."""
        waves = {name: self.on_device(batch[name]) for name in ("input_values", "clean_values") if name in batch}
        return {**batch, **waves}

    def begin_phase(self, step: int) -> None:
        """Sets what is trained from `step` on, with an optimiser of its own."""
        for part in self.parts:
            part.begin_phase(self, step)
        self.accelerator.free_memory()
        optimizer = build_optimizer(self.model, self.recipe, self.accelerator.num_processes)
        self.prepared, self.optimizer = self.accelerator.prepare(self.model, optimizer)

    def phase_ends(self, first_step: int) -> list[int]:
        """The steps at which what is trained changes, from `first_step` on, and the last."""
        ends = {self.steps}.union(*(part.phases(self) for part in self.parts))
        return sorted(end for end in ends if end > 0 and end >= first_step)

    def evaluating(self) -> AbstractContextManager:
        """The context of all parts in which the model is evaluated."""
        return _together(part.evaluating(self) for part in self.parts)

    def save(self, name: str) -> None:
        """Writes what is trained as it now is to `output`/`name`."""
        trained = next(part for part in self.parts if isinstance(part, Trained))
        with _together(part.saving(self) for part in self.parts):
            trained.save(self, self.output / name)


@contextmanager
def _together(contexts: Iterable[AbstractContextManager]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
