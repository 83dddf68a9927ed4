"""What a training run does: defaults here, a YAML recipe over them, `--key value` over both."""

import argparse
import dataclasses
import difflib
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

    train: str | None = _setting(None, "folder of training speech; none: the embedded synthetic corpus")
    layout: str = _setting("speaker/session/utterance", "what the parts of a path below it mean")
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
    trunk_learning_rate: float | None = _setting(None, "highest learning rate of the trunk; none: learning_rate")
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

    crop_seconds: float = _setting(2.0, "length of a training crop")
    sampler: str = _setting("speaker", "speaker (each as often) or utterance (each as often)")
    speeds: list = _setting([1.0], "playback speeds; each but the first is a set of speakers of its own")
    noise: str | None = _setting(None, "folder of noise to add")
    noise_snr: list = _setting([0.0, 15.0], "lowest and highest signal-to-noise ratio, dB")
    noise_probability: float = _setting(0.6, "share of crops with noise")
    workers: int = _setting(1, "processes that read and augment")

    steps: int = _setting(200, "optimiser steps")
    batch_size: int = _setting(48, "crops per process and micro-batch")
    accumulation: int = _setting(1, "micro-batches per optimiser step")
    learning_rate: float = _setting(2e-3, "highest learning rate")
    final_learning_rate: float = _setting(2e-5, "learning rate at the last step, reached by a cosine")
    warmup: float = _setting(0.05, "share of the steps in which the learning rate rises from 0")
    weight_decay: float = _setting(0.05, "of AdamW, on matrices and kernels; not on norms and biases")
    max_gradient_norm: float = _setting(5.0, "gradients are clipped to this norm")
    margin_rise: list = _setting([0.1, 0.4], "shares of the steps between which the margin rises from 0 to its full")
    rotate_at: list = _setting([], "shares of the steps at which the basis is rotated during training")
    mixed_precision: str = _setting("no", "no, bf16 or fp16")
    seed: int = _setting(0, "of weights, batches and dropout")

    evaluate_every: int = _setting(50, "steps between evaluations on the development trials")
    checkpoint_every: int = _setting(100, "steps between checkpoints to resume from")
    log_every: int = _setting(10, "steps between log lines")
    chance_steps: int = _setting(300, "steps after warm-up by which the loss must have left chance level")
    tracker: str = _setting("tensorboard", "tensorboard, wandb or none")
    report_dims: list = _setting([], "more prefixes to report at the end than the model's own")
    resamples: int = _setting(1000, "bootstrap resamples of the intervals in the final report")

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulation", "evaluate_every", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1.")
        if not self.speeds or self.speeds[0] != 1.0:
            raise ValueError(f"speeds: got {self.speeds}, expected a list that begins with 1.0.")
        if len(self.margin_rise) != 2 or not 0 <= self.margin_rise[0] <= self.margin_rise[1] <= 1:
            raise ValueError(f"margin_rise: got {self.margin_rise}, expected two rising shares between 0 and 1.")
        if self.tracker not in ("tensorboard", "wandb", "none"):
            raise ValueError(f"tracker: got {self.tracker!r}, expected tensorboard, wandb or none.")
        if (self.dev_trials is None) != (self.dev_folder is None):
            raise ValueError("dev_trials and dev_folder: give both or neither.")
        if self.dev_trials is None and self.dev_speakers < 2:
            raise ValueError("dev_speakers: at least 2 are needed when there are no dev_trials.")
        self._check_tuning()
        needed = {"folder"} if self.label_column else {"folder", "trials"}
        for name, test in self.tests.items():
            if not needed <= set(test) <= needed | {"domain", "domain_options"}:
                raise ValueError(
                    f"tests.{name}: got {sorted(test)}, expected the entries {' and '.join(sorted(needed))}, and "
                    "domain and domain_options where its audio is not to stay as it is."
                )

    def _check_tuning(self):
        for name, allowed in (("trains", TRAINS), ("strategy", STRATEGIES), ("label_key", ("speaker", "path"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(allowed)}.")
        for name in ("base_share", "trunk_frozen_until", "cut_at"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a share from 0 to below 1.")
        if (self.label_file is None) != (self.label_column is None):
            raise ValueError("label_file and label_column: give both or neither.")
        if self.trunk_frozen_until and self.trains != "all":
            raise ValueError(f"trunk_frozen_until: with trains: {self.trains} the trunk never trains; leave it out.")
        if self.rotate_at and self.trains != "all":
            raise ValueError(f"rotate_at: with trains: {self.trains} the basis is not ours to turn; leave it out.")
        if self.rank < 1 or self.strategy in ("dynamic", "warm_up") and self.start_rank <= self.rank:
            raise ValueError(
                f"rank: got {self.rank} and start_rank {self.start_rank}; expected at least 1, and a start above it."
            )


TRAINS = ("all", "head", "projection", "adapter")
STRATEGIES = ("vanilla", "dynamic", "warm_up", "mixed")


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
