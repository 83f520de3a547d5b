"""Own parts that cannot be used: one line that names part, object and place, exit code 2, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Dry = Callable[..., tuple[int, str, str]]
STUDY = """\
name: wrong
trial:
  method: m-ebm
  dataset: digits
  device: cpu
  network: conv-4
  norm: none
  epochs: 1
  iterations_per_epoch: 2
  buffer_size: 100
  batch_size: 16
  sampling_steps: 1
  evaluation: {every: 1, fresh_steps: 1}
search: {sampler: grid, grid: [{step_size: [1.0]}]}
"""
CODE = """\
import os
import sys

import numpy as np
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, shape, classes, width: int = 4, give="features"):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], width))
        self.give, self.constant = give, torch.ones(width)

    def forward(self, x):
        h = self.layers(x)
        if self.give == "energy":
            return h.sum(1)
        if self.give == "column":
            return h[:, :1]
        if self.give == "map":
            return h[:, :, None, None]
        if self.give == "numpy":
            return h.detach().numpy()
        if self.give == "detached":
            return h.detach()
        if self.give == "blind":
            return self.layers(x.detach())
        if self.give == "nan":
            return h / (h - h)
        if self.give == "int":
            return h.long()
        if self.give == "raise":
            raise KeyError("what")
        if self.give == "fork":
            os.fork()
        if self.give == "exit":
            sys.exit(3)
        if self.give == "print":
            print("hello from forward")
        if self.give == "cpu constant":
            return h * self.constant
        if self.give == "slope":
            return (h - h).abs().sqrt()
        return h


class OneShape(nn.Module):
    def __init__(self, shape):
        super().__init__()


def no_module(shape, classes):
    return lambda x: x


class NoParameters(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()

    def forward(self, x):
        return x.flatten(1).sum(1)


class Needy(nn.Module):
    def __init__(self, shape, classes, activation):
        super().__init__()


def needs_module(shape, classes, block: nn.Module):
    return block


class Normed(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(shape[0], 4, 3), nn.BatchNorm2d(4), nn.Flatten())

    def forward(self, x):
        return self.layers(x)


number = 3


class P0:
    def __init__(self, images, how="good"):
        self.shape, self.how = images.shape, how

    def sample(self, count, generator):
        x = torch.rand(count, *self.shape, generator=generator) * 2 - 1
        if self.how == "shape":
            return x[:, 0]
        if self.how == "dtype":
            return x.double()
        if self.how == "range":
            return x * 100
        if self.how == "nan":
            return x / 0 * 0
        if self.how == "list":
            return x.tolist()
        if self.how == "raise":
            raise RuntimeError("no such\\nthing")
        return x


def no_sample(images):
    return 3


def load(how="good"):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (60, 1, 8, 8)).astype(np.uint8), np.arange(60) % 3
    if how == "float":
        return x / 255, y
    if how == "nhwc":
        return x.transpose(0, 2, 3, 1), y
    if how == "short":
        return x, y[:-1]
    if how == "negative":
        return x, y - 1
    if how == "text":
        return x, [str(v) for v in y]
    if how == "none":
        return None
    if how == "empty":
        return x[:0], y[:0]
    if how == "three":
        return x, y, x
    if how == "exit":
        sys.exit("bye")
    return x, y


class Step(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, how="good"):
        super().__init__(params, {"lr": lr})
        self.how = how

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if self.how == "nan":
                    p.data.fill_(float("nan"))
                if self.how == "state":
                    self.state[p]["kept"] = Needy
                if self.how == "raise":
                    raise ValueError("cannot step")


def no_optimiser(params, lr):
    return 3


def no_rate(params):
    return torch.optim.SGD(params, 1.0)


def of_others(params, lr):
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr)


class Rough:
    name, label, direction, unit = "rough", "roughness", "minimize", "grey level"

    def __call__(self, samples, ctx):
        return (samples[..., 1:] - samples[..., :-1]).abs().mean()


class Undirected(Rough):
    direction = None


class Worded(Rough):
    def __call__(self, samples, ctx):
        return "rough"


class Misnamed(Rough):
    name = "a b"


class Same(Rough):
    pass


def undeclared(samples, ctx):
    return 1.0
"""
NET, ARGS = "network=own.py:", "network_args."
CASES = [
    (["network=own.py:None_"], "network own.py:None_: None_ cannot be imported: own.py has none"),
    (["network=own.py:number"], "network own.py:number: is of type int, expected a class or a function"),
    (["network=nowhere.py:Net"], "trial.network: nowhere.py:Net: there is no file nowhere.py in "),
    (["network=no_such_module:Net"], "network no_such_module:Net: "),
    (["network=own.py:OneShape"], "network own.py:OneShape: takes (shape), expected OneShape(shape, classes, **arg"),
    (["network=own.py:Needy"], "activation of own.py:Needy: field required"),
    (["network=own.py:needs_module"], "network own.py:needs_module: needs block, which is not a number or text and has no"),
    (["network=own.py:no_module"], "network own.py:no_module: gives a function, expected a torch.nn.Module (own.py:"),
    (["network=own.py:NoParameters"], "network own.py:NoParameters: has no parameters to train (own.py:"),
    (["network=own.py:Net", "network_args.widht=3"], "own.py:Net has no argument 'widht'; did you mean width? (it takes"),
    (["network=own.py:Net", "network_args.width=x"], "network_args: width = 'x' of own.py:Net: input should be a valid i"),
    (["network=own.py:Net", "network_args.width=true"], "network_args: width = "),
    (["network=conv-4", "network_args.width=3"], "width: only a network of your own takes arguments, but network is conv"),
    (["network=own.py:Net", "norm=batch"], "norm is batch, but network own.py:Net has no batch, instance or spectral norm"),
    (["network=own.py:Normed", "norm=none"], "norm is none, but network own.py:Normed has batch"),
    (["network=own.py:Net", "network_args.give=energy", "method=m-jem"], "gives energies, (N,), but this method needs cl"),
    (["network=own.py:Net", "network_args.give=column"], "give (N,) energies (.squeeze(1)), or (N, F) features with F >"),
    (["network=own.py:Net", "network_args.give=map"], "shape (2, 4, 1, 1) for 2 images, expected (N, F) features or (N"),
    (["network=own.py:Net", "network_args.give=int"], "forward gives torch.int64, expected floating-point numbers"),
    (["network=own.py:Net", "network_args.give=numpy"], "forward gives a ndarray, expected a tensor"),
    (["network=own.py:Net", "network_args.give=detached"], "no gradient to the image, which the sampler descends"),
    (["network=own.py:Net", "network_args.give=blind"], "no gradient to the image, which the sampler descends"),
    (["network=own.py:Net", "network_args.give=nan"], "its energy of the first training images is not finite"),
    (["network=own.py:Net", "network_args.give=slope"], "the gradient of its energy to the image is not finite"),
    (["network=own.py:Net", "network_args.give=raise"], "KeyError: 'what' (own.py:34)"),
    (["network=own.py:Net", "network_args.give=fork"], "it forks; take threads, or subprocess (own.py:36)"),
    (["network=own.py:Net", "network_args.give=exit"], "it calls sys.exit (own.py:38)"),
    (["initial=own.py:P0", "initial_args.how=shape"], "sample(4, generator) gives shape (4, 8, 8), expected (4, 1, 8, 8)"),
    (["initial=own.py:P0", "initial_args.how=dtype"], "gives torch.float64, expected torch.float32 (own.py:"),
    (["initial=own.py:P0", "initial_args.how=range"], "gives values from "),
    (["initial=own.py:P0", "initial_args.how=nan"], "gives values that are not finite"),
    (["initial=own.py:P0", "initial_args.how=list"], "gives a list, expected a tensor"),
    (["initial=own.py:P0", "initial_args.how=raise"], "RuntimeError: no such thing (own.py:"),
    (["initial=own.py:no_sample"], "initial own.py:no_sample: gives a int without sample(count, generator)"),
    (["dataset=own.py:load", "dataset_args.how=float"], "images are float64, expected uint8 from 0 to 255"),
    (["dataset=own.py:load", "dataset_args.how=nhwc"], "images have the shape (60, 8, 8, 1), expected 1 or 3 channels"),
    (["dataset=own.py:load", "dataset_args.how=short"], "labels have the shape (59,), expected (60,), one for each of"),
    (["dataset=own.py:load", "dataset_args.how=negative"], "labels run from -1 to 1, expected 0 to 99999"),
    (["dataset=own.py:load", "dataset_args.how=text"], "labels are list, expected integers"),
    (["dataset=own.py:load", "dataset_args.how=none"], "gives a NoneType, expected (images, labels[, test_images, test_"),
    (["dataset=own.py:load", "dataset_args.how=empty"], "images have the shape (0, 1, 8, 8), expected (N, C, H, W) with"),
    (["dataset=own.py:load", "dataset_args.how=three"], "gives 3 parts, expected (images, labels[, test_images, test_lab"),
    (["dataset=own.py:load", "dataset_args.how=exit"], "it calls sys.exit (own.py:"),
    (["dataset=own.py:load", "image_size=16"], "image_size is set, but it takes none"),
    (["optimiser=own.py:Step", "optimiser_args.how=nan"], "its step leaves weights that are not finite"),
    (["optimiser=own.py:Step", "optimiser_args.how=state"], "its state_dict() holds more than tensors, numbers, texts"),
    (["optimiser=own.py:Step", "optimiser_args.how=raise"], "step(): ValueError: cannot step (own.py:"),
    (["optimiser=own.py:no_optimiser"], "gives a int, expected a torch.optim.Optimizer (own.py:"),
    (["optimiser=own.py:no_rate"], "optimiser own.py:no_rate: has no argument lr; expected no_rate(params, lr=..., **argum"),
    (["optimiser=own.py:of_others"], "does not hold the parameters it was given"),
    (["optimiser=adan"], "input should be 'sgd', 'adam' or FILE.py:NAME; did you mean adam?"),
    (["evaluation.metrics=[own.py:Undirected]"], "has no direction, expected minimize or maximize (own.py:"),
    (["evaluation.metrics=[own.py:Worded]"], "gives a str, expected a number (own.py:"),
    (["evaluation.metrics=[own.py:Misnamed]"], "name is 'a b', expected letters, digits and _"),
    (["evaluation.metrics=[own.py:Rough,own.py:Same]"], "metrics own.py:Rough and own.py:Same have one name, rough"),
    (["evaluation.metrics=[own.py:undeclared]"], "has no direction, expected minimize or maximize"),
    (["evaluation.metrics=[own.py:Rough]", "evaluation.protocols=none"], "metrics are taken of samples, but evaluation.pr"),
]  # fmt: skip


@pytest.fixture
def study(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(CODE, encoding="utf-8")
    (tmp_path / "study.yaml").write_text(STUDY, encoding="utf-8")
    return tmp_path / "study.yaml"


@pytest.fixture
def dry_run(study: Path, mebm: Dry) -> Dry:
    """`mebm sweep --dry-run` with assignments."""
    return lambda *given: mebm("sweep", study, "--dry-run", *(v for a in given for v in ("--set", a)))


@pytest.mark.parametrize(("assignments", "said"), CASES, ids=[" ".join(a) for a, _ in CASES])
def test_a_wrong_part_is_one_line(study: Path, dry_run: Dry, assignments: list[str], said: str) -> None:
    before = sorted(study.parent.iterdir())
    if any(a.startswith(("network=own", "network=no")) for a in assignments):
        study.write_text(STUDY.replace("  norm: none\n", ""), encoding="utf-8")
    code, out, err = dry_run(*(f"trial.{a}" for a in assignments))
    assert code == 2 and said in err, err
    assert err.count("\n") == 1 and not out
    assert [p for p in sorted(study.parent.iterdir()) if p.name != "__pycache__"] == before


def test_what_a_part_prints_is_said_once_and_stays_off_standard_output(study: Path, dry_run: Dry) -> None:
    (study.parent / "own.py").write_text(f'{CODE}\nprint("imported")\n', encoding="utf-8")
    study.write_text(STUDY.replace("  norm: none\n", "").replace("conv-4", "own.py:Net"), encoding="utf-8")
    code, out, err = dry_run("trial.network_args.give=print")
    assert code == 0, err
    assert "network own.py:Net: prints 'hello from forward'" in out and "(own.py:40)" in out
    assert out.count("hello") == 1 and "imported" not in out


def test_a_constant_that_stays_on_the_cpu_is_said_without_a_gpu(study: Path, dry_run: Dry) -> None:
    study.write_text(STUDY.replace("  norm: none\n", "").replace("conv-4", "own.py:Net"), encoding="utf-8")
    code, out, _ = dry_run("trial.network_args.give=cpu constant", "trial.device=auto")
    assert code == 0 and "would fail on a GPU: network own.py:Net: forward on a GPU" in out and "(own.py:42)" in out


def test_an_own_metric_is_an_objective_by_its_name(study: Path, dry_run: Dry) -> None:
    own = "trial.evaluation.metrics=[own.py:Rough]"
    code, out, err = dry_run(own, "objectives=[{metric: rough_fresh}]")
    assert code == 0 and "objectives  minimize rough_fresh" in out, err
    code, _, err = dry_run(own, "objectives=[{metric: own.smooth_fresh}]")
    assert code == 2 and "own.smooth_fresh is none of own.rough_buffer, own.rough_fresh" in err
    code, _, err = dry_run("objectives=[{metric: own.rough_fresh}]")
    assert code == 2 and "own.rough_fresh is a script's or of evaluation.metrics; expected one of" in err
    code, _, err = dry_run(own, "pruning={rule: median, metric: rough_buffer}")
    assert code == 0, err
