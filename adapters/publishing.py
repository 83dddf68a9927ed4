"""Adapters as folders for the Hub: weights, facts and card."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from mrl_redimnet.adapters.facts import AdapterFacts
from mrl_redimnet.adapters.hub import adapter_info
from mrl_redimnet.adapters.placement import encoder_name
from mrl_redimnet.files import replace_folder
from mrl_redimnet.hub_cards import adapter_card, save_card
from mrl_redimnet.hub_cards.results import Evaluation
from mrl_redimnet.saving import save_model

if TYPE_CHECKING:  # training alone has what these take a second to import for
    from mrl_redimnet.adapters.strategies import Vanilla


def save_adapter(strategy: "Vanilla", facts: AdapterFacts, folder: str | Path) -> None:
    """Writes a trained adapter to `folder`: PEFT's two files, our facts and a card."""

    def write(target: Path) -> None:
        strategy.config.base_model_name_or_path, strategy.config.revision = facts.base.repository, facts.base.revision
        strategy.save(target)
        replace(facts, layers=saved_ranks(target), nested_ranks=strategy.nested_ranks).save(target)
        write_adapter_card(target)

    replace_folder(Path(folder), write)


def publish_adapter(
    source: str | Path,
    folder: str | Path,
    training: str = "",
    evaluation: Evaluation | None = None,
    licence: str | None = None,
    datasets: Sequence[str] | None = None,
) -> None:
    """A copy of the adapter in `source`, with how it was trained and what was measured on its card. licence, datasets:
    as of `hub_cards.base_card`.
    """

    def write(target: Path) -> None:
        shutil.copytree(source, target, dirs_exist_ok=True)
        replace(AdapterFacts.load(target), training=training).save(target)
        write_adapter_card(target, evaluation, licence, datasets)

    replace_folder(Path(folder), write)


def saved_ranks(folder: Path) -> dict[str, int]:
    """The rank of every layer of the adapter in `folder`, by its name in the encoder, from the weights themselves."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
        return {
            encoder_name(key.removesuffix(".lora_A.weight")): tensors.get_slice(key).get_shape()[0]
            for key in tensors.keys()
            if key.endswith(".lora_A.weight")
        }


def write_adapter_card(
    folder: Path,
    evaluation: Evaluation | None = None,
    licence: str | None = None,
    datasets: Sequence[str] | None = None,
) -> None:
    """The card of the adapter in `folder`, from what its files say; its name is the base's and the domain."""
    facts = AdapterFacts.load(folder)
    weights = folder / "adapter_model.safetensors"
    with safe_open(weights, "pt") as tensors:
        parameters = sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())
    card = adapter_card(
        facts,
        name=f"{facts.base.repository.split('/')[-1]}-{facts.domain}",
        parameters=parameters,
        file_bytes=weights.stat().st_size,
        evaluation=evaluation,
        licence=licence,
        datasets=datasets,
    )
    save_card(card, folder, evaluation)


def mix_adapters(
    base: str | Path,
    weights: Mapping[str, float],
    folder: str | Path,
    method: str = "svd",
    rank: int | None = None,
    density: float | None = None,
) -> None:
    """Writes several adapters of a base, {path or Hub id: weight}, to `folder` as a new one, with a card.

    method, rank, density: as of `AdapterBank.combine`. Raises as that and `AdapterBank.add` do.
    """
    from mrl_redimnet.adapters.bank import AdapterBank  # PEFT takes a second to import

    bank = AdapterBank.load(base)
    chosen: dict[str, float] = {}
    for source, weight in weights.items():
        facts = adapter_info(source).facts
        name = (facts.domain if facts else "adapter").replace(".", "-")
        name = f"{name} {len(chosen) + 1}" if name in chosen else name
        bank.add(name, source)
        chosen[name] = weight
    bank.combine("mix", chosen, method, rank=rank, density=density)
    bank.save("mix", folder)
    write_adapter_card(Path(folder))


def cut_adapter(base: str | Path, adapter: str | Path, rank: int, folder: str | Path) -> None:
    """Writes an adapter cut to `rank` to `folder`, as `AdapterBank.add` cuts it, with a card where it had facts. base,
    adapter: path or Hub id. Raises as that does.
    """
    from mrl_redimnet.adapters.bank import AdapterBank

    bank = AdapterBank.load(base)
    bank.add("cut", adapter, rank=rank)
    bank.save("cut", folder)
    if bank.facts("cut") is not None:
        write_adapter_card(Path(folder))


def merge_adapter(base: str | Path, adapter: str | Path, folder: str | Path) -> None:
    """Writes the base with the adapter folded in to `folder`, as a model without adapters. base, adapter: path or Hub
    id. Raises as `AdapterBank.add` does.
    """
    from mrl_redimnet.adapters.bank import AdapterBank

    merged = AdapterBank.load(base, {"adapter": adapter}).merged("adapter")
    names = (Path(source).name if Path(source).is_dir() else source for source in (base, adapter))
    save_model(merged, folder, training="{} with the adapter {} folded in.".format(*names))
