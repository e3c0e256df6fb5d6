"""Nothing loaded, compared or merged forgets the device: runs on a device that refuses to mix with the CPU."""

import dataclasses

import pytest

torch = pytest.importorskip("torch")

from tests.fake_device import FakeDevice, marked  # noqa: E402
from tests.test_recipes import FROZEN, small_data  # noqa: E402
from training.run import loop  # noqa: E402
from zoo.architectures import create  # noqa: E402


def test_the_fake_device_is_one():
    # Given tensors on it and beside it, then they do not mix, whatever they come from; copies and numbers may.
    with FakeDevice() as device:
        here, there = torch.ones(2), torch.ones(2).to(device)
        assert there.device == device and here.device.type == "cpu"
        assert marked(there * 2) and marked(torch.zeros(2, device=device)) and not marked((there * 2).cpu())
        for mixed in (lambda: here + there, lambda: torch.equal(here, there), lambda: torch.stack([there, here])):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        layer = torch.nn.Linear(2, 2).to(device)
        assert marked(layer.weight) and marked(layer(there))
        with pytest.raises(RuntimeError, match="same device"):
            layer(here)
        there.copy_(here)
        layer.load_state_dict({name: tensor.cpu() for name, tensor in layer.state_dict().items()})
        assert marked(layer.weight) and marked(there + torch.tensor(1.0))


SHORT = dataclasses.replace(FROZEN, epochs=2, stage2_epochs=1)
RUNS = {
    "frozen, closed form": SHORT,
    "cached features": dataclasses.replace(SHORT, cache_features=1),
    "plain": dataclasses.replace(SHORT, augment="none"),
    "isda": dataclasses.replace(SHORT, augment="isda", stage2_trains="network"),
    "heldout": dataclasses.replace(SHORT, augment="heldout", stage2_trains="network"),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_run_its_stage_1_and_its_end_stay_on_the_device(tmp_path, run):
    # Given a run on a device, when another goes on from its stage 1, and it is resumed at its end, then nothing mixes.
    recipe = RUNS[run]
    with FakeDevice() as device:
        loop.run(recipe, small_data(), tmp_path / "whole", device)
        loop.run(recipe, small_data(), tmp_path / "other", device, stage1=tmp_path / "whole")
        state, _ = loop.run(recipe, small_data(), tmp_path / "whole", device, resume=True)
        assert marked(state.module.fc.weight) and marked(state.covariance.mean)


def test_a_stage_1_on_a_ready_backbone_is_compared_on_the_device(tmp_path):
    # Given a run of a last layer on a ready backbone, when another takes its stage 1, then their backbones compare,
    torch.save(create("resnet8", 5).state_dict(), tmp_path / "ready.pth")
    recipe = dataclasses.replace(SHORT, backbone=str(tmp_path / "ready.pth"), last_layer="fresh")
    with FakeDevice() as device:
        loop.run(recipe, small_data(), tmp_path / "whole", device)
        state, _ = loop.run(recipe, small_data(), tmp_path / "other", device, stage1=tmp_path / "whole")
        assert marked(state.module.fc.weight)
