"""The benchmark's baseline trains what the package trains: the same losses and weights where nothing is random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.results.schema import SIGNAL_NAMES
from trainables.timing.released_loop import ReleasedLoop
from trainables.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("method", ["m-ebm", "m-jem"])
def test_the_same_maths(
    quick: Callable[..., TrialConfig], make_data: Callable[..., ImageData], method: str, workers: int
) -> None:
    """One image many times and a buffer of one state: batches and chains are the same whatever is drawn."""
    data = make_data(40, (3, 8, 8))
    data = replace(data, images=data.images[:1].repeat(40, 1, 1, 1), labels=data.labels[:1].repeat(40))
    config = quick(
        method=method,
        network="wrn-10-1",
        norm="batch",
        initial="uniform",
        reinit_probability=0.0,
        noise_std=0.0,
        sampling_steps=2,
        l2_weight=0.1,
        l2_form="released",
        warmup_iterations=2,
        batch_size=8,
        label_batch_size=8,
        buffer_size=20,
        augment="none",
        memory_format="contiguous",
        divergence={"loss_limit": 1e5},
    )
    learner, loop = Trainer(config, data), ReleasedLoop(config, data, CPU, workers)
    state = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    assert learner.buffer is not None
    buffer: Any = learner.buffer
    buffer.images[:] = state
    loop.buffer[:] = state
    for _ in range(4):
        record = torch.zeros(len(SIGNAL_NAMES))
        learner.step(record)
        learner.iteration += 1
        theirs = loop.step()
        row = dict(zip(SIGNAL_NAMES, record.tolist(), strict=True))
        assert theirs == pytest.approx(row["loss"] + (row["cross_entropy"] if method == "m-jem" else 0), abs=2e-5)
        # A slot that was drawn holds where its chain ended; the others are as they were.
        moved = (loop.buffer != state).flatten(1).any(1)
        assert 0 < int(moved.sum()) < 20
        loop.buffer[:] = state
        buffer.images[:] = state
    for mine, other in zip(learner.model.parameters(), loop.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    loop.close()


def test_restarts_are_drawn_one_by_one_from_p0(
    quick: Callable[..., TrialConfig], make_data: Callable[..., ImageData]
) -> None:
    data = make_data(200, (1, 8, 8))
    loop = ReleasedLoop(quick(reinit_probability=1.0, initial="gaussian", batch_size=64), data, CPU, 0)
    drawn = torch.cat([loop._start_states()[0] for _ in range(40)]).flatten(1)
    images = (data.images.float() / 127.5 - 1).flatten(1)
    assert drawn.abs().max() <= 1
    assert (drawn.mean(0) - images.mean(0)).abs().max() < 0.1


def test_only_what_the_released_script_trains(
    quick: Callable[..., TrialConfig], make_data: Callable[..., ImageData]
) -> None:
    with pytest.raises(ValueError, match="m-ebm and m-jem, not jem"):
        ReleasedLoop(quick(method="jem"), make_data(200), CPU, 0)
