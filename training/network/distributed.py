"""Several processes that train one model together (torchrun), and what they exchange.

Every process reads its part of each batch and runs the backbone on it. Features are gathered, so every process computes
the last layer, the covariances and the meta step on the whole batch, with the same results. Gradients of the backbone
are summed. With one process nothing is sent, and every method returns its input.

    with joined("cpu") as processes:         # alone, or as torchrun's environment says
        own = pictures[processes.part(len(pictures))]
        features_NA = processes.gather(own_features, len(pictures))
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training.errors import TrainingError

# A dead process closes its connections, which stops the others at once; a hanging one stops them after this time.
HANGING = timedelta(seconds=60)
# Longer, for `wait`: reading pictures into memory takes some machines longer than others.
LOADING = timedelta(hours=1)


@dataclass(frozen=True)
class Processes:
    """The processes of a training. rank: of this one; 0 writes and prints. count: of all."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    patient: Any = None  # the group of `wait`

    @property
    def first(self) -> bool:
        return self.rank == 0

    def part(self, total: int) -> slice:
        """This process's part of a batch of `total`; the parts in order of rank are the batch."""
        return slice(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def gather(self, own_NX: Tensor, total: int) -> Tensor:
        """The parts of all processes, (total, ...), detached: the same in every process."""
        own_NX = own_NX.detach()
        if self.count == 1:
            return own_NX
        largest = -(-total // self.count)
        padded = own_NX.new_zeros(largest, *own_NX.shape[1:])
        padded[: len(own_NX)] = own_NX
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        with _told():
            dist.all_gather(parts, padded)
        sizes = [total * (r + 1) // self.count - total * r // self.count for r in range(self.count)]
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over all processes."""
        if self.count == 1 or not tensors:
            return list(tensors)
        flat = torch.cat([t.reshape(-1) for t in tensors])
        with _told():
            dist.all_reduce(flat)
        return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]

    def level(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over all processes, in place; integer tensors are not changed.

        For batch norm's statistics, and for what each process computes alike: on GPUs it may differ in the last bits.
        """
        floats = [t for t in tensors if t.is_floating_point()]
        if self.count > 1:
            for mine, summed in zip(floats, self.sum(floats), strict=True):
                mine.copy_(summed / self.count)

    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Copy the tensors of rank 0, in place; if all computed alike, nothing changes."""
        for tensor in tensors if self.count > 1 else ():
            sent = tensor.contiguous()
            with _told():
                dist.broadcast(sent, 0)
            tensor.copy_(sent)

    def any(self, mine: int) -> int:
        """The largest number of all processes: whether one was signalled to stop, and by which signal."""
        if self.count == 1:
            return mine
        flag = torch.tensor(mine, device=self.device)
        with _told():
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)

    def from_first(self, value: Any) -> Any:
        """Send the value of rank 0 to every process (anything that can be pickled)."""
        if self.count == 1:
            return value
        self.wait()  # may take long while a process loads data
        box = [value]
        with _told():
            dist.broadcast_object_list(box, 0, device=self.device)
        return box[0]

    def wait(self) -> None:
        """Wait until all processes are here, up to LOADING."""
        if self.count > 1:
            with _told():
                dist.barrier(self.patient)


ALONE = Processes()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise TrainingError("Another process of this training is gone or hangs (the first error that torchrun shows is "
                            "the cause). The same command with --resume continues from the last checkpoint. "
                            f"({str(error).splitlines()[0]})") from error


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes that torchrun started, from its environment; without torchrun a single one on this device.

    device   cpu (gloo) or cuda (NCCL, one GPU per process)
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        yield Processes(device=torch.device(device))
        return
    rank, here = int(os.environ["RANK"]), torch.device(device)
    if device == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise TrainingError(f"--nproc-per-node: process {local + 1} of this machine has no GPU; there are only "
                                f"{torch.cuda.device_count()}.")
        here = torch.device("cuda", local)
        torch.cuda.set_device(here)
    elif device != "cpu":
        raise TrainingError(f"--device {device} supports only one process.")
    with _told():
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=HANGING)
    try:
        yield Processes(rank, count, here, dist.new_group(backend="gloo", timeout=LOADING))
    finally:
        dist.destroy_process_group()
