"""Parts of the training loop in `train_hf.py`: schedules, guards and checkpoints."""

import json
import math
import os
import re
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from modeling_mrl_redimnet import MatryoshkaMarginClassifier
from mrl_redimnet.recipe import Recipe

# ----------------------------------------------------------------------------------------------------------------------
# Schedules: functions of the step alone, so that a resumed run needs no state for them.


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """A linear rise over the warm-up, then a cosine down to the final rate at the last step."""
    warmup = recipe.warmup * recipe.steps
    if step < warmup:
        return recipe.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1.0, recipe.steps - 1 - warmup)
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return recipe.final_learning_rate + (recipe.learning_rate - recipe.final_learning_rate) * fall


def margin_at(step: int, recipe: Recipe, full: float) -> float:
    """0 at first, then rising linearly to `full` (radians): a margin on random embeddings only slows them down."""
    start, end = (share * recipe.steps for share in recipe.margin_rise)
    return full * min(1.0, max(0.0, (step - start) / max(1.0, end - start)))


# ----------------------------------------------------------------------------------------------------------------------
# Optimiser and guards


# The parameters each setting of `trains` leaves trainable, by the beginning of their names.
TRAINED_PARTS = {
    "all": ("",),
    "head": ("redimnet.pooling.", "redimnet.projection.", "classifier."),
    "projection": ("redimnet.projection.", "classifier."),
}
TRUNK = ("redimnet.front_end.", "redimnet.trunk.")


def freeze(model: nn.Module, recipe: Recipe, step: int):
    """Leaves trainable what the recipe trains at `step`; frozen batch norms keep their statistics, too."""
    trunk_waits = step < int(recipe.trunk_frozen_until * recipe.steps)
    for name, parameter in model.named_parameters():
        trained = name.startswith(TRAINED_PARTS[recipe.trains])
        parameter.requires_grad_(trained and not (trunk_waits and name.startswith(TRUNK)))


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW over every trainable tensor of model and classifier; norms, biases and mixing weights do not decay.

    Each group's `lr_scale` is what the schedule's learning rate is multiplied by: the trunk may have its own rate.
    """
    trunk_scale = 1.0 if recipe.trunk_learning_rate is None else recipe.trunk_learning_rate / recipe.learning_rate
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() > 1 and not name.endswith("mix.logits")
            scale = trunk_scale if name.startswith(TRUNK) and recipe.trains == "all" else 1.0
            groups.setdefault((scale, recipe.weight_decay if decays else 0.0), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": p, "lr_scale": scale, "weight_decay": decay} for (scale, decay), p in groups.items()],
        lr=recipe.learning_rate,
    )
    check_optimizer(model, optimizer)
    return optimizer


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer):
    """Raises ValueError unless every trainable tensor is in exactly one group of the optimiser.

    A classifier left out of it stays random, and the loss at chance level, however long one trains.
    """
    count: dict[int, int] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            count[id(parameter)] = count.get(id(parameter), 0) + 1
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    wrong = [f"{name} ({count.get(key, 0)} groups)" for key, name in trainable.items() if count.get(key, 0) != 1]
    wrong += ["a tensor that is not the model's"] * len(set(count) - set(trainable))
    if wrong:
        raise ValueError(f"Every trainable tensor belongs in one optimiser group; wrong: {', '.join(wrong[:10])}.")


@torch.no_grad()
def chance_loss(classifier: MatryoshkaMarginClassifier, margin: float, crops: int = 64) -> tuple[float, float]:
    """The loss of `crops` embeddings that know nothing, mean and standard deviation over random directions and labels.

    For N speakers, prefix d, scale s and margin m this is about ln N + s^2 / (2 d) + s sin m; it is measured here with
    the classifier's own rows, because the second term holds only where N is large. All of a batch point one way, as
    an untrained network's embeddings do.
    """
    generator = torch.Generator().manual_seed(0)
    speakers, width = classifier.weight.shape
    losses = []
    for _ in range(64):
        direction = torch.randn(1, width, generator=generator).expand(crops, width)
        labels = torch.randint(speakers, (crops,), generator=generator)
        losses.append(
            classifier(direction.to(classifier.weight.device), labels.to(classifier.weight.device), margin)[0]
        )
    return float(torch.stack(losses).mean()), float(torch.stack(losses).std())


@dataclass
class ChanceGuard:
    """Stops a run whose classifier is not set up right, or does not learn."""

    mean: float
    deviation: float
    deadline: int

    def check_start(self, loss: float):
        """At the first step of a fresh classifier the loss is chance level, within 5 % (or what chance explains)."""
        if not abs(loss - self.mean) <= max(0.05 * self.mean, 4 * self.deviation):  # nor is it NaN
            raise RuntimeError(
                f"The first loss is {loss:.2f}, a fresh classifier's is {self.mean:.2f} +- {self.deviation:.2f}: "
                "labels, scale or normalisation of the loss are not what they should be."
            )

    def check_progress(self, step: int, loss: float, margin_cost: float = 0.0):
        """From the deadline on the loss must have left chance level, which a margin raises by scale * sin(margin)."""
        chance = self.mean + margin_cost
        if step >= self.deadline and not loss <= 0.95 * chance:  # nor is it NaN
            raise RuntimeError(
                f"After {step} steps the loss is {loss:.2f}, not below chance level ({chance:.2f}): nothing is "
                "being learnt. Check the labels, the learning rate and the audio (chance_steps moves this check)."
            )


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


@dataclass
class Progress:
    """What a run has to know to go on, besides tensors."""

    step: int = 0
    best_score: float = math.inf  # on development speech, lower is better
    best_step: int = -1
    problems: list = field(default_factory=list)


CHECKPOINT_NAME = re.compile(r"step-(\d{8})")
# Settings that may differ between a run and its continuation: they do not touch what is trained.
FREE_SETTINGS = {
    "output",
    "workers",
    "log_every",
    "evaluate_every",
    "checkpoint_every",
    "tracker",
    "tests",
    "report_dims",
    "resamples",
    "chance_steps",
    "base_repository",
}


def save_checkpoint(accelerator: Accelerator, folder: Path, progress: Progress, recipe: Recipe, keep: int = 2):
    """Writes `folder`/step-NNNNNNNN whole or not at all: into a temporary folder first, then renamed."""
    temporary, final = folder / f"writing-{progress.step:08d}", folder / f"step-{progress.step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (temporary / "progress.json").write_text(json.dumps({"progress": asdict(progress), "recipe": asdict(recipe)}))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        for old in _checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, folder: Path, recipe: Recipe) -> Progress | None:
    """Restores the newest complete checkpoint below `folder`; None when there is none.

    Raises ValueError when it was written under other settings, naming them.
    """
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        return None
    stored = json.loads((checkpoints[-1] / "progress.json").read_text())
    now = json.loads(json.dumps(asdict(recipe)))
    changed = [
        f"{f.name} (was {stored['recipe'].get(f.name)!r}, is {now[f.name]!r})"
        for f in fields(Recipe)
        if f.name not in FREE_SETTINGS and stored["recipe"].get(f.name) != now[f.name]
    ]
    if changed:
        raise ValueError(f"{checkpoints[-1]} belongs to a run with other settings: {', '.join(changed)}.")
    accelerator.load_state(str(checkpoints[-1]))
    return Progress(**stored["progress"])


def newest_step(folder: Path) -> int:
    """The step of the newest complete checkpoint below `folder`, 0 when there is none."""
    checkpoints = _checkpoints(folder)
    return int(CHECKPOINT_NAME.fullmatch(checkpoints[-1].name)[1]) if checkpoints else 0


def _checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if CHECKPOINT_NAME.fullmatch(p.name) and p.is_dir())
