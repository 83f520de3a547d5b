"""`mebm figures` on really trained small models: every kind, labels bound to their images, mistakes, and the report."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from analysis.figures.export import figure_drawings
from analysis.figures.models.index import KINDS, read_index
from analysis.results.load import load
from analysis.results.parquet import write_parquet
from study.cli.main import cli
from trainables.data.datasets import load_dataset, to_float
from trainables.evaluation.scores import frozen_statistics
from trainables.models.model_file import load_model
from trainables.models.views import data_images, initial_draws, load_initial
from trainables.results.schema import TRIAL_COLUMNS

QUICK = (
    "epochs=2",
    "iterations_per_epoch=30",
    "batch_size=32",
    "buffer_size=400",
    "sampling_steps=2",
    "device=cpu",
    "evaluation.every=1",
    "evaluation.fresh_steps=2",
)


@pytest.fixture(scope="session")
def trained(run_mebm, tmp_path_factory):
    """Folders of finished trials: m-jem with batch norm, m-ebm, and an m-ebm of another width."""
    torch.set_num_threads(1)  # the fixture that sees to it is a test's own and comes later
    folder = tmp_path_factory.mktemp("trained")
    settings = {
        "m-jem": ("m-jem", "norm=batch"),
        "m-ebm": ("m-ebm", "norm=batch"),
        "wide": ("m-ebm", "network=conv-8"),
    }
    for name, (method, own) in settings.items():
        options = [part for value in (*QUICK, own) for part in ("--set", value)]
        code, out, err = run_mebm("train", method, *options, "--out", folder / name)
        assert (code, err) == (0, ""), out
        assert (folder / name / "models" / "t0001.pt").is_file()
    return folder


@pytest.fixture(scope="session")
def shown(run_mebm, trained):
    """Everything that can be shown of the m-jem, and what the command said."""
    code, out, err = run_mebm("figures", trained / "m-jem", "--points", 150)
    assert (code, err) == (0, "")
    return trained / "m-jem" / "figures", out


@pytest.fixture
def copied(trained, tmp_path):
    return Path(shutil.copytree(trained / "m-jem", tmp_path / "m-jem", ignore=shutil.ignore_patterns("figures")))


def test_every_kind_is_made_and_indexed(shown):
    folder, out = shown
    made = read_index(folder)
    assert [e.kind for e in made] == ["samples", "classes", "histogram", "centres", "tsne", "tsne", "curves"]
    assert {e.kind for e in made} == set(KINDS)
    for exhibit in made:
        assert (folder / exhibit.data).is_file()
        for file in exhibit.files:
            assert (folder / file).stat().st_size > 0
        assert str(folder / exhibit.files[0]) in out
    assert "not made" not in out
    listed = {file for e in made for file in [*e.files, e.data]} | {"figures.json", "plotly.min.js"}
    listed |= {e.page.replace(".html", ".json") for e in made if e.page}
    drawn = [d.name for d in figure_drawings(load(folder.parent)) if d.name != "quality_over_epochs"]
    assert {"anytime_fd_buffer", "training"} <= set(drawn)
    listed |= {f"{name}.{kind}" for name in drawn for kind in ("html", "json", "parquet")}
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == listed
    classes = next(e for e in made if e.kind == "classes")
    assert [p.label for p in classes.pictures[:5]] == [
        "samples", "highest p(x)", "lowest p(x)", "highest p(y|x)", "lowest p(y|x)",
    ]  # fmt: skip
    assert "log-sum-exp of the class logits" in classes.caption
    assert "replay buffer" in classes.caption


def test_panels_show_the_images_their_table_names(shown, trained):
    folder, _ = shown
    saved = load_model(trained / "m-jem" / "models" / "t0001.pt")
    cells = pd.read_parquet(folder / "classes.parquet")
    with torch.no_grad():
        logits = saved.model.logits(to_float(saved.samples)).double()
    for panel, value, sign in (
        ("highest_px", logits.logsumexp(1), -1),
        ("lowest_px", logits.logsumexp(1), 1),
        ("highest_pyx", logits.softmax(1).amax(1), -1),
        ("lowest_pyx", logits.softmax(1).amax(1), 1),
    ):
        for label, part in cells[cells["panel"] == panel].groupby("class"):
            members = (logits.argmax(1) == label).nonzero().squeeze(1)
            best = (sign * value[members]).sort()[0][:100] * sign
            chosen = part.sort_values("rank")["index"].to_numpy()
            np.testing.assert_allclose(value[torch.from_numpy(chosen.copy())].numpy(), best.numpy(), rtol=1e-4)
    first = cells[(cells["panel"] == "highest_px") & (cells["class"] == 3)].sort_values("rank").iloc[0]
    with Image.open(folder / "t0001" / "class_3_highest_px.png") as picture:
        pixels = np.asarray(picture.resize((91, 91), Image.Resampling.NEAREST))
    assert np.array_equal(pixels[1:9, 1:9], saved.samples[first["index"], 0].numpy())
    with Image.open(folder / "t0001" / "samples.png") as picture:
        pixels = np.asarray(picture.resize((73, 73), Image.Resampling.NEAREST))
    assert np.array_equal(pixels[10:18, 1:9], saved.samples[8, 0].numpy())


def test_points_carry_the_label_of_their_images(shown, trained):
    """Fails where x- and x0 are swapped, as in the released script (eval_maebm.py:532-543)."""
    folder, _ = shown
    points = pd.read_parquet(folder / "tsne.parquet")
    assert points.groupby("set").size().to_dict() == {"x+": 150, "x-": 150, "x0": 150}
    saved = load_model(trained / "m-jem" / "models" / "t0001.pt")
    data = load_dataset("digits")
    initial = load_initial(saved, data)
    images, numbers = data_images(data.images, 150)
    sets = {"x+": to_float(images), "x-": to_float(saved.samples[:150]), "x0": initial_draws(initial, 150)}
    found = {}
    with frozen_statistics(saved.model), torch.no_grad():
        for name, x in sets.items():
            expected = torch.cat([saved.model.energy(x[:100]), saved.model.energy(x[100:])]).numpy()
            found[name] = points[points["set"] == name]["energy"].to_numpy()
            np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5)
    assert np.abs(found["x-"] - found["x0"]).max() > 0.01
    assert points[points["set"] == "x+"]["index"].tolist() == numbers.tolist()


def test_histogram_and_centre_hold_what_they_say(shown, trained):
    folder, _ = shown
    scores = pd.read_parquet(folder / "histogram.parquet")
    data = load_dataset("digits")
    assert scores.groupby("images").size().to_dict() == {"samples": 400, "test": len(data.test_images)}
    assert scores[scores["images"] == "test"]["class"].tolist() == data.test_labels.tolist()
    assert set(scores["log_p_kind"]) == {"logsumexp"}
    centre = pd.read_parquet(folder / "centres.parquet").sort_values(["channel", "row", "column"])["value"].to_numpy()
    np.testing.assert_allclose(centre, to_float(data.images).mean(0).flatten().numpy(), atol=1e-5)


def test_models_of_one_p0_share_its_centre(mebm, trained, tmp_path):
    assert mebm("figures", trained / "m-ebm", trained / "m-jem", "--kind", "centres", "--out", tmp_path)[0] == 0
    (exhibit,) = read_index(tmp_path)
    assert exhibit.title == "Centre of p0: m-ebm, m-jem"
    assert "p0 is gaussian, of digits: its mean; m-ebm/t0001, m-jem/t0001." in exhibit.caption


def test_models_of_equal_features_share_an_embedding(mebm, trained, tmp_path):
    code, out, _ = mebm(
        "figures",
        trained / "m-ebm",
        trained / "m-jem",
        trained / "wide",
        "--kind",
        "tsne",
        "--points",
        20,
        "--out",
        tmp_path,
    )
    assert code == 0
    points = pd.read_parquet(tmp_path / "tsne.parquet")
    found = points.groupby("embedding")[["model", "features"]].agg(lambda c: sorted(set(c)))
    assert found["features"].tolist() == [[64], [32]]
    assert found["model"].tolist() == [["m-ebm m-ebm/t0001", "m-jem"], ["m-ebm wide/t0001"]]
    assert "features of unequal number have an embedding of their own (64: m-ebm m-ebm/t0001, m-jem; 32:" in out
    assert {p.name for p in tmp_path.glob("*.html")} == {"tsne.html", "energies.html", "tsne_1.html", "energies_1.html"}


def test_a_model_without_a_trained_class_head_is_shown_by_its_energy(mebm, trained, tmp_path):
    arguments = ("figures", trained / "m-ebm", "--kind", "classes", "--kind", "samples", "--out", tmp_path)
    assert mebm(*arguments)[0] == 0
    samples, classes = read_index(tmp_path)
    assert [p.label for p in samples.pictures] == ["samples"]
    assert [p.label for p in classes.pictures] == ["samples", "highest p(x)", "lowest p(x)"]
    assert "minus the energy" in classes.caption
    assert set(pd.read_parquet(tmp_path / "classes.parquet")["log_p_kind"]) == {"energy"}
    code, _, err = mebm(*arguments, "--log-p", "logsumexp")
    assert code == 2
    assert "no figure of kind classes: classes of m-ebm: log p(x) from class logits needs a trained class head" in err


def test_log_p_by_choice(mebm, trained, tmp_path):
    assert mebm("figures", trained / "m-jem", "--kind", "histogram", "--log-p", "energy", "--out", tmp_path)[0] == 0
    (exhibit,) = read_index(tmp_path)
    assert "minus the energy" in exhibit.caption
    scores = pd.read_parquet(tmp_path / "histogram.parquet").query("images == 'samples'")
    saved = load_model(trained / "m-jem" / "models" / "t0001.pt")
    with torch.no_grad():
        np.testing.assert_allclose(scores["log_p"], -saved.model.energy(to_float(saved.samples)), rtol=1e-3, atol=1e-4)


def test_a_kind_is_replaced_and_the_others_stay(mebm, copied):
    assert mebm("figures", copied, "--kind", "samples", "--kind", "centres")[0] == 0
    folder = copied / "figures"
    read = json.loads((folder / "figures.json").read_text())
    read["exhibits"][0]["pictures"].append({"file": "t0001/old.png", "label": "old", "detail": False})
    (folder / "figures.json").write_text(json.dumps(read))
    (folder / "t0001" / "old.png").write_bytes(b"x")
    (folder / "t0001" / "mine.png").write_bytes(b"x")
    assert mebm("figures", copied, "--kind", "samples")[0] == 0
    assert [e.kind for e in read_index(folder)] == ["samples", "centres"]
    found = {p.name for p in (folder / "t0001").iterdir()}
    assert found == {"samples.png", "conditional.png", "centres.png", "mine.png"}


def test_without_the_images_the_rest_is_made_and_the_reason_said(mebm, copied):
    path = copied / "models" / "t0001.pt"
    torch.save(torch.load(path, weights_only=True) | {"data_source": "elsewhere:digits#0123"}, path)
    code, out, _ = mebm("figures", copied)
    assert code == 0
    assert {e.kind for e in read_index(copied / "figures")} == {"samples", "classes", "histogram", "curves"}
    assert "not made: tsne of m-jem: it was trained on elsewhere:digits#0123, but the images here are sklearn" in out
    assert "not made: test images in the histogram of m-jem" in out
    code, _, err = mebm("figures", copied, "--kind", "tsne")
    assert code == 2
    assert "no figure of kind tsne: tsne of m-jem: it was trained on" in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--kind", "tnse"], "'tnse' is not one of"),
        (["--trials", "t0002"], "--trials t0002: no such trial; did you mean t0001?"),
        (["--trials", " , "], "names no trial"),
        (["--trials", "t0001", "--best", "fd_buffer"], "--trials and --best: give one of them"),
        (["--best", "fd_bufer"], "--best fd_bufer: unknown metric; did you mean fd_buffer?"),
        (["--points", "1"], "1 is not in the range"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(mebm, trained, tmp_path, arguments, expected):
    code, out, err = mebm("figures", trained / "m-jem", *arguments, "--out", tmp_path / "new")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert expected in err
    assert not (tmp_path / "new").exists()


def test_trials_without_a_model_are_refused_and_curves_need_none(mebm, copied):
    (copied / "models" / "t0001.pt").unlink()
    code, _, err = mebm("figures", copied, "--trials", "t0001")
    assert code == 2
    assert "--trials t0001: it completed and left no model" in err
    code, _, err = mebm("figures", copied, "--kind", "tsne")
    assert code == 2
    assert "no model to show: models/ holds none" in err
    code, out, _ = mebm("figures", copied)
    assert code == 0
    assert [e.kind for e in read_index(copied / "figures")] == ["curves"]
    assert "not made: figures of models: models/ holds none" in out
    code, _, err = mebm("figures", copied / "nowhere")
    assert code == 2
    assert "nowhere: no such folder" in err


def test_an_id_that_is_a_path_shows_no_file_of_elsewhere(mebm, copied):
    (copied.parent / "elsewhere.pt").write_bytes((copied / "models" / "t0001.pt").read_bytes())
    path = copied / "trials.parquet"
    frame = pd.read_parquet(path)
    foreign = frame.assign(trial_id="../../elsewhere", fd_buffer_last=0.0)
    write_parquet(pd.concat([frame, foreign]), TRIAL_COLUMNS, path)
    code, _, err = mebm("figures", copied, "--trials", "../../elsewhere", "--kind", "samples")
    assert code == 2
    assert "left no model (its id is not a name of a file)" in err
    code, _, err = mebm("figures", copied, "--kind", "samples")
    assert code == 0
    assert [e.files[0] for e in read_index(copied / "figures")] == ["t0001/samples.png"]


def test_a_damaged_model_is_named(mebm, copied):
    (copied / "models" / "t0001.pt").write_bytes(b"nonsense")
    code, _, err = mebm("figures", copied, "--kind", "samples")
    assert code == 2
    assert "models/t0001.pt: not a model file, or damaged" in err


def test_the_best_of_each_method_by_its_last_value(mebm, copied):
    path = copied / "trials.parquet"
    frame = pd.read_parquet(path)
    other = frame.assign(trial_id="t0002", fd_buffer_last=frame["fd_buffer_last"] / 2, accuracy_last=0.01)
    pd.concat([frame, other]).to_parquet(path)
    shutil.copy(copied / "models" / "t0001.pt", copied / "models" / "t0002.pt")

    def keys(*arguments):
        code, _, err = mebm("figures", copied, "--kind", "samples", *arguments)
        assert (code, err) == (0, "")
        return [Path(e.files[0]).parent.name for e in read_index(copied / "figures")]

    assert keys() == ["t0002"]
    assert keys("--best", "accuracy") == ["t0001"]
    assert keys("--best", "accuracy", "--best", "fd_buffer") == ["t0001", "t0002"]
    assert keys("--trials", "t0001") == ["t0001"]
    assert keys("--trials", "t0002,m-jem/t0001") == ["t0002", "t0001"]


def test_the_report_shows_them_and_loads_nothing(mebm, shown, trained, tmp_path):
    assert mebm("report", trained / "m-jem", "--out", tmp_path / "report.html")[0] == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    section = page.split("<b>Samples and models</b>")[1].split("<b>Compute</b>")[0]
    for title in (
        "Samples of m-jem",
        "by p(x) and p(y|x)",
        "log p(x) of m-jem",
        "Centre of p0",
        "t-SNE of",
        "Energies of",
    ):
        assert title in section
    assert section.count('class="plot"') == 4
    assert section.count("data:image/png") == 2 + 55 + 1
    assert not re.findall(r'(?:src|href)="(?!data:|#)', section)


def test_the_options_name_the_kinds_that_exist():
    (option,) = [p for p in cli.get_command(None, "figures").params if p.name == "kinds"]
    assert tuple(option.type.choices) == KINDS
    assert all(f"{kind}: " in option.help for kind in KINDS)
    assert CliRunner().invoke(cli, ["figures", "--help"]).exit_code == 0
