"""Specs, data, models, the training loop, checkpoints, scoring and reports of a run."""
