"""Fixtures of the tests of `trainables`: one thread, a cache of their own, small data, copies of states, Adam's step."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData, load_dataset
from trainables.methods.presets import build_trial
from trainables.training.trainer import Trainer


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The package's cache, so that no test reads or writes the user's."""
    folder = tmp_path_factory.mktemp("mebm-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEBM_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def nudged() -> Callable[[Trainer, int], Trainer]:
    """Moves every weight of a trainer's energy model to a neighbouring float: what rounding alone may come to."""

    def nudge(trainer: Trainer, seed: int) -> Trainer:
        random = torch.Generator().manual_seed(seed)
        for p in trainer.model.parameters():
            up = torch.rand(p.shape, generator=random) < 0.5
            with torch.no_grad():
                p.copy_(torch.nextafter(p, torch.where(up, torch.inf, -torch.inf)))
        return trainer

    return nudge


@pytest.fixture(scope="session")
def digits(cache: Path) -> ImageData:
    return load_dataset("digits")


@pytest.fixture(scope="session")
def make_data() -> Callable[..., ImageData]:
    """Blurred noise with labels: `make_data(count, shape, classes, seed)`."""

    def make(count: int = 200, shape: tuple[int, int, int] = (1, 8, 8), classes: int = 4, seed: int = 0) -> ImageData:
        g = torch.Generator().manual_seed(seed)
        total = count + 40
        coarse = torch.rand(total, shape[0], shape[1] // 2, shape[2] // 2, generator=g)
        fine = torch.nn.functional.interpolate(coarse, size=shape[1:], mode="bilinear")
        images = (fine * 255).to(torch.uint8)
        labels = torch.randint(0, classes, (total,), generator=g)
        labels[:classes] = torch.arange(classes)
        return ImageData(
            "made-up", images[:count], labels[:count], images[count:], labels[count:], classes, f"test:made-up#{seed}"
        )

    return make


@pytest.fixture(scope="session")
def quick() -> Callable[..., TrialConfig]:
    """A digits trial without quality numbers: `quick(**fields)`."""

    def make(**fields: Any) -> TrialConfig:
        base: dict[str, Any] = {
            "epochs": 3,
            "iterations_per_epoch": 8,
            "buffer_size": 300,
            "sampling_steps": 2,
            "device": "cpu",
            "evaluation": {"protocols": "none"},
        }
        return build_trial(base | fields)

    return make


@pytest.fixture(scope="session")
def same() -> Callable[[Any, Any], bool]:
    """Bitwise equality of nested states: tensors, mappings, sequences, plain values."""

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return (
                isinstance(b, torch.Tensor)
                and a.dtype == b.dtype
                and a.shape == b.shape
                and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
            )
        if isinstance(a, dict):
            return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
        if isinstance(a, (list, tuple)):
            return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
        return bool(a == b)

    return equal


@pytest.fixture(scope="session")
def copy_of() -> Callable[[Any], Any]:
    """A state written and read back as a checkpoint is: `copy_of(state_dict)`."""

    def copy(state: Any) -> Any:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    return copy


@pytest.fixture(scope="session")
def generators_of() -> Callable[[Any], dict[str, torch.Generator]]:
    """The random streams of a trainer's state as generators of their own, by purpose."""

    def build(state: Any) -> dict[str, torch.Generator]:
        made = {}
        for purpose, saved in state["generators"].items():
            made[purpose] = torch.Generator()
            made[purpose].set_state(saved)
        return made

    return build


@pytest.fixture(scope="session")
def check_adam() -> Callable[..., None]:
    """One step of Adam against its definition (Kingma and Ba, Algorithm 1), with gradients taken elsewhere.

    `check_adam(optimiser, before, parameters, weights, gradients, rate, betas)`: the optimiser after the step, its
    state dict before it, the parameters after it, their values before it, and the gradient each of them should have had
    (None: none). The moments are compared with what the gradients make them, the weights with what the moments make
    them: a step of Adam divides by the gradient's own size, so a rounding error of a tiny gradient may turn it.
    """

    def check(
        optimiser: torch.optim.Optimizer,
        before: dict[str, Any],
        parameters: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor | None],
        rate: float,
        betas: tuple[float, float],
        *,
        rtol: float = 1e-3,
        atol: float = 2e-6,
    ) -> None:
        assert optimiser.param_groups[0]["lr"] == pytest.approx(rate)
        state = optimiser.state_dict()["state"]
        slow, fast = betas
        # Some gradients are 0 but for rounding (a bias before a norm), so the error is measured by the largest of all.
        largest = max(float(g.abs().max()) for g in gradients if g is not None)
        for i, (p, old, g) in enumerate(zip(parameters, weights, gradients, strict=True)):
            if g is None:
                assert i not in state and torch.equal(p, old)
                continue
            earlier = before["state"].get(i)
            m = torch.zeros_like(old) if earlier is None else earlier["exp_avg"]
            v = torch.zeros_like(old) if earlier is None else earlier["exp_avg_sq"]
            t = 1 if earlier is None else int(earlier["step"]) + 1
            now = state[i]
            assert int(now["step"]) == t
            torch.testing.assert_close(now["exp_avg"], slow * m + (1 - slow) * g, rtol=rtol, atol=atol * largest)
            torch.testing.assert_close(
                now["exp_avg_sq"], fast * v + (1 - fast) * g * g, rtol=2 * rtol, atol=(1 - fast) * atol * largest**2
            )
            first = now["exp_avg"].double() / (1 - slow**t)
            second = now["exp_avg_sq"].double() / (1 - fast**t)
            wanted = old.double() - rate * first / (second.sqrt() + 1e-8)
            torch.testing.assert_close(p.detach().double(), wanted, rtol=1e-6, atol=1e-3 * rate + 1e-7)

    return check
