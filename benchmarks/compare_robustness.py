"""How robust adapters, fine-tuned models and their base are: the same perturbed audio, every system, every dimension.

    python benchmarks/compare_robustness.py BASE --speech ROOT --out docs/results/robustness \
        --systems "telephony, linear=RUN/best" "telephony, full=RUN/best_as_trained" ...

ROOT holds test/wav, test/trials_*.txt and noise/test. Every utterance is perturbed once per condition and embedded once
by each system. The measure is that of `mrl_redimnet.evaluation.robustness`; intervals and differences come from one
bootstrap over speakers, so a difference's interval is paired. Writes OUT.json, OUT.md and OUT.png. To try it in a
minute: `--quick-grid --limit-utterances-per-speaker 4 --resamples 50`.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from compare_adapters import load, machine, trial_lists

from mrl_redimnet.evaluation.robustness import (
    ALL,
    SIDES,
    DifferenceRow,
    RobustnessReport,
    compare,
    heat_map,
    save_reports,
)
from mrl_redimnet.files import replace_file
from mrl_redimnet.scoring.trials import Trials, speaker_of
from mrl_redimnet.tables import markdown_table
from mrl_redimnet_cli.robustness import add_grid, grid_of

TITLES = {"test": "The test side alone perturbed", "both": "Enrolment and test perturbed"}


def main():
    """Embeds, scores, writes."""
    arguments = parse()
    arguments.noise = arguments.noise or arguments.speech / "noise" / "test"
    grid, trials = grid_of(arguments), chosen_trials(arguments)
    sources = {"base": None, **dict(pair.split("=", 1) for pair in arguments.systems)}
    if arguments.against not in sources:
        raise SystemExit(f"--against: {arguments.against!r} is none of {', '.join(sources)}.")
    sources = {arguments.against: sources[arguments.against], **sources}  # differences are to the first
    models = {name: load(arguments.base, source)[0].eval() for name, source in sources.items()}
    began, folder = time.time(), arguments.speech / "test" / "wav"
    reports, differences = compare(
        models, trials, folder, grid, arguments.dims, arguments.resamples, arguments.seed, progress="conditions"
    )
    text = report(reports, differences, arguments.list)
    save_reports(reports, arguments.out.with_suffix(".json"), differences)
    replace_file(arguments.out.with_suffix(".md"), lambda file: file.write_text(text, encoding="utf-8"))
    heat_map(reports, arguments.out.with_suffix(".png"))
    print(text)
    print(f"{len(grid)} conditions, {len(models)} systems: {time.time() - began:.0f} s.")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="path or Hub id")
    parser.add_argument("--speech", type=Path, required=True)
    parser.add_argument("--systems", nargs="+", default=[], metavar="NAME=FOLDER", help="adapters, or whole models")
    parser.add_argument("--against", default="base", metavar="NAME", help="what differences are to [base]")
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    parser.add_argument("--list", default="both lists", help="the name of a trial list, without trials_ [both lists]")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--limit-utterances-per-speaker", type=int, metavar="N", help="only the first N of each")
    add_grid(parser)
    return parser.parse_args()


def chosen_trials(arguments: argparse.Namespace) -> Trials:
    """The trials of the list, or those of every speaker's first utterances."""
    lists = trial_lists(arguments.speech)
    if arguments.list not in lists:
        raise SystemExit(f"--list: {arguments.list!r} is none of {', '.join(lists)}.")
    trials = lists[arguments.list]
    if arguments.limit_utterances_per_speaker is None:
        return trials
    kept, counts = set(), {}
    for path in trials.utterances:
        counts[speaker_of(path)] = counts.get(speaker_of(path), 0) + 1
        if counts[speaker_of(path)] <= arguments.limit_utterances_per_speaker:
            kept.add(path)
    rows = [i for i, sides in enumerate(zip(trials.enrol, trials.test, strict=True)) if kept.issuperset(sides)]
    return Trials(trials.labels[rows], [trials.enrol[i] for i in rows], [trials.test[i] for i in rows])


def report(reports: Sequence[RobustnessReport], differences: Sequence[DifferenceRow], name: str) -> str:
    """Markdown: per side and dimension, the systems' numbers and how they differ from the first's."""
    first = reports[0]
    conditions = len({row.condition for row in first.points})
    text = [
        f"Relative EER change in % under {conditions} conditions (`mrl_redimnet.evaluation.robustness` defines it), "
        f"{first.trials:,} trials of {first.utterances} utterances ({name}). Brackets: 95 % intervals over speakers "
        f"({first.resamples} resamples). Differences are to {first.system}, paired and **bold** where the interval "
        f"excludes zero: of the mean EER, and by how many % more the errors grow. {machine()}."
    ]
    for side in SIDES:
        for dim in first.dims:
            of_side = [row for row in differences if (row.side, row.dim) == (side, dim)]
            text += ["", f"### {TITLES[side]}, {dim} dimensions", "", table(reports, of_side, side, dim)]
    return "\n".join(text) + "\n"


def table(reports: Sequence[RobustnessReport], differences: Sequence[DifferenceRow], side: str, dim: int) -> str:
    """A line per system: EERs, the one number and its parts, and the differences of number and mean EER."""
    kinds = [row.kind for row in reports[0].numbers if (row.side, row.dim) == (side, dim) and row.kind != ALL]
    lines = [["system", "clean EER %", "mean perturbed EER %", "difference", "the number", "difference", *kinds]]
    less = {row.system: row for row in differences if row.kind == ALL}
    for each in reports:
        row, other = each.number(side, dim), less.get(each.system)
        clean = next(clean.eer for clean in each.clean if clean.dim == dim)
        cells = [each.system, f"{100 * clean:.2f}", interval(row, "eer", 2, "")]
        cells += ["" if other is None else change(other, "eer", 2), interval(row, "change", 0, "+")]
        cells += ["" if other is None else change(other, "change", 0)]
        lines.append(cells + [f"{100 * each.number(side, dim, kind).change:+.0f}" for kind in kinds])
    return markdown_table(lines)


def interval(row, name: str, digits: int, sign: str) -> str:
    """A value in % and, where it is known, its interval."""
    value, low, high = (getattr(row, f"{name}{end}") for end in ("", "_low", "_high"))
    text = f"{100 * value:{sign}.{digits}f}"
    return text if low is None else f"{text} [{100 * low:{sign}.{digits}f}, {100 * high:{sign}.{digits}f}]"


def change(row: DifferenceRow, name: str, digits: int) -> str:
    """A difference, bold where its interval excludes zero."""
    low, high = getattr(row, f"{name}_low"), getattr(row, f"{name}_high")
    text = interval(row, name, digits, "+")
    return f"**{text}**" if low is not None and np.sign(low) * np.sign(high) > 0 else text


if __name__ == "__main__":
    main()
