"""Models as complete Hub folders, written whole or not at all; and the names that a model may be loaded by."""

import inspect
import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.utils import WeakFileLock
from transformers import PreTrainedModel

import modeling_mrl_redimnet
from configuration_mrl_redimnet import MRLReDimNetConfig
from feature_extraction_mrl_redimnet import MRLReDimNetFeatureExtractor
from modeling_mrl_redimnet import MRLReDimNetModel, MRLReDimNetPreTrainedModel
from mrl_redimnet.convert import ConversionError, convert_checkpoint
from mrl_redimnet.files import refuse_missing, replace_folder
from mrl_redimnet.hub_cards import base_card, save_card
from mrl_redimnet.hub_cards.results import Evaluation
from mrl_redimnet.published import Checkpoint, fetch, find_checkpoint, nearest_names, refused, writing_to_cache
from pretrained_mrl_redimnet import WeightsError, refuse_wrapped

if TYPE_CHECKING:  # training alone has what these take a second to import for
    from mrl_redimnet.data.corpus import SpeakerTable

# The models that come with the package: a folder for each, named as the model is.
MODELS = Path(__file__).with_name("models")
# The Python files that travel with a model, NAME_mrl_redimnet.py.
CODE = ("configuration", "feature_extraction", "frontend", "losses", "masking", "modeling", "pipeline", "pretrained")

# The files of sentence-transformers, from 6 on, beside the weights.
SENTENCE_TRANSFORMERS = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
    ],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {"audio": {"method": "forward", "method_output_name": "embeddings"}},
        "module_output_name": "sentence_embedding",
    },
    "config_sentence_transformers.json": {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"},
}


def save_model(
    model: MRLReDimNetPreTrainedModel,
    folder: str | Path,
    speakers: "SpeakerTable | None" = None,
    evaluation: Evaluation | None = None,
    **card_facts: Any,
) -> None:
    """Writes weights, configuration, feature extractor, their code, a card, what sentence-transformers reads, and the
    classifier's speakers to `folder`.

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
        if model.has_own_pipeline:
            write_for_sentence_transformers(target)
        card = base_card(model, **{"name": Path(folder).name, **card_facts}, evaluation=evaluation)
        save_card(card, target, evaluation)
        if speakers is not None:
            speakers.save(target / "speakers.json")

    replace_folder(Path(folder), write)


def write_for_sentence_transformers(folder: Path) -> None:
    """Writes what `SentenceTransformer(folder)` reads to find the embedding among a model's outputs."""
    for file, content in SENTENCE_TRANSFORMERS.items():
        (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_model(model: str | Path, revision: str | None = None, token: str | None = None) -> MRLReDimNetPreTrainedModel:
    """A saved model, with whatever head it was saved with, in eval mode.

    model: a folder, a name or a Hub id, as of `resolve_model`. revision: branch, tag or commit of a Hub id. token: for
    a private one, where not logged in.

    Raises WeightsError for weights that are not wholly those of that model, FileNotFoundError and OSError for what is
    not there or is pickle only; and as `resolve_model`.
    """
    source = resolve_model(model)
    where = {name: value for name, value in (("revision", revision), ("token", token)) if value is not None}
    config = MRLReDimNetConfig.from_pretrained(source, **where)
    name = (config.architectures or [MRLReDimNetModel.__name__])[0]
    if name not in modeling_mrl_redimnet.__all__:
        raise ValueError(f"{model} is a {name}, expected one of {', '.join(modeling_mrl_redimnet.__all__)}.")
    return getattr(modeling_mrl_redimnet, name).from_pretrained(source, **where).eval()


def resolve_model(model: str | Path) -> str | Path:
    """What a name of a model stands for: a folder, or a Hub id, which is not looked for here.

    The first of these that fits:

    1. a folder of that path, so that nothing in the package or on the network changes what a path means;
    2. a model that comes with the package, such as "nano" (where its folder is there): no network is needed;
    3. a published checkpoint, OWNER/NAME or NAME, see `mrl_redimnet.published`: it is fetched and converted at the
       first use, and both are kept in the cache;
    4. a Hub id OWNER/NAME.

    Raises FileNotFoundError for what is none of these, with the nearest names; ValueError for a NAME that two owners
    have; FetchError for a published checkpoint that cannot be fetched.
    """
    if isinstance(model, Path) or Path(model).is_dir():
        refuse_missing(model)
        return model
    packaged = packaged_models()
    if model in packaged:
        return packaged[model]
    if (checkpoint := find_checkpoint(model)) is not None:
        return converted_folder(checkpoint)
    refuse_missing(model, packaged, nearest_names(model, packaged))
    return model


def packaged_models() -> dict[str, Path]:
    """The models that come with the package, {name: folder}. Their folders lack the code, which is the package's."""
    return {file.parent.name: file.parent for file in sorted(MODELS.glob("*/config.json"))}


def packaged_adapters() -> dict[str, Path]:
    """The adapters that come with the package, {name: folder}: each beside the models, named BASE-DOMAIN."""
    return {file.parent.name: file.parent for file in sorted(MODELS.glob("*/adapter_config.json"))}


def code_files() -> list[Path]:
    """The Python files that a model's repository needs to be loaded without this package."""
    return [Path(inspect.getfile(modeling_mrl_redimnet)).with_name(f"{part}_mrl_redimnet.py") for part in CODE]


def converted_folder(checkpoint: Checkpoint) -> Path:
    """The folder in the cache with a published checkpoint as a model, which is fetched and converted if need be.

    Another version of this package converts anew. Raises as `convert_published`.
    """
    folder = checkpoint.cache() / f"model-{version('mrl-redimnet')}"
    if folder.is_dir():  # asked without a lock, which a cache that is for reading only does not give
        return folder
    with writing_to_cache(checkpoint), WeakFileLock(folder.with_name("converting.lock")):
        if not folder.is_dir():
            save_model(convert_published(checkpoint), folder, name=checkpoint.name, **card_facts(checkpoint))
    return folder


def convert_published(checkpoint: Checkpoint, embedding_size: int | None = None) -> MRLReDimNetModel:
    """A published checkpoint as a model, from the cache or fetched. embedding_size: as of `convert_checkpoint`.

    Raises FetchError, also for a file without a known hash that is no checkpoint, such as a page of a proxy; else as
    `convert_checkpoint`.
    """
    file = fetch(checkpoint)
    try:
        model = convert_checkpoint(file)
    except ConversionError as error:
        if checkpoint.sha256 is not None:  # it is the authors' file
            raise
        raise refused(checkpoint, file, f"it cannot be converted ({str(error).rstrip('.')})") from error
    return model if embedding_size is None else convert_checkpoint(file, embedding_size)


def card_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the card of a published checkpoint states, as `save_model` takes it."""
    return {"training": checkpoint.origin, "licence": checkpoint.licence, "datasets": checkpoint.corpora}
