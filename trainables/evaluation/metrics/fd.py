"""FD: the Frechet distance on the features of a small classifier."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from trainables.results.metric import of_samples

if TYPE_CHECKING:
    from trainables.evaluation.scores import Samples, Scores


def measure(samples: Samples) -> Scores:
    """FD and its sampling error."""
    from trainables.evaluation.scores import Scores
    from trainables.evaluation.small_features import small_extractor

    extractor, count, source = small_extractor(samples.data), len(samples.images), samples.protocol.source
    length = f"{samples.made_by}-" if source == "fresh" else ""
    identity = f"{extractor.id}-{source}-{length}n{count}"
    if count < 2:
        return Scores({}, identity, f"no FD: {count} image(s) to score")
    distance, error = extractor.score(samples.images)
    if not math.isfinite(distance):
        return Scores({}, identity, "no FD: the samples' features are not finite")
    return Scores({f"fd_{source}": distance}, identity, None, {} if error is None else {f"fd_{source}": error})


_MEANING = "small-classifier Frechet distance of {}; not FID"
METRICS = of_samples("fd", "FD", "minimize", _MEANING, measure, (2, 5), features="small", place=1, added=0)
