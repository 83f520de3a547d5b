"""FD and MMD on the features of an extractor of the user's own, such as DINOv2 or CLIP."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from trainables.results.metric import of_samples

if TYPE_CHECKING:
    from trainables.evaluation.scores import Samples, Scores


def measure(samples: Samples) -> Scores:
    """Both, with their sampling errors."""
    from trainables.evaluation.inception import NoFeaturesError
    from trainables.evaluation.inception_scores import loaded, own_scores
    from trainables.evaluation.own_features import own_extractor
    from trainables.evaluation.scores import Scores

    assert samples.protocol.extractor is not None
    source = samples.protocol.source
    try:
        network = own_extractor(samples.protocol.extractor)
        protocol = loaded(samples.protocol, network)
        found = own_scores(samples.images, samples.data, samples.device, protocol, network)
    except NoFeaturesError as error:
        return Scores({}, samples.protocol_id, f"no FD: {error}")
    identity = replace(samples, protocol=protocol).counted_id
    values = {f"extractor_{name}_{source}": value for name, value in found.values.items()}
    errors = {f"extractor_{name}_{source}": error for name, error in found.errors.items()}
    return Scores(values, identity, found.remark, errors)


_FD = "Frechet distance of {} on the features of the protocol's own extractor; not FID"
_MMD = "squared MMD x 1000 of {} on them, Gaussian kernel of sigma 10 on unit features (CMMD's)"
METRICS = (
    *of_samples("extractor_fd", "extractor FD", "minimize", _FD, measure, (3, 6), features="own", place=5),
    *of_samples("extractor_mmd", "extractor MMD", "minimize", _MMD, measure, features="own", place=6, digits=3),
)
