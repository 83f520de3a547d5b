"""What the tests of this room share."""

import numpy as np
import pytest

from analysis.detector.replay import Recording


@pytest.fixture
def recording():
    """A recorded run of a course of energy gaps."""

    def make(name, outcome, gap, loss=None, **values):
        gap = np.asarray(gap, dtype=float)
        signals = {
            "iteration": np.arange(len(gap)),
            "energy_gap": gap,
            "loss": np.zeros(len(gap)) if loss is None else loss,
        }
        defaults = {"norm": "none", "l2_weight": 0.0, "planned": 100, "seconds_per_iteration": 0.5, "setting": name}
        return Recording(name, outcome, **(defaults | {"signals": signals, "stopped": False} | values))

    return make
