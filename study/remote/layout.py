"""What of a study is brought to a store, by whom, and what is not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from study.config.errors import UserError, one_line
from trainables.results import layout as names
from trainables.results.files import PART
from trainables.results.store import Store, StoreError, identity, split

LIVE = (
    names.STUDY_FILE, names.MANIFEST, names.WARM_START, names.STORAGE, names.JOURNAL, *names.STUDY_TABLES,
    names.LOG_FILE,
)  # fmt: skip
"""What is brought to the store while the study runs, in this order: of the storage and the journal, which belong
together, the journal is the newer one, and a resumed study adds what the storage lacks."""
OF_WORKERS = (names.SAMPLES, names.SIGNALS)


@contextmanager
def mistakes() -> Iterator[None]:
    """A store that is not there or refuses is the user's to mend."""
    try:
        yield
    except StoreError as error:
        raise UserError(one_line(error)) from None


def work_folder(url: str, name: str) -> Path:
    """The live folder of the study `name` whose results live below `url`; the same at every start on this machine."""
    from trainables.data.cache import cache_dir

    digest = hashlib.sha256(identity(url).encode()).hexdigest()[:16]
    return cache_dir() / "work" / digest / Store(cache_dir()).checked(name)


def work_folder_of(study_url: str) -> Path:
    """The live folder of the study at a URL."""
    with mistakes():
        return work_folder(*split(study_url))


def is_temporary(name: str) -> bool:
    """Files of the moment, those of this machine alone, and what Ray writes."""
    base = name.rpartition("/")[2]
    return (
        name.split("/")[0] == names.CHECKPOINTS
        or name == names.DRIVER
        or base.startswith(".")
        or base.endswith((PART, ".tmp", ".lock"))
        or (name.startswith(names.STORAGE) and base.endswith(("-journal", "-wal", "-shm")))
    )
