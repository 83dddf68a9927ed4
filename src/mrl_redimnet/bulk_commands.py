"""`mrl-redimnet embed`: the embeddings of a corpus, by as many processes as there are."""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np
import torch

from mrl_redimnet.audio.scan import printable
from mrl_redimnet.embedding import LISTED
from mrl_redimnet.extraction.bulk import Extraction, Process, Report, embed_corpus, read_embeddings
from mrl_redimnet.extraction.inputs import Inputs
from mrl_redimnet.files import replace_file
from mrl_redimnet.systems import System, check_output

# By these accelerate learns of other processes.
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def embed(arguments) -> int:
    """`mrl-redimnet embed`."""
    process = Process.launched()
    how = Extraction(
        dim=arguments.dim,
        storage=arguments.storage,
        batch_seconds=arguments.batch_seconds,
        part_size=arguments.part_size,
        workers=arguments.workers,
        retry=arguments.retry,
    )
    single_file = arguments.out.suffix == ".npz"
    if single_file and process.count > 1:
        raise ValueError(f"{arguments.out}: one file is written by one process, for {process.count} give a folder.")
    check_output(arguments.out if single_file else None)
    datasets.disable_progress_bars()  # of reading; the embedding has its own
    inputs = Inputs.find(arguments.inputs, arguments.folder, arguments.split, _columns(arguments.columns))
    system = _load_alone(arguments, process)
    write = _to_file if single_file else _to_folder
    report = write(system, inputs, arguments.out, how, process)
    for problem in report.problems[:LISTED]:
        print(f"Left out: {printable(problem.id)}: {printable(problem.reason)}", file=sys.stderr)
    if len(report.problems) > LISTED:
        print(f"and {len(report.problems) - LISTED} more.", file=sys.stderr)
    print(_summary(report, system, how, arguments, process))
    return 1 if report.problems and process.count == 1 else 0


def _summary(report: Report, system: System, how: Extraction, arguments, process: Process) -> str:
    adapter = f" with {system.adapter}" if system.adapter else ""
    who = f"process {process.number} of {process.count}: " if process.count > 1 else ""
    before = f", {report.before} were there before" if report.before else ""
    count = len(report.problems)
    where = "" if arguments.out.suffix == ".npz" else f" (all in {arguments.out}/problems-*.jsonl)"
    problems = f" {count} could not be embedded{where}." if count else ""
    dim = system.dim(how.dim)
    return (
        f"{arguments.out}: {who}{report.embedded} utterances embedded{before}, by {system.name}{adapter}, "
        f"{dim} dimensions.{problems}"
    )


def _columns(pairs: list[str]) -> dict[str, str]:
    if wrong := [pair for pair in pairs if not all(pair.partition("="))]:
        raise ValueError(f"--columns: got {wrong[0]}, expected ROLE=NAME, as in audio=clip path=utterance_id")
    return dict(pair.split("=", 1) for pair in pairs)


def _load_alone(arguments, process: Process) -> System:
    """The system on this process's device, without a process group: its processes never speak to each other, and must
    not be stopped by the end of one."""
    if torch.cuda.is_available():
        torch.cuda.set_device(process.local % torch.cuda.device_count())
    with _without(_LAUNCHER):
        return System.load(arguments)


@contextlib.contextmanager
def _without(names: tuple[str, ...]):
    """The environment without some of its variables."""
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _to_folder(system: System, inputs: Inputs, out: Path, how: Extraction, process: Process) -> Report:
    return embed_corpus(system, inputs, out, how, process, "embedding" if process.number == 0 else None)


def _to_file(system: System, inputs: Inputs, out: Path, how: Extraction, process: Process) -> Report:
    """Everything in one .npz: ids, embeddings, weights."""
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        report = _to_folder(system, inputs, Path(folder), how, process)
        if not report.embedded:
            raise ValueError(
                f"none of {len(report.problems)} utterances could be embedded, {out} is not written: "
                f"{'; '.join(problem.reason for problem in report.problems[:LISTED])}"
            )
        ids, embeddings = read_embeddings(folder)

    def write(file: Path):
        with file.open("wb") as opened:  # given a path, numpy would append a suffix
            np.savez(opened, ids=np.array(ids), embeddings=embeddings, weights=np.array(system.weights))

    replace_file(out, write)
    return report
