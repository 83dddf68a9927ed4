"""`mrl-redimnet verify | identify`."""

import argparse
from pathlib import Path

from mrl_redimnet_cli.arguments import (
    add_command,
    add_model,
    add_scoring,
    add_thresholds,
    anything,
    file,
    folder,
    must_be_there,
)


def add_verify(commands):
    """Adds `verify` to the subparsers `commands`."""
    parser = add_command(
        commands,
        "verify",
        help="is this the enrolled speaker?",
        epilog="Exit status: 0 all test files accepted, 1 some rejected, 2 an error, 3 no threshold, so no decision.",
    )
    add_model(parser)
    add_scoring(parser)
    parser.add_argument("enrol", type=Path, nargs="+", metavar="ENROL", help="speech of the speaker, files averaged")
    parser.add_argument("--test", type=Path, nargs="+", required=True, metavar="FILE", help="each is judged by itself")
    _add_decision(parser)
    must_be_there(parser, enrol=file, test=file)
    parser.set_defaults(run="mrl_redimnet.speaker_commands:verify")


def add_identify(commands):
    """Adds `identify` to the subparsers `commands`."""
    parser = add_command(commands, "identify", help="which of the enrolled speakers is it?")
    add_model(parser)
    parser.add_argument(
        "--enrolled", type=Path, required=True, metavar="DIR", help="a folder per speaker, with their files"
    )
    parser.add_argument("--test", type=Path, nargs="+", required=True, metavar="PATH", help="files and folders")
    parser.add_argument("--top-k", type=int, default=3, help="how many speakers to name [3]")
    _add_decision(parser)
    must_be_there(parser, enrolled=folder, test=anything)
    parser.set_defaults(run="mrl_redimnet.speaker_commands:identify")


def _add_decision(parser: argparse.ArgumentParser):
    parser.add_argument("--dim", type=int, help="the prefix that is compared [the whole embedding]")
    parser.add_argument("--threshold", type=float, help="accept at or above this score [the saved one]")
    add_thresholds(parser)
