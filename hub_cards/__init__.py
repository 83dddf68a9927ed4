"""Model cards. Import as `mrl_redimnet.hub_cards`. A card states only numbers it is given."""

import json
import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from mrl_redimnet.hub_cards.report import (
    HUB_RESULTS,
    NO_RESULTS,
    PICTURE,
    eer_plot,
    eval_results,
    hub_results,
    results_section,
)
from mrl_redimnet.hub_cards.results import EVALUATION_FILE, AttributeRow, Evaluation

if TYPE_CHECKING:  # a base's card does without PEFT, and no card needs the network
    from modeling_mrl_redimnet import MRLReDimNetPreTrainedModel
    from mrl_redimnet.adapters.facts import AdapterFacts

UNKNOWN_TRAINING = "How these weights were trained is not recorded here."
PLACEHOLDER = "PATH_OR_HUB_ID"  # in the card of a model that is in no repository yet
NETWORKS = {  # by config.network
    "redimnet": ("ReDimNet", "https://arxiv.org/abs/2407.18223"),
    "redimnet2": ("ReDimNet2", "https://arxiv.org/abs/2603.11841"),
}
SPEAKER_TAGS = ("speaker-verification", "speaker-embedding")


def base_card(
    model: "MRLReDimNetPreTrainedModel",
    name: str = "ReDimNet-MRL",
    repository: str = PLACEHOLDER,
    training: str = UNKNOWN_TRAINING,
    evaluation: Evaluation | None = None,
    licence: str | None = None,
    datasets: Sequence[str] | None = None,
) -> ModelCard:
    """The card of a base model; `save_card` writes it with what it refers to.

    training: a sentence on data and recipe. licence: of the weights, which follows their data, as the Hub's identifier;
    left out when not given. datasets: what the weights were trained on; the Hub's ids also stand in the metadata.
    """
    config = model.config
    data = _metadata(
        name,
        evaluation,
        licence,
        datasets,
        library_name="transformers",
        pipeline_tag=_pipeline(model),
        tags=[
            *(("sentence-transformers",) if model.has_own_pipeline else ()),
            *SPEAKER_TAGS,
            config.network,
            "matryoshka",
            config.model_type,
        ],
    )
    network, paper = NETWORKS[config.network]
    return _render(
        "base_model.md",
        data,
        name=name,
        repository=repository,
        verifies=model.has_own_pipeline,
        network=network,
        paper=paper,
        dims=config.matryoshka_dims,
        exits=config.exits,
        stages=len(config.stages),
        parameters=f"{model.base_model.num_parameters():,}",
        hop_ms=f"{config.hop_ms:g}",
        provenance=_provenance(training, licence, datasets),
        results=results_section(evaluation),
    )


def adapter_card(
    facts: "AdapterFacts",
    name: str = "ReDimNet-MRL adapter",
    repository: str = PLACEHOLDER,
    *,
    parameters: int,
    file_bytes: int,
    rank_text: str | None = None,
    evaluation: Evaluation | None = None,
    licence: str | None = None,
    datasets: Sequence[str] | None = None,
) -> ModelCard:
    """The card of an adapter; `save_card` writes it with what it refers to.

    parameters: of the adapter. file_bytes: of its weights file. rank_text: such as "rank 8 in 15 layers", by default
    told from facts.layers. licence, datasets: as in `base_card`. Raises ValueError for a classification without labels.
    """
    if facts.task == "classification" and not facts.labels:
        raise ValueError(f"labels: the classification adapter {facts.domain!r} does not name its classes.")
    verifies = facts.task == "verification"
    base = facts.base.repository
    published = _is_hub_id(base) and "/" in base  # a bare name would point at a stranger's model, or none
    data = _metadata(
        name,
        evaluation,
        licence,
        datasets,
        library_name="peft",
        base_model=base if published else None,
        base_model_relation="adapter" if published else None,
        tags=[*(SPEAKER_TAGS if verifies else ()), "redimnet", "matryoshka", "lora", facts.domain],
    )
    return _render(
        "adapter.md",
        data,
        name=name,
        repository=repository,
        task=facts.task,
        domain=facts.domain,
        labels=json.dumps(facts.labels, ensure_ascii=False),
        outputs=len(facts.labels) if facts.task == "classification" else 1,
        base=base,
        base_link=f"[{base}](https://huggingface.co/{base})" if published else f"`{base}`",
        revision=facts.base.revision,
        at_revision=f', revision="{facts.base.revision}"' if facts.base.revision else "",
        fingerprint=facts.base.fingerprint,
        parameters=f"{parameters:,}",
        ranks=_ranks(facts.layers) if rank_text is None else rank_text,
        size=f"{file_bytes / 1e6:.2f} MB" if file_bytes >= 1e6 else f"{file_bytes / 1e3:.1f} kB",
        compares_base=evaluation is not None and "base" in evaluation.systems and evaluation.saved != "base",
        provenance=_provenance(facts.training or UNKNOWN_TRAINING, licence, datasets),
        results=results_section(evaluation),
    )


def save_card(card: ModelCard, folder: str | Path, evaluation: Evaluation | None = None) -> None:
    """Writes README.md, and of an evaluation evaluation.json, where there are EERs eer.png, and of lists that are
    benchmarks of the Hub .eval_results/*.yaml.

    Raises ValueError when the card states other results than `evaluation`. Files of an earlier evaluation are removed.
    """
    if results_section(evaluation) not in card.text:
        raise ValueError("The card was not made from this evaluation: pass both the same.")
    folder = Path(folder)
    for name in (EVALUATION_FILE, PICTURE):
        (folder / name).unlink(missing_ok=True)
    if (folder / HUB_RESULTS).is_dir():
        shutil.rmtree(folder / HUB_RESULTS)
    if evaluation is not None:
        evaluation.save(folder)
        eer_plot(evaluation, folder / PICTURE)
        for name, content in hub_results(evaluation).items():
            (folder / HUB_RESULTS).mkdir(exist_ok=True)
            (folder / HUB_RESULTS / name).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    card.save(folder / "README.md")


def _metadata(
    name: str, evaluation: Evaluation | None, licence: str | None, datasets: Sequence[str] | None, **fields: Any
) -> ModelCardData:
    """The Hub refuses a card that names data by anything but ids, so other names stay in the text."""
    return ModelCardData(
        license=licence,
        datasets=[dataset for dataset in datasets or () if _is_hub_id(dataset)] or None,
        model_name=None if evaluation is None else name,
        eval_results=None if evaluation is None else eval_results(evaluation),
        **fields,
    )


def _pipeline(model: "MRLReDimNetPreTrainedModel") -> str | None:
    """The transformers pipeline that runs the model, if there is one: "feature-extraction" is for text, and an adapter
    lacks the feature extractor.
    """
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    return "audio-classification" if classifies and model.config.num_labels > 1 else None


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _provenance(training: str, licence: str | None, datasets: Sequence[str] | None) -> str:
    """Markdown: training, data, and what may be done with the weights."""
    parts = [training]
    if datasets:
        parts.append(f"Data: {', '.join(datasets)}.")
    parts.append(
        f"Licence of the weights: {licence}."
        if licence
        else "No licence is stated: that of weights follows the data they were trained on."
    )
    return "\n\n".join(parts)


def _ranks(layers: dict[str, int]) -> str:
    if not layers:
        return ""
    low, high = min(layers.values()), max(layers.values())
    return f"{f'rank {low}' if low == high else f'ranks {low} to {high}'} in {len(layers)} layers"


def _render(template: str, data: ModelCardData, **values: Any) -> ModelCard:
    folder = files(__name__)
    text, limits = (folder.joinpath(file).read_text(encoding="utf-8") for file in (template, "limits.md"))
    # Jinja drops a template's last newline.
    return ModelCard.from_template(data, template_str=text + "\n", limits=limits.strip(), **values)


__all__ = [
    "NO_RESULTS",
    "UNKNOWN_TRAINING",
    "AttributeRow",
    "Evaluation",
    "adapter_card",
    "base_card",
    "eer_plot",
    "save_card",
]
