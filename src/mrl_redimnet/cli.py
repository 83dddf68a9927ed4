"""The `mrl-redimnet` command."""

import argparse
import sys
from pathlib import Path

import numpy as np
from transformers.utils.logging import disable_progress_bar

from modeling_mrl_redimnet import MRLReDimNetPreTrainedModel
from mrl_redimnet.adapter_commands import add_adapter_commands
from mrl_redimnet.adapters.bank import AdapterBank
from mrl_redimnet.convert import convert_checkpoint
from mrl_redimnet.corpus import AUDIO_SUFFIXES, SpeakerTable
from mrl_redimnet.domains import DOMAINS, make_domain
from mrl_redimnet.evaluation import embed_files, evaluate_trials, format_table
from mrl_redimnet.folders import refuse_existing
from mrl_redimnet.prepare import add_prepare_command
from mrl_redimnet.rotation import ROTATION_UTTERANCES, rotate
from mrl_redimnet.saving import load_model, save_model
from mrl_redimnet.synthetic import make_corpus
from mrl_redimnet.trials import read_trials


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status, 2 for an error that is told in one message."""
    arguments = _parser().parse_args(argv)
    disable_progress_bar()  # of reading and writing models
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"mrl-redimnet {arguments.command}: {error}", file=sys.stderr)
        return 2
    return 0


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

    evaluate = commands.add_parser("evaluate", help="EER and minDCF of a trial list at every dimension")
    evaluate.add_argument("model", help="path or Hub id")
    evaluate.add_argument("--trials", type=Path, required=True, help="lines of `1|0 path path`")
    evaluate.add_argument("--folder", type=Path, required=True, help="what the paths are relative to")
    evaluate.add_argument("--adapter", help="path or Hub id of an adapter to put on the model")
    evaluate.add_argument(
        "--domain", choices=sorted(DOMAINS), default="clean", help="what to make the audio sound like"
    )
    evaluate.add_argument("--noise", type=Path, metavar="AUDIO_DIR", help="noise of the domain noisy")
    evaluate.add_argument("--dims", type=int, nargs="+", help="prefixes to report [the model's own]")
    evaluate.add_argument(
        "--resamples", type=int, default=1000, help="of the interval over speakers, 0 for none [1000]"
    )
    evaluate.set_defaults(run=_evaluate)

    add_adapter_commands(commands)
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


def _evaluate(arguments):
    model = load_model(arguments.model)
    dims = arguments.dims or model.config.matryoshka_dims
    wrong = [dim for dim in dims if not 1 <= dim <= model.config.embedding_size]
    if wrong:
        raise ValueError(f"--dims: {wrong} are not between 1 and the embedding's {model.config.embedding_size}.")
    if arguments.adapter is not None:
        model = AdapterBank.load(model, {"adapter": arguments.adapter}).merged("adapter")
    domain = None if arguments.domain == "clean" else make_domain(arguments.domain, noise=arguments.noise)
    rows = evaluate_trials(
        model,
        read_trials(arguments.trials),
        arguments.folder,
        dims,
        arguments.resamples,
        progress="embedding",
        domain=domain,
    )
    print(format_table({arguments.trials.stem: rows}))


def _synthesise(arguments):
    root = make_corpus(arguments.out, arguments.train_speakers, arguments.test_speakers, seed=arguments.seed)
    print(f"{root}: synthetic speech, see its README.txt for what results on it cannot tell.")


def _rotate_on(model: MRLReDimNetPreTrainedModel, folder: Path):
    """Rotates on up to 2000 files drawn from `folder`, and prints the energy each prefix keeps."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder with audio.")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    if len(files) < 2:
        raise FileNotFoundError(f"{len(files)} audio files ({', '.join(AUDIO_SUFFIXES)}) below {folder}: too few.")
    chosen = np.random.default_rng(0).permutation(len(files))[:ROTATION_UTTERANCES]
    embeddings = embed_files(model, [files[i] for i in sorted(chosen)], progress="embedding")
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
