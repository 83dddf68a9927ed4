"""Models as complete Hub folders, written whole or not at all."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from transformers import PreTrainedModel

import modeling_mrl_redimnet
from configuration_mrl_redimnet import MRLReDimNetConfig
from feature_extraction_mrl_redimnet import MRLReDimNetFeatureExtractor
from modeling_mrl_redimnet import MRLReDimNetModel, MRLReDimNetPreTrainedModel, WeightsError, refuse_wrapped
from mrl_redimnet.adapters.facts import AdapterFacts
from mrl_redimnet.adapters.placement import encoder_name
from mrl_redimnet.folders import refuse_missing, replace_folder
from mrl_redimnet.hub_cards import adapter_card, base_card, save_card
from mrl_redimnet.hub_cards.results import Evaluation

if TYPE_CHECKING:  # training alone has what these take a second to import for
    from mrl_redimnet.adapters.strategies import Vanilla
    from mrl_redimnet.corpus import SpeakerTable


def save_model(
    model: MRLReDimNetPreTrainedModel,
    folder: str | Path,
    speakers: "SpeakerTable | None" = None,
    evaluation: Evaluation | None = None,
    **card_facts,
):
    """Writes weights, configuration, feature extractor, their code, a card and the classifier's speakers to `folder`.

    card_facts: what `hub_cards.base_card` may state. What was there before is replaced at the end, in one rename.
    Raises WeightsError for a model that carries adapters, or is wrapped in another way.
    """
    if not isinstance(model, PreTrainedModel):
        raise WeightsError(
            f"A {type(model).__name__} cannot be saved as a model: give the model inside it, without adapters."
        )
    refuse_wrapped(model)

    def write(target: Path):
        model.save_pretrained(target)
        MRLReDimNetFeatureExtractor(min_samples=model.config.min_samples).save_pretrained(target)
        card = base_card(model, **{"name": Path(folder).name, **card_facts}, evaluation=evaluation)
        save_card(card, target, evaluation)
        if speakers is not None:
            speakers.save(target / "speakers.json")

    replace_folder(Path(folder), write)


def save_adapter(strategy: "Vanilla", facts: AdapterFacts, folder: str | Path):
    """Writes a trained adapter to `folder`: PEFT's two files, our facts and a card."""

    def write(target: Path):
        strategy.config.base_model_name_or_path, strategy.config.revision = facts.base.repository, facts.base.revision
        strategy.save(target)
        replace(facts, layers=saved_ranks(target)).save(target)
        write_adapter_card(target)

    replace_folder(Path(folder), write)


def publish_adapter(source: str | Path, folder: str | Path, training: str = "", evaluation: Evaluation | None = None):
    """A copy of the adapter in `source`, with how it was trained and what was measured on its card."""

    def write(target: Path):
        shutil.copytree(source, target, dirs_exist_ok=True)
        replace(AdapterFacts.load(target), training=training).save(target)
        write_adapter_card(target, evaluation)

    replace_folder(Path(folder), write)


def saved_ranks(folder: Path) -> dict[str, int]:
    """The rank of every layer of the adapter in `folder`, by its name in the encoder, from the weights themselves."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
        return {
            encoder_name(key.removesuffix(".lora_A.weight")): tensors.get_slice(key).get_shape()[0]
            for key in tensors.keys()
            if key.endswith(".lora_A.weight")
        }


def write_adapter_card(folder: Path, evaluation: Evaluation | None = None):
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
    )
    save_card(card, folder, evaluation)


def load_model(model: str | Path) -> MRLReDimNetPreTrainedModel:
    """A saved model from a path or Hub id, with whatever head it was saved with, in eval mode.

    Raises WeightsError for weights that are not wholly those of that model, FileNotFoundError and OSError for what is
    not there or is pickle only.
    """
    refuse_missing(model)
    config = MRLReDimNetConfig.from_pretrained(model)
    name = (config.architectures or [MRLReDimNetModel.__name__])[0]
    if name not in modeling_mrl_redimnet.__all__:
        raise ValueError(f"{model} is a {name}, expected one of {', '.join(modeling_mrl_redimnet.__all__)}.")
    return getattr(modeling_mrl_redimnet, name).from_pretrained(model).eval()
