"""What a training run learns and how it is judged: telling speakers apart, or an attribute of the speech."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from configuration_mrl_redimnet import SIZES, MRLReDimNetConfig
from modeling_mrl_redimnet import MRLReDimNetForSequenceClassification, MRLReDimNetForXVector
from mrl_redimnet.corpus import SpeakerTable, load_corpus, split_usable
from mrl_redimnet.domains import make_domain
from mrl_redimnet.evaluation import (
    AttributeRow,
    VerificationRow,
    attribute_row,
    check_present,
    embed_files,
    evaluate_trials,
    reader,
)
from mrl_redimnet.folders import refuse_missing
from mrl_redimnet.recipe import Recipe
from mrl_redimnet.trials import Trials, make_trials, read_trials

Rows = list[VerificationRow] | list[AttributeRow]


@dataclass(frozen=True)
class TrialTest:
    """A trial list, the folder of its paths, the domain their audio is brought into (None: as it is)."""

    trials: Trials
    folder: Path
    domain: object = None

    def __len__(self) -> int:
        return len(self.trials)


@dataclass(frozen=True)
class LabelledTest:
    """Labelled speech: rows of a corpus with their targets, and the domain their audio is brought into."""

    corpus: Dataset
    targets: np.ndarray
    domain: object = None

    def __len__(self) -> int:
        return len(self.corpus)


class Verification:
    """Speakers are told apart by a margin classifier over every prefix; models are judged by the EER of trials."""

    name = "verification"
    adapter_task = "FEATURE_EXTRACTION"  # the classifier stays behind: adapters are the encoder's
    labels: tuple[str, ...] = ()
    targets = None  # what is learnt are the speakers

    def __init__(self, recipe: Recipe, corpus: Dataset):
        """corpus: the usable training rows, of which the development speakers are taken out."""
        if recipe.dev_trials is not None:
            self.corpus, dev, folder = corpus, read_trials(recipe.dev_trials), Path(recipe.dev_folder)
        else:
            self.corpus, held_out = hold_out(corpus, recipe)
            dev = make_trials(held_out["path"], held_out["speaker"], held_out["session"], seed=recipe.seed)
            folder = root_of(held_out)
        self.development = {
            name: TrialTest(dev, folder, domain) for name, domain in development_domains(recipe).items()
        }
        self.tests = {
            name: TrialTest(read_trials(test["trials"]), Path(test["folder"]), test_domain(test))
            for name, test in recipe.tests.items()
        }
        for test in (*self.tests.values(), *self.development.values()):
            check_present(test.trials, test.folder)  # now, not after the training
        self.speakers = speaker_table(self.corpus, recipe)

    def build_model(self, recipe: Recipe, num_labels: int) -> tuple[MRLReDimNetForXVector, bool]:
        """The model to train, and whether its classifier is fresh."""
        return start_model(MRLReDimNetForXVector, recipe, {"classifier.weight"}, num_speakers=num_labels)

    def evaluate(self, model, test: TrialTest, dims=None, resamples: int = 0, progress: str | None = None) -> Rows:
        """Error rates of one test at each of `dims`."""
        return evaluate_trials(model, test.trials, test.folder, dims, resamples, progress, test.domain)

    @staticmethod
    def score(rows: Rows) -> float:
        """What models are chosen by, lower is better: the mean EER over dimensions, all of which are to be good."""
        return sum(row.eer for row in rows) / len(rows)


class Attribute:
    """Classes (or, where the labels are numbers, a value) from labelled speech; judged on speakers held out."""

    adapter_task = "SEQ_CLS"  # the head travels with the adapter

    def __init__(self, recipe: Recipe, corpus: Dataset):
        """corpus: the usable training rows; the label file must know them all."""
        table = read_labels(recipe.label_file, recipe.label_column, recipe.label_key)
        found = {label_of(table, key, recipe) for key in corpus[recipe.label_key]}
        numbers = all(is_number(value) for value in found)
        self.name = "regression" if numbers else "classification"
        self.labels = () if numbers else tuple(sorted(found))
        self.corpus, held_out = hold_out(corpus, recipe)
        self.targets = self._targets(table, self.corpus, recipe)
        dev_targets = self._targets(table, held_out, recipe)
        self.development = {
            name: LabelledTest(held_out, dev_targets, domain) for name, domain in development_domains(recipe).items()
        }
        self.tests = {}
        for name, test in recipe.tests.items():
            rows, _ = split_usable(load_corpus(test["folder"], recipe.layout), recipe.min_seconds)
            if not len(rows):
                raise ValueError(f"tests.{name}: no usable file below {test['folder']} (min_seconds, broken files?).")
            self.tests[name] = LabelledTest(rows, self._targets(table, rows, recipe), test_domain(test))
        self.speakers = speaker_table(self.corpus, recipe)

    def _targets(self, table: dict[str, str], corpus: Dataset, recipe: Recipe) -> np.ndarray:
        found = [label_of(table, key, recipe) for key in corpus[recipe.label_key]]
        if not self.labels:
            if words := sorted({value for value in found if not is_number(value)}):
                raise ValueError(f"{recipe.label_column}: {words} occur in a test, the training speech has numbers.")
            return np.array([float(value) for value in found], dtype=np.float32)
        unknown = sorted(set(found) - set(self.labels))
        if unknown:
            raise ValueError(f"{recipe.label_column}: {unknown} occur in a test, but in no training speech.")
        return np.array([self.labels.index(value) for value in found])

    def build_model(self, recipe: Recipe, num_labels: int) -> tuple[MRLReDimNetForSequenceClassification, bool]:
        """The model to train; its head is fresh unless the start had one for the same labels."""
        names = {"num_labels": max(1, len(self.labels))}
        if self.labels:
            names |= {"id2label": dict(enumerate(self.labels)), "label2id": {v: i for i, v in enumerate(self.labels)}}
        head = {"classifier.weight", "classifier.bias"}
        model, fresh = start_model(MRLReDimNetForSequenceClassification, recipe, head, **names)
        if recipe.model not in SIZES and not self._is_own_head(recipe.model):
            model.classifier.reset_parameters()  # it may have been of the same shape, for something else
            fresh = True
        if fresh and not self.labels:
            with torch.no_grad():  # a head that begins at the training speech's mean has less to learn
                model.classifier.bias.fill_(float(self.targets.mean()))
        return model, False

    def _is_own_head(self, folder: str) -> bool:
        """Whether a saved model's head is for these very labels."""
        config = MRLReDimNetConfig.from_pretrained(folder)
        same = not self.labels or tuple(config.id2label.values()) == self.labels
        return same and (config.architectures or []) == [MRLReDimNetForSequenceClassification.__name__]

    @torch.no_grad()
    def evaluate(self, model, test: LabelledTest, dims=None, resamples: int = 0, progress: str | None = None) -> Rows:
        """Accuracy, or mean absolute error, of whole utterances; no `dims`: heads take the whole embedding."""
        files = [audio["path"] for audio in test.corpus["audio"]]
        embeddings = embed_files(model, files, progress=progress, load=reader(root_of(test.corpus), test.domain))
        device = next(model.parameters()).device
        logits = model.classifier(torch.from_numpy(embeddings).to(device)).float().cpu().numpy()
        answers = logits.argmax(1) if self.labels else logits[:, 0]
        return [attribute_row(answers, test.targets, np.array(test.corpus["speaker"]), bool(self.labels), resamples)]

    @staticmethod
    def score(rows: Rows) -> float:
        """What models are chosen by, lower is better: the share of errors, or the mean absolute error."""
        return 1 - rows[0].value if rows[0].metric == "accuracy" else rows[0].value


def make_task(recipe: Recipe, corpus: Dataset) -> Verification | Attribute:
    """The task a recipe describes."""
    return Verification(recipe, corpus) if recipe.label_column is None else Attribute(recipe, corpus)


def start_model(kind: type, recipe: Recipe, head: set[str], **config):
    """A model of `kind` from a size or a saved one, and whether its head is new; no tensors but the `head`'s may be."""
    if recipe.model in SIZES:
        return kind(MRLReDimNetConfig.from_size(recipe.model, **config, **recipe.model_options)), True
    refuse_missing(recipe.model)
    model, info = kind.from_pretrained(
        recipe.model, ignore_mismatched_sizes=True, output_loading_info=True, **config, **recipe.model_options
    )
    replaced = {key if isinstance(key, str) else key[0] for key in (*info["missing_keys"], *info["mismatched_keys"])}
    if replaced - head:
        raise ValueError(
            f"{recipe.model} lacks or misshapes {len(replaced)} tensors: {', '.join(sorted(replaced)[:5])}."
        )
    return model, bool(replaced)


def hold_out(corpus: Dataset, recipe: Recipe) -> tuple[Dataset, Dataset]:
    """Rows for training, and those of `dev_speakers` speakers that are not trained on."""
    names, counts = np.unique(corpus["speaker"], return_counts=True)
    eligible = names[counts > 1]  # a target trial needs two utterances
    if len(eligible) <= recipe.dev_speakers:
        raise ValueError(
            f"dev_speakers: {recipe.dev_speakers} speakers are to be held out, but only {len(eligible)} of "
            f"{len(names)} have two utterances or more. Hold out fewer, or give dev_trials and dev_folder."
        )
    held_out = set(np.random.default_rng([recipe.seed, 2]).choice(eligible, recipe.dev_speakers, replace=False))
    is_dev = np.array([speaker in held_out for speaker in corpus["speaker"]])
    return corpus.select(np.flatnonzero(~is_dev)), corpus.select(np.flatnonzero(is_dev))


def root_of(corpus: Dataset) -> Path:
    """The folder that the paths of a corpus are relative to."""
    first = corpus[0]
    return Path(first["audio"]["path"].removesuffix(first["path"]))


def speaker_table(corpus: Dataset, recipe: Recipe) -> SpeakerTable:
    """Speakers to label ids: those of the model started from, or of this run so far, keep theirs."""
    known = SpeakerTable([])
    for folder in (Path(recipe.output), Path(recipe.model)):
        if (folder / "speakers.json").is_file():
            known = SpeakerTable.load(folder / "speakers.json")
            break
    return known.extended(corpus.unique("speaker"))


def training_domain(recipe: Recipe):
    """The domain of the training crops; its noise is the recipe's."""
    options = dict(recipe.domain_options)
    if recipe.domain == "noisy":
        options = {"noise": recipe.noise, "snr": tuple(recipe.noise_snr), **options}
    return make_domain(recipe.domain, **options)


def development_domains(recipe: Recipe) -> dict[str, object]:
    """What development speech is judged in: the recipe's domain first, and beside it as it is."""
    if recipe.domain == "clean":
        return {"development": None}
    return {f"development, {recipe.domain}": training_domain(recipe), "development, as it is": None}


def test_domain(test: dict):
    """The domain of a test's audio, None where it stays as it is."""
    name = test.get("domain", "clean")
    return None if name == "clean" else make_domain(name, **test.get("domain_options", {}))


def read_labels(file: str | Path, column: str, key: str) -> dict[str, str]:
    """`key` -> label from a CSV file with a header. Raises ValueError where columns are missing or labels differ."""
    with open(file, newline="", encoding="utf-8-sig") as lines:
        rows = csv.DictReader(lines)
        missing = {column, key} - set(rows.fieldnames or ())
        if missing:
            raise ValueError(f"{file}: no column {', '.join(sorted(missing))}; there are {rows.fieldnames}.")
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
        raise ValueError(f"{recipe.label_file}: no {recipe.label_column} for the {recipe.label_key} {key!r}.")
    return table[key]
