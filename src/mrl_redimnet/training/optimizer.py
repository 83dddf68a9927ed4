"""What is trained, in which groups of the optimiser, at which learning rates."""

import torch
from torch import nn

from mrl_redimnet.training.recipe import Recipe

# The parameters that each choice of `finetune` leaves trainable, by the beginning of their names in the encoder, or in
# the model around it.
TRAINED_PARTS = {
    "all": ("",),
    "head": ("pooling.", "projection.", "exits.", "classifier."),
    "projection": ("projection.", "classifier."),
    "exits": ("exits.",),
}


TRUNK = ("front_end.", "trunk.")


def freeze(model: nn.Module, recipe: Recipe, step: int, steps: int) -> None:
    """Leaves trainable what the recipe trains at `step` of `steps`; frozen batch norms keep their statistics, too."""
    trunk_waits = step < int(recipe.schedule.trunk_frozen_until * steps)
    for name, parameter in model.named_parameters():
        name = name.removeprefix(f"{model.base_model_prefix}.")
        trained = name.startswith(TRAINED_PARTS[recipe.model.finetune])
        trained = trained and (recipe.exits_learn or not name.startswith("exits."))
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
            own = recipe.optimizer.part_learning_rates.get(part)
            scale = growth * (1.0 if own is None else own / recipe.optimizer.learning_rate)
            decays = parameter.dim() > 1 and not name.endswith("mix.logits")
            decay = recipe.optimizer.part_weight_decays.get(part, recipe.optimizer.weight_decay) if decays else 0.0
            groups.setdefault((scale, decay), []).append(parameter)
    settings = [{"params": p, "lr_scale": scale, "weight_decay": decay} for (scale, decay), p in groups.items()]
    rate, momentum = recipe.optimizer.learning_rate, recipe.optimizer.momentum
    if recipe.optimizer.algorithm == "sgd":
        optimizer = torch.optim.SGD(settings, lr=rate, momentum=momentum, nesterov=momentum > 0)
    else:  # not fused: under float16 that one leaves steps out by itself, and Accelerate could not tell which
        optimizer = torch.optim.AdamW(settings, lr=rate)
    check_optimizer(model, optimizer)
    return optimizer


def learning_rate_growth(recipe: Recipe, processes: int) -> tuple[float, float]:
    """What learning rates are multiplied by for the crops of a step, and what it would be without a limit.

    They grow with the crops (Goyal et al., arXiv 1706.02677) where `reference_batch` says for how many they are
    meant, up to `max_learning_rate_growth`: the rule was found to fail for very large batches.
    """
    reference = recipe.optimizer.reference_batch
    if reference is None:
        return 1.0, 1.0
    wanted = recipe.data.batch_size * recipe.optimizer.gradient_accumulation * processes / reference
    return min(wanted, recipe.optimizer.max_learning_rate_growth), wanted


def part_of(name: str) -> str:
    """Whether a parameter belongs to trunk, head or classifier; an adapter's to the layers it adapts."""
    if name.startswith("classifier."):
        return "classifier"
    return "trunk" if any(f".{inner}." in f".{name}" for inner in ("front_end", "trunk")) else "head"


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
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
