"""`mebm score`: images of any generator under a named protocol."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from study.cli.options import PATH, argument, device_option, json_option, option, out_option, show
from study.config.errors import UserError, nearest, parse_choices

if TYPE_CHECKING:
    from trainables.data.datasets import ImageData


@dataclass(frozen=True)
class Score:
    """Score images that any model made, so that they stand in its row of Tables 1-4 as measured.

    IMAGES is one image set: a folder of image files, or an NPZ, NPY, Parquet or .pt file, at the size of the reference.
    Several are several samplings of the same model: the tables show their mean and spread.

    \b
    Examples:
      mebm score ddpm.npz -p fresh-50k --as DDPM --reference cifar10
      mebm score ddpm.npz -p fresh-50k@dino.py:Dino@dinov2.pth --as DDPM
      mebm score seed0/ seed1/ -p fresh-10k --as "Residual Flow"
      mebm tables results/scores results/NAME
    """

    images: tuple[Path, ...] = argument(type=PATH, nargs=-1, required=True, metavar="IMAGES...")
    protocols: tuple[str, ...] = option(
        "A protocol of `mebm methods`; PROTOCOL@FILE.py:NAME[@WEIGHTS]: on features of your own.",
        "--protocol",
        "-p",
        multiple=True,
        metavar="P",
    )
    model: str = option(
        "The model that made them, as its row is called; any other name is scored, and in no row.",
        "--as", required=True, metavar="NAME",
    )  # fmt: skip
    reference: str = option("Data set to compare with.", default="cifar10", metavar="DATASET")
    data_dir: Path | None = option("Where its images are.", type=PATH)
    metrics: str = option(
        "Of fid, isc, kid, mmd, precision, recall, density, coverage, memorisation; not with the small-* protocols.",
        default="fid,isc",
    )
    pixel_range: str = option(
        "Of images that are floats: [-1, 1] or [0, 1].", "--range", type=click.Choice(["auto", "signed", "unit"]),
        default="auto",
    )  # fmt: skip
    device: str = device_option("Where Inception runs.")
    out: Path = out_option("File to add rows to.", default=Path("results/scores/scores.parquet"))
    as_json: bool = json_option()

    def __call__(self) -> None:
        from analysis.results.published import published_models
        from study.display.console import StudyConsole
        from study.models.protocols import check_protocols, load_own
        from study.models.score import ScoreRequest, score
        from trainables.evaluation.inception_scores import SCORES

        known = published_models()
        model = next((name for name in known if name.lower() == self.model.strip().lower()), self.model.strip())
        if not model:
            raise UserError("--as: name the model that made the images")
        names = check_protocols(self.protocols)
        if not self.protocols:
            raise UserError("--protocol: name at least one, for example -p fresh-10k (see `mebm methods`)")
        metrics = parse_choices("--metrics", self.metrics, SCORES)
        names, own = load_own(names)
        request = ScoreRequest(model, names, metrics, self.pixel_range, own)  # type: ignore[arg-type]
        shown = StudyConsole()
        data = self._data()
        with shown.bar(len(self.images) * len(request.protocols)) as advance:
            rows = score(self.images, data, request, self.out, device=self.device, on_done=advance)
        if not self.as_json:
            shown.scores(rows)
        rows_of = [t for t in known.get(model, ()) if t[1] == self.reference]
        where = f"in {', '.join(f'Table {number}' for number, _ in rows_of)}" if rows_of else "in no row of Tables 1-4"
        hint = "" if rows_of or model in known else nearest(model, known)
        lines = [f"rows  {self.out}", f"{model} on {self.reference} is {where}{hint}: mebm tables {self.out.parent}"]
        show(self.as_json, lambda: {"rows": rows, "file": str(self.out)}, lambda: lines)

    def _data(self) -> ImageData:
        from study.config.errors import one_line
        from trainables.data.datasets import load_dataset
        from trainables.data.readers.items import DataError

        try:
            return load_dataset(self.reference, str(self.data_dir.resolve()) if self.data_dir else None)
        except DataError as error:
            raise UserError(one_line(error)) from error
