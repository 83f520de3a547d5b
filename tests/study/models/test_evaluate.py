"""`mebm evaluate` on models that real trials left: which files, which rows, what is done again, what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from analysis.results.load import read_evaluations
from analysis.results.parquet import records, typed_frame, write_parquet
from analysis.results.versions import VERSION_KEY
from analysis.stats.survival.rates import wilson
from study.cli.main import cli
from study.config.errors import UserError, parse_choices
from study.display.console import StudyConsole
from study.models import evaluate as rescoring
from study.models.evaluate import Request, default_out, evaluate, find_targets, parse_outside, parse_protocols
from study.models.train import load_trial, train_one
from trainables.config.protocols import PROTOCOLS
from trainables.data.datasets import load_dataset, to_float
from trainables.evaluation.inception_scores import SCORES
from trainables.evaluation.small_features import small_extractor
from trainables.methods.presets import build_trial
from trainables.models.model_file import load_model
from trainables.networks.arithmetic import torch_threads
from trainables.results.schema import EVALUATION_COLUMNS
from trainables.training.trainer import Trainer

FIELDS = ("network=conv-4", "epochs=2", "iterations_per_epoch=6", "buffer_size=400", "device=cpu",
          "evaluation.every=1", "evaluation.fresh_steps=2")  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What `mebm train` leaves of three methods."""
    base = tmp_path_factory.mktemp("trained")
    found = {}
    for method in ("m-ebm", "m-jem", "softmax"):
        with (base / "console").open("w", encoding="utf-8") as stream:
            found[method] = base / method
            train_one(load_trial(method, FIELDS)[0], found[method], StudyConsole(stream))
    return found


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli, ["evaluate", *map(str, arguments)])


@pytest.mark.parametrize(
    "fields",
    [
        (),
        ("buffer_size=3000", "seed=7"),  # 1,000 of the buffer's images are scored
        ("buffer_size=64", "batch_size=32"),
        ("network=wrn-10-1", "norm=batch", "evaluation.batch_size=70"),
        ("method=m-jem", "evaluation.weights=ema", "ema_decay=0.5"),
        ("method=shortrun", "network=shortrun-8", "sampling_steps=3"),
        ("method=kl-ebm", "network=multiscale-8", "sampling_steps=3", "buffer_size=1100"),
        ("method=igebm", "network=igebm-8", "sampling_steps=3", "buffer_size=300"),
    ],
    ids=lambda fields: "-".join(f.partition("=")[2] for f in fields) or "plain",
)
def test_the_trials_own_numbers_come_back(tmp_path: Path, fields: tuple[str, ...]) -> None:
    """The same model under the same protocol: the same number to the digit, of the last and of the best model."""
    method = next((f.removeprefix("method=") for f in fields if f.startswith("method=")), "m-ebm")
    rest = tuple(f for f in fields if not f.startswith("method="))
    given = {f.partition("=")[0] for f in rest}
    base = tuple(f for f in FIELDS if f.partition("=")[0] not in given)
    folder = tmp_path / "run"
    with (tmp_path / "console").open("w", encoding="utf-8") as stream:
        train_one(load_trial(method, (*base, *rest))[0], folder, StudyConsole(stream))
    epochs = records(pd.read_parquet(folder / "epochs.parquet"))
    rows = []
    with torch_threads(2):  # another number than it was trained with, which the files know
        for which, path in (("all", folder), ("last", folder / "checkpoint.pt")):
            request = Request(("small-fresh", "small-buffer"))
            rows += evaluate(find_targets(path, which), request, tmp_path / f"{which}.parquet", device="cpu")
        assert torch.get_num_threads() == 2
    assert {row["model"] for row in rows} >= {"last", "checkpoint"}  # the last is the best in some, in one row then
    for row in rows:
        trained = next(e for e in epochs if e["epoch"] == row["epoch"])
        name = f"fd_{row['source']}"
        assert row["value"] == trained[name], (row["model"], name)
        if row["value"] is None:
            assert "no buffer samples" in row["remark"]
            continue
        assert row["se"] == trained[f"{name}_se"] > 0
        assert (row["low"], row["high"]) == (row["value"] - 1.96 * row["se"], row["value"] + 1.96 * row["se"])


def test_a_number_is_the_same_whatever_is_scored_beside_it(folders: dict[str, Path], tmp_path: Path) -> None:
    """Fresh samples are drawn by their number: ten thousand made first do not lend a thousand."""
    targets = find_targets(folders["m-ebm"])
    found = []
    for number, protocols in enumerate((("small-fresh",), ("kl-ebm-10k-ref", "small-fresh"))):
        rows = evaluate(targets, Request(protocols), tmp_path / f"{number}.parquet", device="cpu")
        found.append(rows[-1]["value"])
    assert found[0] == found[1]


def test_rows_of_an_earlier_version_are_taken_again(folders: dict[str, Path], tmp_path: Path) -> None:
    """They were of other draws and say no error."""
    out, targets = tmp_path / "e.parquet", find_targets(folders["m-ebm"])
    (row,) = evaluate(targets, Request(("small-fresh",)), out, device="cpu")
    old = {name: value for name, value in row.items() if name != "se"} | {"value": 0.123}
    columns = [c for c in EVALUATION_COLUMNS if c.name != "se"]
    write_parquet(typed_frame([old], columns), columns, out)
    pq.write_table(pq.read_table(out).replace_schema_metadata({VERSION_KEY: b"2"}), out)
    (again,) = evaluate(targets, Request(("small-fresh",)), out, device="cpu")
    assert again["value"] == row["value"] and again["se"] == row["se"]
    assert len(read_evaluations(out)) == 1


def test_a_row_says_what_was_scored(folders: dict[str, Path], tmp_path: Path) -> None:
    result = run(folders["m-ebm"], "-p", "small-buffer", "-p", "small-fresh", "--json", "--out", tmp_path / "e.parquet")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [(r["protocol"], r["metric"], r["source"]) for r in rows] == [
        ("small-buffer", "fd", "buffer"),
        ("small-fresh", "fd", "fresh"),
    ]
    saved = load_model(folders["m-ebm"] / "models" / "t0001.pt")
    assert rows[0]["value"] == small_extractor(load_dataset("digits")).score(saved.samples)[0]
    assert rows[0]["samples"] == 400 and "400 samples in place of 1000" in rows[0]["remark"]
    assert rows[1]["samples"] == 1000 and rows[1]["made_by"] == "2steps" and rows[1]["seed"] == saved.config.seed == 0
    assert rows[0]["protocol_digest"] == PROTOCOLS["small-buffer"].digest
    assert rows[0]["epoch"] == 2 and rows[0]["model"] == "last" and rows[0]["study"] == "m-ebm"
    shown = run(folders["m-ebm"], "-p", "small-buffer", "--out", tmp_path / "e.parquet").stdout
    assert f"{rows[0]['low']:.4g} to {rows[0]['high']:.4g}" in shown


def test_what_is_there_is_not_done_again(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "e.parquet"
    targets = find_targets(folders["m-ebm"])
    first = evaluate(targets, Request(("small-fresh",)), out, device="cpu")
    seen: list[str] = []
    again = evaluate(targets, Request(("small-fresh", "small-buffer")), out, device="cpu", on_done=seen.append)
    assert seen == ["t0001 small-fresh", "t0001 small-buffer"]
    assert again[0] == records(read_evaluations(out))[0] and again[0]["created_at"] == first[0]["created_at"]
    assert len(read_evaluations(out)) == 2
    other = evaluate(targets, Request(("small-fresh",), seed=1), out, device="cpu")
    assert other[0]["value"] != first[0]["value"] and len(read_evaluations(out)) == 3
    longer = evaluate(targets, Request(("small-fresh",), steps=4), out, device="cpu")
    assert longer[0]["made_by"] == "4steps" and longer[0]["value"] != first[0]["value"]
    assert len(read_evaluations(out)) == 4
    (default,) = evaluate(targets, Request(("small-fresh",)), out, device="cpu")
    assert default["value"] == first[0]["value"] and len(read_evaluations(out)) == 4
    same = evaluate(targets, Request(("small-fresh",)), tmp_path / "f.parquet", device="cpu")
    assert same[0]["value"] == first[0]["value"], "the same protocol and seed: the same number"


def test_hybrid_numbers(folders: dict[str, Path], tmp_path: Path) -> None:
    result = run(folders["m-jem"], "-p", "hybrid", "--outside", "digits", "--json", "--out", tmp_path / "e.parquet")
    assert result.exit_code == 0, result.output
    rows = {r["metric"]: r for r in json.loads(result.stdout)["rows"]}
    assert set(rows) == {"accuracy", "ece", "auroc_log_p_digits", "auroc_confidence_digits"}
    assert rows["auroc_log_p_digits"]["value"] == 0.5, "against itself"
    assert 0 <= rows["accuracy"]["value"] <= 1 and rows["accuracy"]["reference"].startswith("test-360-eval-norm")
    energy = run(folders["m-ebm"], "-p", "hybrid", "--outside", "digits", "--json", "--out", tmp_path / "e.parquet")
    assert [r["metric"] for r in json.loads(energy.stdout)["rows"]] == ["auroc_log_p_digits"]


def test_accuracy_under_attack_is_a_row_of_hybrid(folders: dict[str, Path], tmp_path: Path) -> None:
    told = ("-p", "hybrid", "--attack", "linf:8/255,steps=5,images=100", "--attack", "l2:0.5,steps=5", "--json")
    result = run(folders["m-jem"], *told, "--out", tmp_path / "e.parquet")
    assert result.exit_code == 0, result.output
    rows = {r["metric"]: r for r in json.loads(result.stdout)["rows"]}
    linf, l2 = rows["robust_accuracy_linf_0.0313725"], rows["robust_accuracy_l2_0.5"]
    assert linf["reference"] == "test-100-pgd-linf-0.0313725-5x0.0156863-restarts1" and linf["samples"] == 100
    assert l2["samples"] == 360 and l2["value"] <= rows["accuracy"]["value"] and l2["low"] <= l2["value"] <= l2["high"]
    told_far = ("-p", "hybrid", "--attack", "linf:1,steps=5,images=100", "--json")
    none = run(folders["m-jem"], *told_far, "--out", tmp_path / "n.parquet")
    (far,) = (r for r in json.loads(none.stdout)["rows"] if r["metric"].startswith("robust"))
    bounds = wilson(round(100 * far["value"]), 100)
    assert (far["low"], far["high"]) == pytest.approx((bounds.low, bounds.high)) and far["high"] > far["value"]
    energy = run(folders["m-ebm"], *told, "--out", tmp_path / "e.parquet")
    remarks = [r["remark"] for r in json.loads(energy.stdout)["rows"]]
    assert remarks == ["m-ebm has no trained class head to attack"] * 2
    for wrong, said in (("l1:1", "begins with 'l1'"), ("l2:0.5,steps=6", "given twice")):
        refused = run(folders["m-jem"], "-p", "hybrid", "--attack", "l2:0.5", "--attack", wrong)
        assert isinstance(refused.exception, UserError) and said in str(refused.exception)


def test_models_are_scored_on_features_of_ones_own(folders: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text("def mean():\n    return lambda images: images.float().mean((2,))[:, 0]\n")
    told = (folders["m-ebm"], "-p", "small-buffer@nets.py:mean", "--out", "e.parquet", "--json")
    result = run(*told)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [r["metric"] for r in rows] == ["fd", "mmd"] and all(r["value"] > 0 and r["se"] > 0 for r in rows)
    (name,) = {r["protocol"] for r in rows}
    assert name.startswith("small-buffer@nets.py:mean-") and all(name.partition("@")[2] in r["reference"] for r in rows)
    before = Path("e.parquet").read_bytes()
    assert run(*told).exit_code == 0 and Path("e.parquet").read_bytes() == before, "not taken twice"
    Path("nets.py").write_text("def mean():\n    return lambda images: images.float().mean((3,))[:, 0]\n")
    assert {r["protocol"] for r in json.loads(run(*told).stdout)["rows"]}.isdisjoint({name}), "other code, other number"


def test_what_cannot_be_scored_says_so(folders: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MEBM_INCEPTION_WEIGHTS", str(tmp_path / "none.pth"))
    result = run(folders["softmax"], "-p", "small-fresh", "--out", tmp_path / "e.parquet")
    assert result.exit_code == 0 and "softmax has no fresh samples" in result.stdout
    missing = run(folders["m-ebm"], "-p", "buffer-10k", "--json", "--out", tmp_path / "e.parquet")
    rows = json.loads(missing.stdout)["rows"]
    assert [(r["metric"], r["value"]) for r in rows] == [("fid", None), ("isc", None)]
    assert all("none.pth is not a file" in r["remark"] for r in rows)


def test_files_that_are_meant(folders: dict[str, Path]) -> None:
    folder = folders["m-ebm"]
    (last,), (best,) = find_targets(folder), find_targets(folder, "best")
    assert (last.model, best.model, last.trial_id, best.trial_id) == ("last", "best", "t0001", "t0001")
    assert {t.model for t in find_targets(folder, "all")} == {"last", "best"}
    (file,) = find_targets(folder / "models" / "t0001_best.pt")
    assert (file.model, file.study, file.trial_id) == ("best", "m-ebm", "t0001")
    (checkpoint,) = find_targets(folder / "checkpoint.pt")
    assert checkpoint.model == "checkpoint"
    assert default_out(folder) == folder / "evaluations.parquet" == default_out(folder / "models" / "t0001.pt")
    with pytest.raises(UserError, match="no such file"):
        find_targets(folder / "nothing")
    with pytest.raises(UserError, match="models/ holds no last model"):
        find_targets(folder / "samples")


def test_a_checkpoint_gives_what_the_model_file_gives(folders: dict[str, Path], tmp_path: Path) -> None:
    values = []
    for path in (folders["m-jem"] / "checkpoint.pt", folders["m-jem"] / "models" / "t0001.pt"):
        request = Request(("small-fresh", "hybrid"))
        rows = evaluate(find_targets(path), request, tmp_path / f"{path.stem}.parquet", device="cpu")
        values.append([r["value"] for r in rows])
    assert values[0] == values[1]


def test_mistakes_are_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    for arguments, said in (
        ((folders["m-ebm"],), "--protocol: name at least one"),
        ((folders["m-ebm"], "-p", "small-bufer"), "did you mean small-buffer"),
        ((folders["m-ebm"], "-p", "hybrid", "--metrics", "fit"), "did you mean fid"),
        ((folders["m-ebm"], "-p", "hybrid", "--outside", "svhn"), "give NAME=FOLDER"),
    ):
        result = run(*arguments)
        assert isinstance(result.exception, UserError) and said in str(result.exception)
    damaged = tmp_path / "models" / "t0001.pt"
    damaged.parent.mkdir()
    damaged.write_bytes((folders["m-ebm"] / "models" / "t0001.pt").read_bytes()[:500])
    with pytest.raises(UserError, match="damaged"):
        evaluate(find_targets(damaged), Request(("small-buffer",)), tmp_path / "e.parquet", device="cpu")
    assert not (tmp_path / "e.parquet").exists()
    assert parse_protocols(["hybrid", "hybrid"]) == ("hybrid",) and parse_choices(
        "--metrics", "fid, kid,fid", SCORES
    ) == ("fid", "kid")
    assert parse_outside(["cifar100", f"mine={tmp_path}"]) == (("cifar100", None), ("mine", str(tmp_path)))


def test_the_confident_part_is_chosen_by_class(folders: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    """paper-mjem keeps a tenth of each predicted class of the truncated samples."""
    seen: list[torch.Tensor] = []

    class Network:
        id = "n"

        def features(self, images: torch.Tensor, device: torch.device) -> Any:
            seen.append(images)
            raise rescoring.NoFeaturesError("seen")

    monkeypatch.setattr(rescoring, "inception", lambda resize: Network())
    evaluate(find_targets(folders["m-jem"]), Request(("paper-mjem",)), tmp_path / "e.parquet", device="cpu")
    saved = load_model(folders["m-jem"] / "models" / "t0001.pt")
    assert saved.truncated is not None
    difference = saved.samples.int() - saved.truncated.int()
    assert set(difference.unique().tolist()) == {0, 1}
    with torch.no_grad():
        predicted = saved.model.logits(to_float(saved.truncated)).argmax(1)
    assert len(seen[0]) == sum(int(n * 0.1) for n in predicted.bincount().tolist())
    rows = {image.numpy().tobytes() for image in saved.truncated}
    assert {image.numpy().tobytes() for image in seen[0]} <= rows


@pytest.mark.parametrize("name", ["paper-mjem", "buffer-all"])
def test_what_inception_would_see_is_what_training_showed_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The same images in the same order: all of a buffer larger than a file holds by default, and the confident ones.

    Their confidence was taken before they were 8-bit, so it is in the file.
    """
    from trainables.evaluation.scores import choose
    from trainables.models import model_file as saved

    monkeypatch.setattr(saved, "SAMPLES", 100)
    monkeypatch.setenv("MEBM_INCEPTION_WEIGHTS", str(tmp_path / "none.pth"))
    values = {"network": "conv-4", "epochs": 1, "iterations_per_epoch": 6, "buffer_size": 400, "device": "cpu"}
    trainer = Trainer(build_trial({"method": "m-jem", "evaluation": {"protocols": (name,)}} | values))
    trainer.train_epoch()
    wanted = choose(PROTOCOLS[name], trainer.sample_pool(None), trainer.model, 100)
    assert wanted is not None
    assert len(wanted) == 400 if name == "buffer-all" else len(wanted) < 60
    path = tmp_path / "models" / "t0001.pt"
    path.parent.mkdir()
    torch.save(saved.model_state(trainer), path)
    (target,) = find_targets(path)
    images, remark = rescoring._Scorer(target, Request((name,)), torch.device("cpu"))._images(PROTOCOLS[name])
    assert torch.equal(images, wanted) and remark is None
    state = torch.load(path, weights_only=True)
    state |= {"samples": state["samples"][:100], "truncated": state["truncated"][:100]}
    if "confidence" in state:
        state["predicted"] = state["predicted"] + 10**15
        torch.save(state, path)
        with pytest.raises(ValueError, match="the confidence of its samples"):
            load_model(path)
        del state["confidence"], state["predicted"]
    torch.save(state, path)  # as an earlier version left it
    _, remark = rescoring._Scorer(target, Request((name,)), torch.device("cpu"))._images(PROTOCOLS[name])
    assert remark is not None and "100 of the buffer's 400 samples are in the file" in remark
