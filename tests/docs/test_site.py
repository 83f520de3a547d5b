"""The manual: it builds without a warning, its generated pages and examples are in step, its links and pictures exist."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from analysis.figures.registry import figures
from study.cli.main import cli

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]


def _anchors(text: str) -> set[str]:
    """As GitHub and mkdocs make them of headings."""
    found = (re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", h)).strip() for h in re.findall(r"^#+ (.*)$", text, re.M))
    return {h.lower().replace(" ", "-") for h in found}


def _prose(page: Path) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)


def _links(page: Path) -> Iterator[tuple[str, str]]:
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if "://" not in target and not target.startswith("mailto:"):
            yield tuple(f"{target}#".split("#")[:2])  # type: ignore[misc]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="extra docs")
    ended = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "site" / "reference" / "fields" / "index.html").stat().st_size > 20_000


def test_generated_pages_are_what_the_code_makes() -> None:
    pages = runpy.run_path(str(DOCS / "generate.py"))["pages"]()
    behind = [path.name for path, text in pages.items() if not path.is_file() or path.read_text("utf-8") != text]
    assert not behind, "run python docs/generate.py"
    assert set((DOCS / "reference").rglob("*.md")) == set(pages)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in _links(page):
        place = (page.parent / target).resolve() if target else page
        assert place.exists(), f"{page.name}: {target}"
        assert place.is_relative_to(ROOT)
        if anchor and place.suffix == ".md":
            assert anchor in _anchors(place.read_text(encoding="utf-8")), f"{page.name}: {target}#{anchor}"


def test_every_kind_of_figure_has_a_picture_and_none_is_left_over() -> None:
    pictures = {p.stem for p in (DOCS / "images" / "figures").glob("*.png")}
    assert pictures == {f.name for f in figures()}


def test_the_table_of_the_digits_is_that_of_the_published_study() -> None:
    trials = pd.read_parquet(ROOT / "results" / "published" / "digits_stability" / "trials.parquet")
    lines = []
    for (norm, initial, weight), group in trials.groupby(["norm", "initial", "l2_weight"], sort=False):
        cells = []
        for k in (1, 2, 5, 10):
            of_k = group[group["sampling_steps"] == k]
            parts = []
            for outcome, words in (("diverged", ""), ("collapsed", " collapsed")):
                at = sorted(of_k["iteration"][of_k["outcome"] == outcome].astype(int))
                if len(at) or not words:
                    span = f" ({at[0]}{f'–{at[-1]}' if len(at) > 1 else ''})" if at else ""
                    parts.append(f"{len(at)}{words}{span}")
            cells.append("; ".join(parts) if len(of_k) else "–")
        lines.append(f"| {norm}, {initial}, {weight:g} | {' | '.join(cells)} |")
    page = (DOCS / "divergence.md").read_text(encoding="utf-8")
    assert len(lines) == 5 and all(line in page for line in lines), lines


def test_the_table_of_cifar10_is_that_of_the_published_study() -> None:
    trials = pd.read_parquet(ROOT / "results" / "published" / "cifar10_gpu" / "trials.parquet")
    lines = []
    for initial, group in trials.groupby("initial", sort=False):
        cells = []
        for k in (1, 2, 5, 10):
            of_k = group[group["sampling_steps"] == k].sort_values("seed")
            at = sorted(of_k["iteration"][of_k["outcome"] == "collapsed"].astype(int))
            fids = ", ".join(f"{v:.1f}" for v in of_k["fid_buffer_last"][of_k["outcome"] == "completed"])
            cells.append(f"{len(at)} collapsed ({at[0]}–{at[-1]})" if at else fids)
        lines.append(f"| {initial} | {' | '.join(cells)} |")
    page = (DOCS / "cifar10.md").read_text(encoding="utf-8")
    assert len(lines) == 2 and all(line in page for line in lines), lines


def test_the_table_of_the_small_cifar10_study_is_that_of_the_published_one() -> None:
    folder = ROOT / "results" / "published" / "cifar10_cpu"
    trials, scored = pd.read_parquet(folder / "trials.parquet"), pd.read_parquet(folder / "evaluations.parquet")
    trials["fid"] = trials["trial_id"].map(dict(zip(scored["trial_id"], scored["value"], strict=True)))
    ended = trials["outcome"] != "completed"
    lines = []
    named = {"FD of the buffer": "fd_buffer_last", "FD of fresh chains": "fd_fresh_last", "FID of fresh chains": "fid"}
    for name, column in named.items():
        of_row = trials[trials["initial"] == "gaussian"].sort_values("seed").groupby("sampling_steps")
        cells = [", ".join("–" if ended[i] else f"{part.loc[i, column]:.1f}" for i in part.index) for _, part in of_row]
        lines.append(f"| Gaussian, {name} | {' | '.join(cells)} |")
    uniform = trials[trials["initial"] == "uniform"].groupby("sampling_steps")["iteration"]
    cells = [f"{len(at)} collapsed ({at.min():.0f}–{at.max():.0f})" for _, at in uniform]
    lines.append(f"| uniform | {' | '.join(cells)} |")
    page = (DOCS / "cifar10.md").read_text(encoding="utf-8")
    assert len(lines) == 4 and all(line in page for line in lines), lines
    (collapsed,) = trials.loc[ended & (trials["initial"] == "gaussian"), "iteration"]
    assert f"– collapsed, at iteration {collapsed:.0f}" in page


def test_the_table_of_flat_optima_is_that_of_the_published_study() -> None:
    trials = pd.read_parquet(ROOT / "results" / "published" / "digits_sam" / "trials.parquet")
    rho = trials["config"].map(lambda text: json.loads(text).get("sam_rho") or 0)
    lines = []
    for steps, group in trials.groupby("sampling_steps"):
        cells = []
        for _, part in group.groupby(rho):
            at = sorted(part["iteration"][part["outcome"] == "diverged"].astype(int))
            span = "" if not at else f" ({at[0]})" if len(at) == 1 else f" ({at[0]}–{at[-1]})"
            cells.append(f"{len(at)}{span}")
        lines.append(f"| {steps} | {' | '.join(cells)} |")
    page = (DOCS / "divergence.md").read_text(encoding="utf-8")
    assert len(lines) == 2 and all(line in page for line in lines), lines


def test_the_readme_is_short_and_shows_a_picture() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    (picture,) = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert 20_000 < (ROOT / picture).stat().st_size < 300_000


def test_the_notebook_is_the_tutorial_and_every_cell_ran() -> None:
    notebook = json.loads((DOCS / "examples" / "tutorial.ipynb").read_text(encoding="utf-8"))
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    marked = re.split(r"^# %%(.*)\n", (DOCS / "tutorial.py").read_text(encoding="utf-8"), flags=re.M)[1:]
    code = [text.strip() for kind, text in zip(marked[::2], marked[1::2], strict=True) if "markdown" not in kind]
    assert ["".join(c["source"]).strip() for c in cells] == code, "run python docs/notebook.py"
    assert all(c["execution_count"] for c in cells)
    outputs = [o for c in cells for o in c["outputs"]]
    assert not any(o["output_type"] == "error" for o in outputs)
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 3
    assert str(Path.home()) not in str(outputs) and "/tmp/" not in str(outputs)


def test_the_examples_are_the_snippets_of_the_manual() -> None:
    text = (DOCS / "extending.md").read_text(encoding="utf-8")
    for name in ("train.py", "parts.py", "parts.yaml", "my_ebm.py", "study.yaml"):
        assert (DOCS / "examples" / name).read_text(encoding="utf-8") in text, name


@pytest.mark.slow
@pytest.mark.parametrize("line", re.findall(r"\| `(mebm .*)` \|$", (DOCS / "examples" / "README.md").read_text(), re.M))
def test_the_commands_of_the_examples_run(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "examples"
    here.mkdir()
    for path in (DOCS / "examples").rglob("*"):
        if path.is_file() and path.suffix != ".ipynb":
            (here / path.relative_to(DOCS / "examples")).parent.mkdir(exist_ok=True)
            (here / path.relative_to(DOCS / "examples")).write_bytes(path.read_bytes())
    monkeypatch.chdir(here)
    words = [
        str(p) for w in shlex.split(line)[1:] for p in (sorted(here.glob(w)) if "*" in w and "(" not in w else [w])
    ]
    ended = CliRunner().invoke(cli, words)
    assert ended.exit_code == 0, ended.output
    assert list(here.rglob("trials.parquet"))


OLD_TURNS = re.compile(
    r"\b(made anew|one in so many|of its own|(?<!there )(?<!There )(?<!it )is no (?!longer\b|more than\b|less than\b|better\b|worse\b|larger\b|smaller\b))",
    re.I,
)


def test_no_archaic_turns() -> None:
    sources = [
        p
        for top in ("mebm", "study", "trainables", "analysis", "benchmarks", "configs")
        for p in (ROOT / top).rglob("*")
    ]
    sources = [*PAGES, *(p for p in sources if p.suffix in (".py", ".md", ".yaml", ".html", ".js"))]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if OLD_TURNS.search(line)
    ]
    assert not found, "\n".join(found)
