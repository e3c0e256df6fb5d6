"""The training run: loop, state, checkpoints, log, defaults."""
