"""`mrl-redimnet embed`: the embeddings of a corpus, by as many processes as there are."""

import argparse
import os
import sys
from pathlib import Path

from mrl_redimnet_cli.arguments import Commands, add_command, add_model, load_encoder, must_be_there
from mrl_redimnet_cli.names import CHOICES, VALUES


def add(commands: Commands) -> None:
    """Adds the command to the subparsers `commands`."""
    parser = add_command(
        commands,
        "embed",
        run,
        help="embed a corpus into a folder of parquet files; may be stopped and continued",
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
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="a new folder, or one to continue in; or FILE.npz, which is written at the end",
    )
    parser.add_argument("--dim", type=int, help="how many numbers of each embedding are kept [all]")
    parser.add_argument(
        "--storage",
        choices=CHOICES["extraction.bulk.STORAGES"],
        default="float32",
        help="number format of the embeddings [float32]",
    )
    parser.add_argument("--retry", action="store_true", help="try utterances again that had problems before")
    parser.add_argument(
        "--folder", help="the folder that the paths in manifests are relative to [the manifest's folder]"
    )
    parser.add_argument("--split", help="which split of data sets to embed [train]")
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="ROLE=NAME",
        help="which columns of tables hold the audio and the path: audio=NAME, path=NAME [recognised]",
    )
    _add_costs(parser)
    must_be_there(parser, inputs=_input)


def _add_costs(parser: argparse.ArgumentParser) -> None:
    """Options that change how fast it goes and what lies in a file, but no embedding."""
    part_size, batch_seconds = VALUES["extraction.bulk.PART_SIZE"], VALUES["encoder.BATCH_SECONDS"]
    parser.add_argument(
        "--workers", type=int, default=1, help="processes that decode audio, for each process that embeds [1]"
    )
    parser.add_argument(
        "--batch-seconds",
        type=float,
        default=batch_seconds,
        help=f"seconds of padded audio in the network at once [{batch_seconds:g}]",
    )
    parser.add_argument(
        "--part-size",
        type=int,
        default=part_size,
        help=f"the most utterances in one parquet file [{part_size}]",
    )


def _input(source: str) -> str | None:
    """What is wrong with an input that can only be a path of this machine; the others are looked for later."""
    is_path = source.startswith(("/", ".", "~"))
    return f"no file or folder {source}" if is_path and not _is_pattern(source) and not os.path.exists(source) else None


def _is_pattern(source: str) -> bool:
    return any(character in source for character in "*?[")


def _columns(pairs: list[str]) -> dict[str, str]:
    if wrong := [pair for pair in pairs if not all(pair.partition("="))]:
        raise ValueError(f"--columns: got {wrong[0]}, expected ROLE=NAME, as in audio=clip path=utterance_id")
    return dict(pair.split("=", 1) for pair in pairs)


def run(arguments: argparse.Namespace) -> int:
    """Embeds this process's share of the inputs, and lists what could not be embedded."""
    import datasets

    from mrl_redimnet.audio.scan import printable
    from mrl_redimnet.encoder import LISTED
    from mrl_redimnet.extraction.bulk import Extraction, Process, embed_corpus, embed_to_file
    from mrl_redimnet.extraction.inputs import Inputs
    from mrl_redimnet.files import check_output

    process = Process.launched()
    how = Extraction(
        dim=arguments.dim,
        storage=arguments.storage,
        batch_seconds=arguments.batch_seconds,
        part_size=arguments.part_size,
        workers=arguments.workers,
        retry=arguments.retry,
    )
    out, single_file = arguments.out, arguments.out.suffix == ".npz"
    if single_file and process.count > 1:
        raise ValueError(f"{out}: one file is written by one process, for {process.count} give a folder.")
    check_output(out if single_file else None)
    datasets.disable_progress_bars()  # of reading; the embedding has its own
    inputs = Inputs.find(arguments.inputs, arguments.folder, arguments.split, _columns(arguments.columns))
    encoder = load_encoder(arguments, process.device)
    progress = "embedding" if process.number == 0 else None
    if single_file:
        report = embed_to_file(encoder, inputs, out, how, progress)
    else:
        report = embed_corpus(encoder, inputs, out, how, process, progress)
    for problem in report.problems[:LISTED]:
        print(f"Left out: {printable(problem.id)}: {printable(problem.reason)}", file=sys.stderr)
    if len(report.problems) > LISTED:
        print(f"and {len(report.problems) - LISTED} more.", file=sys.stderr)
    count = len(report.problems)
    who = f"process {process.number} of {process.count}: " if process.count > 1 else ""
    before = f", {report.before} were there before" if report.before else ""
    adapter = f" with {encoder.adapter}" if encoder.adapter else ""
    where = "" if single_file else f" (all in {out}/problems-*.jsonl)"
    problems = f" {count} could not be embedded{where}." if count else ""
    print(
        f"{out}: {who}{report.embedded} utterances embedded{before}, by {encoder.name}{adapter}, "
        f"{encoder.dim(how.dim)} dimensions.{problems}"
    )
    return 1 if report.problems and process.count == 1 else 0
