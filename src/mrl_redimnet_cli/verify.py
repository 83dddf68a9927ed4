"""`mrl-redimnet verify`: is this the enrolled speaker?"""

import argparse
from pathlib import Path

from mrl_redimnet_cli.arguments import (
    Commands,
    add_command,
    add_decision,
    add_model,
    add_scoring,
    check_scoring,
    file,
    load_encoder,
    must_be_there,
)

ACCEPTED, REJECTED, UNDECIDED = 0, 1, 3  # exit status; 2 is that of an error


def add(commands: Commands) -> None:
    """Adds the command to the subparsers `commands`."""
    parser = add_command(
        commands,
        "verify",
        run,
        help="is this the enrolled speaker?",
        epilog="Exit status: 0 all test files accepted, 1 some rejected, 2 an error, 3 no threshold, so no decision.",
    )
    add_model(parser)
    add_scoring(parser)
    parser.add_argument(
        "enrol", type=Path, nargs="+", metavar="ENROL", help="files with speech of the speaker; several are averaged"
    )
    parser.add_argument(
        "--test", type=Path, nargs="+", required=True, metavar="FILE", help="files to decide on, each by itself"
    )
    add_decision(parser)
    must_be_there(parser, enrol=file, test=file)


def run(arguments: argparse.Namespace) -> int:
    """Prints a decision on every test file; the exit status says whether all are accepted."""
    from mrl_redimnet.audio.scan import printable

    check_scoring(arguments)
    encoder = load_encoder(arguments)
    dim = encoder.dim(arguments.dim)
    scorer = encoder.scorer(arguments.scoring, arguments.cohort, arguments.top, progress="embedding the cohort")
    rule = encoder.decision_rule(
        [len(set(map(str, arguments.enrol)))],
        dim,
        threshold=arguments.threshold,
        thresholds=arguments.thresholds,
        scorer=scorer,
    )
    decisions = encoder.verify(
        arguments.enrol, arguments.test, dim, threshold=rule, scorer=scorer, progress="embedding"
    )
    adapter = f" with {encoder.adapter}" if encoder.adapter else ""
    print(f"{encoder.name}{adapter}, {dim} dimensions, {scorer}: {rule}.")
    for path, each in zip(arguments.test, decisions, strict=True):
        outcome = "undecided" if each.accepted is None else "accepted" if each.accepted else "rejected"
        llr = "" if each.llr is None else f"  LLR {each.llr:+.2f}"
        print(f"{outcome:<10} score {each.score:.4f}{llr}  {printable(path)}")
    if any(each.accepted is None for each in decisions):
        return UNDECIDED
    return ACCEPTED if all(each.accepted for each in decisions) else REJECTED
