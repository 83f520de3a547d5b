"""The latch fed by hand, and on the recorded small study (notes/small_study.md, section b)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainables.config.parts import DivergenceConfig
from trainables.methods.f_ebm import F_DIVERGENCES
from trainables.methods.presets import build_trial
from trainables.results.schema import Cause, Outcome
from trainables.training.detector import DivergenceLatch, LatchReading, begun, beyond_error

CPU = torch.device("cpu")
RECORDED = Path(__file__).resolve().parents[4] / "shared/data/small_study"
CALM = {"loss": 0.0, "total": 0.0, "gap": 0.0, "energy_max": 1.0, "grad": 1.0}


def _latch(l2: float = 0.0, **fields: Any) -> DivergenceLatch:
    return DivergenceLatch(DivergenceConfig(**fields), l2, CPU)


def _feed(latch: DivergenceLatch, stream: list[dict[str, float]], first: int = 0) -> LatchReading:
    for i, signals in enumerate(stream, first):
        values = CALM | signals
        if "loss" in signals and "total" not in signals:
            values["total"] = signals["loss"]
        latch.update(i, **{name: torch.tensor(float(v)) for name, v in values.items()})
    return latch.read()


def _gaps(*gaps: float) -> list[dict[str, float]]:
    return [{"gap": g} for g in gaps]


@pytest.mark.parametrize(
    ("divergence", "gap"),
    [("jensen-shannon", -0.5), ("squared-hellinger", -0.5), ("kl", -1.0), ("reverse-kl", -1.0), ("pearson", -2.0)],
)
def test_trivial_optimum_of_an_f_divergence(divergence: str, gap: float) -> None:
    """The gap at which free energies and critic values settle, found by descending f-EBM's two losses themselves."""
    u, v = F_DIVERGENCES[divergence]
    e_plus, e_minus, h_plus, h_minus = (torch.zeros(4, dtype=torch.float64).requires_grad_() for _ in range(4))
    for _ in range(3000):
        critic = -(u(h_plus + e_plus.detach()).mean() - v(h_minus + e_minus.detach()).mean())
        critic = critic + (h_plus**2).mean() + (h_minus**2).mean()
        worth = v(h_minus.detach() + e_minus)
        energy = u(h_plus.detach() + e_plus).mean() - worth.mean() + (e_minus * worth.detach()).mean()
        energy = energy - e_minus.mean() * worth.detach().mean() + (e_plus**2).mean() + (e_minus**2).mean()
        slopes = torch.autograd.grad(critic, (h_plus, h_minus)) + torch.autograd.grad(energy, (e_plus, e_minus))
        with torch.no_grad():
            for x, slope in zip((h_plus, h_minus, e_plus, e_minus), slopes, strict=True):
                x -= 0.05 * slope
    assert float((e_plus - e_minus).detach().mean()) == pytest.approx(gap, abs=1e-3)
    config = build_trial({"method": "f-ebm", "critic": {"divergence": divergence}, "device": "cpu"})
    assert config.method_args.trivial_optimum() == -gap
    latch = DivergenceLatch(config.divergence, config.l2_weight / config.method_args.trivial_optimum(), CPU)
    reading = _feed(latch, _gaps(*[gap * 0.99] * 19))
    assert reading.verdict is None
    verdict = _feed(latch, _gaps(gap * 0.99), first=19).verdict
    assert verdict is not None and verdict.cause is Cause.TRIVIAL_OPTIMUM


def test_calm_stream_has_no_verdict() -> None:
    latch = _latch()
    reading = _feed(latch, _gaps(*[1.9, -1.9] * 50))
    assert reading == LatchReading(None, None, None, None)
    assert latch.tripped.item() == 0 and latch.tripped.dtype == torch.float32


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("signal", "cause"),
    [
        ("loss", Cause.NONFINITE_LOSS),
        ("total", Cause.NONFINITE_LOSS),
        ("gap", Cause.NONFINITE_ENERGY),
        ("energy_max", Cause.NONFINITE_ENERGY),
        ("grad", Cause.NONFINITE_GRADIENT),
    ],
)
@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.parametrize("action", ["stop", "record"])
def test_anything_non_finite(signal: str, cause: Cause, value: float, l2: float, action: str) -> None:
    latch = _latch(l2, action=action)
    stream = [{}, {}, {signal: value} if signal != "loss" else {"loss": value, "total": 0.0}, {}]
    reading = _feed(latch, stream)
    assert reading.verdict is not None
    assert (reading.verdict.outcome, reading.verdict.cause, reading.verdict.iteration) == (Outcome.DIVERGED, cause, 2)
    assert (reading.alarm_iteration, reading.alarm_cause) == (2, cause)
    assert latch.tripped.item() == 1


@pytest.mark.parametrize("loss", [1.5e5, -1.5e5])
def test_released_limit_on_the_loss(loss: float) -> None:
    reading = _feed(_latch(), [{"loss": 0.9e5}, {"loss": loss}])
    assert reading.verdict is not None
    assert (reading.verdict.cause, reading.verdict.iteration) == (Cause.LOSS_LIMIT, 1)
    assert reading.loss_limit_iteration == 1


def test_cross_entropy_does_not_count_for_the_released_limit() -> None:
    reading = _feed(_latch(), [{"loss": 0.0, "total": 2e5}])
    assert reading.verdict is None and reading.loss_limit_iteration is None


def test_hard_gap_once() -> None:
    for gap in (20.5, -20.5):
        reading = _feed(_latch(), _gaps(0, gap, 0))
        assert reading.verdict is not None
        assert (reading.verdict.cause, reading.verdict.iteration) == (Cause.ENERGY_GAP_HARD, 1)
    assert _feed(_latch(), _gaps(0, 19.5, 0)).verdict is None


@pytest.mark.parametrize("patience", [1, 2, 3, 7])
def test_gap_patience_exactly(patience: int) -> None:
    latch = _latch(gap_patience=patience)
    assert _feed(latch, _gaps(0, *[2.1] * (patience - 1))).alarm_iteration is None
    reading = _feed(latch, _gaps(-2.1), first=patience)
    assert reading.verdict is not None
    assert (reading.verdict.cause, reading.verdict.iteration) == (Cause.ENERGY_GAP, patience)


def test_gap_count_starts_again() -> None:
    latch = _latch()
    assert _feed(latch, _gaps(3, 3, 2.0, 3, 3, 0, 3, 3, math.copysign(1.9, -1))).verdict is None
    assert _feed(latch, _gaps(3, 3), first=9).verdict is None
    assert _feed(latch, _gaps(3), first=11).verdict is not None


@pytest.mark.parametrize(
    ("l2", "limit"), [(0.0, 2.0), (0.01, 2.0), (0.1, 2.0), (0.25, 2.0), (0.5, 1.0), (1.0, 0.5), (5.0, 0.1)]
)
def test_gap_limit_with_an_l2_term(l2: float, limit: float) -> None:
    """min(2, 0.5 / lambda), three times in a row."""
    below = _feed(_latch(l2), _gaps(*[0.99 * limit] * 10))
    assert below.alarm_iteration is None
    beyond = _feed(_latch(l2), _gaps(*[1.01 * limit] * 10))
    assert (beyond.alarm_iteration, beyond.alarm_cause) == (2, Cause.ENERGY_GAP)


@pytest.mark.parametrize("l2", [0.01, 0.1, 0.5])
def test_collapse_on_the_trivial_optimum(l2: float) -> None:
    """gap = -1/lambda for `collapse_patience` iterations: collapsed, alarmed long before."""
    latch = _latch(l2, hard_gap_limit=1000)
    early = _feed(latch, _gaps(*[-0.99 / l2] * 19))
    assert early.verdict is None
    assert early.alarm_iteration == 2
    reading = _feed(latch, _gaps(-0.99 / l2), first=19)
    assert reading.verdict is not None
    assert reading.verdict.outcome is Outcome.COLLAPSED
    assert (reading.verdict.cause, reading.verdict.iteration) == (Cause.TRIVIAL_OPTIMUM, 19)


def test_collapse_count_starts_again_and_needs_the_right_sign() -> None:
    stream = _gaps(*([-10.0] * 19 + [0.0]) * 3)
    assert _feed(_latch(0.1), stream).verdict is None
    assert _feed(_latch(0.1), _gaps(*[10.0] * 60)).verdict is None
    assert _feed(_latch(0.1), _gaps(*[-4.9] * 60)).verdict is None
    assert _feed(_latch(0.1), _gaps(*[-15.1] * 60)).verdict is None
    assert _feed(_latch(0.1), _gaps(*[-5.1] * 20)).verdict is not None


def test_blow_up_with_an_l2_term_diverges() -> None:
    """Through the optimum's neighbourhood and out of it: diverged, not collapsed."""
    latch = _latch(0.1)
    reading = _feed(latch, _gaps(-1, -3, -6, -10, -14, -19, -45, -400))
    assert reading.verdict is not None
    assert reading.verdict.outcome is Outcome.DIVERGED
    assert (reading.verdict.cause, reading.verdict.iteration) == (Cause.ENERGY_GAP_HARD, 6)
    assert reading.alarm_iteration == 3
    weak = _feed(_latch(0.01), _gaps(*[-150.0] * 5, -250.0))
    assert weak.verdict is not None and weak.verdict.iteration == 5


def test_without_an_l2_term_nothing_collapses() -> None:
    reading = _feed(_latch(0.0, gap_limit=1000, hard_gap_limit=1000), _gaps(*[-2.0] * 200))
    assert reading.verdict is None


@pytest.mark.parametrize(
    ("field", "signal", "cause"),
    [
        ("energy_limit", "energy_max", Cause.ENERGY_MAGNITUDE),
        ("gradient_norm_limit", "grad", Cause.GRADIENT_NORM),
    ],
)
def test_optional_limits(field: str, signal: str, cause: Cause) -> None:
    loud = [{signal: 49.0}, {signal: 51.0}]
    assert _feed(_latch(), loud).verdict is None
    for l2 in (0.0, 0.1):
        reading = _feed(_latch(l2, **{field: 50.0}), loud)
        assert reading.verdict is not None
        assert (reading.verdict.cause, reading.verdict.iteration) == (cause, 1)


def test_every_cause_of_the_latch_is_reachable() -> None:
    seen = set()
    for l2, fields, stream in [
        (0.0, {}, [{"loss": math.nan}]),
        (0.0, {}, [{"energy_max": math.inf}]),
        (0.0, {}, [{"grad": math.nan}]),
        (0.0, {}, [{"loss": 1e6}]),
        (0.0, {"energy_limit": 5}, [{"energy_max": 6.0}]),
        (0.0, {"gradient_norm_limit": 5}, [{"grad": 6.0}]),
        (0.0, {}, [{"gap": -21.0}]),
        (0.0, {}, [{"gap": -3.0}] * 3),
        (0.1, {}, [{"gap": -9.0}] * 20),
    ]:
        verdict = _feed(_latch(l2, **fields), stream).verdict
        assert verdict is not None
        seen.add(verdict.cause)
    assert seen == set(Cause) - {Cause.WORSE_THAN_P0}


def test_first_verdict_and_first_alarm_stick() -> None:
    latch = _latch()
    first = _feed(latch, [{}, {"gap": 50.0}, {"loss": math.nan}, {"loss": 1e7}, {}])
    assert first.verdict is not None and first.alarm_iteration == 1
    assert (first.verdict.cause, first.verdict.iteration) == (Cause.ENERGY_GAP_HARD, 1)
    assert first.loss_limit_iteration == 3
    later = _feed(latch, [{"grad": math.inf}, {"loss": 2e5}], first=5)
    assert later == first


def test_record_mode_notes_the_alarm_and_trains_on() -> None:
    latch = _latch(action="record")
    reading = _feed(latch, _gaps(*[3.0] * 10, 500.0))
    assert reading.verdict is None and latch.tripped.item() == 0
    assert (reading.alarm_iteration, reading.alarm_cause) == (2, Cause.ENERGY_GAP)
    end = _feed(latch, [{"gap": 3e5, "loss": 3e5}], first=11)
    assert end.verdict is not None
    assert (end.verdict.cause, end.verdict.iteration, end.alarm_iteration) == (Cause.LOSS_LIMIT, 11, 2)


def test_record_mode_never_calls_a_collapse() -> None:
    reading = _feed(_latch(0.1, action="record"), _gaps(*[-10.0] * 200))
    assert reading.verdict is None and reading.alarm_iteration == 2


def test_state_survives_a_round_trip(tmp_path: Path) -> None:
    stream = _gaps(3, 3, 0, -9, -9, -9) + _gaps(*[-10.0] * 30) + [{"loss": math.nan}]
    for l2 in (0.0, 0.1):
        whole = _feed(_latch(l2), stream)
        for cut in range(len(stream)):
            first = _latch(l2)
            _feed(first, stream[:cut])
            torch.save(first.state_dict(), tmp_path / "latch.pt")
            second = _latch(l2)
            second.load_state_dict(torch.load(tmp_path / "latch.pt", weights_only=True))
            assert second.read() == first.read()
            assert _feed(second, stream[cut:], first=cut) == whole


class _HostReads(TorchDispatchMode):
    """Counts what makes a host wait for its device: the value of a tensor read back."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_update_never_reads_a_value_on_the_host(l2: float) -> None:
    latch = _latch(l2)
    _feed(latch, [{}])
    signals = {name: torch.tensor(v) for name, v in CALM.items()}
    with _HostReads() as reads:
        latch.update(1, **signals)
    assert reads.count == 0


# ------------------------------------------------------------------------------------- a second network's own step


def _companion(latch: DivergenceLatch, iteration: int, loss: float = 0.0, grad: float = 1.0) -> LatchReading:
    latch.update_companion(iteration, loss=torch.tensor(loss), grad=torch.tensor(grad))
    return latch.read()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("signal", "cause"), [("loss", Cause.NONFINITE_LOSS), ("grad", Cause.NONFINITE_GRADIENT)])
@pytest.mark.parametrize("action", ["stop", "record"])
@pytest.mark.parametrize("l2", [0.0, 1.0])
def test_a_companion_that_is_not_finite(signal: str, cause: Cause, value: float, action: str, l2: float) -> None:
    latch = _latch(l2, action=action)
    _feed(latch, [{}, {}])
    assert _companion(latch, 1).verdict is None and latch.tripped.item() == 0
    reading = _companion(latch, 2, **{signal: value})
    assert reading.verdict is not None
    assert (reading.verdict.outcome, reading.verdict.cause, reading.verdict.iteration) == (Outcome.DIVERGED, cause, 2)
    assert (reading.alarm_iteration, reading.alarm_cause) == (2, cause)
    assert latch.tripped.item() == 1 and latch.tripped.dtype == torch.float32
    assert _companion(latch, 3, math.nan, math.nan) == reading, "the first verdict stays"
    assert _feed(latch, [{"loss": math.nan}], first=3).verdict == reading.verdict


def test_a_companions_size_alone_trips_nothing() -> None:
    """A critic's loss and gradient have no published limit; only the energy's are watched for size."""
    latch = _latch(1.0, gradient_norm_limit=5.0, energy_limit=5.0)
    assert _companion(latch, 0, -1e30, 1e30) == LatchReading(None, None, None, None)


def test_a_companion_does_not_disturb_the_counts() -> None:
    """Runs of large gaps and of the trivial optimum go on across its updates, and an earlier alarm stays."""
    latch = _latch()
    for i in range(3):
        _feed(latch, _gaps(3.0), first=i)
        reading = _companion(latch, i)
    assert reading.verdict is not None and (reading.verdict.cause, reading.verdict.iteration) == (Cause.ENERGY_GAP, 2)
    collapsing = _latch(0.1, hard_gap_limit=1000)
    for i in range(20):
        assert collapsing.tripped.item() == 0
        _feed(collapsing, _gaps(-9.9), first=i)
        reading = _companion(collapsing, i)
    assert reading.verdict is not None and reading.verdict.outcome is Outcome.COLLAPSED
    recorded = _latch(action="record")
    _feed(recorded, [{"gap": 50.0}])
    reading = _companion(recorded, 1, math.nan)
    assert (reading.alarm_iteration, reading.alarm_cause) == (0, Cause.ENERGY_GAP_HARD)
    assert reading.verdict is not None and reading.verdict.iteration == 1


def test_a_companions_update_reads_nothing_on_the_host() -> None:
    latch = _latch()
    _companion(latch, 0)
    values = torch.tensor(1.0), torch.tensor(2.0)
    with _HostReads() as reads:
        latch.update_companion(1, loss=values[0], grad=values[1])
    assert reads.count == 0


# ------------------------------------------------------------------------------------------- the recorded small study


def _literal_alarm(rows: Any, l2: float) -> int | None:
    """|E+ - E-| > min(2, 0.5/lambda) three times in a row, or > 20 once, or |loss| > 1e5, or anything non-finite."""
    limit = min(2.0, 0.5 / l2) if l2 > 0 else 2.0
    in_a_row = 0
    for row in rows.itertuples():
        gap = abs(row.energy_gap)
        in_a_row = in_a_row + 1 if gap > limit else 0
        numbers = (row.energy_gap, row.loss, row.energy_abs_max, row.grad_param_norm)
        if in_a_row >= 3 or gap > 20 or abs(row.loss) > 1e5 or not all(map(math.isfinite, numbers)):
            return int(row.iteration)
    return None


@pytest.fixture(scope="module")
def recorded() -> Callable[[], list[tuple[Any, Any]]]:
    pd = pytest.importorskip("pandas")
    if not (RECORDED / "signals.parquet").is_file():
        pytest.skip("the recorded small study is not here")
    columns = ["run", "iteration", "energy_gap", "loss", "energy_abs_max", "grad_param_norm"]
    runs = pd.read_parquet(RECORDED / "runs.parquet")
    chosen = pd.concat(
        [
            runs[(runs.outcome == outcome) & (runs.norm == norm)].sort_values("iterations").head(4)
            for outcome in ("completed", "diverged", "collapsed")
            for norm in ("bn", "none")
        ]
    )
    signals = pd.read_parquet(RECORDED / "signals.parquet", columns=columns)
    groups = dict(tuple(signals[signals.run.isin(chosen.run)].groupby("run")))
    return lambda: [(run, groups[run.run].sort_values("iteration")) for run in chosen.itertuples()]


def test_recorded_runs(recorded: Callable[[], list[tuple[Any, Any]]]) -> None:
    seen: dict[str, int] = {}
    for run, rows in recorded():
        if len(rows) > 1000:
            rows = rows.head(1000)
        latch = DivergenceLatch(DivergenceConfig(), run.l2, CPU)
        signals = torch.tensor(rows[["energy_gap", "loss", "energy_abs_max", "grad_param_norm"]].to_numpy())
        for iteration, (gap, loss, energy, grad) in zip(rows.iteration.tolist(), signals, strict=True):
            latch.update(iteration, loss=loss, total=loss, gap=gap, energy_max=energy, grad=grad)
        reading = latch.read()
        assert reading.alarm_iteration == _literal_alarm(rows, run.l2), run
        seen[run.outcome] = seen.get(run.outcome, 0) + 1
        if run.outcome == "diverged":
            assert reading.verdict is not None and reading.verdict.outcome is Outcome.DIVERGED, run
        elif run.outcome == "collapsed":
            assert reading.verdict is not None and reading.verdict.outcome is Outcome.COLLAPSED, run
        else:
            assert reading.verdict is None, run
    assert seen["completed"] >= 6 and seen["diverged"] >= 6 and seen["collapsed"] >= 3


@pytest.mark.parametrize(
    ("fields", "images", "first"),
    [
        ({"warmup_iterations": 0, "buffer_size": 100}, 640, 50),  # five passes through the images
        ({"warmup_iterations": 0, "buffer_size": 100}, 641, 51),
        ({"warmup_iterations": 0, "buffer_size": 100}, 1_281_167, 2000),  # which on ImageNet-32 take 100,000
        ({"warmup_iterations": 30, "buffer_size": 100}, 640, 120),  # three times as many after the warm-up as in it
        ({"warmup_iterations": 0, "buffer_size": 6400}, 640, 100),  # |B| chains have been written
        ({"warmup_iterations": 0, "buffer_size": 6400, "buffer": "none"}, 640, 50),
        ({"warmup_iterations": 1000, "buffer_size": 10_000}, 50_000, 4000),  # the published settings: of 78,000
    ],
)
def test_when_training_has_begun_in_earnest(fields: dict[str, Any], images: int, first: int) -> None:
    config = build_trial({"method": "m-ebm", "batch_size": 64, "network": "conv-8", "norm": "none"} | fields)
    assert [begun(config, first + i, images) for i in (-1, 0, 1)] == [False, True, True]


def test_beyond_the_error() -> None:
    assert beyond_error(2.749, 2.707, 0.0, 0.0), "without errors the numbers alone count"
    assert not beyond_error(2.749, 2.707, 0.03, 0.03)
    assert beyond_error(2.9, 2.7, 0.06, 0.08) and not beyond_error(2.89, 2.7, 0.06, 0.08)  # 1.96 * 0.1 = 0.196
    assert not beyond_error(2.0, 2.7, 0.01, 0.01)
