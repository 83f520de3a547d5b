"""What the protocol of methods promises: values made once, stages, inputs, conditions, second passes, old states."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from trainables.config.method import METHODS, TRUSTED
from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.training.context import Context
from trainables.training.method import Batch, Contrastive, Method, Progress, Variant
from trainables.training.network import Sam, Update
from trainables.training.trainer import Trainer

Quick = Callable[..., TrialConfig]


class Sharp(Contrastive):
    """M-EBM by SAM."""

    rho: float = 0.05

    def update(self) -> Update:
        return Sam(self.rho)


class Counted(Contrastive):
    """Counts how often x+ and x- are made, and with what the host told."""

    seen: ClassVar[list[Any]] = []

    def update(self) -> Update:
        return Sam(0.1)

    def inputs(self, at: Progress) -> Mapping[str, float]:
        return {"share": at.iteration / 4}

    def data(self, ctx: Context) -> Batch:
        self.seen.append(("data", float(ctx.input("share"))))
        return super().data(ctx)

    def sample(self, ctx: Context) -> Batch:
        self.seen.append(("samples", float(ctx.input("share"))))
        return super().sample(ctx)


class Staged(Method):
    """Two stages, of which the second scales its energy by a condition."""

    entered: ClassVar[list[str]] = []

    def variant(self, at: Progress) -> Variant:
        return Variant("late" if at.iteration >= 2 else "early")

    def enter(self, ctx: Context, variant: Variant) -> None:
        self.entered.append(variant.key)

    def energy(self, net: Any, x: Tensor, *cond: Tensor) -> Tensor:
        energy: Tensor = net.energy(x)
        return energy * cond[0] if cond else energy

    def sample(self, ctx: Context) -> Batch:
        start = ctx.chains()
        if ctx.variant.key == "early":
            return ctx.langevin(start)
        return ctx.langevin(
            Batch(start.x, cond=(torch.full((len(start.x),), 2.0),), slots=start.slots),
            steps=1,
            potential=lambda x: x.flatten(1).square().sum(1),
            noise_std=torch.zeros(len(start.x), 1, 1, 1),
        )


@pytest.fixture
def build(quick: Quick, digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    monkeypatch.setenv(TRUSTED, "trainables.methods.shortrun")
    for kind in (Sharp, Counted, Staged):
        monkeypatch.setattr(f"trainables.methods.shortrun.{kind.__name__}", kind, raising=False)

    def make(name: str, **fields: Any) -> Trainer:
        short = {"network": "wrn-10-1", "warmup_iterations": 0, "iterations_per_epoch": 4, "l2_weight": 0.0}
        method = name if name in METHODS else f"trainables.methods.shortrun:{name}"
        return Trainer(quick(method=method, **short | fields), digits)

    return make


def test_sam_without_a_radius_is_plain_bit_by_bit(build: Callable[..., Trainer], same: Callable[..., bool]) -> None:
    plain, sharp, moved = build("m-ebm"), build("Sharp", method_args={"rho": 0.0}), build("Sharp")
    signals = [torch.from_numpy(t.train_epoch().signals) for t in (plain, sharp, moved)]
    assert torch.equal(signals[0].nan_to_num(9), signals[1].nan_to_num(9))
    assert same(plain.state_dict()["networks"], sharp.state_dict()["networks"])
    assert not same(plain.state_dict()["networks"], moved.state_dict()["networks"])


def test_a_second_pass_sees_the_same_images(build: Callable[..., Trainer]) -> None:
    Counted.seen.clear()
    build("Counted").train_epoch()
    assert Counted.seen == [(name, i / 4) for i in range(4) for name in ("data", "samples")]


def test_stages_are_entered_once_also_after_a_resume(
    build: Callable[..., Trainer], copy_of: Callable[..., Any]
) -> None:
    Staged.entered.clear()
    first = build("Staged", epochs=2)
    signals = first.train_epoch().signals
    assert Staged.entered == ["early", "late"] and all(math.isfinite(v) for v in signals[:, 0])
    again = build("Staged", epochs=2)
    again.load_state_dict(copy_of(first.state_dict()))
    left, right = first.train_epoch().signals, again.train_epoch().signals
    assert torch.equal(torch.from_numpy(left).nan_to_num(9), torch.from_numpy(right).nan_to_num(9))
    assert Staged.entered == ["early", "late"]


def _old(state: dict[str, Any]) -> dict[str, Any]:
    """A state as it was written before networks were stored by name."""
    networks, streams = state["networks"], state["streams"]
    energy, generator = networks["energy"], None
    if "generator" in networks:
        weights = networks["generator"]["weights"]
        generator = {
            "network": {n.removeprefix("network."): v for n, v in weights.items() if n != "log_sigma.value"},
            "log_sigma": weights["log_sigma.value"],
            "posterior_log_std": networks["posterior"]["weights"]["value"],
            "optimiser": networks["generator"]["optimiser"],
            "posterior_optimiser": networks["posterior"]["optimiser"],
        }
    critic = networks.get("critic")
    return {
        "model": energy["weights"],
        "average": energy["average"],
        "optimiser": energy["optimiser"],
        "critic": None if critic is None else {"network": critic["weights"], "optimiser": critic["optimiser"]},
        "generator": generator,
        "batches": streams.get("data"),
        "label_batches": streams.get("labels"),
        **{name: state[name] for name in ("buffer", "latch", "epoch", "iteration")},
        "generators": {"generator": torch.Generator().get_state(), **state["generators"]},
    }


@pytest.mark.parametrize("method", ["m-jem", "kl-ebm", "f-ebm", "vera"])
def test_old_states_are_read(
    quick: Quick, digits: ImageData, same: Callable[..., bool], copy_of: Callable[..., Any], method: str
) -> None:
    config = quick(method=method, batch_size=8, label_batch_size=8, iterations_per_epoch=2, buffer_size=1010)
    first, again = Trainer(config, digits), Trainer(config, digits)
    first.train_epoch()
    again.load_state_dict(copy_of(_old(first.state_dict())))
    for trainer in (first, again):
        trainer.train_epoch()
    assert same(first.state_dict()["networks"], again.state_dict()["networks"])
    assert same(first.state_dict()["generators"], again.state_dict()["generators"])


def test_old_configurations_are_read(quick: Quick) -> None:
    """Every configuration had both parts; of a method they do not belong to they said nothing."""
    parts = {"critic": {"divergence": "kl", "start_iteration": 3}, "generator": {"noise_dim": 7}}
    febm, vera = (TrialConfig.model_validate({"method": name, **parts}) for name in ("f-ebm", "vera"))
    assert febm.method_args.model_dump() == parts["critic"]
    assert vera.method_args.model_dump()["noise_dim"] == 7
    plain = TrialConfig.model_validate({"method": "m-ebm", **parts})
    assert plain == TrialConfig.model_validate({"method": "m-ebm"})
    assert TrialConfig.model_validate_json(febm.to_json()) == febm
