"""Draw the pictures of the documentation: `python docs/pictures.py [report|figures|scaling|samples]`.

It needs Chromium (but for the samples) and the extra `docs`.

`images/report.png` is the first screen of the report of `results/published/cifar10_gpu`; `images/figures` has every kind of
figure, of `digits_stability` with the score of fresh chains as a second objective, `scaling` of `digits_scaling`, or of the
generated study of `benchmarks.example` where neither has data for one. `images/samples.png` is of `cifar10_cpu`.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver

import analysis
from analysis.figures.export import write_images
from analysis.figures.registry import figures, joint_drawings, study_drawings
from analysis.figures.style import with_look
from analysis.results.manifest import with_checksum
from benchmarks.example import write_example
from trainables.results.layout import MANIFEST

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "results" / "published"
IMAGES = ROOT / "docs" / "images"
COLOURS = 224
"""A palette: half the bytes, and no difference one sees."""


def main() -> None:
    """Draw what the command line names; all of it without a name."""
    wanted = sys.argv[1:] or ["report", "figures", "scaling", "samples"]
    if "report" in wanted:
        draw_report(IMAGES / "report.png")
    if "figures" in wanted:
        draw_figures(IMAGES / "figures")
    if "scaling" in wanted or "figures" in wanted:
        draw_scaling(IMAGES / "figures" / "scaling.png")
    if "samples" in wanted:
        draw_samples(IMAGES / "samples.png")


def draw_report(path: Path, width: int = 1400, height: int = 1180) -> None:
    """The first screen of the report, as a browser of this size shows it."""
    with tempfile.TemporaryDirectory() as folder:
        study = Path(folder) / "cifar10_gpu"
        shutil.copytree(PUBLISHED / "cifar10_gpu", study)
        page = analysis.write_report(analysis.load(study), Path(folder) / "report.html")
        options = webdriver.ChromeOptions()
        for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars", f"--window-size={width},{height}"):
            options.add_argument(argument)
        browser = webdriver.Chrome(options=options)
        try:
            browser.get(page.as_uri())
            browser.implicitly_wait(5)
            browser.find_element("css selector", ".js-plotly-plot .main-svg")
            picture = browser.get_screenshot_as_png()
        finally:
            browser.quit()
    save(picture, path)


def draw_figures(folder: Path) -> None:
    """The first drawing of every kind of figure."""
    shutil.rmtree(folder, ignore_errors=True)
    kinds = sorted((f.name for f in figures()), key=len, reverse=True)
    drawn: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        rescued = PUBLISHED / "digits_rescue" / "digits_rescue"
        for study in (two_objectives(Path(temporary)), rescued, write_example(Path(temporary) / "example")):
            results = analysis.load(study)
            for drawing in (*study_drawings(results, study.name), *joint_drawings(results)):
                kind = next(k for k in kinds if drawing.name == k or drawing.name.startswith(f"{k}_"))
                drawn.setdefault(kind, with_look(drawing.figure, drawing.caption))
        # The report draws interactions only where they beat chance; these may be chance.
        fields = ("sampling_steps", "initial", "step_size")
        interactions = analysis.interaction_figure(results.trials, fields, "fd_buffer")
        drawn.setdefault("interactions", with_look(interactions, ""))
        write_images(Path(temporary), [(figure, Path(temporary) / f"{kind}.png") for kind, figure in drawn.items()])
        for kind in drawn:
            save((Path(temporary) / f"{kind}.png").read_bytes(), folder / f"{kind}.png")


def draw_scaling(path: Path) -> None:
    """The boundary of stability over the widths of `results/published/digits_scaling`."""
    (drawing,) = [d for d in joint_drawings(analysis.load(PUBLISHED / "digits_scaling")) if d.name == "scaling"]
    with tempfile.TemporaryDirectory() as temporary:
        write_images(Path(temporary), [(with_look(drawing.figure, drawing.caption), Path("scaling.png"))])
        save((Path(temporary) / "scaling.png").read_bytes(), path)


def draw_samples(path: Path) -> None:
    """Images of the buffer and of fresh chains at K = 2, then at K = 10, of one seed of `results/published/cifar10_cpu`."""
    names = [f"{trial}_{source}.png" for trial in ("t0007", "t0019") for source in ("buffer", "fresh")]
    grids = [Image.open(PUBLISHED / "cifar10_cpu" / "samples" / name) for name in names]
    width, height = grids[0].size
    whole = Image.new("RGB", (len(grids) * (width + 8) - 8, height), "white")
    for i, grid in enumerate(grids):
        whole.paste(grid, (i * (width + 8), 0))
    png = io.BytesIO()
    whole.save(png, "PNG")
    save(png.getvalue(), path)


def two_objectives(folder: Path) -> Path:
    """The study with its second score as a second objective."""
    folder = Path(shutil.copytree(PUBLISHED / "digits_stability", folder / "digits_stability"))
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    manifest["objectives"] = [{"metric": m, "direction": "minimize"} for m in ("fd_buffer", "fd_fresh")]
    (folder / MANIFEST).write_text(json.dumps(with_checksum(manifest)), encoding="utf-8")
    return folder


def save(png: bytes, path: Path) -> None:
    """Write a PNG with few colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(png)).convert("RGB").quantize(COLOURS).save(path, optimize=True)


if __name__ == "__main__":
    main()
