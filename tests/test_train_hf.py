"""Training as a user runs it: whole, killed and resumed, in two processes, and refused for good reasons."""

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from conftest import tiny_config, tiny_model, waves
from no_gpu import pretended_gpu
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import (
    ALONE,
    SCRIPT,
    TINY,
    as_tests,
    command_line,
    finish,
    killed_when,
    results_of,
    start,
    train_here,
    trained_steps,
)
from transformers import AutoModel, AutoModelForAudioXVector

import train_hf
from modeling_mrl_redimnet import MRLReDimNetForXVector, MRLReDimNetModel
from mrl_redimnet.audio.io import AudioError
from mrl_redimnet.data.corpus import SpeakerTable
from mrl_redimnet.data.synthetic import make_corpus
from mrl_redimnet.saving import save_model
from mrl_redimnet.training import parts, setup
from mrl_redimnet.training.curves import Record
from mrl_redimnet.training.reading import make_recipe
from mrl_redimnet.training.report import one_sentence_for_bad_input
from mrl_redimnet.training.run import Run
from mrl_redimnet.training.tasks import Verification
from mrl_redimnet_cli import main as cli_main

NOISE = "[{kind: one_of, probability: 0.8, choices: [{kind: noise, snr: [0, 15]}, {kind: babble, snr: [5, 15]}]}]"
EVERYTHING = dict(
    steps=12,
    checkpoint_every=3,
    evaluate_every=6,
    gradient_accumulation=2,
    speed_perturb=[1.0, 0.9],
    rotate_at=[0.25],
    utterances_per_speaker=2,
    crop_seconds=[0.3, 0.5],
    augmentation_schedule=[0.0, 0.5],
    prefix_starts=[0.5, 0.25, 0.0],
    prefixes_per_step=2,
    ema=0.5,
    weight_averaging=0.9,
    report_dims=[4],
)
# What two processes do as one with twice the batch: nothing that draws from a process's own generator.
STILL = dict(
    model_options=TINY.replace("true", "false").replace("0.1", "0.0"), steps=6, checkpoint_every=2, evaluate_every=3
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    root = make_corpus(tmp_path_factory.mktemp("train") / "corpus", 6, 2, sessions=2, utterances=2, seconds=(0.6, 0.9))
    speakers = sorted(folder.name for folder in (root / "test/wav").iterdir())
    (root / "groups.csv").write_text("speaker,gender\n" + "".join(f"{name},f\n" for name in speakers))
    return root


# ---------------------------------------------------------------- whole, and killed and resumed


@pytest.fixture(scope="module")
def whole(corpus) -> Path:
    output, tests = corpus.parent / "whole", as_tests(corpus, groups="groups.csv")
    tests["synthetic"]["benchmark"] = "me/synthetic:all"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")  # as `start` has it: there the same steps give the same bits
        train_here(command_line(corpus, output, augmentations=NOISE, tests=json.dumps(tests), **EVERYTHING))
    return output


@pytest.fixture(scope="module")
def resumed(corpus) -> Path:
    """The same run, killed in an evaluation, in a step, and while it writes a checkpoint; the last time it goes on
    with another number of workers, and keeps what it computed again before."""
    output = corpus.parent / "resumed"
    argv = command_line(corpus, output, augmentations=NOISE, **EVERYTHING)
    killed_when(start(corpus, argv), lambda: trained_steps(output) >= 6)  # the evaluation follows at once
    argv.append("--resume")
    killed_when(start(corpus, argv), lambda: trained_steps(output) >= 8)
    killed_when(start(corpus, argv), lambda: (output / "checkpoints/writing-00000009").exists())
    assert not (output / "results.json").exists()
    printed = finish(start(corpus, [*argv, "--workers=1", "--recompute=false"]))
    assert "Resuming at step 6 of 12" in printed or "Resuming at step 9 of 12" in printed
    return output


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_weights(whole, resumed):
    one, other = (load_file(output / "last/model.safetensors") for output in (whole, resumed))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.slow
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
    assert len(speakers) == 8 and head.weight.shape == (8, 32)  # six, less two held out; at two speeds
    assert speakers.names[4:] == tuple(f"{name} at speed 0.9" for name in speakers.names[:4])


def test_results_on_a_benchmark_are_also_in_the_form_of_the_hub(whole):
    record = results_of(whole)
    expected = {
        f"synthetic-{row['dim']}.yaml": round(100 * row["eer"], 2)
        for row in record["results"]["synthetic"][record["saved"]]
    }
    found = {file.name: yaml.safe_load(file.read_text())[0] for file in (whole / "best" / ".eval_results").iterdir()}
    assert {name: entry["value"] for name, entry in found.items()} == expected and len(expected) >= 4
    assert all(entry["dataset"] == {"id": "me/synthetic", "task_id": "all"} for entry in found.values())


def test_results_have_every_dimension_as_trained_and_rotated(whole):
    (states,) = results_of(whole)["results"].values()
    assert list(states) == ["as trained", "mean of the last", "rotated", "mean of the last, rotated"]
    assert [[row["dim"] for row in rows] for rows in states.values()] == [[4, 8, 16, 32]] * 4
    assert all(0 <= row["eer_low"] <= row["eer_high"] <= 1 for rows in states.values() for row in rows)


def test_the_rotation_costs_nothing_at_full_width(whole):
    states = results_of(whole)["results"]["synthetic"]
    assert states["as trained"][-1] == states["rotated"][-1]


def test_the_card_tells_how_it_was_trained(whole):
    card = (whole / "best/README.md").read_text()
    assert "12 steps of 8 crops of 0.3 to 0.5 s from 16 utterances of 4 speakers" in card
    assert "| trials | weights | 4 | 8 | 16 | 32 |" in card and card.count("# whole") == 1


def test_groups_of_speakers_are_in_the_results_and_on_the_card(whole):
    (row,) = results_of(whole)["groups"]["synthetic"]
    assert (row["group"], row["speakers"], row["eer"]) == ("f", 2, None)  # two speakers are too few to tell
    assert "| synthetic | f |" in (whole / "best/README.md").read_text()


def test_results_hold_the_recipe(whole):
    recipe = {name: value for group in results_of(whole)["recipe"].values() for name, value in group.items()}
    assert {key: recipe[key] for key in EVERYTHING} == EVERYTHING


def test_the_record_is_whole_and_drawn(whole):
    record = Record(whole)
    for kind, steps in (("train", list(range(1, 13))), ("evaluation", [6, 6, 12, 12])):
        assert [line["step"] for line in record.lines(kind)] == steps
    assert {line["set"] for line in record.lines("evaluation")} == {"development", "training speakers"}
    rates = record.lines("train")[-1]
    assert rates["loader_to_step"] == pytest.approx(rates["loader_crops_per_s"] / rates["step_crops_per_s"])
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_resumed_run_leaves_the_record_of_a_whole_one(whole, resumed):
    one, other = (Record(output) for output in (whole, resumed))
    for kind in ("train", "evaluation"):
        assert [line["step"] for line in one.lines(kind)] == [line["step"] for line in other.lines(kind)]
    assert [line["loss"] for line in one.lines("train")] == [line["loss"] for line in other.lines("train")]


# ---------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def two(corpus) -> Path:
    output = corpus.parent / "two"
    argv = command_line(corpus, output, tracker="tensorboard", **STILL)
    printed = finish(start(corpus, argv, processes=2))
    assert printed.count("6 steps of 4 x 1 x 2 crops") == 1 and printed.count("Saved:") == 1
    return output


@pytest.mark.slow
def test_two_processes_train_one_model(two):
    assert [path.name for path in two.rglob("results.json")] == ["results.json"]
    assert len(list((two / "checkpoints/step-00000006").glob("random_states_*"))) == 2
    (events,) = (two / "logs").rglob("events.out.*.0")
    losses = [event.value for event in EventAccumulator(str(events)).Reload().Scalars("loss")]
    assert len(losses) == 6 and all(map(math.isfinite, losses))


@pytest.mark.slow
def test_two_processes_killed_and_resumed_end_with_the_same_weights(corpus, two):
    output = corpus.parent / "two_resumed"
    argv = command_line(corpus, output, **STILL)
    killed_when(start(corpus, argv, processes=2), lambda: trained_steps(output) >= 3)
    assert "Resuming at step " in finish(start(corpus, [*argv, "--resume"], processes=2))
    one, other = (load_file(run / "last/model.safetensors") for run in (two, output))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.slow
def test_two_processes_do_as_one_with_twice_the_batch(train, two):
    one = train(batch_size=8, **STILL)
    losses = [[line["loss"] for line in Record(run).lines("train")] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    before, after = (load_file(run / "last/model.safetensors") for run in (one, two))
    for name in ("classifier.weight", "redimnet.projection.segments.0.weight", "redimnet.projection.norm.running_var"):
        assert torch.allclose(before[name], after[name], rtol=1e-3, atol=2e-4), name


SLOW_START = """
import time
from datetime import timedelta

import torch.distributed as dist

import train_hf
from mrl_redimnet.training import setup

begin, load = dist.init_process_group, setup.load_corpus


def begin_impatiently(*arguments, **options):
    begin(*arguments, **{"timeout": timedelta(seconds=4), **options})


def load_slowly(*arguments, **options):
    time.sleep(8 if dist.get_rank() == 0 else 0)
    return load(*arguments, **options)


dist.init_process_group, setup.load_corpus = begin_impatiently, load_slowly
train_hf.main()
"""


@pytest.mark.slow
def test_processes_wait_for_the_first_one_to_read_a_new_corpus(corpus, tmp_path):
    """Longer than a process group waits by itself, which here is 4 seconds instead of 10 or 30 minutes."""
    script, speech = tmp_path / "slow_start.py", shutil.copytree(corpus / "train", tmp_path / "speech")
    script.write_text(SLOW_START)
    argv = command_line(corpus, tmp_path / "run", train=speech, steps=1)
    printed = finish(start(corpus, argv, processes=2, script=script))
    assert printed.count(f"Reading {speech}") == 1 and printed.count("Saved:") == 1


@pytest.mark.slow
def test_accelerate_that_starts_one_process_of_two_is_told(corpus):
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes=2"]
    launch += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    argv = command_line(corpus, corpus.parent / "lost")
    done = subprocess.run([*launch, str(SCRIPT), *argv], capture_output=True, text=True, env={**os.environ, **ALONE})
    assert done.returncode and "asked for 2 processes and started one" in done.stderr
    assert "torchrun --nproc_per_node 2" in done.stderr and not (corpus.parent / "lost/checkpoints").exists()


# ---------------------------------------------------------------- in this process


def test_an_unknown_setting_stops_with_the_nearest_name(train, capsys):
    with pytest.raises(SystemExit) as stop:
        train(chekpoint_every=3)
    assert stop.value.code == 2
    assert "no setting named 'chekpoint_every'. Did you mean run.checkpoint_every?" in capsys.readouterr().err


def test_resume_without_a_checkpoint_starts_from_the_beginning(train, capsys):
    output = train("--resume")
    assert "starting from the beginning" in capsys.readouterr().out
    assert (output / "checkpoints/step-00000002").is_dir()


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(train):
    output = train()
    before = (output / "last/model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="holds checkpoints of an earlier run"):
        train()
    with pytest.raises(ValueError, match=r"other settings: data.batch_size \(was 4, is 5\)"):
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


def test_settings_the_model_cannot_meet_are_refused_before_speech_is_read(train, monkeypatch):
    monkeypatch.setattr(setup, "load_corpus", lambda *_, **__: pytest.fail("the corpus was read"))
    with pytest.raises(ValueError, match="prefix_starts: 2 ratios for the prefixes"):
        train(prefix_starts=[0.5, 0])
    with pytest.raises(FileNotFoundError, match="/nowhere is not a folder"):
        train(model="/nowhere", model_options="{}")
    with pytest.raises(FileNotFoundError, match="noise: /nowhere is not a folder"):
        train(noise="/nowhere")


def test_what_cannot_be_trained_on_is_said_in_a_sentence(tmp_path):
    command = [sys.executable, str(SCRIPT), "--train=/nowhere", f"--output={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ALONE})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("train_hf.py: /nowhere is not there: give the folder")


def test_an_error_before_the_first_step_is_a_sentence_and_a_later_one_is_raised(capsys):
    with pytest.raises(SystemExit, match="2"), one_sentence_for_bad_input("train_hf.py"):
        raise FileNotFoundError("no such speech")
    assert capsys.readouterr().err == "train_hf.py: no such speech\n"
    later = ValueError("loss: not a number")
    later.add_note("The run stopped after step 3.")
    with pytest.raises(ValueError, match="not a number"), one_sentence_for_bad_input("train_hf.py"):
        raise later


def test_a_converted_model_is_trained_further(train, tmp_path, capsys):
    """Its classifier is new; the rest is what it was."""
    save_model(tiny_model(tiny_config(matryoshka_dims=[8, 32])), tmp_path / "converted")
    output = train(
        model=tmp_path / "converted",
        model_options="{map_dropout: 0.1}",
        steps=1,
        learning_rate=0,
        final_learning_rate=0,
    )
    trained, start = load_file(output / "last/model.safetensors"), load_file(tmp_path / "converted/model.safetensors")
    assert torch.equal(trained["redimnet.trunk.stem.conv.weight"], start["trunk.stem.conv.weight"])
    config = AutoModel.from_pretrained(output / "last").config
    assert (config.matryoshka_dims, config.map_dropout, config.num_speakers) == ([8, 32], 0.1, 4)


def rows_of(folder: Path) -> dict[str, torch.Tensor]:
    """The classifier's rows by the names of their classes."""
    weight = load_file(folder / "model.safetensors")["classifier.weight"]
    return dict(zip(SpeakerTable.load(folder / "speakers.json").names, weight, strict=True))


def test_a_second_stage_keeps_the_rows_of_the_speakers_it_has_by_name(train, tmp_path):
    """Large-margin fine-tuning without speeds: the other speeds' rows are left behind, new speakers begin anew."""
    first = train(speed_perturb=[1.0, 0.9], dev_speakers=3).rename(tmp_path / "first")
    still = dict(learning_rate=0.0, final_learning_rate=0.0, weight_decay=0.0)
    second = train(model=first / "last", model_options="{}", margin=0.5, dev_speakers=2, seed=1, **still)
    before, after = rows_of(first / "last"), rows_of(second / "last")
    assert len(before) == 6 and len(after) == 4
    shared = before.keys() & after.keys()
    assert shared and all(torch.equal(before[name], after[name]) for name in shared)
    assert not any("speed" in name for name in after)
    assert AutoModelForAudioXVector.from_pretrained(second / "last").config.margin == 0.5


def test_all_rows_sampled_is_the_whole_classifier(train, tmp_path):
    whole = train(steps=3).rename(tmp_path / "whole")
    sampled = train(steps=3, classifier_sample=4)
    before, after = (load_file(run / "last/model.safetensors") for run in (whole, sampled))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_a_teacher_changes_what_is_learnt(train, tmp_path):
    alone = train().rename(tmp_path / "alone")
    taught = train(teacher=alone / "best")
    before, after = (load_file(run / "last/model.safetensors") for run in (alone, taught))
    assert not torch.equal(before["classifier.weight"], after["classifier.weight"]) or not torch.equal(
        before["redimnet.trunk.stem.conv.weight"], after["redimnet.trunk.stem.conv.weight"]
    )


@pytest.mark.parametrize("settings", [dict(optimizer="sgd", schedule="exponential"), dict(sampler="utterance")])
def test_the_other_ways_to_train_run_through(train, settings):
    rates = [line["learning_rate"] for line in Record(train(steps=4, **settings)).lines("train")]
    assert len(rates) == 4 and rates[1:] == sorted(rates[1:], reverse=True)


@pytest.mark.parametrize("loss", [dict(loss="sphereface2"), dict(sub_centers=2, hard_negatives=1)])
def test_every_loss_is_trained(train, loss):
    output = train(**loss, steps=3)
    trained = AutoModelForAudioXVector.from_pretrained(output / "last").config
    assert all(getattr(trained, name) == value for name, value in loss.items())
    assert all(math.isfinite(line["loss"]) for line in Record(output).lines("train"))


def test_epochs_are_counted_in_utterances(train):
    output = train(epochs=1.5)  # of 16 utterances, four a step
    assert results_of(output)["steps"] == 6


def test_evaluations_and_checkpoints_may_be_counted_in_passes(train, capsys):
    """Of 16 utterances, four a step, three passes: an evaluation each, the last two averaged."""
    settings = dict(evaluate_every="1 epoch", checkpoint_every="1.5 epochs", weight_averaging="2 epochs", log_every=100)
    output = train(epochs=3, **settings, reference_batch=1, max_learning_rate_growth=2)
    assert {line["step"] for line in Record(output).lines("evaluation")} == {4, 8, 12}
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-00000006", "step-00000012"]
    assert {path.name for path in (output / "last_weights").iterdir()} >= {f"step-{n:08d}.safetensors" for n in (8, 12)}
    assert results_of(output)["recipe"]["optimizer"]["weight_averaging"] == "2 epochs"
    assert "times 2, not times 4 as the crops of a step are (max_learning_rate_growth)" in capsys.readouterr().out


def test_what_speakers_are_known_to_the_base_is_told_and_recorded(train, tmp_path, capsys):
    """The second run's base was trained on four of six: the other two are held out, whatever the seed."""
    first = train().rename(tmp_path / "first")
    names = SpeakerTable.load(first / "development_speakers.json").names
    capsys.readouterr()
    second = train(model=first / "last", model_options="{}", seed=5)
    assert SpeakerTable.load(second / "development_speakers.json").names == names
    (note,) = results_of(second)["notes"]
    assert f"classifier: 4 of its 4 rows are taken over from {first}/last" in note
    assert f"Note: {note}" in capsys.readouterr().out
    second.rename(tmp_path / "second")
    settings = dict(model=first / "last", model_options="{}", dev_speakers=3)
    third = train(**settings)
    assert "development: 1 of its 3 speakers have the names of speakers that" in results_of(third)["notes"][0]
    (third / "development_speakers.json").write_text('["x", "y", "z"]')
    with pytest.raises(ValueError, match="not those that .* began with"):
        train("--resume", **settings)
    (third / "development_speakers.json").unlink()
    with pytest.raises(ValueError, match="was begun by an earlier version, which held out other speakers"):
        train("--resume", **settings)


def test_rows_of_other_people_can_be_left(train, tmp_path, capsys):
    """Their names are the same, as where two corpora number their speakers."""
    first = train().rename(tmp_path / "first")
    capsys.readouterr()
    still = dict(learning_rate=0, final_learning_rate=0, weight_decay=0, steps=1)
    second = train(model=first / "last", model_options="{}", reuse_classifier="false", **still)
    assert "taken over" not in capsys.readouterr().out
    before, after = rows_of(first / "last"), rows_of(second / "last")
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in before)


def test_a_classifier_that_was_taken_over_has_to_learn_as_well(train, tmp_path):
    """Here its rows are all alike, and nothing moves."""
    first = train().rename(tmp_path / "first")
    weights = load_file(first / "last/model.safetensors")
    weights["classifier.weight"] = torch.ones_like(weights["classifier.weight"])
    save_file(weights, first / "last/model.safetensors", metadata={"format": "pt"})
    still = dict(learning_rate=0, final_learning_rate=0, weight_decay=0, warmup=0, steps=3, margin_schedule=[1, 1])
    with pytest.raises(RuntimeError, match="nothing is being learnt"):
        train(model=first / "last", model_options="{}", chance_until=2, **still)


# ---------------------------------------------------------------- precision, devices


def test_mixed_precision_trains_and_leaves_a_model_in_float32(train, seen_types):
    output = train(mixed_precision="bf16", ema=0.5)
    assert seen_types == {torch.bfloat16}
    assert all(math.isfinite(line["loss"]) for line in Record(output).lines("train"))
    trained = load_file(output / "best/model.safetensors")
    assert {tensor.dtype for tensor in trained.values() if tensor.is_floating_point()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in trained.values())


@pytest.mark.parametrize(
    "machine, capability, told", [("x86_64", "AVX2", True), ("x86_64", "AVX512", False), ("aarch64", "DEFAULT", False)]
)
def test_emulated_bfloat16_is_told(train, monkeypatch, capsys, machine, capability, told):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    train(mixed_precision="bf16", steps=1)
    assert ("has no bfloat16 instructions" in capsys.readouterr().out) == told


def test_float16_without_a_gpu_is_refused(train, tmp_path):
    with pytest.raises(ValueError, match="mixed_precision: fp16 needs a GPU, .* take bf16 or no"):
        train(mixed_precision="fp16")
    assert not (tmp_path / "run").exists()


def test_a_model_saved_in_bfloat16_is_trained_in_float32(train, tmp_path, capsys):
    """At this learning rate no weight in bfloat16 would move, but for the smallest."""
    save_model(tiny_model().to(torch.bfloat16), tmp_path / "half")
    output = train(model=tmp_path / "half", model_options="{}", learning_rate=1e-6, final_learning_rate=1e-6)
    assert capsys.readouterr().out.count("half is saved in torch.bfloat16; it is trained in float32.") == 1
    name = "redimnet.trunk.stem.conv.weight"
    start = load_file(tmp_path / "half/model.safetensors")[name.removeprefix("redimnet.")]
    trained = load_file(output / "last/model.safetensors")[name]
    assert (start.dtype, trained.dtype) == (torch.bfloat16, torch.float32)
    assert (trained != start.float()).float().mean() > 0.9


@pytest.mark.parametrize("skipped", [False, True])
def test_what_follows_a_step_that_was_left_out(skipped):
    """As in float16 where gradients overflow: rows go back all the same, averages take nothing in."""
    calls = []
    adapter, sampled, average = (
        object.__new__(kind) for kind in (parts.TrainedAdapter, parts.SampledClassifier, parts.MovingAverage)
    )
    adapter.strategy = SimpleNamespace(after_step=lambda *arguments: calls.append(arguments))
    sampled.rows = SimpleNamespace(end=lambda optimizer: calls.append("rows"))
    average.ema = SimpleNamespace(update=calls.append)
    run = SimpleNamespace(model="model", optimizer=None)
    for part in (adapter, sampled, average):
        part.after_optimizer(run, 7, skipped)
    assert calls == [(7, skipped), "rows", *([] if skipped else ["model"])]


def test_a_gpu_is_given_a_batch_while_the_host_goes_on(monkeypatch):
    recipe, config = make_recipe(output="run"), tiny_config(num_speakers=4)
    batch = {"input_values": torch.stack(waves(8000, 8000)), "labels": torch.tensor([0, 3])}
    with pretended_gpu(monkeypatch) as waits:
        run = Run(
            recipe,
            accelerator=SimpleNamespace(device=torch.device("cuda")),
            task=Verification,
            crops=None,
            model=SimpleNamespace(config=config),
            timing=SimpleNamespace(steps=200),
        )
        run.prepared = lambda inputs, labels, **more: SimpleNamespace(loss=inputs.sum() + labels.sum())
        _, loss = train_hf.forward(run, batch, 0)
    assert loss.device.type == "cuda" and waits.seen == []


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    """The classes' names, and what PiSSA began from; the others would write the same files at the same time."""
    monkeypatch.setattr(setup, "PartialState", lambda: SimpleNamespace(is_main_process=False))
    options = dict(finetune="adapter", model="base", peft_options={"init_lora_weights": "pissa"})
    recipe = make_recipe(output=str(tmp_path), **options)
    classes = SpeakerTable(["a"])
    task = SimpleNamespace(
        classes=classes, speakers=classes, development_speakers={"b"}, adapter_task="FEATURE_EXTRACTION"
    )
    setup.claim_output(recipe, task, resume=False)
    accelerator = SimpleNamespace(device=torch.device("cpu"), is_main_process=False)
    timing = SimpleNamespace(steps=200)
    run = Run(recipe, accelerator, task, None, tiny_model(kind=MRLReDimNetForXVector), timing)
    parts.TrainedAdapter(facts=None).start(run, 0, resumed=False)
    assert list(tmp_path.iterdir()) == []


def test_all_processes_go_by_the_score_of_the_first(train, monkeypatch):
    """Or one might end a run that the others go on with, and they would wait for it."""
    monkeypatch.setattr(train_hf, "broadcast_object_list", lambda scores: [0.125])
    output = train()
    assert json.loads((output / "checkpoints/step-00000002/progress-0.json").read_text())["best_score"] == 0.125


# ---------------------------------------------------------------- parquet


@pytest.fixture(scope="module")
def prepared(corpus) -> Path:
    arguments = [str(corpus / "train"), str(corpus.parent / "prepared"), "--shard-mb", "0.05"]
    assert cli_main(["prepare", *arguments]) == 0
    return corpus.parent / "prepared"


@pytest.mark.slow
def test_parquet_is_trained_on_like_the_folder_it_was_made_of(train, prepared, tmp_path):
    folder = train(sampler="utterance").rename(tmp_path / "folder")
    parquet = train(sampler="utterance", train=prepared)
    speakers = [SpeakerTable.load(run / "speakers.json").names for run in (folder, parquet)]
    assert speakers[0] == speakers[1]
    assert results_of(parquet)["results"].keys() == results_of(folder)["results"].keys()


class Stop(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_was_stopped_goes_on_where_it_was(train, corpus, prepared, tmp_path, monkeypatch, workers):
    tests = {"dev_trials": corpus / "test/trials.txt", "dev_folder": corpus / "test/wav", "workers": workers}
    settings = dict(train=prepared, streaming=True, sampler="utterance", steps=4, checkpoint_every=1, **tests)
    whole = train(**settings).rename(tmp_path / "whole")
    save = train_hf.save_checkpoint

    def save_and_stop(accelerator, folder, progress, recipe, steps):
        save(accelerator, folder, progress, recipe, steps)
        if progress.step == 3:
            raise Stop

    monkeypatch.setattr(train_hf, "save_checkpoint", save_and_stop)
    with pytest.raises(Stop):
        train(**settings)
    monkeypatch.setattr(train_hf, "save_checkpoint", save)
    resumed = train("--resume", **settings)
    one, other = (load_file(run / "last/model.safetensors") for run in (whole, resumed))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# ---------------------------------------------------------------- runs that stop by themselves


def test_a_stream_is_made_noisy_by_musan_alone(train, corpus, prepared, tmp_path):
    """Babble is of its speech: a stream has no talkers to draw."""
    for kind in ("noise", "music", "speech"):
        shutil.copytree(corpus / "test/wav", tmp_path / "MUSAN" / kind)
    kinds = "[{kind: one_of, choices: [{kind: noise}, {kind: babble}, {kind: music}]}]"
    given = {"dev_trials": corpus / "test/trials.txt", "dev_folder": corpus / "test/wav"}
    streamed = dict(train=prepared, streaming=True, sampler="utterance", **given)
    output = train(**streamed, augmentations=kinds, noise=tmp_path / "MUSAN")
    assert (output / "results.json").is_file()


def test_a_stream_of_the_speakers_of_an_evaluation_part_is_refused(train, corpus, prepared, tmp_path):
    """None can be left out of it."""
    shards = shutil.copytree(prepared, tmp_path / "shards")
    names = list(SpeakerTable.load(shards / "speakers.json").names)
    SpeakerTable(["id00800", *names[1:]]).save(shards / "speakers.json")
    given = {"dev_trials": corpus / "test/trials.txt", "dev_folder": corpus / "test/wav", "layout": "cnceleb1"}
    with pytest.raises(ValueError, match="train: 1 of the 6 speakers .* are those of CN-Celeb's evaluation part"):
        train(train=shards, streaming=True, sampler="utterance", **given)


def notes_of(stopped: pytest.ExceptionInfo) -> str:
    return "".join(getattr(stopped.value, "__notes__", []))


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_last_good_checkpoint(train):
    with pytest.raises(FloatingPointError, match="loss is no number") as stopped:
        train(steps=30, checkpoint_every=1, learning_rate=1e20, final_learning_rate=1e20, max_gradient_norm=1e30)
    assert "Its last good checkpoint is" in notes_of(stopped) and "--resume goes on from there" in notes_of(stopped)


def test_speech_that_vanishes_stops_the_run(train, corpus, tmp_path, monkeypatch):
    speech = shutil.copytree(corpus / "train", tmp_path / "speech")
    describe = setup.describe

    def describe_and_lose(run):
        describe(run)
        shutil.rmtree(speech)

    monkeypatch.setattr(setup, "describe", describe_and_lose)
    with pytest.raises(AudioError, match="No example of a whole batch of 4 could be read") as stopped:
        train(train=speech)
    assert "had not come to its first checkpoint" in notes_of(stopped)


def test_a_full_disk_leaves_the_last_good_checkpoint(train, tmp_path, monkeypatch):
    """A limit on the size of files, as of now smaller than a checkpoint's: writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    evaluate = train_hf.evaluate_and_keep_best

    def evaluate_then_fill_up(run, progress, history):
        evaluate(run, progress, history)
        if progress.step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))

    monkeypatch.setattr(train_hf, "evaluate_and_keep_best", evaluate_then_fill_up)
    try:
        with pytest.raises((OSError, RuntimeError, SafetensorError)) as stopped:
            train(steps=3, checkpoint_every=1, evaluate_every=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "step-00000001: once the cause is removed" in notes_of(stopped)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000001"]
    monkeypatch.undo()


@pytest.mark.slow
def test_a_dead_worker_stops_the_run(corpus):
    output = corpus.parent / "dead"
    process = start(corpus, command_line(corpus, output, steps=100_000, workers=1, checkpoint_every=2))
    while trained_steps(output) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    (worker,) = (
        child for child in psutil.Process(process.pid).children() if "resource_tracker" not in str(child.cmdline())
    )
    worker.kill()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode
    assert "DataLoader worker" in printed and "Its last good checkpoint is" in printed, printed[-3000:]


def test_a_run_without_a_better_model_ends(train, capsys):
    settings = dict(steps=40, evaluate_every=1, checkpoint_every=40, patience=2, learning_rate=0.05)
    output = train(**settings)
    ended = trained_steps(output)
    assert ended < 40 and f"ending at step {ended}" in capsys.readouterr().out
    train("--resume", **settings)
    assert trained_steps(output) == ended


def test_without_a_test_the_development_trials_are_reported(train):
    assert list(results_of(train(tests="{}"))["results"]) == ["development", "training speakers"]


def test_too_many_development_speakers_are_refused(train):
    with pytest.raises(ValueError, match="dev_speakers: 6 speakers .* only 6 of 6"):
        train(dev_speakers=6)


def test_unusable_files_are_listed_and_too_many_stop_the_run(train, tmp_path):
    with pytest.raises(ValueError, match="of 24 files cannot be used"):
        train(min_seconds=0.75)
    assert "shorter than 0.75 s" in (tmp_path / "run/unusable_files.tsv").read_text()
