"""Names and values of settings as people read them."""

from __future__ import annotations

from typing import Any

_SYMBOLS: dict[str, str] = {
    "network": "network",
    "norm": "norm",
    "initial": "p0",
    "sampling_steps": "K",
    "step_size": "α",
    "noise_std": "σ",
    "buffer_size": "|B|",
    "reinit_probability": "ρ",
    "l2_weight": "λ",
    "learning_rate": "learning rate",
    "batch_size": "batch size",
    "epochs": "epochs",
    "iterations_per_epoch": "iterations per epoch",
    "gradient_clamp": "gradient clamp",
    "l2_form": "L2 form",
    "class_weight": "class weight",
    "f_divergence": "f-divergence",
}


def symbol(field: str) -> str:
    """A setting's name as the paper writes it: its symbol where it has one."""
    return _SYMBOLS.get(field, field.replace("_", " "))


def text(value: Any) -> str:
    """A setting's value for people."""
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def brief(value: Any) -> str:
    """A setting's value for people where its exact digits do not matter: three significant ones."""
    return f"{value:.3g}" if isinstance(value, float) else text(value)
