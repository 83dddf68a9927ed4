"""`mrl-redimnet robustness`: how much more a model errs when its audio is worse."""

import argparse
from pathlib import Path

from mrl_redimnet.robustness import (
    PERTURBATIONS,
    RESAMPLES,
    format_numbers,
    heat_map,
    make_grid,
    robustness,
    save_reports,
)
from mrl_redimnet.systems import System
from mrl_redimnet.trials import FORMATS, read_trials

REPORT, PICTURE = "robustness.json", "robustness.png"


def add_robustness_command(commands):
    """Adds the subcommand to `commands` of an argument parser."""
    parser = commands.add_parser("robustness", help="relative EER change under noise, rooms, codecs, cuts ...")
    parser.add_argument("model", help="path or Hub id")
    parser.add_argument("--trials", type=Path, required=True, help="a list such as `1|0 path path`, see --format")
    parser.add_argument("--folder", type=Path, required=True, help="what the paths are relative to")
    parser.add_argument("--format", choices=["auto", *FORMATS], default="auto", help="of the list [what it looks like]")
    parser.add_argument("--enrolments", type=Path, metavar="FILE", help="`name path ...`: utterances of each enrolment")
    parser.add_argument("--suffix", help="replaces that of every path, such as .flac")
    parser.add_argument("--adapter", help="path or Hub id of an adapter to put on the model")
    parser.add_argument("--dims", type=int, nargs="+", help="prefixes to report [the model's own]")
    add_grid_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"where {REPORT} and {PICTURE} are written")
    parser.set_defaults(run=_robustness)


def add_grid_arguments(parser: argparse.ArgumentParser):
    """The options of the grid, the bootstrap and the seed, which `grid_of` and `robustness` take."""
    parser.add_argument("--noise", type=Path, metavar="AUDIO_DIR", help="noise files [white noise alone]")
    parser.add_argument(
        "--noise-types", nargs="*", metavar="SUBFOLDER", help="sub-folders of the noise to tell apart; none named: all"
    )
    parser.add_argument("--perturbations", nargs="+", metavar="NAME", help=f"of {', '.join(PERTURBATIONS)} [all]")
    parser.add_argument("--quick-grid", action="store_true", help="only the worst level of each perturbation")
    parser.add_argument(
        "--resamples", type=int, default=RESAMPLES, help=f"of the intervals over speakers, 0 for none [{RESAMPLES}]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the perturbations [0]")


def grid_of(arguments: argparse.Namespace):
    """The grid that the options of `add_grid_arguments` describe; errors as of `make_grid`."""
    return make_grid(arguments.noise, arguments.noise_types, arguments.perturbations, arguments.quick_grid)


def _robustness(arguments):
    grid = grid_of(arguments)
    trials = read_trials(arguments.trials, arguments.format, arguments.enrolments, arguments.suffix)
    if arguments.out is not None:  # before the minutes of measuring, not after them
        if arguments.out.exists() and not arguments.out.is_dir():
            raise NotADirectoryError(f"--out: {arguments.out} is not a folder.")
        arguments.out.mkdir(parents=True, exist_ok=True)
    system = System.load(arguments)
    report = robustness(
        system.model,
        trials,
        arguments.folder,
        grid,
        arguments.dims,
        arguments.resamples,
        arguments.seed,
        system.name if system.adapter is None else f"{system.name} + {system.adapter}",
        progress="conditions",
    )
    print(format_numbers(report))
    print(f"{len(grid)} conditions, {report.trials:,} trials of {report.utterances:,} utterances.")
    for side, what in (("test", "test side alone"), ("both", "enrolment and test")):
        row = report.number(side, max(report.dims))
        print(f"Robustness, {what} perturbed, {row.dim} dimensions: {100 * row.change:+.0f} % EER{_interval(row)}.")
    if arguments.out is not None:
        save_reports([report], arguments.out / REPORT)
        heat_map([report], arguments.out / PICTURE)
        print(f"Written: {arguments.out / REPORT}, {arguments.out / PICTURE}.")


def _interval(row) -> str:
    return "" if row.change_low is None else f" [{100 * row.change_low:+.0f}, {100 * row.change_high:+.0f}]"
