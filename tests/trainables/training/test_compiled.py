"""Compiled passes: whole graphs, as many as a method needs, shared by trials of equal shapes, equal to eager.

What belongs to tracing (breaks, graphs, guards) is tested with the backend `aot_eager`, which traces forward and
backward as the default does and writes no code; a few trials run what the default backend, inductor, writes.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.config as dynamo
from torch import Tensor
from torch._dynamo.utils import counters

from trainables.config.method import METHODS
from trainables.config.network import network_families
from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.networks import energy_model as networks
from trainables.networks.arithmetic import precision_kept
from trainables.training import execution
from trainables.training.trainer import Trainer

Quick = Callable[..., TrialConfig]

FAMILY_NETWORKS = {"wrn": "wrn-10-1", "conv": "conv-4", "shortrun": "shortrun-4"}
"""The smallest network of each compiled family."""

CHAIN, LOSSES, CLASSES = "energy, frozen weights", "energy_terms", "logits"
GRAPHS: dict[str, tuple[str, ...]] = {
    "m-ebm": (CHAIN, LOSSES),
    "m-jem": (CHAIN, LOSSES, CLASSES),
    "lse-jem": (CHAIN, LOSSES, CLASSES),
    "softmax": (CLASSES,),
    "jem": (CHAIN, LOSSES, CLASSES),
    "jem++": ("energy_from_stem, frozen weights", LOSSES, CLASSES),
    "shortrun": (CHAIN, LOSSES),
    "igebm": (CHAIN, LOSSES),
    # E(x-) for the critic's loss is taken without a graph.
    "f-ebm": (CHAIN, "energy, no gradient", LOSSES),
    # The terms through the last step have second derivatives and are never compiled.
    "kl-ebm": (CHAIN, LOSSES),
    # The generator descends the frozen energy; the penalty on E(x+) has second derivatives and is never compiled.
    "vera": (CHAIN, LOSSES),
    "sada-jem": (CHAIN, LOSSES, CLASSES),
    # The generator's turn does not come in these three iterations; the penalty has second derivatives.
    "gebm": ("energy",),
}
"""Every graph of an iteration, by method. x+, x- and every step of the chains share theirs: their shape is the same."""
UNCOMPILED = {"diffurecov", "cf-ebm", "clel"}
"""Methods whose own network is not taken by torch.compile, and which take no other."""


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every test starts and ends without graphs, and with limits and its own caches."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
    limits = ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit")
    with precision_kept(), dynamo.patch({name: getattr(dynamo, name) for name in limits}):
        _forget()
        yield
        _forget()


def _forget() -> None:
    torch.compiler.reset()
    counters.clear()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are traced and split as ever, then run operation by operation."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def _graphs() -> int:
    return counters["stats"]["unique_graphs"]


def _config(quick: Quick, method: str, **fields: Any) -> TrialConfig:
    base: dict[str, Any] = {
        "method": method,
        "network": "shortrun-4" if method == "shortrun" else "conv-4",
        "execution": "compiled",
        "dropout": 0.0,
        "batch_size": 6,
        "label_batch_size": 6,
        "buffer_size": 1002 if method == "kl-ebm" else 18,
        "iterations_per_epoch": 3,
        "warmup_iterations": 0,
        "divergence": {"gap_limit": 1e6, "hard_gap_limit": 1e6, "collapse_patience": 100_000},
    }
    if method == "f-ebm":
        base["critic"] = {"start_iteration": 1}
    if method == "vera":
        base["generator"] = {"noise_dim": 4, "features": 4}
    return quick(**base | fields)


def _trial(config: TrialConfig, data: ImageData) -> tuple[int, np.ndarray, dict[str, Tensor]]:
    """One epoch: how many graphs it added, its signals, the weights and statistics behind it."""
    before = _graphs()
    trainer = Trainer(config, data)
    assert trainer.execution.compiled == (config.execution == "compiled")
    report = trainer.train_epoch()
    assert report.latch.verdict is None and np.isfinite(report.signals).any()
    assert all(p.requires_grad for p in trainer.model.parameters())
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.close()
    return _graphs() - before, report.signals, weights


# ------------------------------------------------------------------------------------------------------------- graphs


def test_every_method_is_here() -> None:
    assert GRAPHS.keys() | UNCOMPILED == METHODS.keys() and FAMILY_NETWORKS.keys() == {
        f.name for f in network_families().values() if f.compiled
    }


@pytest.mark.parametrize("fields", [{}, {"norm": "batch", "precision": "bf16"}], ids=["plain", "norm-bf16"])
@pytest.mark.parametrize("method", GRAPHS)
def test_a_method_takes_its_graphs_and_no_more(
    quick: Quick, digits: ImageData, traced: None, method: str, fields: dict[str, Any]
) -> None:
    """Whole graphs, all there after two iterations; a trial of other numbers and equal shapes finds them made."""
    if method == "shortrun":
        fields = {name: value for name, value in fields.items() if name != "norm"}
    trainer = Trainer(_config(quick, method, **fields), digits)
    assert trainer.execution.compiled
    record = torch.zeros(3, 8)
    for i in range(3):
        trainer.step(record[i])
        trainer.iteration += 1
        if i == 1:
            assert _graphs() == len(GRAPHS[method])
    other = {"seed": 5, "sampling_steps": 3, "step_size": 0.5, "learning_rate": 1e-3, "noise_std": 0.02}
    beside, _, _ = _trial(_config(quick, method, **fields, **other), digits)
    trainer.close()
    after, _, _ = _trial(_config(quick, method, **fields, seed=6), digits)
    assert (_graphs(), beside, after) == (len(GRAPHS[method]), 0, 0)
    assert not counters["graph_break"]


@pytest.mark.parametrize("network", ["wrn-10-1", "conv-4"])
def test_ways_to_be_faster_break_no_graph(quick: Quick, digits: ImageData, traced: None, network: str) -> None:
    config = _config(
        quick,
        "m-jem",
        network=network,
        norm="batch",
        precision="bf16",
        merge_bias=True,
        fused_norm=True,
        flipped_backward=True,
        parallel_branches=True,
    )
    assert _trial(config, digits)[0] == len(GRAPHS["m-jem"])
    assert _trial(config.model_copy(update={"seed": 5}), digits)[0] == 0
    assert not counters["graph_break"]


def test_a_broken_graph_would_be_seen(
    quick: Quick, digits: ImageData, traced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x.float()

    monkeypatch.setattr(networks, "half_to_float", breaking)
    graphs, _, _ = _trial(_config(quick, "m-ebm"), digits)
    assert counters["graph_break"] and graphs > len(GRAPHS["m-ebm"])


def test_dropout_is_not_compiled(quick: Quick, digits: ImageData, traced: None) -> None:
    trainer = Trainer(_config(quick, "vera", network="wrn-10-1", dropout=0.3), digits)
    assert not trainer.execution.compiled
    trainer.train_epoch()
    assert _graphs() == 0


# ------------------------------------------------------------------------------------------------------------- shapes


def test_other_shapes_have_their_own_graphs(quick: Quick, digits: ImageData, traced: None) -> None:
    first, second = _config(quick, "m-jem"), _config(quick, "m-jem", batch_size=8, label_batch_size=10)
    assert [_trial(c, digits)[0] for c in (first, second, first, second)] == [3, 3, 0, 0]


def test_an_evaluation_leaves_the_training_its_graphs(quick: Quick, digits: ImageData, traced: None) -> None:
    """Batches of the evaluation's size, a smaller last one, and the mode in which batch norm keeps its statistics."""
    config = _config(quick, "m-ebm", norm="batch", evaluation={"protocols": "none", "batch_size": 10})
    trainer = Trainer(config, digits)
    made = []
    for seed in range(2):
        trainer.train_epoch()
        made.append(_graphs())
        trainer.fresh_samples(24, 2, torch.Generator().manual_seed(seed))
        made.append(_graphs())
    assert made[0] == 2 and made[1] == made[2] == made[3]
    assert not counters["graph_break"]


def _softmax_graphs(quick: Quick, data: ImageData, sizes: Iterable[int]) -> list[int]:
    """Graphs that trials of these batch sizes add, one after another. A classifier has one graph."""
    made = []
    for size in sizes:
        config = _config(quick, "softmax", label_batch_size=size, iterations_per_epoch=1)
        made.append(_trial(config, data)[0])
    return made


def test_many_shapes_do_not_pass_torchs_limit(quick: Quick, digits: ImageData, traced: None) -> None:
    """Behind 8 variants of a pass torch.compile says so once and runs on without."""
    assert _softmax_graphs(quick, digits, range(2, 13)) == [1] * 11
    assert _softmax_graphs(quick, digits, (2, 12)) == [0, 0]


def test_what_a_process_keeps_is_bounded(
    quick: Quick, digits: ImageData, traced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past its bound it forgets and compiles again; a trial that alone needs more than there is room for is an error."""
    monkeypatch.setattr(execution, "MAX_VARIANTS", 2)
    sizes = (2, 3, 4, 4, 3, 4, 2, 4)  # three are too many for the fourth trial, which begins again
    assert _softmax_graphs(quick, digits, sizes) == [1, 1, 1, 1, 1, 0, 1, 1]
    monkeypatch.setattr(execution, "MAX_VARIANTS", 0)
    with pytest.raises(Exception, match="limit"):
        _softmax_graphs(quick, digits, [5])


def test_graphs_do_not_keep_a_closed_trial(quick: Quick, digits: ImageData, traced: None) -> None:
    trainer = Trainer(_config(quick, "m-jem", norm="batch", precision="bf16"), digits)
    trainer.train_epoch()
    parts = [weakref.ref(p) for p in (trainer.model, *trainer.model.parameters())]
    trainer.close()
    del trainer
    gc.collect()
    assert _graphs() == 3 and all(part() is None for part in parts)


# ---------------------------------------------------------------------------------------------------------- agreement


def _agree(config: TrialConfig, data: ImageData, *, means: float, rtol: float, atol: float) -> None:
    """Compiled and eager iterations.

    Args:
        means: how far mean energies, their gap and the loss may be apart.
        rtol, atol: of the other signals, the weights and the running statistics.
    """
    graphs, found, end = _trial(config, data)
    assert graphs == len(GRAPHS[config.method])
    _, wanted, plain = _trial(config.model_copy(update={"execution": "eager"}), data)
    np.testing.assert_allclose(found[:, :4], wanted[:, :4], rtol=0, atol=means)
    np.testing.assert_allclose(found[:, 4:], wanted[:, 4:], rtol=rtol, atol=atol)
    for name, value in plain.items():
        torch.testing.assert_close(
            end[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("method", "network", "norm"),
    [
        ("m-jem", "wrn", "batch"),
        ("m-ebm", "wrn", "none"),
        ("m-jem", "conv", "batch"),
        ("m-ebm", "conv", "none"),
        ("jem", "conv", "batch"),  # whose chains see the running statistics
        ("jem++", "conv", "batch"),
        ("shortrun", "shortrun", "none"),
        ("kl-ebm", "conv", "batch"),
        ("vera", "conv", "none"),
    ],
)
def test_traced_passes_give_the_same_iterations(
    quick: Quick, digits: ImageData, traced: None, method: str, network: str, norm: str, precision: str
) -> None:
    """The same operations, forward and backward, so equal but for the order of a few sums; in bf16 too."""
    config = _config(quick, method, network=FAMILY_NETWORKS[network], norm=norm, precision=precision)
    _agree(config, digits, means=2e-5, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "network", "norm", "precision"),
    [
        ("m-ebm", "conv", "batch", "tf32"),  # float32 on a CPU, but with the switches that PyTorch's older ones forbid
        ("m-ebm", "wrn", "batch", "bf16"),
        ("shortrun", "shortrun", "none", "bf16"),
    ],
)
def test_compiled_passes_give_the_same_iterations(
    quick: Quick, digits: ImageData, method: str, network: str, norm: str, precision: str
) -> None:
    """Inductor fuses, so it rounds differently: float32 in its last digits; bf16 by as much as it is off float32."""
    fields: dict[str, Any] = {"network": FAMILY_NETWORKS[network], "norm": norm, "precision": precision}
    config = _config(quick, method, **fields, batch_size=16, label_batch_size=16, buffer_size=32, learning_rate=1e-3)
    if precision != "bf16":
        _agree(config, digits, means=2e-4, rtol=2e-3, atol=2e-4)
    else:
        _agree(config, digits, means=5e-3, rtol=5e-2, atol=3e-2)
