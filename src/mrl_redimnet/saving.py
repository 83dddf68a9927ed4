"""Models as complete Hub folders, written whole or not at all."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

import modeling_mrl_redimnet
from configuration_mrl_redimnet import MRLReDimNetConfig
from feature_extraction_mrl_redimnet import MRLReDimNetFeatureExtractor
from modeling_mrl_redimnet import MRLReDimNetModel, MRLReDimNetPreTrainedModel
from mrl_redimnet.files import refuse_missing, replace_folder
from mrl_redimnet.hub_cards import base_card, save_card
from mrl_redimnet.hub_cards.results import Evaluation

if TYPE_CHECKING:  # training alone has what these take a second to import for
    from mrl_redimnet.data.corpus import SpeakerTable
from pretrained_mrl_redimnet import WeightsError, refuse_wrapped


def save_model(
    model: MRLReDimNetPreTrainedModel,
    folder: str | Path,
    speakers: "SpeakerTable | None" = None,
    evaluation: Evaluation | None = None,
    **card_facts: Any,
) -> None:
    """Writes weights, configuration, feature extractor, their code, a card and the classifier's speakers to `folder`.

    card_facts: what `hub_cards.base_card` may state. What was there before is replaced at the end, in one rename.
    Raises WeightsError for a model that carries adapters, or is wrapped in another way.
    """
    if not isinstance(model, PreTrainedModel):
        raise WeightsError(
            f"A {type(model).__name__} cannot be saved as a model: give the model inside it, without adapters."
        )
    refuse_wrapped(model)

    def write(target: Path) -> None:
        model.save_pretrained(target)
        MRLReDimNetFeatureExtractor(min_samples=model.config.min_samples).save_pretrained(target)
        card = base_card(model, **{"name": Path(folder).name, **card_facts}, evaluation=evaluation)
        save_card(card, target, evaluation)
        if speakers is not None:
            speakers.save(target / "speakers.json")

    replace_folder(Path(folder), write)


def load_model(model: str | Path, revision: str | None = None, token: str | None = None) -> MRLReDimNetPreTrainedModel:
    """A saved model from a path or Hub id, with whatever head it was saved with, in eval mode.

    revision: branch, tag or commit of a Hub id. token: for a private one, where not logged in.

    Raises WeightsError for weights that are not wholly those of that model, FileNotFoundError and OSError for what is
    not there or is pickle only.
    """
    refuse_missing(model)
    where = {name: value for name, value in (("revision", revision), ("token", token)) if value is not None}
    config = MRLReDimNetConfig.from_pretrained(model, **where)
    name = (config.architectures or [MRLReDimNetModel.__name__])[0]
    if name not in modeling_mrl_redimnet.__all__:
        raise ValueError(f"{model} is a {name}, expected one of {', '.join(modeling_mrl_redimnet.__all__)}.")
    return getattr(modeling_mrl_redimnet, name).from_pretrained(model, **where).eval()
