# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["mrl-redimnet[train]"]
# ///
"""Train a Matryoshka ReDimNet with Accelerate.

    accelerate launch train_hf.py                                     # nano on a synthetic corpus, minutes on a CPU
    accelerate launch train_hf.py recipes/FILE.yaml --output runs/x   # a recipe, single settings replaced
    accelerate launch train_hf.py recipes/FILE.yaml --resume          # go on after a stop, to the same weights

Several CPU processes: torchrun --nproc_per_node 2 train_hf.py (accelerate launch starts one on CPUs).

The run reads from top to bottom in `main` and `train`. What a recipe asks for beyond the plain loop (an adapter, a
teacher, averages of weights, rotations, ...) are parts of the run, see mrl_redimnet.training.parts: the loop calls each
of them at fixed points. Below `output` a run writes checkpoints/, the models best_as_trained/, last/ and at the end
best/ (complete Hub folders), results.json, history.jsonl with its picture curves.png, and tracker logs.
"""

from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, set_seed
from transformers.utils import ModelOutput
from transformers.utils.logging import disable_progress_bar

import mrl_redimnet  # noqa: F401  registers the models with transformers
from mrl_redimnet.speed.recompute import recomputing
from mrl_redimnet.training.checkpoints import Progress, save_checkpoint
from mrl_redimnet.training.history import History
from mrl_redimnet.training.reading import parse_command_line
from mrl_redimnet.training.report import (
    final_report,
    one_sentence_for_bad_input,
    report_unreadable,
    with_place_to_resume,
)
from mrl_redimnet.training.run import Run
from mrl_redimnet.training.schedules import due, learning_rate_at
from mrl_redimnet.training.setup import (
    build_accelerator,
    check_fit,
    claim_output,
    make_run,
    prepare_training,
    start_or_resume,
)
from mrl_redimnet.training.tasks import check_files, start_config


def main(argv: list[str] | None = None) -> None:
    """Runs the training described by the command line `argv` (None: the process's own)."""
    # The recipe, checked as far as it can be before anything is read.
    recipe, resume = parse_command_line(argv, __doc__)
    check_files(recipe)
    check_fit(recipe, start_config(recipe))
    disable_progress_bar()  # of saving; the steps have their own

    # Devices and processes.
    accelerator = build_accelerator(recipe)
    Path(recipe.run.output).mkdir(parents=True, exist_ok=True)
    set_seed(recipe.run.seed)

    # Speech, model, and what of it is trained: all, a part, or an adapter on it.
    run = make_run(recipe, accelerator)
    claim_output(run.recipe, run.task, resume)
    prepare_training(run, resume)

    # Steps, with evaluation and checkpoints in between; where what is trained changes, a new optimiser.
    progress = start_or_resume(run, resume)
    with with_place_to_resume(run, progress):
        for stop in run.phase_ends(progress.step):
            if progress.ended:
                break
            train(run, progress, stop)
            if stop < run.steps and not progress.ended:
                run.begin_phase(stop)

        # Save and report.
        if accelerator.is_main_process:
            run.save("last")
        final_report(run, progress)
    run.prepared = run.optimizer = None  # a wrapper that outlives the process group can hang as Python takes it apart
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    accelerator.end_training()


def train(run: Run, progress: Progress, stop: int) -> None:
    """The steps from `progress.step` to before `stop`; the model is trained in place, `progress` kept up to date."""
    recipe, accelerator, optimizer = run.recipe, run.accelerator, run.optimizer
    batches = run.crops.batches(progress.step, stop)  # a function of the step
    history = History(recipe, run.steps, accelerator, run.task, run.model.config, progress.step)
    run.prepared.train()
    for step in range(progress.step, stop):
        torch.manual_seed(recipe.run.seed + 1_000_003 * (step + 1) + accelerator.process_index)  # dropout, spec-augment
        for part in run.parts:
            part.before_step(run, step)
        for group in optimizer.param_groups:
            group["lr"] = group["lr_scale"] * learning_rate_at(step, recipe, run.steps)

        # One step of the optimiser, over one or more micro-batches.
        for _ in range(recipe.optimizer.gradient_accumulation):
            batch = history.timed(batches)
            progress.problems += batch["problems"]
            with accelerator.accumulate(run.prepared):
                answer, loss = forward(run, batch, step)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(run.prepared.parameters(), recipe.optimizer.max_gradient_norm)
                optimizer.step()
                if accelerator.sync_gradients:
                    for part in run.parts:
                        part.after_optimizer(run, step, optimizer.step_was_skipped)
                optimizer.zero_grad()
        history.add(step, answer, {name: number for part in run.parts for name, number in part.numbers().items()})
        for part in run.parts:
            part.after_step(run, step, answer, history)

        # Evaluation on the development speech, and a checkpoint to resume from.
        progress.step = step + 1
        ends = progress.step == run.steps
        if ends or due(progress.step, run.timing.evaluate_every):
            evaluate_and_keep_best(run, progress, history)
        if ends or progress.ended or due(progress.step, run.timing.checkpoint_every):
            history.check_finite()  # a checkpoint of weights that are no numbers would be no place to go on from
            progress.crops = run.crops.state()
            save_checkpoint(accelerator, run.checkpoints, progress, recipe, run.steps)
        if progress.ended:
            accelerator.print(
                f"No better model in {recipe.evaluation.patience} evaluations: ending at step {progress.step}."
            )
            break
    history.close()


def forward(run: Run, batch: dict, step: int) -> tuple[ModelOutput, torch.Tensor]:
    """The model's answer to one batch at one step, and the loss to be minimised: its own and what the parts add.

    With a margin_weight of 0 the model has no loss of its own.
    """
    batch, labels, weight = run.batch_on_device(batch), batch["labels"], run.recipe.loss.margin_weight
    for part in run.parts:
        labels = part.labels(run, labels, step)
    options = run.task.loss_options(step, run.steps, run.recipe, run.model.config)
    labelled = {"labels": run.on_device(labels), **options} if weight else {}
    asked = {name: value for part in run.parts for name, value in part.asks(run).items()}
    with recomputing(run.recipe.run.recompute):
        answer = run.prepared(batch["input_values"], **labelled, **asked)
    loss = weight * answer.loss if weight else 0.0
    for part in run.parts:
        loss = loss + part.loss(run, batch, answer, options)
    return answer, loss


def evaluate_and_keep_best(run: Run, progress: Progress, history: History) -> None:
    """Judges the model on development speech; the best so far is saved. The first of several sets decides."""
    history.check_finite()
    report_unreadable(run, progress)
    with run.evaluating():
        tables = {title: run.task.evaluate(run.model, test) for title, test in run.task.development.items()}
        history.report(progress.step, tables)
        (score,) = broadcast_object_list([run.task.score(next(iter(tables.values())))])  # all end at the same step
        may_be_best = all(part.may_be_best(run, progress.step) for part in run.parts)
        better = may_be_best and score <= progress.best_score  # of equals the later, longer trained one
        if better:
            progress.best_score, progress.best_step = score, progress.step
        if better and run.accelerator.is_main_process:
            run.save("best_as_trained")
        for part in run.parts:
            part.evaluated(run, progress)
    progress.without_better = 0 if better else progress.without_better + may_be_best
    progress.ended = 0 < run.recipe.evaluation.patience <= progress.without_better


if __name__ == "__main__":
    with one_sentence_for_bad_input("train_hf.py"):
        main()
