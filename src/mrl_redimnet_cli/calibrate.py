"""`mrl-redimnet calibrate`: thresholds for a false-accept rate, saved beside the model."""

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

from mrl_redimnet_cli.arguments import (
    Commands,
    add_command,
    add_dims,
    add_lists,
    add_model,
    add_scoring,
    check_scoring,
    domain_of,
    folder,
    load_encoder,
    must_be_there,
)
from mrl_redimnet_cli.names import VALUES


def add(commands: Commands) -> None:
    """Adds the command to the subparsers `commands`."""
    thresholds = VALUES["scoring.calibration.THRESHOLDS_FILE"]
    parser = add_command(
        commands,
        "calibrate",
        run,
        help="set thresholds for a false-accept rate, one per dimension, and save them beside the model",
    )
    add_model(parser)
    add_lists(parser)
    parser.add_argument(
        "--enrolments",
        nargs="+",
        metavar="N|FILE",
        default=["1"],
        help="thresholds for 1, 2 ... averaged enrolment utterances, drawn among the list's by speaker, such as "
        "`--enrolments 1 2 3` [1]; or a file as `evaluate` takes it: `name path ...`, utterances of each enrolment",
    )
    add_scoring(parser)
    add_dims(parser, "calibrate")
    parser.add_argument(
        "--false-accept", type=float, default=0.01, metavar="RATE", help="share of the impostors to accept [0.01]"
    )
    parser.add_argument(
        "--durations",
        action="store_true",
        help="let calibration and threshold depend on how long both sides are: the speech is also cut to lengths from "
        "0.5 to 4 s, and each trial counts twice, whole and cut",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help=f"the folder in which {thresholds} is written [the model's folder]"
    )
    must_be_there(parser, out=folder)


def run(arguments: argparse.Namespace) -> None:
    """Sets the thresholds, prints them and saves them with those that were there before."""
    from mrl_redimnet.audio.waveforms import into_domain
    from mrl_redimnet.evaluation.lists import EmbeddedSpeech, by_enrolment_count, fit_thresholds, read_lists
    from mrl_redimnet.evaluation.page import text_of, thresholds_table
    from mrl_redimnet.scoring.calibration import THRESHOLDS_FILE, Thresholds

    out = arguments.out or Path(arguments.model)
    if not out.is_dir():
        raise FileNotFoundError(f"{out} is not a folder: give --out, a folder for {THRESHOLDS_FILE}.")
    if arguments.depth is not None and arguments.out is None:
        raise ValueError(f"--depth: give --out, a folder of its own; {THRESHOLDS_FILE} in the model's is of the whole.")
    if not 0 < arguments.false_accept < 1:
        raise ValueError(f"--false-accept: got {arguments.false_accept}, expected a rate between 0 and 1.")
    check_scoring(arguments)
    thresholds = Thresholds.load(out) if (out / THRESHOLDS_FILE).is_file() else Thresholds()
    counts, enrolments = _counts_or_file(arguments.enrolments)
    lists = read_lists(arguments.trials, arguments.folder, arguments.format, enrolments, arguments.suffix)
    domain = domain_of(arguments)
    parts, notes = by_enrolment_count(lists, counts)
    for note in notes:
        print(f"Note: {note}")
    encoder = load_encoder(arguments)
    dims = encoder.dims(arguments.dims)
    prepare = into_domain(arguments.cohort, domain)
    scorer = encoder.scorer(
        arguments.scoring, arguments.cohort, arguments.top, prepare, progress="embedding the cohort"
    )
    speech = EmbeddedSpeech.of(encoder, lists.values(), arguments.folder, domain, progress="embedding")
    if arguments.durations:
        whole = len(speech.utterances)
        speech = speech.with_cuts(encoder, arguments.folder, domain, progress="embedding stretches")
        print(f"{len(speech.utterances) - whole:,} stretches were cut of {whole:,} utterances.")
    name = " + ".join(lists) + ("" if domain is None else f" as {arguments.domain}")
    entries, problems = [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for count, trials in parts.items():
            rate = arguments.false_accept
            given = dict(enrolments=count, false_accept=rate, name=name, durations=arguments.durations)
            try:
                entries += fit_thresholds(encoder, speech, trials, dims, scorer, **given)
            except ValueError as error:
                if counts or len(parts) == 1:  # else the list's own enrolments: some numbers of utterances are rare
                    raise
                problems.append(f"no threshold for {count} enrolment utterances: {error}")
    if not entries:
        raise ValueError("; ".join(problems))
    for entry in entries:
        thresholds.put(entry)
    thresholds.save(out)
    print(text_of(thresholds_table(entries)))
    for message in dict.fromkeys([*(str(warning.message) for warning in caught), *problems]):
        print(f"Note: {message}.")
    print(f"Written: {out / THRESHOLDS_FILE}, {len(thresholds.entries)} thresholds; `mrl-redimnet verify` uses them.")


def _counts_or_file(values: Sequence[str]) -> tuple[list[int], Path | None]:
    """--enrolments: numbers of utterances, or the file that says which ones each enrolment has."""
    if len(values) == 1 and not values[0].isdecimal():
        return [], Path(values[0])
    if wrong := [value for value in values if not value.isdecimal() or int(value) < 1]:
        raise ValueError(f"--enrolments: got {', '.join(wrong)}, expected numbers from 1 on, or one file.")
    return sorted(set(map(int, values))), None
