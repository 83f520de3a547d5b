"""Methods of a user's own, tried before the first trial of a study starts."""

from __future__ import annotations

from study.config.errors import UserError, one_line
from study.config.study import StudyConfig
from study.estimate.plan import check_memory
from study.estimate.resources import image_shape
from trainables.config.dataset import dataset_info
from trainables.config.method import METHODS
from trainables.config.trial import TrialConfig
from trainables.data.subset import training_images
from trainables.timing import first_look


def look_at_methods(study: StudyConfig) -> list[str]:
    """Try every method of a study that is not the package's, in the first setting that has it; remarks, a line each.

    Raises:
        UserError: one does not work.
    """
    if study.is_script:
        return []
    first: dict[str, TrialConfig] = {}
    for config in check_memory(study):
        first.setdefault(config.method, config)
    return [note for config in first.values() for note in look_at(config)]


def look_at(config: TrialConfig) -> list[str]:
    """`first_look.look_at` on a trial's kind of images. UserError: its method does not work."""
    if config.method in METHODS:
        return []
    shape, classes = image_shape(config)
    try:
        if dataset_info(config.dataset) is None:
            found = training_images(config)
            shape, classes = found.shape, found.classes
    except ValueError:  # they are not here: whoever trains on them says so
        pass
    try:
        return first_look.look_at(config, shape, classes)
    except ValueError as error:
        raise UserError(f"trial: {one_line(error)}") from error
