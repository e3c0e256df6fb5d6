"""One training step of a recipe, optimizer included: run eagerly or, on a GPU, as a CUDA graph."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from training.method.heldout import HeldOut, heldout_step
from training.method.metasaug import StepResult, isda_step, metasaug_step, plain_step
from training.network.derivatives import Compute, random_state
from training.recipes import Recipe
from training.run.stages import Stage
from training.run.state import State

# Eager steps before a graph is captured, so that its memory and kernels are settled.
WARM_UP = 3
# Picture size for `early_parts` if the recipe has none.
EXAMPLE_SIZE = 128


class Stepper:
    """Steps of a run. Call `begin_epoch` first, then `step` for each batch.

    On CUDA, after WARM_UP eager steps, a step with its optimizer is captured as a CUDA graph and then replayed: one
    graph for each stage and batch size.

    graphs   False: never capture          say   called with the reason why a stage is not captured
    """

    def __init__(self, recipe: Recipe, state: State, compute: Compute, device: torch.device, graphs: bool = True,
                 say: Callable[[str], object] = tqdm.write):
        self.recipe, self.state, self.compute, self.device, self.say = recipe, state, compute, device, say
        self.rates = Rates(device)
        self.stage: Stage | None = None
        self.graphs: dict[Hashable, CapturedStep] = {}
        self.warm: Counter[Hashable] = Counter()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.with_graphs, self.said = graphs and self.stream is not None, set[str]()

    def begin_epoch(self, stage: Stage) -> None:
        """stage   what this epoch trains on"""
        if stage is not self.stage:
            self.compute.draws = True  # until a step shows otherwise
        self.stage, self.in_stage2 = stage, self.state.epoch >= self.recipe.stage2_epoch
        self.set_rates(self.state.epoch)
        self.compute.finite.begin(self.state.step)

    def set_rates(self, epoch: float) -> None:
        """epoch   fractional if the schedule changes with every step"""
        self.rates.set(self.recipe, epoch)
        for group in self.state.optimizer.param_groups:
            group["lr"] = self.rates.lr

    def step(self, pictures: Tensor, labels: Tensor, meta_batch: tuple[Tensor, Tensor] | None) -> None:
        """Train on a batch. Raises DivergenceError before anything is updated; on CUDA, `compute.finite` knows."""
        if self.recipe.schedule == "one-cycle":
            assert self.stage is not None
            self.set_rates(self.state.epoch + self.state.step / self.stage.batches.steps)
        if self.compute.draws:
            torch.manual_seed(seed_of_step(self.recipe, self.state, self.compute.processes.rank))
        batch = (pictures, labels, *(meta_batch or ()))
        if self.stream is None:
            self._step(batch)
        else:
            self._step_on_cuda(batch)
        self.state.sums.pictures += len(labels)

    def _step_on_cuda(self, batch: tuple[Tensor, ...]) -> None:
        key = (self.in_stage2, *(tensor.shape for tensor in batch))
        if key in self.graphs:
            return self.graphs[key].replay(batch)
        assert self.stream is not None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            before = random_state(self.device)
            self._step(batch)
            drawn = not torch.equal(before[-1], random_state(self.device)[-1])
        torch.cuda.current_stream().wait_stream(self.stream)
        self.warm[key] += 1
        self.compute.draws = drawn
        if self.with_graphs and self.warm[key] >= WARM_UP and not self.why_eager():
            try:
                self.graphs[key] = CapturedStep(self._step, batch, self.stream)
            except RuntimeError as error:
                self.with_graphs = False
                self.say_eager(f"the capture failed ({str(error).splitlines()[0]})")

    def why_eager(self) -> str:
        """Why this stage's steps cannot be captured, also printed once; "" if they can."""
        recipe, compute = self.recipe, self.compute
        projected = (self.in_stage2 and recipe.augment == "metasaug" and recipe.fidelity == "fixed"
                     and recipe.covariance == "full")
        reasons = {
            "several processes share each step": compute.processes.count > 1,
            "float16's gradient scale depends on the gradients": compute.precision == "float16",
            "--compile makes its own kernels": compute.compiled,
            "full covariances are projected (they are not with --fidelity reference or --covariance diagonal)":
                projected,
            "dropout must draw the same numbers twice":
                compute.draws and (compute.accumulate > 1 or (self.in_stage2 and recipe.lookahead == "network")),
        }
        because = next((reason for reason, holds in reasons.items() if holds), "")
        if because:
            self.say_eager(because)
        return because

    def say_eager(self, because: str) -> None:
        if because not in self.said:
            self.said.add(because)
            self.say(f"Stage {1 + self.in_stage2} runs without CUDA graphs, several times slower: {because}.")

    def _step(self, batch: tuple[Tensor, ...]) -> None:
        """The part of a step that runs on the device."""
        pictures, labels, *meta_batch = batch
        finite, optimizer = self.compute.finite, self.state.optimizer
        with finite.keeping(self.state.module.buffers()):
            result = self.gradient(pictures, labels, meta_batch)
        figures = figures_of(result, labels)
        if finite.on_device:
            # With found_inf the fused optimizer changes neither weights nor momenta.
            optimizer.found_inf = (~finite.ok).float()  # type: ignore[attr-defined]
        optimizer.step()
        self.state.sums.add(figures, len(labels), finite)
        finite.end_step()

    def gradient(self, pictures: Tensor, labels: Tensor, meta_batch: Sequence[Tensor]) -> StepResult:
        """One step without the optimizer's update: leaves the gradients in `.grad`."""
        recipe, state, stage, rates, compute = self.recipe, self.state, self.stage, self.rates, self.compute
        assert stage is not None
        module = stage.head or state.module
        if self.in_stage2 and recipe.augment == "isda":
            return isda_step(module, pictures, labels, state.covariance, stage.loss, rates.strength, stage.weights,
                             compute)
        if not meta_batch:
            return plain_step(module, pictures, labels, stage.loss, stage.weights, compute)
        meta_pictures, meta_labels = meta_batch
        if isinstance(state.learned, HeldOut):
            return heldout_step(module, pictures, labels, meta_pictures, meta_labels, state.learned, stage.loss,
                                rates.strength, stage.weights, compute)
        return metasaug_step(module, pictures, labels, meta_pictures, meta_labels, state.learned, stage.loss,
                             strength=rates.strength, inner_rate=rates.inner, meta_rate=recipe.meta_rate,
                             lookahead=recipe.lookahead, fidelity=recipe.fidelity, class_weights=stage.weights,
                             compute=compute)

    def failed_step(self) -> int:
        """The step, from 1, whose numbers were not finite."""
        return self.compute.finite.failed_step() or self.state.step + 1


class CapturedStep:
    """A step as a CUDA graph.

    step     works in place, on tensors that stay where they are, and has run before on this stream
    batch    the tensors that it takes: an example of each shape
    """

    def __init__(self, step: Callable[[tuple[Tensor, ...]], None], batch: tuple[Tensor, ...],
                 stream: torch.cuda.Stream):
        self.inputs = tuple(tensor.clone() for tensor in batch)
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, stream=stream):
            step(self.inputs)

    def replay(self, batch: tuple[Tensor, ...]) -> None:
        for mine, given in zip(self.inputs, batch, strict=True):
            mine.copy_(given, non_blocking=True)
        self.graph.replay()


class Rates:
    """Rates that change with the epoch: numbers on the CPU; on CUDA scalar tensors, which graphs can read."""

    lr: Any
    strength: Any
    inner: Any

    def __init__(self, device: torch.device):
        self.on_device = device.type == "cuda"
        if self.on_device:
            self.lr = torch.zeros((), device=device)  # the fused optimizer takes float32
            self.strength, self.inner = torch.zeros(2, dtype=torch.float64, device=device)

    def set(self, recipe: Recipe, epoch: float) -> None:
        """inner: alpha is the current learning rate; in the authors' code it lags the schedule by one epoch."""
        inner = recipe.lr_at(max(epoch - 1, 0) if recipe.fidelity == "reference" else epoch)
        for name, value in (("lr", recipe.lr_at(epoch)), ("strength", recipe.strength_at(epoch)), ("inner", inner)):
            if self.on_device:
                getattr(self, name).fill_(value)
            else:
                setattr(self, name, value)


def seed_of_step(recipe: Recipe, state: State, rank: int) -> int:
    """The seed for what torch draws in a step (dropout, stochastic depth)."""
    of_rank = [rank] if rank else []
    sequence = np.random.SeedSequence([recipe.seed, state.epoch, state.step, *of_rank])
    return int(sequence.generate_state(1, np.uint64)[0])


def set_trained(module: nn.Module, recipe: Recipe, in_stage2: bool) -> None:
    """Set train mode, and eval mode for frozen parts: the early ones, or all except the last layer."""
    module.train()
    if recipe.freeze == "early":
        for part in early_parts(module, recipe.train_size or recipe.input_size or EXAMPLE_SIZE):
            part.eval().requires_grad_(False)
    if recipe.stands_still(in_stage2):
        module.eval().requires_grad_(False)
        module.get_classifier().requires_grad_()  # type: ignore[operator, union-attr]
        module.zero_grad()  # the optimizer skips parameters without a gradient


def early_parts(module: nn.Module, size: int) -> list[nn.Module]:
    """The first modules, with maps of at least an eighth of the picture's side; none in most transformers.

    They detect edges and textures, which every start knows. They hold few of the weights, but take half of the time
    of a step.
    """
    side: dict[nn.Module, int] = {}

    def look(part: nn.Module, _: object, output: object) -> None:
        side[part] = output.shape[-1] if isinstance(output, Tensor) and output.ndim == 4 else 0

    hooks = [part.register_forward_hook(look) for part in module.modules()]
    training, parameter = module.training, next(module.parameters())
    with torch.no_grad():
        module.eval()(torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype))
    module.train(training)
    for hook in hooks:
        hook.remove()

    def first_of(part: nn.Module) -> tuple[list[nn.Module], bool]:
        """The early modules in this part, and whether they are the whole part."""
        if all(side.get(inner, size) >= size // 8 for inner in part.modules()):
            return [part], True
        found: list[nn.Module] = []
        for child in part.children():
            early, whole = first_of(child)
            found += early
            if not whole:
                break
        return found, False

    return first_of(module)[0]


def figures_of(result: StepResult, labels: Tensor) -> dict[str, Tensor]:
    """Figures of a step for the log. `shift` is |S' - S| / |S|; `effect` is how that changed the loss."""
    looked_at = len(result.logits_NC)
    wrong = (result.logits_NC.argmax(1) != labels[:looked_at]).sum() * (len(labels) / looked_at)
    figures = {"loss": result.loss, "wrong": wrong}
    if result.meta_loss is not None:
        figures["meta_loss"] = result.meta_loss
    if result.loss_before is not None and result.shift is not None:
        figures |= {"shift": result.shift, "effect": result.loss - result.loss_before}
    return figures


def log_line(recipe: Recipe, state: State) -> dict:
    """The epoch's line in log.jsonl: means over its pictures."""
    sums = state.sums.to_dict()
    seen = sums["pictures"]
    means = {name: value / seen for name, value in sums.items() if name not in ("pictures", "wrong")}
    return {"epoch": state.epoch + 1, "stage": 2 if state.epoch >= recipe.stage2_epoch else 1,
            "lr": recipe.lr_at(state.epoch), **means, "train_error": sums["wrong"] / seen,
            "seconds": round(state.seconds, 1)}
