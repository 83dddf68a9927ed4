"""What a training run learns and how it is judged: telling speakers apart, or an attribute of the speech."""

import csv
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers.utils import cached_file, logging

from configuration_mrl_redimnet import MRLReDimNetConfig
from modeling_mrl_redimnet import (
    MRLReDimNetForSequenceClassification,
    MRLReDimNetForXVector,
    MRLReDimNetModel,
    MRLReDimNetPreTrainedModel,
)
from mrl_redimnet.audio.augmentation import FileTalkers, Sources, make_augmentations
from mrl_redimnet.audio.domains import Domain, make_domain
from mrl_redimnet.audio.io import AudioError
from mrl_redimnet.audio.waveforms import into_domain
from mrl_redimnet.data.corpus import (
    UNLABELLED,
    SpeakerTable,
    check_problems,
    labels_of,
    load_corpus,
    seconds_of,
    speakers_of,
    split_usable,
)
from mrl_redimnet.data.streaming import StreamContents
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.evaluation.groups import error_rates, read_groups_for
from mrl_redimnet.evaluation.results import attribute_row, check_present, embed_trials, evaluate_trials, without
from mrl_redimnet.files import path_below, replace_file, text_lines
from mrl_redimnet.rows import AttributeRow, GroupRow, VerificationRow
from mrl_redimnet.saving import resolve_model
from mrl_redimnet.scoring.scorers import score
from mrl_redimnet.scoring.trials import Trials, UnknownSpeakersError, make_trials, read_trials
from mrl_redimnet.settings import near
from mrl_redimnet.streams import Stream
from mrl_redimnet.training.recipe import EvaluationSet, Recipe
from mrl_redimnet.training.schedules import margin_at, prefix_weights_at
from mrl_redimnet.training.teachers import SOURCES, source_of

M = TypeVar("M", bound=MRLReDimNetPreTrainedModel)


@dataclass(frozen=True)
class TrialTest:
    """A trial list, the folder of its paths, the domain their audio is brought into (None: as it is).

    group_of: the group of every speaker, where error rates by group are wanted. depth: the exit whose embeddings are
    judged (None: the whole network's).
    """

    trials: Trials
    folder: Path
    domain: Domain | None = None
    group_of: dict[str, str] | None = None
    depth: int | None = None

    def __len__(self) -> int:
        return len(self.trials)


@dataclass(frozen=True)
class LabelledTest:
    """Labelled speech: rows of a corpus with their targets, the folder of their paths, and the domain their audio is
    brought into.
    """

    corpus: Dataset
    targets: np.ndarray
    folder: Path
    domain: Domain | None = None

    def __len__(self) -> int:
        return len(self.corpus)


Test = TypeVar("Test", TrialTest, LabelledTest)
Row = TypeVar("Row", VerificationRow, AttributeRow)


class Task(ABC, Generic[Test, Row]):
    """What a run learns from its training speech, and how models are judged.

    Attributes:
        name: of the task, for cards.
        adapter_task: PEFT's name for it, which an adapter's folder holds.
        labels: the classes of an attribute; none where speakers or numbers are learnt.
        targets: [utterances] what is learnt of each; None where it is the speaker.
        classes: what the rows of the classifier stand for; None where the configuration has the labels.
        corpus: the utterances that are trained on; utterances: how many; speakers: theirs; speech: both in words.
        development: tests that are judged during the run, by title; the first one chooses the best model.
        tests: those of the run's end, by name.
        development_speakers: the speakers that are held out.
        notes: sentences to be printed before the run, by what they are about.
    """

    name: str
    adapter_task: str
    labels: tuple[str, ...]
    targets: np.ndarray | None
    classes: SpeakerTable | None
    corpus: Dataset | StreamContents
    utterances: int
    speakers: SpeakerTable
    speech: str
    development: dict[str, Test]
    tests: dict[str, Test]
    development_speakers: set[str]
    notes: dict[str, str]

    @abstractmethod
    def build_model(self, recipe: Recipe) -> tuple[MRLReDimNetPreTrainedModel, bool]:
        """The model to train, and whether it has a classifier of speakers that knows none of them yet."""

    @staticmethod
    @abstractmethod
    def loss_options(step: int, steps: int, recipe: Recipe, config: MRLReDimNetConfig) -> dict:
        """What the model's forward pass gets for its loss at a step of `steps`."""

    @abstractmethod
    def evaluate(
        self,
        model: MRLReDimNetPreTrainedModel,
        test: Test,
        dims: Sequence[int] | None = None,
        resamples: int = 0,
        progress: str | None = None,
    ) -> list[Row]:
        """Results of one test.

        dims: of the embeddings, where the task compares them (None: the model's). resamples: for intervals over
        speakers, 0 for none. progress: title of a progress bar.
        """

    @abstractmethod
    def by_group(self, model: MRLReDimNetPreTrainedModel, test: Test, resamples: int = 0) -> list[GroupRow]:
        """Results of one test by group of speakers; none where there are no groups."""

    @staticmethod
    @abstractmethod
    def score(rows: list[Row]) -> float:
        """What models are chosen by, lower is better."""

    @staticmethod
    @abstractmethod
    def curve(rows: list[Row]) -> dict:
        """What the run's record keeps of an evaluation."""


class Verification(Task[TrialTest, VerificationRow]):
    """Speakers are told apart by a margin classifier over every prefix, or as a teacher does, by the encoder alone
    (margin_weight: 0); models are judged by the EER of trials.
    """

    name = "verification"
    adapter_task = "FEATURE_EXTRACTION"  # the classifier stays behind: adapters are the encoder's
    labels = ()
    targets = None

    def __init__(self, recipe: Recipe, corpus: Dataset | StreamContents) -> None:
        """corpus: the usable training rows, of which the development speakers are taken out; or what is to stream."""
        base = base_speakers(recipe)
        if recipe.evaluation.dev_trials is not None:
            dev, folder = read_trials(recipe.evaluation.dev_trials), Path(recipe.evaluation.dev_folder)
            self.corpus = corpus
        else:
            self.corpus, held_out = hold_out(corpus, recipe, base)
            dev, folder = trials_of(held_out, recipe)
        self.development = {
            name: TrialTest(dev, folder, domain) for name, domain in development_domains(recipe).items()
        }
        streamed = isinstance(corpus, StreamContents)
        if not streamed and (known := some_training_speakers(self.corpus, recipe)) is not None:
            self.development["training speakers"] = TrialTest(*trials_of(known, recipe))
        self.tests = {name: trial_test(test_trials(test), test) for name, test in recipe.evaluation.tests.items()}
        for test in (*self.tests.values(), *self.development.values()):
            check_present(test.trials, test.folder)  # now, not after the training
        contents = corpus if streamed else contents_of(self.corpus)
        self.utterances, self.speakers, self.speech = contents.rows, contents.speakers, told(contents)
        if recipe.data.layout == UNLABELLED:
            self.speech = self.speech.replace(f" of {len(self.speakers):,} speakers", " of unknown speakers")
        self.unreadable = Unreadable(recipe, self.utterances)
        labelled = recipe.loss.margin_weight > 0
        self.classes = classes_of(self.speakers, recipe.augmentation.speed_perturb) if labelled else None
        self.development_speakers = speakers_in(dev)
        self.notes = notes_on_speakers(
            recipe,
            base,
            self.speakers,
            self.development_speakers,
            {n: speakers_in(t.trials) for n, t in self.tests.items()},
        )
        depths = (start_config(recipe).exits or []) if recipe.exits_learn else []
        chosen_by = dict([next(iter(self.development.items()))])
        self.development |= at_depths(chosen_by, depths)
        self.tests |= at_depths(self.tests, depths)

    def build_model(self, recipe: Recipe) -> tuple[MRLReDimNetForXVector | MRLReDimNetModel, bool]:
        """The model to train, and whether its classifier knows none of the classes yet."""
        if self.classes is None:
            return start_model(MRLReDimNetModel, recipe)[0], False
        if recipe.model.start is None:
            return start_model(MRLReDimNetForXVector, recipe, num_speakers=len(self.classes))
        model, headless = start_model(MRLReDimNetForXVector, recipe)
        old = None if headless or not recipe.model.reuse_classifier else saved_speakers(saved_start(recipe))
        carried = carry_classifier(model, old, self.classes)
        if old is not None and carried:
            self.notes["classifier"] = (
                f"classifier: {carried:,} of its {len(self.classes):,} rows are taken over from {recipe.model.start}, "
                f"whose speakers.json has {len(old):,} names, because names are the same. If they are those of other "
                "people (two corpora with the same numbers, for instance), give reuse_classifier: false."
            )
        return model, carried == 0

    @staticmethod
    def loss_options(step: int, steps: int, recipe: Recipe, config: MRLReDimNetConfig) -> dict:
        """What the model's forward pass gets for its loss at a step of `steps`."""
        return {
            "margin": margin_at(step, recipe, steps, config.margin),
            "prefix_weights": prefix_weights_at(step, recipe, steps, config),
        }

    def evaluate(
        self,
        model: MRLReDimNetPreTrainedModel,
        test: TrialTest,
        dims: Sequence[int] | None = None,
        resamples: int = 0,
        progress: str | None = None,
    ) -> list[VerificationRow]:
        """Error rates of one test at each of `dims`."""
        problems: dict[str, str] = {}
        model = model if test.depth is None else model.base_model.at_depth(test.depth)
        rows = evaluate_trials(model, test.trials, test.folder, dims, resamples, progress, test.domain, problems)
        development = any(test is one for one in self.development.values())
        self.unreadable.check(test, problems, len(test.trials.utterances), development)
        return rows

    def by_group(self, model: MRLReDimNetPreTrainedModel, test: TrialTest, resamples: int = 0) -> list[GroupRow]:
        """Error rates by group of speakers, at the whole embedding; none where the test has no groups."""
        if test.group_of is None:
            return []
        problems: dict[str, str] = {}
        embeddings = embed_trials(model, test.trials, test.folder, domain=test.domain, problems=problems)
        read = [row for row, path in enumerate(test.trials.utterances) if path not in problems]
        trials, utterances = without(test.trials, problems), [test.trials.utterances[row] for row in read]
        dim = model.config.embedding_size
        scores = score(trials, utterances, embeddings[read], dim)
        return error_rates(trials, scores, test.group_of, resamples, dim=dim)

    @staticmethod
    def score(rows: list[VerificationRow]) -> float:
        """What models are chosen by, lower is better: the mean EER over dimensions, all of which are to be good."""
        return sum(row.eer for row in rows) / len(rows)

    @staticmethod
    def curve(rows: list[VerificationRow]) -> dict:
        """What the run's record keeps of an evaluation."""
        return {"eer": {str(row.dim): row.eer for row in rows}}


class Attribute(Task[LabelledTest, AttributeRow]):
    """Classes (or, where the labels are numbers, a value) from labelled speech; judged on speakers held out."""

    adapter_task = "SEQ_CLS"  # the head travels with the adapter
    targets: np.ndarray

    def __init__(self, recipe: Recipe, corpus: Dataset) -> None:
        """corpus: the usable training rows; the label file must know them all."""
        table = read_labels(recipe.data.label_file, recipe.data.label_column, recipe.data.label_key)
        found = {label_of(table, key, recipe) for key in corpus[recipe.data.label_key]}
        numbers = all(is_number(value) for value in found)
        self.name = "regression" if numbers else "classification"
        self.labels = () if numbers else tuple(sorted(found))
        base = base_speakers(recipe)
        self.corpus, held_out = hold_out(corpus, recipe, base)
        self.targets = self._targets(table, self.corpus, recipe)
        dev_targets = self._targets(table, held_out, recipe)
        self.development = {
            name: LabelledTest(held_out, dev_targets, development_folder(held_out, recipe), domain)
            for name, domain in development_domains(recipe).items()
        }
        self.tests = {}
        for name, test in recipe.evaluation.tests.items():
            rows, _ = split_usable(load_corpus(test.folder, recipe.data.layout), recipe.data.min_seconds)
            if not len(rows):
                raise ValueError(f"tests.{name}: no usable file below {test.folder} (min_seconds, broken files?).")
            self.tests[name] = LabelledTest(
                rows, self._targets(table, rows, recipe), development_folder(rows, recipe), test_domain(test)
            )
        if (known := some_training_speakers(self.corpus, recipe)) is not None:
            self.development["training speakers"] = LabelledTest(
                known, self._targets(table, known, recipe), development_folder(known, recipe)
            )
        contents = contents_of(self.corpus)
        self.utterances, self.speakers, self.speech = contents.rows, contents.speakers, told(contents)
        self.unreadable = Unreadable(recipe, self.utterances)
        self.classes = None  # the labels are the configuration's
        self.development_speakers = set(speakers_of(held_out))
        tested = {name: set(speakers_of(test.corpus)) for name, test in self.tests.items()}
        self.notes = notes_on_speakers(recipe, base, self.speakers, self.development_speakers, tested)

    def _targets(self, table: dict[str, str], corpus: Dataset, recipe: Recipe) -> np.ndarray:
        found = [label_of(table, key, recipe) for key in corpus[recipe.data.label_key]]
        if not self.labels:
            if words := sorted({value for value in found if not is_number(value)}):
                raise ValueError(
                    f"{recipe.data.label_column}: {words} occur in a test, the training speech has numbers."
                )
            return np.array([float(value) for value in found], dtype=np.float32)
        unknown = sorted(set(found) - set(self.labels))
        if unknown:
            raise ValueError(f"{recipe.data.label_column}: {unknown} occur in a test, but in no training speech.")
        return np.array([self.labels.index(value) for value in found])

    def build_model(self, recipe: Recipe) -> tuple[MRLReDimNetForSequenceClassification, bool]:
        """The model to train; its head is fresh unless the start had one for the same labels."""
        names: dict[str, Any] = {"num_labels": max(1, len(self.labels))}
        if self.labels:
            names |= {"id2label": dict(enumerate(self.labels)), "label2id": {v: i for i, v in enumerate(self.labels)}}
        model, fresh = start_model(MRLReDimNetForSequenceClassification, recipe, **names)
        if recipe.model.start is not None and not self._is_own_head(saved_start(recipe)):
            model.classifier.reset_parameters()  # it may have been of the same shape, for something else
            fresh = True
        if fresh and not self.labels:
            with torch.no_grad():  # a head that begins at the training speech's mean has less to learn
                model.classifier.bias.fill_(float(self.targets.mean()))
        return model, False

    def _is_own_head(self, folder: str | Path) -> bool:
        """Whether a saved model's head is for these very labels."""
        config = MRLReDimNetConfig.from_pretrained(folder)
        same = not self.labels or tuple(config.id2label.values()) == self.labels
        return same and (config.architectures or []) == [MRLReDimNetForSequenceClassification.__name__]

    @staticmethod
    def loss_options(step: int, steps: int, recipe: Recipe, config: MRLReDimNetConfig) -> dict:
        """Nothing: the loss of an attribute has neither margin nor prefixes."""
        return {}

    @torch.no_grad()
    def evaluate(
        self,
        model: MRLReDimNetPreTrainedModel,
        test: LabelledTest,
        dims: Sequence[int] | None = None,
        resamples: int = 0,
        progress: str | None = None,
    ) -> list[AttributeRow]:
        """Accuracy, or mean absolute error, of whole utterances; no `dims`: heads take the whole embedding."""
        files = [test.folder / path for path in test.corpus["path"]]
        prepare = into_domain(test.folder, test.domain)
        found = SpeakerEncoder(model).embed_all(files, progress=progress, prepare=prepare)
        told_by_path = {str(files[row]): why for row, why in found.problems.items()}
        development = any(test is one for one in self.development.values())
        self.unreadable.check(test, told_by_path, len(files), development)
        read = np.setdiff1d(np.arange(len(files)), list(found.problems))
        if not len(read):
            raise AudioError(f"none of the {len(files):,} labelled files below {test.folder} can be read")
        device = next(model.parameters()).device
        logits = model.classifier(torch.from_numpy(found.embeddings[read]).to(device)).float().cpu().numpy()
        answers = logits.argmax(1) if self.labels else logits[:, 0]
        targets, speakers = test.targets[read], np.array(test.corpus["speaker"])[read]
        return [attribute_row(answers, targets, speakers, bool(self.labels), resamples)]

    def by_group(self, model: MRLReDimNetPreTrainedModel, test: LabelledTest, resamples: int = 0) -> list[GroupRow]:
        """None: the groups are those of trials."""
        return []

    @staticmethod
    def score(rows: list[AttributeRow]) -> float:
        """What models are chosen by, lower is better: the share of errors, or the mean absolute error."""
        return 1 - rows[0].value if rows[0].metric == "accuracy" else rows[0].value

    @staticmethod
    def curve(rows: list[AttributeRow]) -> dict:
        """What the run's record keeps of an evaluation."""
        return {row.metric: row.value for row in rows}


class Unreadable:
    """Files of development and test speech that cannot be read: each is told once."""

    def __init__(self, recipe: Recipe, utterances: int) -> None:
        """utterances: of the training speech."""
        self.most, self.utterances = recipe.data.max_unusable_ratio, utterances
        self.told: set[str] = set()

    def check(self, test: TrialTest | LabelledTest, problems: dict[str, str], files: int, development: bool) -> None:
        """problems: {path: message} of the `files` files of a test.

        Raises ValueError where development speech, which is judged early in the run, has more than the recipe's
        max_unusable_ratio of all utterances; a test at the run's end only tells.
        """
        summary = check_problems([*problems.items()], self.utterances + files, self.most if development else 1.0)
        if not problems.keys() <= self.told:
            self.told |= problems.keys()
            if PartialState().is_main_process:
                print(f"{test.folder}: {summary}. Their trials or labels are left out.")


def at_depths(tests: dict[str, TrialTest], depths: Sequence[int]) -> dict[str, TrialTest]:
    """The same tests of the embeddings at each exit, by title."""
    return {
        f"{name}, depth {depth}": replace(test, depth=depth, group_of=None)
        for name, test in tests.items()
        for depth in depths
    }


def contents_of(corpus: Dataset) -> StreamContents:
    """What there is in a corpus: speakers, utterances, seconds."""
    return StreamContents(SpeakerTable(speakers_of(corpus)), len(corpus), float(seconds_of(corpus).sum()))


def told(contents: StreamContents) -> str:
    """Contents in words."""
    hours = "" if contents.seconds is None else f" ({contents.seconds / 3600:.1f} h)"
    return f"{contents.rows:,} utterances of {len(contents.speakers):,} speakers{hours}"


def make_task(recipe: Recipe, corpus: Dataset | StreamContents) -> Task:
    """The task a recipe describes."""
    return Verification(recipe, corpus) if recipe.data.label_column is None else Attribute(recipe, corpus)


def check_files(recipe: Recipe) -> None:
    """Raises FileNotFoundError or ValueError for files and folders of the recipe that are not there, or not as said.

    To be called before any speech is read, which may take long.
    """
    files = {"dev_trials": recipe.evaluation.dev_trials, "label_file": recipe.data.label_file}
    folders = {
        "dev_folder": recipe.evaluation.dev_folder,
        "noise": recipe.augmentation.noise,
        "rooms": recipe.augmentation.rooms,
    }
    for name, test in recipe.evaluation.tests.items():
        files |= {f"tests.{name}.{key}": getattr(test, key) for key in ("trials", "enrolments", "groups")}
        folders[f"tests.{name}.folder"] = test.folder if recipe.data.label_column is None else None
    for what, there, paths in (("file", Path.is_file, files), ("folder", Path.is_dir, folders)):
        for setting, path in paths.items():
            if path is not None and not there(Path(path)):
                raise FileNotFoundError(f"{setting}: {path} is not a {what}.")
    if recipe.data.label_file is not None:
        read_labels(recipe.data.label_file, recipe.data.label_column, recipe.data.label_key)
    if recipe.data.train is not None:  # else the noise may be that of the synthetic corpus
        talkers = None if recipe.data.streaming else FileTalkers(["the training speech"])
        kind = recipe.augmentation
        make_augmentations(kind.augmentations, Sources(kind.noise, kind.rooms, talkers))
        training_domain(recipe)
    if recipe.loss.teacher is not None:
        SOURCES[source_of(recipe.loss.teacher)].check(recipe.loss.teacher)
    if recipe.loss.teacher_axes is not None and not Path(recipe.loss.teacher_axes).is_file():
        raise FileNotFoundError(f"teacher_axes: {recipe.loss.teacher_axes} is not there.")


def saved_start(recipe: Recipe) -> str | Path:
    """The folder or Hub id of the saved model that the recipe starts from. Raises as `resolve_model`."""
    return resolve_model(recipe.model.name)


def start_config(recipe: Recipe) -> MRLReDimNetConfig:
    """The configuration of the model that is to be trained, without its head. Raises as `start_model`."""
    if recipe.model.start is None:
        return MRLReDimNetConfig.from_size(recipe.model.name, **recipe.config_changes)
    return MRLReDimNetConfig.from_pretrained(saved_start(recipe), **recipe.config_changes)


def start_model(kind: type[M], recipe: Recipe, **config: Any) -> tuple[M, bool]:
    """A model of `kind` from a size or a saved one, and whether its head is new; nothing else may be.

    In float32, whatever it is saved in: in bfloat16 most steps of an optimiser are too small to change a weight.
    """
    if recipe.model.start is None:
        return kind(MRLReDimNetConfig.from_size(recipe.model.name, **config, **recipe.config_changes)), True
    config = {"dtype": torch.float32, **config, **recipe.config_changes}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers warns of a new head, which is what training is for
    try:
        model, info = kind.from_pretrained(
            saved_start(recipe), ignore_mismatched_sizes=True, output_loading_info=True, **config
        )
    finally:
        logging.set_verbosity(verbosity)
    missing = {name for name in info["missing_keys"] if "exits" not in name.split(".")}  # new ones are no head
    return model, bool(missing or info["mismatched_keys"])


def saved_speakers(model: str | Path) -> SpeakerTable | None:
    """The classes of a saved model's classifier, as its speakers.json tells them; None where it has none."""
    file = cached_file(model, "speakers.json", _raise_exceptions_for_missing_entries=False)
    return None if file is None else SpeakerTable.load(file)


def base_speakers(recipe: Recipe) -> set[str] | None:
    """The speakers that the model to start from was trained on, by name; none for random weights.

    None where it does not say: published checkpoints have no speakers.json.
    """
    if recipe.model.start is None:
        return set()
    table = saved_speakers(saved_start(recipe))
    return None if table is None else {re.sub(r" at speed [\d.]+$", "", name) for name in table.names}


def speakers_in(trials: Trials) -> set[str]:
    """The speakers of a trial list, none where it does not tell them."""
    try:
        return {name for side in trials.speakers for name in np.unique(side).tolist()}
    except UnknownSpeakersError:
        return set()


def notes_on_speakers(
    recipe: Recipe,
    base: set[str] | None,
    training: SpeakerTable,
    development: set[str],
    tests: dict[str, set[str]],
) -> dict[str, str]:
    """What is to be said of speakers that are judged and were trained on, now or before (`base`), by what it is about.

    Speakers are compared by name, so that it is only said: in another corpus the same name may be somebody else.
    """
    notes, chosen_by = {}, "the best step may be chosen wrongly; dev_trials can name other speakers."
    known_by = {
        "that this run trains on": set(training.names),
        f"that {recipe.model.start} was trained on": base or set(),
    }
    for title, judged in {"development": development, **{f"tests.{name}": s for name, s in tests.items()}}.items():
        for whom, known in known_by.items():
            if shared := sorted(judged & known):
                notes[f"{title}, {whom}"] = (
                    f"{title}: {len(shared):,} of its {len(judged):,} speakers have the names of speakers {whom} "
                    f"({', '.join(shared[:3])}{', ...' if len(shared) > 3 else ''}). If they are the same people, its "
                    "error rates are too low" + (f", and {chosen_by}" if title == "development" else ".")
                )
    if base is None:
        notes["base"] = (
            f"development: {recipe.model.start} does not say whom it was trained on (it has no speakers.json). If the "
            f"{len(development):,} development speakers are among them, error rates are too low, and {chosen_by}"
        )
    return notes


def hold_out(corpus: Dataset, recipe: Recipe, known: set[str] | None = None) -> tuple[Dataset, Dataset]:
    """Rows for training, and those of `dev_speakers` speakers that are not trained on.

    known: speakers that the model to start from was trained on; they are held out only where too few others are left.
    """
    speakers = SpeakerTable(speakers_of(corpus))
    labels = labels_of(corpus, speakers)
    eligible = np.flatnonzero(np.bincount(labels) > 1)  # a target trial needs two utterances
    if len(eligible) <= recipe.evaluation.dev_speakers:
        raise ValueError(
            f"dev_speakers: {recipe.evaluation.dev_speakers} speakers are to be held out, but only {len(eligible)} of "
            f"{len(speakers)} have two utterances or more. Hold out fewer, or give dev_trials and dev_folder."
        )
    rng = Stream.DEVELOPMENT_SPEAKERS.generator(recipe.run.seed)
    chosen: list[int] = []
    is_known = np.array([speakers.name(int(label)) in (known or ()) for label in eligible])
    for some in (eligible[~is_known], eligible[is_known]):
        count = min(recipe.evaluation.dev_speakers - len(chosen), len(some))
        chosen += rng.choice(some, count, replace=False).tolist() if count else []
    is_dev = np.isin(labels, chosen)
    return corpus.select(np.flatnonzero(~is_dev)), corpus.select(np.flatnonzero(is_dev))


def some_training_speakers(corpus: Dataset, recipe: Recipe) -> Dataset | None:
    """Utterances of as many training speakers as are held out, whose results show how much is learnt by heart.

    None where fewer than two speakers have several utterances.
    """
    labels = labels_of(corpus, SpeakerTable(speakers_of(corpus)))
    several = np.flatnonzero(np.bincount(labels) > 1)
    if len(several) < 2:
        return None
    wanted = min(len(several), max(2, recipe.evaluation.dev_speakers))
    chosen = Stream.TRAINING_SPEAKERS.generator(recipe.run.seed).choice(several, wanted, replace=False)
    return corpus.select(np.flatnonzero(np.isin(labels, chosen)))


def trials_of(corpus: Dataset, recipe: Recipe) -> tuple[Trials, Path]:
    """Trials among the utterances of a part of the training speech, and the folder of their paths."""
    trials = make_trials(corpus["path"], corpus["speaker"], corpus["session"], seed=recipe.run.seed)
    return trials, development_folder(corpus, recipe)


def development_folder(corpus: Dataset, recipe: Recipe) -> Path:
    """The folder that the paths of a corpus are relative to; audio of parquet files is written below `output` first."""
    first, folder = corpus[0], Path(recipe.run.output) / "development"
    if first["audio"]["bytes"] is None:
        return Path(first["audio"]["path"].removesuffix(first["path"]))
    for row in corpus:
        file, data = path_below(folder, row["path"], f"path of {recipe.data.train}"), row["audio"]["bytes"]
        if not file.is_file() or file.stat().st_size != len(data):
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, partial(Path.write_bytes, data=data))
    return folder


def classes_of(speakers: SpeakerTable, speeds: list[float]) -> SpeakerTable:
    """What the classifier's rows stand for: the speakers, then the speakers at each further speed."""
    rest = [f"{name} at speed {speed:g}" for speed in speeds[1:] for name in speakers.names]
    return SpeakerTable([*speakers.names, *rest])


def carry_classifier(model: MRLReDimNetForXVector, old: SpeakerTable | None, new: SpeakerTable) -> int:
    """Gives the model a classifier of the classes `new`, in which those it had, by name, keep their rows.

    Returns how many did. old: None where the names of its rows are not known.
    """
    before, config = model.classifier, model.config
    known = () if old is None or len(old) != config.num_speakers else old.names
    config.num_speakers = len(new)
    model.classifier = type(before)(config)
    shared = sorted(set(known) & set(new.names))
    if old is None or not shared:
        return 0
    with torch.no_grad():
        rows_of = [
            weight.view(-1, config.sub_centers, weight.shape[1]) for weight in (before.weight, model.classifier.weight)
        ]
        rows_of[1][[new.id(name) for name in shared]] = rows_of[0][[old.id(name) for name in shared]].float()
        if before.bias is not None and model.classifier.bias is not None:
            model.classifier.bias.copy_(before.bias)
    return len(shared)


def training_domain(recipe: Recipe) -> Domain:
    """The domain of the training crops; its noise is the recipe's."""
    options = dict(recipe.augmentation.domain_options)
    if recipe.augmentation.domain == "noisy":
        options = {"noise": recipe.augmentation.noise, "rooms": recipe.augmentation.rooms, **options}
    return make_domain(recipe.augmentation.domain, **options)


def development_domains(recipe: Recipe) -> dict[str, Domain | None]:
    """What development speech is judged in: the recipe's domain first, and beside it as it is."""
    if recipe.augmentation.domain == "clean":
        return {"development": None}
    return {f"development, {recipe.augmentation.domain}": training_domain(recipe), "development, as it is": None}


def test_trials(test: EvaluationSet) -> Trials:
    """The trial list of a test of the recipe, as `mrl-redimnet evaluate` reads it."""
    return read_trials(test.trials, test.format, test.enrolments, test.suffix)


def trial_test(trials: Trials, test: EvaluationSet) -> TrialTest:
    """A test of the recipe. Raises ValueError where its groups lack speakers."""
    group_of = test.groups and read_groups_for([trials], test.groups, test.group_column or "gender")
    return TrialTest(trials, Path(test.folder), test_domain(test), group_of)


def test_domain(test: EvaluationSet) -> Domain | None:
    """The domain of a test's audio, None where it stays as it is."""
    return None if test.domain == "clean" else make_domain(test.domain, **test.domain_options)


def read_labels(file: str | Path, column: str, key: str) -> dict[str, str]:
    """`key` -> label from a CSV file with a header. Raises ValueError where columns are missing or labels differ."""
    rows = csv.DictReader(text_lines(file))
    missing = sorted({column, key} - set(rows.fieldnames or ()))
    if missing:
        there = rows.fieldnames or []
        raise ValueError(f"{file}: no column {', '.join(missing)}; there are {there}.{near(missing[0], there)}")
    table: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        if table.setdefault(row[key], row[column]) != row[column]:
            raise ValueError(
                f"{file}, line {number}: {row[key]} is {row[column]!r} here and {table[row[key]]!r} above; "
                "give label_key: path if labels belong to utterances."
            )
    return table


def is_number(text: str) -> bool:
    """Whether a label is a finite number."""
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def label_of(table: dict[str, str], key: str, recipe: Recipe) -> str:
    """A row's label. Raises ValueError where the label file has none."""
    if not table.get(key):
        raise ValueError(
            f"{recipe.data.label_file}: no {recipe.data.label_column} for the {recipe.data.label_key} {key!r}."
        )
    return table[key]
