"""What a run says when it stops, and its final report: tables, results.json, the card, the model in best/."""

import copy
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from peft import PeftModel

from mrl_redimnet.adapters import AdapterFacts
from mrl_redimnet.adapters.publishing import publish_adapter
from mrl_redimnet.data.corpus import check_problems
from mrl_redimnet.evaluation.groups import format_groups
from mrl_redimnet.evaluation.results import as_records, format_table
from mrl_redimnet.hub_cards.results import Evaluation
from mrl_redimnet.rotation import rotate
from mrl_redimnet.saving import save_model
from mrl_redimnet.training.checkpoints import Progress, newest_step
from mrl_redimnet.training.parts import CheckpointAverage, TrainedAdapter, training_embeddings
from mrl_redimnet.training.reading import flat, in_groups
from mrl_redimnet.training.run import Run
from mrl_redimnet.training.setup import crops_per_step
from mrl_redimnet.training.tasks import Attribute, Verification


@contextmanager
def one_sentence_for_bad_input(program: str) -> Iterator[None]:
    """What was wrong before the first step is said without a traceback; exit status 2. Later errors are raised."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if hasattr(error, "__notes__"):  # of `with_place_to_resume`: the run had begun
            raise
        print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@contextmanager
def with_place_to_resume(run: Run, progress: Progress) -> Iterator[None]:
    """An error that ends the run says at its end what is left of it."""
    try:
        yield
    except Exception as error:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else a worker's death is raised while this error is told
        error.add_note(what_is_left(run, progress))
        raise


def what_is_left(run: Run, progress: Progress) -> str:
    """The last good checkpoint of a run that stopped, in words."""
    stopped = f"The run stopped after step {progress.step} of {run.steps}. "
    good = newest_step(run.checkpoints)
    if not good:
        return stopped + "It had not come to its first checkpoint."
    return stopped + (
        f"Its last good checkpoint is {run.checkpoints}/step-{good:08d}: once the cause is removed, the same "
        "command with --resume goes on from there."
    )


def report_unreadable(run: Run, progress: Progress) -> None:
    """Lists the crops that could not be read so far; too large a share of them stops the run."""
    recipe = run.recipe
    if progress.problems:
        crops = progress.step * recipe.data.batch_size * recipe.optimizer.gradient_accumulation
        listing = run.output / f"unreadable_crops_{run.accelerator.process_index}.tsv"
        print(check_problems(progress.problems, crops, recipe.data.max_unusable_ratio, listing))


def final_report(run: Run, progress: Progress) -> None:
    """Evaluates the best model beside what it came from, writes best/ and results.json, and prints the tables."""
    recipe, task, accelerator = run.recipe, run.task, run.accelerator
    systems, saved, scores = final_systems(run, progress)
    dims = sorted({*run.model.config.matryoshka_dims, *recipe.evaluation.report_dims})
    results = {
        name: {s: task.evaluate(m, test, dims, recipe.evaluation.bootstrap_samples, name) for s, m in systems.items()}
        for name, test in (task.tests or task.development).items()
    }
    groups = {
        name: task.by_group(systems[saved], test, recipe.evaluation.bootstrap_samples)
        for name, test in task.tests.items()
    }
    groups = {name: rows for name, rows in groups.items() if rows}
    if not accelerator.is_main_process:
        return
    sentence = training_sentence(run, progress, saved)
    benchmarks = {name: test.benchmark for name, test in recipe.evaluation.tests.items() if test.benchmark}
    evaluation = Evaluation(saved, results, groups=groups, benchmarks=benchmarks)
    best = run.output / "best"
    if run.part(TrainedAdapter) is None:
        name = run.output.name
        save_model(systems[saved], best, task.classes, name=name, training=sentence, evaluation=evaluation)
    else:
        publish_adapter(run.output / "best_as_trained", best, sentence, evaluation)
        ranks = AdapterFacts.load(best).layers
        print("\nRanks: " + ", ".join(f"{name} {rank}" for name, rank in ranks.items()))
    record = {
        "recipe": in_groups(flat(recipe)),
        "steps": run.steps,
        "notes": list(task.notes.values()),
        "best_step": progress.best_step,
        "saved": saved,
        "development_scores": scores,
        "results": {name: {s: as_records(rows) for s, rows in r.items()} for name, r in results.items()},
        "groups": {name: [asdict(row) for row in rows] for name, rows in groups.items()},
    }
    (run.output / "results.json").write_text(json.dumps(record, indent=1))
    for name, tables in results.items():
        print(f"\n{name}: best model (step {progress.best_step}); 95 % intervals over speakers")
        print(format_table(tables))
        if name in groups:
            print(format_groups(groups[name]))
    print(f"\nSaved: {best} ({saved}), {recipe.run.output}/last, {recipe.run.output}/results.json")


def final_systems(run: Run, progress: Progress) -> tuple[dict, str, dict[str, float]]:
    """The models to report, the name of the one to save, and development scores that it was chosen by.

    An adapter is loaded as its users will load it, beside the base without it. A trained verification model is
    reported as trained and, where the recipe asks for it, as the mean of its last weights, each also rotated: at full
    width that scores alike; prefixes gain much by it when they were not trained as prefixes of a rotated basis, and
    little or nothing after `rotate_at`. The development trials decide.
    """
    recipe, task, device = run.recipe, run.task, run.accelerator.device
    folder = run.output / "best_as_trained"
    systems = {}
    if recipe.model.start is not None and isinstance(task, Verification):
        systems["base"] = task.build_model(recipe)[0].to(device).eval()
    if run.part(TrainedAdapter) is not None:
        model = task.build_model(recipe)[0].to(device).eval()
        PeftModel.from_pretrained(model if isinstance(task, Attribute) else model.base_model, folder)
        return {**systems, "adapter": model}, "adapter", {}
    trained = {"as trained": type(run.model).from_pretrained(folder).to(device)}
    if (average := run.part(CheckpointAverage)) is not None:
        trained["mean of the last"] = copy.deepcopy(trained["as trained"])
        average.mean_into(run, trained["mean of the last"], progress.step)
    if isinstance(task, Verification) and recipe.model.finetune == "all" and not recipe.basis_is_taught:
        for name, model in list(trained.items()):
            turned = "rotated" if name == "as trained" else f"{name}, rotated"
            trained[turned] = copy.deepcopy(model)
            rotate(trained[turned], training_embeddings(run, model))
    judge = next(iter(task.development.values()))
    scores = {}
    if len(trained) > 1:
        scores = {name: task.score(task.evaluate(model, judge)) for name, model in trained.items()}
    saved = min(scores, key=lambda name: (scores[name], "rotated" not in name)) if scores else "as trained"
    return {**systems, **trained}, saved, scores


def training_sentence(run: Run, progress: Progress, saved: str) -> str:
    """What the card says about the training."""
    recipe = run.recipe
    start = "random weights" if recipe.model.start is None else f"`{Path(recipe.model.start).name}`"
    crops = crops_per_step(recipe, run.accelerator)
    length = " to ".join(f"{seconds:g}" for seconds in dict.fromkeys(recipe.data.crop_range))
    adapter, kind = recipe.adapter, recipe.augmentation
    whole = recipe.model.finetune != "adapter"
    what = "Trained" if whole else f"An adapter ({adapter.placement}, {adapter.strategy}) trained"
    loss, taught = recipe.loss, ""
    if loss.teacher is not None:
        teacher = Path(loss.teacher).name if Path(loss.teacher).exists() else loss.teacher
        labels = "with" if loss.margin_weight else "without"
        taught = f", {labels} speaker labels and with the teacher `{teacher}` ({loss.taught})"
    domain = "" if kind.domain == "clean" else f", {1 - kind.clean_ratio:.0%} of them made {kind.domain},"
    return (
        f"{what} from {start} by `train_hf.py`: {progress.step} steps of {crops} crops of {length} s"
        f"{domain} from {run.task.speech}{taught}. Step {progress.best_step} was best on the development speech."
        + (f" Saved is: {saved}." if whole else "")
    )
