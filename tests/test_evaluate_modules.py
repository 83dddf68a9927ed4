"""The `evaluate` modules of the folder metrics: every way of feeding them, several processes, no network, bad input."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

from mrl_redimnet.scoring import metrics

ROOT = Path(__file__).parent.parent
MODULES = ("eer", "min_dcf", "act_dcf", "cllr", "min_cllr", "auc")


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory):
    """evaluate copies a module's file to where it imports it from: not into the home of who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path_factory.mktemp("modules"))
        patch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
        yield


@pytest.fixture
def load(tmp_path):
    return lambda name, *config, **options: evaluate.load(
        str(ROOT / "metrics" / name), *config, cache_dir=str(tmp_path), **options
    )


def trials(count=600, speakers=12, seed=0):
    """Scores (that float32 would round), labels, enrolment and test speakers as numbers; a third are targets."""
    rng = np.random.default_rng(seed)
    enrol, test = rng.integers(speakers, size=(2, count))
    test[::3] = enrol[::3]
    labels = (enrol == test).astype(int)
    return 2.0 * rng.standard_normal(count) + 3.0 * labels - 1.0, labels, enrol, test


def expected(name, scores, labels):
    names = {"eer": ("eer", "eer_convex_hull"), "min_dcf": ("min_dcf_0.01",), "act_dcf": ("act_dcf_0.01",)}
    functions = vars(metrics)
    return {key: functions[key.removesuffix("_0.01")](scores, labels) for key in names.get(name, (name,))}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_the_function_says(name, load):
    scores, labels, *_ = trials()
    results = load(name).compute(predictions=scores, references=labels)
    assert results == expected(name, scores, labels)
    assert all(type(value) is float for value in results.values())
    json.dumps(results)


def test_every_way_of_adding_trials(load):
    scores, labels, *_ = trials(60)
    right = expected("eer", scores, labels)
    one_by_one = load("eer")
    for score, label in zip(scores.tolist(), labels.tolist(), strict=True):
        one_by_one.add(prediction=score, reference=label)
    assert one_by_one.compute() == right
    in_batches = load("eer")
    for first in range(0, 60, 25):
        part = slice(first, first + 25)
        in_batches.add_batch(predictions=scores[part], references=labels[part])
    assert in_batches.compute() == right
    assert in_batches.compute(predictions=-scores, references=labels) == expected("eer", -scores, labels)  # emptied
    assert load("eer", keep_in_memory=True).compute(predictions=scores, references=labels) == right


@pytest.mark.parametrize(
    "kind",
    [list, torch.from_numpy, lambda column: torch.from_numpy(column).requires_grad_(column.dtype == float), tuple],
    ids=["list", "tensor", "tensor with gradient", "tuple"],
)
def test_kinds_of_columns(kind, load):
    scores, labels, *_ = trials(60)
    results = load("auc").compute(predictions=kind(scores), references=kind(labels))
    assert results == expected("auc", scores, labels)
    assert load("auc").compute(predictions=scores.tolist(), references=(labels == 1).tolist()) == results


def test_infinite_llrs_pass(load):
    results = load("min_cllr").compute(predictions=[np.inf, 0.0, -np.inf], references=[1, 1, 0])
    assert results == {"min_cllr": 0.0}


@pytest.mark.parametrize("name", ["min_dcf", "act_dcf"])
def test_priors_and_costs(name, load):
    scores, labels, *_ = trials()
    function = vars(metrics)[name]
    results = load(name).compute(predictions=scores, references=labels, priors=[0.05, 0.5], c_miss=10, c_fa=2)
    assert results == {f"{name}_{prior}": function(scores, labels, prior, 10, 2) for prior in (0.05, 0.5)}
    assert load(name).compute(predictions=scores, references=labels, priors=0.2).keys() == {f"{name}_0.2"}


def test_methods_of_the_eer(load):
    scores, labels, *_ = trials()
    for methods, keys in (("interpolated", {"eer"}), (["convex_hull"], {"eer_convex_hull"})):
        assert load("eer").compute(predictions=scores, references=labels, methods=methods).keys() == keys


def test_options_may_be_given_when_loading(load):
    scores, labels, *_ = trials()
    module = load("min_dcf", priors=[0.05])
    assert module.compute(predictions=scores, references=labels).keys() == {"min_dcf_0.05"}
    assert module.compute(predictions=scores, references=labels, priors=[0.1]).keys() == {"min_dcf_0.1"}


def test_combined_modules(load):
    scores, labels, *_ = trials()
    combined = evaluate.combine([load("eer"), load("min_dcf", priors=[0.01, 0.05]), load("cllr")])
    right = expected("eer", scores, labels) | expected("cllr", scores, labels)
    right |= {f"min_dcf_{p}": metrics.min_dcf(scores, labels, p) for p in (0.01, 0.05)}
    assert combined.compute(predictions=scores, references=labels) == right
    for part in (slice(0, 100), slice(100, None)):
        combined.add_batch(predictions=scores[part], references=labels[part])
    assert combined.compute() == right


# ---------------------------------------------------------------- intervals over speakers


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("config", ["speakers", "speaker_ids"])
def test_intervals_are_those_of_the_bootstrap_over_speakers(name, config, load):
    scores, labels, enrol, test = trials(300)
    if config == "speakers":
        enrol, test = ([f"id{speaker:05d}" for speaker in side] for side in (enrol, test))
    module = load(name, config, resamples=20)
    columns = dict(predictions=scores, references=labels, enrol_speakers=enrol, test_speakers=test)
    results = module.compute(**columns, confidence=0.8, seed=3)
    for key, value in expected(name, scores, labels).items():
        function = functools.partial(vars(metrics)[key.removesuffix("_0.01")])
        ends = metrics.bootstrap_interval(scores, labels, enrol, test, function, 20, 0.8, 3)
        assert (results.pop(key), results.pop(f"{key}_low"), results.pop(f"{key}_high")) == (value, *ends)
    assert not results


def test_the_seed_of_the_intervals_may_be_given_when_loading(load):
    columns = dict(zip(("predictions", "references", "enrol_speakers", "test_speakers"), trials(300), strict=True))
    of_load = load("eer", "speaker_ids", resamples=20, seed=7).compute(**columns)
    assert of_load == load("eer", "speaker_ids", resamples=20).compute(**columns, seed=7)
    assert of_load != load("eer", "speaker_ids", resamples=20).compute(**columns)
    assert load("eer", seed=7).compute(predictions=[1.0, 0.0], references=[1, 0])["eer"] == 0.0


def test_intervals_depend_neither_on_the_order_nor_on_how_speakers_are_named(load):
    columns = dict(zip(("predictions", "references", "enrol_speakers", "test_speakers"), trials(300), strict=True))
    right = load("eer", "speaker_ids", resamples=20).compute(**columns)
    order = np.random.default_rng(1).permutation(300)
    shuffled = {name: column[order] for name, column in columns.items()}
    assert load("eer", "speaker_ids", resamples=20).compute(**shuffled) == right
    named = {name: [f"id{s:02d}" for s in shuffled[name]] for name in ("enrol_speakers", "test_speakers")}
    assert load("eer", "speakers", resamples=20).compute(**{**shuffled, **named}) == right


# ---------------------------------------------------------------- processes

PROCESS = """
import json, sys
import evaluate, numpy as np
root, cache, rank, count, data = sys.argv[1:]
rank, count = int(rank), int(count)
columns = {key: column[rank::count] for key, column in np.load(data).items()}  # a share, in another order
results = []
for name, config, options in (("cllr", "default", {}), ("eer", "speaker_ids", {"resamples": 20})):
    module = evaluate.load(root + "/metrics/" + name, config, num_process=count, process_id=rank, cache_dir=cache,
                           experiment_id="one", **options)
    half = len(columns["predictions"]) // 2
    for part in (slice(0, half), slice(half, None)):
        module.add_batch(**{key: columns[key][part] for key in module.features})
    results.append(module.compute())
print(json.dumps(results))
"""


def run_processes(folder, count):
    """What each of `count` processes says; they have no network, and start in an empty folder."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHONPATH"))}
    environment |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    (folder / "empty").mkdir()
    command = [sys.executable, "-c", PROCESS, str(ROOT), str(folder / "shared")]
    options = dict(cwd=folder / "empty", env=environment, stdout=subprocess.PIPE, text=True)
    started = [
        subprocess.Popen([*command, str(rank), str(count), str(folder / "trials.npz")], **options)
        for rank in range(count)
    ]
    try:
        printed = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * count
    return [json.loads(text.strip().splitlines()[-1]) for text in printed]


@pytest.mark.slow
def test_two_processes_without_network_say_exactly_what_one_does(tmp_path, load):
    columns = dict(zip(("predictions", "references", "enrol_speakers", "test_speakers"), trials(301), strict=True))
    np.savez(tmp_path / "trials.npz", **columns)
    of_first, of_second = run_processes(tmp_path, 2)
    assert of_second == [None, None]
    scores, labels = columns["predictions"], columns["references"]
    assert of_first == [
        load("cllr").compute(predictions=scores, references=labels),
        load("eer", "speaker_ids", resamples=20).compute(**columns),
    ]


def test_loads_by_a_relative_path_from_the_repository_root(load, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    scores, labels, *_ = trials(60)
    for name in MODULES:
        module = evaluate.load(f"./metrics/{name}", cache_dir=str(tmp_path))
        assert module.compute(predictions=scores, references=labels) == expected(name, scores, labels)
        assert "predictions" in module.inputs_description and module.description


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([1.0, np.nan], [1, 0], "scores must be numbers, not NaN: 1 of 2"),
        ([1.0, None], [1, 0], "scores must be numbers, not NaN: 1 of 2"),
        ([1.0, 2.0], [1, 0.5], r"labels must be 1 \(target\) or 0 \(impostor\): 1 of 2"),
        ([1.0, 2.0], [1, 1], "at least one impostor trial is needed"),
        ([1.0, 2.0], [0, 0], "at least one target trial is needed"),
        ([], [], "no trials"),
        ([1.0, 2.0, 3.0], [1, 0], "Mismatch in the number of predictions"),
        ([[1.0], [2.0]], [1, 0], r"predictions must be a column \[trials\], got shape \(2, 1\)"),
        (["a", "b"], [1, 0], "could not convert string to float"),
    ],
)
def test_bad_trials_are_refused_and_leave_the_module_usable(predictions, references, message, load):
    module = load("eer")
    with pytest.raises(ValueError, match=message):
        module.compute(predictions=predictions, references=references)
    assert module.compute(predictions=[1.0, 0.0], references=[1, 0])["eer"] == 0.0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("eer", {"method": "convex_hull"}, "eer: unknown option method; its options: methods, resamples"),
        ("eer", {"methods": "exact"}, r"methods: got \['exact'\], expected some of interpolated, convex_hull"),
        ("min_dcf", {"priors": []}, r"priors must be one or more different probabilities .*, got \[\]"),
        ("min_dcf", {"priors": [0.1, 0.1]}, "priors must be one or more different"),
        ("act_dcf", {"p_target": 0.1}, "unknown option p_target; its options: priors, c_miss, c_fa, resamples"),
        ("cllr", {"resamples": 10}, 'resamples: there are no intervals without speakers; load the .* "speakers"'),
    ],
)
def test_bad_options_are_refused_when_loading_and_when_computing(name, options, message, load):
    with pytest.raises(ValueError, match=message):
        load(name, **options)
    with pytest.raises(ValueError, match=message):
        load(name).compute(predictions=[1.0, 0.0], references=[1, 0], **options)


def test_a_prior_out_of_range_is_refused(load):
    with pytest.raises(ValueError, match="p_target must be between 0 and 1"):
        load("min_dcf", priors=[1.5]).compute(predictions=[1.0, 0.0], references=[1, 0])


def test_bad_speakers_are_refused(load):
    with pytest.raises(ValueError, match="configuration 'talkers': expected one of default, speakers, speaker_ids"):
        load("eer", "talkers")
    columns = dict(predictions=[1.0, 0.0], references=[1, 0], enrol_speakers=["a", "a"], test_speakers=["a", None])
    with pytest.raises(ValueError, match="test_speakers: 1 of 2 trials have no speaker"):
        load("eer", "speakers").compute(**columns)
    with pytest.raises(ValueError, match="labels must be 1 exactly where the two speakers are equal"):
        load("eer", "speakers").compute(**{**columns, "test_speakers": ["a", "a"]})
    with pytest.raises(ValueError, match="Expected format"):
        load("eer", "speakers").compute(**{**columns, "enrol_speakers": [1, 2], "test_speakers": [1, 3]})
    with pytest.raises(ValueError, match="missing"):
        load("eer", "speakers").compute(predictions=[1.0, 0.0], references=[1, 0])
