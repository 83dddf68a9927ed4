"""`mrl-redimnet plda`: how embeddings vary between speakers and within one, for VBx in pyannote.audio."""

import argparse
from pathlib import Path

from mrl_redimnet_cli.arguments import Commands, add_command, add_model, folder, load_encoder, must_be_there
from mrl_redimnet_cli.names import VALUES


def add(commands: Commands) -> None:
    """Adds the command to the subparsers `commands`."""
    layout, seconds = VALUES["data.corpus.DEFAULT_LAYOUT"], VALUES["diarization.plda.PIECE_SECONDS"]
    parser = add_command(
        commands,
        "plda",
        run,
        help="estimate a PLDA of a model's embeddings from labelled speech, for VBx clustering in pyannote.audio",
    )
    add_model(parser)
    parser.add_argument("speech", type=Path, metavar="SPEECH_DIR", help="a corpus whose folders name speakers")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--layout", default=layout, help=f"how the corpus's paths name speakers [{layout}]")
    parser.add_argument("--dim", type=int, help="how many numbers of the embeddings, from the first on [all]")
    parser.add_argument(
        "--lda-dim",
        type=int,
        help=f"how many dimensions are kept of these [{VALUES['diarization.plda.LDA_DIM']}, or one less than the "
        "speakers]",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=seconds,
        help=f"length of the pieces that recordings are cut into [{seconds:g}]",
    )
    must_be_there(parser, speech=folder)


def run(arguments: argparse.Namespace) -> None:
    """Estimates it and saves it."""
    from mrl_redimnet.diarization.plda import plda_of_speech
    from mrl_redimnet.files import refuse_existing

    refuse_existing(arguments.out)
    encoder = load_encoder(arguments)
    plda, found = plda_of_speech(
        encoder,
        arguments.speech,
        arguments.dim,
        arguments.lda_dim,
        layout=arguments.layout,
        seconds=arguments.seconds,
        progress="embedding",
    )
    plda.save(arguments.out)
    print(
        f"{arguments.out}: PLDA of {plda.lda.shape[0]} numbers in {plda.lda.shape[1]} dimensions, of {found.pieces:,} "
        f"pieces of {found.files:,} files of {found.speakers:,} speakers. Speakers vary {plda.psi[0]:.1f} to "
        f"{plda.psi[-1]:.2f} times as much as one speaker's pieces do."
    )
