"""What a training run says while it runs: progress bar, record and its picture, trackers, where the time goes."""

import math
import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers.utils import ModelOutput

from configuration_mrl_redimnet import MRLReDimNetConfig
from mrl_redimnet.evaluation.results import format_table
from mrl_redimnet.training.curves import Record, draw
from mrl_redimnet.training.recipe import Recipe
from mrl_redimnet.training.schedules import learning_rate_at, margin_at
from mrl_redimnet.training.tasks import Task


class History:
    """Losses on the device until a log line is due, and where the time goes; progress bar, record and trackers."""

    def __init__(
        self,
        recipe: Recipe,
        steps: int,
        accelerator: Accelerator,
        task: Task,
        config: MRLReDimNetConfig,
        first_step: int,
    ) -> None:
        self.recipe, self.steps = recipe, steps
        self.accelerator, self.task, self.config = accelerator, task, config
        self.record = Record(recipe.run.output) if accelerator.is_main_process else None
        self.pending: list[torch.Tensor] = []
        self.names: list[str] = []  # of the losses in front of those of the prefixes
        self.means: dict[str, float] = {}  # of the last log line
        self.loss: float | None = None  # the first of them: the model's own, or the teacher's where it has none
        bar = not self.accelerator.is_main_process
        self.bar = tqdm(total=self.steps, initial=first_step, disable=bar, unit="step")
        self._restart_clock()

    def _restart_clock(self):
        self.clock, self.waited, self.made_in, self.crops = time.perf_counter(), 0.0, 0.0, 0

    def timed(self, batches: Iterator[dict]) -> dict:
        """The next batch; how long it was waited for, and how long it took to make."""
        asked = time.perf_counter()
        try:
            batch = next(batches)
        except (OSError, EOFError) as error:  # the socket that its batch was to come by
            raise RuntimeError("A DataLoader worker died; it was killed, for want of memory perhaps.") from error
        self.waited += time.perf_counter() - asked
        self.made_in += batch["made_in"]
        self.crops += len(batch["labels"])
        return batch

    def rates(self) -> dict[str, float]:
        """Crops a second since the last log line, of all processes: altogether, of the loader alone (its workers side
        by side) and of the step alone (without waiting for crops), and the ratio of the two.
        """
        crops, seconds = self.crops * self.accelerator.num_processes, time.perf_counter() - self.clock
        loader = crops / max(1e-9, self.made_in / max(1, self.recipe.data.workers))
        step = crops / max(1e-9, seconds - self.waited)
        rates = {"crops_per_s": crops / seconds, "loader_crops_per_s": loader, "step_crops_per_s": step}
        return {**rates, "loader_to_step": loader / step}

    def add(self, step: int, answer: ModelOutput, numbers: dict[str, torch.Tensor]) -> None:
        """Keeps this step's losses; every `log_every` steps fetches their means, in one device sync.

        numbers: further ones by name, [] on the device, as of `Part.numbers`.
        """
        self.bar.update()
        own = {"loss": answer["loss"].detach()} if answer.get("loss") is not None else {}
        named = {**own, **numbers}
        self.names, prefixes = list(named), answer.get("prefix_losses")
        losses = torch.stack([*named.values()])
        self.pending.append(losses if prefixes is None else torch.cat([losses, prefixes]))
        if (step + 1) % self.recipe.run.log_every:
            return
        self._fetch()
        rates, learning_rate = self.rates(), learning_rate_at(step, self.recipe, self.steps)
        self._restart_clock()
        self.bar.set_postfix_str(
            f"loss {self.loss:.2f}, lr {learning_rate:.1e}, {rates['crops_per_s']:.0f} crops/s, "
            f"loader alone {rates['loader_to_step']:.1f} times the step"
        )
        margin = margin_at(step, self.recipe, self.steps, self.config.margin)
        margins = {"margin": margin} if self.recipe.loss.margin_weight else {}
        values = {**self.means, "learning_rate": learning_rate, **margins, **rates}
        if self.record is not None:
            self.record.add(step + 1, "train", {**values, "prefix_losses": self.prefix_losses})
        self.accelerator.log({**values, **{f"loss/{d}": v for d, v in self.prefix_losses.items()}}, step=step + 1)

    def _fetch(self):
        losses = self.accelerator.reduce(torch.stack(self.pending), "mean")
        own = len(self.names)
        self.means = dict(zip(self.names, losses[:, :own].mean(0).tolist(), strict=True))
        self.loss = self.means[self.names[0]]
        prefixes = losses[:, own:].nanmean(0).tolist()  # those left out of a step are NaN
        self.prefix_losses = dict(zip(map(str, self.config.matryoshka_dims), prefixes, strict=False))
        self.pending = []
        self.check_finite()

    def check_finite(self) -> None:
        """Raises FloatingPointError when a loss since the last log line was no number."""
        own = len(self.names)
        pending = [losses[:own] for losses in self.pending]
        losses = torch.cat(pending).tolist() if pending else []  # one device sync
        if not all(map(math.isfinite, [*self.means.values(), *losses])):
            raise FloatingPointError(
                "The loss is no number. Lower learning_rate or max_gradient_norm, or train with mixed_precision: no; "
                "if it comes back at the same step, look at that batch's audio."
            )

    def report(self, step: int, tables: dict) -> None:
        """Prints tables of development results, logs their scores and draws the curves."""
        scores = {f"score/{title}": self.task.score(rows) for title, rows in tables.items()}
        self.accelerator.log(scores, step=step)
        if self.record is not None:
            self.bar.write(f"step {step}\n{format_table(tables)}")
            for title, rows in tables.items():
                self.record.add(step, "evaluation", {"set": title, **self.task.curve(rows)})
            draw(self.recipe.run.output)
        self._restart_clock()

    def close(self) -> None:
        """Ends the progress bar."""
        self.bar.close()
