"""Compare `metasaug train folder` with a plain fine-tune in timm: same start, same split, same minutes.

    python -m benchmarks.fine_tune --data DIR --minutes 15       # DIR/CLASS/picture.jpg; takes 4 times as long

The plain fine-tune is what timm users do: cross entropy, all layers, random resized crops and mirroring at the start's
own input size, AdamW with warm-up and a cosine schedule that ends with the time. It runs at three usual learning rates;
its best one on the test set counts, which favours it. It also trains on the meta pictures. The time of its tests is not
counted; that of ours is. `seconds` is the time of our whole command.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.measuring import machine
from training.data.own_pictures import load_folder
from training.network.start_weights import load_backbone
from training.network.starts import BY_NAME, find_start
from training.report.metrics import Tally
from training.run.run_folder import code_version
from zoo.architectures import create
from zoo.images import decode
from zoo.labels import assign_groups
from zoo.machine import keep_freed_memory
from zoo.model_folder import ModelFolder

RESULTS = Path(__file__).parent / "results" / "fine_tune.jsonl"
RATES = (1e-4, 3e-4, 1e-3)
BATCH, WARM_UP, WEIGHT_DECAY = 32, 0.05, 0.05


class Pictures(Dataset):
    """Like torchvision's ImageFolder, for a split that exists already."""

    def __init__(self, part: Any, transform: Any):
        self.part, self.transform = part, transform

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.transform(decode(self.part.paths[i])), int(self.part.labels[i])


def plain(data: Any, minutes: float, rate: float) -> tuple[dict, int]:
    """Fine-tune with timm. Returns the test results, and the number of steps that fitted into the minutes."""
    torch.manual_seed(0)
    module = create(BY_NAME["small"].network, len(data.label_names))  # timm's own
    load_backbone(module, find_start("small"), False)
    module = module.to(memory_format=torch.channels_last)
    cfg = timm.data.resolve_data_config({}, model=module)
    train = DataLoader(Pictures(data.train, timm.data.create_transform(**cfg, is_training=True, auto_augment=None,
                                                                       color_jitter=0, re_prob=0)),
                       BATCH, shuffle=True, drop_last=len(data.train) > BATCH, num_workers=2, persistent_workers=True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
    began, steps, seconds = time.monotonic(), 0, minutes * 60
    module.train()
    while (done := (time.monotonic() - began) / seconds) < 1:
        for x_NCHW, y_N in train:
            done = (time.monotonic() - began) / seconds
            if done >= 1:
                break
            cosine = (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate * (done / WARM_UP if done < WARM_UP else cosine)
            loss = F.cross_entropy(module(x_NCHW.contiguous(memory_format=torch.channels_last)), y_N)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
    return tested(module, data, timm.data.create_transform(**cfg)), steps


@torch.no_grad()
def tested(module: nn.Module, data: Any, transform: transforms.Compose) -> dict:
    tally = Tally(data.label_names, data.class_counts, assign_groups(data.class_counts)[0])
    for x_NCHW, y_N in DataLoader(Pictures(data.test, transform), 64, num_workers=2):
        tally.add(module.eval()(x_NCHW.contiguous(memory_format=torch.channels_last)).numpy(), y_N.numpy())
    return tally.results()


def ours(folder: Path, minutes: float) -> dict:
    run = Path(tempfile.mkdtemp())
    try:
        subprocess.run([sys.executable, "-m", "training", "folder", "--data", str(folder), "--minutes", str(minutes),
                        "--out", str(run)], check=True)
        return dict(ModelFolder(run / "model").results or {})
    finally:
        shutil.rmtree(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="class folders")
    parser.add_argument("--minutes", type=float, default=15, help="minutes of each run [15]")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file to append rows to")
    options = parser.parse_args()
    keep_freed_memory()  # as our own command does
    data = load_folder(options.data).with_meta_in_training()

    def note(who: str, results: dict, **more: Any) -> None:
        row = {"data": data.source, "train": len(data.train), "test": len(data.test), "classes": len(data.label_names),
               "minutes": options.minutes, "who": who, "macro_error": results["macro_error"], "error": results["error"],
               "accuracy": {group: each["accuracy"] for group, each in results["groups"].items()}, **more,
               "machine": machine(), "code": code_version()}
        print(json.dumps(row), flush=True)
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    began = time.monotonic()
    results = ours(options.data, options.minutes)
    note("metasaug train folder", results, seconds=round(time.monotonic() - began))
    for rate in RATES:
        results, steps = plain(data, options.minutes, rate)
        note(f"plain timm, AdamW {rate:g}", results, steps=steps)


if __name__ == "__main__":
    main()
