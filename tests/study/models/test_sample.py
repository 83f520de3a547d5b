"""`mebm sample`'s engine on really trained small models: every form read back, either kind of file, every mistake."""

from __future__ import annotations

import io
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from study.config.errors import UserError
from study.models.sample import _write_npz, _write_parquet, sample_to_file
from trainables.data.datasets import ImageData, load_dataset
from trainables.methods.presets import build_trial
from trainables.models.model_file import load_model, model_state
from trainables.models.samples import fresh_samples, initial_of, load_any
from trainables.results.grids import grid_pixels
from trainables.trial.recorder import Recorder
from trainables.trial.trial import Trial

QUICK = {
    "epochs": 1,
    "iterations_per_epoch": 8,
    "batch_size": 32,
    "label_batch_size": 32,
    "buffer_size": 200,
    "sampling_steps": 2,
    "device": "cpu",
    "evaluation": {"protocols": "none", "fresh_steps": 3},
}


@pytest.fixture(scope="module")
def trained(run_mebm, tmp_path_factory):
    """The folder `mebm train` leaves of an M-EBM with batch norm."""
    torch.set_num_threads(1)  # the fixture that sees to it is a test's own and comes later
    folder = tmp_path_factory.mktemp("trained") / "m-ebm"
    fields = {k: v for k, v in QUICK.items() if k != "evaluation"} | {"norm": "batch"}
    fields |= {"evaluation.protocols": "none", "evaluation.fresh_steps": 3}
    options = [part for key, value in fields.items() for part in ("--set", f"{key}={value}")]
    code, out, err = run_mebm("train", "m-ebm", *options, "--out", folder)
    assert (code, err) == (0, ""), out
    return folder


@pytest.fixture
def train(tmp_path):
    """Files of a trial of one epoch without a folder around them: `train(data=None, **fields)`."""

    def run(data=None, **fields):
        trial = Trial(build_trial({**QUICK, **fields}), data)
        trial.trainer.train_epoch()
        recorder = Recorder(tmp_path / "left", "t1")
        recorder.write_model(model_state(trial.trainer))
        checkpoint = tmp_path / "left" / "trial.pt"
        torch.save(trial.state_dict(), checkpoint)
        return recorder.model_path, checkpoint

    return run


@pytest.fixture
def coloured():
    """Images with a gradient per channel, so that a mix-up of axes shows: (3, 16, 16)."""
    g = torch.Generator().manual_seed(0)
    level = torch.rand(80, 3, 1, 1, generator=g) * torch.linspace(0, 255, 16).view(1, 1, 1, 16)
    images = level.expand(80, 3, 16, 16).to(torch.uint8).contiguous()
    labels = torch.arange(80) % 4
    return ImageData("mine", images[:60], labels[:60], images[60:], labels[60:], 4, "test:mine#1")


def write(checkpoint, out, count=10, steps=2, seed=3, source="fresh", **more):
    return sample_to_file(checkpoint, out, count=count, steps=steps, seed=seed, source=source, device="cpu", **more)


def samples(path, count=10, steps=2, seed=3):
    """Samples of the model, uint8 (count, C, H, W), without a file in between."""
    loaded = load_any(path)
    made = fresh_samples(loaded, count, steps, initial=initial_of(loaded), seed=seed)
    return made.numpy()


def from_parquet(path):
    table = pq.read_table(path)
    assert table.schema.equals(pa.schema([("index", pa.int64()), ("image", pa.binary())]))
    assert table["index"].to_pylist() == list(range(len(table)))
    pictures = [Image.open(io.BytesIO(cell)) for cell in table["image"].to_pylist()]
    assert {p.format for p in pictures} == {"PNG"}
    arrays = [np.asarray(p) for p in pictures]
    return np.stack([a[None] if a.ndim == 2 else a.transpose(2, 0, 1) for a in arrays])


def from_npz(path):
    with np.load(path) as file:
        assert file.files == ["images"]
        assert file["images"].dtype == np.uint8
        return file["images"].transpose(0, 3, 1, 2)


def from_png(path, wanted):
    """Asserts that a picture is the grid of these images, enlarged by a whole number."""
    picture = Image.open(path)
    assert (picture.format, picture.mode) == ("PNG", "L" if wanted.shape[1] == 1 else "RGB")
    columns = int(np.ceil(np.sqrt(len(wanted))))
    rows = -(-len(wanted) // columns)
    cells = np.full(rows * columns, -1)
    cells[: len(wanted)] = range(len(wanted))
    small = grid_pixels(wanted, cells.reshape(rows, columns))
    factor = picture.width // small.shape[1]
    assert factor >= 2
    large = small.repeat(factor, axis=0).repeat(factor, axis=1)
    np.testing.assert_array_equal(np.asarray(picture), large[:, :, 0] if wanted.shape[1] == 1 else large)


def failed(*arguments, **more):
    """The one line of a mistake."""
    with pytest.raises(UserError) as found:
        write(*arguments, **more)
    assert "\n" not in str(found.value)
    return str(found.value)


# ------------------------------------------------------------------------------------------------------- the forms


@pytest.mark.parametrize("count", [1, 2, 10, 16])
def test_every_form_holds_the_same_samples(trained, tmp_path, count):
    wanted = samples(trained, count)
    for name in ("grid.png", "samples.parquet", "samples.npz"):
        line = write(trained, tmp_path / "new" / name, count)
        assert line == (
            f"{count} fresh samples (of 2 steps from p0 gaussian, seed 3) of m-ebm on digits, epoch 1: "
            f"{tmp_path / 'new' / name}"
        )
    np.testing.assert_array_equal(from_parquet(tmp_path / "new" / "samples.parquet"), wanted)
    np.testing.assert_array_equal(from_npz(tmp_path / "new" / "samples.npz"), wanted)
    from_png(tmp_path / "new" / "grid.png", wanted)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["grid.png", "samples.npz", "samples.parquet"]


def test_coloured_images_keep_their_axes(train, coloured, tmp_path):
    fields = {"dataset": "mine", "network": "conv-8", "initial": "uniform", "augment": "none", "buffer": "replace"}
    model, _ = train(coloured, **fields)
    wanted = samples(model)
    assert wanted.shape == (10, 3, 16, 16)
    for name in ("a.png", "a.parquet", "a.npz"):
        write(model, tmp_path / name)
    np.testing.assert_array_equal(from_parquet(tmp_path / "a.parquet"), wanted)
    np.testing.assert_array_equal(from_npz(tmp_path / "a.npz"), wanted)
    from_png(tmp_path / "a.png", wanted)


def test_a_parquet_file_can_be_trained_on(trained, tmp_path):
    write(trained, tmp_path / "images" / "train.parquet", 40)
    write(trained, tmp_path / "images" / "test.parquet", 5, seed=4)
    data = load_dataset("samples", str(tmp_path / "images"))
    # A folder's images are read in three channels.
    np.testing.assert_array_equal(data.images.numpy()[:, :1], samples(trained, 40))
    np.testing.assert_array_equal(data.test_images.numpy()[:, :1], samples(trained, 5, seed=4))


def test_a_file_that_is_there_is_replaced(trained, tmp_path):
    out = tmp_path / "a.NPZ"
    write(trained, out)
    first = out.read_bytes()
    write(trained, out, seed=4)
    assert out.read_bytes() != first
    write(trained, out)
    assert out.read_bytes() == first  # the same seed, the same file


# -------------------------------------------------------------------------------------------------- what is sampled


def test_a_checkpoint_and_a_model_file_give_the_same(trained, tmp_path):
    model, checkpoint = trained / "models" / "t0001.pt", trained / "checkpoint.pt"
    for source in ("fresh", "buffer"):
        for name, path in (("model", model), ("checkpoint", checkpoint), ("folder", trained)):
            write(path, tmp_path / f"{source}_{name}.npz", source=source)
        made = [from_npz(tmp_path / f"{source}_{name}.npz") for name in ("model", "checkpoint", "folder")]
        np.testing.assert_array_equal(made[0], made[1])
        np.testing.assert_array_equal(made[0], made[2])
    stored = from_npz(tmp_path / "buffer_model.npz")
    np.testing.assert_array_equal(stored, load_model(model).samples[:10].numpy())
    assert not np.array_equal(stored, from_npz(tmp_path / "fresh_model.npz"))


def test_a_checkpoint_folder_of_tune(trained, tmp_path):
    """Written by the trainable itself, without a Ray runtime."""
    from trainables.trial.ray_trainable import MebmTrainable

    config = load_model(trained / "models" / "t0001.pt").config
    settings = {"trial": config.to_json(), "trial_id": "t1", "folder": str(tmp_path / "study"), "cpus": 1, "gpus": 0}
    trainable = MebmTrainable({**settings, "checkpoint_seconds": 1e9, "resume_from": None})
    while not trainable.step()["done"]:
        pass
    (tmp_path / "checkpoint_000001").mkdir()
    trainable.save_checkpoint(str(tmp_path / "checkpoint_000001"))
    trainable.cleanup()
    assert sorted(p.name for p in (tmp_path / "checkpoint_000001").iterdir()) == ["trial.json", "trial.pt"]
    write(tmp_path / "checkpoint_000001", tmp_path / "a.npz")
    np.testing.assert_array_equal(from_npz(tmp_path / "a.npz"), samples(trained))


def test_steps_left_out_are_those_of_an_evaluation(trained, tmp_path):
    line = write(trained, tmp_path / "a.npz", steps=None)
    assert "of 3 steps" in line
    np.testing.assert_array_equal(from_npz(tmp_path / "a.npz"), samples(trained, steps=3))


def test_stored_samples_of_every_method(train, tmp_path):
    model, checkpoint = train(method="shortrun")
    assert write(model, tmp_path / "a.npz", source="buffer").startswith("10 stored samples of shortrun on digits")
    np.testing.assert_array_equal(from_npz(tmp_path / "a.npz"), load_model(model).samples[:10].numpy())
    message = f"{checkpoint}: holds no samples: shortrun keeps no replay buffer; use --source fresh"
    assert failed(checkpoint, tmp_path / "b.npz", source="buffer") == message
    model, _ = train()
    assert write(model, tmp_path / "c.npz", source="buffer").startswith("10 samples of the buffer of m-ebm on digits")


def test_a_generator_samples_from_a_checkpoint_only(train, tmp_path):
    model, checkpoint = train(method="vera")
    line = write(checkpoint, tmp_path / "a.npz")
    assert line.startswith("10 fresh samples (from the generator, seed 3) of vera on digits")
    np.testing.assert_array_equal(from_npz(tmp_path / "a.npz"), samples(checkpoint))
    stored = len(load_model(model).samples)
    assert failed(model, tmp_path / "b.npz") == (
        f"{model}: vera samples with its generator, which a model file does not hold; take a checkpoint of the trial, or "
        f"the {stored} stored samples with --source buffer"
    )
    write(model, tmp_path / "b.npz", source="buffer")
    np.testing.assert_array_equal(from_npz(tmp_path / "b.npz"), load_model(model).samples[:10].numpy())


# -------------------------------------------------------------------------------------------------------- mistakes


def test_a_suffix_is_looked_at_before_the_model(tmp_path):
    nowhere = tmp_path / "nowhere.pt"
    wanted = "expected one of .png, .parquet, .npz"
    assert failed(nowhere, tmp_path / "a.jpg") == f"--out {tmp_path / 'a.jpg'}: unknown suffix '.jpg', {wanted}"
    assert failed(nowhere, tmp_path / "a") == f"--out {tmp_path / 'a'}: has no suffix, {wanted}"
    (tmp_path / "b.png").mkdir()
    assert failed(nowhere, tmp_path / "b.png") == f"--out {tmp_path / 'b.png'}: is a folder"


def test_files_that_cannot_be_read(trained, tmp_path):
    out = tmp_path / "a.npz"
    assert failed(tmp_path / "nowhere.pt", out).startswith(f"{tmp_path / 'nowhere.pt'}: cannot be read (No such file")
    for whole in (trained / "checkpoint.pt", trained / "models" / "t0001.pt"):
        damaged = tmp_path / whole.name
        damaged.write_bytes(whole.read_bytes()[:-3000])
        assert failed(damaged, out).startswith(f"{damaged}: not a model file or a checkpoint, or damaged (")
        damaged.unlink()
    assert failed(tmp_path, out) == f"{tmp_path}: a folder without a model file or checkpoint (*.pt)"
    for name in ("a.pt", "b.pt"):
        shutil.copy(trained / "checkpoint.pt", tmp_path / name)
    assert failed(tmp_path, out) == f"{tmp_path}: holds 2 models; name one of a.pt, b.pt"
    assert not out.exists()


def test_numbers_and_sources_that_cannot_be(trained, tmp_path):
    out = tmp_path / "a.npz"
    assert failed(trained, out, 0) == "--count 0: expected at least 1"
    assert failed(trained, out, steps=-1) == f"{trained / 'checkpoint.pt'}: steps is -1, expected at least 0"
    assert "seed is -1, expected 0 to" in failed(trained, out, seed=-1)
    assert failed(trained, out, source="buffers").startswith("source 'buffers': expected one of fresh, buffer; did you")
    many = f"--count 201: {trained / 'checkpoint.pt'} holds 200 stored samples"
    assert failed(trained, out, 201, source="buffer") == many
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch sees no CUDA device"):
            sample_to_file(trained, out, count=3, device="cuda")
    assert not out.exists()


def test_a_classifier_and_an_empty_buffer(train, tmp_path):
    for path in train(method="softmax"):
        for source in ("fresh", "buffer"):
            message = f"{path}: softmax is a plain classifier and makes no samples"
            assert failed(path, tmp_path / "a.png", source=source) == message
    fresh = tmp_path / "trial.pt"
    torch.save(Trial(build_trial({**QUICK, "method": "igebm"})).state_dict(), fresh)
    message = f"{fresh}: holds no samples: its replay buffer is empty; use --source fresh"
    assert failed(fresh, tmp_path / "a.png", source="buffer") == message


def test_images_that_are_missing_or_others(train, trained, coloured, tmp_path):
    fields = {"dataset": "mine", "network": "conv-8", "initial": "gaussian", "augment": "none"}
    model, checkpoint = train(coloured, **fields)
    for path in (model, checkpoint):
        assert failed(path, tmp_path / "a.npz").startswith(f"{path}: dataset 'mine' is unknown")
        gone = tmp_path / "gone"
        assert failed(path, tmp_path / "a.npz", data_dir=gone) == f"{path}: {gone}: data_dir is not a folder"
        write(path, tmp_path / "b.npz", source="buffer")  # needs none
    others = tmp_path / "others"
    others.mkdir()
    for split, count in (("train", 20), ("test", 5)):
        write(trained, others / f"{split}.parquet", count)
    assert "it was trained on test:mine#1, but the images here are" in failed(
        model, tmp_path / "a.npz", data_dir=others
    )
    assert not (tmp_path / "a.npz").exists()


def test_images_may_have_moved(train, trained, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for split, count in (("train", 60), ("test", 5)):
        write(trained, here / f"{split}.parquet", count)
    fields = {"dataset": "mine", "data_dir": str(here), "network": "conv-8", "initial": "gaussian", "augment": "none"}
    model, checkpoint = train(None, **fields)
    wanted = samples(model)
    here.rename(there)
    load_dataset.cache_clear()  # as in another process
    said = f"{model}: {here}: data_dir is not a folder; did you mean {here.with_name('there')}?"
    assert failed(model, tmp_path / "a.npz") == said
    for path in (model, checkpoint):
        write(path, tmp_path / "a.npz", data_dir=there)
        np.testing.assert_array_equal(from_npz(tmp_path / "a.npz"), wanted)


@pytest.mark.parametrize("write_form", [_write_npz, _write_parquet])
def test_a_failure_leaves_nothing(tmp_path, write_form):
    out = tmp_path / "a"
    (out / "in the way").mkdir(parents=True)
    with pytest.raises(OSError):
        write_form(out, np.zeros((2, 1, 4, 4), np.uint8))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_place_that_cannot_be_written(trained, tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "a.npz"
    assert failed(trained, out) == f"--out {out}: cannot be written (File exists)"


@pytest.mark.parametrize("name", ["a.npz", "a.parquet", "a.png"])
def test_a_link_at_the_place_is_replaced_and_not_followed(trained, tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / name).symlink_to(victim)
    write(trained, tmp_path / name, 4)
    assert victim.read_text() == "precious"
    assert not (tmp_path / name).is_symlink()
    assert {p.name for p in tmp_path.iterdir()} == {"victim", name}


def test_a_model_that_a_link_has_elsewhere_is_refused(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "moved")
    folder = tmp_path / "study"
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "t0001.pt").symlink_to(tmp_path / "moved" / "checkpoint.pt")
    for path in (folder, folder / "models", folder / "models" / "t0001.pt"):
        message = failed(path, tmp_path / "a.png", count=1)
        assert "t0001.pt: leads out of" in message, path
        assert not (tmp_path / "a.png").exists()
    (folder / "models" / "t0001.pt").unlink()
    os.mkfifo(folder / "models" / "t0001.pt")
    assert "t0001.pt: is not a file" in failed(folder / "models" / "t0001.pt", tmp_path / "a.png")
