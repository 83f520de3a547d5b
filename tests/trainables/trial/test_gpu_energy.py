"""Energy of a trial: what the meter makes of NVML's counter, and what a trial makes of the meter."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.results.schema import Outcome
from trainables.training.trainer import Trainer
from trainables.trial import trial as trial_module
from trainables.trial.gpu_energy import EnergyMeter
from trainables.trial.trial import Report, Trial

UUID = "aa0a1b2c-0000-1111-2222-333344445555"
CUDA = torch.device("cuda", 0)
Quick = Callable[..., TrialConfig]


class StandIn(ModuleType):
    """As much of pynvml as the meter asks for, with a counter the test sets."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.millijoules: int | Exception = 5_000_000
        self.devices = {f"GPU-{UUID}": "gpu"}
        self.parents: dict[str, str] = {}
        self.mig_mode: int | Exception = self.NVMLError("Not Supported")
        self.open = 0
        self.init_error: Exception | None = None

    def nvmlInit(self) -> None:  # noqa: N802
        if self.init_error is not None:
            raise self.init_error
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid not in self.devices:
            raise self.NVMLError("Not Found")
        return self.devices[uuid]

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:  # noqa: N802
        return self.parents[handle]

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:  # noqa: N802
        if isinstance(self.mig_mode, Exception):
            raise self.mig_mode
        return [self.mig_mode, self.mig_mode]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        assert handle == "gpu"  # a slice has no counter
        if isinstance(self.millijoules, Exception):
            raise self.millijoules
        return self.millijoules


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    monkeypatch.setitem(sys.modules, "pynvml", made)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: SimpleNamespace(uuid=UUID))
    return made


def test_joules_since_the_last_reading(nvml: StandIn) -> None:
    meter = EnergyMeter(CUDA)
    assert not meter.shared
    nvml.millijoules = 5_001_500
    assert meter.read() == 1.5
    assert meter.read() == 0.0
    nvml.millijoules = 5_011_500
    assert meter.read() == 10.0
    meter.close()
    assert meter.read() is None
    assert nvml.open == 0


def test_a_reading_that_fails_costs_that_interval_alone(nvml: StandIn) -> None:
    meter = EnergyMeter(CUDA)
    nvml.millijoules = nvml.NVMLError("GPU is lost")
    assert meter.read() is None
    nvml.millijoules = 6_000_000
    assert meter.read() is None  # since when, nobody knows
    nvml.millijoules = 6_002_000
    assert meter.read() == 2.0


def test_a_counter_that_starts_again_gives_no_negative_energy(nvml: StandIn) -> None:
    meter = EnergyMeter(CUDA)
    nvml.millijoules = 1_000
    assert meter.read() is None
    nvml.millijoules = 2_000
    assert meter.read() == 1.0


@pytest.mark.parametrize("missing", ["package", "library", "device", "counter", "uuid"])
def test_without_nvml_there_is_nothing_to_read(nvml: StandIn, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    if missing == "package":
        monkeypatch.setitem(sys.modules, "pynvml", None)  # an import of it raises ImportError
    elif missing == "library":
        nvml.init_error = nvml.NVMLError("NVML Shared Library Not Found")
    elif missing == "device":
        nvml.devices.clear()
    elif missing == "counter":
        nvml.millijoules = nvml.NVMLError("Not Supported")
    else:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: SimpleNamespace())
    meter = EnergyMeter(CUDA)
    assert meter.read() is None
    assert nvml.open == 0
    meter.close()


def test_a_cpu_asks_nvml_nothing(nvml: StandIn) -> None:
    nvml.init_error = AssertionError("asked")
    assert EnergyMeter(torch.device("cpu")).read() is None


def test_a_slice_of_a_gpu_reads_the_whole_one_and_says_so(nvml: StandIn) -> None:
    nvml.devices = {f"MIG-{UUID}": "slice"}
    nvml.parents = {"slice": "gpu"}
    meter = EnergyMeter(CUDA)
    nvml.millijoules = 5_003_000
    assert meter.read() == 3.0
    assert meter.shared


@pytest.mark.parametrize(("mode", "shared"), [(0, False), (1, True)])
def test_a_slice_that_has_its_gpus_uuid_is_known_by_the_mode(nvml: StandIn, mode: int, shared: bool) -> None:
    nvml.mig_mode = mode
    assert EnergyMeter(CUDA).shared is shared


def test_the_prefix_is_there_once(nvml: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: SimpleNamespace(uuid=f"GPU-{UUID}"))
    meter = EnergyMeter(CUDA)
    nvml.millijoules = 5_001_000
    assert meter.read() == 1.0


# ------------------------------------------------------------------------------------------------------- a trial


class Metered:
    """A meter whose readings inside a step are 1, 2, 4, ... J, and 1000 J between two steps."""

    def __init__(self, shared: bool = False) -> None:
        self.shared = shared
        self.readings: Iterator[float] = (x for i in range(100) for x in (1000.0, 2.0**i))
        self.failing: set[int] = set()
        self.count = 0
        self.closed = False

    def read(self) -> float | None:
        value = next(self.readings)
        self.count += 1
        return None if self.count - 1 in self.failing else value

    def close(self) -> None:
        self.closed = True


def _metered(trial: Trial, meter: Metered) -> Trial:
    """A trial on the CPU that counts as one on a GPU with this meter."""
    trial._meter = meter  # type: ignore[assignment]
    trial._found.energy_joules = 0.0
    return trial


def _run(trial: Trial) -> list[Report]:
    reports = [trial.step()]
    while not reports[-1].done:
        reports.append(trial.step())
    return reports


def test_a_trial_cpu_layout_has_no_energy(quick: Quick, digits: ImageData) -> None:
    for share in (None, 0.0, 0.5):
        for report in _run(Trial(quick(epochs=1), digits, gpu_share=share)):
            assert report.row is not None
            assert report.row["energy_joules"] is None
            assert report.trial["energy_joules"] is None
            assert report.trial["energy_shared"] is None


def test_rows_have_an_epochs_energy_and_the_trial_their_sum(quick: Quick, digits: ImageData) -> None:
    meter = Metered()
    trial = _metered(Trial(quick(), digits), meter)
    reports = _run(trial)
    assert [r.row["energy_joules"] for r in reports if r.row] == [1.0, 2.0, 4.0, 8.0]  # what came between is not theirs
    assert [r.trial["energy_joules"] for r in reports] == [1.0, 3.0, 7.0, 15.0]
    trial.close()
    assert meter.closed


def test_the_energy_of_a_diverging_epoch_counts(quick: Quick, digits: ImageData) -> None:
    config = quick(initial="uniform", norm="none", epochs=4, iterations_per_epoch=30, sampling_steps=1, buffer_size=100)
    end = _run(_metered(Trial(config, digits), Metered()))[-1]
    assert end.outcome is Outcome.DIVERGED
    assert end.row is None
    assert end.trial["energy_joules"] == sum(2.0**i for i in range(int(end.trial["epochs_done"] or 0) + 2))


def test_an_epoch_that_was_not_measured_leaves_no_sum(quick: Quick, digits: ImageData) -> None:
    meter = Metered()
    meter.failing = {3}  # the end of the first epoch
    reports = _run(_metered(Trial(quick(), digits), meter))
    assert [r.row["energy_joules"] for r in reports if r.row] == [1.0, None, 4.0, 8.0]
    assert [r.trial["energy_joules"] for r in reports] == [1.0, None, None, None]


def test_the_sum_goes_on_where_a_checkpoint_was_taken(
    quick: Quick, digits: ImageData, copy_of: Callable[[Any], Any]
) -> None:
    first = _metered(Trial(quick(), digits), Metered())
    first.step()
    first.step()
    state = copy_of(first.state_dict())
    first.step()  # lost: it does not count
    again = Trial(quick(), digits)
    again.load_state_dict(state)
    again._meter = Metered()  # type: ignore[assignment]
    reports = _run(again)
    assert [r.row["epoch"] for r in reports if r.row] == [2, 3]
    assert [r.trial["energy_joules"] for r in reports] == [3.0 + 1.0, 3.0 + 1.0 + 2.0]


def test_a_checkpoint_from_before_energy_was_measured_can_be_read(
    quick: Quick, digits: ImageData, copy_of: Callable[[Any], Any]
) -> None:
    first = Trial(quick(), digits)
    first.step()
    state = copy_of(first.state_dict())
    del state["energy_joules"], state["energy_shared"]
    again = _metered(Trial(quick(), digits), Metered())
    again.load_state_dict(state)
    report = again.step()
    assert report.row is not None
    assert report.row["energy_joules"] == 1.0
    assert report.trial["energy_joules"] is None  # of its first part nothing is known


@pytest.mark.parametrize(
    ("share", "sliced", "shared"),
    [(None, False, False), (1.0, False, False), (2.0, False, False), (0.5, False, True), (1.0, True, True)],
)
def test_what_is_shared(
    quick: Quick,
    digits: ImageData,
    monkeypatch: pytest.MonkeyPatch,
    copy_of: Callable[[Any], Any],
    share: float | None,
    sliced: bool,
    shared: bool,
) -> None:
    monkeypatch.setattr(trial_module, "EnergyMeter", lambda _device: Metered(sliced))

    def build(config: TrialConfig, data: ImageData | None) -> Trainer:
        trainer = Trainer(config, data)
        trainer.device = CUDA  # while the trial is built; it trains on the CPU
        return trainer

    monkeypatch.setattr(trial_module, "Trainer", build)
    trial = Trial(quick(), digits, gpu_share=share)
    trial.trainer.device = torch.device("cpu")
    report = trial.step()
    assert report.trial["energy_shared"] is shared
    assert report.trial["energy_joules"] == 1.0
    monkeypatch.setattr(trial_module, "Trainer", Trainer)
    alone = Trial(quick(), digits)
    alone._found.energy_shared = False
    alone.load_state_dict(copy_of(trial.state_dict()))
    assert alone.step().trial["energy_shared"] is shared  # once shared, the sum is never one trial's again


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_real_gpu_takes_energy_while_it_works(quick: Quick, digits: ImageData) -> None:
    meter = EnergyMeter(torch.device("cuda"))
    x = torch.randn(4096, 4096, device="cuda")
    for _ in range(300):
        x = (x @ x).clamp(-1, 1)
    torch.cuda.synchronize()
    joules = meter.read()
    if joules is None:
        pytest.skip("this GPU or its driver has no energy counter")
    assert joules > 0
    reports = _run(Trial(quick(device="cuda", iterations_per_epoch=50), digits, gpu_share=0.5))
    rows = [r.row["energy_joules"] for r in reports if r.row]
    assert all(value is not None and value >= 0 for value in rows)
    assert reports[-1].trial["energy_joules"] == pytest.approx(sum(rows))
    assert reports[-1].trial["energy_shared"] is True
