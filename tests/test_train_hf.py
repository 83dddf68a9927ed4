"""Training as a user runs it: whole, killed and resumed, in two processes, and refused for good reasons."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import tiny_config, tiny_model, waves
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModel, AutoModelForAudioXVector

import train_hf
from modeling_mrl_redimnet import MRLReDimNetModel
from mrl_redimnet.corpus import SpeakerTable
from mrl_redimnet.saving import save_model
from mrl_redimnet.synthetic import make_corpus

SCRIPT = Path(train_hf.__file__)
TINY = (
    "{num_mel_bins: 24, base_channels: 4, group_divisor: 4, embedding_size: 32, matryoshka_dims: [8, 16, 32], "
    "pooling_bottleneck: 16, spec_augment: true, map_dropout: 0.1, "
    "stages: [{frequency_stride: 2, blocks: 1, expansion: 1, reduction: 8}]}"
)
EVERYTHING = dict(
    steps=12,
    checkpoint_every=3,
    evaluate_every=6,
    accumulation=2,
    speeds=[1.0, 0.9],
    rotate_at=[0.5],
    noise_probability=0.8,
    report_dims=[4],
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("train") / "corpus", 6, 2, sessions=2, utterances=2, seconds=(0.6, 0.9))


def command_line(corpus: Path, output: Path, *flags: str, **settings) -> list[str]:
    """A run of a second: 4 crops of half a second a step, for a model of 19,000 parameters."""
    tests = {"synthetic": {"trials": str(corpus / "test/trials.txt"), "folder": str(corpus / "test/wav")}}
    small = dict(model_options=TINY, train=corpus / "train", noise=corpus / "test/wav", tests=json.dumps(tests))
    small |= dict(dev_speakers=2, crop_seconds=0.5, batch_size=4, steps=2, workers=0, resamples=20, log_every=1)
    settings = {**small, "tracker": "none", "output": output, **settings}
    return [*(f"--{key}={value}" for key, value in settings.items()), *flags]


def start(corpus: Path, argv: list[str], *, processes: int = 1) -> subprocess.Popen:
    """The script in processes of its own, without an accelerator: there the same steps give the same bits."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    launcher += ["--log-dir", str(corpus.parent / "elastic")]
    return subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT), *argv],
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "HF_DATASETS_CACHE": str(corpus.parent / "cache"),
        },
        cwd=corpus.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> str:
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


def results_of(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


# ---------------------------------------------------------------- whole, and killed and resumed


@pytest.fixture(scope="module")
def whole(corpus) -> Path:
    output = corpus.parent / "whole"
    finish(start(corpus, command_line(corpus, output, **EVERYTHING)))
    return output


@pytest.fixture(scope="module")
def resumed(corpus) -> Path:
    """The same run, killed after its second checkpoint and taken up again, with another number of workers."""
    output = corpus.parent / "resumed"
    process = start(corpus, command_line(corpus, output, **EVERYTHING))
    deadline = time.monotonic() + 240
    while not (output / "checkpoints/step-00000006").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (output / "results.json").exists()
    printed = finish(start(corpus, command_line(corpus, output, "--resume", **{**EVERYTHING, "workers": 1})))
    assert "Resuming at step 6 of 12" in printed or "Resuming at step 9 of 12" in printed
    return output


def test_a_resumed_run_ends_with_the_same_weights(whole, resumed):
    one, other = (load_file(output / "last/model.safetensors") for output in (whole, resumed))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_resumed_run_ends_with_the_same_best_model_and_results(whole, resumed):
    one, other = (results_of(output) for output in (whole, resumed))
    for key in ("best_step", "development_scores", "results"):
        assert one[key] == other[key]
    one, other = (load_file(output / "best/model.safetensors") for output in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_weights_were_trained(whole, corpus):
    trained = load_file(whole / "last/model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in trained.values())
    earlier = load_file(whole / "checkpoints/step-00000009/model.safetensors")
    assert not torch.equal(trained["classifier.weight"], earlier["classifier.weight"])
    assert not torch.equal(trained["redimnet.trunk.stem.conv.weight"], earlier["redimnet.trunk.stem.conv.weight"])


def test_only_two_checkpoints_remain(whole):
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step-00000009", "step-00000012"]


@pytest.mark.parametrize("folder", ["best", "last"])
def test_models_load_by_themselves(whole, folder):
    model = AutoModel.from_pretrained(whole / folder)
    assert type(model) is MRLReDimNetModel
    assert model(torch.stack(waves(4000, 4000))).embeddings.shape == (2, 32)
    head = AutoModelForAudioXVector.from_pretrained(whole / folder).classifier
    speakers = SpeakerTable.load(whole / folder / "speakers.json")
    assert len(speakers) == 4 and head.weight.shape == (8, 32)  # six, less two held out; at two speeds


def test_results_have_every_dimension_as_trained_and_rotated(whole):
    (states,) = results_of(whole)["results"].values()
    assert list(states) == ["as trained", "rotated"]
    assert [[row["dim"] for row in rows] for rows in states.values()] == [[4, 8, 16, 32]] * 2
    assert all(0 <= row["eer_low"] <= row["eer_high"] <= 1 for rows in states.values() for row in rows)


def test_the_rotation_costs_nothing_at_full_width(whole):
    as_trained, rotated = (rows[-1] for rows in results_of(whole)["results"]["synthetic"].values())
    assert as_trained == rotated


def test_the_card_tells_how_it_was_trained(whole):
    card = (whole / "best/README.md").read_text()
    assert "12 steps of 8 crops of 0.5 s from 16 utterances of 4 speakers" in card
    assert "| trials | weights | 4 | 8 | 16 | 32 |" in card and card.count("# whole") == 1


def test_results_hold_the_recipe(whole):
    recipe = results_of(whole)["recipe"]
    assert {key: recipe[key] for key in EVERYTHING} == EVERYTHING


# ---------------------------------------------------------------- two processes


def test_two_processes_train_one_model(corpus):
    output = corpus.parent / "two"
    argv = command_line(corpus, output, steps=3, rotate_at=[0.5], tracker="tensorboard", checkpoint_every=2)
    printed = finish(start(corpus, argv, processes=2))
    assert printed.count("3 steps of 4 x 1 x 2 crops") == 1 and printed.count("Saved:") == 1
    assert [path.name for path in output.rglob("results.json")] == ["results.json"]
    assert len(list((output / "checkpoints/step-00000003").glob("random_states_*"))) == 2
    (events,) = (output / "logs").rglob("events.out.*.0")
    losses = [event.value for event in EventAccumulator(str(events)).Reload().Scalars("loss")]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    assert all(torch.isfinite(tensor).all() for tensor in load_file(output / "last/model.safetensors").values())


# ---------------------------------------------------------------- in this process


@pytest.fixture
def train(corpus, tmp_path, monkeypatch):
    """Runs the script's main in this process: train(*flags, **settings), with its output in tmp_path/run."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", corpus.parent / "cache")

    def run(*flags, **settings) -> Path:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        train_hf.main(command_line(corpus, tmp_path / "run", *flags, **settings))
        return tmp_path / "run"

    yield run
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def test_an_unknown_setting_stops_with_the_nearest_name(train, capsys):
    with pytest.raises(SystemExit) as stop:
        train(chekpoint_every=3)
    assert stop.value.code == 2
    assert "no setting named 'chekpoint_every'. Did you mean checkpoint_every?" in capsys.readouterr().err


def test_resume_without_a_checkpoint_starts_from_the_beginning(train, capsys):
    output = train("--resume")
    assert "starting from the beginning" in capsys.readouterr().out
    assert (output / "checkpoints/step-00000002").is_dir()


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(train):
    output = train()
    before = (output / "last/model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="holds checkpoints of an earlier run"):
        train()
    with pytest.raises(ValueError, match=r"other settings: batch_size \(was 4, is 5\)"):
        train("--resume", batch_size=5)
    assert (output / "last/model.safetensors").read_bytes() == before


def test_a_complete_run_can_be_reported_again(train):
    """best/ may be rotated by now: the report starts from the model as it was trained."""
    first = results_of(train())["results"]["synthetic"]
    again = results_of(train("--resume", report_dims=[5]))["results"]["synthetic"]
    for state, rows in first.items():
        assert rows == [row for row in again[state] if row["dim"] != 5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(report_dims=[8, 64]), r"report_dims: \[64\] are not between 1 and the embedding's 32"),
        (dict(model_options=TINY[:-1] + ", embedding_norm: true}", rotate_at=[0.5]), "rotate_at: .* embedding_norm"),
    ],
)
def test_settings_the_model_cannot_meet_are_refused_before_the_first_step(train, settings, message):
    with pytest.raises(ValueError, match=message):
        train(**settings)


def test_a_converted_model_is_trained_further(train, tmp_path, capsys):
    """Its classifier is new; the rest is what it was."""
    save_model(tiny_model(tiny_config(matryoshka_dims=[8, 32])), tmp_path / "converted")
    output = train(model=tmp_path / "converted", model_options="{map_dropout: 0.1}", steps=1, learning_rate=0)
    trained, start = load_file(output / "last/model.safetensors"), load_file(tmp_path / "converted/model.safetensors")
    assert torch.equal(trained["redimnet.trunk.stem.conv.weight"], start["trunk.stem.conv.weight"])
    config = AutoModel.from_pretrained(output / "last").config
    assert (config.matryoshka_dims, config.map_dropout, config.num_speakers) == ([8, 32], 0.1, 4)


def test_speakers_keep_their_labels_when_training_goes_on(train, corpus, tmp_path):
    first = train().rename(tmp_path / "first")
    second = train(model=first / "last", model_options="{}", dev_speakers=3, seed=1)
    old, new = (SpeakerTable.load(run / "speakers.json").names for run in (first, second))
    assert new[: len(old)] == old


def test_without_a_test_the_development_trials_are_reported(train):
    assert list(results_of(train(tests="{}"))["results"]) == ["development"]


def test_too_many_development_speakers_are_refused(train):
    with pytest.raises(ValueError, match="dev_speakers: 6 speakers .* only 6 of 6"):
        train(dev_speakers=6)


def test_unusable_files_are_listed_and_too_many_stop_the_run(train, tmp_path):
    with pytest.raises(ValueError, match="of 24 files cannot be used"):
        train(min_seconds=0.75)
    assert "shorter than 0.75 s" in (tmp_path / "run/unusable_files.tsv").read_text()
