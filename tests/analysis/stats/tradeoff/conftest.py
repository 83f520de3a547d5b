"""What the tests of this room share."""

import pytest


@pytest.fixture
def scored(row):
    """A trial with a quality, its standard error, and a time per iteration."""

    def make(name, quality, pace, error, **values):
        return row(name, setting_id=name, fd_buffer_best=quality, fd_buffer_best_se=error, seconds_per_iteration=pace,
                   fd_buffer_protocol="p", **values)  # fmt: skip

    return make
