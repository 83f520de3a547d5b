"""The iteration of somebody else's method is counted; that those of the package are too is in `test_cost`."""

from __future__ import annotations

import pytest

from trainables.config.method import TRUSTED
from trainables.methods.presets import build_trial
from trainables.timing.dry_run import iteration_flops
from trainables.training.context import Context
from trainables.training.cost import forward_flops
from trainables.training.method import Contrastive

CIFAR = (3, 32, 32)


def test_the_iteration_of_a_strangers_method_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that looks at x- once more costs a forward more; one that reads the device cannot be counted."""

    class More(Contrastive):
        def after(self, ctx: Context) -> None:
            ctx.value(ctx.samples().x)

    class Reads(Contrastive):
        def after(self, ctx: Context) -> None:
            assert ctx.samples().x.sum().item() > -1e9

    monkeypatch.setenv(TRUSTED, "trainables.methods.shortrun")
    found = {}
    for kind in (Contrastive, More, Reads):
        monkeypatch.setattr(f"trainables.methods.shortrun.{kind.__name__}", kind, raising=False)
        config = build_trial(
            {"method": f"trainables.methods.shortrun:{kind.__name__}", "dataset": "cifar10", "network": "wrn-10-1"}
        )
        found[kind] = iteration_flops(config, CIFAR, 10)
    forward = forward_flops(config, CIFAR, 10)
    assert found[More] - found[Contrastive] == forward
    assert found[Reads] == pytest.approx(found[Contrastive], rel=0.03)
