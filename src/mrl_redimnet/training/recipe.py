"""What a training run does: defaults here, a YAML recipe over them, `--key value` over both.

Every setting is checked when the recipe is read, before any speech is.
"""

import argparse
import dataclasses
import json
import re
import types
import typing
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from peft import LoraConfig

from configuration_mrl_redimnet import SIZES, MRLReDimNetConfig
from mrl_redimnet.adapters.placement import PLACEMENTS, lora_config
from mrl_redimnet.adapters.strategies import STRATEGIES
from mrl_redimnet.audio.augmentation import check_augmentations
from mrl_redimnet.audio.domains import DOMAINS, check_domain
from mrl_redimnet.data.corpus import COLUMN_ROLES, layout_of
from mrl_redimnet.scoring.trials import FORMATS
from mrl_redimnet.settings import (
    SHARE,
    Check,
    Length,
    ListOf,
    MappingOf,
    Number,
    OneOf,
    Stretch,
    Text,
    as_number,
    near,
    nearest,
    typed,
    yes_or_no,
)

TRAINS = ("all", "head", "projection", "adapter")
SAMPLERS = ("speaker", "utterance")
OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "exponential")
PRECISIONS = ("no", "bf16", "fp16")
TRACKERS = ("tensorboard", "wandb", "trackio", "none")
PARTS = ("trunk", "head", "classifier")
# Settings that were called otherwise once, and what they are today.
RENAMED = {"chance_steps": "chance_until, a number of steps or passes such as '2 epochs'"}
# Fields of the configuration that must fit each other.
_SHAPES = {"network", "front_end", "num_mel_bins", "feature_norm", "base_channels", "stages", "block_1d", "block_2d"}
_SHAPES |= {"group_divisor", "grouped_strides", "dual_maps", "map_norm_groups", "aggregation_channels"}
_SHAPES |= {"aggregation_per_bin", "embedding_size", "matryoshka_dims", "prefix_weights", "window_seconds"}
# Fields of LoraConfig that are not to be given, and what sets them.
_PEFT_FIELDS_OF_THE_RUN = {"r": "rank", "target_modules": "placement"} | dict.fromkeys(
    ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "runtime_config"),
    "the run itself",
)

_ONE_OR_MORE = Number(least=1, whole=True)
_NONE_OR_MORE = Number(least=0, whole=True)
_ABOVE_0 = Number(above=0)
_AT_LEAST_0 = Number(least=0)
_SHARE_OR_ALL = Number(least=0, most=1)
_RISE = ListOf(_SHARE_OR_ALL, "two rising shares between 0 and 1")
_SPEEDS = ListOf(Number(least=0.1, most=10), "a list of speeds from 0.1 to 10 that begins with 1.0")
_RANKS = ListOf(_ONE_OR_MORE, "whole numbers of at least 1")


def _layout(name: str, value: object) -> str:
    Text()(name, value)
    layout_of(value)
    return value


def _crop_seconds(name: str, value: object) -> float | list[float]:
    expected = "a length, or [shortest, longest]"
    if isinstance(value, list):
        lengths = ListOf(Number(above=0, most=3600), f"{expected}, in seconds")(name, value)
        if len(lengths) != 2 or lengths[0] > lengths[1]:
            raise ValueError(f"{name}: got {value}, expected {expected}.")
        return lengths
    return Number(above=0, most=3600, expected=f"{expected}, in seconds")(name, value)


def _mapping(name: str, value: object) -> dict:
    """A mapping whose entries are checked together with other settings."""
    if not isinstance(value, dict):
        raise ValueError(f"{name}: got {value!r}, expected a mapping.")
    return value


def _augmentations(name: str, value: object) -> list:
    value = _numbers_in(value)
    check_augmentations(value)
    return value


def _options(name: str, value: object) -> dict:
    return _numbers_in(_mapping(name, value))


def _numbers_in(value: object) -> object:
    """Nested options with "1e-3", which YAML takes for a string, as a number; names of folders stay."""
    if isinstance(value, dict):
        texts = ("kind", "folder", "noise", "rooms")
        return {key: each if key in texts else _numbers_in(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_numbers_in(each) for each in value]
    number = as_number(value) if isinstance(value, str) else None
    return value if number is None else number


def _setting(default, text: str, check: Check):
    made = (
        {"default_factory": lambda: type(default)(default)}
        if isinstance(default, (list, dict))
        else {"default": default}
    )
    return field(metadata={"help": text, "check": check}, **made)


@dataclass
class Recipe:
    """Every setting of `train_hf.py`; `python train_hf.py --help` prints them."""

    model: str = _setting("nano", "a size (nano, b0 ... b6), or the path or Hub id of a model to start from", Text())
    model_options: dict = _setting({}, "fields of MRLReDimNetConfig to replace, as a mapping", _mapping)
    output: str = _setting("runs/nano", "folder of the run: checkpoints, best and last model, results", Text())

    train: str | None = _setting(
        None,
        "speech: a folder, parquet files (`mrl-redimnet prepare`) or a Hub data set; none: a synthetic corpus",
        Text(empty=True),
    )
    layout: str = _setting(
        "speaker/session/utterance", "what the parts of a path below it mean, or a corpus's name", _layout
    )
    columns: dict = _setting(
        {},
        "of parquet and Hub data: {audio: NAME, speaker: NAME} where they are not found",
        MappingOf(Text(), COLUMN_ROLES),
    )
    streaming: bool = _setting(False, "read parquet and Hub data as they come instead of copying them first", yes_or_no)
    tests: dict = _setting(
        {},
        "trial lists to report at the end: {name: {trials: file, folder: wav folder, enrolments: file, suffix: .flac}}",
        _mapping,
    )
    dev_speakers: int = _setting(
        8, "training speakers held out for choosing the best model; 0: with dev_trials only", _NONE_OR_MORE
    )
    dev_trials: str | None = _setting(
        None, "a trial list for choosing the best model, instead of held-out speakers", Text(empty=True)
    )
    dev_folder: str | None = _setting(None, "the folder dev_trials' paths are relative to", Text(empty=True))
    evaluation_speakers: bool = _setting(False, "train on the speakers of CN-Celeb's evaluation part, too", yes_or_no)
    min_seconds: float = _setting(0.3, "shorter utterances are not used, and reported", _AT_LEAST_0)
    max_problem_share: float = _setting(0.01, "share of unusable files above which the run stops", _SHARE_OR_ALL)

    label_file: str | None = _setting(
        None, "CSV of attributes; none: the speakers are what is learnt", Text(empty=True)
    )
    label_column: str | None = _setting(
        None, "column of label_file to learn: names are classified, numbers estimated", Text(empty=True)
    )
    label_key: str = _setting(
        "speaker", "column of label_file that rows are found by: speaker or path", OneOf(("speaker", "path"))
    )

    domain: str = _setting(
        "clean", "what the speech is made to sound like: clean, noisy or telephony", OneOf(tuple(DOMAINS))
    )
    domain_options: dict = _setting(
        {}, "further settings of the domain, as a mapping (see mrl_redimnet.audio.domains)", _options
    )
    base_share: float = _setting(0.1, "share of crops left out of the domain, against forgetting", SHARE)

    trains: str = _setting(
        "all", "all, head (trunk frozen), projection (its Matryoshka segments alone) or adapter", OneOf(TRAINS)
    )
    trunk_frozen_until: float = _setting(0.0, "share of the steps in which the trunk stays frozen (head first)", SHARE)
    placement: str = _setting(
        "linear", "layers of the adapter: attention ... all, see mrl_redimnet.adapters", OneOf(tuple(PLACEMENTS))
    )
    rank: int = _setting(8, "rank of the adapter's layers", _ONE_OR_MORE)
    segment_ranks: list = _setting([], "ranks of the projection's Matryoshka segments, shortest prefix first", _RANKS)
    strategy: str = _setting(
        "vanilla", "how ranks come about: vanilla, dynamic, warm_up or mixed", OneOf(tuple(STRATEGIES))
    )
    start_rank: int = _setting(16, "rank that dynamic and warm_up start from", _ONE_OR_MORE)
    cut_at: float = _setting(0.3, "share of the steps at which warm_up cuts start_rank down to rank", SHARE)
    adapter_norms: bool = _setting(False, "batch norms adapt too, and travel with the adapter", yes_or_no)
    peft_options: dict = _setting({}, "further fields of LoraConfig: lora_alpha, rank_pattern, use_dora, ...", _mapping)
    base_repository: str | None = _setting(
        None, "the base's Hub id for the adapter's card; none: as in `model`", Text(empty=True)
    )

    crop_seconds: float | list = _setting(
        2.0, "length of a training crop, or [shortest, longest], drawn per batch", _crop_seconds
    )
    sampler: str = _setting("speaker", "speaker (each as often) or utterance (each as often)", OneOf(SAMPLERS))
    utterances_per_speaker: int = _setting(
        1, "crops of one speaker in a row in a batch, from different utterances", _ONE_OR_MORE
    )
    speeds: list = _setting([1.0], "playback speeds; each but the first is a set of speakers of its own", _SPEEDS)
    augmentations: list = _setting(
        [], "what is done to crops, in order (see mrl_redimnet.audio.augmentation)", _augmentations
    )
    augmentation_rise: list = _setting(
        [0.0, 0.0], "shares of the steps between which their probability rises from 0", _RISE
    )
    noise: str | None = _setting(None, "folder of noise to add: MUSAN, or any other", Text(empty=True))
    rooms: str | None = _setting(
        None, "folder of room responses: RIRS_NOISES, or any other; none: simulated rooms", Text(empty=True)
    )
    workers: int = _setting(1, "processes that read and augment", _NONE_OR_MORE)

    steps: int = _setting(200, "optimiser steps", _ONE_OR_MORE)
    epochs: float | None = _setting(
        None, "passes over the training utterances, instead of steps", Number(above=0, empty=True)
    )
    batch_size: int = _setting(48, "crops per process and micro-batch", _ONE_OR_MORE)
    accumulation: int = _setting(1, "micro-batches per optimiser step", _ONE_OR_MORE)
    optimizer: str = _setting("adamw", "adamw, or sgd (Nesterov)", OneOf(OPTIMIZERS))
    momentum: float = _setting(0.9, "momentum of SGD", SHARE)
    schedule: str = _setting("cosine", "how the learning rate falls: cosine or exponential", OneOf(SCHEDULES))
    learning_rate: float = _setting(2e-3, "highest learning rate", _AT_LEAST_0)
    final_learning_rate: float = _setting(2e-5, "learning rate at the last step", _AT_LEAST_0)
    learning_rate_batch: int | None = _setting(
        None,
        "crops a step that learning rates are meant for; others scale them",
        Number(above=0, whole=True, empty=True),
    )
    max_learning_rate_growth: float = _setting(
        12.0, "most that learning rates grow by for the sake of learning_rate_batch", Number(least=1)
    )
    learning_rates: dict = _setting(
        {}, "highest learning rates of parts: trunk, head, classifier", MappingOf(_AT_LEAST_0, PARTS)
    )
    warmup: float = _setting(0.05, "share of the steps in which the learning rate rises from 0", SHARE)
    weight_decay: float = _setting(0.05, "on matrices and kernels; not on norms and biases", _AT_LEAST_0)
    weight_decays: dict = _setting({}, "weight decays of parts: trunk, head, classifier", MappingOf(_AT_LEAST_0, PARTS))
    max_gradient_norm: float = _setting(5.0, "gradients are clipped to this norm", _ABOVE_0)
    margin_rise: list = _setting(
        [0.1, 0.4], "shares of the steps between which the margin rises from 0 to its full", _RISE
    )
    prefixes_from: list = _setting(
        [],
        "shares of the steps from which each Matryoshka prefix is trained, shortest first",
        ListOf(SHARE, "shares from 0 to below 1, the last (full) prefix's 0"),
    )
    prefixes_per_step: int = _setting(
        0, "prefixes drawn for a step's loss, the longest always among them; 0: all", _NONE_OR_MORE
    )
    rotate_at: list | None = _setting(
        None,
        "shares of the steps at which the basis is rotated; none: [0.1, 0.3, 0.5] where all is trained",
        ListOf(Number(above=0, below=1), "shares above 0 and below 1", empty=True),
    )
    carry_classifier: bool = _setting(
        True, "start from the model's classifier rows of speakers with the same names", yes_or_no
    )
    classifier_sample: int = _setting(
        0, "speakers of the classifier used in a step, for 100,000 and more; 0: all", _NONE_OR_MORE
    )
    teacher: str | None = _setting(None, "a model whose full embedding every prefix is to be like", Text(empty=True))
    teacher_weight: float = _setting(10.0, "weight of the teacher's loss beside the classifier's", _AT_LEAST_0)
    ema: float = _setting(0.0, "decay of the moving average of weights that is evaluated and saved; 0: none", SHARE)
    average_last: int | float | str = _setting(
        0,
        "end of the run whose evaluated weights are averaged: a share, or such as 10 epochs; 0: none",
        Stretch(none=True),
    )
    patience: int = _setting(
        0, "evaluations without a better one after which the run ends; 0: all steps", _NONE_OR_MORE
    )
    synchronise_norms: bool = _setting(True, "batch norms see the batch of all processes", yes_or_no)
    mixed_precision: str = _setting("no", "no, bf16 or fp16", OneOf(PRECISIONS))
    seed: int = _setting(0, "random seed of weights, batches and dropout", Number(least=0, below=2**32, whole=True))

    evaluate_every: int | float | str = _setting(
        50, "between evaluations on the development trials: steps, a share of the run, or such as 1 epoch", Stretch()
    )
    checkpoint_every: int | float | str = _setting(
        100, "between checkpoints to resume from: steps, a share of the run, or such as 1 epoch", Stretch()
    )
    log_every: int = _setting(10, "steps between log lines", _ONE_OR_MORE)
    chance_until: int | float | str = _setting(
        300,
        "after warm-up, by when the loss must have left chance level: steps, a share, or such as 2 epochs",
        Stretch(),
    )
    tracker: str = _setting("tensorboard", "tensorboard, wandb, trackio or none", OneOf(TRACKERS))
    report_dims: list = _setting(
        [],
        "more prefixes to report at the end than the model's own",
        ListOf(_ONE_OR_MORE, "whole numbers of at least 1"),
    )
    resamples: int = _setting(1000, "bootstrap resamples of the intervals in the final report", _NONE_OR_MORE)

    def __post_init__(self):
        for f in dataclasses.fields(self):
            setattr(self, f.name, f.metadata["check"](f.name, getattr(self, f.name)))
        for check in (
            self._check_data,
            self._check_steps,
            self._check_loss,
            self._check_tuning,
            self._check_model_options,
            self._check_peft_options,
            self._check_domain,
            self._check_tests,
        ):
            check()

    def _check_data(self):
        if not self.speeds or self.speeds[0] != 1.0 or len(set(self.speeds)) < len(self.speeds):
            raise ValueError(f"speeds: got {self.speeds}, expected a list of different speeds that begins with 1.0.")
        if self.utterances_per_speaker > 1 and (
            self.sampler != "speaker" or self.batch_size % self.utterances_per_speaker
        ):
            raise ValueError(
                f"utterances_per_speaker: {self.utterances_per_speaker} needs sampler: speaker and a batch_size that "
                f"it divides, got {self.sampler} and {self.batch_size}."
            )
        if (self.dev_trials is None) != (self.dev_folder is None):
            raise ValueError("dev_trials and dev_folder: give both or neither.")
        if self.dev_trials is None and self.dev_speakers < 2:
            raise ValueError("dev_speakers: at least 2 are needed when there are no dev_trials.")
        if (self.label_file is None) != (self.label_column is None):
            raise ValueError("label_file and label_column: give both or neither.")
        if self.streaming:
            self._check_streaming()

    def _check_streaming(self):
        """What takes an utterance by its number cannot be had from a stream."""
        for name, needed in (("sampler", "utterance"), ("label_file", None), ("augmentation_rise", [0.0, 0.0])):
            if getattr(self, name) != needed:
                raise ValueError(f"streaming: {name} must be {needed}, got {getattr(self, name)}.")
        if self.dev_trials is None:
            raise ValueError("streaming: no speakers can be held out of a stream; give dev_trials and dev_folder.")
        if self.crop_range[0] != self.crop_range[1]:
            raise ValueError(f"streaming: crops have one length; crop_seconds: got {self.crop_seconds}.")

    def _check_steps(self):
        if self.learning_rates and not self.learning_rate > 0:
            raise ValueError("learning_rates: parts' rates follow learning_rate's schedule, which must be above 0.")
        if self.schedule == "exponential" and not 0 < self.final_learning_rate <= self.learning_rate:
            raise ValueError("final_learning_rate: an exponential needs one above 0 and at most learning_rate.")
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate: got {self.final_learning_rate:g}, expected at most learning_rate, "
                f"{self.learning_rate:g}."
            )
        if Length.parse("average_last", self.average_last).unit == "steps" and self.average_last:
            raise ValueError(
                f"average_last: got {self.average_last}, expected a share of the run such as 0.1, or passes such as "
                "'10 epochs': it is the end of the run whose evaluations are averaged, no longer their number."
            )

    def _check_loss(self):
        for name in ("margin_rise", "augmentation_rise"):
            shares = getattr(self, name)
            if len(shares) != 2 or shares[0] > shares[1]:
                raise ValueError(f"{name}: got {shares}, expected two rising shares between 0 and 1.")
        if self.prefixes_from and self.prefixes_from[-1] != 0:
            raise ValueError(f"prefixes_from: got {self.prefixes_from}; expected shares, the last (full) prefix's 0.")

    def _check_tuning(self):
        if self.trunk_frozen_until and self.trains != "all":
            raise ValueError(f"trunk_frozen_until: with trains: {self.trains} the trunk never trains; leave it out.")
        for name in ("rotate_at", "ema", "average_last", "classifier_sample"):
            if getattr(self, name) and self.trains != "all":
                raise ValueError(f"{name}: works with trains: all; with {self.trains} leave it out.")
        for name in ("teacher", "classifier_sample", "prefixes_from", "prefixes_per_step"):
            if getattr(self, name) and self.label_column is not None:
                raise ValueError(f"{name}: belongs to the learning of speakers; with label_column leave it out.")
        if self.classifier_sample and (self.rotate_at or self.ema or self.average_last):
            raise ValueError("classifier_sample: works without rotate_at, ema and average_last, which need all rows.")
        if self.classifier_sample and self.accumulation > 1:
            raise ValueError("classifier_sample: works with accumulation: 1, since a step has one set of rows.")
        if self.strategy in ("dynamic", "warm_up") and self.start_rank <= self.rank:
            raise ValueError(f"rank: got {self.rank} and start_rank {self.start_rank}; expected a start above it.")

    def _check_model_options(self):
        """Raises ValueError for what the configuration of the model does not know, or does not take."""
        if not self.model_options:
            return
        hints = MRLReDimNetConfig.__annotations__
        for name in self.model_options:
            if name not in hints:
                raise ValueError(f"model_options: the model has no field named {name!r}.{nearest(name, hints)}")
        if "num_speakers" in self.model_options:
            raise ValueError("model_options.num_speakers: leave it out, the training speech says how many there are.")
        self.model_options = {
            name: typed(f"model_options.{name}", value, hints[name]) for name, value in self.model_options.items()
        }
        try:
            if self.model in SIZES:
                MRLReDimNetConfig.from_size(self.model, **self.model_options)
            elif (Path(self.model) / "config.json").is_file():
                start = json.loads((Path(self.model) / "config.json").read_text(encoding="utf-8"))
                own = {name: value for name, value in start.items() if name in hints}
                MRLReDimNetConfig(**{**own, **self.model_options})
            else:  # of the Hub's; its shapes are compared when it is loaded
                alone = {name: value for name, value in self.model_options.items() if name not in _SHAPES}
                MRLReDimNetConfig(**alone)
        except (ValueError, TypeError) as error:
            raise ValueError(f"model_options: {error}") from error

    def _check_peft_options(self):
        """Raises ValueError for what LoraConfig does not know, or does not take."""
        hints = typing.get_type_hints(LoraConfig)
        fields = {f.name: hints[f.name] for f in dataclasses.fields(LoraConfig)}
        for name in self.peft_options:
            if name not in fields:
                raise ValueError(f"peft_options: LoraConfig has no field named {name!r}.{nearest(name, fields)}")
            if name in _PEFT_FIELDS_OF_THE_RUN:
                raise ValueError(f"peft_options.{name}: leave it out, it is set by {_PEFT_FIELDS_OF_THE_RUN[name]}.")
        checks: dict[str, Check] = {"lora_alpha": _ABOVE_0, "lora_dropout": SHARE, "init_lora_weights": _initialisation}
        self.peft_options = {
            name: checks[name](f"peft_options.{name}", value)
            if name in checks
            else typed(f"peft_options.{name}", value, fields[name])
            for name, value in self.peft_options.items()
        }
        # The convolutions that "conv" and "all" leave out are known only with the model.
        placement = "linear" if self.placement in ("conv", "all") else self.placement
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                lora_config(placement, self.rank, segment_ranks=self.segment_ranks, **self.peft_options)
        except (ValueError, TypeError) as error:
            setting = "" if str(error).startswith("segment_ranks") else "peft_options: "
            raise ValueError(f"{setting}{error}") from error

    def _check_domain(self):
        options = self.domain_options
        if self.domain == "noisy":
            # Without training speech there is the synthetic corpus, which is its own noise.
            noise = self.noise if self.train is not None else "the synthetic corpus"
            options = {"noise": noise, "rooms": self.rooms, **options}
        check_domain(self.domain, **options)

    def _check_tests(self):
        needed = {"folder": Text()} | ({} if self.label_column else {"trials": Text()})
        optional = {"domain": OneOf(tuple(DOMAINS)), "domain_options": _options}
        if not self.label_column:
            optional |= {"enrolments": Text(), "suffix": _suffix, "format": OneOf(("auto", *FORMATS))}
            optional |= {"groups": Text(), "group_column": Text()}
        given, self.tests = self.tests, {}
        for name, test in given.items():
            if not isinstance(test, dict) or not set(needed) <= set(test) <= set(needed) | set(optional):
                unknown = sorted(set(map(str, test)) - set(needed) - set(optional)) if isinstance(test, dict) else []
                raise ValueError(
                    f"tests.{name}: got {sorted(map(str, test)) if isinstance(test, dict) else test!r}, expected the "
                    f"entries {' and '.join(sorted(needed))}, and {', '.join(optional)} where they are wanted."
                    + (near(unknown[0], [*needed, *optional]) if unknown else "")
                )
            checked = {key: (needed | optional)[key](f"tests.{name}.{key}", value) for key, value in test.items()}
            if "group_column" in test and "groups" not in test:
                raise ValueError(f"tests.{name}.group_column: needs groups, the CSV whose column it is.")
            try:
                check_domain(checked.get("domain", "clean"), **checked.get("domain_options", {}))
            except ValueError as error:
                raise ValueError(f"tests.{name}: {error}") from error
            self.tests[name] = checked

    @property
    def rotations(self) -> list[float]:
        """`rotate_at`, or by default what docs/results/ingredients.md found best wherever it is possible."""
        if self.rotate_at is not None:
            return self.rotate_at
        possible = self.trains == "all" and self.label_column is None and not self.classifier_sample
        return [0.1, 0.3, 0.5] if possible else []

    @property
    def crop_range(self) -> tuple[float, float]:
        """The shortest and the longest training crop in seconds."""
        shortest, longest = self.crop_seconds if isinstance(self.crop_seconds, list) else [self.crop_seconds] * 2
        return shortest, longest


def _suffix(name: str, value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"\.\w+", value):
        raise ValueError(f"{name}: got {value!r}, expected a point and letters, such as .flac.")
    return value


def _initialisation(name: str, value: object) -> bool | str:
    """LoraConfig's init_lora_weights: true, false, a word, or "pissa_niter_16" with any number."""
    if isinstance(value, bool) or (isinstance(value, str) and re.fullmatch(r"pissa_niter_\d+", value)):
        return value
    hint = typing.get_type_hints(LoraConfig)["init_lora_weights"]
    words = [word for part in typing.get_args(hint) for word in typing.get_args(part)]
    return OneOf(tuple(words))(name, value)


FIELDS = {f.name: f for f in dataclasses.fields(Recipe)}


class _Loader(yaml.SafeLoader):
    """YAML in which a key that comes twice is an error: one of the two values would be lost."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"{', '.join(twice)}: given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _yaml(text: str):
    return yaml.load(text, _Loader)


def read_recipe(file: str | Path | None = None, overrides: dict | None = None) -> Recipe:
    """Defaults, then the YAML file's settings, then `overrides`. Errors name the setting, and the nearest known one."""
    settings = {}
    if file is not None:
        loaded = _yaml(Path(file).read_text(encoding="utf-8"))
        if not isinstance(loaded, dict):
            raise ValueError(f"{file}: expected settings as `key: value` lines, got {type(loaded).__name__}.")
        settings = {_known(key, str(file)): _typed(key, value, str(file)) for key, value in loaded.items()}
    for key, value in (overrides or {}).items():
        settings[_known(key, "command line")] = _typed(key, value, "command line")
    return Recipe(**settings)


def parse_command_line(argv: list[str] | None, description: str) -> tuple[Recipe, bool]:
    """`[recipe.yaml] [--key value ...] [--resume]` -> the recipe, and whether to resume."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", nargs="?", help="YAML file of settings; without one, the defaults")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in `output`")
    settings = parser.add_argument_group("settings", "In the YAML file as `key: value`, or here, read as YAML:")
    for f in FIELDS.values():
        text = f"{f.metadata['help']} [{_shown(f)}]".replace("%", "%%")
        settings.add_argument(f"--{f.name}", metavar="", default=argparse.SUPPRESS, help=text)
    known, rest = parser.parse_known_args(argv)
    overrides = {key: value for key, value in vars(known).items() if key in FIELDS}
    if (known.recipe or "").startswith("--"):  # argparse takes an unknown option with a space in it for the recipe
        rest.insert(0, known.recipe)
    try:
        for unknown in rest:
            _known(unknown.removeprefix("--").partition("=")[0], "command line")
            raise ValueError(f"command line: got {unknown!r}, expected --key value.")
        overrides = {key: _yaml(value) for key, value in overrides.items()}
        return read_recipe(known.recipe, overrides), known.resume
    except (ValueError, OSError, yaml.YAMLError) as error:
        parser.error(str(error))


def _known(key: str, where: str) -> str:
    if key in FIELDS:
        return key
    if key in RENAMED:
        raise ValueError(f"{where}: no setting named {key!r}: it is {RENAMED[key]}.")
    raise ValueError(f"{where}: no setting named {key!r}.{nearest(key, FIELDS)}")


def _typed(key: str, value, where: str):
    """The value, if it has the setting's type; whole numbers pass as floats, "1e-3" (a string in YAML) as a number,
    `no` (false in YAML) as a string."""
    wanted = typing.get_type_hints(Recipe)[key]
    allowed = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if type(value) in allowed:
        return value
    if float in allowed and as_number(value) is not None:
        return float(value)
    if value is False and str in allowed:
        return "no"  # what a bare `no` is to YAML
    names = " or ".join("nothing" if t is type(None) else t.__name__ for t in allowed)
    raise ValueError(f"{where}: {key}: got {value!r}, expected {names}.")


def _shown(f: dataclasses.Field) -> str:
    value = f.default if f.default is not dataclasses.MISSING else f.default_factory()
    return "none" if value is None else str(value)
