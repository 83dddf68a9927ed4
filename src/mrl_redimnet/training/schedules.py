"""What changes over a run, as functions of the step alone: a resumed run needs no state for them."""

import math
from dataclasses import dataclass

from mrl_redimnet.settings import Length
from mrl_redimnet.streams import Stream
from mrl_redimnet.training.recipe import Recipe

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
        rng = Stream.PREFIXES.generator(recipe.seed, step)
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
