"""Starting and resuming a study for whoever asks for it: the commands sweep and resume, and `mebm.run`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study.display.console import StudyConsole
from trainables.results.progress import note

if TYPE_CHECKING:  # Ray, torch and plotly are imported when a study runs
    from study.config.study import StudyConfig
    from study.remote.mirror import Mirror
    from study.run.ending import Ending


@dataclass(frozen=True)
class Run:
    """A study that is to run.

    Attributes:
        folder: the study's folder; that of a study in object storage while it runs.
        url: the study's place in object storage; None where it has none.
        new_in: folder of the results, where the study's was made in it just now and is locked.
        how: `retry_failed` and `accept_changes`, as `study.run.launch.run_study` has them.
    """

    study: StudyConfig
    folder: Path
    address: str | None
    shown: StudyConsole
    url: str | None = None
    new_in: Path | None = None
    how: dict[str, bool] = field(default_factory=dict)


def check(study: StudyConfig, address: str | None) -> list[str]:
    """Refuse, before anything is written, a logger or sampler that is not installed, more memory than this machine has,
    or a method or part of the user's own that does not work. Returns remarks on those, a line each.
    """
    from study.estimate.first_look import look_at_methods
    from study.estimate.resources import refuse_more_memory
    from study.loggers.build import check_loggers
    from study.run.rehearsal import rehearse_study
    from study.search.storage import check_sampler

    note("checking the study")
    check_loggers(study.run.loggers)
    check_sampler(study)
    check_images(study, remote=address is not None)
    if address is None:
        refuse_more_memory(study)
    return [*rehearse_study(study), *look_at_methods(study)]


def check_images(study: StudyConfig, *, remote: bool) -> None:
    """Refuse a data set that nobody knows, and a folder of images that is not there or not of the data set.

    Args:
        remote: the trials run elsewhere, where the folder may be.
    """
    from study.config.errors import UserError
    from trainables.data.datasets import refuse_unknown
    from trainables.data.readers.items import DataError

    if study.is_script:
        return
    values = {n: getattr(d, "choices", ()) for n, d in study.space.distributions.items()}
    trial = study.space.built_in(dict(study.space.start[0]) if study.space.start else _any(study), study.seeds[0])
    for name in values.get("dataset") or (trial.dataset,):
        try:
            refuse_unknown(name, trial.data_dir, remote=remote)
        except DataError as error:
            raise UserError(str(error)) from error


def _any(study: StudyConfig) -> dict[str, Any]:
    from study.config.space import any_value

    return {name: any_value(d) for name, d in study.space.distributions.items()}


def start(study: StudyConfig, results: Path | str, address: str | None, shown: StudyConsole) -> tuple[Ending, Run]:
    """Run a new study (see `check`) to its end, its tables and its report.

    Args:
        results: folder for study folders, or a URL.
        address: of a Ray cluster; None for its own.
        shown: takes what is said.

    Raises:
        UserError: the place is taken, or something that the study needs is missing.
        RunError: Ray does not start, or is lost.
    """
    from study.config.script import note_begun
    from study.record.folder import new_study
    from study.run.ending import ending_signals

    url = None
    if isinstance(results, str):
        from study.remote.copies import refuse_taken
        from study.remote.layout import work_folder
        from trainables.results.store import join

        url, results = join(results, study.name), work_folder(results, study.name).parent
        refuse_taken(url)
    with ending_signals(), new_study(study, results) as folder:
        note_begun(study)
        run = Run(study, folder, address, shown, url, results)
        return _run(run), run


def resume(
    folder: Path | str,
    assignments: tuple[str, ...],
    address: str | None,
    shown: StudyConsole,
    *,
    trust_code: bool = False,
    **how: bool,
) -> tuple[Ending, Run]:
    """Continue the study of a folder or URL from its last checkpoints; see `start`.

    Args:
        assignments: `KEY=VALUE` texts that change its configuration.
        trust_code: run a script that this user has not run on this machine.
        how: see `Run`.

    Raises:
        UserError: no study is there, it is damaged, or it cannot be changed so.
    """
    from study.config.load import change_study
    from study.config.script import refuse_unknown_script
    from study.record.folder import load_folder
    from study.run.ending import ending_signals

    url = None
    with ending_signals():
        if isinstance(folder, str):
            from study.remote.copies import fetch
            from study.remote.layout import work_folder_of

            url, folder = folder, work_folder_of(folder)
            fetch(url, folder)
        study = change_study(load_folder(folder), assignments, str(folder))
        refuse_unknown_script(study, str(url or folder), given=trust_code)
        run = Run(study, folder, address, shown, url, how=how)
        return _run(run), run


def _run(run: Run) -> Ending:
    if run.url is None:
        return _run_here(run, str(run.folder), None)
    from study.record.journal import recorded_runs
    from study.remote.mirror import Mirror

    mirror = Mirror(run.folder, run.url, run.shown.line)
    mirror.start()
    try:
        return _run_here(run, mirror.store.shown, mirror)
    except SystemExit:
        raise
    except BaseException:
        if run.new_in is not None and not recorded_runs(run.folder):
            mirror.discard()
        raise
    finally:
        if left := mirror.close():
            run.shown.line(mirror.left_text(left))


def _run_here(run: Run, place: str, mirror: Mirror | None) -> Ending:
    from study.run.launch import run_study

    study, folder, say, new = run.study, run.folder, run.shown.line, run.new_in is not None
    say(f"{study.name}: {study.planned_trials} trials, results in {place}{os.sep}")
    if run.new_in is not None:
        note("estimating what it will take")
        for line in estimate(study, None, (run.new_in,)).lines()[1:]:
            if "not known for " not in line:
                say(f"  {line}")
    note("preparing the images and the folder")
    ending = run_study(study, folder, run.shown, address=run.address, mirror=mirror, locked=new, **run.how)
    if mirror is not None:
        mirror.collect()
    if ending.interrupted:
        say(f"interrupted; continue with: mebm resume {place}")
        if not ending.hurried:
            _write_outputs(folder)
        return ending
    for line in _write_outputs(folder):
        say(line)
    if ending.spent:
        say(f"{ending.spent}; continue with: mebm resume {place} --set budget.KEY=VALUE")
    if ending.failed:
        say(f"{ending.failed} trial(s) failed; see {folder / 'study.log'}")
    return ending


def _write_outputs(folder: Path) -> list[str]:
    """Write a study's tables and report; returns the closing summary."""
    from analysis.report.page import write_report
    from analysis.results.load import load
    from analysis.stats.comparison.summary import summarise
    from analysis.tables.paper import write_tables
    from study.search.importances import write_importances

    results = load(folder)
    note("writing the tables")
    write_tables(results, folder / "tables")
    write_importances(results)
    note("drawing the report")
    report = write_report(results, folder / "report.html")
    note("summing up")
    return ["", *summarise(results).lines(), "", f"tables  {folder / 'tables'}{os.sep}", f"report  {report}"]


def estimate(study: StudyConfig, gpu: str | None, benches: tuple[Path, ...]) -> Any:
    """What a study will take (`study.estimate.plan.Plan`) on a device (None: this machine's), by folders of benches."""
    from analysis.results.folders import find_files
    from analysis.results.load import read_bench
    from analysis.results.parquet import records
    from study.estimate.plan import make_plan, script_plan
    from study.estimate.resources import local_gpu
    from trainables.results.layout import BENCH_FILE

    if study.is_script:
        return script_plan(study)
    here = None if gpu else local_gpu()
    rows = [row for folder in benches for file in find_files(folder, BENCH_FILE) for row in records(read_bench(file))]
    return make_plan(study, here.name if here else gpu, rows)
