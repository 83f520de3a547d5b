"""What several published methods share: small networks, limits of the detector, lines on deviations."""

from __future__ import annotations

from typing import Any

from trainables.config.method import MethodSpec, Settings


def ended(check: str) -> str:
    """The line on runs that end here and do not in the released code."""
    return f"the detector ends runs that the released code would continue ({check}); divergence.action: record does not"


BEST = "the best epoch is reported beside the last one (released: the checkpoint of the best test accuracy)"
DECAY_IN_WARMUP = "a decay epoch inside the warm-up counts from its end on (released: the warm-up overwrites it)"
SCORED_BY_JEM = (
    "samples and accuracy are scored after epochs 5, 10, ... and the last (released: accuracy after every epoch, no "
    "FID in training), which moves the best epoch"
)
LAYOUT = (
    "channels-last memory: on a CPU in fp32 running statistics differ from the released code's by 4e-6 (with "
    "memory_format: contiguous by 2e-7)"
)
SMALL_NETWORK: Settings = {"network": "conv-16", "norm": "none", "initialisation": "xavier"}
# The detector's gap limits were measured on M-EBM and M-JEM. Without normalisation or clamps gaps swing wider and come
# back (small JEM and ShortRun runs on CIFAR-10: up to 13 and 5), so these methods are judged by a blow-up alone.
WIDE_GAP: Settings = {"gap_limit": 50.0, "hard_gap_limit": 1000.0}
# IGEBM, f-EBM and KL-EBM: images in [0, 1], dequantised; noise before the gradient; L2 on both energies per sample.
UNIT_RANGE: Settings = {
    "pixel_range": "unit",
    "dequantise": True,
    "augment": "none",
    "initial": "uniform",
    "noise_placement": "before",
    "l2_weight": 1.0,
    "l2_form": "paper",
    "optimiser": "adam",
    "weight_decay": 0.0,
    "warmup_iterations": 0,
    "decay_epochs": (),
    "batch_size": 128,
}


class FreshAsTrained(MethodSpec):
    """Fresh chains are as long as those of training."""

    @classmethod
    def by_steps(cls, steps: int) -> dict[str, Any]:
        """See `MethodSpec`."""
        return {"evaluation": {"fresh_steps": steps}}
