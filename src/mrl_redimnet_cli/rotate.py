"""`mrl-redimnet rotate`: the prefixes of a model's embedding as principal subspaces."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mrl_redimnet_cli.arguments import MODEL, Commands, add_command, folder, model_source, must_be_there

if TYPE_CHECKING:
    from modeling_mrl_redimnet import MRLReDimNetPreTrainedModel


def add(commands: Commands) -> None:
    """Adds the command to the subparsers `commands`."""
    parser = add_command(
        commands,
        "rotate",
        run,
        help="rotate a model's embedding, so that its first numbers hold as much of it as they can",
    )
    parser.add_argument("model", help=f"the model: {MODEL}")
    parser.add_argument("audio", type=Path, metavar="AUDIO_DIR", help="speech of many speakers, at any depth")
    parser.add_argument("out", type=Path, help="a new folder")
    must_be_there(parser, model=model_source, audio=folder)


def run(arguments: argparse.Namespace) -> None:
    """Rotates and saves, with the names of the classifier's speakers where there are some."""
    from mrl_redimnet.data.corpus import SpeakerTable
    from mrl_redimnet.files import refuse_existing
    from mrl_redimnet.saving import load_model, save_model

    refuse_existing(arguments.out)
    model = load_model(arguments.model)
    rotate_and_print(model, arguments.audio)
    names = Path(arguments.model) / "speakers.json"
    save_model(model, arguments.out, SpeakerTable.load(names) if names.is_file() else None)
    print_saved(model, arguments.out)


def rotate_and_print(model: "MRLReDimNetPreTrainedModel", speech: Path) -> None:
    """Rotates a model in place, and prints how much of the embeddings' energy each prefix keeps."""
    from mrl_redimnet.rotation import rotate_on_speech

    count, kept = rotate_on_speech(model, speech, progress="embedding")
    if count < model.config.embedding_size:
        print(
            f"Note: {count} utterances for {model.config.embedding_size} dimensions; speech of some hundred "
            "speakers makes better prefixes."
        )
    shares = ", ".join(f"{dim}: {100 * kept[dim - 1]:.1f} %" for dim in model.config.matryoshka_dims)
    print(f"Rotated on {count} utterances; energy of the embeddings in each prefix: {shares}.")


def print_saved(model: "MRLReDimNetPreTrainedModel", out: Path) -> None:
    """Prints what the model is that was saved in `out`."""
    config = model.config
    print(
        f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters, {config.hop_ms:g} ms hop, "
        f"embeddings of {', '.join(map(str, config.matryoshka_dims))} dimensions."
    )
