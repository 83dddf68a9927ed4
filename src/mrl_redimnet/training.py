"""Parts of the training loop in `train_hf.py`: schedules, guards and checkpoints."""

import json
import math
import os
import re
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from modeling_mrl_redimnet import MatryoshkaMarginClassifier
from mrl_redimnet.recipe import Recipe
from mrl_redimnet.settings import Length

# ----------------------------------------------------------------------------------------------------------------------
# Schedules: functions of the step alone, so that a resumed run needs no state for them.


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """A linear rise over the warm-up, then a cosine or an exponential down to the final rate at the last step."""
    warmup, high, low = recipe.warmup * recipe.steps, recipe.learning_rate, recipe.final_learning_rate
    if step < warmup:
        return high * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1.0, recipe.steps - 1 - warmup))
    if recipe.schedule == "exponential":
        return high * (low / high) ** progress
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * progress))


def margin_at(step: int, recipe: Recipe, full: float) -> float:
    """0 at first, then rising linearly to `full` (radians): a margin on random embeddings only slows them down."""
    return full * rise(step / recipe.steps, recipe.margin_rise)


def augmentation_strength(draw: int, crops: int, recipe: Recipe) -> float:
    """What augmentations' probabilities are multiplied by at a draw, with `crops` draws in a step."""
    return rise(draw / crops / recipe.steps, recipe.augmentation_rise)


def rise(share: float, between: list[float]) -> float:
    """0 before, 1 after, and linear between two shares of a run. (0, 0) is 1 from the beginning."""
    start, end = between
    return 1.0 if share >= end else 0.0 if share <= start else (share - start) / (end - start)


def prefix_weights_at(step: int, recipe: Recipe, config) -> list[float] | None:
    """Weights of the prefixes' losses at a step, 0 for those left out; None: the configured ones, always.

    Progressive: a prefix joins at its share of `prefixes_from`. Sampled: `prefixes_per_step` of those that have joined,
    drawn anew each step, the longest always among them.
    """
    if not recipe.prefixes_from and not recipe.prefixes_per_step:
        return None
    weights = list(config.prefix_weights or [1.0] * len(config.matryoshka_dims))
    joined = [k for k, share in enumerate(recipe.prefixes_from or [0] * len(weights)) if step >= share * recipe.steps]
    if recipe.prefixes_per_step:
        *shorter, longest = joined
        rng = np.random.default_rng([recipe.seed, 6, step])
        count = min(recipe.prefixes_per_step - 1, len(shorter))
        joined = [*rng.choice(shorter, count, replace=False).tolist(), longest] if count else [longest]
    return [weight if k in joined else 0.0 for k, weight in enumerate(weights)]


@dataclass(frozen=True)
class Timing:
    """When things happen in a run, in steps; what the recipe gives in passes or shares of the run is so here.

    evaluate_every, checkpoint_every: may have a fraction, see `due`. averaged: how many of the last evaluations'
    weights are averaged, 0 for none. chance_until: the step by which the loss must have left chance level.
    """

    evaluate_every: float
    checkpoint_every: float
    averaged: int
    chance_until: float

    @classmethod
    def of(cls, recipe: Recipe, epoch_steps: float) -> "Timing":
        """Of a recipe whose `steps` are those of the run; epoch_steps: of one pass over the training utterances.

        Raises ValueError where the end of the run that is to be averaged has fewer than two evaluations.
        """

        def steps(name: str) -> float:
            return Length.parse(name, getattr(recipe, name)).in_steps(recipe.steps, epoch_steps)

        every, averaged = steps("evaluate_every"), 0
        if recipe.average_last:
            averaged = round(min(steps("average_last"), recipe.steps) / every)
            if averaged < 2:
                raise ValueError(
                    f"average_last: {recipe.average_last} of this run is {steps('average_last'):.0f} steps, in which "
                    f"evaluate_every: {recipe.evaluate_every} makes {averaged} evaluations; two are needed for a mean."
                )
        chance_until = recipe.warmup * recipe.steps + steps("chance_until")
        return cls(every, steps("checkpoint_every"), averaged, chance_until)


def due(step: int, every: float) -> bool:
    """Whether something that comes `every` so many steps, perhaps with a fraction, comes after step number `step`."""
    return int(step / every) > int((step - 1) / every)


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


def build_optimizer(model: nn.Module, recipe: Recipe, processes: int = 1) -> torch.optim.Optimizer:
    """The recipe's optimiser over every trainable tensor of model and classifier; norms, biases and mixing weights do
    not decay.

    Each group's `lr_scale` is what the schedule's learning rate is multiplied by: parts may have their own rate, and
    all rates change with the crops of a step, see `learning_rate_growth`.
    """
    growth, _ = learning_rate_growth(recipe, processes)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = part_of(name)
            own = recipe.learning_rates.get(part)
            scale = growth * (1.0 if own is None else own / recipe.learning_rate)
            decays = parameter.dim() > 1 and not name.endswith("mix.logits")
            decay = recipe.weight_decays.get(part, recipe.weight_decay) if decays else 0.0
            groups.setdefault((scale, decay), []).append(parameter)
    settings = [{"params": p, "lr_scale": scale, "weight_decay": decay} for (scale, decay), p in groups.items()]
    if recipe.optimizer == "sgd":
        nesterov = recipe.momentum > 0
        optimizer = torch.optim.SGD(settings, lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=nesterov)
    else:  # not fused: under float16 that one leaves steps out by itself, and Accelerate could not tell which
        optimizer = torch.optim.AdamW(settings, lr=recipe.learning_rate)
    check_optimizer(model, optimizer)
    return optimizer


def learning_rate_growth(recipe: Recipe, processes: int) -> tuple[float, float]:
    """What learning rates are multiplied by for the crops of a step, and what it would be without a limit.

    They grow with the crops (Goyal et al., arXiv 1706.02677) where `learning_rate_batch` says for how many they are
    meant, up to `max_learning_rate_growth`: the rule was found to fail for very large batches.
    """
    if recipe.learning_rate_batch is None:
        return 1.0, 1.0
    wanted = recipe.batch_size * recipe.accumulation * processes / recipe.learning_rate_batch
    return min(wanted, recipe.max_learning_rate_growth), wanted


def part_of(name: str) -> str:
    """Whether a parameter belongs to trunk, head or classifier; an adapter's to the layers it adapts."""
    if name.startswith("classifier."):
        return "classifier"
    return "trunk" if any(f".{inner}." in name for inner in ("front_end", "trunk")) else "head"


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
def chance_loss(
    classifier: MatryoshkaMarginClassifier, margin: float, crops: int = 64, prefix_weights: list[float] | None = None
) -> tuple[float, float]:
    """The loss of `crops` embeddings that know nothing, mean and standard deviation over random directions and labels.

    For N speakers, prefix d, scale s and margin m AAM's is about ln N + s^2 / (2 d) + s sin m; it is measured here with
    the classifier's own rows, because the second term holds only where N is large. All of a batch point one way, as
    an untrained network's embeddings do.
    """
    generator = torch.Generator().manual_seed(2**31)  # a small seed's directions may be those the rows began with
    device = classifier.weight.device
    speakers, width = classifier.num_speakers, classifier.weight.shape[1]
    losses = []
    for _ in range(64):
        direction = torch.randn(1, width, generator=generator).expand(crops, width)
        labels = torch.randint(speakers, (crops,), generator=generator)
        losses.append(classifier(direction.to(device), labels.to(device), margin, prefix_weights)[0])
    return float(torch.stack(losses).mean()), float(torch.stack(losses).std())


@dataclass
class ChanceGuard:
    """Stops a run whose classifier is not set up right, or does not learn.

    mean, deviation: of the loss at chance level; deadline: the step by which the loss must be below. fresh: whether
    all rows of the classifier are new, none of an earlier model.
    """

    mean: float
    deviation: float
    deadline: float
    fresh: bool = True

    def check_start(self, loss: float) -> str | None:
        """At the first step of a fresh classifier the loss is chance level, within 5 % (or what chance explains).

        With rows of an earlier model it is to be below; where it is not, a sentence says what that may mean.
        """
        if not self.fresh:
            if loss < self.mean:
                return None
            return (
                f"the first loss is {loss:.2f}, a classifier that knows nothing has {self.mean:.2f}, although rows "
                "were taken over: they may be those of other people with the same names. carry_classifier: false "
                "begins without them."
            )
        if not abs(loss - self.mean) <= max(0.05 * self.mean, 4 * self.deviation):  # nor is it NaN
            raise RuntimeError(
                f"The first loss is {loss:.2f}, a fresh classifier's is {self.mean:.2f} +- {self.deviation:.2f}: "
                "labels, scale or normalisation of the loss are not what they should be."
            )

    def check_progress(self, step: int, loss: float, margin_cost: float = 0.0):
        """From the deadline on the loss must have left chance level, which a margin raises."""
        chance = self.mean + margin_cost
        if step >= self.deadline and not loss <= 0.95 * chance:  # nor is it NaN
            raise RuntimeError(
                f"After {step} steps the loss is {loss:.2f}, not below chance level ({chance:.2f}): nothing is "
                "being learnt. Check the labels, the learning rate and the audio (chance_until moves this check)."
            )


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


@dataclass
class Progress:
    """What a run has to know to go on, besides tensors."""

    step: int = 0
    best_score: float = math.inf  # on development speech, lower is better
    best_step: int = -1
    without_better: int = 0  # evaluations since
    ended: bool = False  # before the last step, for want of a better model
    problems: list = field(default_factory=list)  # of this process
    crops: dict | None = None  # where this process's stream is


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
    "chance_until",
    "base_repository",
}


def save_checkpoint(accelerator: Accelerator, folder: Path, progress: Progress, recipe: Recipe, keep: int = 2):
    """Writes `folder`/step-NNNNNNNN whole or not at all: into a temporary folder first, then renamed."""
    temporary, final = folder / f"writing-{progress.step:08d}", folder / f"step-{progress.step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
        (temporary / f"progress-{accelerator.process_index}.json").write_text(json.dumps(asdict(progress)))
        if accelerator.is_main_process:
            settings = {"recipe": asdict(recipe), "processes": accelerator.num_processes}
            (temporary / "settings.json").write_text(json.dumps(settings))
    except Exception:  # a full disk, mostly: what was written of it is in the way
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
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
    stored = json.loads((checkpoints[-1] / "settings.json").read_text())
    now = json.loads(json.dumps(asdict(recipe)))
    before = {**_of_older_runs(recipe, accelerator.num_processes), **stored["recipe"]}
    changed = [
        f"{f.name} (was {before.get(f.name)!r}, is {now[f.name]!r})"
        for f in fields(Recipe)
        if f.name not in FREE_SETTINGS and before.get(f.name) != now[f.name]
    ]
    if changed:
        raise ValueError(f"{checkpoints[-1]} belongs to a run with other settings: {', '.join(changed)}.")
    if stored["processes"] != accelerator.num_processes:
        raise ValueError(
            f"{checkpoints[-1]} was written by {stored['processes']} processes, now there are "
            f"{accelerator.num_processes}: steps would be of other batches. Resume with as many as before."
        )
    accelerator.load_state(str(checkpoints[-1]))
    return Progress(**json.loads((checkpoints[-1] / f"progress-{accelerator.process_index}.json").read_text()))


def _of_older_runs(recipe: Recipe, processes: int) -> dict:
    """Settings that older checkpoints lack, as this run would have to have them to go on as that one did.

    Which speakers are trained on is compared by their names, and classifier rows are the checkpoint's.
    """
    growth, wanted = learning_rate_growth(recipe, processes)
    limit = recipe.max_learning_rate_growth if growth == wanted else None
    same = {name: getattr(recipe, name) for name in ("evaluation_speakers", "carry_classifier")}
    return {"max_learning_rate_growth": limit, **same}


def newest_step(folder: Path) -> int:
    """The step of the newest complete checkpoint below `folder`, 0 when there is none."""
    checkpoints = _checkpoints(folder)
    return int(CHECKPOINT_NAME.fullmatch(checkpoints[-1].name)[1]) if checkpoints else 0


def _checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if CHECKPOINT_NAME.fullmatch(p.name) and p.is_dir())
