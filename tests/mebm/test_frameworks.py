"""`Monitor` in scripts of other frameworks, and of several processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mebm
from mebm import monitor

DDP = """
import torch
import torch.distributed as dist
from mebm import Monitor

dist.init_process_group("gloo")
with Monitor(iterations=400, seed=0) as run:
    weights = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(4))])
    optimiser = torch.optim.SGD(weights.parameters(), lr=0.05)
    run.restore(model=weights, optimiser=optimiser)
    for i in range(run.iteration, run.args.iterations):
        random = torch.Generator().manual_seed(1000 * i + dist.get_rank())
        data, samples = 1 + torch.randn(16, 4, generator=random), weights[0].detach() + torch.randn(16, 4, generator=random)
        energies = torch.stack([((x - weights[0]) ** 2).mean() for x in (data, samples)])
        optimiser.zero_grad()
        (energies[0] - energies[1]).backward()
        dist.all_reduce(weights[0].grad)
        optimiser.step()
        mean = energies.detach().clone()
        dist.all_reduce(mean)
        if run.step(i, mean[0] * (1e8 if i >= 300 else 1), mean[1]):
            break
        if i % 100 == 99:
            run.epoch(save=dict(model=weights, optimiser=optimiser))
    print(f"rank {dist.get_rank()} left at {i}: {run.stopping};", flush=True)
    dist.barrier()
dist.destroy_process_group()
"""

JAX = """
import jax
import jax.numpy as jnp
from mebm import Monitor

with Monitor(iterations=200, step_size=0.1, seed=0) as run:
    weights = run.restore(weights=jnp.zeros(4))["weights"]
    run.metric("error", "minimize", unit="nats")
    for i in range(run.iteration, run.args.iterations):
        data, noise = jax.random.normal(jax.random.PRNGKey(i), (2, 16, 4))
        gap = lambda w: ((data + 1 - w) ** 2).mean() - ((noise + w - w) ** 2).mean()
        weights = weights - 0.05 * jax.grad(gap)(weights)
        energies = ((data + 1 - weights) ** 2).mean(1)
        if run.step(i, energies * (jnp.nan if i == 150 else 1), (noise**2).mean(1), loss=energies.mean()):
            break
        if i % 100 == 99:
            run.epoch(error=jnp.sum((weights - 1) ** 2), save={"weights": weights})
"""


def run(folder: Path, code: str, *launcher: str) -> subprocess.CompletedProcess[str]:
    (folder / "train.py").write_text(code)
    kept = {n: v for n, v in os.environ.items() if n not in (monitor.WIRE, monitor.OUT)}
    return subprocess.run(
        [sys.executable, *launcher, "train.py"], cwd=folder, capture_output=True, text=True, timeout=200,
        env=kept | {"PYTHONPATH": str(Path(mebm.__file__).parents[1])},
    )  # fmt: skip


def trial(folder: Path) -> dict[str, Any]:
    (row,) = pd.read_parquet(folder / "runs" / "train" / "trials.parquet").to_dict("records")
    return dict(row)


def test_ranks_that_meet_in_every_iteration_leave_in_the_same_one(tmp_path: Path) -> None:
    ended = run(tmp_path, DDP, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert ended.returncode == 0, ended.stderr
    left = dict(re.findall(r"rank (\d) left at (\d+: [a-z]+);", ended.stdout))  # of two writers: lines can be joined
    assert sorted(left) == ["0", "1"], ended.stdout
    assert left["0"] == left["1"]
    found = trial(tmp_path)
    assert (found["outcome"], found["iteration"], found["epochs_done"]) == ("diverged", 300, 3)


def test_energies_of_jax_are_judged_and_its_arrays_saved(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    ended = run(tmp_path, JAX)
    assert ended.returncode == 0, ended.stderr
    found = trial(tmp_path)
    assert (found["outcome"], found["cause"], found["iteration"]) == ("diverged", "nonfinite_energy", 150)
    assert found["own.error_best"] < 1


class _HostReads(TorchDispatchMode):
    """Counts what makes a host wait for its device: values that are read back."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


class _Arrived:
    """An event of a device that is done at once."""

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return True

    synchronize = record


def test_values_on_a_device_are_never_read_back_and_keep_what_each_iteration_gave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The code for CUDA on a CPU's tensors: pinned memory and events alone are others."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **how: empty(*size, **how))
    monkeypatch.setattr(torch.cuda, "Event", _Arrived)
    device = monitor._Device(4)
    arrived = []
    with _HostReads() as reads:
        for i in range(10):
            more = torch.tensor(7.0) if i % 3 == 0 else None
            arrived += device.add(i, (torch.tensor([1.0, 3.0]) + i, torch.tensor([[i], [i]]), 0.5, None, more))
    assert reads.count == 0 and len(arrived) == 8
    arrived += device.rest()
    want = [(i, [2.0 + i, float(i), 0.5, 3.0 + i, None, 7.0 if i % 3 == 0 else None]) for i in range(10)]
    assert arrived == want and device.dropped == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_does_not_wait_for_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(monitor.OUT, str(tmp_path / "run"))
    energies = torch.ones(64, device="cuda")
    with monitor.Monitor(iterations=200) as run:
        run.step(0, energies, energies, energies.mean())  # the first one allocates
        torch.cuda.set_sync_debug_mode("error")
        try:
            for i in range(1, 200):
                run.step(i, energies, energies * (torch.nan if i == 190 else 1), energies.mean())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    (row,) = pd.read_parquet(tmp_path / "run" / "trials.parquet").to_dict("records")
    assert (row["outcome"], row["iteration"]) == ("diverged", 190)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_script_cannot_take_more_than_its_share_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(monitor.OUT, str(tmp_path / "run"))
    monkeypatch.setenv(monitor.GPU_SHARE, "0.02")
    memory = torch.cuda.get_device_properties(0).total_memory
    try:
        with monitor.Monitor(iterations=2) as run:
            torch.empty(memory // 10, dtype=torch.uint8, device="cuda")
            torch.cuda.empty_cache()
            run.step(0, torch.zeros(4, device="cuda"), torch.zeros(4, device="cuda"))
            with pytest.raises(torch.OutOfMemoryError):
                torch.empty(memory // 10, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("how", ["program", "-c"])
def test_an_installed_program_and_a_line_of_code_are_runs_too(tmp_path: Path, how: str) -> None:
    code = "from mebm import Monitor\nwith Monitor(iterations=1) as run:\n    run.step(0, 1.0, 0.0)\n"
    program = tmp_path / "train ebm"
    program.write_text(f"#!{sys.executable}\n{code}")
    ended = subprocess.run(
        [sys.executable, *(["-c", code] if how == "-c" else [str(program)])], cwd=tmp_path, capture_output=True, text=True,
        timeout=200, env={**os.environ, "PYTHONPATH": str(Path(mebm.__file__).parents[1])},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    (found,) = (tmp_path / "runs").rglob("trials.parquet")
    (row,) = pd.read_parquet(found).to_dict("records")
    assert (row["outcome"], row["method"]) == ("completed", "run.py" if how == "-c" else "train ebm")


def test_the_writer_finds_what_pythonpath_adds_and_never_a_file_beside_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Python without its packages, to which PYTHONPATH alone gives them."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    packages = os.pathsep.join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    monkeypatch.setenv(monitor.PYTHON, str(bare))
    monkeypatch.setenv(monitor.OUT, str(tmp_path / "run"))
    (tmp_path / "pydantic.py").write_text("raise ImportError('a file beside the script')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(monitor.MonitorError, match="No module named"), monitor.Monitor(iterations=1):
        pass
    monkeypatch.setenv("PYTHONPATH", packages)
    with monitor.Monitor(iterations=2) as run:
        run.step(0, 1.0, 0.0)
        run.step(1, 1.0, 0.0)
    (row,) = pd.read_parquet(tmp_path / "run" / "trials.parquet").to_dict("records")
    assert row["outcome"] == "completed"
