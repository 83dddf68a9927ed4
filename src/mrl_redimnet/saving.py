"""Models as complete Hub folders, written whole or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import modeling_mrl_redimnet
from configuration_mrl_redimnet import MRLReDimNetConfig
from feature_extraction_mrl_redimnet import MRLReDimNetFeatureExtractor
from modeling_mrl_redimnet import MRLReDimNetModel, MRLReDimNetPreTrainedModel
from mrl_redimnet.corpus import SpeakerTable
from mrl_redimnet.hub_cards import base_card


def save_model(
    model: MRLReDimNetPreTrainedModel, folder: str | Path, speakers: SpeakerTable | None = None, **card_facts
):
    """Writes weights, configuration, feature extractor, their code, a card and the classifier's speakers to `folder`.

    card_facts: what `hub_cards.base_card` may state. What was there before is replaced at the end, in one rename.
    """

    def write(target: Path):
        model.save_pretrained(target)
        MRLReDimNetFeatureExtractor(min_samples=model.config.min_samples).save_pretrained(target)
        base_card(model, **{"name": Path(folder).name, **card_facts}).save(target / "README.md")
        if speakers is not None:
            speakers.save(target / "speakers.json")

    replace_folder(Path(folder), write)


def load_model(model: str | Path) -> MRLReDimNetPreTrainedModel:
    """A saved model from a path or Hub id, with whatever head it was saved with, in eval mode."""
    if str(model).startswith(("/", ".", "~")) and not Path(model).is_dir():
        raise FileNotFoundError(f"{model} is not a folder: give a saved model's folder, or a Hub id.")
    config = MRLReDimNetConfig.from_pretrained(model)
    name = (config.architectures or [MRLReDimNetModel.__name__])[0]
    if name not in modeling_mrl_redimnet.__all__:
        raise ValueError(f"{model} is a {name}, expected one of {', '.join(modeling_mrl_redimnet.__all__)}.")
    return getattr(modeling_mrl_redimnet, name).from_pretrained(model).eval()


def replace_folder(target: Path, write: Callable[[Path], None]):
    """Fills a temporary folder with `write(folder)`, then puts it in `target`'s place; an error leaves no trace."""
    temporary, old = target.with_name(f".{target.name}.writing"), target.with_name(f".{target.name}.old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    if target.exists():
        os.replace(target, old)
    os.replace(temporary, target)
    shutil.rmtree(old, ignore_errors=True)
