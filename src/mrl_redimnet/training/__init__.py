"""Training: recipe, tasks, schedules, optimiser, checkpoints and what a run may add."""
