"""`resources: auto`: how many trials share a GPU, and what it becomes without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.results.parquet import typed_frame, write_parquet
from study.config.load import validate_study
from study.config.study import ResourcesConfig, StudyConfig
from study.estimate.resources import (
    CONTEXT_BYTES,
    SLACK,
    Gpu,
    benches_beside,
    host_memory,
    image_shape,
    resolve_resources,
    seconds_per_iteration,
    trials_per_gpu,
)
from study.run.allocation import bundle_of, concurrency, placement
from trainables.config.trial import TrialConfig
from trainables.methods.presets import build_trial
from trainables.results.layout import BENCH_FILE
from trainables.results.schema import BENCH_COLUMNS
from trainables.training.cost import EXTRACTOR_BYTES, USABLE, memory
from trainables.trial.ray_trainable import MebmTrainable

LARGE = Gpu(140 * 2**30, 400e12)


def of(resources: Any, **trial: Any) -> StudyConfig:
    return validate_study(
        {
            "name": "s",
            "trial": {"method": "m-ebm", **trial},
            "search": {"sampler": "grid", "grid": [{"sampling_steps": [1, 5]}]},
            "resources": resources,
        },
        "s",
    )


def packed(gpu: Gpu, **fields: Any) -> int:
    return trials_per_gpu(build_trial({"method": "m-ebm", "dataset": "cifar10", **fields}), gpu)


def test_a_large_network_has_a_gpu_of_its_own_and_small_ones_share() -> None:
    assert packed(LARGE, precision="tf32") == 1
    assert (
        packed(LARGE, network="wrn-16-1", precision="bf16") > packed(LARGE, network="wrn-28-2", precision="tf32") >= 2
    )
    assert packed(LARGE, network="wrn-10-1", precision="bf16") <= 8


def test_graphs_share_a_gpu_under_mps_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    fields = {"network": "wrn-16-1", "precision": "bf16", "execution": "graphed"}
    assert packed(LARGE, **fields) == 1 < packed(LARGE, **fields | {"execution": "eager"})
    (tmp_path / "control").touch()
    assert packed(LARGE, **fields) > 1


def test_a_small_networks_iteration_takes_its_layers_time() -> None:
    """M-EBM at K = 5, WRN-16-2, bf16, graphed: 9.3 ms on an H100; of WRN-28-10 the arithmetic decides."""
    fields = {"method": "m-ebm", "dataset": "cifar10", "precision": "bf16", "execution": "graphed", "sampling_steps": 5}
    small, large = (build_trial(fields | {"network": name}) for name in ("wrn-16-2", "wrn-28-10"))
    assert seconds_per_iteration(small, 400e12) == pytest.approx(9.3e-3, rel=0.1)
    assert seconds_per_iteration(small, 800e12) == seconds_per_iteration(small, 400e12)
    assert seconds_per_iteration(large, 400e12) == pytest.approx(seconds_per_iteration(large, 200e12) / 2)


def test_memory_limits_how_many_share() -> None:
    config = build_trial({"method": "m-ebm", "dataset": "cifar10", "network": "wrn-16-1", "precision": "bf16"})
    one = SLACK * memory(config, (3, 32, 32), 10, 50_000).total + CONTEXT_BYTES
    assert trials_per_gpu(config, Gpu(int(2.1 * one / USABLE), 400e12)) == 2
    assert trials_per_gpu(config, Gpu(int(1.9 * one / USABLE), 400e12)) == 1
    assert trials_per_gpu(config, Gpu(int(one / 2), 400e12)) == 1, "a GPU even where the estimate does not fit"


@pytest.mark.parametrize("execution", ["eager", "compiled-graphed"])
@pytest.mark.parametrize("network", ["wrn-10-1", "wrn-16-4", "wrn-28-10"])
@pytest.mark.parametrize("memory_gb", [16, 40, 80, 141])
def test_what_shares_a_gpu_stays_within_its_limits(execution: str, network: str, memory_gb: int) -> None:
    """Each trial within the limit of its share, and all of them with their contexts within the device."""
    fields = {"method": "m-ebm", "dataset": "cifar10", "network": network, "execution": execution}
    config, gpu = build_trial(fields), Gpu(memory_gb * 2**30, 400e12)
    count = trials_per_gpu(config, gpu)
    needed = memory(config, (3, 32, 32), 10, 50_000).total
    assert count == 1 or needed * SLACK <= USABLE * gpu.memory / count
    assert count == 1 or count * (needed + CONTEXT_BYTES) <= gpu.memory


def _row(config: TrialConfig, peak: int | None, **fields: Any) -> dict[str, Any]:
    row = {column.name: None for column in BENCH_COLUMNS} | {
        "implementation": "package", "execution": "eager", "device": "cuda", "hardware": "NVIDIA H100 80GB HBM3",
        "peak_memory_bytes": peak, "config": config.to_json(),
    }  # fmt: skip
    return row | fields


def test_measured_memory_goes_before_the_estimate() -> None:
    """Of the same numerics and batches on such a device, whatever its K and its buffer's size; Inception comes to it."""
    fields = {"method": "m-ebm", "dataset": "cifar10", "network": "wrn-16-1", "precision": "bf16", "buffer_size": 2000}
    config, gpu = build_trial(fields), Gpu(40 * 2**30, 400e12, "NVIDIA H100 80GB HBM3")
    assert trials_per_gpu(config, gpu) > 2
    other = config.model_copy(update={"sampling_steps": 9, "buffer_size": 10_000})
    large = 14 * 2**30 + memory(other, (3, 32, 32), 10, 50_000).held
    assert trials_per_gpu(config, gpu, [_row(other, large), _row(config, 2**30)]) == 2, "the most that was measured"
    unlike = [
        _row(config.model_copy(update={"batch_size": 128}), large),
        _row(config, large, hardware="NVIDIA A100"),
        _row(config, large, implementation="released-loop"),
        _row(config, large, execution="graphed"),
        _row(config, None),
    ]
    for row in unlike:
        assert trials_per_gpu(config, gpu, [row]) == trials_per_gpu(config, gpu)
    scored = memory(config, (3, 32, 32), 10, 50_000)
    tight = Gpu(int(2.1 * (SLACK * (scored.held + EXTRACTOR_BYTES) + CONTEXT_BYTES) / USABLE), 400e12, gpu.name)
    assert trials_per_gpu(config, tight, [_row(config, 1)]) == 2, "a small training leaves what the scoring needs"


def test_images_that_are_scaled_count_at_their_scaled_size() -> None:
    known = build_trial({"method": "m-ebm", "dataset": "celeba_hq_128", "data_dir": "faces"})
    assert image_shape(known) == ((3, 128, 128), 1)
    assert image_shape(known.model_copy(update={"image_size": 64})) == ((3, 64, 64), 1)
    assert image_shape(known.model_copy(update={"dataset": "own", "image_size": 48})) == ((3, 48, 48), 10)
    assert image_shape(known.model_copy(update={"dataset": "own"})) == ((3, 32, 32), 10)


def test_benches_are_found_beside_a_study(tmp_path: Path) -> None:
    config = build_trial({"method": "m-ebm", "dataset": "cifar10"})
    rows = [_row(config, peak, row_id=f"r{peak}") for peak in (1, 2)]
    assert benches_beside(tmp_path / "study") == []
    for name in ("bench", "damaged"):
        (tmp_path / name).mkdir()
    write_parquet(typed_frame(rows, BENCH_COLUMNS), BENCH_COLUMNS, tmp_path / "bench" / BENCH_FILE)
    (tmp_path / "damaged" / BENCH_FILE).write_bytes(b"PAR1")
    assert [r["peak_memory_bytes"] for r in benches_beside(tmp_path / "study")] == [1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_share_of_a_gpu_is_a_limit(tmp_path: Path) -> None:
    trial = build_trial({"evaluation": {"protocols": "none"}, "device": "cuda"})
    trainable = MebmTrainable.__new__(MebmTrainable)
    try:
        trainable.setup({
            "trial": trial.to_json(), "trial_id": "t1", "folder": str(tmp_path), "cpus": 1, "gpus": 0.25,
            "checkpoint_seconds": 0,
        })  # fmt: skip
        assert torch.cuda.get_per_process_memory_fraction() == pytest.approx(0.25 * USABLE)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(int(0.24 * torch.cuda.get_device_properties(0).total_memory), dtype=torch.uint8, device="cuda")
        trainable.cleanup()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_without_gpus_a_trial_gets_a_cpu() -> None:
    study = of("auto")
    assert study.resources == ResourcesConfig(cpus="auto", gpus="auto")
    settled = resolve_resources(study, {"CPU": 8.0})
    assert (settled.cpus, settled.gpus) == (1.0, 0.0)


def test_gpus_that_cannot_be_looked_at_are_not_shared() -> None:
    """Nodes with GPUs, a driver without."""
    study = of("auto", dataset="cifar10")
    settled = resolve_resources(study, {"CPU": 64.0, "GPU": 8.0})
    assert (settled.cpus, settled.gpus) == (4.0, 1.0)
    few = resolve_resources(study, {"CPU": 6.0, "GPU": 4.0})
    assert (few.cpus, few.gpus) == (1.0, 1.0)


@pytest.mark.parametrize("memory", [8, 140])
def test_the_neediest_trial_of_a_study_decides(monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    gpu = Gpu(memory * 2**30, 400e12)
    monkeypatch.setattr("study.estimate.resources.local_gpu", lambda: gpu)  # no GPU here to look at
    study = of({"cpus": 2, "gpus": "auto"}, dataset="cifar10", network="wrn-16-1", precision="bf16")
    settled = resolve_resources(study, {"CPU": 16.0, "GPU": 2.0})
    fewest = min(packed(gpu, network="wrn-16-1", precision="bf16", sampling_steps=k) for k in (1, 5))
    assert settled.cpus == 2 and settled.gpus == 1 / fewest
    assert concurrency(None, {"CPU": 16.0, "GPU": 2.0}, 2.0, 1 / fewest) == min(8, 2 * fewest)


def test_what_is_given_stays() -> None:
    study = of({"cpus": 3, "gpus": 0.5})
    settled = resolve_resources(study, {"CPU": 8.0, "GPU": 1.0})
    assert (settled.cpus, settled.gpus) == (3, 0.5)


def test_host_memory_is_asked_of_a_node_and_limits_how_many_run() -> None:
    study = of({"cpus": 1, "memory_gb": 3})
    assert bundle_of(study, 1.0, 0.0) == {"CPU": 1.0, "GPU": 0.0, "memory": 3e9}
    assert placement(study, 1.0, 0.0).bundles[0]["memory"] == 3e9
    assert concurrency(None, {"CPU": 16.0, "memory": 10e9}, 1.0, 0.0, 3e9) == 3
    assert concurrency(None, {"CPU": 2.0, "memory": 10e9}, 1.0, 0.0, 3e9) == 2
    assert "memory" not in bundle_of(of({"cpus": 1}), 1.0, 0.0)


@pytest.mark.parametrize("value", ["-1", "0", ".inf", ".nan", "much", "1e400", "[1]"])
def test_a_limit_of_memory_is_a_positive_number(mebm: Any, tmp_path: Path, value: str) -> None:
    code, _, err = mebm("sweep", "quickstart", "--results", tmp_path, "--set", f"resources.memory_gb={value}")
    assert code == 2
    assert "resources.memory_gb" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_more_memory_than_the_machine_has_is_a_mistake_before_anything_starts(
    mebm: Any, tmp_path: Path, more: tuple[str, ...]
) -> None:
    options = ["--results", tmp_path, "--set", "resources.memory_gb=1000000", *more]
    code, _, err = mebm("sweep", "quickstart", *options)
    assert code == 2
    there = host_memory() / 1e9
    assert err == f"mebm: resources.memory_gb = 1e+06: this machine has {there:.3g} GB\n"
    assert not list(tmp_path.iterdir())


def test_a_dry_run_tells_of_the_limit(mebm: Any) -> None:
    code, out, _ = mebm("sweep", "quickstart", "--dry-run", "--set", "resources.memory_gb=1.5")
    assert code == 0
    assert "1 CPU, 0 GPUs, 1.5 GB of memory at most per trial" in out


def test_a_container_has_the_memory_it_is_allowed(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    assert host_memory(limit) == host_memory(tmp_path / "none") > 2**28
    limit.write_text("max\n")
    assert host_memory(limit) > 2**28
    limit.write_text("1000000\n")
    assert host_memory(limit) == 1_000_000
