"""FID and the inception score: of one pass of the images through Inception."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainables.results.metric import of_samples

if TYPE_CHECKING:
    from trainables.evaluation.scores import Samples, Scores


def measure(samples: Samples) -> Scores:
    """Both, with their sampling errors."""
    from trainables.evaluation import inception_scores
    from trainables.evaluation.inception import NoFeaturesError
    from trainables.evaluation.scores import Scores

    source = samples.protocol.source
    take = inception_scores.shared_scores if samples.untrained else inception_scores.inception_scores
    try:
        found = take(samples.images, samples.data, samples.device, samples.protocol)
    except NoFeaturesError as error:
        return Scores({}, samples.protocol_id, f"no FID: {error}")
    values = {f"{name}_{source}": found.values[name] for name in ("fid", "isc") if name in found.values}
    errors = {f"{name}_{source}": error for name, error in found.errors.items()}
    return Scores(values, samples.counted_id, found.remark, errors)


_FID, _ISC = "Frechet inception distance of {}", "inception score of {}"
METRICS = (
    *of_samples("fid", "FID", "minimize", _FID, measure, (1, 4), features="inception", place=2, added=0),
    *of_samples("isc", "IS", "maximize", _ISC, measure, features="inception", place=3, added=0),
)
