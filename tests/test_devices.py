"""What training and predicting promise on a GPU. Each test runs on the CPU too, which proves the test itself.

On a GPU: `make test-gpu` (docs/devices.md); where there is none these tests are skipped, with the reason.
"""

import copy
import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.test_meta import WithHead, a_setting, resnet8, vit_block  # noqa: E402
from tests.test_training import (  # noqa: E402
    CPU,
    METHODS,
    TINY,
    Killed,
    assert_same_bits,
    kill_after,
    log_without_times,
    small_data,
)
from training.data.batches import Batches, View, in_order  # noqa: E402
from training.errors import TrainingError  # noqa: E402
from training.method.closed_form import frozen_head_step  # noqa: E402
from training.method.covariance import LearnedCovariance, RunningCovariance  # noqa: E402
from training.method.heldout import HeldOut, heldout_step  # noqa: E402
from training.method.losses import HeadLoss  # noqa: E402
from training.method.metasaug import TrainBatch, isda_step, metasaug_step, plain_step  # noqa: E402
from training.network.derivatives import features_of  # noqa: E402
from training.run import checkpoints, evaluation, loop, stages  # noqa: E402

GPUS = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
ON_GPUS = [pytest.param(name, marks=pytest.mark.gpu) for name in GPUS]
SMALL = dataclasses.replace(TINY, epochs=3, stage2_epochs=1)


@pytest.fixture(params=["cpu", *ON_GPUS])
def device(request) -> torch.device:
    if request.param != "cpu" and not GPUS[request.param]():
        pytest.skip(f"torch {torch.__version__} finds no {request.param} here")
    return torch.device(request.param)


@pytest.fixture
def smooth(monkeypatch):
    """No kinks: where a rounding error turns a ReLU on or off, the gradient jumps in its third digit."""
    monkeypatch.setattr("torch.nn.functional.relu", torch.nn.functional.silu)


@pytest.fixture
def exact():
    """Convolutions in full float32, as products are: as torch comes, CUDA's convolutions round to TF32's 10 bits."""
    assert torch.get_float32_matmul_precision() == "highest"
    as_it_comes = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = as_it_comes


# ---- the numbers ----

STEPS = {
    "plain": ("diagonal", plain_step, {}),
    "isda, full": ("full", isda_step, {}),
    "metasaug, full, classifier": ("full", metasaug_step, {"lookahead": "classifier"}),
    "metasaug, full, network": ("full", metasaug_step, {"lookahead": "network"}),
    "metasaug, diagonal, network": ("diagonal", metasaug_step, {"lookahead": "network"}),
    "metasaug, diagonal, closed form": ("diagonal", frozen_head_step, {}),
    "heldout, full": ("full", heldout_step, {}),
}


def step(name: str, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """The gradient that a step of ResNet-32 leaves, what it adds to the covariances and what is learned, in float64."""
    kind, step_of, how = STEPS[name]
    net, batch, running, _, weights = a_setting(resnet8, 10, kind, n=32, size=16)
    net, weights = net.to(device, dtype), weights.to(dtype).to(device)
    x, y, x_meta, y_meta = (t.to(dtype).to(device) if t.is_floating_point() else t.to(device) for t in batch)
    here = RunningCovariance(10, 64, kind, dtype, device)
    here.load_state_dict(running.state_dict())
    learned = HeldOut(here, [3] * 10) if step_of is heldout_step else LearnedCovariance(here)
    loss = HeadLoss("ce")
    meta = {"strength": 0.5, "inner_rate": 0.1, "meta_rate": 10.0, "class_weights": weights}
    if step_of is plain_step:
        plain_step(net, x, y, loss, weights)
    elif step_of is isda_step:
        isda_step(net, x, y, here, loss, 0.5, weights)
    elif step_of is heldout_step:
        heldout_step(net, x, y, x_meta, y_meta, learned, loss, 0.5, weights)
    elif step_of is metasaug_step:
        metasaug_step(net, x, y, x_meta, y_meta, learned, loss, **meta, **how)
    else:
        with torch.no_grad():
            features, meta_features = features_of(net, x), features_of(net, x_meta)
        frozen_head_step(net.fc, features, y, meta_features, y_meta, learned, loss, **meta)
    gradient = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    parts = [gradient, here.covariance - running.covariance.to(dtype).to(device), learned.delta]
    return [part.cpu().double() for part in parts if part.any()]


def error(parts: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """The relative error of the worst part."""
    assert len(parts) == len(truth)
    return max(((part - true).norm() / true.norm()).item() for part, true in zip(parts, truth, strict=True))


@pytest.mark.parametrize("method", STEPS)
def test_float32_on_the_device_errs_like_float32_on_the_cpu(device, method, exact, smooth):
    # Given a step of a method in float64 on the CPU, the truth, and in float32 on the CPU and on the device,
    truth, cpu, here = (step(method, *how) for how in
                        ((CPU, torch.float64), (CPU, torch.float32), (device, torch.float32)))
    # then the device's error is that of the CPU but for the order of sums (and nobody's is large).
    assert error(cpu, truth) < 1e-4
    assert error(here, truth) < max(4 * error(cpu, truth), 2e-5)


class ToTF32(torch.autograd.Function):
    """Rounds float32, its gradient and its tangent to TF32's 10 bits of fraction."""

    @staticmethod
    def forward(x):
        return ((x.contiguous().view(torch.int32) + 4096) & ~8191).view(torch.float32)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return ToTF32.forward(grad)

    jvp = backward


@pytest.mark.parametrize("method", STEPS)
def test_as_torch_comes_convolutions_in_tf32_err_in_the_third_digit(device, method, smooth, monkeypatch):
    # Given a step in float64 on the CPU, and in float32 as the device comes (on the CPU: rounded as TF32 is),
    truth = step(method, CPU, torch.float64)
    if device.type == "cpu":
        real = torch.nn.Conv2d._conv_forward
        monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", lambda self, x, weight, bias: ToTF32.apply(
            real(self, ToTF32.apply(x), ToTF32.apply(weight), bias)))
    # then the gradient errs by half a percent, and the covariances by less.
    assert error(step(method, device, torch.float32), truth) < 2e-2


def test_float64_on_the_device_is_float64_on_the_cpu(device, smooth):
    if device.type == "mps":
        pytest.skip("MPS has no float64")
    for method in ("metasaug, full, network", "metasaug, diagonal, closed form"):
        truth, here = step(method, CPU, torch.float64), step(method, device, torch.float64)
        assert error(here, truth) < 1e-10


def test_dropout_draws_the_same_in_the_tangent_on_the_device(device):
    # Given dropout, when the features are made again with a direction of zero, then the tangent is zero and the draw is
    # the same: torch's stream of the device was put back, and afterwards stands where it stood.
    net, (x, y, *_), _, _, _ = a_setting(lambda c: vit_block(c, dropout=0.3), dtype=torch.float32)
    net, x, y = net.to(device), x.to(device), y.to(device)
    assert isinstance(net, WithHead)
    batch = TrainBatch(net, x, y, HeadLoss("ce"), tangents=True)
    drawn = []
    net.body.register_forward_hook(lambda _, __, out: drawn.append(torch.autograd.forward_ad.unpack_dual(out).primal))
    following = copy.deepcopy(torch.get_rng_state())
    tangent = batch.features.tangent({n: torch.zeros_like(p) for n, p in batch.body.items()})
    assert (tangent == 0).all()
    torch.testing.assert_close(drawn[0].mean(1), batch.features_NA)
    assert torch.equal(following, torch.get_rng_state())


# ---- data ----


def test_batches_arrive_whole(device):
    """Copies through pinned memory are awaited by nobody: the memory must not be used again before they are done."""
    data = small_data()
    view = View((16, 16), data.mean, data.std)
    # Given all batches of an epoch, held until the last one is there, when compared with the CPU's, then all are right.
    here, cpu = (list(Batches(data.train, view, 0, 16, where).epoch(0)) for where in (device, CPU))
    for (pictures, labels), (expected, classes) in zip(here, cpu, strict=True):
        assert pictures.device.type == device.type and pictures.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(pictures.cpu(), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(labels.cpu(), classes)
    torch.testing.assert_close(torch.cat([shown for shown, _ in in_order(data.test, view, device)]).cpu(),
                               torch.cat([shown for shown, _ in in_order(data.test, view, CPU)]), rtol=1e-6, atol=1e-6)


# ---- whole runs ----


@pytest.mark.parametrize("method", [
    "metasaug", *(pytest.param(method, marks=pytest.mark.gpu) for method in METHODS if method != "metasaug")])
def test_a_run_on_the_device_learns_and_goes_on_on_the_cpu(tmp_path, device, method):
    # Given a run on the device that is killed in stage 2,
    recipe = dataclasses.replace(TINY, **METHODS[method], epochs=6, stage2_epochs=2, lr=0.01)
    with pytest.raises(Killed):
        loop.run(recipe, small_data(), tmp_path, device, on_progress=kill_after(27))
    # when it ends on the CPU (or is looked at there), then it has learned, and its log is one of a single run.
    state, results = loop.run(recipe, small_data(), tmp_path, CPU, resume=True)
    assert next(state.module.parameters()).device.type == "cpu"
    log = log_without_times(tmp_path)
    assert [line["epoch"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert log[3]["loss"] < log[0]["loss"] and results["error"] < 0.67
    assert state.covariance.counts.sum() == (0 if method == "plain" else 2 * 70)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("device", ON_GPUS, indirect=True)  # on the CPU: tests/test_training.py
def test_a_run_killed_on_the_gpu_resumes_to_the_same_bits(tmp_path, device, method):
    if device.type == "mps":
        pytest.skip("not promised: MPS has no deterministic mode")
    recipe = dataclasses.replace(SMALL, **METHODS[method])
    whole, results = loop.run(recipe, small_data(), tmp_path / "whole", device)
    for after in (7, 6):
        with pytest.raises(Killed):
            loop.run(recipe, small_data(), tmp_path / "killed", device, resume=True, on_progress=kill_after(after))
    resumed, again = loop.run(recipe, small_data(), tmp_path / "killed", device, resume=True)
    assert_same_bits(whole, resumed)
    assert again == results


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_captured_steps_are_the_eager_ones_to_the_bit(tmp_path, device, method, capsys):
    # Given a run whose steps are CUDA graphs, and one whose steps are eager,
    recipe = dataclasses.replace(TINY, **METHODS[method], epochs=4, stage2_epochs=2)
    captured, results = loop.run(recipe, small_data(), tmp_path / "captured", device)
    eager, expected = loop.run(recipe, small_data(), tmp_path / "eager", device, graphs=False)
    # then they end on the same bits, and no capture failed.
    assert "capture failed" not in capsys.readouterr().err
    assert_same_bits(captured, eager)
    assert results == expected


# Flags, and how the loss of the first epoch may differ from float32's.
WAYS = {
    "bfloat16": ({"precision": "bfloat16"}, 0.1), "float16": ({"precision": "float16"}, 0.05),
    "in parts": ({"accumulate": 2}, 0.5),  # batch norm sees halves
    "bfloat16, network": ({"precision": "bfloat16", "lookahead": "network"}, 0.1),
    "compiled": ({"compile": True}, 0.05), "compiled, bfloat16": ({"compile": True, "precision": "bfloat16"}, 0.1),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.long), *ON_GPUS], indirect=True)
def test_other_ways_to_compute_train_too_and_resume_to_the_same_bits(tmp_path, device, way):
    # Given a run in float32, and one in a lower precision, in parts or compiled, that is killed in stage 2,
    flags, tolerance = WAYS[way]
    recipe = dataclasses.replace(SMALL, lr=0.01, lookahead="network")
    loop.run(dataclasses.replace(recipe, epochs=2), small_data(), tmp_path / "float32", CPU)
    other = dataclasses.replace(recipe, **flags)
    whole, _ = loop.run(other, small_data(), tmp_path / "whole", device)
    with pytest.raises(Killed):
        loop.run(other, small_data(), tmp_path / "killed", device, on_progress=kill_after(12))
    # when it goes on, then it ends with the same bits; weights stay float32, and the first loss is about the same.
    resumed, _ = loop.run(other, small_data(), tmp_path / "killed", device, resume=True)
    if device.type != "mps":
        assert_same_bits(whole, resumed)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in resumed.module.parameters())
    here, truth = (log_without_times(tmp_path / name)[0]["loss"] for name in ("whole", "float32"))
    assert here == pytest.approx(truth, rel=tolerance)
    assert here != truth


def test_the_test_set_gives_the_same_result_on_the_device(tmp_path, device, exact):
    # Given a trained network, when the device and the CPU look at the test set, then at most a tie falls otherwise.
    recipe = dataclasses.replace(SMALL, augment="none")
    state, there = loop.run(recipe, small_data(), tmp_path, CPU)
    data = small_data()
    here = evaluation.evaluate(state.module.to(device), data, stages.view_of(recipe, data),
                               ("head", "medium", "tail"), device)
    assert abs(here["error"] - there["error"]) <= 1 / 90 + 1e-9


# ---- memory ----


def test_a_step_that_does_not_fit_is_told_in_a_sentence(tmp_path, device, monkeypatch):
    # Given little memory (on the CPU: a step that says so), when a run asks for more, then it says what and what to do.
    recipe = dataclasses.replace(TINY, batch_size=64, input_size=128, augment="none")
    if device.type == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(2e8 / total)
    elif device.type == "mps":
        pytest.skip("MPS lends memory from the whole machine")
    else:
        def full(*_):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        monkeypatch.setattr(loop.Stepper, "step", full)
    try:
        with pytest.raises(TrainingError, match=r"64 pictures of 128 x 128 does not fit .*--batch-size"):
            loop.run(recipe, small_data(), tmp_path, device)
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert checkpoints.load_newest(tmp_path / "checkpoints") is None


@pytest.mark.parametrize("device", ON_GPUS, indirect=True)
def test_a_step_of_inat18s_last_layer_takes_no_more_than_its_matrices(device):
    """8142 classes of 2048 features, batches of 256: (N, C, A) would be 17 GB."""
    if device.type != "cuda":
        pytest.skip("its peak is not counted here")
    torch.manual_seed(0)
    layer = torch.nn.Linear(2048, 8142, device=device)
    learned = LearnedCovariance(RunningCovariance(8142, 2048, "diagonal", device=device))
    features = [torch.randn(256, 2048, device=device) for _ in range(2)]
    labels = [torch.randint(0, 8142, (256,), device=device) for _ in range(2)]
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    frozen_head_step(layer, features[0], labels[0], features[1], labels[1], learned, HeadLoss("ce"), strength=0.25,
                     inner_rate=3e-4)
    # The gradient is 67 MB, a matrix of logits 8; by the formulas of training/method/closed_form.py under 300 MB.
    assert torch.cuda.max_memory_allocated(device) - before < 0.5e9


# ---- predicting ----


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_a_model_gives_the_same_logits_on_the_device(tiny_model_folder, device, backend, exact):
    import zoo

    if device.type == "mps":
        pytest.skip("the zoo predicts on cpu and cuda")
    if backend == "onnx" and device.type == "cuda":
        onnxruntime = pytest.importorskip("onnxruntime")
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip(f"this ONNX Runtime ({onnxruntime.__version__}) has no CUDA")
    # Given a model, when ONNX Runtime or torch runs it on the device, then it says so, and its logits are torch's on
    # the CPU to the fifth digit, whatever the size of the batch.
    model = zoo.load(tiny_model_folder, backend=backend, device=device.type)
    assert model.device == device.type
    truth = zoo.load(tiny_model_folder, backend="torch", device="cpu")
    rng = np.random.default_rng(0)
    for size in (1, 3, 7):
        pictures = rng.normal(size=(size, 3, 32, 32)).astype(np.float32)
        logits, *_ = model._network(pictures)
        expected, *_ = truth._network(pictures)
        assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()  # a random network: logits of hundreds
        assert (logits.argmax(1) == expected.argmax(1)).all()
