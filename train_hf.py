"""Train a Matryoshka ReDimNet with Accelerate.

    accelerate launch train_hf.py                                     # nano on a synthetic corpus, minutes on a CPU
    accelerate launch train_hf.py recipes/FILE.yaml --output runs/x   # a recipe, single settings replaced
    accelerate launch train_hf.py recipes/FILE.yaml --resume          # go on after a stop, to the same weights

Several CPU processes: torchrun --nproc_per_node 2 train_hf.py (accelerate launch starts one on CPUs).

The run reads from top to bottom in `main` and `train`: data, model, optimiser, steps, evaluation, save. Below `output`
it writes checkpoints/, the models best_as_trained/, last/ and at the end best/ (complete Hub folders), results.json and
tracker logs.
"""

import copy
import importlib.util
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

import mrl_redimnet  # noqa: F401  registers the models with transformers
from configuration_mrl_redimnet import SIZES, MRLReDimNetConfig
from modeling_mrl_redimnet import MRLReDimNetForXVector
from mrl_redimnet.batches import AddNoise, CropDataset, DrawBatches, collate
from mrl_redimnet.corpus import SpeakerTable, check_problems, load_corpus, split_usable
from mrl_redimnet.evaluation import (
    VerificationRow,
    as_records,
    check_present,
    embed_files,
    evaluate_trials,
    format_table,
)
from mrl_redimnet.recipe import Recipe, parse_command_line
from mrl_redimnet.rotation import ROTATION_UTTERANCES, rotate
from mrl_redimnet.saving import save_model
from mrl_redimnet.synthetic import make_corpus
from mrl_redimnet.training import (
    ChanceGuard,
    Progress,
    build_optimizer,
    chance_loss,
    learning_rate_at,
    load_checkpoint,
    margin_at,
    save_checkpoint,
)
from mrl_redimnet.trials import Trials, make_trials, read_trials


def main(argv: list[str] | None = None):
    """Runs the training described by the command line `argv` (None: the process's own)."""
    recipe, resume = parse_command_line(argv, __doc__)
    disable_progress_bar()  # of saving; the steps have their own
    output = Path(recipe.output)
    output.mkdir(parents=True, exist_ok=True)
    accelerator = build_accelerator(recipe)
    set_seed(recipe.seed)

    # Data: training rows, development trials of other speakers; batches are a function of the step.
    speech = prepare_speech(recipe, accelerator)
    dataset = build_dataset(recipe, speech)

    # Model and optimiser.
    model, fresh_classifier = build_model(recipe, dataset.num_labels)
    check_fit(recipe, model.config)
    guard = chance_guard(recipe, model) if fresh_classifier else None
    optimizer = build_optimizer(model, recipe)
    model, optimizer = accelerator.prepare(model, optimizer)
    describe(accelerator, recipe, speech, model, dataset)

    # Steps, with evaluation and checkpoints in between.
    progress = start_or_resume(recipe, accelerator, resume)
    train(recipe, accelerator, speech, dataset, model, optimizer, guard, progress)

    # Save and report.
    if accelerator.is_main_process:
        save_model(accelerator.unwrap_model(model), output / "last", speech.speakers)
    final_report(recipe, accelerator, speech, progress)
    accelerator.end_training()


def train(recipe, accelerator, speech, dataset, model, optimizer, guard, progress):
    """The steps from `progress.step` on; `model` is trained in place, `progress` kept up to date."""
    output, plain_model = Path(recipe.output), accelerator.unwrap_model(model)
    batches = iter(build_loader(dataset, recipe, accelerator, progress.step))
    history = History(accelerator, recipe, progress.step, plain_model.config.matryoshka_dims)
    rotations = {int(share * recipe.steps) for share in recipe.rotate_at}
    model.train()
    for step in range(progress.step, recipe.steps):
        torch.manual_seed(recipe.seed + 1_000_003 * (step + 1) + accelerator.process_index)  # dropout, spec-augment
        if step in rotations:
            rotate_in_training(plain_model, optimizer, speech.corpus, recipe)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, recipe)
        margin = margin_at(step, recipe, plain_model.config.margin)
        for _ in range(recipe.accumulation):
            batch = next(batches)
            progress.problems += batch["problems"]
            inputs, labels = (batch[key].to(accelerator.device) for key in ("input_values", "labels"))
            with accelerator.accumulate(model):
                answer = model(inputs, labels=labels, margin=margin)
                accelerator.backward(answer.loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), recipe.max_gradient_norm)
                optimizer.step()
                optimizer.zero_grad()
        history.add(step, answer, optimizer.param_groups[0]["lr"], margin)
        if guard is not None and step == 0:
            guard.check_start(float(answer.loss.detach()))
        if guard is not None and history.loss is not None:
            guard.check_progress(step, history.loss, plain_model.config.scale * math.sin(margin))

        progress.step = step + 1
        if progress.step % recipe.evaluate_every == 0 or progress.step == recipe.steps:
            report_unreadable(recipe, accelerator, progress)
            rows = evaluate_trials(plain_model, speech.dev_trials, speech.dev_folder)
            history.report(f"step {progress.step}, development trials", rows)
            if mean_eer(rows) <= progress.best_eer:  # of equals the later, longer trained one
                progress.best_eer, progress.best_step = mean_eer(rows), progress.step
                if accelerator.is_main_process:
                    save_model(plain_model, output / "best_as_trained", speech.speakers)
        if progress.step % recipe.checkpoint_every == 0 or progress.step == recipe.steps:
            save_checkpoint(accelerator, output / "checkpoints", progress, recipe)
    history.close()


# ----------------------------------------------------------------------------------------------------------------------
# In the order of use


def build_accelerator(recipe: Recipe) -> Accelerator:
    """Devices, precision, accumulation, trackers."""
    if recipe.tracker == "wandb" and importlib.util.find_spec("wandb") is None:
        raise ModuleNotFoundError("tracker: wandb is not installed: pip install 'mrl-redimnet[wandb]'.")
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else processes without an accelerator each train on their own
        mixed_precision=recipe.mixed_precision,
        gradient_accumulation_steps=recipe.accumulation,
        log_with=None if recipe.tracker == "none" else recipe.tracker,
        project_config=ProjectConfiguration(project_dir=recipe.output, logging_dir=str(Path(recipe.output) / "logs")),
    )
    settings = {k: v if isinstance(v, (int, float, str)) else json.dumps(v) for k, v in asdict(recipe).items()}
    accelerator.init_trackers("mrl-redimnet", config=settings)
    return accelerator


@dataclass(frozen=True)
class Speech:
    """Training rows, the table of their speakers, development trials with the folder of their paths, test trials."""

    corpus: Dataset
    speakers: SpeakerTable
    dev_trials: Trials
    dev_folder: Path
    tests: dict[str, tuple[Trials, str]]


def prepare_speech(recipe: Recipe, accelerator: Accelerator) -> Speech:
    """Reads the training folder, the main process first, the others from its cache; splits off development trials."""
    with accelerator.main_process_first():
        with_embedded_corpus(recipe)
        corpus, dev_trials, dev_folder = development_set(load_training_speech(recipe, accelerator), recipe)
        tests = {name: (read_trials(test["trials"]), test["folder"]) for name, test in recipe.tests.items()}
        for trials, folder in (*tests.values(), (dev_trials, dev_folder)):
            check_present(trials, folder)  # now, not after the training
        return Speech(corpus, speaker_table(corpus, recipe), dev_trials, dev_folder, tests)


def with_embedded_corpus(recipe: Recipe):
    """Without a training folder: the synthetic corpus, made on first use, and its trial list as the test."""
    if recipe.train is not None:
        return
    root = make_corpus(Path("data") / "synthetic")
    print(f"No training folder given: using the synthetic corpus in {root}. Its EERs say nothing about real voices.")
    recipe.train = str(root / "train")
    recipe.tests = recipe.tests or {
        "synthetic": {"trials": str(root / "test" / "trials.txt"), "folder": str(root / "test" / "wav")}
    }


def load_training_speech(recipe: Recipe, accelerator: Accelerator) -> Dataset:
    """The usable rows of the training folder; the others are counted, listed, and too many of them stop the run."""
    corpus = load_corpus(recipe.train, recipe.layout)
    usable, problems = split_usable(corpus, recipe.min_seconds)
    report = Path(recipe.output) / "unusable_files.tsv"
    summary = check_problems(problems, len(corpus), recipe.max_problem_share, report)
    if problems:
        accelerator.print(summary)
    return usable


def development_set(corpus: Dataset, recipe: Recipe) -> tuple[Dataset, Trials, Path]:
    """Training rows without the held-out speakers, and the development trials with the folder of their paths."""
    if recipe.dev_trials is not None:
        return corpus, read_trials(recipe.dev_trials), Path(recipe.dev_folder)
    names, counts = np.unique(corpus["speaker"], return_counts=True)
    eligible = names[counts > 1]  # a target trial needs two utterances
    if len(eligible) <= recipe.dev_speakers:
        raise ValueError(
            f"dev_speakers: {recipe.dev_speakers} speakers are to be held out, but only {len(eligible)} of "
            f"{len(names)} have two utterances or more. Hold out fewer, or give dev_trials and dev_folder."
        )
    held_out = set(np.random.default_rng([recipe.seed, 2]).choice(eligible, recipe.dev_speakers, replace=False))
    is_dev = np.array([speaker in held_out for speaker in corpus["speaker"]])
    dev, training = corpus.select(np.flatnonzero(is_dev)), corpus.select(np.flatnonzero(~is_dev))
    trials = make_trials(dev["path"], dev["speaker"], dev["session"], seed=recipe.seed)
    first = dev[0]
    return training, trials, Path(first["audio"]["path"].removesuffix(first["path"]))


def speaker_table(corpus: Dataset, recipe: Recipe) -> SpeakerTable:
    """Speakers to label ids: those of the model started from, or of this run so far, keep theirs."""
    known = SpeakerTable([])
    for folder in (Path(recipe.output), Path(recipe.model)):
        if (folder / "speakers.json").is_file():
            known = SpeakerTable.load(folder / "speakers.json")
            break
    table = known.extended(corpus.unique("speaker"))
    table.save(Path(recipe.output) / "speakers.json")
    return table


def build_dataset(recipe: Recipe, speech: Speech) -> CropDataset:
    """Training crops with the recipe's augmentations."""
    noise = [AddNoise(recipe.noise, tuple(recipe.noise_snr), recipe.noise_probability)] if recipe.noise else []
    return CropDataset(
        speech.corpus,
        speech.speakers,
        crop_seconds=recipe.crop_seconds,
        sampler=recipe.sampler,
        speeds=tuple(recipe.speeds),
        augmentations=noise,
        seed=recipe.seed,
    )


def build_model(recipe: Recipe, num_speakers: int) -> tuple[MRLReDimNetForXVector, bool]:
    """The model, and whether its classifier is fresh."""
    if recipe.model in SIZES:
        config = MRLReDimNetConfig.from_size(recipe.model, num_speakers=num_speakers, **recipe.model_options)
        return MRLReDimNetForXVector(config), True
    model, info = MRLReDimNetForXVector.from_pretrained(
        recipe.model,
        num_speakers=num_speakers,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **recipe.model_options,
    )
    replaced = {key if isinstance(key, str) else key[0] for key in (*info["missing_keys"], *info["mismatched_keys"])}
    if replaced - {"classifier.weight"}:
        raise ValueError(
            f"{recipe.model} lacks or misshapes {len(replaced)} tensors: {', '.join(sorted(replaced)[:5])}."
        )
    return model, bool(replaced)


def check_fit(recipe: Recipe, config: MRLReDimNetConfig):
    """Raises ValueError for settings that this model cannot meet."""
    wrong = [dim for dim in recipe.report_dims if not 1 <= dim <= config.embedding_size]
    if wrong:
        raise ValueError(f"report_dims: {wrong} are not between 1 and the embedding's {config.embedding_size}.")
    if recipe.rotate_at and config.embedding_norm:
        raise ValueError("rotate_at: a rotation folds embedding_norm in, which training still needs; leave out either.")


def chance_guard(recipe: Recipe, model: MRLReDimNetForXVector) -> ChanceGuard:
    """Knows the loss of a classifier that has learnt nothing, and the step by which it must have."""
    crops = min(recipe.batch_size, 64)  # what more of them would change is small
    mean, deviation = chance_loss(model.classifier, margin_at(0, recipe, model.config.margin), crops)
    return ChanceGuard(mean, deviation, deadline=int(recipe.warmup * recipe.steps) + recipe.chance_steps)


def describe(accelerator: Accelerator, recipe: Recipe, speech: Speech, model, dataset: CropDataset):
    """What is about to be trained, on what."""
    plain = accelerator.unwrap_model(model)
    encoder, head = (sum(p.numel() for p in part.parameters()) for part in (plain.redimnet, plain.classifier))
    accelerator.print(
        f"{recipe.model}: {encoder:,} parameters and a classifier of {head:,} for {dataset.num_labels:,} classes, all "
        f"trained; {len(speech.corpus):,} utterances of {len(speech.speakers):,} speakers, "
        f"{sum(speech.corpus['seconds']) / 3600:.1f} h; development: {len(speech.dev_trials):,} trials.\n"
        f"{recipe.steps} steps of {recipe.batch_size} x {recipe.accumulation} x {accelerator.num_processes} crops of "
        f"{recipe.crop_seconds} s on {accelerator.device}."
    )


def start_or_resume(recipe: Recipe, accelerator: Accelerator, resume: bool) -> Progress:
    """Step 0, or the newest checkpoint when resuming; an earlier run's checkpoints are never overwritten."""
    folder = Path(recipe.output) / "checkpoints"
    if not resume:
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(
                f"output: {recipe.output} holds checkpoints of an earlier run: --resume goes on with it, another "
                "--output begins anew."
            )
        return Progress()
    progress = load_checkpoint(accelerator, folder, recipe)
    if progress is None:
        accelerator.print(f"No checkpoint below {folder}: starting from the beginning.")
        return Progress()
    accelerator.print(f"Resuming at step {progress.step} of {recipe.steps}.")
    return progress


def build_loader(dataset: CropDataset, recipe: Recipe, accelerator: Accelerator, first_step: int) -> DataLoader:
    """Batches from `first_step` on.

    Not prepared by Accelerate: each process draws its own share already, and a resumed run begins at its step instead
    of skipping batches.
    """
    batches = DrawBatches(
        recipe.batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        first=first_step * recipe.accumulation,
        stop=recipe.steps * recipe.accumulation,
    )
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=recipe.workers,
        generator=torch.Generator().manual_seed(recipe.seed),  # else the loader draws from the global one
        pin_memory=accelerator.device.type == "cuda",
    )


class History:
    """Losses on the device until a log line is due; progress bar and trackers."""

    def __init__(self, accelerator: Accelerator, recipe: Recipe, first_step: int, dims: list[int]):
        self.accelerator, self.recipe, self.dims = accelerator, recipe, dims
        self.pending: list[torch.Tensor] = []
        self.loss: float | None = None
        self.clock = time.perf_counter()
        self.bar = tqdm(total=recipe.steps, initial=first_step, disable=not accelerator.is_main_process, unit="step")

    def add(self, step: int, answer, learning_rate: float, margin: float):
        """Keeps this step's losses; every `log_every` steps fetches their means, in one device sync."""
        self.bar.update()
        self.pending.append(torch.cat([answer.loss.detach()[None], answer.prefix_losses]))
        if (step + 1) % self.recipe.log_every:
            return
        self.loss, *prefixes = torch.stack(self.pending).mean(0).tolist()
        crops = len(self.pending) * self.recipe.batch_size * self.recipe.accumulation * self.accelerator.num_processes
        rate = crops / (time.perf_counter() - self.clock)
        self.pending, self.clock = [], time.perf_counter()
        self.bar.set_postfix_str(f"loss {self.loss:.2f}, lr {learning_rate:.1e}, {rate:.0f} crops/s")
        named = {f"loss/{d}": v for d, v in zip(self.dims, prefixes, strict=True)}
        values = {"loss": self.loss, **named, "learning_rate": learning_rate, "margin": margin, "crops_per_s": rate}
        self.accelerator.log(values, step=step + 1)

    def report(self, title: str, rows):
        """Prints a table of verification results and logs it."""
        self.accelerator.log({f"dev_eer/{row.dim}": row.eer for row in rows}, step=self.bar.n)
        if self.accelerator.is_main_process:
            self.bar.write(format_table({title: rows}))
        self.clock = time.perf_counter()

    def close(self):
        """Ends the progress bar."""
        self.bar.close()


def mean_eer(rows: list[VerificationRow]) -> float:
    """The mean over dimensions, what models are chosen by: every dimension is to be good."""
    return sum(row.eer for row in rows) / len(rows)


def training_embeddings(model, corpus: Dataset, recipe: Recipe) -> np.ndarray:
    """Embeddings of (a drawn share of) the training utterances, for the rotation, [N, D]."""
    rows = np.random.default_rng([recipe.seed, 3]).permutation(len(corpus))[:ROTATION_UTTERANCES]
    return embed_files(model, [corpus[int(row)]["audio"]["path"] for row in sorted(rows)], progress="rotation")


def rotate_in_training(model, optimizer, corpus: Dataset, recipe: Recipe):
    """Turns the basis mid-run; the optimiser forgets the moments of the turned tensors, which were of the old basis."""
    rotate(model, training_embeddings(model, corpus, recipe))
    for parameter in (*model.redimnet.projection.segments.parameters(), model.classifier.weight):
        optimizer.state.pop(parameter, None)


def report_unreadable(recipe: Recipe, accelerator: Accelerator, progress: Progress):
    """Lists the crops that could not be read so far; too large a share of them stops the run."""
    if progress.problems:
        crops = progress.step * recipe.batch_size * recipe.accumulation
        listing = Path(recipe.output) / f"unreadable_crops_{accelerator.process_index}.tsv"
        print(check_problems(progress.problems, crops, recipe.max_problem_share, listing))


def final_report(recipe: Recipe, accelerator: Accelerator, speech: Speech, progress: Progress):
    """Evaluates the best model as trained and rotated, saves the better, writes results.json and prints the tables.

    At full width the two score alike. Prefixes gain much by the rotation when they were not trained as prefixes of a
    rotated basis, and little or nothing after `rotate_at`: the development trials decide.
    """
    output = Path(recipe.output)
    trained = MRLReDimNetForXVector.from_pretrained(output / "best_as_trained").to(accelerator.device)
    rotated = copy.deepcopy(trained)
    rotate(rotated, training_embeddings(trained, speech.corpus, recipe))
    models = {"as trained": trained, "rotated": rotated}
    development = (speech.dev_trials, speech.dev_folder)
    score = {state: mean_eer(evaluate_trials(model, *development)) for state, model in models.items()}
    saved = "rotated" if score["rotated"] <= score["as trained"] else "as trained"

    dims = sorted({*trained.config.matryoshka_dims, *recipe.report_dims})
    results = {
        name: {s: evaluate_trials(m, trials, folder, dims, recipe.resamples, name) for s, m in models.items()}
        for name, (trials, folder) in (speech.tests or {"development": development}).items()
    }
    if not accelerator.is_main_process:
        return
    sentence = training_sentence(accelerator, recipe, speech, progress, saved)
    best = {name: states[saved] for name, states in results.items()}
    save_model(models[saved], output / "best", speech.speakers, training=sentence, results=best)
    record = {
        "recipe": asdict(recipe),
        "best_step": progress.best_step,
        "saved": saved,
        "development_mean_eer": score,
        "results": {name: {state: as_records(rows) for state, rows in r.items()} for name, r in results.items()},
    }
    (output / "results.json").write_text(json.dumps(record, indent=1))
    for name, tables in results.items():
        print(f"\n{name}: best model (step {progress.best_step}); 95 % intervals over speakers")
        print(format_table(tables))
    print(f"\nSaved: {output}/best ({saved}: better on the development trials), {output}/last, {output}/results.json")


def training_sentence(accelerator: Accelerator, recipe: Recipe, speech: Speech, progress: Progress, saved: str) -> str:
    """What the model card says about the training."""
    start = "random weights" if recipe.model in SIZES else recipe.model
    crops = recipe.batch_size * recipe.accumulation * accelerator.num_processes
    return (
        f"Trained from {start} by `train_hf.py`: {recipe.steps} steps of {crops} crops of {recipe.crop_seconds} s from "
        f"{len(speech.corpus):,} utterances of {len(speech.speakers):,} speakers "
        f"({sum(speech.corpus['seconds']) / 3600:.1f} h). Step {progress.best_step} was best on the development "
        f"trials. Prefixes are {saved}."
    )


if __name__ == "__main__":
    main()
