"""`mrl-redimnet embed | prepare | synthesise`."""

import os
from pathlib import Path

from mrl_redimnet_cli.arguments import add_command, add_model, folder, must_be_there
from mrl_redimnet_cli.names import CHOICES, VALUES


def add_embed(commands):
    """Adds `embed` to the subparsers `commands`."""
    part_size, batch_seconds = VALUES["bulk.PART_SIZE"], VALUES["evaluation.BATCH_SECONDS"]
    parser = add_command(
        commands,
        "embed",
        help="embeddings of a corpus into a folder of parquet files, stopped and taken up at will",
        epilog="Several processes: `accelerate launch -m mrl_redimnet_cli embed ...`, or RANK and WORLD_SIZE set by "
        "any scheduler. Exit status: 0 all embedded; 1 some utterances have problems (listed, the rest is embedded), "
        "but 0 where there are several processes, as a launcher would stop the others; 2 an error.",
    )
    add_model(parser)
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="audio files, folders of them at any depth, manifests (.csv or .tsv with path and id, .txt or .lst of "
        "paths, Kaldi's .scp, NeMo's .jsonl), tar archives, parquet files, Hub data sets; also in stores (s3://...)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="a new one, or one to go on with; or FILE.npz, whole"
    )
    parser.add_argument("--dim", type=int, help="how many numbers of each embedding [all]")
    parser.add_argument("--storage", choices=CHOICES["bulk.STORAGES"], default="float32", help="[float32]")
    parser.add_argument("--retry", action="store_true", help="try again what had problems")
    parser.add_argument("--folder", help="what the paths of manifests are relative to [the manifest's folder]")
    parser.add_argument("--split", help="of data sets [train]")
    parser.add_argument("--columns", nargs="+", default=[], metavar="ROLE=NAME", help="of tables: audio=..., path=...")
    parser.add_argument("--workers", type=int, default=1, help="processes that decode, for each that embeds [1]")
    parser.add_argument(
        "--batch-seconds", type=float, default=batch_seconds, help=f"padded audio of a batch [{batch_seconds:g}]"
    )
    parser.add_argument("--part-size", type=int, default=part_size, help=f"utterances of a file, at most [{part_size}]")
    must_be_there(parser, inputs=_input)
    parser.set_defaults(run="mrl_redimnet.bulk_commands:embed")


def _input(source: str) -> str | None:
    """What is wrong with an input that can only be a path of this machine; the others are looked for later."""
    is_path = source.startswith(("/", ".", "~"))
    return f"no file or folder {source}" if is_path and not _is_pattern(source) and not os.path.exists(source) else None


def _is_pattern(source: str) -> bool:
    return any(character in source for character in "*?[")


def add_prepare(commands):
    """Adds `prepare` to the subparsers `commands`."""
    layout = VALUES["corpus.DEFAULT_LAYOUT"]
    parser = add_command(commands, "prepare", help="a corpus to sharded parquet files, checked to be complete")
    parser.add_argument("root", help="folder of the corpus")
    parser.add_argument("out", type=Path, help="a new folder; a stopped run is taken up")
    parser.add_argument("--layout", default=layout, help=f"a corpus's name or a path layout [{layout}]")
    parser.add_argument("--shard-mb", type=float, default=256, help="size of a parquet file in megabytes [256]")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle [0]")
    parser.add_argument("--num-proc", type=int, help="headers read, and shards written, at a time [1]")
    parser.add_argument("--expect", choices=sorted(CHOICES["prepare.EXPECTED"]), help="compare with published counts")
    parser.add_argument("--list", type=Path, metavar="FILE", help="utterances or trials whose paths must all be there")
    parser.add_argument("--allow-incomplete", action="store_true", help="report what is missing, and go on")
    parser.add_argument(
        "--evaluation-speakers", action="store_true", help="keep those of CN-Celeb's evaluation part [left out]"
    )
    must_be_there(parser, root=folder)
    parser.set_defaults(run="mrl_redimnet.data.prepare:run")


def add_synthesise(commands):
    """Adds `synthesise` to the subparsers `commands`."""
    parser = add_command(commands, "synthesise", help="a small synthetic corpus in VoxCeleb's folder layout")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--train-speakers", type=int, default=60)
    parser.add_argument("--test-speakers", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run="mrl_redimnet.model_commands:synthesise")
