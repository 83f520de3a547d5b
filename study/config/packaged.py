"""The studies that ship with the package."""

from __future__ import annotations

from importlib import resources


def packaged_configs() -> list[str]:
    """Their names."""
    names = (file.name for file in resources.files("configs").iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def packaged_text(name: str) -> bytes:
    """The YAML of one."""
    return (resources.files("configs") / f"{name}.yaml").read_bytes()
