"""`mrl-redimnet evaluate`: error rates of trial lists at every dimension."""

import argparse
import shlex
import sys
from pathlib import Path

from mrl_redimnet_cli.arguments import (
    Commands,
    add_command,
    add_dims,
    add_enrolments,
    add_lists,
    add_model,
    add_scoring,
    add_thresholds,
    check_scoring,
    domain_of,
    file,
    load_encoder,
    must_be_there,
)


def add(commands: Commands) -> None:
    """Adds the command to the subparsers `commands`."""
    parser = add_command(
        commands,
        "evaluate",
        run,
        help="measure error rates of trial lists at every dimension, as a table, as JSON and as a page with pictures",
    )
    add_model(parser)
    add_lists(parser)
    add_enrolments(parser)
    add_scoring(parser)
    add_thresholds(parser)
    add_dims(parser, "report")
    parser.add_argument(
        "--priors",
        type=float,
        nargs="+",
        default=[0.01, 0.05],
        help="prior probabilities of a target trial, for the detection costs [0.01 0.05]",
    )
    parser.add_argument(
        "--resamples",
        type=int,
        default=1000,
        help="number of bootstrap samples of speakers for the 95 %% intervals, 0 for no intervals [1000]",
    )
    parser.add_argument(
        "--groups",
        type=Path,
        metavar="CSV",
        help="groups of speakers, for error rates of each: a table with the columns speaker (or path) and "
        "--group-column",
    )
    parser.add_argument("--group-column", default="gender", help="the column that names the groups [gender]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    parser.add_argument(
        "--page", type=Path, metavar="FOLDER", help="write index.html with tables and pictures to this folder"
    )
    parser.add_argument(
        "--scores", type=Path, metavar="FILE", help="write the scores of all trials to this file, .tsv or .npz"
    )
    must_be_there(parser, groups=file)


def run(arguments: argparse.Namespace) -> None:
    """Prints the tables, and writes what is asked for."""
    from mrl_redimnet.audio.waveforms import into_domain
    from mrl_redimnet.evaluation.groups import read_groups_for
    from mrl_redimnet.evaluation.lists import EmbeddedSpeech, read_lists, report_of, saved_thresholds, score_lists
    from mrl_redimnet.evaluation.page import counts_text, decisions_table, groups_table, results_table, text_of

    _check(arguments)
    lists = read_lists(arguments.trials, arguments.folder, arguments.format, arguments.enrolments, arguments.suffix)
    domain = domain_of(arguments)
    group_of = arguments.groups and read_groups_for(lists.values(), arguments.groups, arguments.group_column)
    encoder = load_encoder(arguments)
    dims = encoder.dims(arguments.dims)
    prepare = into_domain(arguments.cohort, domain)
    scorer = encoder.scorer(
        arguments.scoring, arguments.cohort, arguments.top, prepare, progress="embedding the cohort"
    )
    speech = EmbeddedSpeech.of(encoder, lists.values(), arguments.folder, domain, progress="embedding")
    saved, notes = saved_thresholds(encoder, encoder.thresholds(arguments.thresholds), lists, dims, scorer)
    _print_notes(notes)
    scored = score_lists(speech, lists, dims, scorer, saved)
    report, notes = report_of(
        encoder,
        scored,
        scorer,
        arguments.priors,
        arguments.resamples,
        command=shlex.join(["mrl-redimnet", *arguments.command_line]),
        domain=arguments.domain,
        group_of=group_of,
    )
    _print_notes(notes)
    for name, record in report["lists"].items():
        print(f"{name}: {counts_text(record)}")
        table = results_table(record, arguments.priors, ["eer", *(f"min_dcf_{p:g}" for p in arguments.priors)])
        print(text_of(table), end="\n\n")
        whole = {**record, "groups": [row for row in record.get("groups", []) if row["dim"] == dims[-1]]}
        for more in (decisions_table(record), groups_table(whole)):  # the groups at all dimensions fill a page
            if more.rows:
                print(text_of(more), end="\n\n")
    _write(arguments, report, scored)


def _check(arguments: argparse.Namespace):
    """Refuses what would otherwise fail after the embedding."""
    from mrl_redimnet.evaluation.page import refuse_other_folder
    from mrl_redimnet.files import check_output

    check_output(arguments.json)
    check_output(arguments.scores, (".tsv", ".npz"))
    if arguments.page is not None:
        refuse_other_folder(arguments.page)
    if wrong := [prior for prior in arguments.priors if not 0 < prior < 1]:
        raise ValueError(f"--priors: {wrong} are not between 0 and 1 (both excluded).")
    if arguments.resamples < 0:
        raise ValueError(f"--resamples: got {arguments.resamples}, expected at least 0.")
    check_scoring(arguments)


def _print_notes(notes: list[str]):
    for note in notes:
        print(f"Note: {note}", file=sys.stderr)


def _write(arguments: argparse.Namespace, report: dict, scored: dict):
    from mrl_redimnet.evaluation.lists import write_scores
    from mrl_redimnet.evaluation.page import as_json, write_page
    from mrl_redimnet.files import replace_text

    if arguments.json is not None:
        replace_text(arguments.json, as_json(report))
    if arguments.scores is not None:
        write_scores(arguments.scores, scored)
    if arguments.page is not None:
        write_page(arguments.page, report, scored)
    page = arguments.page and arguments.page / "index.html"
    if written := [str(path) for path in (arguments.json, arguments.scores, page) if path is not None]:
        print(f"Written: {', '.join(written)}.")
