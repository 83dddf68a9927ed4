"""Checkpoints of a run: written whole or not at all, and read under the same settings alone."""

import json
import math
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from configuration_mrl_redimnet import SIZES
from mrl_redimnet.training.optimizer import learning_rate_growth
from mrl_redimnet.training.reading import flat, in_groups, of_older_version
from mrl_redimnet.training.recipe import Recipe

# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


@dataclass
class Progress:
    """What a run has to know to go on, besides tensors."""

    step: int = 0
    best_score: float = math.inf  # on development speech, lower is better
    best_step: int = -1
    without_better: int = 0  # evaluations since
    ended: bool = False  # before the last step, for want of a better model
    problems: list = field(default_factory=list)  # of this process
    crops: Any = None  # where this process's stream is, as `state()` of the crops gave it


CHECKPOINT_NAME = re.compile(r"step-(\d{8})")


# Settings that may differ between a run and its continuation: they do not touch what is trained. The number of steps is
# compared by itself: a recipe may give it in epochs.
FREE_SETTINGS = {
    "run.output",
    "run.log_every",
    "run.checkpoint_every",
    "run.tracker",
    "run.chance_until",
    "run.recompute",
    "data.workers",
    "evaluation.evaluate_every",
    "evaluation.tests",
    "evaluation.report_dims",
    "evaluation.bootstrap_samples",
    "adapter.base_repository",
    "schedule.steps",
}


def save_checkpoint(
    accelerator: Accelerator, folder: Path, progress: Progress, recipe: Recipe, steps: int, keep: int = 2
) -> None:
    """Writes `folder`/step-NNNNNNNN whole or not at all: into a temporary folder first, then renamed."""
    temporary, final = folder / f"writing-{progress.step:08d}", folder / f"step-{progress.step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
        (temporary / f"progress-{accelerator.process_index}.json").write_text(json.dumps(asdict(progress)))
        if accelerator.is_main_process:
            settings = {"recipe": in_groups(flat(recipe)), "steps": steps, "processes": accelerator.num_processes}
            (temporary / "settings.json").write_text(json.dumps(settings))
    except Exception:  # a full disk, mostly: what was written of it is in the way
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        for old in _checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, folder: Path, recipe: Recipe, steps: int) -> Progress | None:
    """Restores the newest complete checkpoint below `folder`; None when there is none.

    Raises ValueError when it was written under other settings, naming them.
    """
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        return None
    stored = json.loads((checkpoints[-1] / "settings.json").read_text())
    now = flat(recipe)
    before = _settings_before(stored, recipe, accelerator.num_processes)
    changed = [
        f"{name} (was {before.get(name)!r}, is {value!r})"
        for name, value in now.items()
        if name not in FREE_SETTINGS and before.get(name) != value
    ]
    if before["schedule.steps"] != steps:
        changed.append(f"schedule.steps (was {before['schedule.steps']}, is {steps})")
    if changed:
        raise ValueError(f"{checkpoints[-1]} belongs to a run with other settings: {', '.join(changed)}.")
    if stored["processes"] != accelerator.num_processes:
        raise ValueError(
            f"{checkpoints[-1]} was written by {stored['processes']} processes, now there are "
            f"{accelerator.num_processes}: steps would be of other batches. Resume with as many as before."
        )
    accelerator.load_state(str(checkpoints[-1]))
    return Progress(**json.loads((checkpoints[-1] / f"progress-{accelerator.process_index}.json").read_text()))


def _settings_before(stored: dict, recipe: Recipe, processes: int) -> dict[str, Any]:
    """{full name: value} of the settings in a checkpoint, with the number of steps that the run had.

    Checkpoints of earlier versions have settings without groups, under the names of then, and the steps of the run
    among them. They lack some, which are as this run would have to have them to go on as that one did: which speakers
    are trained on is compared by their names, and classifier rows are the checkpoint's.
    """
    settings = stored["recipe"]
    hears = "same" if recipe.loss.teacher is not None else recipe.loss.teacher_hears
    later = {"loss.margin_weight": 1.0, "loss.teacher_loss": None, "loss.teacher_hears": hears}
    if "steps" in stored:
        values = {f"{group}.{name}": value for group, those in settings.items() for name, value in those.items()}
        return later | _size_of_older(values, recipe) | {"schedule.steps": stored["steps"]}
    growth, wanted = learning_rate_growth(recipe, processes)
    older = {
        "optimizer.max_learning_rate_growth": recipe.optimizer.max_learning_rate_growth if growth == wanted else None,
        "data.evaluation_speakers": recipe.data.evaluation_speakers,
        "model.reuse_classifier": recipe.model.reuse_classifier,
    }
    return later | older | _size_of_older(of_older_version(settings), recipe)


def _size_of_older(settings: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Settings from before random weights were named by `model.size`: a size stood in `model.start`."""
    start = settings.get("model.start")
    if "model.size" in settings or start not in SIZES:
        return settings
    return settings | {"model.start": None, "model.size": recipe.model.size if recipe.model.name == start else start}


def newest_step(folder: Path) -> int:
    """The step of the newest complete checkpoint below `folder`, 0 when there is none."""
    checkpoints = _checkpoints(folder)
    return int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else 0


def _checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if CHECKPOINT_NAME.fullmatch(p.name) and p.is_dir())
