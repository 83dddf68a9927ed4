"""The parts of a run: which a recipe asks for, and the points of the loop at which each is called."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_config, tiny_model

from modeling_mrl_redimnet import MRLReDimNetForXVector
from mrl_redimnet.data.synthetic import make_corpus
from mrl_redimnet.training import parts, setup
from mrl_redimnet.training.reading import make_recipe
from mrl_redimnet.training.run import Part, Run
from mrl_redimnet.training.tasks import Verification

ALWAYS = ["TrainedModel", "Learning"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("parts") / "corpus", 6, 2, sessions=2, utterances=2, seconds=(0.6, 0.9))


def run_of(**settings) -> Run:
    """A run that has not begun."""
    recipe = make_recipe(**{"rotate_at": [], **settings})
    model = tiny_model(tiny_config(num_speakers=4), kind=MRLReDimNetForXVector)
    timing = SimpleNamespace(steps=20, averaged=2, chance_until=10)
    task = object.__new__(Verification)
    return Run(recipe, SimpleNamespace(device=torch.device("cpu")), task, None, model, timing)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ALWAYS),
        (dict(ema=0.9), ["TrainedModel", "MovingAverage", "Learning"]),
        (dict(teacher="b6"), ["Distillation", "TrainedModel", "Learning"]),
        (dict(teacher="b6", margin_weight=0), ["Distillation", "TrainedModel"]),
        (dict(classifier_sample=2), ["TrainedModel", "SampledClassifier", "Learning"]),
        (dict(rotate_at=[0.5], weight_averaging=0.5), ["TrainedModel", "CheckpointAverage", "Rotation", "Learning"]),
        (dict(rotate_at=[0.01]), ALWAYS),  # before the first step there is nothing to be rotated
    ],
)
def test_a_run_has_the_parts_that_its_recipe_asks_for(settings, expected):
    assert [type(part).__name__ for part in parts.parts_of(run_of(**settings), None, True)] == expected


def test_exits_learn_wherever_a_model_has_some():
    for settings, expected in (({}, ["TrainedModel", "Exits", "Learning"]), (dict(exits_weight=0), ALWAYS)):
        run = run_of(**settings)
        run.model.config.exits = [1]
        assert [type(part).__name__ for part in parts.parts_of(run, None, True)] == expected


def test_an_adapter_is_trained_in_the_place_of_the_model():
    run = run_of(finetune="adapter")
    assert [type(part).__name__ for part in parts.parts_of(run, object(), True)] == ["TrainedAdapter", "Learning"]


def test_phases_end_where_a_part_says_so_and_at_the_end_of_the_run():
    run = run_of(trunk_frozen_until=0.3)
    run.parts = parts.parts_of(run, None, True)
    assert run.phase_ends(0) == [6, 20] and run.phase_ends(6) == [6, 20] and run.phase_ends(7) == [20]


class Recorder(Part):
    """A part that writes down which of its hooks are called."""

    def __init__(self):
        self.calls = []

    def __getattribute__(self, name: str):
        value = super().__getattribute__(name)
        if name in vars(Part) and not name.startswith("_"):
            self.calls.append(name)
        return value


def test_hooks_are_called_at_fixed_points(train, monkeypatch):
    recorder, parts_of = Recorder(), setup.parts_of
    monkeypatch.setattr(setup, "parts_of", lambda *arguments: [*parts_of(*arguments), recorder])
    train(steps=2, evaluate_every=2, gradient_accumulation=2)
    begin = ["start", "begin_phase", "go_on", "phases"]
    step = ["before_step", *["labels", "asks", "loss"] * 2, "after_optimizer", "numbers", "after_step"]
    evaluation = ["evaluating", "may_be_best", "saving", "evaluated"]
    assert recorder.calls == [*begin, *step, *step, *evaluation, "saving"]
