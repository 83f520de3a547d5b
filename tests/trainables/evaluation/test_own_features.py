"""Extractors of a user's own: their names and hashes, their scores, and one line for whatever is wrong with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from study.config.own_code import bind_protocol, code_names, short_names
from trainables.config.protocols import PROTOCOLS, protocol_named
from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.evaluation.frechet import DISTANCES, frechet_distance, statistics
from trainables.evaluation.inception import NoFeaturesError
from trainables.evaluation.inception_scores import InceptionScores, ReferenceCache, inception_scores, own_scores
from trainables.evaluation.metrics import extractor as own_metric
from trainables.evaluation.metrics import fid
from trainables.evaluation.mmd import mmd, row_means
from trainables.evaluation.own_features import own_extractor
from trainables.evaluation.scores import Samples
from trainables.plugins.reference import NotTrustedError, allow, use
from trainables.training.rehearsal import has_own_parts, rehearse
from trainables.training.trainer import Trainer

CPU = torch.device("cpu")
CODE = """
import torch


def pixels(weights=None):  # every fourth pixel of the first channel
    factor = 1.0 if weights is None else torch.load(weights, weights_only=True)["factor"]
    return lambda images: images[:, 0].flatten(1)[:, ::4].float() / 255 * factor


def whole():
    return lambda images: images


def none():
    return 3


def holed():  # not finite where the first pixel is bright
    def features(images):
        found = images[:, 0].flatten(1)[:, ::4].float()
        return found.masked_fill(images[:, 0, :1, 0] == 255, float("nan"))

    return features
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Code and weights in the working directory of a user who has named them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEBM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "nets.py").write_text(CODE)
    torch.save({"factor": torch.tensor(2.0)}, tmp_path / "two.pth")
    torch.save({"factor": torch.tensor(3.0)}, tmp_path / "three.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda x: x[:, 0].flatten(1)[:, ::4].float() / 255, torch.zeros(2, 3, 8, 8).byte())
        torch.jit.save(traced, str(tmp_path / "script.pt"))
    DISTANCES.clear()
    use(None)
    allow(tmp_path)
    yield tmp_path
    use(tmp_path / "elsewhere")
    use(None)


def extractor(name: str) -> str:
    found = protocol_named(bind_protocol(name)).extractor
    assert found is not None
    return found


def test_mmd_is_that_of_the_released_formula() -> None:
    """Frozen: the formula of google-research/cmmd (distance.py) in float64 on the same unit features."""
    random = np.random.default_rng(7)
    real, fake = random.normal(size=(200, 16)), random.normal(size=(150, 16)) * 0.9 + 0.2
    value, _ = mmd(torch.from_numpy(fake), torch.from_numpy(real))
    assert value == pytest.approx(0.6655654258942434, rel=1e-9)
    assert mmd(torch.from_numpy(fake) * 7, torch.from_numpy(real))[0] == pytest.approx(value), "lengths do not matter"
    assert mmd(torch.from_numpy(real), torch.from_numpy(real))[0] == pytest.approx(0, abs=1e-9)


def test_the_error_of_mmd_is_its_spread_over_draws() -> None:
    random = torch.Generator().manual_seed(0)
    real = torch.randn(500, 6, generator=random)
    drawn = [mmd(torch.randn(200, 6, generator=random) + 0.5, real) for _ in range(200)]
    spread = float(np.std([value for value, _ in drawn]))
    assert float(np.mean([error for _, error in drawn])) == pytest.approx(spread, rel=0.15)


def test_ids_name_the_extractor_its_code_and_its_weights(folder: Path) -> None:
    names = ("nets.py:pixels", "nets.py:pixels@two.pth", "nets.py:pixels@three.pth", "nets.py:whole", "script.pt")
    found = {name: own_extractor(extractor(f"small-fresh@{name}")).id for name in names}
    assert len({i.rpartition("-")[2] for i in found.values()}) == len(names) - 1, "code of one file has one hash"
    assert found["nets.py:pixels@two.pth"].startswith("nets.py:pixels-") and found["script.pt"].startswith("script.pt-")
    before = found["nets.py:pixels@two.pth"]
    (folder / "sub").mkdir()
    (folder / "two.pth").rename(folder / "sub" / "two.pth")
    assert own_extractor(extractor("small-fresh@nets.py:pixels@sub/two.pth")).id == before, "not where they are"
    torch.save({"factor": torch.tensor(5.0)}, folder / "two.pth")
    assert own_extractor(extractor("small-fresh@nets.py:pixels@two.pth")).id == before, "once per process"
    use(folder / "elsewhere")
    allow(folder)
    assert own_extractor(extractor("small-fresh@nets.py:pixels@two.pth")).id != before


@pytest.mark.parametrize("name", ["nets.py:pixels", "script.pt"])
def test_a_trial_is_scored_on_it(folder: Path, quick: Callable[..., TrialConfig], digits: ImageData, name: str) -> None:
    protocols = [bind_protocol(f"{base}@{name}") for base in ("small-buffer", "small-fresh")]
    evaluation = {"protocols": protocols, "fresh_steps": 2, "metrics": []}
    config = quick(method="m-ebm", buffer_size=300, evaluation=evaluation)
    assert has_own_parts(config) and rehearse(config, digits) == []
    trainer = Trainer(config, digits)
    found = trainer.evaluate()
    wanted = {f"extractor_{metric}_{source}" for metric in ("fd", "mmd") for source in ("buffer", "fresh")}
    assert set(found.values) == wanted and not found.remarks
    identity = own_extractor(extractor(f"small-fresh@{name}")).id
    assert found.protocols["extractor_fd_buffer"] == f"small-buffer@{identity}-n300", "of 1,000, and the id says so"
    assert found.protocols["extractor_mmd_fresh"] == f"small-fresh@{identity}-2steps"
    buffer = ((trainer._shuffled_buffer()[:1000].clamp(-1, 1) + 1) * 127.5).round() / 255
    real = digits.images.flatten(1)[:, ::4].double().numpy() / 255
    features = buffer.flatten(1)[:, ::4].double().numpy()
    exact = frechet_distance(*statistics(features), *statistics(real))
    assert found.values["extractor_fd_buffer"] == pytest.approx(exact, rel=1e-4)


NEAREST = ("fd", "mmd", "kid", "precision", "recall", "density", "coverage", "memorisation")


def with_a_hole(digits: ImageData, where: str) -> tuple[ImageData, torch.Tensor]:
    """Digits and samples of them, with one image that `holed` has no features of."""
    images, samples = digits.images.clone(), digits.test_images[:60].clone()
    images[:, 0, 0, 0] = samples[:, 0, 0, 0] = 0
    (images if where == "reference" else samples)[3, 0, 0, 0] = 255
    return replace(digits, images=images), samples


def test_samples_without_features_have_no_numbers_at_all(folder: Path, digits: ImageData) -> None:
    data, samples = with_a_hole(digits, "samples")
    network, protocol = (
        own_extractor(extractor("small-fresh@nets.py:holed")),
        protocol_named("small-fresh@nets.py:holed"),
    )
    found = own_scores(samples, data, CPU, protocol, network, NEAREST)
    assert found.values == {} == found.errors
    assert found.remark is not None and found.remark.endswith("coverage and memorisation: the features are not finite")
    assert own_scores(samples[4:], data, CPU, protocol, network, NEAREST).values.keys() >= {*NEAREST}


def test_a_reference_without_features_is_one_line_and_is_not_kept(
    folder: Path, quick: Callable[..., TrialConfig], digits: ImageData
) -> None:
    data, samples = with_a_hole(digits, "reference")
    network, protocol = (
        own_extractor(extractor("small-fresh@nets.py:holed")),
        protocol_named("small-fresh@nets.py:holed"),
    )
    said = r"^the extractor's features of the reference images \(train\) are not finite$"
    for wanted in NEAREST:
        with pytest.raises(NoFeaturesError, match=said):
            inception_scores(samples, data, CPU, protocol, (wanted,), None, network)
    assert not list((folder / "cache" / "reference").glob("*.npz"))
    evaluation = {"protocols": [bind_protocol("small-fresh@nets.py:holed")], "fresh_steps": 1}
    found = Trainer(quick(method="m-ebm", buffer_size=300, evaluation=evaluation), data).evaluate()
    assert found.values == {} and found.remarks == (f"no FD: {said.strip('^$').replace(chr(92), '')}",)


def test_a_reference_that_was_kept_without_being_finite_is_made_again(folder: Path, digits: ImageData) -> None:
    network, protocol = (
        own_extractor(extractor("small-fresh@nets.py:pixels")),
        protocol_named("small-fresh@nets.py:pixels"),
    )
    truth = ReferenceCache(digits, protocol, network, CPU).statistics()
    (path,) = (folder / "cache" / "reference").glob("*statistics.npz")
    path.unlink()
    wrong = {name: np.full_like(array, np.nan) for name, array in truth.items()}
    ReferenceCache(digits, protocol, network, CPU)._kept("statistics", lambda: wrong)  # as an older version did
    cache = ReferenceCache(digits, protocol, network, CPU)
    np.testing.assert_array_equal(cache.statistics()["mu"], truth["mu"])
    assert cache.poisoned


def test_without_test_images_there_is_no_memorisation(folder: Path, digits: ImageData) -> None:
    data = replace(digits, test_images=digits.test_images[:0], test_labels=digits.test_labels[:0])
    network, protocol = (
        own_extractor(extractor("small-fresh@nets.py:pixels")),
        protocol_named("small-fresh@nets.py:pixels"),
    )
    found = own_scores(digits.test_images[:60], data, CPU, protocol, network, ("density", "memorisation"))
    assert {*found.values} == {"fd", "mmd", "density"} and found.remark == "no memorisation: no test images"
    with pytest.raises(NoFeaturesError, match=r"digits has no images \(test\) to compare with"):
        own_scores(digits.test_images[:60], data, CPU, replace(protocol, reference="test"), network)


def test_an_mmd_that_the_device_does_not_hold_is_taken_elsewhere(
    folder: Path, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is meta, which holds no values; it has no memory for a kernel."""
    network, protocol = (
        own_extractor(extractor("small-fresh@nets.py:pixels")),
        protocol_named("small-fresh@nets.py:pixels"),
    )
    pool = network.features(digits.test_images[:60], CPU).pool
    cache = ReferenceCache(digits, protocol, network, CPU)
    wanted, within = cache.mmd(pool), cache.kernel_mean()
    for kept in (folder / "cache" / "reference").glob("*kernel.npz"):
        kept.unlink()
    places = []

    def short(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        places.append(x.device.type)
        if x.device.type == "meta":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return row_means(x, y)

    monkeypatch.setattr("trainables.evaluation.inception_scores.row_means", short)
    monkeypatch.setattr("trainables.evaluation.mmd.row_means", short)
    cache.device = torch.device("meta")
    assert cache.kernel_mean() == within and cache.mmd(pool) == wanted
    assert places[:2] == ["meta", "cpu"] and places.count("meta") == 2


@pytest.mark.parametrize("name", ["fid", "extractor"])
@pytest.mark.parametrize(("count", "ending"), [(10_000, ""), (60, "-n60")])
def test_ids_say_where_there_are_other_numbers_of_images(
    folder: Path, digits: ImageData, monkeypatch: pytest.MonkeyPatch, name: str, count: int, ending: str
) -> None:
    found = InceptionScores({"fid": 1.0, "fd": 1.0}, count, "reference", None)
    monkeypatch.setattr("trainables.evaluation.inception_scores.inception_scores", lambda *a, **k: found)
    identity, measure = "", fid.measure
    if name == "extractor":
        identity, measure = f"@{own_extractor(extractor('buffer-10k@nets.py:pixels')).id}", own_metric.measure
    images = torch.zeros(count, 1, 1, 1, dtype=torch.uint8)
    for protocol, made in (("buffer-10k", ""), ("fresh-10k", "-20steps"), ("buffer-all", None)):
        told = protocol_named(bind_protocol(f"{protocol}@nets.py:pixels") if identity else protocol)
        scored = measure(Samples(told, images, digits, CPU, "20steps"))
        end = "" if made is None else f"{made}{ending}"
        assert scored.protocol_id == f"{protocol}{identity}{end}"


def test_names_are_stored_with_their_files_and_their_code(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "nets.py").rename(folder / "sub" / "nets.py")
    named = {"trial": {"evaluation": {"protocols": ["fresh-10k", "fresh-10k@sub/nets.py:pixels@two.pth"]}}}
    stored = short_names(named, "study.yaml")
    expected = ["fresh-10k", f"fresh-10k@nets.py:pixels@{folder / 'two.pth'}"]
    assert stored["trial"]["evaluation"]["protocols"] == expected
    assert list(code_names(stored)) == [("extractor", "nets.py:pixels")]


def test_an_extractor_changes_the_digest_and_no_named_protocol() -> None:
    own = protocol_named("fresh-10k@nets.py:pixels")
    assert own.digest != PROTOCOLS["fresh-10k"].digest != protocol_named("fresh-10k@nets.py:whole").digest
    assert (own.count, own.source, own.features) == (10_000, "fresh", "own")
    assert "features of nets.py:pixels" in own.text()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "small-fresh@nets.py:pixels@none.pth",
            r"the weights of nets.py:pixels: there is no file none\.pth in .*; put",
        ),
        ("small-fresh@none.pt", r"there is no file none\.pt in"),
        ("small-fresh@two.pth", r"not a TorchScript file .*name FILE\.py:NAME@two\.pth"),
        ("small-fresh@nets.py:gone", "gone cannot be imported"),
        ("small-fresh@nets.py:none", "builds a int, expected a network or a function"),
        ("small-fresh@nets.py:whole", r"gives a torch\.uint8, expected a float tensor"),
        ("small-fresh@nets", "is not an extractor; expected FILE.py:NAME"),
        ("small-fresh@", "expected PROTOCOL@FILE.py:NAME"),
        ("smal-fresh@nets.py:pixels", "unknown .*did you mean small-fresh"),
    ],
)
def test_what_is_wrong_is_one_line(folder: Path, name: str, said: str) -> None:
    with pytest.raises((ValueError, NoFeaturesError), match=said) as error:
        own_extractor(extractor(name)).features(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), CPU)
    assert "\n" not in str(error.value)


def test_a_file_of_code_runs_only_where_it_was_named(folder: Path, tmp_path: Path) -> None:
    use(tmp_path / "stranger")
    with pytest.raises(NotTrustedError, match=r"script\.pt holds code that you have not run"):
        own_extractor(str(folder / "script.pt"))


def test_two_extractors_of_one_source_are_refused(folder: Path, quick: Callable[..., TrialConfig]) -> None:
    protocols = ["small-fresh@nets.py:pixels", "fresh-10k@nets.py:whole"]
    with pytest.raises(ValueError, match="one extractor of your own for the buffer and one for fresh"):
        quick(method="m-ebm", evaluation={"protocols": protocols})
