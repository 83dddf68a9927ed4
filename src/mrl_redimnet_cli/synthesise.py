"""`mrl-redimnet synthesise`: a small synthetic corpus to try things on."""

import argparse
from pathlib import Path

from mrl_redimnet_cli.arguments import Commands, add_command


def add(commands: Commands) -> None:
    """Adds the command to the subparsers `commands`."""
    parser = add_command(commands, "synthesise", run, help="make a small synthetic corpus in VoxCeleb's folder layout")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--train-speakers", type=int, default=60, help="number of training speakers [60]")
    parser.add_argument("--test-speakers", type=int, default=16, help="number of test speakers [16]")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the speakers and what they say [0]")


def run(arguments: argparse.Namespace) -> None:
    """Makes the corpus."""
    from mrl_redimnet.data.synthetic import make_corpus

    root = make_corpus(arguments.out, arguments.train_speakers, arguments.test_speakers, seed=arguments.seed)
    print(f"{root}: synthetic speech, see its README.txt for what results on it cannot tell.")
