"""`mrl-redimnet evaluate | calibrate | robustness`."""

import argparse
from pathlib import Path

from mrl_redimnet_cli.arguments import (
    add_command,
    add_model,
    add_scoring,
    add_thresholds,
    file,
    folder,
    must_be_there,
    source,
)
from mrl_redimnet_cli.names import CHOICES, VALUES


def _add_lists(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--trials", type=Path, nargs="+", required=True, help="lists such as `1|0 path path`, see --format"
    )
    _add_paths_of_lists(parser)
    parser.add_argument("--domain", choices=sorted(CHOICES["domains.DOMAINS"]), default="clean",
                        help="what to make the audio sound like")  # fmt: skip
    parser.add_argument("--noise", type=Path, metavar="AUDIO_DIR", help="noise of the domain noisy")
    must_be_there(parser, noise=folder)


def _add_paths_of_lists(parser: argparse.ArgumentParser):
    """What lists are read with; --enrolments is added by the commands, which differ in what it may be."""
    formats = CHOICES["trials.FORMATS"]
    parser.add_argument("--folder", type=Path, required=True, help="what the paths are relative to")
    parser.add_argument("--format", choices=["auto", *formats], default="auto", help="of the lists [by their lines]")
    parser.add_argument("--suffix", help="replaces that of every path, such as .flac")
    must_be_there(parser, trials=file, folder=folder)


def _add_enrolments(parser: argparse.ArgumentParser):
    parser.add_argument("--enrolments", type=Path, metavar="FILE", help="`name path ...`: utterances of each enrolment")
    must_be_there(parser, enrolments=file)


def add_evaluate(commands):
    """Adds `evaluate` to the subparsers `commands`."""
    parser = add_command(
        commands, "evaluate", help="error rates of trial lists at every dimension: a table, JSON, a page of pictures"
    )
    add_model(parser)
    _add_lists(parser)
    _add_enrolments(parser)
    add_scoring(parser)
    add_thresholds(parser)
    parser.add_argument("--dims", type=int, nargs="+", help="prefixes to report [the model's own]")
    parser.add_argument(
        "--priors", type=float, nargs="+", default=[0.01, 0.05], help="of a target, for the costs [0.01 0.05]"
    )
    parser.add_argument("--resamples", type=int, default=1000, help="of the intervals, 0 for none [1000]")
    parser.add_argument("--groups", type=Path, metavar="CSV", help="columns speaker (or path) and --group-column")
    parser.add_argument("--group-column", default="gender", help="tell error rates of its values apart [gender]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    parser.add_argument("--page", type=Path, metavar="FOLDER", help="write index.html with tables and pictures")
    parser.add_argument("--scores", type=Path, metavar="FILE", help="write all scores, .tsv or .npz")
    must_be_there(parser, groups=file)
    parser.set_defaults(run="mrl_redimnet.evaluation_commands:evaluate")


def add_calibrate(commands):
    """Adds `calibrate` to the subparsers `commands`."""
    thresholds = VALUES["calibration.THRESHOLDS_FILE"]
    parser = add_command(commands, "calibrate", help="a threshold per dimension, saved beside the model")
    add_model(parser)
    _add_lists(parser)
    parser.add_argument(
        "--enrolments",
        nargs="+",
        metavar="N|FILE",
        default=["1"],
        help="thresholds for 1, 2 ... averaged enrolment utterances, drawn among the list's by speaker, such as "
        "`--enrolments 1 2 3` [1]; or a file as `evaluate` takes it: `name path ...`, utterances of each enrolment",
    )
    add_scoring(parser)
    parser.add_argument("--dims", type=int, nargs="+", help="prefixes to calibrate [the model's own]")
    parser.add_argument(
        "--false-accept", type=float, default=0.01, metavar="RATE", help="share of impostors to accept [0.01]"
    )
    parser.add_argument("--durations", action="store_true", help="let the calibration depend on both sides' seconds")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help=f"where {thresholds} is written [the model's folder]"
    )
    must_be_there(parser, out=folder)
    parser.set_defaults(run="mrl_redimnet.evaluation_commands:calibrate")


def add_robustness(commands):
    """Adds `robustness` to the subparsers `commands`."""
    report, picture = VALUES["robustness_commands.REPORT"], VALUES["robustness_commands.PICTURE"]
    parser = add_command(commands, "robustness", help="relative EER change under noise, rooms, codecs, cuts ...")
    parser.add_argument("model", help="path or Hub id")
    parser.add_argument("--trials", type=Path, required=True, help="a list such as `1|0 path path`, see --format")
    _add_paths_of_lists(parser)
    _add_enrolments(parser)
    parser.add_argument("--adapter", help="path or Hub id of an adapter to put on the model")
    parser.add_argument("--dims", type=int, nargs="+", help="prefixes to report [the model's own]")
    add_grid(parser)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"where {report} and {picture} are written")
    must_be_there(parser, model=source, adapter=source)
    parser.set_defaults(run="mrl_redimnet.robustness_commands:measure")


def add_grid(parser: argparse.ArgumentParser):
    """The options of the grid, the bootstrap and the seed, which `robustness_commands.grid_of` takes."""
    names, resamples = CHOICES["robustness.PERTURBATIONS"], VALUES["robustness.RESAMPLES"]
    parser.add_argument("--noise", type=Path, metavar="AUDIO_DIR", help="noise files [white noise alone]")
    parser.add_argument(
        "--noise-types", nargs="*", metavar="SUBFOLDER", help="sub-folders of the noise to tell apart; none named: all"
    )
    parser.add_argument(
        "--perturbations", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)} [all]"
    )
    parser.add_argument("--quick-grid", action="store_true", help="only the worst level of each perturbation")
    parser.add_argument(
        "--resamples", type=int, default=resamples, help=f"of the intervals over speakers, 0 for none [{resamples}]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the perturbations [0]")
    must_be_there(parser, noise=folder)
