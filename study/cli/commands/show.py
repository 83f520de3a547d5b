"""`mebm show`: the text of a study, to be changed."""

from __future__ import annotations

from dataclasses import dataclass

import click

from study.cli.options import config_argument


@dataclass(frozen=True)
class Show:
    """Print the study CONFIG as YAML with its comments: the name of a packaged one, or a file.

    \b
    Example:
      mebm show quickstart > my.yaml && mebm sweep my.yaml
    """

    config: str = config_argument()

    def __call__(self) -> None:
        from study.config.load import config_text

        click.echo(config_text(self.config), nl=False)
