"""`mebm diagnose`: chains of a trained model, longer than in training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from analysis.results.load import read_diagnosis
from study.models.diagnose import recorded_steps
from trainables.models.samples import initial_of, load_any
from trainables.sampling.langevin import Langevin
from trainables.training.device import derive_seed


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from click.testing import CliRunner

    from study.cli.main import cli

    folder = tmp_path_factory.mktemp("trained") / "run"
    fields = (
        "network=conv-4",
        "epochs=1",
        "iterations_per_epoch=4",
        "buffer_size=100",
        "sampling_steps=3",
        "device=cpu",
    )
    sets = [word for field in (*fields, "evaluation.protocols=none") for word in ("--set", field)]
    assert CliRunner().invoke(cli, ["train", "m-ebm", *sets, "--out", str(folder)]).exit_code == 0
    return folder


def test_the_ladder_has_the_k_of_training_and_the_end() -> None:
    assert recorded_steps(120, 7) == [0, 1, 2, 5, 7, 10, 20, 50, 100, 120]
    assert recorded_steps(3, 7) == [0, 1, 2, 3]


def test_chains_are_the_samplers_and_rows_replace_their_own(trained: Path, run_mebm) -> None:
    told = ("diagnose", trained, "--steps", 12, "--chains", 50, "--device", "cpu")
    code, text, err = run_mebm(*told, "--json")
    assert code == 0, err
    rows = json.loads(text)["rows"]
    assert [r["step"] for r in rows if r["start"] == "p0"] == [0, 1, 2, 3, 5, 10, 12]
    assert rows[0]["moved"] == 0 and all(r["fd_se"] is not None for r in rows)
    # The ends, by the sampler alone: without batch norm a chain does not depend on its batch.
    saved = load_any(trained)
    random = torch.Generator().manual_seed(derive_seed(0, "diagnose p0"))
    x = initial_of(saved).sample(50, random)
    end = Langevin.of(saved.config).run(saved.model.energy, x, 12, random)
    with torch.no_grad():
        assert rows[6]["energy_mean"] == pytest.approx(float(saved.model.energy(end).mean()), rel=1e-5)
    moved = float(((end - x) ** 2).mean() ** 0.5)
    assert rows[6]["moved"] == pytest.approx(moved, rel=1e-5)
    code, shown, _ = run_mebm(*told, "--start", "data")
    assert code == 0 and "chains from data" in shown
    assert len(read_diagnosis(trained / "diagnosis.parquet")) == len(rows)


def test_what_cannot_be_is_one_line(trained: Path, tmp_path: Path, run_mebm) -> None:
    for more, said in (
        (("--start", "buffer", "--chains", 500), "expected --chains at most that"),
        (("--start", "noise"), "'noise'"),
        (("--best",), "best"),
        (("--steps", 0), "--steps"),
    ):
        path = trained / "checkpoint.pt" if more[0] == "--best" else trained
        code, _, err = run_mebm("diagnose", path, *more)
        assert code == 2 and said in err and err.count("\n") == 1, err


def test_samples_that_are_no_single_chains_are_refused(tmp_path: Path, run_mebm) -> None:
    """Six levels of a diffusion, or networks of several sides, have no chain that could go on."""
    short = ("epochs=1", "iterations_per_epoch=1", "batch_size=4", "sampling_steps=1", "evaluation.protocols=none")
    for method, network in (("diffurecov", "diffurecov-2-1"), ("cf-ebm", "cfebm-1")):
        sets = [word for field in (*short, f"network={network}", "device=cpu") for word in ("--set", field)]
        assert run_mebm("train", method, *sets, "--out", tmp_path / method)[0] == 0
        code, _, err = run_mebm("diagnose", tmp_path / method, "--steps", 3)
        assert code == 2 and "not single chains" in err and err.count("\n") == 1, err
