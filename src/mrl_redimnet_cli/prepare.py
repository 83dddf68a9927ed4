"""`mrl-redimnet prepare`: a corpus as sharded parquet files."""

import argparse
from pathlib import Path

from mrl_redimnet_cli.arguments import Commands, add_command, folder, must_be_there
from mrl_redimnet_cli.names import CHOICES, VALUES


def add(commands: Commands) -> None:
    """Adds the command to the subparsers `commands`."""
    layout = VALUES["data.corpus.DEFAULT_LAYOUT"]
    parser = add_command(
        commands, "prepare", run, help="convert a corpus into sharded parquet files, and check that it is complete"
    )
    parser.add_argument("root", help="folder of the corpus")
    parser.add_argument("out", type=Path, help="a new folder, or that of a run that was stopped, which is continued")
    parser.add_argument(
        "--layout", default=layout, help=f"name of the corpus, or how its paths name speakers [{layout}]"
    )
    parser.add_argument("--shard-mb", type=float, default=256, help="size of a parquet file in megabytes [256]")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the order of the utterances [0]")
    parser.add_argument(
        "--num-proc", type=int, help="how many headers are read, and shards written, at the same time [1]"
    )
    parser.add_argument(
        "--expect",
        choices=sorted(CHOICES["data.prepare.EXPECTED"]),
        help="corpus whose published numbers of utterances and speakers are compared",
    )
    parser.add_argument(
        "--list", type=Path, metavar="FILE", help="list of utterances or trials whose paths must all be there"
    )
    parser.add_argument("--allow-incomplete", action="store_true", help="report what is missing, and continue")
    parser.add_argument(
        "--evaluation-speakers",
        action="store_true",
        help="keep the speakers of CN-Celeb's evaluation part [they are left out]",
    )
    must_be_there(parser, root=folder)


def run(arguments: argparse.Namespace) -> None:
    """Prepares the corpus, and prints what was found."""
    from mrl_redimnet.data.prepare import prepare

    index = prepare(
        arguments.root,
        arguments.out,
        layout=arguments.layout,
        shard_mb=arguments.shard_mb,
        seed=arguments.seed,
        num_proc=arguments.num_proc,
        expect=arguments.expect,
        listing=arguments.list,
        allow_incomplete=arguments.allow_incomplete,
        evaluation_speakers=arguments.evaluation_speakers,
        progress=True,
    )
    for line in (*index.notes, *index.incomplete):
        print(f"Note: {line}")
    report = arguments.out / "problems.tsv"
    if report.is_file():
        print(f"Note: {sum(1 for _ in open(report)) - 1:,} files could not be used, all in {report}.")
    print(
        f"{arguments.out}: {index.rows:,} utterances of {index.speakers:,} speakers, {index.seconds / 3600:.1f} h, in "
        f"{len(index.shards)} parquet files."
    )
