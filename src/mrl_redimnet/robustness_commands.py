"""`mrl-redimnet robustness`: how much more a model errs when its audio is worse."""

import argparse

from mrl_redimnet.evaluation.robustness import format_numbers, heat_map, make_grid, robustness, save_reports
from mrl_redimnet.scoring.trials import read_trials
from mrl_redimnet.systems import System

REPORT, PICTURE = "robustness.json", "robustness.png"


def grid_of(arguments: argparse.Namespace):
    """The grid that the command line describes; errors as of `make_grid`."""
    return make_grid(arguments.noise, arguments.noise_types, arguments.perturbations, arguments.quick_grid)


def measure(arguments):
    """`mrl-redimnet robustness`."""
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
