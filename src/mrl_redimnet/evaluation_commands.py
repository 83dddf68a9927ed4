"""`mrl-redimnet evaluate | calibrate`: from trial lists to error rates, pictures and thresholds.

Whatever the number of trial lists and dimensions, each utterance is embedded once: lists that name the same path mean
the same file.
"""

import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mrl_redimnet.audio.domains import make_domain
from mrl_redimnet.evaluation.groups import read_groups_for
from mrl_redimnet.evaluation.measures import ScoredList
from mrl_redimnet.evaluation.page import (
    Table,
    as_json,
    counts_text,
    decisions_table,
    groups_table,
    refuse_other_folder,
    results_table,
    text_of,
    write_page,
)
from mrl_redimnet.evaluation.results import check_present
from mrl_redimnet.files import replace_file, replace_text
from mrl_redimnet.scoring.calibration import THRESHOLDS_FILE, Threshold, Thresholds
from mrl_redimnet.scoring.scorers import Scorer, by_enrolments, with_enrolments
from mrl_redimnet.scoring.trials import Trials, read_trials
from mrl_redimnet.systems import Material, System, check_output


def read_lists(arguments) -> dict[str, Trials]:
    """The trial lists of --trials by their names; FileNotFoundError where utterances are not there."""
    lists = {
        name: read_trials(file, arguments.format, arguments.enrolments, arguments.suffix)
        for name, file in zip(list_names(arguments.trials), arguments.trials, strict=True)
    }
    for trials in lists.values():
        check_present(trials, arguments.folder)
    return lists


def list_names(files: Sequence[Path]) -> list[str]:
    """The files' names without suffix, with as many of the folders above them as tell them apart."""
    paths = [file.resolve().with_suffix("").parts for file in files]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"--trials: a list is given twice: {', '.join(map(str, files))}.")


def _domain(arguments) -> Callable | None:
    return None if arguments.domain == "clean" else make_domain(arguments.domain, noise=arguments.noise)


# ---------------------------------------------------------------- evaluate


def evaluate(arguments):
    """`mrl-redimnet evaluate`."""
    _check_evaluation(arguments)
    lists, domain = read_lists(arguments), _domain(arguments)
    group_of = arguments.groups and read_groups_for(lists.values(), arguments.groups, arguments.group_column)
    system = System.load(arguments)
    dims = system.dims(arguments.dims)
    scorer, material = system.scorer(arguments, domain), Material.load(system, lists.values(), arguments.folder, domain)
    saved = _saved(arguments, system, lists, dims, scorer)
    scored = {name: _scored(material, trials, dims, scorer, saved[name]) for name, trials in lists.items()}
    report = {
        "conditions": _conditions(arguments, system, scorer),
        "lists": {name: _record(each, name, arguments, group_of) for name, each in scored.items()},
    }
    for name, record in report["lists"].items():
        print(f"{name}: {counts_text(record)}")
        table = results_table(record, arguments.priors, ["eer", *(f"min_dcf_{p:g}" for p in arguments.priors)])
        print(text_of(table), end="\n\n")
        whole = {**record, "groups": [row for row in record.get("groups", []) if row["dim"] == dims[-1]]}
        for more in (decisions_table(record), groups_table(whole)):  # the groups at all dimensions fill a page
            if more.rows:
                print(text_of(more), end="\n\n")
    _write_results(arguments, report, scored)


def _check_evaluation(arguments):
    """Refuses what would otherwise fail after the embedding."""
    check_output(arguments.json)
    check_output(arguments.scores, (".tsv", ".npz"))
    if arguments.page is not None:
        refuse_other_folder(arguments.page)
    if wrong := [prior for prior in arguments.priors if not 0 < prior < 1]:
        raise ValueError(f"--priors: {wrong} are not between 0 and 1 (both excluded).")
    if arguments.resamples < 0:
        raise ValueError(f"--resamples: got {arguments.resamples}, expected at least 0.")


def _saved(
    arguments, system: System, lists: dict[str, Trials], dims: Sequence[int], scorer: Scorer
) -> dict[str, dict[int, Threshold]]:
    """Of each list, the thresholds beside the model that are for these weights and for as many enrolment utterances as
    the list has, by dimension; a note on the screen where there are none."""
    thresholds, found = system.thresholds(arguments.thresholds, arguments.model), {name: {} for name in lists}
    notes = []
    for name, trials in lists.items() if thresholds else ():
        counts = list(by_enrolments(trials))
        if len(counts) > 1:
            notes.append(
                f"{name} averages {counts[0]} to {counts[-1]} enrolment utterances: no saved threshold is for it"
            )
            continue
        try:
            for dim in dims:
                found[name][dim] = thresholds.find(dim, system.adapter, scorer, system.weights, counts[0])
        except ValueError as error:
            notes.append(str(error))
    for note in dict.fromkeys(notes):
        print(f"Note: {note}", file=sys.stderr)
    return found


def _scored(
    material: Material, trials: Trials, dims: Sequence[int], scorer: Scorer, saved: dict[int, Threshold]
) -> ScoredList:
    scores = {dim: material.scores(trials, dim, scorer) for dim in dims}
    timed = any(threshold.calibration.uses_seconds for threshold in saved.values())
    return ScoredList(trials, scores, saved, material.seconds(trials) if timed else None)


def _conditions(arguments, system: System, scorer: Scorer) -> dict:
    """What was evaluated and how, for the report."""
    return {
        "command": shlex.join(["mrl-redimnet", *arguments.command_line]),
        "model": system.name,
        "weights": system.weights,
        "adapter": system.adapter,
        "domain": arguments.domain,
        "scoring": str(scorer),
        "priors": arguments.priors,
        "resamples": arguments.resamples,
        "version": version("mrl-redimnet"),
    }


def _record(scored: ScoredList, name: str, arguments, group_of: dict[str, str] | None) -> dict:
    """One list's part of the report."""
    resamples = arguments.resamples
    counts = scored.counts()
    if counts["speakers"] is None and resamples:
        resamples = 0
        print(f"Note: {name} does not tell whose speech is whose: no intervals over speakers.", file=sys.stderr)
    dims = tqdm(scored.scores, desc=f"measuring {name}", leave=False, disable=None)
    record = {**counts, "rows": [scored.row(dim, arguments.priors, resamples) for dim in dims]}
    if group_of is not None:
        record["groups"] = scored.groups(group_of, resamples)
    return record


def _write_results(arguments, report: dict, scored: dict[str, ScoredList]):
    if arguments.json is not None:
        replace_text(arguments.json, as_json(report))
    if arguments.scores is not None:
        replace_file(arguments.scores, lambda file: _write_scores(file, arguments.scores.suffix, scored))
    if arguments.page is not None:
        write_page(arguments.page, report, scored)
    page = arguments.page and arguments.page / "index.html"
    if written := [str(path) for path in (arguments.json, arguments.scores, page) if path is not None]:
        print(f"Written: {', '.join(written)}.")


def _write_scores(file: Path, suffix: str, lists: dict[str, ScoredList]):
    """list, label, enrol, test and a score per dimension of every trial: lines behind a heading, or arrays."""
    columns = {
        "list": np.concatenate([np.full(len(each.trials), name) for name, each in lists.items()]),
        "label": np.concatenate([each.trials.labels for each in lists.values()]),
        "enrol": np.concatenate([each.trials.enrol for each in lists.values()]),
        "test": np.concatenate([each.trials.test for each in lists.values()]),
    }
    dims = list(next(iter(lists.values())).scores)
    scores = np.column_stack([np.concatenate([each.scores[dim] for each in lists.values()]) for dim in dims])
    if suffix == ".npz":
        with file.open("wb") as opened:
            np.savez_compressed(opened, **columns, dims=dims, scores=scores)
        return
    with file.open("w", encoding="utf-8") as opened:
        print(*columns, *dims, sep="\t", file=opened)
        for *told, row in zip(*columns.values(), scores, strict=True):
            print(*told, *(f"{value:.8f}" for value in row), sep="\t", file=opened)


# ---------------------------------------------------------------- calibrate


def calibrate(arguments):
    """`mrl-redimnet calibrate`."""
    out = arguments.out or Path(arguments.model)
    if not out.is_dir():
        raise FileNotFoundError(f"{out} is not a folder: give --out, a folder for {THRESHOLDS_FILE}.")
    if not 0 < arguments.false_accept < 1:
        raise ValueError(f"--false-accept: got {arguments.false_accept}, expected a rate between 0 and 1.")
    thresholds = Thresholds.load(out) if (out / THRESHOLDS_FILE).is_file() else Thresholds()
    counts, arguments.enrolments = _counts_or_file(arguments.enrolments)
    lists, domain = read_lists(arguments), _domain(arguments)
    parts = _by_count(lists, counts)
    system = System.load(arguments)
    dims = system.dims(arguments.dims)
    scorer, material = system.scorer(arguments, domain), Material.load(system, lists.values(), arguments.folder, domain)
    spoken = " + ".join(lists) + ("" if domain is None else f" as {arguments.domain}")
    entries, problems = [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for count, trials in parts.items():
            try:
                entries += _entries(arguments, system, scorer, material, dims, spoken, count, trials)
            except ValueError as error:
                if counts or len(parts) == 1:  # else the list's own enrolments: some numbers of utterances are rare
                    raise
                problems.append(f"no threshold for {count} enrolment utterances: {error}")
    if not entries:
        raise ValueError("; ".join(problems))
    for entry in entries:
        thresholds.put(entry)
    thresholds.save(out)
    print(text_of(_entries_table(entries)))
    for message in dict.fromkeys([*(str(warning.message) for warning in caught), *problems]):
        print(f"Note: {message}.")
    print(f"Written: {out / THRESHOLDS_FILE}, {len(thresholds.entries)} thresholds; `mrl-redimnet verify` uses them.")


def _counts_or_file(values: Sequence[str]) -> tuple[list[int], Path | None]:
    """--enrolments of `calibrate`: numbers of utterances, or the file that says which ones each enrolment has."""
    if len(values) == 1 and not values[0].isdecimal():
        return [], Path(values[0])
    if wrong := [value for value in values if not value.isdecimal() or int(value) < 1]:
        raise ValueError(f"--enrolments: got {', '.join(wrong)}, expected numbers from 1 on, or one file.")
    return sorted(set(map(int, values))), None


def _by_count(lists: dict[str, Trials], counts: Sequence[int]) -> dict[int, list[Trials]]:
    """The trials by the number of enrolment utterances: averages made for `counts`, without counts the lists' own."""
    parts: dict[int, list[Trials]] = {}
    for name, trials in lists.items():
        made = {count: with_enrolments(trials, count) for count in counts} if counts else by_enrolments(trials)
        for count, each in made.items():
            parts.setdefault(count, []).append(each)
            if len(each) == 0:
                raise ValueError(f"--enrolments {count}: no speaker of {name} has so many utterances beside a test.")
            if counts and len(each) < len(trials):
                dropped = len(trials) - len(each)
                print(f"Note: {dropped:,} of {len(trials):,} trials of {name} have too few utterances for {count}.")
    return parts


def _entries(
    arguments,
    system: System,
    scorer: Scorer,
    material: Material,
    dims: Sequence[int],
    spoken: str,
    count: int,
    trials: Sequence[Trials],
) -> list[Threshold]:
    """Thresholds at every dimension for averages of `count` enrolment utterances. Errors as in `Threshold.fit`."""
    labels = np.concatenate([each.labels for each in trials])
    seconds = np.concatenate([material.seconds(each) for each in trials]) if arguments.durations else None
    return [
        Threshold.fit(
            np.concatenate([material.scores(each, dim, scorer) for each in trials]),
            labels,
            wanted=arguments.false_accept,
            dim=dim,
            weights=system.weights,
            trials=spoken,
            adapter=system.adapter,
            scorer=scorer,
            seconds=seconds,
            enrolments=count,
        )
        for dim in dims
    ]


def _entries_table(entries: Sequence[Threshold]) -> Table:
    rows = [
        [
            str(entry.dim),
            str(entry.enrolments),
            f"{entry.threshold:.4f}" + (" (LLR)" if entry.calibration.uses_seconds else ""),
            *(f"{100 * rate:.2f}" for rate in (entry.wanted, entry.false_accepts, entry.misses)),
            f"{entry.impostors:,}",
            f"{entry.targets:,}",
        ]
        for entry in entries
    ]
    columns = [
        *("dimensions", "enrolled utterances", "threshold", "false accepts wanted %", "measured %", "misses %"),
        *("impostors", "targets"),
    ]
    return Table(columns, rows)
