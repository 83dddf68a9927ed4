"""What changes over a run, as functions of the step alone: a resumed run needs no state for them."""

import math
from dataclasses import dataclass

from configuration_mrl_redimnet import MRLReDimNetConfig
from mrl_redimnet.streams import Stream
from mrl_redimnet.training.fields import Length
from mrl_redimnet.training.recipe import Recipe


def learning_rate_at(step: int, recipe: Recipe, steps: int) -> float:
    """A linear rise over the warm-up, then a cosine or an exponential down to the final rate at the last step."""
    high, low = recipe.optimizer.learning_rate, recipe.schedule.final_learning_rate
    warmup = recipe.schedule.warmup * steps
    if step < warmup:
        return high * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1.0, steps - 1 - warmup))
    if recipe.schedule.lr_schedule == "exponential":
        return high * (low / high) ** progress
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * progress))


def margin_at(step: int, recipe: Recipe, steps: int, full: float) -> float:
    """0 at first, then rising linearly to `full` (radians): a margin on random embeddings only slows them down."""
    return full * rise(step / steps, recipe.schedule.margin_schedule)


def augmentation_strength(draw: int, crops: int, recipe: Recipe, steps: int) -> float:
    """What augmentations' probabilities are multiplied by at a draw, with `crops` draws in a step."""
    return rise(draw / crops / steps, recipe.augmentation.augmentation_schedule)


def rise(share: float, between: list[float]) -> float:
    """0 before, 1 after, and linear between two shares of a run. (0, 0) is 1 from the beginning."""
    start, end = between
    return 1.0 if share >= end else 0.0 if share <= start else (share - start) / (end - start)


def prefix_weights_at(step: int, recipe: Recipe, steps: int, config: MRLReDimNetConfig) -> list[float] | None:
    """Weights of the prefixes' losses at a step, 0 for those left out; None: the configured ones, always.

    Progressive: a prefix joins at its ratio of the run in `prefix_starts`. Sampled: `prefixes_per_step` of those that
    have joined, drawn anew each step, the longest always among them.
    """
    if not recipe.schedule.prefix_starts and not recipe.loss.prefixes_per_step:
        return None
    weights = list(config.prefix_weights or [1.0] * len(config.matryoshka_dims))
    starts = recipe.schedule.prefix_starts or [0] * len(weights)
    joined = [k for k, start in enumerate(starts) if step >= start * steps]
    if recipe.loss.prefixes_per_step:
        *shorter, longest = joined
        rng = Stream.PREFIXES.generator(recipe.run.seed, step)
        count = min(recipe.loss.prefixes_per_step - 1, len(shorter))
        joined = [*rng.choice(shorter, count, replace=False).tolist(), longest] if count else [longest]
    return [weight if k in joined else 0.0 for k, weight in enumerate(weights)]


@dataclass(frozen=True)
class Timing:
    """What a run decides for itself: how many steps it has, and when things happen in them.

    Lengths that the recipe gives in epochs or as ratios are in steps here. steps: of the whole run. evaluate_every,
    checkpoint_every: may have a fraction, see `due`. averaged: how many of the last evaluations' weights are averaged,
    0 for none. chance_until: the step by which the loss must have left chance level.
    """

    steps: int
    evaluate_every: float
    checkpoint_every: float
    averaged: int
    chance_until: float

    @classmethod
    def of(cls, recipe: Recipe, epoch_steps: float) -> "Timing":
        """Of a recipe, where one pass over the training utterances has `epoch_steps` steps.

        Raises ValueError where the end of the run that is to be averaged has fewer than two evaluations.
        """
        epochs, steps = recipe.schedule.epochs, recipe.schedule.steps
        if epochs is not None:
            steps = max(1, round(epochs * epoch_steps))

        def in_steps(length: int | float | str) -> float:
            return Length.parse(length).in_steps(steps, epoch_steps)

        evaluate_every, averaging = recipe.evaluation.evaluate_every, recipe.optimizer.weight_averaging
        every, averaged = in_steps(evaluate_every), 0
        if averaging:
            averaged = round(min(in_steps(averaging), steps) / every)
            if averaged < 2:
                raise ValueError(
                    f"weight_averaging: {averaging} of this run is {in_steps(averaging):.0f} steps, in which "
                    f"evaluate_every: {evaluate_every} makes {averaged} evaluations; two are needed for a mean."
                )
        chance_until = recipe.schedule.warmup * steps + in_steps(recipe.run.chance_until)
        return cls(steps, every, in_steps(recipe.run.checkpoint_every), averaged, chance_until)


def due(step: int, every: float) -> bool:
    """Whether something that comes `every` so many steps, perhaps with a fraction, comes after step number `step`."""
    return int(step / every) > int((step - 1) / every)
