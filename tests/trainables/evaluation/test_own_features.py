"""Extractors of a user's own: their names and hashes, their scores, and one line for whatever is wrong with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from study.config.own_code import bind_protocol, code_names, short_names
from trainables.config.protocols import PROTOCOLS, protocol_named
from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.evaluation.frechet import frechet_distance, statistics
from trainables.evaluation.inception import NoFeaturesError
from trainables.evaluation.mmd import mmd
from trainables.evaluation.own_features import own_extractor
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
    assert found.protocols["extractor_fd_buffer"] == f"small-buffer@{identity}"
    assert found.protocols["extractor_mmd_fresh"] == f"small-fresh@{identity}-2steps"
    buffer = ((trainer._shuffled_buffer()[:1000].clamp(-1, 1) + 1) * 127.5).round() / 255
    real = digits.images.flatten(1)[:, ::4].double().numpy() / 255
    features = buffer.flatten(1)[:, ::4].double().numpy()
    exact = frechet_distance(*statistics(features), *statistics(real))
    assert found.values["extractor_fd_buffer"] == pytest.approx(exact, rel=1e-4)


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
