"""How an iteration's work reaches the device: plainly, or as one captured CUDA graph per variant of the method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from trainables.training.context import Context
from trainables.training.execution import CaptureError, IterationGraph
from trainables.training.method import Variant


class Launcher:
    """Launches what `issue` issues, as the trial's `execution` says.

    Args:
        issue: the device's work of one iteration.
    """

    def __init__(self, ctx: Context, issue: Callable[[Variant], None]) -> None:
        self._ctx, self._issue = ctx, issue
        self._graphs: dict[str, IterationGraph] = {}
        self.prepare()

    def prepare(self) -> None:
        """Capture anew: at the start, and where tensors that a captured graph knows have been replaced."""
        self._graphs.clear()
        if self._ctx.execution.graphed:
            for network in self._ctx.networks.values():
                network.prepare_for_capture(self._ctx.device)

    def __call__(self, variant: Variant) -> None:
        """One iteration, by its captured graph where there is one."""
        ctx = self._ctx
        if ctx.execution.graphed:
            if variant.key not in self._graphs:
                self._graphs[variant.key] = IterationGraph(partial(self._issue, variant), ctx.generators.values())
            try:
                self._graphs[variant.key].run()
                return
            except CaptureError as error:  # the trial is worth more than its speed
                self._graphs.clear()
                ctx.execution = replace(ctx.execution, graphed=False)
                ctx.remarks.append(f"no CUDA graph: {error}")
            # Out here, where the error no longer keeps what the recording had made: memory may be what was short.
            ctx.model.trunk.speed = replace(ctx.model.trunk.speed, fused_norm=False)
            for network in ctx.networks.values():
                network.zero_grad()
            torch.cuda.empty_cache()
        self._issue(variant)
