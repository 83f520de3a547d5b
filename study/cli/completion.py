"""What a shell completes: studies, methods, fields and folders. Only names are read, nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import click
from click.shell_completion import CompletionItem
from pydantic import BaseModel

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _among(names: Iterable[str], begun: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(begun)]


def configs(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Packaged studies, then files."""
    from study.config.packaged import packaged_configs

    return _among(packaged_configs(), begun) or [CompletionItem(begun, type="file")]


def methods(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Training methods, then files."""
    from trainables.config.method import METHODS

    return _among(METHODS, begun) or [CompletionItem(begun, type="file")]


def datasets(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Data sets known by name."""
    from trainables.config.dataset import datasets as known

    return _among(known(), begun)


def fields(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Fields of trials and studies but methods' own, which take seconds; in the paper's letters as well."""
    from study.config.study import StudyConfig
    from trainables.config.trial import TrialConfig
    from trainables.results.own import PAPER

    found = [*PAPER, *_dotted(TrialConfig), *_dotted(StudyConfig)]
    return _among((name for name in found if name not in ("trial", "method_args")), begun)


def _dotted(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel) and inner.model_fields:
            yield from _dotted(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def assignments(context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """KEY= of `--set`."""
    return [CompletionItem(f"{item.value}=") for item in fields(context, parameter, begun)]


def folders(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Studies: folders with a `study.yaml` below what is begun; else any folder."""
    parent = Path(begun) if begun.endswith("/") else Path(begun).parent
    try:
        found = sorted(p.parent for p in [*parent.glob("*/study.yaml"), *parent.glob("*/*/study.yaml")])
    except OSError:
        found = []
    return _among(map(str, found), begun) or [CompletionItem(begun, type="dir")]
