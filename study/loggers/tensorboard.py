"""Event files for TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from study.display.status import state_text
from study.loggers.base import curves, finals, parameters
from trainables.results.files import within
from trainables.results.schema import Outcome

PACKAGE = "tensorboardX"


class _TensorBoard:
    """Event files, one folder per trial, by tensorboardX, which Ray Tune brings along anyhow.

    No experiment summary is written: TensorBoard would believe the first trial's for all, and else works one out.
    """

    def __init__(self, folder: Path, _study_name: str) -> None:
        from tensorboardX import SummaryWriter

        self._make_writer = SummaryWriter
        self._folder = folder / "tensorboard"
        self._columns: dict[str, Mapping[str, Any]] = {}
        self._writers: dict[str, Any] = {}

    def start(self, trial_id: str, columns: Mapping[str, Any]) -> None:
        """The file is opened with the first epoch: only then it is known from where the trial goes on."""
        self._columns[trial_id] = columns
        self._shut(trial_id)

    def _writer(self, trial_id: str, columns: Mapping[str, Any], purge_step: int | None) -> Any:
        """The trial's writer; a new one hides what earlier files have from `purge_step` on."""
        if trial_id not in self._writers:
            from tensorboardX.summary import hparams

            folder = within(self._folder, trial_id)
            earlier = len(list(folder.glob("events.out.tfevents.*")))
            self._writers[trial_id] = writer = self._make_writer(
                str(folder),
                purge_step=purge_step if earlier else None,
                flush_secs=15,
                # Two files of one second would have one name, and the later would replace the earlier.
                filename_suffix=f".{earlier:03d}",
            )
            _, started, _ = hparams(parameters(self._columns.get(trial_id, columns)), {})
            writer.file_writer.add_summary(started, 0)
        return self._writers[trial_id]

    def report(self, trial_id: str, row: Mapping[str, Any], trial: Mapping[str, Any]) -> None:
        epoch = int(row["epoch"])
        writer = self._writer(trial_id, trial, epoch)
        for name, value in curves(row, trial).items():
            writer.add_scalar(name, value, epoch)

    def end(self, trial_id: str, trial: Mapping[str, Any]) -> None:
        outcome = Outcome(trial["outcome"])
        done = trial.get("epochs_done")
        # A trial can end without a new epoch; what an earlier attempt reached beyond its last one does not count.
        writer = self._writer(trial_id, trial, None if done is None else int(done) + 1)
        step = int(done or 0)
        writer.add_text("outcome", state_text(trial), step)
        for name, value in finals(trial).items():
            writer.add_scalar(name, value, step)
        if outcome.finished:
            writer.file_writer.add_summary(_session_end(failed=outcome is Outcome.FAILED), step)
        self._shut(trial_id)

    def _shut(self, trial_id: str) -> None:
        if (writer := self._writers.pop(trial_id, None)) is not None:
            writer.close()

    def close(self) -> None:
        for trial_id in list(self._writers):
            self._shut(trial_id)


def _session_end(*, failed: bool) -> Any:
    """The end of a trial as TensorBoard's HPARAMS tab knows it. A divergence is a result, not a failure."""
    from tensorboardX.proto.api_pb2 import Status
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionEndInfo
    from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata

    status = Status.Value("STATUS_FAILURE" if failed else "STATUS_SUCCESS")
    info = SessionEndInfo(status=status, end_time_secs=time.time())
    content = HParamsPluginData(session_end_info=info, version=0).SerializeToString()
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="hparams", content=content))
    return Summary(value=[Summary.Value(tag="_hparams_/session_end_info", metadata=metadata)])


make = _TensorBoard
