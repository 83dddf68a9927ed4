"""The `mrl-redimnet` command."""

import argparse
import sys
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from modeling_mrl_redimnet import MRLReDimNetPreTrainedModel
from mrl_redimnet.adapter_commands import add_adapter_commands
from mrl_redimnet.bulk_commands import add_embed_command
from mrl_redimnet.convert import convert_checkpoint
from mrl_redimnet.corpus import AUDIO_SUFFIXES, SpeakerTable
from mrl_redimnet.evaluation import audio_below, drawn, embed_files
from mrl_redimnet.evaluation_commands import add_evaluation_commands
from mrl_redimnet.export_commands import add_export_command
from mrl_redimnet.folders import refuse_existing
from mrl_redimnet.prepare import add_prepare_command
from mrl_redimnet.robustness_commands import add_robustness_command
from mrl_redimnet.rotation import ROTATION_UTTERANCES, rotate
from mrl_redimnet.saving import load_model, save_model
from mrl_redimnet.speaker_commands import add_speaker_commands
from mrl_redimnet.synthetic import make_corpus


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status: 0, 2 for an error that is told in one message, or what the
    subcommand's help says."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(argv, argparse.Namespace(command_line=argv))
    disable_progress_bar()  # of reading and writing models
    try:
        return arguments.run(arguments) or 0
    except (ValueError, OSError) as error:
        print(f"mrl-redimnet {arguments.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mrl-redimnet", description="Matryoshka ReDimNet speaker embeddings.")
    commands = parser.add_subparsers(dest="command", required=True)

    convert = commands.add_parser("convert", help="a published ReDimNet checkpoint to a Hub folder")
    convert.add_argument("checkpoint", type=Path, help="the published .pt file")
    convert.add_argument("out", type=Path, help="a new folder")
    convert.add_argument("--embedding-size", type=int, help="more dimensions than the checkpoint's head has")
    convert.add_argument("--rotate-on", type=Path, metavar="AUDIO_DIR", help="make prefixes principal subspaces")
    convert.set_defaults(run=_convert)

    turn = commands.add_parser("rotate", help="make the prefixes of a model's embedding principal subspaces")
    turn.add_argument("model", help="path or Hub id")
    turn.add_argument("audio", type=Path, metavar="AUDIO_DIR", help="speech of many speakers, at any depth")
    turn.add_argument("out", type=Path, help="a new folder")
    turn.set_defaults(run=_rotate)

    add_evaluation_commands(commands)
    add_speaker_commands(commands)
    add_embed_command(commands)
    add_robustness_command(commands)
    add_adapter_commands(commands)
    add_export_command(commands)
    add_prepare_command(commands)

    synthesise = commands.add_parser("synthesise", help="a small synthetic corpus in VoxCeleb's folder layout")
    synthesise.add_argument("out", type=Path, help="a new folder")
    synthesise.add_argument("--train-speakers", type=int, default=60)
    synthesise.add_argument("--test-speakers", type=int, default=16)
    synthesise.add_argument("--seed", type=int, default=0)
    synthesise.set_defaults(run=_synthesise)
    return parser


def _convert(arguments):
    refuse_existing(arguments.out)
    model = convert_checkpoint(arguments.checkpoint, arguments.embedding_size)
    if arguments.rotate_on is not None:
        _rotate_on(model, arguments.rotate_on)
    _save(model, arguments.out)


def _rotate(arguments):
    refuse_existing(arguments.out)
    model = load_model(arguments.model)
    _rotate_on(model, arguments.audio)
    names = Path(arguments.model) / "speakers.json"
    _save(model, arguments.out, SpeakerTable.load(names) if names.is_file() else None)


def _synthesise(arguments):
    root = make_corpus(arguments.out, arguments.train_speakers, arguments.test_speakers, seed=arguments.seed)
    print(f"{root}: synthetic speech, see its README.txt for what results on it cannot tell.")


def _rotate_on(model: MRLReDimNetPreTrainedModel, folder: Path):
    """Rotates on up to 2000 files drawn from `folder`, and prints the energy each prefix keeps."""
    files = audio_below(folder)
    if len(files) < 2:
        raise FileNotFoundError(f"1 audio file ({', '.join(AUDIO_SUFFIXES)}) below {folder}: too few.")
    chosen = drawn(files, ROTATION_UTTERANCES)
    embeddings = embed_files(model, chosen, progress="embedding")
    if len(chosen) < model.config.embedding_size:
        print(
            f"Note: {len(chosen)} utterances for {model.config.embedding_size} dimensions; speech of some hundred "
            "speakers makes better prefixes."
        )
    kept = rotate(model, embeddings)
    shares = ", ".join(f"{dim}: {100 * kept[dim - 1]:.1f} %" for dim in model.config.matryoshka_dims)
    print(f"Rotated on {len(chosen)} utterances; energy of the embeddings in each prefix: {shares}.")


def _save(model: MRLReDimNetPreTrainedModel, out: Path, speakers: SpeakerTable | None = None):
    save_model(model, out, speakers)
    config = model.config
    print(
        f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters, {config.hop_length / 16:g} ms hop, "
        f"embeddings of {', '.join(map(str, config.matryoshka_dims))} dimensions."
    )


if __name__ == "__main__":
    sys.exit(main())
