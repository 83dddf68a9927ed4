"""Whether a calibration gains by knowing how long, loud and clean both sides are, and whether that tells errors.

    python benchmarks/quality_measures.py nano --develop TRIALS FOLDER --speech SPLIT ... --noise TRAIN TEST \
        --kept KEPT --out docs/results/quality_measures

The arguments are those of `durations.py`, which says what is heard. Every test trial gets a drawn class of duration for
each side, and noise for every second side; each development trial is drawn so eight times. Calibrations are fitted by
weighted logistic regression on the development trials, as `Calibration.fit` does it, and judged on the test trials:

    llr = offset + slope * score + a sum of (a * lower + b * higher value of a measure of both sides)

(Mandasari et al., IEEE TASLP 21(11), 2013; quality measure functions of Thienpondt et al., arXiv 2010.11255). With
"slope" the score also counts by the shorter side's log duration. An error is a wrong decision at an LLR of 0 of the
calibration by the score alone; "predicted" is a logistic regression of such errors on all measures.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from cut_speech import CLEAN, WHOLE, Heard
from durations import FAR, NEAR, command_line, hear_all, parse
from numpy.typing import NDArray
from paired import Drawn, change, mean
from scipy.special import logit
from sklearn.linear_model import LogisticRegression
from timing import machine

from mrl_redimnet.plotting import new_panels, save_figure, shades
from mrl_redimnet.scoring.metrics import act_dcf, auc, bootstrap_together, cllr, eer, min_cllr
from mrl_redimnet.tables import markdown_table

DIMS = (256,)
PRIOR = 0.01  # as `Calibration.fit` has it by default
REPEATS = 8
REJECTED = np.linspace(0.0, 0.8, 17)
METRICS = {"cllr": cllr, "min_cllr": min_cllr, "act_dcf": act_dcf, "eer": eer}
PLAIN = "score alone"
# What a calibration knows beside the score, by name.
SYSTEMS: dict[str, tuple[str, ...]] = {
    PLAIN: (),
    "seconds": ("seconds",),
    "seconds, slope": ("seconds", "slope"),
    "speech by level": ("speech",),
    "speech by Silero": ("silero",),
    "signal to noise": ("snr",),
    "norm": ("norm",),
    "seconds, signal to noise": ("seconds", "snr"),
    "seconds, signal to noise, norm": ("seconds", "snr", "norm"),
    "all": ("seconds", "speech", "silero", "snr", "norm", "slope"),
}
# Fitted on less: on the development trials as they are, or on ones that are cut but clean.
ON_WHOLE = {"score alone, set on whole speech": (), "seconds, set on whole speech": ("seconds",)}
ON_CUT = {
    "score alone, set on cut speech": (),
    "seconds, set on cut speech": ("seconds",),
    "seconds, slope, set on cut speech": ("seconds", "slope"),
    "speech by level, set on cut speech": ("speech",),
}
MEASURES = ("seconds", "speech", "silero", "snr", "norm")


@dataclass(frozen=True)
class Scored:
    """Trials with drawn conditions: scores and labels [T], speakers of both sides [T], measures {name: [T, 2]}."""

    scores: NDArray
    labels: NDArray
    speakers: tuple[NDArray, NDArray]
    measures: dict[str, NDArray]

    def columns(self, names: Sequence[str]) -> NDArray:
        """[T, F]: the score, and what the names stand for."""
        found = [self.scores]
        for name in names:
            if name == "slope":
                found.append(self.scores * self.measures["seconds"].min(axis=1))
            else:
                found += [self.measures[name].min(axis=1), self.measures[name].max(axis=1)]
        return np.stack(found, axis=1)


def scored(heard: Heard, dim: int, seed: int | None, noise: bool = True) -> Scored:
    """The trials in drawn conditions; seed None: as they are, whole and clean. noise: on every second side."""
    of_enrol, of_test = heard.trials.rows
    if seed is None:
        conditions = [(np.full(len(rows), CLEAN), np.full(len(rows), WHOLE)) for rows in (of_enrol, of_test)]
    else:
        rng = np.random.default_rng(seed)
        conditions = [drawn(heard, rows, rng, noise) for rows in (of_enrol, of_test)]
    sides = [(*condition, rows) for condition, rows in zip(conditions, (of_enrol, of_test), strict=True)]
    lengths = np.linalg.norm(heard.embeddings[..., :dim], axis=-1)
    values = {name: np.log(getattr(heard, name)) for name in ("seconds", "speech", "silero")}
    values |= {"snr": heard.snr, "norm": np.log(lengths)}
    measures = {name: np.stack([value[side] for side in sides], axis=1) for name, value in values.items()}
    return Scored(heard.scores(dim, *conditions), heard.trials.labels, heard.trials.speakers, measures)


def drawn(heard: Heard, rows: NDArray, rng: np.random.Generator, noise: bool) -> tuple[NDArray, NDArray]:
    """Noise or none, and the cut or the whole, of each of the utterances `rows` [T]."""
    cuts = heard.drawn(rows, rng)
    return rng.integers(2, size=len(rows)) * noise, cuts


def joined(parts: Sequence[Scored]) -> Scored:
    """One after the other."""
    speakers = tuple(np.concatenate([part.speakers[side] for part in parts]) for side in (0, 1))
    measures = {name: np.concatenate([part.measures[name] for part in parts]) for name in MEASURES}
    scores, labels = (np.concatenate([getattr(part, name) for part in parts]) for name in ("scores", "labels"))
    return Scored(scores, labels, speakers, measures)


def fit(columns: NDArray, labels: NDArray) -> Callable[[NDArray], NDArray]:
    """[T, F] -> natural-log likelihood ratios [T], by weighted logistic regression."""
    centre, scale = columns.mean(axis=0), columns.std(axis=0)
    weights = np.where(labels == 1, PRIOR / np.sum(labels == 1), (1 - PRIOR) / np.sum(labels == 0))
    regression = LogisticRegression(C=np.inf, max_iter=1000, tol=1e-8)
    regression.fit((columns - centre) / scale, labels, sample_weight=weights * len(labels))
    return lambda values: regression.decision_function((values - centre) / scale) - logit(PRIOR)


# ----------------------------------------------------------------------------------------------------------------------
# Calibrations


def main():
    """Parses the command line, measures, writes OUT.md, OUT.json and OUT.png."""
    arguments = parse(__doc__)
    develop, lists = hear_all(arguments)
    record = {"command": command_line(), "machine": machine(), "resamples": arguments.resamples}
    costs = {dim: calibrated(develop, lists, dim, 0, arguments.resamples) for dim in DIMS}
    whole = calibrated(develop, lists, DIMS[-1], None, arguments.resamples)
    areas, curves = ordered(develop, lists, DIMS[-1], arguments.resamples)
    record["costs"] = {str(dim): {system: {name: {metric: drawn.record() for metric, drawn in each.items()}
                                           for name, each in of_list.items()}
                                  for system, of_list in found.items()}
                       for dim, found in (*costs.items(), ("whole", whole))}  # fmt: skip
    record["areas"] = {quality: {name: each.record() for name, each in found.items()}
                       for quality, found in areas.items()}  # fmt: skip
    record["rejected"] = REJECTED.tolist()
    record["eer_of_the_rest"] = {quality: curve.tolist() for quality, curve in curves.items()}
    text = report(record, costs, whole, areas, curves)
    print(text)
    arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(text)
    draw(costs[DIMS[-1]], curves, arguments.out.with_suffix(".png"))


def calibrated(
    develop: Heard, lists: Mapping[str, Heard], dim: int, seed: int | None, resamples: int
) -> dict[str, dict[str, dict[str, Drawn]]]:
    """{system: {list: {metric: on its trials}}}. seed: of the test trials' conditions; None: whole and clean."""
    whole = scored(develop, dim, None)
    cut = joined([scored(develop, dim, each, noise=False) for each in range(REPEATS)])
    mixed = joined([scored(develop, dim, each) for each in range(REPEATS)])
    tests = {name: scored(heard, dim, seed) for name, heard in lists.items()}
    found = {}
    for data, systems in ((whole, ON_WHOLE), (cut, ON_CUT), (mixed, SYSTEMS)):
        for system, names in systems.items():
            judge = fit(data.columns(names), data.labels)
            found[system] = {name: judged(judge(test.columns(names)), test, resamples)
                             for name, test in tests.items()}  # fmt: skip
            near = [each for name, each in found[system].items() if name != FAR]
            found[system][NEAR] = {metric: mean(each[metric] for each in near) for metric in METRICS}
        print(dim, *found, sep=", ", flush=True)
    return found


def judged(llrs: NDArray, test: Scored, resamples: int) -> dict[str, Drawn]:
    """Every metric with its resamples."""
    values = bootstrap_together(llrs, test.labels, *test.speakers, METRICS, resamples)
    return {name: Drawn(metric(llrs, test.labels), values[name]) for name, metric in METRICS.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Errors


def ordered(
    develop: Heard, lists: Mapping[str, Heard], dim: int, resamples: int
) -> tuple[dict[str, dict[str, Drawn]], dict[str, NDArray]]:
    """{quality: {list: area under the ROC by which it tells right decisions from errors}}, and {quality: mean over the
    near lists of the EER of the trials that are left when the worst are rejected, [REJECTED]}.
    """
    mixed = joined([scored(develop, dim, seed) for seed in range(REPEATS)])
    plain, best = (fit(mixed.columns(SYSTEMS[name]), mixed.labels) for name in (PLAIN, "all"))
    wrong = (plain(mixed.columns(())) >= 0) != (mixed.labels == 1)
    predict = LogisticRegression(C=np.inf, max_iter=1000).fit(mixed.columns(MEASURES)[:, 1:], wrong)
    areas: dict[str, dict[str, Drawn]] = {}
    curves: dict[str, list[NDArray]] = {}
    for name, heard in lists.items():
        test = scored(heard, dim, 0)
        llrs, llrs_of_all = plain(test.columns(())), best(test.columns(SYSTEMS["all"]))
        right = (llrs >= 0) == (test.labels == 1)
        qualities = {f"the lower {measure}": test.measures[measure].min(axis=1) for measure in MEASURES}
        qualities["predicted"] = -predict.decision_function(test.columns(MEASURES)[:, 1:])
        qualities["size of the LLR, score alone"] = np.abs(llrs)
        qualities["size of the LLR, all"] = np.abs(llrs_of_all)
        weights = [*resampled(test, resamples)]
        for quality, values in qualities.items():
            drawn = np.array([auc(values, right, each) for each in weights])
            areas.setdefault(quality, {})[name] = Drawn(auc(values, right), drawn)
            if name != FAR:
                curves.setdefault(quality, []).append(rejected(values, llrs, test.labels))
    for found in areas.values():
        found[NEAR] = mean(each for name, each in found.items() if name != FAR)
    return areas, {quality: np.mean(each, axis=0) for quality, each in curves.items()}


def resampled(test: Scored, resamples: int) -> Iterator[NDArray]:
    """Weights [T] of the trials, the speakers drawn with replacement, as in `metrics.bootstrap_interval`."""
    names, rows = np.unique(np.concatenate(test.speakers), return_inverse=True)
    enrol, tested = np.split(rows, 2)
    rng = np.random.default_rng(0)
    for _ in range(resamples):
        times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
        yield np.where(test.labels == 1, times[enrol], times[enrol] * times[tested]).astype(float)


def rejected(quality: NDArray, llrs: NDArray, labels: NDArray) -> NDArray:
    """EER of the trials that are left when these shares, those of the lowest quality, are rejected, [REJECTED]."""
    order = np.argsort(quality, kind="stable")
    kept = [order[round(share * len(order)) :] for share in REJECTED]
    return np.array([eer(llrs[rows], labels[rows]) for rows in kept])


# ----------------------------------------------------------------------------------------------------------------------
# Pages


def report(record: dict, costs: dict, whole: dict, areas: dict, curves: dict) -> str:
    """Markdown."""
    parts = [
        "# Quality measures in the calibration",
        "",
        "```bash",
        record["command"],
        "```",
        "",
        f"{record['machine']}. In brackets 95 % intervals from {record['resamples']} resamples of the test speakers; "
        "those of changes are paired, **bold** where they leave out zero. What the fit owes to its 36 speakers is not "
        "in them.",
    ]
    for dim in DIMS:
        parts += ["", f"## Cllr in bits, {dim} numbers, change against the score alone", "", costs_table(costs[dim])]
    title = f"## Cllr in bits, {DIMS[-1]} numbers, on whole test utterances without noise"
    parts += ["", title, "", costs_table(whole, next(iter(ON_WHOLE)))]
    parts += ["", "## Mean of the others: what the change is made of", "", parts_table(costs)]
    parts += ["", f"## What tells errors, {DIMS[-1]} numbers: area under the ROC", "", areas_table(areas, curves), ""]
    return "\n".join(parts)


def costs_table(found: dict, plain: str = PLAIN) -> str:
    """A row for every system, with the change against the one called `plain`."""
    names = [*found[plain]]
    lines = [["the calibration knows", *names]]
    for system, of_list in found.items():
        cells = []
        for name in names:
            value, base = of_list[name]["cllr"], found[plain][name]["cllr"]
            low, high = value.interval
            cells.append(f"{value.value:.3f} [{low:.3f}, {high:.3f}]" if system == plain else thousandths(value, base))
        lines.append([system, *cells])
    return markdown_table(lines, aligned=False)


def thousandths(value: Drawn, base: Drawn) -> str:
    """A change of a cost with its paired interval."""
    difference = value - base
    low, high = difference.interval
    text = f"{difference.value:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"**{text}**" if difference.beyond_noise else text


def parts_table(costs: dict) -> str:
    """Cllr, the least possible, actDCF and EER of each dimension."""
    lines = [["numbers", "the calibration knows", "Cllr", "least Cllr", "actDCF at 0.01", "EER, points"]]
    for dim, found in costs.items():
        base = found[PLAIN][NEAR]
        for system, of_list in found.items():
            each = of_list[NEAR]
            if system == PLAIN:
                cells = [f"{each[name].value:.3f}" for name in ("cllr", "min_cllr", "act_dcf")]
                cells.append(f"{100 * each['eer'].value:.2f}")
            else:
                cells = [thousandths(each[name], base[name]) for name in ("cllr", "min_cllr", "act_dcf")]
                cells.append(change(each["eer"] - base["eer"]))
            lines.append([str(dim), system, *cells])
    return markdown_table(lines, left=(0, 1), aligned=False)


def areas_table(areas: dict, curves: dict) -> str:
    """A row for every quality, with the EER of the better half of the trials."""
    names = [*next(iter(areas.values()))]
    half = int(np.argmin(np.abs(REJECTED - 0.5)))
    lines = [["quality", *names, "EER % of all", "of the better half"]]
    for quality, found in areas.items():
        cells = []
        for name in names:
            low, high = found[name].interval
            cells.append(f"{found[name].value:.2f} [{low:.2f}, {high:.2f}]")
        lines.append([quality, *cells, f"{100 * curves[quality][0]:.1f}", f"{100 * curves[quality][half]:.1f}"])
    return markdown_table(lines, aligned=False)


def draw(found: dict, curves: dict, file) -> None:
    """Changes of Cllr, and the EER over the share that is rejected."""
    figure, (left, right) = new_panels(2, 2, 6, 4.4)
    systems = [system for system in found if system != PLAIN][::-1]
    for place, system in enumerate(systems):
        difference = found[system][NEAR]["cllr"] - found[PLAIN][NEAR]["cllr"]
        low, high = difference.interval
        left.plot([low, high], [place, place], color="0.6")
        left.plot(difference.value, place, "o", color="black")
    left.axvline(0, color="0.8", zorder=0)
    left.set_yticks(range(len(systems)), systems)
    left.set_xlabel(f"change of Cllr against the score alone, bits, {DIMS[-1]} numbers")
    for (quality, curve), colour in zip(curves.items(), shades(len(curves)), strict=True):
        right.plot(100 * REJECTED, 100 * curve, color=colour, label=quality)
    right.set(xlabel="trials of the lowest quality that are rejected, %", ylabel="EER of the rest, %", ylim=(0, None))
    right.legend(fontsize=8)
    save_figure(figure, file)


if __name__ == "__main__":
    main()
