"""`mrl-redimnet robustness`: how much more a model errs when its audio is worse."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mrl_redimnet_cli.arguments import (
    Commands,
    add_command,
    add_dims,
    add_enrolments,
    add_model,
    add_paths_of_lists,
    folder,
    load_encoder,
    must_be_there,
)
from mrl_redimnet_cli.names import CHOICES, VALUES

if TYPE_CHECKING:
    from mrl_redimnet.evaluation.robustness import Condition


def add(commands: Commands) -> None:
    """Adds the command to the subparsers `commands`."""
    report, picture = VALUES["evaluation.robustness.REPORT"], VALUES["evaluation.robustness.PICTURE"]
    parser = add_command(
        commands, "robustness", run, help="measure how much the EER grows under noise, rooms, codecs, cuts and the like"
    )
    add_model(parser)
    parser.add_argument(
        "--trials", type=Path, required=True, help="a trial list, of lines such as `1|0 path path`, see --format"
    )
    add_paths_of_lists(parser)
    add_enrolments(parser)
    add_dims(parser, "report")
    add_grid(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help=f"the folder in which {report} and {picture} are written"
    )


def add_grid(parser: argparse.ArgumentParser) -> None:
    """The options of the grid, the bootstrap and the seed, which `grid_of` takes."""
    names, resamples = CHOICES["evaluation.robustness.PERTURBATIONS"], VALUES["evaluation.robustness.RESAMPLES"]
    parser.add_argument(
        "--noise", type=Path, metavar="AUDIO_DIR", help="noise files to add [none: white noise alone is added]"
    )
    parser.add_argument(
        "--noise-types",
        nargs="*",
        metavar="SUBFOLDER",
        help="sub-folders of --noise that are reported separately; without names: all of them",
    )
    parser.add_argument(
        "--perturbations", nargs="+", choices=names, metavar="NAME", help=f"some of {', '.join(names)} [all]"
    )
    parser.add_argument("--quick-grid", action="store_true", help="only the worst level of each perturbation")
    parser.add_argument(
        "--resamples",
        type=int,
        default=resamples,
        help=f"number of bootstrap samples of speakers for the 95 %% intervals, 0 for no intervals [{resamples}]",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the perturbations [0]")
    must_be_there(parser, noise=folder)


def grid_of(arguments: argparse.Namespace) -> "list[Condition]":
    """The grid that the command line describes; errors as of `make_grid`."""
    from mrl_redimnet.evaluation.robustness import make_grid

    return make_grid(arguments.noise, arguments.noise_types, arguments.perturbations, arguments.quick_grid)


def run(arguments: argparse.Namespace) -> None:
    """Prints the table of all kinds and the one number of each side, and writes the report and its picture."""
    from mrl_redimnet.evaluation.robustness import (
        PICTURE,
        REPORT,
        format_numbers,
        heat_map,
        robustness,
        save_reports,
    )
    from mrl_redimnet.scoring.trials import read_trials

    grid = grid_of(arguments)
    trials = read_trials(arguments.trials, arguments.format, arguments.enrolments, arguments.suffix)
    if arguments.out is not None:  # before the minutes of measuring, not after them
        if arguments.out.exists() and not arguments.out.is_dir():
            raise NotADirectoryError(f"--out: {arguments.out} is not a folder.")
        arguments.out.mkdir(parents=True, exist_ok=True)
    encoder = load_encoder(arguments)
    report = robustness(
        encoder.model,
        trials,
        arguments.folder,
        grid,
        arguments.dims,
        arguments.resamples,
        arguments.seed,
        encoder.name if encoder.adapter is None else f"{encoder.name} + {encoder.adapter}",
        progress="conditions",
    )
    print(format_numbers(report))
    print(f"{len(grid)} conditions, {report.trials:,} trials of {report.utterances:,} utterances.")
    for side, what in (("test", "test side alone"), ("both", "enrolment and test")):
        row = report.number(side, max(report.dims))
        interval = ""
        if row.change_low is not None and row.change_high is not None:
            interval = f" [{100 * row.change_low:+.0f}, {100 * row.change_high:+.0f}]"
        print(f"Robustness, {what} perturbed, {row.dim} dimensions: {100 * row.change:+.0f} % EER{interval}.")
    if arguments.out is not None:
        save_reports([report], arguments.out / REPORT)
        heat_map([report], arguments.out / PICTURE)
        print(f"Written: {arguments.out / REPORT}, {arguments.out / PICTURE}.")
