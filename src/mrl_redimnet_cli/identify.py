"""`mrl-redimnet identify`: which of the enrolled speakers is it?"""

import argparse
from pathlib import Path

from mrl_redimnet_cli.arguments import (
    Commands,
    add_command,
    add_decision,
    add_model,
    anything,
    folder,
    load_encoder,
    must_be_there,
)


def add(commands: Commands) -> None:
    """Adds the command to the subparsers `commands`."""
    parser = add_command(commands, "identify", run, help="which of the enrolled speakers is it?")
    add_model(parser)
    parser.add_argument(
        "--enrolled",
        type=Path,
        required=True,
        metavar="DIR",
        help="a folder that has a folder with audio for every enrolled speaker",
    )
    parser.add_argument(
        "--test", type=Path, nargs="+", required=True, metavar="PATH", help="files to identify, and folders of files"
    )
    parser.add_argument("--top-k", type=int, default=3, help="how many speakers to name for each file [3]")
    add_decision(parser)
    must_be_there(parser, enrolled=folder, test=anything)


def run(arguments: argparse.Namespace) -> None:
    """Prints, for every test file, who it is and the nearest speakers with their scores."""
    from mrl_redimnet.audio.scan import named_files, printable, speakers_files

    if arguments.top_k < 1:
        raise ValueError(f"--top-k: got {arguments.top_k}, expected at least 1.")
    speakers, tests = speakers_files(arguments.enrolled), named_files(arguments.test)
    encoder = load_encoder(arguments)
    dim = encoder.dim(arguments.dim)
    rule = encoder.decision_rule(
        map(len, speakers.values()),
        dim,
        threshold=arguments.threshold,
        thresholds=arguments.thresholds,
        speakers=len(speakers),
    )
    found = encoder.identify(
        speakers, list(tests.values()), dim, top=arguments.top_k, threshold=rule, progress="embedding"
    )
    adapter = f" with {encoder.adapter}" if encoder.adapter else ""
    print(f"{encoder.name}{adapter}, {dim} dimensions, {len(speakers)} enrolled speakers: {rule}.")
    for test, each in zip(tests, found, strict=True):
        ranked = ", ".join(f"{printable(one.speaker)} {one.score:.4f}" for one in each.candidates)
        print(f"{printable(each.speaker or 'unknown')}\t{printable(test)}\t{ranked}")
