"""What a training run does: nine groups of settings with their defaults, checked before any speech is read.

`mrl_redimnet.training.reading` makes a `Recipe` of a YAML file and a command line; docs/recipe.md lists all settings. A
recipe cannot be changed: what a run decides for itself (its number of steps, for instance) is kept beside it.
"""

import dataclasses
import json
import re
import typing
import warnings
from pathlib import Path
from typing import Annotated, Any

from peft import LoraConfig

from configuration_mrl_redimnet import SIZES, SPEAKER_LOSSES, MRLReDimNetConfig
from mrl_redimnet.adapters.placement import PLACEMENTS, lora_config
from mrl_redimnet.adapters.strategies import STRATEGIES
from mrl_redimnet.audio.augmentation import check_augmentations
from mrl_redimnet.audio.domains import DOMAINS, check_domain
from mrl_redimnet.data.corpus import COLUMN_ROLES, UNLABELLED, layout_of
from mrl_redimnet.extras import extra
from mrl_redimnet.hub_cards.results import BENCHMARK
from mrl_redimnet.saving import packaged_models
from mrl_redimnet.scoring.trials import FORMATS
from mrl_redimnet.settings import nearest
from mrl_redimnet.training.distillation import TEACHER_LOSSES
from mrl_redimnet.training.fields import (
    AtLeast1,
    Between0And1,
    Count,
    CountOr0,
    Counts,
    Expected,
    Group,
    Length,
    LengthAbove0,
    LengthOr0,
    NotNegative,
    Options,
    Positive,
    Ratio,
    Rise,
    Seed,
    Text,
    WholeRatio,
    check_value,
    choice,
    numbers_in,
)
from mrl_redimnet.training.teachers import source_of

with extra("train"):
    from pydantic import AfterValidator, BeforeValidator, Field, model_validator

PARTS = ("trunk", "head", "classifier")
# Fields of the model's configuration that must fit each other.
_SHAPES = {"network", "front_end", "num_mel_bins", "feature_norm", "base_channels", "stages", "block_1d", "block_2d"}
_SHAPES |= {"group_divisor", "grouped_strides", "dual_maps", "map_norm_groups", "aggregation_channels"}
_SHAPES |= {"aggregation_per_bin", "embedding_size", "matryoshka_dims", "prefix_weights", "window_seconds", "exits"}
# Fields of LoraConfig that a recipe does not give, and what sets them.
_PEFT_FIELDS_OF_THE_RUN = {"r": "rank", "target_modules": "placement"} | dict.fromkeys(
    ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "runtime_config"),
    "the run itself",
)


# ----------------------------------------------------------------------------------------------------------------------
# Types of single settings


def _crop_seconds(value: float | list[float]) -> float | list[float]:
    shortest, longest = value if isinstance(value, list) and len(value) == 2 else (value, value)
    if isinstance(shortest, list) or not 0 < shortest <= longest <= 3600:
        raise ValueError("neither a length nor two of them")
    return value


def _speeds(value: list[float]) -> list[float]:
    if not value or value[0] != 1.0 or len(set(value)) < len(value) or not all(0.1 <= speed <= 10 for speed in value):
        raise ValueError("not different speeds")
    return value


def _ends_at_0(value: list[float]) -> list[float]:
    if value and value[-1] != 0:
        raise ValueError("the full prefix does not start at 0")
    return value


def _suffix(value: str) -> str:
    if not re.fullmatch(r"\.\w+", value):
        raise ValueError("no suffix")
    return value


def _benchmark(value: str) -> str:
    if not BENCHMARK.fullmatch(value):
        raise ValueError("no benchmark")
    return value


CropSeconds = Annotated[
    NotNegative | list[NotNegative],
    AfterValidator(_crop_seconds),
    Expected("a length in seconds, or [shortest, longest]"),
]
Speeds = Annotated[
    list[Positive],
    AfterValidator(_speeds),
    Expected("a list of different speeds from 0.1 to 10 that begins with 1.0"),
]
Starts = Annotated[
    list[Ratio], AfterValidator(_ends_at_0), Expected("a list of ratios from 0 to below 1, the last (full) prefix's 0")
]
Rotations = Annotated[list[Between0And1] | None, Expected("a list of ratios above 0 and below 1, or null")]
Suffix = Annotated[str, AfterValidator(_suffix), Expected("a dot and letters, such as .flac")]
Benchmark = Annotated[str, AfterValidator(_benchmark), Expected("OWNER/DATASET:TASK")]
Augmentations = Annotated[
    list[dict[str, Any]], BeforeValidator(numbers_in), Expected("a list of mappings with a kind each")
]
OfParts = dict[choice(*PARTS), NotNegative]


# ----------------------------------------------------------------------------------------------------------------------
# Groups


class Data(Group):
    """Training speech, and the crops and batches that are made of it."""

    train: Text | None = Field(
        None,
        description="training speech: a folder, parquet files (`mrl-redimnet prepare`) or a data set of the Hub; null: "
        "a synthetic corpus, which is made on first use",
    )
    layout: Text = Field(
        "speaker/session/utterance",
        description="what the parts of a path below `train` mean, or the name of a corpus such as voxceleb2; utterance "
        "alone: speech without speaker labels, at any depth, for margin_weight: 0",
    )
    columns: dict[choice(*COLUMN_ROLES), Text] = Field(
        {}, description="names of columns of parquet and Hub data, such as {speaker: spk_id}, where they are not usual"
    )
    streaming: bool = Field(False, description="read parquet and Hub data in passing instead of copying them first")
    min_seconds: NotNegative = Field(0.3, description="shorter utterances are left out, and listed")
    max_unusable_ratio: WholeRatio = Field(
        0.01, description="the run stops if more of the files than this are unusable"
    )
    evaluation_speakers: bool = Field(
        False, description="also train on the speakers of CN-Celeb's evaluation part, which are left out otherwise"
    )
    label_file: Text | None = Field(
        None, description="CSV file of an attribute (gender, age, ...) to learn; null: speakers are learnt"
    )
    label_column: Text | None = Field(
        None, description="column of label_file to learn: words are classified, numbers are estimated"
    )
    label_key: choice("speaker", "path") = Field(
        "speaker", description="column of label_file by which an utterance finds its label"
    )
    sampler: choice("speaker", "utterance") = Field(
        "speaker", description="what is sampled equally often: speakers or utterances"
    )
    utterances_per_speaker: Count = Field(
        1, description="crops of one speaker in a row in a batch, from different utterances"
    )
    crop_seconds: CropSeconds = Field(
        2.0, description="length of a training crop; with [shortest, longest] each batch has a random one"
    )
    batch_size: Count = Field(48, description="crops per process and micro-batch")
    workers: CountOr0 = Field(1, description="processes that read and augment; 0: the training process itself")

    @model_validator(mode="after")
    def _check(self) -> "Data":
        layout_of(self.layout)
        if self.utterances_per_speaker > 1 and (
            self.sampler != "speaker" or self.batch_size % self.utterances_per_speaker
        ):
            raise ValueError(
                f"utterances_per_speaker: {self.utterances_per_speaker} needs sampler: speaker and a batch_size that "
                f"it divides, got {self.sampler} and {self.batch_size}."
            )
        if (self.label_file is None) != (self.label_column is None):
            raise ValueError("label_file and label_column: give both or neither.")
        return self

    @property
    def crop_range(self) -> tuple[float, float]:
        """The shortest and the longest training crop in seconds."""
        shortest, longest = self.crop_seconds if isinstance(self.crop_seconds, list) else [self.crop_seconds] * 2
        return shortest, longest


class Augmentation(Group):
    """What is done to training crops."""

    augmentations: Augmentations = Field(
        [], description="augmentations in the order in which they are applied, see mrl_redimnet.audio.augmentation"
    )
    augmentation_schedule: Rise = Field(
        [0.0, 0.0],
        description="ratios of the run between which augmentation probabilities rise from 0 to their full values",
    )
    noise: Text | None = Field(None, description="folder of noise recordings: MUSAN, or any other")
    rooms: Text | None = Field(
        None, description="folder of room impulse responses: RIRS_NOISES, or any other; null: simulated rooms"
    )
    speed_perturb: Speeds = Field(
        [1.0], description="playback speeds; speakers at each speed but the first count as further speakers"
    )
    domain: choice(*DOMAINS) = Field("clean", description="acoustic domain that crops are brought into")
    domain_options: Options = Field({}, description="options of the domain, see mrl_redimnet.audio.domains")
    clean_ratio: Ratio = Field(0.1, description="ratio of crops left out of the domain, against forgetting")

    @model_validator(mode="after")
    def _check(self) -> "Augmentation":
        check_augmentations(self.augmentations)
        return self


class Model(Group):
    """The model to start from, or the size of one with random weights, and which part of it is trained."""

    main = "start"

    start: Text | None = Field(
        None,
        description="the model to start from: the name of one that comes with the package or is published, a path or "
        "a Hub id; null: random weights",
    )
    size: choice(*SIZES) | None = Field(
        None, description="the size of a network with random weights, where start is null (default nano)"
    )
    model_options: Options = Field(
        {}, description="fields of MRLReDimNetConfig to replace, such as {matryoshka_dims: [64, 256]}"
    )
    finetune: choice("all", "head", "projection", "exits", "adapter") = Field(
        "all",
        description="what is trained: all, the head (trunk frozen), the projection (its Matryoshka segments alone), "
        "the exits (what they have of their own: the whole network answers as before), or an adapter",
    )
    reuse_classifier: bool = Field(
        True, description="start with the classifier rows that the model has for speakers of the same names"
    )
    sync_batch_norm: bool = Field(True, description="batch-norm statistics are those of the batches of all processes")

    @model_validator(mode="after")
    def _check(self) -> "Model":
        if self.start is not None and self.size is not None:
            raise ValueError(
                f"size: {self.size} is a network with random weights, start: {self.start} has weights; leave out one "
                "(as null, where a recipe file has the other)."
            )
        if self.start in SIZES and self.start not in packaged_models() and not Path(self.start).is_dir():
            raise ValueError(
                f"start: {self.start} is a size, and no model of that name comes with the package; random weights of "
                f"that size are size: {self.start}."
            )
        return self

    @property
    def name(self) -> str:
        """What is trained, in a word: the model to start from, or the size of one with random weights."""
        return self.start or self.size or "nano"


class Loss(Group):
    """The margin loss over every Matryoshka prefix, a teacher's, and that of exits: loss = margin_weight * margin loss
    + teacher_weight * teacher's loss + exits_weight * exits' loss.

    null: as in the model to start from; a new model has the values of MRLReDimNetConfig.
    """

    main = "name"

    name: choice(*SPEAKER_LOSSES) | None = Field(
        None, description="aam: additive angular margin softmax (arXiv 1801.07698); sphereface2 (arXiv 2108.01513)"
    )
    margin: NotNegative | None = Field(
        None, description="margin: radians for aam (default 0.2), a part of the similarity for sphereface2"
    )
    scale: Positive | None = Field(None, description="scale of the cosines (default 32)")
    label_smoothing: Ratio | None = Field(None, description="label smoothing, of aam alone (default 0)")
    sphereface2_balance: Between0And1 | None = Field(
        None, description="weight of the positive pair in sphereface2's loss (lambda, default 0.7)"
    )
    sphereface2_exponent: AtLeast1 | None = Field(
        None, description="exponent t of sphereface2's similarity (default 3)"
    )
    sub_centers: Count | None = Field(
        None, description="classifier rows per speaker, of which the nearest counts (sub-center ArcFace; default 1)"
    )
    hard_negatives: CountOr0 | None = Field(
        None, description="nearest wrong speakers that get a margin as well (inter-top-k; default 0)"
    )
    hard_negative_margin: NotNegative | None = Field(
        None, description="margin of the hard negatives in radians (default 0.06)"
    )
    prefix_weights: Annotated[list[NotNegative] | None, Expected("a list of numbers of at least 0, or null")] = Field(
        None, description="weights of the Matryoshka prefixes in the loss, shortest first (default: all alike)"
    )
    prefixes_per_step: CountOr0 = Field(
        0, description="prefixes in the loss of a step: the longest and others at random; 0: all of them"
    )
    classifier_sample: CountOr0 = Field(
        0, description="speakers of the classifier used in a step (partial FC), for 100,000 and more; 0: all"
    )
    margin_weight: NotNegative = Field(
        1.0, description="weight of the margin loss; 0: no classifier and no speaker labels, a teacher says all"
    )
    teacher: Text | None = Field(
        None,
        description="what every prefix learns from besides the labels: a saved model (folder, Hub id or published "
        "name), a table of embeddings by utterance (what `mrl-redimnet embed` writes, or a parquet file), FILE.onnx, "
        "or a function package.module:name",
    )
    teacher_loss: choice(*TEACHER_LOSSES) | None = Field(
        None,
        description="similarity: which crops of a batch are alike; direction: where the teacher's embedding points, in "
        "its principal axes; null: direction with margin_weight: 0, else similarity",
    )
    teacher_hears: choice("clean", "same") = Field(
        "clean",
        description="what a teacher that is run beside the training is given: the clean crop, before augmentations and "
        "domain, or the same crop as the student",
    )
    teacher_axes: Text | None = Field(
        None,
        description="the axes of teacher_loss: direction that an earlier run saved, OUTPUT/teacher_axes.safetensors, "
        "for a run that starts from the model of that run: with new axes its embedding would have to turn; null: axes "
        "of the training speech",
    )
    teacher_weight: NotNegative = Field(10.0, description="weight of the teacher's loss, of either kind")
    exits_weight: NotNegative = Field(
        10.0,
        description="weight of the loss of the exits that the model has (model_options: {exits: [1, 2]}): each prefix "
        "at an exit learns where the whole network's points; 0: exits stay as they are",
    )

    @model_validator(mode="after")
    def _check(self) -> "Loss":
        if not self.margin_weight and self.classifier_sample:
            raise ValueError("classifier_sample: with margin_weight: 0 there is no classifier; leave it out.")
        if self.teacher_axes is not None and (self.teacher is None or self.taught != "direction"):
            raise ValueError("teacher_axes: belongs to a teacher with teacher_loss: direction; leave it out.")
        return self

    @property
    def taught(self) -> str:
        """Which of `TEACHER_LOSSES` a teacher's loss is: `teacher_loss`, or its default."""
        return self.teacher_loss or ("similarity" if self.margin_weight else "direction")

    @property
    def of_model(self) -> dict[str, Any]:
        """The given fields of the model's configuration: `name` is its `loss`, the others have the same names."""
        fields = {"loss": self.name} | {name: getattr(self, name) for name in LOSS_FIELDS.values() if name != "name"}
        return {name: value for name, value in fields.items() if value is not None}


# Fields of the model's configuration that the loss group sets, and the settings' names.
LOSS_FIELDS = {"loss": "name"} | {name: name for name in Loss.model_fields if name in MRLReDimNetConfig.__annotations__}


class Optimizer(Group):
    """The optimiser, its rates, and averages of its weights."""

    main = "algorithm"

    algorithm: choice("adamw", "sgd") = Field("adamw", description="adamw, or sgd with Nesterov momentum")
    momentum: Ratio = Field(0.9, description="momentum of SGD")
    learning_rate: NotNegative = Field(2e-3, description="highest learning rate")
    part_learning_rates: OfParts = Field(
        {}, description="highest learning rates of parts of the model: trunk, head, classifier"
    )
    reference_batch: Count | None = Field(
        None, description="crops per step that learning rates are meant for; they grow linearly with the actual number"
    )
    max_learning_rate_growth: AtLeast1 = Field(
        12.0, description="highest factor by which reference_batch lets learning rates grow"
    )
    weight_decay: NotNegative = Field(0.05, description="weight decay of matrices and kernels, not of norms and biases")
    part_weight_decays: OfParts = Field({}, description="weight decays of parts of the model: trunk, head, classifier")
    max_gradient_norm: Positive = Field(5.0, description="gradients are clipped to this norm")
    gradient_accumulation: Count = Field(1, description="micro-batches per optimiser step")
    ema: Ratio = Field(
        0.0, description="decay of an exponential moving average of the weights, which is evaluated and saved; 0: none"
    )
    weight_averaging: LengthOr0 = Field(
        0,
        description="last part of the run over whose evaluations weights are averaged: a ratio, or such as 10 epochs; "
        "0: none",
    )

    @model_validator(mode="after")
    def _check(self) -> "Optimizer":
        if self.part_learning_rates and not self.learning_rate > 0:
            raise ValueError(
                "part_learning_rates: they follow the schedule of learning_rate, which must be above 0 for that."
            )
        if Length.parse(self.weight_averaging).unit == "steps" and self.weight_averaging:
            raise ValueError(
                f"weight_averaging: got {self.weight_averaging}, expected a ratio of the run such as 0.1, or epochs "
                "such as '10 epochs'."
            )
        return self


class Schedule(Group):
    """How long a run is, and what changes on the way. Ratios are of all its steps."""

    main = "lr_schedule"

    steps: Count = Field(200, description="optimiser steps")
    epochs: Positive | None = Field(None, description="passes over the training utterances, instead of steps")
    lr_schedule: choice("cosine", "exponential") = Field("cosine", description="how the learning rate falls")
    warmup: Ratio = Field(0.05, description="ratio of the run in which the learning rate rises from 0")
    final_learning_rate: NotNegative = Field(2e-5, description="learning rate of the last step")
    margin_schedule: Rise = Field(
        [0.1, 0.4], description="ratios of the run between which the margin rises from 0 to its full value"
    )
    prefix_starts: Starts = Field(
        [], description="ratios of the run from which each Matryoshka prefix is trained, shortest first; []: all from 0"
    )
    rotate_at: Rotations = Field(
        None,
        description="ratios of the run at which the embedding's basis is rotated to its principal axes; null: [0.1, "
        "0.3, 0.5] if the whole model is trained on speakers with all classifier rows, and no teacher says the basis "
        "(teacher_loss: direction), else none",
    )
    trunk_frozen_until: Ratio = Field(0.0, description="ratio of the run in which the trunk is frozen (head first)")


class Adapter(Group):
    """The LoRA adapter that is trained with finetune: adapter."""

    placement: choice(*PLACEMENTS) = Field("linear", description="layers with an adapter, see mrl_redimnet.adapters")
    rank: Count = Field(8, description="rank of the adapted layers")
    segment_ranks: Counts = Field(
        [], description="ranks of the projection's Matryoshka segments, shortest prefix first; []: as rank"
    )
    strategy: choice(*STRATEGIES) = Field(
        "vanilla",
        description="how ranks come about (arXiv 2401.10447); matryoshka: an adapter that can be cut to "
        "the ranks 1, 2, 4 ... (arXiv 2605.07850)",
    )
    start_rank: Count = Field(16, description="rank that the strategies dynamic and warm_up begin with")
    cut_at: Ratio = Field(0.3, description="ratio of the run at which warm_up cuts start_rank down to rank")
    adapter_norms: bool = Field(False, description="batch norms adapt as well, and are saved with the adapter")
    peft_options: Options = Field(
        {}, description="further fields of LoraConfig: lora_alpha, rank_pattern, use_dora, ..."
    )
    base_repository: Text | None = Field(
        None, description="Hub id of the base for the adapter's card; null: as in model.start"
    )

    @model_validator(mode="after")
    def _check(self) -> "Adapter":
        if self.strategy in ("dynamic", "warm_up") and self.start_rank <= self.rank:
            raise ValueError(f"rank: got {self.rank} and start_rank {self.start_rank}; expected a start above it.")
        hints = typing.get_type_hints(LoraConfig)
        fields = {f.name: hints[f.name] for f in dataclasses.fields(LoraConfig)}
        for name in self.peft_options:
            if name not in fields:
                raise ValueError(f"peft_options: LoraConfig has no field named {name!r}.{nearest(name, fields)}")
            if name in _PEFT_FIELDS_OF_THE_RUN:
                raise ValueError(f"peft_options.{name}: leave it out, it is set by {_PEFT_FIELDS_OF_THE_RUN[name]}.")
        fields |= {"lora_alpha": Positive, "lora_dropout": Ratio, "init_lora_weights": _initialisation(hints)}
        for name, value in self.peft_options.items():
            check_value(f"peft_options.{name}", value, fields[name])
        # The convolutions that "conv" and "all" leave out are known only with the model.
        placement = "linear" if self.placement in ("conv", "all") else self.placement
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                lora_config(placement, self.rank, segment_ranks=self.segment_ranks, **self.peft_options)
        except (ValueError, TypeError) as error:
            setting = "" if str(error).startswith("segment_ranks") else "peft_options: "
            raise ValueError(f"{setting}{error}") from error
        return self


def _initialisation(hints: dict[str, Any]) -> Any:
    """Of LoraConfig's init_lora_weights: true, false, one of its words, or "pissa_niter_16" with any number."""

    def known(value: object) -> object:
        if not (isinstance(value, bool) or value in words or re.fullmatch(r"pissa_niter_\d+", str(value))):
            raise ValueError("an unknown initialisation")
        return value

    words = [word for part in typing.get_args(hints["init_lora_weights"]) for word in typing.get_args(part)]
    return Annotated[Any, AfterValidator(known), Expected(f"true, false, or one of {', '.join(words)}")]


class EvaluationSet(Group):
    """A test set to report at the end of a run: a trial list, or labelled speech."""

    folder: Text = Field(description="folder that the paths of the trial list are relative to")
    trials: Text | None = Field(None, description="trial list")
    enrolments: Text | None = Field(None, description="list of enrolment models, where trials name models")
    suffix: Suffix | None = Field(None, description="suffix of the files on disk, where the lists have another")
    format: choice("auto", *FORMATS) = Field("auto", description="format of the trial list")
    groups: Text | None = Field(None, description="CSV file of speakers, for error rates by group")
    group_column: Text | None = Field(None, description="column of that file")
    domain: choice(*DOMAINS) = Field("clean", description="acoustic domain that the audio is brought into")
    domain_options: Options = Field({}, description="options of the domain")
    benchmark: Benchmark | None = Field(
        None, description="benchmark of the Hub that this is: the results then also stand in .eval_results"
    )


class Evaluation(Group):
    """Speech that models are judged by, during a run and at its end."""

    dev_speakers: CountOr0 = Field(
        8, description="training speakers held out to choose the best model by; 0: with dev_trials only"
    )
    dev_trials: Text | None = Field(
        None, description="a trial list to choose the best model by, instead of held-out speakers"
    )
    dev_folder: Text | None = Field(None, description="folder that the paths of dev_trials are relative to")
    evaluate_every: LengthAbove0 = Field(50, description="distance between evaluations on the development trials")
    patience: CountOr0 = Field(
        0, description="evaluations without a better model after which the run ends early; 0: it runs to its end"
    )
    tests: dict[str, EvaluationSet] = Field(
        {},
        description="tests to report at the end: {name: {trials: FILE, folder: DIR}}, with enrolments, suffix, format, "
        "groups, group_column, domain, domain_options and benchmark where wanted",
    )
    report_dims: Counts = Field([], description="further prefixes to report at the end, besides the model's own")
    bootstrap_samples: CountOr0 = Field(
        1000, description="bootstrap samples of the confidence intervals in the final report"
    )

    @model_validator(mode="after")
    def _check(self) -> "Evaluation":
        if (self.dev_trials is None) != (self.dev_folder is None):
            raise ValueError("dev_trials and dev_folder: give both or neither.")
        if self.dev_trials is None and self.dev_speakers < 2:
            raise ValueError("dev_speakers: at least 2 are needed when there are no dev_trials.")
        for name, test in self.tests.items():
            if test.group_column is not None and test.groups is None:
                raise ValueError(f"tests.{name}.group_column: needs groups, the CSV whose column it is.")
            if test.benchmark is not None and test.domain != "clean":
                raise ValueError(f"tests.{name}.benchmark: belongs to audio as it is; with domain leave it out.")
            try:
                check_domain(test.domain, **test.domain_options)
            except ValueError as error:
                raise ValueError(f"tests.{name}: {error}") from error
        return self


class Running(Group):
    """Where a run writes, how it computes, and what it says on the way."""

    output: Text = Field("runs/nano", description="folder of the run: checkpoints, best and last model, results")
    seed: Seed = Field(0, description="random seed of weights, batches and dropout")
    mixed_precision: choice("no", "bf16", "fp16") = Field("no", description="number format of most operations")
    recompute: bool = Field(
        True,
        description="compute cheap activations again in the backward pass instead of keeping them: less memory, the "
        "same numbers; false is some per cent faster where memory is enough",
    )
    checkpoint_every: LengthAbove0 = Field(100, description="distance between checkpoints that --resume goes on from")
    log_every: Count = Field(10, description="steps between log lines")
    tracker: choice("tensorboard", "wandb", "trackio", "none") = Field("tensorboard", description="experiment tracker")
    chance_until: LengthAbove0 = Field(
        300, description="length after the warm-up by which the loss must be below that of guessing, or the run stops"
    )


# ----------------------------------------------------------------------------------------------------------------------
# All of them


class Recipe(Group):
    """Every setting of `train_hf.py`, in groups. The names of settings are unique over all groups.

    Raises pydantic.ValidationError, a ValueError, for values that do not fit; the functions of
    `mrl_redimnet.training.reading` say it in one sentence per setting.
    """

    data: Data = Field(default_factory=Data)
    augmentation: Augmentation = Field(default_factory=Augmentation)
    model: Model = Field(default_factory=Model)
    loss: Loss = Field(default_factory=Loss)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    schedule: Schedule = Field(default_factory=Schedule)
    adapter: Adapter = Field(default_factory=Adapter)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    run: Running = Field(default_factory=Running)

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        self._check_learning_rates()
        self._check_streaming()
        self._check_parts()
        self._check_attribute()
        self._check_classifier_sample()
        self._check_teacher()
        self._check_domain()
        self._check_model_options()
        return self

    @property
    def rotations(self) -> list[float]:
        """`rotate_at`, or by default what docs/results/ingredients.md found best wherever it is possible."""
        if self.schedule.rotate_at is not None:
            return self.schedule.rotate_at
        possible = self.model.finetune == "all" and not self.data.label_column and not self.loss.classifier_sample
        possible = possible and not self.basis_is_taught
        return [0.1, 0.3, 0.5] if possible else []

    @property
    def basis_is_taught(self) -> bool:
        """Whether the teacher says what each number of the embedding is to be."""
        return self.loss.teacher is not None and self.loss.taught == "direction"

    @property
    def exits_learn(self) -> bool:
        """Whether the exits of a model, where it has some, are trained."""
        return self.loss.exits_weight > 0 and self.data.label_column is None

    @property
    def config_changes(self) -> dict[str, Any]:
        """The fields of the model's configuration that the recipe sets: `model_options`, and those of the loss."""
        return self.model.model_options | self.loss.of_model

    def _check_learning_rates(self):
        highest, last = self.optimizer.learning_rate, self.schedule.final_learning_rate
        if self.schedule.lr_schedule == "exponential" and not 0 < last <= highest:
            raise ValueError("final_learning_rate: an exponential needs one above 0 and at most learning_rate.")
        if last > highest:
            raise ValueError(f"final_learning_rate: got {last:g}, expected at most learning_rate, {highest:g}.")

    def _check_streaming(self):
        """A stream has no utterance by its number, and no speaker to be held out."""
        if not self.data.streaming:
            return
        for name, value, needed in (
            ("sampler", self.data.sampler, "utterance"),
            ("label_file", self.data.label_file, None),
            ("augmentation_schedule", self.augmentation.augmentation_schedule, [0.0, 0.0]),
        ):
            if value != needed:
                raise ValueError(f"streaming: {name} must be {needed}, got {value}.")
        if self.evaluation.dev_trials is None:
            raise ValueError("streaming: no speakers can be held out of a stream; give dev_trials and dev_folder.")
        if self.data.crop_range[0] != self.data.crop_range[1]:
            raise ValueError(f"streaming: crops have one length; crop_seconds: got {self.data.crop_seconds}.")

    def _check_parts(self):
        """What needs the whole model to be trained."""
        finetune = self.model.finetune
        if finetune == "all":
            return
        if self.schedule.trunk_frozen_until:
            raise ValueError(f"trunk_frozen_until: with finetune: {finetune} the trunk is never trained; leave it out.")
        for name, value in (
            ("rotate_at", self.schedule.rotate_at),
            ("ema", self.optimizer.ema),
            ("weight_averaging", self.optimizer.weight_averaging),
            ("classifier_sample", self.loss.classifier_sample),
        ):
            if value:
                raise ValueError(f"{name}: works with finetune: all; with {finetune} leave it out.")

    def _check_attribute(self):
        if self.data.label_column is None:
            for name, test in self.evaluation.tests.items():
                if test.trials is None:
                    raise ValueError(f"tests.{name}.trials: is missing, expected a trial list.")
            return
        for name, value in (
            ("teacher", self.loss.teacher),
            ("margin_weight", self.loss.margin_weight != 1.0),
            ("classifier_sample", self.loss.classifier_sample),
            ("prefix_starts", self.schedule.prefix_starts),
            ("prefixes_per_step", self.loss.prefixes_per_step),
        ):
            if value:
                raise ValueError(f"{name}: belongs to the learning of speakers; with label_column leave it out.")
        for name, test in self.evaluation.tests.items():
            for entry in ("trials", "enrolments", "suffix", "groups"):
                if getattr(test, entry) is not None:
                    raise ValueError(f"tests.{name}.{entry}: belongs to trials; with label_column leave it out.")

    def _check_classifier_sample(self):
        if not self.loss.classifier_sample:
            return
        if self.schedule.rotate_at or self.optimizer.ema or self.optimizer.weight_averaging:
            raise ValueError(
                "classifier_sample: works without rotate_at, ema and weight_averaging, which need all rows."
            )
        if self.optimizer.gradient_accumulation > 1:
            raise ValueError(
                "classifier_sample: works with gradient_accumulation: 1, since a step has one set of rows."
            )

    def _check_teacher(self):
        if self.model.finetune == "exits":
            if self.loss.margin_weight or self.loss.teacher is not None or not self.exits_learn:
                raise ValueError(
                    "finetune: exits learn from the whole network alone; give margin_weight: 0 and an exits_weight "
                    "above 0, no teacher and no label_column."
                )
        elif not self.loss.margin_weight and (self.loss.teacher is None or not self.loss.teacher_weight):
            raise ValueError("margin_weight: with 0 there is nothing to learn but from a teacher; name one.")
        if self.basis_is_taught and self.schedule.rotate_at:
            raise ValueError("rotate_at: with teacher_loss: direction the basis is the teacher's; leave it out.")
        if self.loss.teacher is not None and self.data.streaming and source_of(self.loss.teacher) == "table":
            raise ValueError(
                "teacher: a table has embeddings of known utterances, a stream has none; streaming: false."
            )
        if self.data.layout == UNLABELLED and (self.loss.margin_weight or self.evaluation.dev_trials is None):
            raise ValueError(
                f"layout: {UNLABELLED} says that no speaker is known; give margin_weight: 0 with a teacher, and "
                "dev_trials with dev_folder."
            )

    def _check_domain(self):
        group, options = self.augmentation, self.augmentation.domain_options
        if group.domain == "noisy":
            # Without training speech there is the synthetic corpus, which is its own noise.
            noise = group.noise if self.data.train is not None else "the synthetic corpus"
            options = {"noise": noise, "rooms": group.rooms, **options}
        check_domain(group.domain, **options)

    def _check_model_options(self):
        """Raises ValueError for what the configuration of the model does not know, or does not take."""
        hints, given = MRLReDimNetConfig.__annotations__, self.model.model_options
        for name in given:
            if name in LOSS_FIELDS:
                raise ValueError(f"model_options.{name}: now loss.{LOSS_FIELDS[name]}.")
            if name not in hints:
                raise ValueError(f"model_options: the model has no field named {name!r}.{nearest(name, hints)}")
        if "num_speakers" in given:
            raise ValueError("model_options.num_speakers: leave it out, the training speech says how many there are.")
        for name, value in given.items():
            check_value(f"model_options.{name}", value, hints[name])
        changes, start = self.config_changes, self.model.name
        try:
            if self.model.start is None:
                MRLReDimNetConfig.from_size(start, **changes)
            elif (Path(start) / "config.json").is_file():
                saved = json.loads((Path(start) / "config.json").read_text(encoding="utf-8"))
                own = {name: value for name, value in saved.items() if name in hints}
                MRLReDimNetConfig(**{**own, **changes})
            else:  # on the Hub; its shapes are compared when it is loaded
                MRLReDimNetConfig(**{name: value for name, value in changes.items() if name not in _SHAPES})
        except (ValueError, TypeError) as error:
            field = str(error).partition(":")[0]
            where = "loss" if field in self.loss.of_model else "model_options"
            raise ValueError(f"{where}.{LOSS_FIELDS.get(field, field)}:{str(error).partition(':')[2]}") from error
