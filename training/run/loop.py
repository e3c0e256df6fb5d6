"""The training loop: stage 1 plain, stage 2 re-weighted and augmented. Read `Run.train` first.

All randomness (order, crops, meta batches) is a function of (seed, epoch, step). A stopped run therefore continues to
the same bits.
"""

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from training.data.batches import fits_in_memory, hold
from training.data.datasets import LongTailed
from training.errors import DivergenceError, Interrupted, TrainingError
from training.method.finite import Finite
from training.network.derivatives import Compute
from training.network.distributed import ALONE, Processes
from training.network.feature_cache import FeatureCache
from training.recipes import Recipe
from training.report.metrics import DETAILS
from training.run import checkpoints
from training.run.evaluation import evaluate
from training.run.log import Log
from training.run.signals import naming_dead_workers
from training.run.stages import (
    Stage,
    check_disk,
    check_room,
    data_of_stage,
    make_stages,
    meta_batches,
    on_features,
    view_of,
)
from training.run.start import find_start
from training.run.state import State, check_input_size, start
from training.run.steps import Stepper, log_line, set_trained
from zoo.labels import assign_groups
from zoo.signals import stop_signals

# On a GPU the host asks once in this many steps whether all numbers were finite.
STEPS_UNSEEN = 50


@dataclass(frozen=True)
class Options:
    """How a run is carried out. No option changes its result.

    evaluate_every  epochs between tests, for the log only; the last epoch is always tested
    save_minutes    minutes between checkpoints within an epoch; 0: only at its end
    workers         processes that decode pictures
    tensorboard     write the log to `folder`/tensorboard as well
    deterministic   on CUDA: only kernels that give the same bits each time; else a resumed run differs in the last bits
    in_memory       hold pictures that fit into memory; else read them from disk at each step
    features        folder of cached features (--cache-features), which runs may share; None: `folder`/features
    graphs          on CUDA: capture each step as a CUDA graph; METASAUG_GRAPHS=0 in the environment turns it off
    """

    evaluate_every: int = 10
    save_minutes: float = 10
    workers: int = 0
    tensorboard: bool = False
    deterministic: bool = True
    in_memory: bool = True
    features: Path | None = None
    graphs: bool = os.environ.get("METASAUG_GRAPHS") != "0"


def run(
    recipe: Recipe,
    data: LongTailed,
    folder: Path,
    device: torch.device,
    *,
    resume: bool = False,
    stage1: Path | None = None,
    processes: Processes = ALONE,
    on_progress: Callable[[State], None] | None = None,
    on_test: Callable[[State, dict, np.ndarray], None] | None = None,
    last_layer: Mapping[str, torch.Tensor] | None = None,
    **options,
) -> tuple[State, dict]:
    """Train from the newest checkpoint in `folder` (resume), from another run's stage 1, or from the beginning.

    folder       run folder: log.jsonl, checkpoints/, stage1/
    processes    that train together: rank 0 writes, all return the same
    on_progress  called after each step
    on_test      called with the results of each test and the logits (N, C)
    last_layer   its first weights, by their names in the network; None: random
    options      fields of `Options`
    Returns the state after the last epoch and its test results. Raises TrainingError, DivergenceError before an
    update that would spread NaN, Interrupted once the state is saved. SIGINT, SIGTERM and SIGHUP save at once.
    """
    run_ = Run(recipe, data, folder, device, Options(**options), processes, on_progress, on_test)
    if last_layer is not None:
        run_.state.module.load_state_dict(last_layer, strict=False)
    find_start(recipe, data, run_.state, folder, resume, stage1, processes)
    run_.prepare()
    return run_.state, run_.train()


class Run:
    """The state of a training run and its parts; see `run`."""

    def __init__(self, recipe: Recipe, data: LongTailed, folder: Path, device: torch.device, options: Options,
                 processes: Processes, on_progress: Callable[[State], None] | None,
                 on_test: Callable[[State, dict, np.ndarray], None] | None = None):
        self.recipe, self.data, self.folder, self.device = recipe, data, folder, device
        self.options, self.processes, self.on_progress, self.on_test = options, processes, on_progress, on_test
        if options.deterministic and device.type == "cuda":
            _same_bits_each_time()
        self.final = data_of_stage(recipe, data, 2)
        self.state = start(recipe, self.final, device)
        self.compute = Compute(processes, recipe.precision, recipe.accumulate, recipe.compile, self.state.scale,
                               Finite(device if device.type == "cuda" else None))
        self.stopped: list[int] = []
        self.saved_at = time.monotonic()

    def prepare(self) -> None:
        """Set up what the first step needs, and check what can be checked before it."""
        self.view = view_of(self.recipe, self.data)
        check_input_size(self.state.module, self.recipe, self.view)
        self.stages = make_stages(self.recipe, self.data, self.view, self.device, self.options.workers, self.processes,
                                  self.options.in_memory)
        self.processes.wait()
        self.steps = [self.stages[epoch >= self.recipe.stage2_epoch].batches.steps
                      for epoch in range(self.recipe.epochs)]
        self.stepper = Stepper(self.recipe, self.state, self.compute, self.device, self.options.graphs)
        self.cache, self.cached_stages = None, dict[bool, Stage]()
        if self.recipe.cache_features:
            self.cache = FeatureCache(self.options.features or self.folder / "features", self.recipe.cache_features,
                                      self.view, self.recipe.seed, self.device, self.options.workers, self.compute)
            check_disk(self.recipe, self.data, self.cache, self.state)
        if self.processes.first:
            check_room(self.folder, self.state)

    def train(self) -> dict:
        """Train the epochs that are left; returns the results of the last test."""
        recipe, state, results = self.recipe, self.state, {}
        tensorboard = self.folder / "tensorboard" if self.options.tensorboard else None
        with (
            stop_signals() as self.stopped,
            naming_dead_workers(),
            Log(self.folder / "log.jsonl" if self.processes.first else None, state.log_bytes, tensorboard) as log,
            tqdm(total=sum(self.steps), initial=sum(self.steps[: state.epoch]) + state.step, unit="step",
                 dynamic_ncols=True, disable=not self.processes.first) as bar,
        ):
            while state.epoch < recipe.epochs:
                self.leave_if_stopped()
                self.train_epoch(bar)
                line = log_line(recipe, state)
                if (state.epoch + 1) % self.options.evaluate_every == 0 or state.epoch + 1 == recipe.epochs:
                    kept: list[np.ndarray] | None = None if self.on_test is None else []
                    results = self.test(kept)
                    line["test"] = {k: v for k, v in results.items() if k not in DETAILS}
                    if self.on_test is not None and kept is not None:
                        self.on_test(state, results, np.concatenate(kept))
                state.begin_epoch(state.epoch + 1)
                state.log_bytes = log.write(line)
                if state.epoch == recipe.stage2_epoch and self.processes.first:
                    checkpoints.save(self.folder / "stage1", state.to_dict(recipe, self.data), state.epoch, 0, keep=1)
                self.save()
        results = results or self.test()  # empty if the run was resumed after its last epoch
        return {"split": "test", "epoch": state.epoch, **results}

    def train_epoch(self, bar: tqdm) -> None:
        """Train the steps of this epoch that are left."""
        recipe, state = self.recipe, self.state
        in_stage2, last = state.epoch >= recipe.stage2_epoch, self.steps[state.epoch]
        set_trained(state.module, recipe, in_stage2)
        stage = self.stage(in_stage2)
        self.stepper.begin_epoch(stage)
        with_meta = in_stage2 and recipe.looks_at_meta
        meta = meta_batches(recipe, stage, state, last) if with_meta else itertools.repeat(None)
        began = time.monotonic()
        for (pictures, labels), meta_batch in zip(stage.batches.epoch(state.epoch, state.step), meta, strict=False):
            with self.explained(len(labels)):
                self.stepper.step(pictures, labels, meta_batch)
            self.processes.level(state.module.buffers())
            state.step += 1
            state.seconds, began = state.seconds + time.monotonic() - began, time.monotonic()
            bar.update()
            if self.device.type != "cuda" or state.step % STEPS_UNSEEN == 0 or state.step == last:
                self.look_at_device(bar)
            if self.on_progress is not None:
                self.on_progress(state)
            self.leave_if_stopped()
            due = 0 < self.options.save_minutes * 60 <= time.monotonic() - self.saved_at
            if self.processes.any(due) and state.step < last:
                self.save()

    def look_at_device(self, bar: tqdm) -> None:
        """Raise DivergenceError if a step was not finite; else update the progress bar."""
        with self.explained(0):
            self.compute.finite.raise_if_failed()
        sums = self.state.sums.to_dict()
        bar.set_postfix_str(f"epoch {self.state.epoch + 1}/{self.recipe.epochs} loss "
                            f"{sums['loss'] / sums['pictures']:.3f} error {sums['wrong'] / sums['pictures']:.1%}",
                            refresh=False)

    @contextmanager
    def explained(self, pictures: int) -> Iterator[None]:
        """Explain errors of a step on this many pictures: where it happened and what to do."""
        try:
            yield
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            height, width = self.view.size
            raise TrainingError(f"A step of {pictures} pictures of {width} x {height} does not fit into the memory of "
                                f"{self.device}. Choose a smaller --batch-size or --input-size, or another "
                                "--architecture.") from error
        except DivergenceError as error:
            where = f"epoch {self.state.epoch + 1}, step {self.stepper.failed_step()}"
            raise DivergenceError(f"{where}: {error} Stopped before the update; "
                                  f"{checkpoints.whats_good(self.folder / 'checkpoints')}") from error

    def save(self, in_step: bool = True) -> None:
        """Write a checkpoint. in_step: all processes call this together; else each alone, with the same state."""
        if in_step:
            self.state.level(self.processes)
        with self.explained(0):
            self.compute.finite.raise_if_failed()
        self.state.check(self.folder / "checkpoints")
        if self.processes.first:
            checkpoints.save(self.folder / "checkpoints", self.state.to_dict(self.recipe, self.data),
                             self.state.epoch, self.state.step)
        if in_step:
            self.processes.wait()  # writing a large state may take longer than the time-out of other exchanges
        self.saved_at = time.monotonic()

    def leave_if_stopped(self, in_step: bool = True) -> None:
        """Save the state and raise Interrupted if a signal arrived. in_step: as in `save`."""
        number = self.stopped[0] if self.stopped else 0
        if in_step:
            number = self.processes.any(number)
        if number:
            self.save(in_step)
            raise Interrupted(f"Stopped in epoch {self.state.epoch + 1}, after step {self.state.step}; the state is "
                              "saved. The same command with --resume continues.", 128 + number)

    def stage(self, in_stage2: bool) -> Stage:
        """The stage to train; if the backbone is frozen and cached, on its features, which are computed first."""
        if self.cache is None or not self.recipe.stands_still(in_stage2):
            return self.stages[in_stage2]
        if in_stage2 not in self.cached_stages:
            began, of_stage = time.monotonic(), data_of_stage(self.recipe, self.data, 2 if in_stage2 else 1)
            self.cached_stages[in_stage2] = on_features(self.stages[in_stage2], self.cache, of_stage,
                                                        self.state.module, lambda: self.leave_if_stopped(False))
            self.processes.wait()
            self.state.seconds += time.monotonic() - began
        return self.cached_stages[in_stage2]

    @cached_property
    def tested(self) -> LongTailed:
        """The data with its test pictures in memory if they fit beside the others, so they are decoded only once."""
        pictures = sum(len(one) for one in (self.final.train, self.final.meta, self.final.test))
        hold_them = self.options.in_memory and not self.recipe.cache_features
        if not (hold_them and fits_in_memory(self.view, pictures)):
            return self.final
        return dataclasses.replace(self.final, test=hold(self.final.test, self.view, self.options.workers))

    def test(self, kept: list[np.ndarray] | None = None) -> dict:
        """Results of the current network on the test set. kept   collects the logits, (N, C) of each batch"""
        cached = None
        if self.cache is not None and self.recipe.stands_still(self.state.epoch >= self.recipe.stage2_epoch):
            cached = self.cache.of("test", self.final.test, self.state.module, lambda: self.leave_if_stopped(False))
            self.processes.wait()
        groups, _ = assign_groups(self.final.class_counts)
        data = self.tested if cached is None else self.final
        return evaluate(self.state.module, data, self.view, groups, self.device, self.options.workers,
                        self.recipe.implicit_prior(self.final.class_counts), self.leave_if_stopped, cached,
                        self.processes, kept)


def _same_bits_each_time() -> None:
    """Fix what CUDA leaves to chance: the order of atomic additions, cuDNN's and cuBLAS's choice of kernel."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    # Fused attention sums its gradient in any order, and with warn_only torch only warns of that.
    for fused in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{fused}_sdp")(False)
    torch.use_deterministic_algorithms(True, warn_only=True)  # some operations have no such kernel: torch names them
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
