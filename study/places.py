"""Where results are, as the command line takes it: a folder, or a URL of object storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from trainables.files import refuse_links_out


class Place(click.ParamType["Path | str"]):
    """A path, or a URL as text. One with a password or a key is refused: a command line is seen by everybody."""

    name = "place"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        """A `Path`, or a URL as `str`."""
        if isinstance(value, Path) or "://" not in value:
            return Path(value)
        from trainables.storage import refuse_credentials

        return refuse_credentials(value)


PLACE = Place()


class Local(click.ParamType["Path"]):
    """A path on this machine, where a command writes; a URL is refused, of which a folder `s3:` would be made."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """A `Path`."""
        if "://" in str(value):
            self.fail("a path on this machine is needed, not a URL; copy the result there afterwards", param, ctx)
        return Path(value)


LOCAL = Local()


def is_remote(place: Path | str) -> bool:
    """Whether a place is a URL of object storage."""
    return isinstance(place, str)


def local_copy(place: Path | str, *, models: bool = False) -> Path:
    """A folder to read a study from: the place itself, or a copy of what is small in the store.

    Raises:
        UnsafePathError: a link leads out of it.
    """
    if isinstance(place, Path):
        if place.is_dir():
            refuse_links_out(place)
        return place
    from study.mirror import read_only_copy

    return read_only_copy(place, models=models)
