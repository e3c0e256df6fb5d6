"""What a CUDA graph of a step needs, as far as a CPU can show it: fixed shapes, no look at the device, gated steps."""

import copy
import dataclasses
import itertools

import pytest

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode  # noqa: E402

from tests.test_training import CPU, TINY, small_data  # noqa: E402
from training.errors import DivergenceError  # noqa: E402
from training.method.closed_form import frozen_head_step  # noqa: E402
from training.method.covariance import LearnedCovariance, Rows, RunningCovariance  # noqa: E402
from training.method.finite import Finite  # noqa: E402
from training.method.heldout import HeldOut, heldout_step  # noqa: E402
from training.method.losses import HeadLoss  # noqa: E402
from training.method.metasaug import isda_step, metasaug_step, plain_step  # noqa: E402
from training.network.derivatives import Compute  # noqa: E402
from training.run import loop  # noqa: E402
from training.run.stages import meta_batches  # noqa: E402
from zoo.architectures import create  # noqa: E402

CLASSES = 10
LOSSES = {name: HeadLoss(name, tuple(range(1, CLASSES + 1))) for name in ("ce", "focal", "ldam", "logit-adjustment")}
for _loss, _dtype in itertools.product(LOSSES.values(), (torch.float32, torch.float64)):  # its constants, once
    _loss.shifted(torch.zeros(1, CLASSES, dtype=_dtype), torch.zeros(1, dtype=torch.int64))


def steps(kind: str, batch: int):
    """Every method's step, by name, on data without values."""
    module = create("resnet10-small", CLASSES).train()
    width = module.get_classifier().in_features
    x, y = torch.randn(batch, 3, 8, 8), torch.zeros(batch, dtype=torch.int64)
    running = RunningCovariance(CLASSES, width, kind)
    learned, rate = LearnedCovariance(running), torch.tensor(0.5, dtype=torch.float64)
    how = {"strength": rate, "class_weights": torch.ones(CLASSES, dtype=torch.float64),
           "compute": Compute(finite=Finite(CPU), draws=False)}
    plain = {"class_weights": how["class_weights"], "compute": how["compute"]}
    ahead = {**how, "inner_rate": rate}
    for name, loss in LOSSES.items():
        yield f"plain {name}", lambda loss=loss: plain_step(module, x, y, loss, **plain)
    yield "isda", lambda: isda_step(module, x, y, running, LOSSES["ldam"], **how)
    yield "heldout", lambda: heldout_step(module, x, y, x, y, HeldOut(running, [3] * CLASSES), LOSSES["ce"], **how)
    for lookahead, fidelity in itertools.product(("classifier", "network"), ("reference", "fixed")):
        yield f"metasaug {lookahead} {fidelity}", lambda lookahead=lookahead, fidelity=fidelity: metasaug_step(
            module, x, y, x, y, learned, LOSSES["ce"], lookahead=lookahead, fidelity=fidelity, **ahead)
    if kind == "diagonal":
        f = torch.randn(batch, width)
        yield "closed form", lambda: frozen_head_step(module.get_classifier(), f, y, f, y, learned, LOSSES["ldam"],
                                                      **ahead)


@pytest.mark.parametrize("batch", [6, 12])  # fewer pictures than classes, and more
@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_no_step_has_a_shape_from_its_data_or_looks_at_the_device(kind, batch):
    # Given tensors that have shapes but no values, when each method takes a step, then none asks for a value,
    # but for the projection of full covariances, which decides by looking.
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, step in steps(kind, batch):
            if kind == "full" and "fixed" in name:
                with pytest.raises(DataDependentOutputException):
                    step()
            else:
                step()


@pytest.mark.parametrize("num_classes", [4, 50])  # a row a class, and a row a sample
def test_rows_sum_and_scatter_by_class(num_classes):
    # Given labels of which some are equal, when values are summed by rows and put into the classes,
    labels, g = torch.tensor([3, 0, 3, 2, 3, 0]), torch.Generator().manual_seed(0)
    f = torch.randn(6, 5, generator=g, dtype=torch.float64)
    rows = Rows.of(labels, num_classes)
    sums = torch.full((num_classes, 5), 7.0, dtype=torch.float64)
    scatter = torch.zeros(num_classes, 5, 5, dtype=torch.float64)
    rows.put(sums, rows.sum(f))
    rows.put(scatter, rows.scatter(f, "full", torch.ones(6, dtype=torch.float64)))
    # then each class has what a loop over its samples gives, and with a row a sample the others are left alone.
    for c in (0, 2, 3):
        own = f[labels == c]
        torch.testing.assert_close(sums[c], own.sum(0))
        torch.testing.assert_close(scatter[c], own.T @ own)
    assert (sums[1] == (0 if num_classes == 4 else 7)).all()


def a_run(tmp_path, method: dict) -> loop.Run:
    """A run in stage 2 whose checks are noted on the device, as on CUDA."""
    recipe = dataclasses.replace(TINY, epochs=2, stage2_epochs=2, **method)
    run = loop.Run(recipe, small_data(), tmp_path, CPU, loop.Options(), loop.ALONE, None)
    run.compute.finite = Finite(CPU)
    run.state.optimizer = torch.optim.SGD(run.state.module.parameters(), 0.05, 0.9, nesterov=True, fused=True)
    run.prepare()
    run.stepper.begin_epoch(run.stage(True))
    return run


METHODS = {"plain": {"augment": "none"}, "isda": {"augment": "isda"}, "heldout": {"augment": "heldout"},
           "classifier": {"lookahead": "classifier"}, "network": {"lookahead": "network", "fidelity": "reference"}}


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_is_not_finite_changes_nothing_and_is_heard_of_later(tmp_path, method):
    # Given a run that has gone well for two steps,
    run = a_run(tmp_path, METHODS[method])
    stage = run.stage(True)
    meta = meta_batches(run.recipe, stage, run.state, 4) if run.recipe.looks_at_meta else itertools.repeat(None)
    batches = list(zip(stage.batches.epoch(0, 0), meta, strict=False))
    for (pictures, labels), meta_batch in batches[:2]:
        run.stepper.step(pictures, labels, meta_batch)
    run.compute.finite.raise_if_failed()
    before = copy.deepcopy(run.state.to_dict(run.recipe, run.data))
    # when a picture of the third is NaN, and a fourth step follows before the host asks,
    (pictures, labels), meta_batch = batches[2]
    pictures[0, 0, 0, 0] = torch.nan
    for _ in range(2):
        run.stepper.step(pictures, labels, meta_batch)
    # then weights, momenta, covariances and batch norm's statistics are those after the second, and the error names
    # the third.
    after = run.state.to_dict(run.recipe, run.data)
    for name in ("module", "covariance", "learned"):
        for key, tensor in before[name].items():
            assert torch.equal(tensor, after[name][key]), (name, key)
    for key, kept in before["optimizer"]["state"].items():
        assert torch.equal(kept["momentum_buffer"], after["optimizer"]["state"][key]["momentum_buffer"])
    with pytest.raises(DivergenceError, match="epoch 1, step 3"), run.explained(0):
        run.compute.finite.raise_if_failed()


def test_checks_noted_on_the_device_change_no_bit_of_a_good_run(tmp_path):
    """`where` and factors of one are exact."""
    # Given two steps with checks that raise, and the same with checks that are noted,
    ends = []
    for finite in (Finite(), Finite(CPU)):
        run = a_run(tmp_path, METHODS["network"])
        run.compute.finite = finite
        stage = run.stage(True)
        meta = meta_batches(run.recipe, stage, run.state, 2)
        for (pictures, labels), meta_batch in zip(stage.batches.epoch(0, 0), meta, strict=False):
            run.stepper.step(pictures, labels, meta_batch)
        ends.append(run.state.to_dict(run.recipe, run.data))
    # then both end on the same bits.
    for name in ("module", "covariance"):
        assert all(torch.equal(tensor, ends[1][name][key]) for key, tensor in ends[0][name].items())
