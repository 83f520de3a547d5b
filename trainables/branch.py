"""x+ and the labelled batch beside the sampler: two streams of a captured graph, with the values of one after another.

A chain step fills a large GPU unevenly, and neither x+ nor the labelled batch needs what the chains find. What they all
touch are the running statistics of batch norm, in the order x+, chain, x-, labels. The branch works on statistics of
its own and puts its share into the network's where it would have come: an update is affine, r <- (1 - m) r + m s, so
what comes later multiplies what came before by a power of (1 - m). Gradients are summed in another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_NAMES = ("running_mean", "running_var")


class Branch:
    """The branch of one network.

    Args:
        model: the network that both branches pass.
        stream: where the branch runs; None: in order with everything else.
    """

    def __init__(self, model: nn.Module, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        self._keep = [1 - (m.momentum or 0.0) for m in self._norms for _ in _NAMES]
        self._live = [m.get_buffer(name) for m in self._norms for name in _NAMES]
        self._before = [torch.zeros_like(b) for b in self._live]
        self._data = [torch.zeros_like(b) for b in self._live]
        self._labels = [torch.zeros_like(b) for b in self._live]
        # The counts of batches are not ordered, but two streams must not add to one number at the same time.
        self._live_counts = [m.get_buffer("num_batches_tracked") for m in self._norms]
        self._counts = [torch.zeros_like(b) for b in self._live_counts]

    @contextmanager
    def fork(self) -> Iterator[None]:
        """What is issued inside runs beside what is issued between its end and `join`."""
        if self._norms:
            torch._foreach_copy_(self._before, self._live)
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    @contextmanager
    def data(self) -> Iterator[None]:
        """Inside, x+ passes the network once in train mode."""
        if self._norms:
            torch._foreach_copy_(self._data, self._before)
            torch._foreach_zero_(self._counts)
        with self._swapped(self._data):
            yield

    @contextmanager
    def labels(self) -> Iterator[None]:
        """Inside, the labelled batch passes the network once in train mode."""
        if self._norms:
            torch._foreach_zero_(self._labels)
        with self._swapped(self._labels):
            yield

    @contextmanager
    def _swapped(self, statistics: list[Tensor]) -> Iterator[None]:
        for i, m in enumerate(self._norms):
            m._buffers["running_mean"], m._buffers["running_var"] = statistics[2 * i : 2 * i + 2]
            m._buffers["num_batches_tracked"] = self._counts[i]
        try:
            yield
        finally:
            for i, m in enumerate(self._norms):
                m._buffers["running_mean"], m._buffers["running_var"] = self._live[2 * i : 2 * i + 2]
                m._buffers["num_batches_tracked"] = self._live_counts[i]

    def join(self, updates: int) -> None:
        """Wait for the branch; x+'s share of the statistics comes in before the chains'.

        Args:
            updates: train-mode passes of the chains since the fork.
        """
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        if self._norms:
            change = torch._foreach_sub(self._data, self._before)
            torch._foreach_mul_(change, [keep**updates for keep in self._keep])
            torch._foreach_add_(self._live, change)
            torch._foreach_add_(self._live_counts, self._counts)

    def add_labels(self) -> None:
        """The labelled batch's share of the statistics, after x-."""
        if self._norms:
            torch._foreach_mul_(self._live, self._keep)
            torch._foreach_add_(self._live, self._labels)
