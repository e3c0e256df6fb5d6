"""Two processes train what one trains; one that dies ends the others; parts of a batch and low precision."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.multiprocessing as mp  # noqa: E402
from torch import nn  # noqa: E402

from tests.test_datasets import write_class_folders  # noqa: E402
from tests.test_meta import Tokens, WithHead, small_conv, vit_block  # noqa: E402
from training.errors import DataError  # noqa: E402
from training.method.closed_form import frozen_head_step  # noqa: E402
from training.method.covariance import LearnedCovariance, RunningCovariance  # noqa: E402
from training.method.heldout import HeldOut, heldout_step  # noqa: E402
from training.method.losses import HeadLoss, class_balanced_weights  # noqa: E402
from training.method.metasaug import isda_step, metasaug_step, plain_step  # noqa: E402
from training.network.derivatives import BatchFeatures, Compute, GradientScale  # noqa: E402
from training.network.distributed import Processes, joined  # noqa: E402

CLASSES, STEPS = 7, 20


def frozen(num_classes):
    net = WithHead(nn.Sequential(Tokens(), nn.LayerNorm(12)), 12, num_classes, (1,))
    net.body.requires_grad_(False)
    return net


# What trains -> (network, covariance, how metasaug looks ahead or which other step).
CASES = {
    "plain": (vit_block, "full", "plain"),
    "isda": (vit_block, "full", "isda"),
    "metasaug, classifier": (vit_block, "full", "classifier"),
    "metasaug, network": (vit_block, "full", "network"),
    "metasaug, network, diagonal": (vit_block, "diagonal", "network"),
    "heldout": (vit_block, "full", "heldout"),
    "metasaug, frozen backbone": (frozen, "diagonal", "classifier"),
    "metasaug, frozen backbone, closed form": (frozen, "diagonal", "closed form"),
}


def trained(case: str, compute: Compute, dtype=torch.float64, steps=STEPS, device="cpu") -> dict[str, torch.Tensor]:
    """Everything that `steps` steps leave behind, on the CPU. 21 pictures a step: no two parts are alike."""
    make, kind, how = CASES[case]
    torch.manual_seed(0)
    net = make(CLASSES).to(device, dtype).train()
    counts = [1000 // (c + 1) for c in range(CLASSES)]
    head_loss, weights = HeadLoss("ldam", counts), class_balanced_weights(counts)
    running = RunningCovariance(CLASSES, net.get_classifier().in_features, kind, dtype, device)
    learned = HeldOut(running, [3] * CLASSES) if how == "heldout" else LearnedCovariance(running)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1, 0.9, nesterov=True)
    rng, losses = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        x, y = torch.randn(21, 3, 8, 8, dtype=dtype, generator=rng), torch.randint(0, CLASSES, (21,), generator=rng)
        meta_x, meta_y = torch.randn(15, 3, 8, 8, dtype=dtype, generator=rng), torch.arange(15) % CLASSES
        x, y, meta_x, meta_y = (tensor.to(device) for tensor in (x, y, meta_x, meta_y))
        own, own_meta = x[compute.processes.part(21)], meta_x[compute.processes.part(15)]
        settings = {"strength": 0.5, "inner_rate": 0.1, "class_weights": weights}
        if how == "plain":
            result = plain_step(net, own, y, head_loss, weights, compute)
        elif how == "isda":
            result = isda_step(net, own, y, learned.running, head_loss, 0.5, weights, compute)
        elif how == "heldout":
            result = heldout_step(net, own, y, own_meta, meta_y, learned, head_loss, 0.5, weights, compute)
        elif how == "closed form":
            features, meta_features = (BatchFeatures(net, part, total, compute, graph=False).whole_NA
                                       for part, total in ((own, 21), (own_meta, 15)))
            result = frozen_head_step(net.get_classifier(), features, y, meta_features, meta_y, learned, head_loss,
                                      **settings)
        else:
            result = metasaug_step(net, own, y, own_meta, meta_y, learned, head_loss, lookahead=how, compute=compute,
                                   **settings)
        optimizer.step()
        losses.append(result.loss)
    left = {**net.state_dict(), "losses": torch.stack(losses), **learned.running.state_dict(), **learned.state_dict()}
    return {name: tensor.cpu() for name, tensor in left.items()}


def train_in_two(rank: int, port: int, folder: str, device: str = "cpu") -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    with joined(device) as processes:
        ours = {case: trained(case, Compute(processes), device=processes.device) for case in CASES}
        ours["dropout"] = {"masks": dropout_masks(processes)}
        torch.save(ours, f"{folder}/{rank}.pt")


def dropout_masks(processes: Processes) -> torch.Tensor:
    """What four equal pictures become under dropout, as the loop seeds it."""
    from training.recipes import Cifar10LT
    from training.run.state import State
    from training.run.steps import seed_of_step

    state = State.__new__(State)
    state.epoch, state.step = 0, 0
    torch.manual_seed(seed_of_step(Cifar10LT(), state, processes.rank))
    own = torch.ones(4, 50, device=processes.device)[processes.part(4)]
    return processes.gather(nn.functional.dropout(own, 0.5), 4).cpu()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def in_two(request, tmp_path_factory) -> list[dict]:
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip(f"NCCL needs a GPU for each of two processes; there are {torch.cuda.device_count()}")
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(train_in_two, (free_port(), str(folder), request.param), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.promise("processes")
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_trains(in_two, case):
    # Given 20 steps in one process, when two share every batch,
    alone = trained(case, Compute())
    # then both hold what the one holds, to 1e-10 in float64; counts exactly.
    for ours in (in_two[0][case], in_two[1][case]):
        assert ours.keys() == alone.keys()
        assert torch.equal(ours["counts"], alone["counts"])
        for name, value in alone.items():
            if value.is_floating_point():
                assert (ours[name] - value).norm() <= 1e-10 * value.norm(), name
    # And it was training: the loss fell, S was estimated, and what S is learned from left its mark.
    assert alone["losses"][0] != alone["losses"][-1]
    assert (alone["counts"].sum() == 21 * STEPS) == (case != "plain")
    assert (alone["moment" if case == "heldout" else "delta"].norm() > 0) == case.startswith(("metasaug", "heldout"))


def test_processes_draw_dropout_of_their_own(in_two):
    # Given equal pictures in both processes, when dropout is drawn, then no picture shares its mask with another.
    masks = in_two[0]["dropout"]["masks"]
    assert torch.equal(masks, in_two[1]["dropout"]["masks"])
    assert len(masks.unique(dim=0)) == 4


# ---- parts of a batch, precision ----


@pytest.mark.parametrize("case", CASES)
def test_a_batch_in_parts_is_the_batch(case):
    # Given any step without batch norm, when its pictures follow each other in 4 parts, the bits aside it is the same.
    whole, parts = trained(case, Compute()), trained(case, Compute(accumulate=4))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-9, atol=1e-12)


def test_parts_need_less_memory_and_see_batch_norm_once():
    # Given batch norm, when a step is taken in two parts,
    torch.manual_seed(0)
    net = small_conv(CLASSES).double().train()
    x, y = torch.randn(8, 3, 8, 8, dtype=torch.float64), torch.arange(8) % CLASSES
    plain_step(net, x, y, HeadLoss("ce"), compute=Compute(accumulate=2))
    # then its running statistics have seen each part once, whatever is computed again.
    norm = next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    assert norm.num_batches_tracked == 2


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} finds no cuda here")
    return request.param


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ["plain", "metasaug, classifier", "metasaug, network"])
def test_low_precision_learns_about_the_same(case, precision, device):
    # Given a few steps in float32 and in a low precision, then the losses agree to its rounding, and masters stay
    # float32.
    exact = trained(case, Compute(), torch.float32, 8, device)
    low = trained(case, Compute(precision=precision), torch.float32, 8, device)
    assert low["fc.weight"].dtype == torch.float32
    torch.testing.assert_close(low["losses"], exact["losses"], rtol=0.02, atol=0)
    assert not torch.equal(low["losses"], exact["losses"])


def test_gradients_that_overflow_in_float16_are_taken_again_at_a_smaller_scale():
    # Given gradients that float16 holds only up to a scale of 2**10, when they are taken at the scale of 2**16,
    scale = GradientScale()

    def backward(factor):
        return [torch.tensor([60.0 * factor]).half().float()]

    # then they come out right, the next ones at the scale that was found, and it grows again after many good ones.
    assert scale(backward)[0].item() == 60
    assert scale.scale == 2**10
    for _ in range(GradientScale.GROW_AFTER):
        scale(lambda factor: [torch.tensor([1e-6 * factor])])
    assert scale.scale == 2**11


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_training_is_training(device, backend, monkeypatch):
    # Given the training pass compiled (without inductor's code generation in the short form),
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    # when a few steps are taken, then the losses are those of the plain one.
    exact = trained("metasaug, classifier", Compute(), torch.float32, 3, device)
    compiled = trained("metasaug, classifier", Compute(compiled=True), torch.float32, 3, device)
    torch.testing.assert_close(compiled["losses"], exact["losses"], rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_dropout_draws_the_same_compiled_or_not():
    """Else what is compiled in the step's first pass draws otherwise than its tangent and its second pass."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 64), nn.Dropout(0.5))
    module.forward_features, module.forward_head = module.forward, lambda features, pre_logits: features
    features = []
    for compute in (Compute(), Compute(compiled=True)):
        torch.manual_seed(7)
        features.append(compute.body(module)(torch.ones(5, 3, 2, 2)))
    torch.testing.assert_close(*features)


# ---- torchrun ----


def torchrun(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "metasaug",
            *arguments]


def folder_training(tmp_path, *more: str) -> list[str]:
    if not (tmp_path / "pictures").exists():
        write_class_folders(tmp_path / "pictures", {"a": 60, "b": 30, "c": 20}, seed=0)
    return ["train", "folder", "--data", str(tmp_path / "pictures"), "--epochs", "3", "--batch-size", "10",
            "--input-size", "16", "--architecture", "resnet8", "--device", "cpu", *more]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.mark.long
def test_torchrun_trains_one_model_is_stopped_and_goes_on(tmp_path):
    # Given the training command, started twice by torchrun, when it gets SIGTERM in the middle,
    out = tmp_path / "run"
    command = torchrun(*folder_training(tmp_path, "--out", str(out), "--resume", "--epochs", "5"))
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT) as process:
        deadline = time.monotonic() + 120
        while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.terminate()
        process.communicate(timeout=60)
    # then both agreed on the step, and its state is saved.
    from training.run import checkpoints

    _, saved = checkpoints.load_newest(out / "checkpoints")
    assert saved["epoch"] + saved["step"] > 0 and not (out / "model").exists()
    # Given the same command again, then one of them speaks, each epoch is logged once, every test picture counts once,
    # and the model says how.
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("training pictures in 3 classes") == 1
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [1, 2, 3, 4, 5]
    config = json.loads((out / "model" / "config.json").read_text())["metasaug"]
    assert config["hardware"].startswith("2 x ")
    listed = [row["test_images"] for row in config["results"]["per_class"]]
    assert sum(listed) == config["results"]["images"] == int(re.search(r"(\d+) test", done.stdout)[1])
    assert (out / "model" / "onnx" / "model.onnx").exists()


@pytest.mark.promise("processes")
def test_a_dead_process_ends_the_other_and_the_run_goes_on(tmp_path):
    # Given two processes that train for long, without anybody who watches over them (as on two machines),
    out = tmp_path / "run"
    port = free_port()
    command = [sys.executable, "-m", "metasaug",
               *folder_training(tmp_path, "--out", str(out), "--epochs", "2000", "--evaluate-every", "2000")]
    ranks = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                              env=ENVIRONMENT | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                                                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
             for rank in range(2)]
    try:
        deadline = time.monotonic() + 120
        while not list(out.glob("checkpoints/*.pt")) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert list(out.glob("checkpoints/*.pt"))
        # when the second is killed, then the first ends within a minute, and says what to do.
        ranks[1].kill()
        began = time.monotonic()
        _, errors = ranks[0].communicate(timeout=60)
        assert time.monotonic() - began < 60
        assert ranks[0].returncode == 2
        assert "Another process of this training is gone" in errors and "--resume" in errors
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()
    # And the checkpoint is whole.
    from training.run import checkpoints

    assert checkpoints.load_newest(out / "checkpoints") is not None


def test_too_small_a_batch_is_refused():
    from training.data.batches import Batches, View
    from training.data.datasets import Split

    pictures = Split(np.zeros((3, 8, 8, 3), np.uint8), np.arange(3))
    with pytest.raises(DataError, match="3 pictures a step are too few for 2 processes"):
        Batches(pictures, View((8, 8), (0.5,) * 3, (0.2,) * 3), 0, 8, torch.device("cpu"), 0, Processes(0, 2))
