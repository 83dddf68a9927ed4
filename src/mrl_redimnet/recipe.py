"""What a training run does: defaults here, a YAML recipe over them, `--key value` over both."""

import argparse
import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml


def _setting(default, text: str):
    made = (
        {"default_factory": lambda: type(default)(default)}
        if isinstance(default, (list, dict))
        else {"default": default}
    )
    return field(metadata={"help": text}, **made)


@dataclass
class Recipe:
    """Every setting of `train_hf.py`; `python train_hf.py --help` prints them."""

    model: str = _setting("nano", "a size (nano, b0 ... b6), or the path or Hub id of a model to start from")
    model_options: dict = _setting({}, "fields of MRLReDimNetConfig to replace, as a mapping")
    output: str = _setting("runs/nano", "folder of the run: checkpoints, best and last model, results")

    train: str | None = _setting(
        None, "speech: a folder, parquet files (`mrl-redimnet prepare`) or a Hub data set; none: a synthetic corpus"
    )
    layout: str = _setting("speaker/session/utterance", "what the parts of a path below it mean, or a corpus's name")
    columns: dict = _setting({}, "of parquet and Hub data: {audio: NAME, speaker: NAME} where they are not found")
    streaming: bool = _setting(False, "read parquet and Hub data as they come instead of copying them first")
    tests: dict = _setting({}, "trial lists to report at the end: {name: {trials: file, folder: wav folder}}")
    dev_speakers: int = _setting(8, "training speakers held out for choosing the best model; 0: with dev_trials only")
    dev_trials: str | None = _setting(None, "a trial list for choosing the best model, instead of held-out speakers")
    dev_folder: str | None = _setting(None, "the folder dev_trials' paths are relative to")
    min_seconds: float = _setting(0.3, "shorter utterances are not used, and reported")
    max_problem_share: float = _setting(0.01, "share of unusable files above which the run stops")

    label_file: str | None = _setting(None, "CSV of attributes; none: the speakers are what is learnt")
    label_column: str | None = _setting(None, "column of label_file to learn: names are classified, numbers estimated")
    label_key: str = _setting("speaker", "column of label_file that rows are found by: speaker or path")

    domain: str = _setting("clean", "what the speech is made to sound like: clean, noisy or telephony")
    domain_options: dict = _setting({}, "further settings of the domain, as a mapping (see mrl_redimnet.domains)")
    base_share: float = _setting(0.1, "share of crops left out of the domain, against forgetting")

    trains: str = _setting("all", "all, head (trunk frozen), projection (its Matryoshka segments alone) or adapter")
    trunk_frozen_until: float = _setting(0.0, "share of the steps in which the trunk stays frozen (head first)")
    placement: str = _setting("linear", "layers of the adapter: attention ... all, see mrl_redimnet.adapters")
    rank: int = _setting(8, "rank of the adapter's layers")
    segment_ranks: list = _setting([], "ranks of the projection's Matryoshka segments, shortest prefix first")
    strategy: str = _setting("vanilla", "how ranks come about: vanilla, dynamic, warm_up or mixed")
    start_rank: int = _setting(16, "rank that dynamic and warm_up start from")
    cut_at: float = _setting(0.3, "share of the steps at which warm_up cuts start_rank down to rank")
    adapter_norms: bool = _setting(False, "batch norms adapt too, and travel with the adapter")
    peft_options: dict = _setting({}, "further fields of LoraConfig: lora_alpha, rank_pattern, use_dora, ...")
    base_repository: str | None = _setting(None, "the base's Hub id for the adapter's card; none: as in `model`")

    crop_seconds: float | list = _setting(2.0, "length of a training crop, or [shortest, longest], drawn per batch")
    sampler: str = _setting("speaker", "speaker (each as often) or utterance (each as often)")
    utterances_per_speaker: int = _setting(1, "crops of one speaker in a row in a batch, from different utterances")
    speeds: list = _setting([1.0], "playback speeds; each but the first is a set of speakers of its own")
    augmentations: list = _setting([], "what is done to crops, in order (see mrl_redimnet.augmentation)")
    augmentation_rise: list = _setting([0.0, 0.0], "shares of the steps between which their probability rises from 0")
    noise: str | None = _setting(None, "folder of noise to add: MUSAN, or any other")
    rooms: str | None = _setting(None, "folder of room responses: RIRS_NOISES, or any other; none: simulated rooms")
    workers: int = _setting(1, "processes that read and augment")

    steps: int = _setting(200, "optimiser steps")
    epochs: float | None = _setting(None, "passes over the training utterances, instead of steps")
    batch_size: int = _setting(48, "crops per process and micro-batch")
    accumulation: int = _setting(1, "micro-batches per optimiser step")
    optimizer: str = _setting("adamw", "adamw, or sgd (Nesterov)")
    momentum: float = _setting(0.9, "of sgd")
    schedule: str = _setting("cosine", "how the learning rate falls: cosine or exponential")
    learning_rate: float = _setting(2e-3, "highest learning rate")
    final_learning_rate: float = _setting(2e-5, "learning rate at the last step")
    learning_rate_batch: int | None = _setting(
        None, "crops a step that learning rates are meant for; others scale them"
    )
    learning_rates: dict = _setting({}, "highest learning rates of parts: trunk, head, classifier")
    warmup: float = _setting(0.05, "share of the steps in which the learning rate rises from 0")
    weight_decay: float = _setting(0.05, "on matrices and kernels; not on norms and biases")
    weight_decays: dict = _setting({}, "weight decays of parts: trunk, head, classifier")
    max_gradient_norm: float = _setting(5.0, "gradients are clipped to this norm")
    margin_rise: list = _setting([0.1, 0.4], "shares of the steps between which the margin rises from 0 to its full")
    prefixes_from: list = _setting(
        [], "shares of the steps from which each Matryoshka prefix is trained, shortest first"
    )
    prefixes_per_step: int = _setting(0, "prefixes drawn for a step's loss, the longest always among them; 0: all")
    rotate_at: list | None = _setting(
        None, "shares of the steps at which the basis is rotated; none: [0.1, 0.3, 0.5] where all is trained"
    )
    classifier_sample: int = _setting(0, "speakers of the classifier used in a step, for 100,000 and more; 0: all")
    teacher: str | None = _setting(None, "a model whose full embedding every prefix is to be like")
    teacher_weight: float = _setting(10.0, "of its loss beside the classifier's")
    ema: float = _setting(0.0, "decay of the moving average of weights that is evaluated and saved; 0: none")
    average_last: int = _setting(0, "evaluations at the end whose mean of weights is tried, too; 0: none")
    patience: int = _setting(0, "evaluations without a better one after which the run ends; 0: all steps")
    synchronise_norms: bool = _setting(True, "batch norms see the batch of all processes")
    mixed_precision: str = _setting("no", "no, bf16 or fp16")
    seed: int = _setting(0, "of weights, batches and dropout")

    evaluate_every: int = _setting(50, "steps between evaluations on the development trials")
    checkpoint_every: int = _setting(100, "steps between checkpoints to resume from")
    log_every: int = _setting(10, "steps between log lines")
    chance_steps: int = _setting(300, "steps after warm-up by which the loss must have left chance level")
    tracker: str = _setting("tensorboard", "tensorboard, wandb, trackio or none")
    report_dims: list = _setting([], "more prefixes to report at the end than the model's own")
    resamples: int = _setting(1000, "bootstrap resamples of the intervals in the final report")

    def __post_init__(self):
        for check in (self._check_data, self._check_steps, self._check_loss, self._check_tuning, self._check_tests):
            check()

    def _check_data(self):
        speeds = _numbers("speeds", self.speeds)
        if not speeds or speeds[0] != 1.0 or min(speeds) <= 0 or len(set(speeds)) < len(speeds):
            raise ValueError(f"speeds: got {self.speeds}, expected a list that begins with 1.0.")
        if not 0 < self.crop_range[0] <= self.crop_range[1]:
            raise ValueError(f"crop_seconds: got {self.crop_seconds}, expected a length, or [shortest, longest].")
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
        positive = ("steps", "batch_size", "accumulation", "evaluate_every", "checkpoint_every", "log_every")
        for name in (*positive, "utterances_per_speaker"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1.")
        for name in ("epochs", "learning_rate_batch"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a number above 0.")
        for name in ("average_last", "patience", "prefixes_per_step", "classifier_sample", "teacher_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 0.")
        for name, allowed in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("tracker", TRACKERS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(allowed)}.")
        for name in ("learning_rates", "weight_decays"):
            given = getattr(self, name)
            if wrong := [str(part) for part in given if part not in PARTS]:
                raise ValueError(f"{name}: got {', '.join(wrong)}, expected some of {', '.join(PARTS)}.")
            numbers = _numbers(f"{name}", list(given.values()), low=0.0)
            setattr(self, name, dict(zip(given, numbers, strict=True)))
        if self.learning_rates and not self.learning_rate > 0:
            raise ValueError("learning_rates: parts' rates follow learning_rate's schedule, which must be above 0.")
        if self.schedule == "exponential" and not 0 < self.final_learning_rate <= self.learning_rate:
            raise ValueError("final_learning_rate: an exponential needs one above 0 and at most learning_rate.")

    def _check_loss(self):
        for name in ("margin_rise", "augmentation_rise"):
            shares = _numbers(name, getattr(self, name))
            if len(shares) != 2 or not 0 <= shares[0] <= shares[1] <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected two rising shares between 0 and 1.")
        for name in ("base_share", "trunk_frozen_until", "cut_at", "ema", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a share from 0 to below 1.")
        joins = _numbers("prefixes_from", self.prefixes_from)
        if joins and (min(joins) < 0 or max(joins) >= 1 or joins[-1] != 0):
            raise ValueError(f"prefixes_from: got {self.prefixes_from}; expected shares, the last (full) prefix's 0.")

    def _check_tuning(self):
        for name, allowed in (("trains", TRAINS), ("strategy", STRATEGIES), ("label_key", ("speaker", "path"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(allowed)}.")
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
        if self.rank < 1 or self.strategy in ("dynamic", "warm_up") and self.start_rank <= self.rank:
            raise ValueError(
                f"rank: got {self.rank} and start_rank {self.start_rank}; expected at least 1, and a start above it."
            )

    def _check_tests(self):
        needed = {"folder"} if self.label_column else {"folder", "trials"}
        allowed = {"domain", "domain_options", *(() if self.label_column else ("groups", "group_column"))}
        for name, test in self.tests.items():
            if not isinstance(test, dict) or not needed <= set(test) <= needed | allowed:
                raise ValueError(
                    f"tests.{name}: got {sorted(test or ())}, expected the entries {' and '.join(sorted(needed))}, and "
                    "domain and domain_options where its audio is not to stay as it is, groups (a CSV) and "
                    "group_column where trials are to be judged by group as well."
                )

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
        given = self.crop_seconds if isinstance(self.crop_seconds, list) else [self.crop_seconds] * 2
        lengths = _numbers("crop_seconds", given)
        if len(lengths) != 2:
            raise ValueError(f"crop_seconds: got {given}, expected a length, or [shortest, longest].")
        return lengths[0], lengths[1]


TRAINS = ("all", "head", "projection", "adapter")
STRATEGIES = ("vanilla", "dynamic", "warm_up", "mixed")
OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "exponential")
TRACKERS = ("tensorboard", "wandb", "trackio", "none")
PARTS = ("trunk", "head", "classifier")


def _numbers(name: str, values: list, low: float = -math.inf) -> list[float]:
    """The values of a list as numbers; "1e-5", a string in YAML, is one. Raises ValueError, naming the setting."""
    try:
        numbers = [float(value) for value in values if not isinstance(value, bool)]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != len(values) or any(not number >= low for number in numbers):
        raise ValueError(f"{name}: got {values}, expected numbers{'' if low < 0 else f' of at least {low:g}'}.")
    return numbers


FIELDS = {f.name: f for f in dataclasses.fields(Recipe)}


def read_recipe(file: str | Path | None = None, overrides: dict | None = None) -> Recipe:
    """Defaults, then the YAML file's settings, then `overrides`. Errors name the setting, and the nearest known one."""
    settings = {}
    if file is not None:
        loaded = yaml.safe_load(Path(file).read_text())
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
        overrides = {key: yaml.safe_load(value) for key, value in overrides.items()}
        return read_recipe(known.recipe, overrides), known.resume
    except (ValueError, OSError, yaml.YAMLError) as error:
        parser.error(str(error))


def _known(key: str, where: str) -> str:
    if key in FIELDS:
        return key
    near = difflib.get_close_matches(str(key), FIELDS, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else f" Known: {', '.join(FIELDS)}."
    raise ValueError(f"{where}: no setting named {key!r}.{hint}")


def _typed(key: str, value, where: str):
    """The value, if it has the setting's type; whole numbers pass as floats, "1e-3" (a string in YAML) as a number,
    `no` (false in YAML) as a string."""
    wanted = typing.get_type_hints(Recipe)[key]
    allowed = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if float in allowed and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    if value is False and str in allowed:
        return "no"  # what a bare `no` is to YAML
    if type(value) in allowed:
        return value
    names = " or ".join("nothing" if t is type(None) else t.__name__ for t in allowed)
    raise ValueError(f"{where}: {key}: got {value!r}, expected {names}.")


def _shown(f: dataclasses.Field) -> str:
    value = f.default if f.default is not dataclasses.MISSING else f.default_factory()
    return "none" if value is None else str(value)
