"""Draw the pictures of the documentation: `python docs/pictures.py [report|figures]`. It needs Chromium and the extra `docs`.

`images/report.png` is the first screen of the report of `results/published/digits_stability`; `images/figures` has every
kind of figure of that study, of `results/published/h100/gpu_stability` where the study has no data for one.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver

import analysis
from analysis.figures.registry import figures, joint_drawings, study_drawings

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "results" / "published"
IMAGES = ROOT / "docs" / "images"
COLOURS = 96
"""A palette: half the bytes, and no difference one sees."""


def main() -> None:
    """Draw what the command line names; all of it without a name."""
    wanted = sys.argv[1:] or ["report", "figures"]
    if "report" in wanted:
        draw_report(IMAGES / "report.png")
    if "figures" in wanted:
        draw_figures(IMAGES / "figures")


def draw_report(path: Path, width: int = 1400, height: int = 900) -> None:
    """The first screen of the report, as a browser of this size shows it."""
    with tempfile.TemporaryDirectory() as folder:
        study = Path(folder) / "digits_stability"
        shutil.copytree(PUBLISHED / "digits_stability", study)
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
    drawn: set[str] = set()
    for study in (PUBLISHED / "digits_stability", PUBLISHED / "h100" / "gpu_stability"):
        results = analysis.load(study)
        for drawing in (*study_drawings(results, study.name), *joint_drawings(results)):
            kind = next(k for k in kinds if drawing.name == k or drawing.name.startswith(f"{k}_"))
            if kind not in drawn:
                drawn.add(kind)
                save(drawing.figure.to_image("png", width=860, height=480), folder / f"{kind}.png")


def save(png: bytes, path: Path) -> None:
    """Write a PNG with few colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(png)).convert("RGB").quantize(COLOURS).save(path, optimize=True)


if __name__ == "__main__":
    main()
