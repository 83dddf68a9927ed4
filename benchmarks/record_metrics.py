"""How tests/data/scores was made: score files, and what published implementations of the metrics say of them.

    python benchmarks/record_metrics.py scores MODEL --trials AN4.txt --folder WAV
    python benchmarks/record_metrics.py numbers            # in an environment of its own, see below

`scores` writes scores.npz: cosines of a model of this package at 16 and 256 dimensions, and drawn sets with ties, with
few trials, of extreme log-likelihood ratios, and more. `numbers` adds published.json: for every set, metric and
implementation its number, with the versions. It needs no part of this package, but these, which no other command does:

    pip install scikit-learn scipy llreval lir score-analysis pyeer audmetric numba h5py hyperpyyaml six
    pip install "setuptools<80" torch==2.11.* torchaudio==2.11.* matplotlib huggingface_hub requests
    pip install --no-deps speechbrain bob.measure psrcal hyperion-ml wespeaker-unofficial sidekit
"""

import argparse
import importlib.metadata
import importlib.util
import json
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent.parent / "tests/data/scores"
DIMS = (16, 256)
# Name -> (p_target, c_miss, c_fa): NIST SRE 2016, VoxCeleb's challenges, even odds, NIST SRE 2008.
COSTS = {"0.01": (0.01, 1.0, 1.0), "0.05": (0.05, 1.0, 1.0), "0.5": (0.5, 1.0, 1.0), "sre08": (0.01, 10.0, 1.0)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("scores", "numbers"))
    parser.add_argument("model", nargs="?", help="path or Hub id")
    parser.add_argument("--trials", type=Path, help="lines of `1|0 path path`")
    parser.add_argument("--folder", type=Path, help="what the paths are relative to")
    arguments = parser.parse_args()
    DATA.mkdir(parents=True, exist_ok=True)
    if arguments.part == "scores":
        if None in (arguments.model, arguments.trials, arguments.folder):
            parser.error("scores needs MODEL, --trials and --folder")
        sets = {**model_scores(arguments.model, arguments.trials, arguments.folder), **drawn_scores()}
        flat = {f"{name}/{column}": values for name, columns in sets.items() for column, values in columns.items()}
        write(DATA / "scores.npz", lambda file: np.savez_compressed(file, **flat))
    else:
        text = json.dumps(published_numbers(), indent=1, allow_nan=False) + "\n"
        write(DATA / "published.json", lambda file: file.write(text.encode()))


def write(path: Path, fill: Callable):
    """Writes a file whole or not at all (this package, which has a function for that, need not be installed)."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with temporary.open("wb") as file:
            fill(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------- score files


def model_scores(model: str, file: Path, folder: Path) -> dict[str, dict]:
    """Cosines (float32) of every trial at each of DIMS, labels, and both speakers as numbers."""
    from mrl_redimnet.evaluation.results import embed_trials
    from mrl_redimnet.saving import load_model
    from mrl_redimnet.scoring.trials import read_trials, speaker_of

    trials = read_trials(file)
    embeddings = embed_trials(load_model(model), trials, folder).astype(np.float64)
    row_of = {path: row for row, path in enumerate(trials.utterances)}
    rows = [[row_of[path] for path in side] for side in (trials.enrol, trials.test)]
    names = sorted({speaker_of(path) for path in trials.utterances})
    speakers = [[names.index(speaker_of(path)) for path in side] for side in (trials.enrol, trials.test)]
    sets = {}
    for dim in DIMS:
        prefix = embeddings[:, :dim] / np.linalg.norm(embeddings[:, :dim], axis=1, keepdims=True)
        sets[f"model_{dim}"] = {
            "scores": np.einsum("td,td->t", *(prefix[side] for side in rows)).astype(np.float32),
            "labels": trials.labels.astype(np.uint8),
            "enrol": np.array(speakers[0], dtype=np.uint8),
            "test": np.array(speakers[1], dtype=np.uint8),
        }
    return sets


def drawn_scores() -> dict[str, dict]:
    """Sets that the metrics and their implementations could trip over."""
    rng = np.random.default_rng(0)

    def normal(targets: int, impostors: int, shift: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.permutation(np.repeat([1, 0], [targets, impostors])).astype(np.uint8)
        return rng.standard_normal(targets + impostors) + shift * labels, labels

    def llrs(targets: int, impostors: int) -> tuple[np.ndarray, np.ndarray]:
        scores, labels = normal(targets, impostors, 2.5)
        return 2.5 * scores - 2.5**2 / 2, labels  # the exact log-likelihood ratio of the two normals

    calibrated, overconfident, extreme, ties = llrs(300, 2000), llrs(300, 2000), llrs(50, 200), normal(400, 1600)
    drawn = {
        "calibrated": calibrated,
        "overconfident": (6.0 * overconfident[0] + 4.0, overconfident[1]),
        "extreme": (60.0 * extreme[0], extreme[1]),
        "ties": (np.round(4.0 * ties[0]) / 4.0, ties[1]),
        "tiny": (np.array([0.5, -1.0, 0.5, 2.0, 1.0, -1.0, 0.0]), np.array([1, 1, 0, 1, 0, 0, 0])),
        "two": (np.array([0.25, -0.25]), np.array([1, 0])),
        "equal": (np.zeros(10), np.repeat([1, 0], [3, 7])),
        "one_target": normal(1, 200),
        "one_impostor": normal(40, 1),
        "separated": (np.arange(12.0) / 4, np.repeat([0, 1], [8, 4])),
        "reversed": normal(30, 50, -1.0),
    }
    return {name: {"scores": scores, "labels": labels.astype(np.uint8)} for name, (scores, labels) in drawn.items()}


# ---------------------------------------------------------------- published implementations


def published_numbers() -> dict:
    """{"versions": {package: version}, "numbers": {set: {metric: {implementation: number, or null where it fails}}}}"""
    warnings.simplefilter("ignore")
    with np.load(DATA / "scores.npz") as file:
        sets = {name.split("/")[0]: {} for name in file}
        for name in file:
            sets[name.split("/")[0]][name.split("/")[1]] = file[name]
    implementations = load_implementations()
    numbers = {
        name: {
            metric: {package: number(call, columns) for package, call in calls.items()}
            for metric, calls in implementations.items()
        }
        for name, columns in sets.items()
    }
    packages = sorted({package for calls in implementations.values() for package in calls} | {"numpy", "scipy"})
    return {"versions": {name: importlib.metadata.version(name) for name in packages}, "numbers": numbers}


def number(call: Callable, columns: dict) -> float | None:
    """What an implementation says; None where it raises an error, or says NaN or infinity."""
    scores, labels = columns["scores"].astype(np.float64), columns["labels"].astype(np.int64)
    try:
        value = float(call(scores, labels, scores[labels == 1], scores[labels == 0]))
    except Exception as error:  # of code that is not ours, which fails in many ways on sets at the edge
        print(f"{call.__name__}: {type(error).__name__}: {error}", file=sys.stderr)
        return None
    return value if np.isfinite(value) else None


def load_implementations() -> dict[str, dict[str, Callable]]:
    """Metric -> package -> f(scores, labels, target scores, impostor scores) -> number."""
    import_bare("hyperion", "wespeaker", "sidekit")
    import_bare("hyperion.metrics", "hyperion.utils", "wespeaker.utils", "sidekit.bosaris")
    for name in ("PlotWindow", "Scores", "Key"):  # of its pictures and files; the numbers do without
        setattr(sys.modules["sidekit.bosaris"], name, None)
    calls = {**eer_implementations(), **cllr_implementations(), **auc_implementations()}
    for name, costs in COSTS.items():
        calls |= dcf_implementations(name, *costs)
    return calls


def eer_implementations() -> dict[str, dict[str, Callable]]:
    """Of two definitions: some EER of the ROC itself, and that of its convex hull.

    Left out is the convex hull's of bob.measure 6.1.1, which raises NotImplementedError.
    """
    import audmetric
    import torch
    from bob.measure import eer as bob_eer
    from hyperion.metrics.eer import compute_eer as hyperion_eer
    from llreval.pav_rocch import PAV, ROCCH
    from pyeer.eer_info import get_eer_stats
    from scipy.interpolate import interp1d
    from scipy.optimize import brentq
    from score_analysis import Scores
    from sidekit.bosaris.detplot import rocch, rocch2eer
    from sklearn.metrics import roc_curve
    from speechbrain.utils.metric_stats import EER
    from wespeaker.utils import score_metrics as nist  # NIST's scoring script

    def by_root_search(scores, labels, targets, impostors):
        false_alarm, hit, _ = roc_curve(labels, scores, drop_intermediate=False)
        return brentq(lambda rate: 1.0 - rate - interp1d(false_alarm, hit)(rate), 0.0, 1.0, xtol=1e-15)

    return {
        "eer": {
            "scikit-learn": by_root_search,
            "wespeaker-unofficial": lambda s, y, t, n: nist.compute_eer(*nist.compute_pmiss_pfa_rbst(s, y)),
            "score-analysis": lambda s, y, t, n: Scores(pos=t, neg=n).eer()[1],
            "speechbrain": lambda s, y, t, n: EER(torch.from_numpy(t), torch.from_numpy(n))[0],
            "bob.measure": lambda s, y, t, n: bob_eer(n, t),
            "pyeer": lambda s, y, t, n: get_eer_stats(t, n).eer,
            "audmetric": lambda s, y, t, n: audmetric.equal_error_rate(y, s)[0],
        },
        "eer_convex_hull": {
            "llreval": lambda s, y, t, n: ROCCH(PAV(s, y)).EER(),
            "hyperion-ml": lambda s, y, t, n: hyperion_eer(t, n),
            "sidekit": lambda s, y, t, n: rocch2eer(*rocch(t, n)),
        },
    }


def cllr_implementations() -> dict[str, dict[str, Callable]]:
    """Left out is hyperion-ml 0.3.2, whose Cllr takes impostors with the sign of targets."""
    import torch
    from bob.measure.calibration import cllr as bob_cllr
    from lir.data.models import LLRData
    from lir.metrics import cllr as lir_cllr
    from lir.metrics import cllr_min as lir_min_cllr
    from llreval.cllr import cllr as llreval_cllr
    from llreval.cllr import min_cllr as llreval_min_cllr
    from llreval.pav_rocch import PAV
    from psrcal.losses import LogLoss

    def of_lir(scores, labels):
        return LLRData(features=scores[:, None] / np.log(10.0), labels=labels)  # its LLRs are decimal

    def psrcal_cllr(scores, labels, targets, impostors):
        log_odds = torch.from_numpy(np.stack([-scores, scores], axis=1))
        log_posteriors = torch.nn.functional.logsigmoid(log_odds)  # at even odds
        return LogLoss(log_posteriors, torch.from_numpy(labels), norm=True, priors=torch.tensor([0.5, 0.5]).double())

    return {
        "cllr": {
            "llreval": lambda s, y, t, n: llreval_cllr(t, n),
            "bob.measure": lambda s, y, t, n: bob_cllr(n, t),
            "lir": lambda s, y, t, n: lir_cllr(of_lir(s, y)),
            "psrcal": psrcal_cllr,
        },
        "min_cllr": {
            "llreval": lambda s, y, t, n: llreval_min_cllr(PAV(s, y)),
            "lir": lambda s, y, t, n: lir_min_cllr(of_lir(s, y)),
        },
    }


def auc_implementations() -> dict[str, dict[str, Callable]]:
    from pyeer.eer_info import get_eer_stats
    from score_analysis import Scores
    from sklearn.metrics import roc_auc_score

    return {
        "auc": {
            "scikit-learn": lambda s, y, t, n: roc_auc_score(y, s),
            "score-analysis": lambda s, y, t, n: Scores(pos=t, neg=n).auc(),
            "pyeer": lambda s, y, t, n: get_eer_stats(t, n).auc,
        }
    }


def dcf_implementations(name: str, p_target: float, c_miss: float, c_fa: float) -> dict[str, dict[str, Callable]]:
    """minDCF and actDCF at one prior and costs, all normalised; those that know priors only get the effective one."""
    import torch
    from hyperion.metrics.dcf import compute_act_dcf, compute_min_dcf
    from llreval.bayes_error_rate import fast_Bayes_error_rate
    from llreval.pav_rocch import PAV, ROCCH
    from scipy.special import logit
    from sidekit.bosaris.detplot import fast_minDCF
    from speechbrain.utils.metric_stats import minDCF
    from wespeaker.utils import score_metrics as nist  # NIST's scoring script

    of_miss, of_fa = c_miss * p_target, c_fa * (1 - p_target)
    default = min(of_miss, of_fa)
    effective = of_miss / (of_miss + of_fa)
    share = min(effective, 1 - effective)

    return {
        f"min_dcf_{name}": {
            "wespeaker-unofficial": lambda s, y, t, n: nist.compute_c_norm(
                *nist.compute_pmiss_pfa_rbst(s, y), p_target, c_miss, c_fa
            ),
            "llreval": lambda s, y, t, n: ROCCH(PAV(s, y)).Bayes_error_rate(float(logit(effective))) / share,
            "hyperion-ml": lambda s, y, t, n: compute_min_dcf(t, n, effective)[0],
            "sidekit": lambda s, y, t, n: fast_minDCF(t, n, float(logit(effective)), True)[0],
            "speechbrain": lambda s, y, t, n: (
                minDCF(torch.from_numpy(t), torch.from_numpy(n), c_miss, c_fa, p_target)[0] / default
            ),
        },
        f"act_dcf_{name}": {
            "hyperion-ml": lambda s, y, t, n: compute_act_dcf(t, n, effective)[0],
            "llreval": lambda s, y, t, n: fast_Bayes_error_rate(s, y, np.array([logit(effective)]))[0] / share,
        },
    }


def import_bare(*packages: str):
    """Makes packages importable without running their __init__.py, which needs much that no metric needs."""
    for name in packages:
        module = types.ModuleType(name)
        module.__path__ = list(importlib.util.find_spec(name).submodule_search_locations)
        sys.modules[name] = module


if __name__ == "__main__":
    main()
