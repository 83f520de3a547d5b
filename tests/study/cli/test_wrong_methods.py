"""Methods of a user's own that do not work: one line with file and line before anything starts, and nothing is left."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from study.cli.main import main

STUDY = """\
name: wrong
trial: {method: "my_ebm.py:Mine", device: cpu, network: conv-4, epochs: 1, iterations_per_epoch: 2, batch_size: 8}
search: {sampler: grid, grid: [{sampling_steps: [1, 2]}]}
seeds: [0]
"""
HEAD = """\
import os, sys
import mebm
import torch


class Mine(mebm.Method):
"""
ENERGY, LOSS = "    def energy(self, net, x): ", "    def loss(self, e_data, e_samples, ctx): "
WRONG = {
    "no import": ("import not_there_at_all\n", "my_ebm.py:1: ModuleNotFoundError: No module named 'not_there_at_all'"),
    "no syntax": ("class Mine(:\n", "my_ebm.py:1: SyntaxError"),
    "no class": ("import mebm\n", "my_ebm.py has no"),
    "no method": ("class Mine: pass\n", "Mine is not a method (a subclass of mebm.Method)"),
    "exit at import": ("import sys\nsys.exit(3)\n", "my_ebm.py:2: it calls sys.exit when it is imported"),
    "too few arguments": (
        HEAD + "    def loss(self, e_data): return e_data.mean()\n",
        "my_ebm.py:7: Mine.loss(e_data) is called as loss(e_data, e_samples, ctx)",
    ),
    "too many arguments": (
        HEAD + "    def energy(self, net, x, labels): return net(x)\n",
        "my_ebm.py:7: Mine.energy(net, x, labels) is called as energy(net, x)",
    ),
    "no function": (HEAD + "    sample: int = 3\n", "Mine.sample is a hook, and no name for a field"),
    "shape of the energy": (
        HEAD + ENERGY + "return net(x).sum()\n",
        "my_ebm.py:7: Mine.energy returned a tensor of shape (), float32; expected one energy per image, "
        "a tensor of shape (4,)",
    ),
    "type of the energy": (HEAD + ENERGY + "return net(x).long()\n", "my_ebm.py:7: Mine.energy returned a tensor"),
    "energy is none": (HEAD + ENERGY + "net(x)\n", "my_ebm.py:7: Mine.energy returned None; expected one energy"),
    "energy is not a tensor": (
        HEAD + ENERGY + "return [0.0] * len(x)\n", "my_ebm.py:7: Mine.energy returned a value of type list;"
    ),
    "energy without a graph": (
        HEAD + ENERGY + "return net(x).detach()\n", "my_ebm.py:7: Mine.energy returned energies without a graph to x"
    ),
    "energy is not finite": (
        HEAD + ENERGY + "return net(x) * float('nan')\n",
        "my_ebm.py:7: Mine.energy gives energies that are not finite, with an untrained network on noise",
    ),
    "loss is none": (HEAD + LOSS + "e_data.mean()\n", "my_ebm.py:7: Mine.loss returned None; expected a scalar tensor"),
    "loss is a number": (
        HEAD + LOSS + "return e_data.mean().item()\n", "my_ebm.py:7: Mine.loss returned a value of type float;"
    ),
    "loss of every image": (
        HEAD + LOSS + "return e_data - e_samples\n",
        "my_ebm.py:7: Mine.loss returned a tensor of shape (4,), float32; expected a scalar tensor",
    ),
    "loss without a graph": (
        HEAD + LOSS + "return (e_data - e_samples).mean().detach()\n",
        "my_ebm.py:7: Mine.loss returned a loss without a graph",
    ),
    "loss is not finite": (
        HEAD + LOSS + "return (e_data - e_samples).mean() / 0\n", "my_ebm.py:7: Mine.loss gives a loss that is not finite"
    ),
    "samples of a wrong shape": (
        HEAD + "    def sample(self, ctx): return torch.zeros(4, 8, 8)\n",
        "my_ebm.py:7: Mine.sample returned a tensor of shape (4, 8, 8), float32; expected images, "
        "a floating tensor of shape (N, 1, 8, 8)",
    ),
    "samples are none": (HEAD + "    def sample(self, ctx): pass\n", "my_ebm.py:7: Mine.sample returned None;"),
    "networks are none": (HEAD + "    def networks(self, make): pass\n", "my_ebm.py:7: Mine.networks returned None; expected a dict of names to TrainedNetwork"),
    "raises": (
        HEAD + LOSS + "\n        return self.helper(e_data)\n\n    def helper(self, e):\n        raise ValueError('no way')\n",
        "my_ebm.py:11: Mine.helper: ValueError: no way",
    ),
    "raises inside torch": (
        HEAD + LOSS + "return (e_data @ e_samples[:2]).mean()\n", "my_ebm.py:7: Mine.loss: RuntimeError: "
    ),
    "exits": (HEAD + LOSS + "sys.exit(3)\n", "my_ebm.py:7: Mine.loss: called sys.exit(3)"),
    "forks": (
        HEAD
        + LOSS
        + """
        if os.fork() == 0:
            os._exit(0)
        return e_data.mean() - e_samples.mean()
""",
        "my_ebm.py:8: Mine forks the process",
    ),
    "a network that cannot be made again": (
        HEAD
        + """
    kept = ("energy", "other")
    def networks(self, make):
        return super().networks(make) | {"other": make.trained(torch.nn.Linear(1, 1), 1e-3)}
""",
        "Mine.untrained makes no network 'other', which `kept` names",
    ),
    "preset is not a mapping": (HEAD + "    preset = 3\n", "Mine.preset must be a mapping of a trial's fields"),
    "preset has another field": (HEAD + "    preset = {'sampling_step': 3}\n", "sampling_step"),
    "uses is not a group": (HEAD + "    uses = {'data', 'chain'}\n", "Mine.uses: 'chain' is not a group; expected some of"),
    "networks without an energy": (
        HEAD + "    def networks(self, make): return {'other': make.energy('other')}\n",
        "my_ebm.py:7: Mine.networks has no 'energy': begin with super().networks(make)",
    ),
    "variant is none": (HEAD + "    def variant(self, at): pass\n", "my_ebm.py:7: Mine.variant returned None; expected a Variant"),
    "streams are none": (
        HEAD + "    def streams(self, trial): return {'data': 4}\n",
        "my_ebm.py:7: Mine.streams returned a value of type dict; expected a Mapping of names to Stream",
    ),
    "outputs are a tensor": (
        HEAD + "    def outputs(self, net, batch): return net(batch.x)\n", "my_ebm.py:7: Mine.outputs returned a tensor"
    ),
    "draw keeps nothing": (
        HEAD + "    def draw(self, drawing, count, random, keep): pass\n", "my_ebm.py:7: Mine.draw keeps no images"
    ),
    "after raises": (HEAD + "    def after(self, ctx): ctx.step('critic', None)\n", "my_ebm.py:7: Mine.after: KeyError: "),
    "check raises": (
        HEAD + "    def check(self, trial): return trial.nothing\n", "my_ebm.py:7: Mine.check: AttributeError: "
    ),
    "by_steps raises": (
        HEAD + "    @classmethod\n    def by_steps(cls, steps): return {}[steps]\n",
        "my_ebm.py:8: Mine.by_steps: KeyError: 5",
    ),
    "sources raises": (HEAD + "    def sources(self, trial): return 1 / 0\n", "my_ebm.py:7: Mine.sources: ZeroDivisionError"),
    "a field without a range": (
        HEAD + "    width: int = mebm.field(8, ge=1)\n", "my_ebm.py:7: TypeError: field() missing 1 required keyword-only",
    ),
}  # fmt: skip


def _sweep(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """`mebm sweep` as its entry point runs it."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["mebm", "sweep", "study.yaml", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize("kind", WRONG)
def test_it_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    text, expected = WRONG[kind]
    (tmp_path / "my_ebm.py").write_text(text, encoding="utf-8")
    (tmp_path / "study.yaml").write_text(STUDY, encoding="utf-8")
    code = _sweep(tmp_path, monkeypatch)  # not --dry-run: what is refused here has written nothing
    out, err = capfd.readouterr()
    assert code == 2, out + err
    assert err.count("\n") == 1 and err.startswith("mebm: ") and expected in err, err
    assert out == "" and sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == [
        "my_ebm.py",
        "study.yaml",
    ]


def test_what_it_prints_is_said_and_kept_out_of_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = HEAD + LOSS + "\n        print('noise')\n        return e_data.mean() - e_samples.mean()\n"
    (tmp_path / "my_ebm.py").write_text(text, encoding="utf-8")
    (tmp_path / "study.yaml").write_text(STUDY, encoding="utf-8")
    assert _sweep(tmp_path, monkeypatch, "--dry-run") == 0
    out, err = capfd.readouterr()
    assert "noise" not in out + err
    assert "note        my_ebm.py:8: prints, which goes to the log of a trial's worker" in out


def test_bare_names_of_own_fields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    field = '    heat: float = mebm.field(1.0, gt=0, description="T", suggest=(0.1, 10.0, "log"))\n'
    (tmp_path / "my_ebm.py").write_text(HEAD + field, encoding="utf-8")
    base = STUDY.replace("search: {sampler: grid, grid: [{sampling_steps: [1, 2]}]}", "{search}")
    for search, expected in {
        "search: {trials: 4, space: {heat: {low: 0.5, high: 2.0}}, start: [{heat: 1.0}]}": "method_args.heat: 0.5 to 2",
        "search: {trials: 4, space: {heat: auto}}": "method_args.heat: 0.1 to 10 (log)",
        "search: {trials: 4, space: {method_args.heat: {low: 0.5, high: 2.0}}}": "method_args.heat: 0.5 to 2",
        "search: {sampler: grid, grid: [{heat: [1, 2]}]}": "method_args.heat: 1, 2",
    }.items():
        (tmp_path / "study.yaml").write_text(base.replace("{search}", search), encoding="utf-8")
        assert _sweep(tmp_path, monkeypatch, "--dry-run") == 0, capfd.readouterr()
        assert f"searched    {expected}" in capfd.readouterr().out
    assert _sweep(tmp_path, monkeypatch, "--dry-run", "--set", "heat=3") == 2
    assert "searched here and fixed under trial" in capfd.readouterr().err
    (tmp_path / "study.yaml").write_text(STUDY.replace("device: cpu", "device: cpu, heat: -1"), encoding="utf-8")
    assert _sweep(tmp_path, monkeypatch, "--dry-run") == 2
    assert "heat" in (said := capfd.readouterr().err) and "greater than 0" in said
    twice = STUDY.replace("device: cpu", "device: cpu, heat: 1, method_args: {heat: 2}")
    (tmp_path / "study.yaml").write_text(twice, encoding="utf-8")
    assert _sweep(tmp_path, monkeypatch, "--dry-run") == 2
    assert "trial.heat: stands there as method_args.heat too" in capfd.readouterr().err
