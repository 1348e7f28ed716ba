"""Splits one training run over several processes of this machine, which average their gradients once a step.

On two cores this beats two threads in one process: a small network is thousands of tiny parallel regions a step, and
each of them waits for the slowest core, so that any other load on the machine stalls the whole run. Knows processes
and gradients. Knows nothing about what is trained.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

JOIN_TIMEOUT = timedelta(minutes=2)  # for the slowest step of another worker, its checkpoint included


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Which part of the work this process does: worker `rank` of `workers`."""

    rank: int = 0
    workers: int = 1

    def part_of(self, batch_size: int) -> int:
        """Gives how many samples of a batch fall to this worker; they must divide evenly."""
        if batch_size % self.workers:
            raise ValueError(f"a batch of {batch_size} cannot be split over {self.workers} workers; choose a divisor")
        return batch_size // self.workers

    def average(self, gradients: list[Tensor], stop: bool) -> bool:
        """Averages `gradients` over the workers, in place, and says whether any of them wants to stop."""
        if self.workers == 1:
            return stop
        flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), torch.tensor([float(stop)])])
        dist.all_reduce(flat)
        flat[:-1] /= self.workers
        offset = 0
        for gradient in gradients:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()
        return bool(flat[-1] > 0)


def _join(rendezvous: str, share: Share) -> None:
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=share.rank, world_size=share.workers, timeout=JOIN_TIMEOUT
    )


def _follow(rank: int, workers: int, rendezvous: str, threads: int, work: Callable[[Share], None]) -> None:
    torch.set_num_threads(threads)
    share = Share(rank=rank, workers=workers)
    _join(rendezvous, share)
    work(share)
    dist.destroy_process_group()


@contextmanager
def shared(workers: int, threads: int, work: Callable[[Share], None]) -> Iterator[Share]:
    """Starts `workers - 1` processes that run `work`, and gives the caller its own share, which is the first.

    Args:
        workers: How many processes in all; 1 starts none.
        threads: Threads of torch in each of them.
        work: What the others do; a picklable function.
    """
    torch.set_num_threads(threads)
    if workers == 1:
        yield Share()
        return
    with tempfile.TemporaryDirectory() as directory:
        rendezvous = (Path(directory) / "rendezvous").as_uri()
        context = mp.get_context("spawn")
        others = [
            context.Process(target=_follow, args=(rank, workers, rendezvous, threads, work), daemon=True)
            for rank in range(1, workers)
        ]
        for process in others:
            process.start()
        share = Share(rank=0, workers=workers)
        _join(rendezvous, share)
        try:
            yield share
        finally:
            dist.destroy_process_group()
            for process in others:
                process.join(timeout=30)
                if process.is_alive():
                    process.terminate()
