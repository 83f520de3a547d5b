"""New samples from files: the trainer's own, from either kind of file; nothing moved by it; what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trainables.config.method import METHODS, method_class
from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.models.model_file import SavedModel, model_state
from trainables.models.samples import find_checkpoint, fresh_samples, initial_of, load_any
from trainables.sampling.initial import build_initial
from trainables.training.trainer import Trainer, to_grid
from trainables.trial.recorder import Recorder
from trainables.trial.trial import Trial

Quick = Callable[..., TrialConfig]
SAMPLING = [m for m in METHODS if "data" in method_class(m).uses]


@dataclass(frozen=True)
class Left:
    """What a trained trial leaves: its trainer, still alive, its model file and its checkpoint."""

    trainer: Trainer
    model: Path
    checkpoint: Path


def _train(folder: Path, config: TrialConfig, data: ImageData | None) -> Left:
    trial = Trial(config, data)
    trial.trainer.train_epoch()
    recorder = Recorder(folder, "t7")
    recorder.write_model(model_state(trial.trainer))
    checkpoint = folder / "checkpoint.pt"
    torch.save(trial.state_dict(), checkpoint)
    return Left(trial.trainer, recorder.model_path, checkpoint)


def _fields(**fields: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "epochs": 1,
        "iterations_per_epoch": 5,
        "warmup_iterations": 0,
        "evaluation": {"fresh_steps": 2, "protocols": "none"},
    }
    if fields.get("method") == "kl-ebm":
        values["buffer_size"] = 1002
    if fields.get("method") == "f-ebm":
        values["critic"] = {"start_iteration": 0}  # until then its buffer keeps nothing
    return values | fields


@pytest.fixture
def train(quick: Quick, digits: ImageData, tmp_path: Path) -> Callable[..., Left]:
    """One short epoch: `train(data=..., **fields)`."""

    def run(data: ImageData | None = None, **fields: Any) -> Left:
        return _train(tmp_path, quick(**_fields(**fields)), digits if data is None else data)

    return run


@pytest.fixture(scope="module")
def normed(quick: Quick, digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Left:
    """An M-EBM with batch norm."""
    return _train(tmp_path_factory.mktemp("normed"), quick(**_fields(norm="batch")), digits)


def _sample(loaded: SavedModel, count: int = 30, steps: int = 3, seed: int = 5, **fields: Any) -> torch.Tensor:
    return fresh_samples(loaded, count, steps, initial=initial_of(loaded), seed=seed, **fields)


def _trainers(trainer: Trainer, count: int = 30, steps: int = 3, seed: int = 5) -> torch.Tensor:
    return to_grid(trainer.fresh_samples(count, steps, torch.Generator().manual_seed(seed)))


# ------------------------------------------------------------------------------------------- the trainer's samples


@pytest.mark.parametrize("method", SAMPLING)
def test_samples_are_those_of_the_trainer(train: Callable[..., Left], method: str) -> None:
    left = train(method=method)
    wanted = _trainers(left.trainer)
    assert wanted.float().std() > 0
    for path in [left.checkpoint] if method in ("vera", "gebm") else [left.model, left.checkpoint]:
        found = _sample(load_any(path))
        assert found.dtype == torch.uint8 and found.shape == (30, 1, 8, 8)
        assert torch.equal(found, wanted), path
    assert not torch.equal(_sample(load_any(left.checkpoint), seed=6), wanted)


@pytest.mark.parametrize(
    "fields",
    [
        {"norm": "batch", "sampler_norm_mode": "train"},
        {"norm": "batch", "sampler_norm_mode": "eval"},
        {"norm": "batch", "memory_format": "contiguous"},
        {"precision": "bf16"},
        {"method": "vera", "precision": "bf16"},
        {"method": "jem++", "inner_steps": 3, "precision": "bf16"},
        {"initial": "uniform", "noise_std": 0.1, "noise_placement": "before"},
        {"initial": "gaussian-low-rank", "initial_rank": 5},
        {"initial": "class-gaussian", "train_images": 500, "covariance_jitter": 0.01},
        {"pixel_range": "unit", "sample_clamp": False, "gradient_clamp": None},
        {"method": "igebm", "dropout": 0.5},
        {"network": "wrn-10-1", "norm": "none", "dropout": 0.3},
        {"ema_decay": 0.9, "evaluation": {"weights": "ema", "protocols": "none"}},
    ],
    ids=lambda fields: ",".join(f"{k}={v}" for k, v in fields.items() if not isinstance(v, dict)),
)
def test_every_setting_of_the_sampler_counts(train: Callable[..., Left], fields: dict[str, Any]) -> None:
    left = train(**fields)
    assert torch.equal(_sample(load_any(left.checkpoint)), _trainers(left.trainer))
    if left.trainer.config.method != "vera":
        assert torch.equal(_sample(load_any(left.model)), _trainers(left.trainer))


@pytest.mark.parametrize(
    "change",
    [
        {"step_size": 5.0},
        {"noise_std": 0.2},
        {"gradient_clamp": 1e-3},
        {"noise_placement": "before", "noise_std": 0.2},
        {"sample_clamp": False, "noise_std": 0.2},
        {"precision": "bf16"},
        {"sampler_norm_mode": "eval"},
    ],
    ids=lambda change: ",".join(change),
)
def test_a_setting_that_differs_gives_other_samples(normed: Left, change: dict[str, Any]) -> None:
    """What the equality with the trainer is worth: none of these could be forgotten and go unnoticed.

    `inner_steps` is not among them: behind an affine first layer N steps of alpha / N are one of alpha, but for rounding.
    """
    loaded = load_any(normed.model)
    # Steep enough for every setting to show in 8 bits; of a pair the second field alone is already there before.
    base = loaded.config.model_copy(update={"step_size": 40.0, "gradient_clamp": None, "noise_std": 0.0})
    common = {k: v for k, v in change.items() if k == "noise_std" and len(change) > 1}
    before = replace(loaded, config=base.model_copy(update=common))
    after = replace(loaded, config=base.model_copy(update=change))
    initial = initial_of(loaded)
    same, other = (fresh_samples(s, 30, 4, initial=initial, seed=5) for s in (before, after))
    assert not torch.equal(same, other)


def test_the_moving_average_is_sampled_where_it_is_scored(train: Callable[..., Left]) -> None:
    fields = {"ema_decay": 0.9, "learning_rate": 0.1}
    left = train(**fields, evaluation={"weights": "ema", "protocols": "none"})
    assert left.trainer.average is not None
    weights = load_any(left.checkpoint).model.state_dict()
    for name, value in left.trainer.average.module.state_dict().items():
        assert torch.equal(weights[name], value)
    assert any(not torch.equal(weights[n], v) for n, v in left.trainer.model.state_dict().items())
    left = train(**fields)
    weights = load_any(left.checkpoint).model.state_dict()
    assert all(torch.equal(weights[n], v) for n, v in left.trainer.model.state_dict().items())


def test_batches_are_those_asked_for(normed: Left) -> None:
    loaded = load_any(normed.model)
    size = normed.trainer.config.evaluation.batch_size
    assert torch.equal(_sample(loaded, size + 30), _trainers(normed.trainer, size + 30))  # two batches of other sizes
    # Batch norm makes an image depend on its batch, so the size shows.
    assert not torch.equal(_sample(loaded, 30, 5, batch_size=10), _sample(loaded, 30, 5, batch_size=30))


# --------------------------------------------------------------------------------------- reproducible, nothing moved


def test_a_seed_gives_the_same_samples_whatever_happened_before(normed: Left) -> None:
    loaded = load_any(normed.model)
    torch.manual_seed(1)
    first = _sample(loaded)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(_sample(loaded), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(_sample(load_any(normed.model)), first)
    assert not torch.equal(_sample(loaded, seed=6), first)
    assert not torch.equal(_sample(loaded, steps=4), first)


@pytest.mark.parametrize("method", ["m-ebm", "igebm", "vera"])
def test_the_networks_stay_as_they_are(
    train: Callable[..., Left], same: Callable[[Any, Any], bool], method: str
) -> None:
    left = train(method=method, **({"norm": "batch"} if method == "m-ebm" else {}))
    loaded = load_any(left.checkpoint)
    networks = [loaded.model, *loaded.others.values()]
    modes = [[m.training for m in n.modules()] for n in networks]
    before = copy.deepcopy([n.state_dict() for n in networks])
    _sample(loaded)
    assert same([n.state_dict() for n in networks], before)
    assert [[m.training for m in n.modules()] for n in networks] == modes
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_running_statistics_would_move_without_care(normed: Left) -> None:
    """The network of the tests above has statistics that a forward in train mode changes."""
    model = copy.deepcopy(load_any(normed.model).model).train()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.energy(torch.rand(20, 1, 8, 8))
    assert any(not torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_no_steps_give_draws_of_p0(normed: Left, digits: ImageData) -> None:
    c = normed.trainer.config
    initial = build_initial(c.initial, digits, c.covariance_jitter)
    draws = initial.sample(30, torch.Generator().manual_seed(5))
    assert torch.equal(_sample(load_any(normed.model), steps=0), to_grid(draws))


# ----------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("method", METHODS)
def test_both_files_hold_the_same_model(
    train: Callable[..., Left], same: Callable[[Any, Any], bool], method: str
) -> None:
    left = train(method=method)
    model, checkpoint = load_any(left.model), load_any(left.checkpoint)
    assert model.path == left.model
    assert checkpoint.path == left.checkpoint
    for name in ("config", "data_source", "classes", "epoch", "iteration"):
        assert getattr(model, name) == getattr(checkpoint, name), name
    assert same(model.model.state_dict(), checkpoint.model.state_dict())
    assert model.shape == checkpoint.shape == (1, 8, 8)
    assert not checkpoint.model.training
    assert (checkpoint.others.keys() == {"generator"}) == (method in ("vera", "gebm"))
    buffer = left.trainer.buffer
    if buffer is None:
        assert checkpoint.samples.shape == (0, 1, 8, 8)
    else:
        assert len(checkpoint.samples) == len(buffer.pool()) > 0
        assert torch.equal(checkpoint.samples, model.samples)


def test_a_buffer_larger_than_a_part_is_read_whole(train: Callable[..., Left]) -> None:
    left = train(buffer_size=2300)
    stored = load_any(left.checkpoint).samples
    assert left.trainer.buffer is not None
    wanted = to_grid(left.trainer.buffer.pool()).flatten(1)
    assert torch.equal(stored.flatten(1).long().sum(1).sort().values, wanted.long().sum(1).sort().values)
    assert torch.equal(stored, load_any(left.model).samples)


@pytest.mark.parametrize(
    "fields",
    [
        {"pixel_range": "unit"},
        {"method": "igebm", "buffer_size": 40, "batch_size": 30},
        {"method": "kl-ebm", "buffer_size": 40, "batch_size": 30, "entropy_weight": 0.0},
    ],
    ids=["replace", "ring", "reservoir"],
)
def test_stored_samples_are_what_the_buffer_shows(train: Callable[..., Left], fields: dict[str, Any]) -> None:
    """Of buffers that overflowed long ago: a reservoir shows its newest images, not those it draws from."""
    left = train(**fields)
    assert left.trainer.buffer is not None
    stored = load_any(left.checkpoint).samples
    assert torch.equal(stored, to_grid(left.trainer.sample_pool(10_000)))
    assert len(stored) == left.trainer.config.buffer_size


def test_a_buffer_that_has_not_been_written_to(quick: Quick, digits: ImageData, tmp_path: Path) -> None:
    torch.save(Trial(quick(method="igebm"), digits).state_dict(), tmp_path / "trial.pt")
    loaded = load_any(tmp_path / "trial.pt")
    assert loaded.samples.shape == (0, 1, 8, 8)
    assert len(_sample(loaded)) == 30


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({"method": "m-ebm", "buffer": "none", "initial": "uniform"}, (1, 8, 8)),  # from the data set's name
        ({"method": "m-ebm", "dataset": "mine", "network": "conv-8"}, (3, 12, 10)),  # from the buffer
        ({"method": "vera", "dataset": "mine", "network": "conv-8", "generator": {"features": 8}}, (3, 16, 16)),
        ({"method": "m-ebm", "dataset": "cifar10", "network": "conv-8", "buffer": "none"}, (3, 32, 32)),
    ],
)
def test_images_are_not_needed_to_read_a_checkpoint(
    train: Callable[..., Left], make_data: Callable[..., ImageData], fields: dict[str, Any], shape: tuple[int, int, int]
) -> None:
    own = {"augment": "none", "energy_augment": "none", "data_dir": "/nowhere", "initial": "uniform"}
    if "dataset" in fields:
        left = train(make_data(shape=shape), **(own | {"batch_size": 20, "label_batch_size": 20} | fields))
    else:
        left = train(**fields)
    loaded = load_any(left.checkpoint)
    assert loaded.shape == shape
    assert torch.equal(_sample(loaded), _trainers(left.trainer))


def test_a_head_that_is_not_trained_is_read_too(train: Callable[..., Left]) -> None:
    left = train(network="wrn-10-1", norm="none", batch_size=20)
    assert load_any(left.checkpoint).classes == 10
    assert torch.equal(_sample(load_any(left.checkpoint)), _trainers(left.trainer))


def test_images_may_be_elsewhere_now(normed: Left, tmp_path: Path) -> None:
    for path in (normed.model, normed.checkpoint):
        assert load_any(path).config.data_dir is None
        moved = load_any(path, data_dir=tmp_path)
        assert moved.config.data_dir == str(tmp_path)
        with pytest.raises(ValueError, match=str(tmp_path)):
            initial_of(moved)


def test_a_folder_stands_for_the_one_file_in_it(normed: Left, tmp_path: Path) -> None:
    folder = normed.checkpoint.parent
    assert find_checkpoint(folder) == normed.checkpoint  # as `mebm train` leaves it: beside models/
    assert find_checkpoint(folder / "models") == normed.model
    assert load_any(folder / "models").path == normed.model
    study = tmp_path / "study"
    (study / "models").mkdir(parents=True)
    with pytest.raises(ValueError, match="a folder without a model file or checkpoint"):
        load_any(study)
    (study / "models" / "a.pt").write_bytes(normed.model.read_bytes())
    assert load_any(study).path == study / "models" / "a.pt"
    (study / "models" / "b.pt").write_bytes(normed.model.read_bytes())
    with pytest.raises(ValueError, match=r"models: holds 2 models; name one of a\.pt, b\.pt"):
        load_any(study)
    assert find_checkpoint(tmp_path / "nowhere.pt") == tmp_path / "nowhere.pt"


# -------------------------------------------------------------------------------------------------- what is refused


def test_methods_without_samples_or_without_their_generator(train: Callable[..., Left]) -> None:
    left = train(method="softmax")
    for path in (left.model, left.checkpoint):
        with pytest.raises(ValueError, match="softmax is a plain classifier and makes no samples"):
            _sample(load_any(path))
    loaded = load_any(train(method="vera").model)
    assert not loaded.others
    with pytest.raises(ValueError, match="vera samples with its generator, which a model file does not hold"):
        _sample(loaded)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 0}, "count is 0, expected at least 1"),
        ({"steps": -1}, "steps is -1, expected at least 0"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"seed": -1}, "seed is -1, expected 0 to"),
        ({"seed": 2**63}, "expected 0 to"),
    ],
)
def test_numbers_that_cannot_be(normed: Left, fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _sample(load_any(normed.model), **fields)


def test_chains_need_their_p0(normed: Left) -> None:
    with pytest.raises(ValueError, match="chains of m-ebm start from its p0"):
        fresh_samples(load_any(normed.model), 3, 1, initial=None, seed=0)


def test_samples_that_are_not_finite_are_no_images(train: Callable[..., Left]) -> None:
    loaded = load_any(train(method="shortrun", initial="uniform").model)
    with torch.no_grad():
        next(iter(loaded.model.parameters())).fill_(torch.nan)
    with pytest.raises(ValueError, match="30 of 30 samples of shortrun are not finite after 3 steps"):
        _sample(loaded)


def test_p0_of_other_images_is_refused(train: Callable[..., Left], make_data: Callable[..., ImageData]) -> None:
    left = train(data=make_data(), batch_size=20, label_batch_size=20)
    for path in (left.model, left.checkpoint):
        with pytest.raises(
            ValueError, match="it was trained on test:made-up#0, but the images here are sklearn:digits"
        ):
            initial_of(load_any(path))


def test_files_that_cannot_be_used_are_refused_in_one_line(normed: Left, tmp_path: Path) -> None:
    state = torch.load(normed.checkpoint, weights_only=True)
    path = tmp_path / "trial.pt"
    trainer = state["trainer"]
    cases: list[tuple[str, Any]] = [
        ("neither a model file", {"weights": {}}),
        ("neither a model file", [1, 2]),
        ("neither a model file", {k: v for k, v in state.items() if k != "trainer"}),
        (r"configuration is of another version of this package \(colour\)", state | {"config": '{"colour": 3}'}),
        ("configuration is of another version", state | {"config": "no JSON"}),
        (
            "state does not fit a conv-16 trial",
            state | {"trainer": trainer | {"networks": {"energy": {"weights": {}}}}},
        ),
        (
            "state does not fit a conv-16 trial",
            state | {"trainer": trainer | {"networks": {"energy": {"weights": None}}}},
        ),
        ("state does not fit a conv-16 trial", state | {"trainer": {k: trainer[k] for k in trainer if k != "buffer"}}),
        ("state does not fit a conv-16 trial", state | {"trainer": None}),
        ("format 99, expected 2", torch.load(normed.model, weights_only=True) | {"format": 99}),
    ]
    for message, content in cases:
        torch.save(content, path)
        with pytest.raises(ValueError, match=message) as found:
            load_any(path)
        assert str(found.value).startswith(f"{path}: ")
        assert "\n" not in str(found.value)
    for whole in (normed.model, normed.checkpoint):
        for part in (whole.read_bytes()[:5000], b"", b"not a model\n" * 100):
            path.write_bytes(part)
            with pytest.raises(ValueError, match=r"trial\.pt: not a model file or a checkpoint, or damaged") as found:
                load_any(path)
            assert "\n" not in str(found.value)
    with pytest.raises(ValueError, match=r"nowhere\.pt: cannot be read \(No such file"):
        load_any(tmp_path / "nowhere.pt")


def test_a_file_that_runs_code_is_not_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "harm",)

    torch.save({"config": "", "data_source": "", "trainer": Harm()}, tmp_path / "trial.pt")
    with pytest.raises(ValueError, match="damaged"):
        load_any(tmp_path / "trial.pt")
    assert not (tmp_path / "harm").exists()
