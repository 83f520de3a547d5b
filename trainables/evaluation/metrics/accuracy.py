"""Accuracy of the class head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainables.results.metric import Metric

if TYPE_CHECKING:
    from trainables.evaluation.scores import Scores, Trained


def measure(trained: Trained) -> Scores | None:
    """The share of test (or validation) images classified right, with its binomial error."""
    from trainables.evaluation.scores import Scores, accuracy

    config, data = trained.config, trained.data
    if not config.classifies:
        return None
    images, labels = data.test_images, data.test_labels
    if config.evaluation.accuracy_on == "validation":
        assert data.held_images is not None and data.held_labels is not None
        images, labels = data.held_images, data.held_labels
    share = accuracy(trained.model, images, labels, config.evaluation.batch_size)
    error = (share * (1 - share) / len(labels)) ** 0.5
    protocol = f"{config.evaluation.accuracy_on}-{len(labels)}-eval-norm"
    return Scores({"accuracy": share}, protocol, None, {"accuracy": error})


_MEANING = "test accuracy of the class head, eval-mode norm"
METRICS = (
    Metric("accuracy", "accuracy", "maximize", _MEANING, measure, "fraction", rank=7, place=4, digits=3, added=0),
)
