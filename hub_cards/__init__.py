"""Model cards. Import as `mrl_redimnet.hub_cards`. A card states only numbers it is given."""

from importlib.resources import files

from huggingface_hub import ModelCard, ModelCardData

from mrl_redimnet.evaluation import VerificationRow

UNKNOWN_TRAINING = "How these weights were trained is not recorded here."
NO_RESULTS = "No results are recorded for these weights."


def base_card(
    model,
    name: str = "ReDimNet-MRL",
    repository: str = "PATH_OR_HUB_ID",
    training: str = UNKNOWN_TRAINING,
    results: dict[str, list[VerificationRow]] | None = None,
    licence: str | None = None,
) -> ModelCard:
    """The card of a base model.

    training: a sentence on data and recipe. results: {trial list: rows}. licence: of the weights, which follows their
    data; left out when not given.
    """
    config = model.config
    return ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            license=licence,
            tags=["speaker-verification", "speaker-embedding", "redimnet", "matryoshka", config.model_type],
        ),
        template_str=files(__name__).joinpath("base_model.md").read_text(),
        name=name,
        repository=repository,
        dims=" / ".join(map(str, config.matryoshka_dims)),
        parameters=f"{getattr(model, model.base_model_prefix, model).num_parameters():,}",
        hop_ms=f"{config.hop_length / 16:g}",
        training=training,
        results=_tables(results) if results else NO_RESULTS,
    )


def _tables(results: dict[str, list[VerificationRow]]) -> str:
    """Markdown: EER per trial list, a column per dimension."""
    dims = [row.dim for row in next(iter(results.values()))]
    lines = ["EER %, cosine scoring:", "", "| trials | " + " | ".join(map(str, dims)) + " |"]
    lines.append("|---" * (len(dims) + 1) + "|")
    for name, rows in results.items():
        lines.append(f"| {name} | " + " | ".join(f"{100 * row.eer:.2f}" for row in rows) + " |")
    return "\n".join(lines)


__all__ = ["base_card"]
