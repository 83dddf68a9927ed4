"""Adapters as folders hold them, and their tensors in a model."""

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftType
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from mrl_redimnet.adapters.facts import AdapterFacts, adapter_digest
from mrl_redimnet.adapters.placement import encoder_name
from mrl_redimnet.adapters.strategies import explicit_config, nested_weights, truncated
from mrl_redimnet.fingerprints import ADAPTER_PARTS

HEADS = ("classifier", "score")  # what PEFT saves beside every adapter of a sequence classification
# Initialisations that take weights out of the base: such an adapter fits only a base that was changed the same way.
MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Adapter:
    """An adapter as its folder holds it, all names as in the encoder.

    tensors: "projection.segments.0.lora_A.weight" and so on; empty once they are in a model. head: the classifier of an
    embedding. slot: whether `hot_swap` may replace it. digest: of its file of tensors, with the rank it is cut to; ""
    where it is in none.
    """

    config: LoraConfig
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    head: nn.Linear | None = None
    facts: AdapterFacts | None = None
    slot: bool = False
    digest: str = ""

    @property
    def plain(self) -> bool:
        """Whether it is pairs of matrices and nothing else; DoRA and norms of its own are more than that."""
        return not (self.config.use_dora or self.config.modules_to_save or self.config.lora_bias)


def read_adapter(folder: Path, encoder: nn.Module) -> Adapter:
    """An adapter folder that PEFT wrote, over the encoder or a model with a head, as plain LoRA where it is AdaLoRA.

    Raises ValueError for what a bank cannot hold.
    """
    if (folder / "adapter_model.bin").is_file() and not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"{folder} has its weights as pickle only (adapter_model.bin), which may run code when it is read. Ask its "
            "owner for safetensors, or, if you trust it, load it with PEFT and save it anew (save_pretrained)."
        )
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise ValueError(f"{folder} is no adapter: it has no {file}.")
    config, facts = PeftConfig.from_pretrained(folder), AdapterFacts.load(folder)
    try:
        stored = load_file(folder / "adapter_model.safetensors")
    except SafetensorError as error:
        raise ValueError(
            f"{folder}: adapter_model.safetensors is damaged or not whole ({error}). Get or save it again."
        ) from error
    tensors = {encoder_name(key): tensor for key, tensor in stored.items()}
    if config.peft_type not in (PeftType.LORA, PeftType.ADALORA):
        raise ValueError(f"{folder} is a {config.peft_type.value} adapter, expected LORA or ADALORA.")
    if config.bias != "none":
        raise ValueError(f"{folder}: trained with bias={config.bias!r}, which changes the base.")
    if str(config.init_lora_weights).lower().startswith(MUTATING):
        raise ValueError(
            f"{folder}: initialised by {config.init_lora_weights}, which changes the base. Save it as plain LoRA, by "
            "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    config.init_lora_weights = True  # the cheapest: all of it is overwritten
    config.modules_to_save = [encoder_name(m) for m in config.modules_to_save or () if m not in HEADS] or None
    for attribute in ("target_modules", "exclude_modules"):
        names = getattr(config, attribute)
        if not isinstance(names, str | None):
            setattr(config, attribute, {encoder_name(name) for name in names})
    if isinstance(config, AdaLoraConfig):
        try:
            config, tensors = as_plain_lora(config, tensors, encoder)
        except (AttributeError, KeyError) as error:
            raise ValueError(f"{folder} does not fit this model: {error}") from error
    for attribute in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, attribute).items()
        setattr(config, attribute, {re.sub(r"^redimnet\\?\.", "", key): value for key, value in patterns})
    head = _take_head(tensors, encoder.config.embedding_size, facts, folder)
    return Adapter(config, tensors, head, facts, digest=adapter_digest(folder))


def _take_head(
    tensors: dict[str, torch.Tensor], size: int, facts: AdapterFacts | None, folder: Path
) -> nn.Linear | None:
    """The classifier of an attribute, which is taken out of `tensors`; None where there is none.

    size: of the model's embedding. Raises ValueError for a classifier that fits neither it nor the facts' labels.
    """
    names = [f"{HEADS[0]}.weight", f"{HEADS[0]}.bias"]
    if not set(names) <= tensors.keys():
        return None
    weight, bias = map(tensors.pop, names)
    if weight.shape[1] != size or (facts and facts.labels and len(facts.labels) != len(bias)):
        raise ValueError(
            f"{folder}: its classifier {tuple(weight.shape)} fits neither this model nor its own facts: expected "
            f"(labels, {size}){f', labels {facts.labels}' if facts else ''}."
        )
    head = nn.Linear(*weight.T.shape)
    head.load_state_dict({"weight": weight, "bias": bias})
    return head


def as_plain_lora(
    config: AdaLoraConfig, tensors: dict[str, torch.Tensor], encoder: nn.Module
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """AdaLoRA as equal LoRA with a rank per layer: PEFT cannot mix, combine or swap it, or have it beside LoRA."""
    scale, ranks, changed = config.lora_alpha / (config.init_r + 1e-5), {}, dict(tensors)
    for layer in [key.removesuffix(".lora_E") for key in tensors if key.endswith(".lora_E")]:
        down, up, values = (changed.pop(f"{layer}.lora_{part}") for part in "ABE")
        shape = encoder.get_submodule(layer).weight.shape
        if len(values):  # AdaLoRA prunes some layers altogether
            changed[f"{layer}.lora_A.weight"] = (down * values).view(-1, *shape[1:])
            changed[f"{layer}.lora_B.weight"] = (up * scale).view(*up.shape, *[1] * (len(shape) - 2))
            ranks[layer] = len(values)
    if not ranks:
        raise ValueError("The adapter has learnt nothing: AdaLoRA has pruned all of it.")
    return explicit_config(ranks, task_type=config.task_type, modules_to_save=config.modules_to_save), changed


def cut(adapter: Adapter, rank: int) -> Adapter:
    """The adapter with at most `rank` in each layer.

    Of one that was trained for several ranks these are its first components, times what gives them the weight of all;
    of any other, as of one that was cut already, the nearest to it in the Frobenius norm, by SVD.

    Raises ValueError for a rank below 1 or above the adapter's own, and for more than plain LoRA.
    """
    if not adapter.plain:
        raise ValueError("Only plain LoRA can be cut to a rank, no DoRA or norms of its own.")
    ranks = {key.removesuffix(".lora_A.weight"): len(down) for key, down in adapter.tensors.items() if "lora_A" in key}
    if not 1 <= rank <= max(ranks.values()):
        raise ValueError(f"rank: got {rank}, the adapter can be cut to 1 to {max(ranks.values())}.")
    nested, tensors = [] if adapter.facts is None else adapter.facts.nested_ranks, {}
    for layer, own in ranks.items():
        down, up = (adapter.tensors[f"{layer}.lora_{part}.weight"] for part in "AB")
        shapes, up = (down.shape[1:], up.shape[2:]), up * scaling(adapter.config, layer, own)
        if own <= rank:
            pass
        elif nested:
            weights = nested_weights(nested, own)
            down, up = down[:rank], up[:, :rank] * float(weights.sum() / weights[:rank].sum())
        elif len(down) != up.shape[1]:
            raise ValueError(f"{layer}: a convolution in groups cannot be cut to a rank.")
        else:
            down, up, _ = truncated(down.flatten(1), up.flatten(1), rank)
        tensors[f"{layer}.lora_A.weight"] = down.reshape(-1, *shapes[0]).contiguous()
        tensors[f"{layer}.lora_B.weight"] = up.reshape(*up.shape[:2], *shapes[1]).contiguous()
    config = explicit_config({layer: min(rank, own) for layer, own in ranks.items()}, adapter.config.task_type)
    facts = adapter.facts
    if facts is not None:
        facts = replace(facts, nested_ranks=[])  # its components are weighed for the ranks of the whole adapter
    return replace(adapter, config=config, tensors=tensors, facts=facts, digest=f"{adapter.digest}:rank{rank}")


def adapter_tensors(encoder: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The tensors of one adapter in the model, not copies, by their names in an adapter's file.

    By whole parts of names: PEFT's own functions search for the adapter's name in them, and "proj" is in "projection".
    """
    found = {}
    for key, tensor in encoder.state_dict().items():
        parts = key.split(".")
        for i, (kind, owner) in enumerate(zip(parts, parts[1:], strict=False)):
            if kind in ADAPTER_PARTS and owner == name:
                kept = parts[:i] if kind == "modules_to_save" else parts[: i + 1]
                rest = [] if kind == "lora_magnitude_vector" else parts[i + 2 :]
                found[".".join(kept + rest)] = tensor
    return found


def fill(room: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    """Copies `tensors` into those of the model; ValueError unless both have the same names and shapes."""
    problems = [f"{key} has no place in the model" for key in tensors.keys() - room.keys()]
    problems += [f"{key} is not in the file" for key in room.keys() - tensors.keys()]
    problems += [
        f"{key} is {tuple(tensor.shape)} in the file, {tuple(room[key].shape)} in the model"
        for key, tensor in tensors.items()
        if key in room and room[key].shape != tensor.shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:3])
        raise ValueError(f"The adapter does not fit this model, {len(problems)} tensors differ: {shown} ...")
    for key, tensor in tensors.items():
        room[key].copy_(tensor)


def fitted(adapter: Adapter, room: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter in the shapes of `room`: zeros where it has less, and its scaling in B, as the room's own is 1."""
    if not adapter.plain:
        raise ValueError("Only plain LoRA can be swapped in, no DoRA or norms of its own: use add.")
    layers = {key: key.rsplit(".lora_", 1)[0] for key in room.keys() | adapter.tensors.keys()}
    wanted = {key for key in room if check_target_module_exists(adapter.config, layers[key])}
    if wanted != adapter.tensors.keys():
        outside, absent = (adapter.tensors.keys() - room.keys()), sorted(wanted - adapter.tensors.keys())
        what = f"outside the room: {sorted({layers[key] for key in outside})[:3]}; not in its file: {absent[:3]}"
        raise ValueError(f"The adapter does not fit what prepare_hot_swap made room for ({what}).")
    filling = {key: torch.zeros_like(tensor) for key, tensor in room.items()}
    for key, tensor in adapter.tensors.items():
        dim = 0 if ".lora_A." in key else 1
        rank, most = tensor.shape[dim], filling[key].shape[dim]
        if rank > most:
            raise ValueError(f"{layers[key]} has rank {rank}, prepare_hot_swap made room for {most}.")
        space = filling[key].narrow(dim, 0, rank)
        fill({key: space}, {key: tensor if dim == 0 else tensor * scaling(adapter.config, layers[key], rank)})
    return filling


def scaling(config: LoraConfig, layer: str, rank: int) -> float:
    """What PEFT multiplies the B A of a layer with."""
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, layer), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)
