"""The losses of a task on samples that it never learns from."""

from __future__ import annotations

from itertools import islice

import numpy as np
import torch

from training.core.curve import means
from training.core.task import Data, Task

SAMPLES = 64
BATCH = 16
SEED = 2**31 + 7
REACH = 64  # steps in which to look for the turn of a group


def measure_losses(task: Task, held_out: Data, *, step: int, batch_size: int) -> dict[str, float]:
    """Measures the losses on the first 64 held-out samples, with the networks as they are.

    The samples, their noise and their timesteps are the same every time, so that the losses of two moments, and of two
    runs with batches of one size, compare. Where networks take turns, the terms of each turn are measured on all
    samples. Draws from torch's global generator, which the loop seeds again in every step.

    Args:
        task: Its networks are to be in evaluation mode. They are left with gradients: an adversarial term is weighted
            by the gradients of others, so these are computed.
        held_out: Where the samples are from.
        step: How many steps are done, which may decide what terms there are.
        batch_size: The most samples at once; never more than 16.

    Returns:
        Means over the samples, "loss" first; see `training.core.curve.means`.
    """
    size = min(BATCH, batch_size)
    turns = []
    for group in task.groups():
        coming = (number for number in range(step, step + REACH) if task.turn(number) == group)
        turns += [number for number in (next(coming, None),) if number is not None]
    batches = held_out.batches(batch_size=size, start=0, rank=0, workers=1)
    rows = []
    for number, batch in enumerate(islice(batches, -(-SAMPLES // size))):
        for turn in turns:
            torch.manual_seed(number)
            terms = task.losses(batch.to(task.device), np.random.default_rng((SEED, number)), turn)
            rows.append({name: float(term.detach()) for name, term in terms.items()})
    return means(rows)
