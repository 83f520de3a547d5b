"""Commands of `mebm` about trained models and this machine: figures, evaluate, sample, bench."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from study import console
from study.errors import RunError, UserError, parse_choices
from study.places import LOCAL, PLACE, local_copy

INTERRUPTED = 130
"""Exit code after Ctrl-C, as `study.cli` has it."""
F = TypeVar("F", bound=Callable[..., Any])


def with_set(command: F) -> F:
    """The option --set of a command."""
    return click.option(
        "--set",
        "assignments",
        multiple=True,
        metavar="KEY=VALUE",
        help="Change a field of the config; dotted keys, VALUE is YAML; may be given again.",
    )(command)


@click.command()
@click.argument("folders", nargs=-1, required=True, type=PLACE, metavar="DIR...")
@click.option(
    "--only",
    metavar="NAME,...",
    help="Figures to make: names of --list, their first words (survival), patterns (phase*), kinds of --kind. "
    "Default: all that can be made.",
)
@click.option(
    "--format",
    "formats",
    default="html,json",
    metavar="F,...",
    help="Of html, json, png, svg, pdf, csv. png, svg and pdf need the extra figures and a Chrome or Chromium; "
    "csv is the data, which is always written as Parquet.",
)
@click.option("--list", "listed", is_flag=True, help="Name the figures that can be made, and make none.")
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice(["samples", "classes", "histogram", "centres", "tsne", "curves"]),
    help="Of the figures of models what to make, and none of the report; may be given again. "
    "samples: 8x8 and, with a class head, 10 per "
    "class. classes: 100 of highest and lowest p(x) and p(y|x) per class. histogram: log p(x). "
    "centres: mean of p0. tsne: features of x+, x-, x0 of all models, and their energies. curves: quality over epochs.",
)
@click.option("--trials", metavar="ID,ID", help="Trials to show the models of: ID or STUDY/ID. Default: --best.")
@click.option(
    "--best",
    multiple=True,
    metavar="METRIC",
    help="Show of every study and method the completed trial whose METRIC is best at its end; may be given again. "
    "Default: FID or FD of the buffer, of fresh samples where a method has no buffer.",
)
@click.option(
    "--log-p",
    type=click.Choice(["logsumexp", "energy"]),
    help="What stands for log p(x): log-sum-exp of the class logits, or minus the energy. Default: logsumexp with a "
    "trained class head, as in the paper's figures, else energy.",
)
@click.option("--points", type=click.IntRange(2, 10_000), default=200, help="Images per set and model in the t-SNE.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where the models run.")
@click.option("--out", type=LOCAL, default=None, help="Folder. Default: DIR/figures, or figures.")
def figures(
    folders: tuple[Path | str, ...],
    only: str | None,
    formats: str,
    listed: bool,
    kinds: tuple[str, ...],
    trials: str | None,
    best: tuple[str, ...],
    log_p: Any,
    points: int,
    device: str,
    out: Path | None,
) -> None:
    """Export the figures of the report, and make the paper's figures (1, 2b, 3-17) of the models that trials left.

    \b
    Examples:
      mebm figures results/NAME --out F
      mebm figures results/NAME --list
      mebm figures results/NAME --only phase,survival --format svg,pdf
      mebm figures results/NAME --kind tsne --trials t0003,t0007
      mebm figures results/m-ebm results/m-jem results/lse-jem --kind tsne --out joint
    A figure of the report is NAME.html, NAME.json (plotly) and its data NAME.parquet; of several DIRs each study's are
    in a folder. `mebm report DIR` shows the figures of models in DIR/figures, and one of several DIRs those in figures
    beside it.
    """
    from study.figures import Request, list_figures, make_all

    one = folders[0] if len(folders) == 1 else None
    target = out or (one / "figures" if isinstance(one, Path) else Path("figures"))
    ids = [part.strip() for part in (trials or "").split(",") if part.strip()]
    if trials is not None and not ids:
        raise UserError(f"--trials {trials!r}: names no trial")
    if listed:
        for name, caption in list_figures(folders):
            console.say(f"{name:<40} {caption}")
        return
    request = Request(
        only=tuple(dict.fromkeys(word.strip() for word in (only or "").split(",") if word.strip())),
        formats=formats,
        kinds=kinds,
        trials=tuple(ids),
        best=best,
        log_p=log_p,
        points=points,
        device=device,
    )
    if only is not None and not request.only:
        raise UserError(f"--only {only!r}: names no figure")
    made, notes = make_all(folders, target, request)
    for name, files in made:
        more = f" (and {len(files) - 1} more)" if len(files) > 1 else ""
        console.say(f"{name:<10} {target / files[0]}{more}")
    for note in notes:
        console.say(f"not made: {note}")


@click.command()
@click.argument("path", type=PLACE, metavar="CHECKPOINT|STUDY")
@click.option(
    "--protocol", "-p", "protocols", multiple=True, metavar="P", help="A protocol of `mebm methods`, or hybrid."
)
@click.option("--metrics", default="fid,isc", help="Of fid, isc, kid, precision, recall; for protocols on Inception.")
@click.option(
    "--model", "which", type=click.Choice(["last", "best", "all"]), default="last", help="Of a study's trials."
)
@click.option("--confidence", is_flag=True, help="Also FID extrapolated to infinitely many samples.")
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), help="Of fresh samples. Default: the trial's, as training scored them."
)
@click.option("--steps", type=click.IntRange(min=0), help="Langevin steps of fresh chains. Default: the trial's.")
@click.option("--outside", multiple=True, metavar="NAME[=DIR]", help="Another data set for the AUROC of hybrid.")
@click.option("--norm", type=click.Choice(["eval", "train"]), default="eval", help="Batch norm's mode in hybrid.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where the images are now.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where the models run.")
@click.option("--out", type=LOCAL, help="File to add rows to. Default: STUDY/evaluations.parquet.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def evaluate(
    path: Path | str,
    protocols: tuple[str, ...],
    metrics: str,
    which: str,
    confidence: bool,
    seed: int | None,
    steps: int | None,
    outside: tuple[str, ...],
    norm: str,
    data_dir: Path | None,
    device: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Score trained models again, under any protocol, without training; what has been scored is not scored again.

    Under a protocol of the trial's own the number is the one training gave. 95%: of the score over draws of its samples
    (jackknife); what another training run would give is not in it.

    \b
    Examples:
      mebm evaluate results/quickstart -p small-buffer -p small-fresh
      mebm evaluate results/NAME --model best -p buffer-10k -p fresh-10k --metrics fid,kid --confidence
      mebm evaluate results/NAME/models/t0003.pt -p hybrid --outside cifar100
    """
    from study import rescoring

    if not protocols:
        raise UserError("--protocol: name at least one, for example -p small-buffer (see `mebm methods`)")
    url, path = path if isinstance(path, str) else None, local_copy(path, models=True)
    targets = rescoring.find_targets(path, which)
    request = rescoring.Request(
        protocols=rescoring.parse_protocols(protocols),
        metrics=rescoring.parse_metrics(metrics),
        confidence=confidence,
        seed=seed,
        steps=steps,
        outside=rescoring.parse_outside(outside),
        norm_mode=norm,
        data_dir=str(data_dir.resolve()) if data_dir else None,
    )
    target = out or rescoring.default_out(path)
    shown = console.StudyConsole()
    with shown.bar(len(targets) * len(request.protocols)) as advance:
        rows = rescoring.evaluate(targets, request, target, device=device, on_done=advance)
    if url is not None and out is None:
        from trainables.storage import Store

        Store(url).put(target, target.name)
    if as_json:
        click.echo(json.dumps({"rows": rows, "file": str(target)}, indent=2))
        return
    shown.evaluations(rows)
    shown.line(f"rows  {target}")


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--count", type=click.IntRange(min=1), default=64, help="Images.")
@click.option("--steps", type=click.IntRange(min=0), help="Langevin steps of a new chain. Default: the trial's.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of new samples.")
@click.option(
    "--source", type=click.Choice(["fresh", "buffer"]), default="fresh", help="New chains from p0, or stored samples."
)
@click.option(
    "--data-dir", type=click.Path(path_type=Path), help="Where the training images are now; p0 is made of them."
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where the model runs.")
@click.option(
    "--out",
    type=LOCAL,
    required=True,
    help="A .png grid, or a .parquet or .npz file of the images.",
)
def sample(
    checkpoint: Path,
    count: int,
    steps: int | None,
    seed: int,
    source: Any,
    data_dir: Path | None,
    device: str,
    out: Path,
) -> None:
    """Write samples of a trained model: a model file (models/ID.pt), a trial's checkpoint, or a folder with one.

    \b
    Examples:
      mebm sample results/quickstart/models/t0003.pt --out grid.png
      mebm sample results/m-ebm-digits --steps 100 --count 1000 --out samples.parquet
    """
    from study.sampling import sample_to_file

    console.say(
        sample_to_file(
            checkpoint, out, count=count, steps=steps, seed=seed, source=source, device=device, data_dir=data_dir
        )
    )


@click.command()
@click.option(
    "--methods",
    metavar="NAME[:K],...",
    help="What to time, the most wanted first: m-ebm:2,jem:20,vera; without a K those of Table 6; or table6, which "
    "begins with M-EBM at K = 5. Default: table6 on a GPU, on a CPU M-EBM at K = 2, M-JEM at 5, JEM at 20.",
)
@click.option("--network", metavar="NAME", help="For methods with a WRN. Default: wrn-28-10, on a CPU wrn-10-1.")
@click.option(
    "--precision",
    metavar="P,...",
    help="Of fp32, tf32, bf16; all methods are timed at the first before any is at the next (igebm and kl-ebm last). "
    "Default: bf16,tf32 on a GPU, and fp32 with --minutes; fp32,bf16 on a CPU.",
)
@click.option(
    "--execution",
    metavar="E,...",
    help="Of eager, graphed, compiled, compiled-graphed. Default: all of them on a GPU, eager on a CPU.",
)
@click.option(
    "--suite",
    type=click.Choice(["loop", "wrapper", "start", "packing", "scale", "analysis", "all"]),
    default="loop",
    help="loop: iterations of the methods. wrapper: an epoch in a study against a bare one. start: how long a trial "
    "takes to start. packing: many small trials on one device against one. all: these, one after another. "
    "scale: a study of trials that train nothing through this package's driver against Ray Tune alone. analysis: "
    "loading, tables, figures and report of a large generated study against reading it with Ray Tune's own classes.",
)
@click.option(
    "--trials",
    type=click.IntRange(min=10),
    help="Of --suite scale (default: 1000) or analysis (default: 10000).",
)
@click.option("--dataset", default="cifar10", help="Whose images' shape is used; noise, unless --data-dir is given.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder of real images.")
@click.option("--baseline/--no-baseline", default=True, help="Time the released loop beside M-EBM and M-JEM.")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    help="Limit on the command's time: the most wanted first, fewer rounds where that makes room for more, and nothing "
    "is begun that would not be over by then. Default: none.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1, 1000),
    help="Windows of each; medians count. Default: 9, on a CPU 3; with --minutes at most 5.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    help="Of a window. Default: 1, with --minutes 0.4; on a CPU 0.3.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of the training. Default: 1 on a CPU.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to train.")
@click.option("--profile", "profiled", is_flag=True, help="Also show where an iteration's time goes.")
@with_set
@click.option(
    "--also",
    multiple=True,
    metavar="KEY=VALUE,...",
    help="Time every variant again with these fields, such as fused_norm=true,merge_bias=true; may be given again.",
)
@click.option("--out", type=LOCAL, default=Path("results/bench"), help="Folder to add rows to.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def bench(
    methods: str | None,
    network: str | None,
    precision: str | None,
    execution: str | None,
    suite: str,
    trials: int | None,
    dataset: str,
    data_dir: Path | None,
    baseline: bool,
    minutes: float | None,
    rounds: int | None,
    seconds: float | None,
    threads: int | None,
    device: str,
    profiled: bool,
    assignments: tuple[str, ...],
    also: tuple[str, ...],
    out: Path,
    as_json: bool,
) -> None:
    """Time an iteration of every method on this machine, beside the released loop in the same run (Table 6).

    \b
    Examples:
      mebm bench
      mebm bench --network wrn-10-1 --methods m-ebm:2
      mebm bench --dataset digits --network conv-16 --methods m-ebm,m-jem
      mebm bench --methods m-ebm:5 --execution eager,compiled --profile
      mebm bench --minutes 15 --profile
      mebm bench --suite scale --trials 1000
      mebm bench --suite analysis
    `mebm tables DIR` takes the rows in DIR/bench.parquet for Table 6. They are written as they are measured: Ctrl-C,
    a failure or the end of --minutes leaves those so far. What failed or was left out is said, here and in bench.json;
    exit code 1 only where nothing could be measured.
    """
    begun = time.monotonic()  # before torch is imported, which takes seconds
    if minutes is not None and suite != "loop":
        raise UserError("--minutes: limits --suite loop, not the others")
    from study import bench as engine
    from study.bench_pace import Deadline
    from study.bench_rows import BenchFolder
    from trainables.device import resolve_device

    try:
        where = resolve_device(device)
    except ValueError as error:
        raise UserError(str(error)) from error
    gpu = where.type == "cuda"
    every = ("bf16,tf32" if minutes is None else "bf16,tf32,fp32") if gpu else "fp32,bf16"
    options = engine.BenchOptions(
        methods=engine.parse_methods(methods, where),
        network=network or ("wrn-28-10" if gpu else "wrn-10-1"),
        precisions=parse_choices("--precision", precision or every, engine.PRECISIONS),
        executions=parse_choices(
            "--execution", execution or (",".join(engine.EXECUTIONS) if gpu else "eager"), engine.EXECUTIONS
        ),
        device=where,
        dataset=dataset,
        data_dir=str(data_dir.resolve()) if data_dir else None,
        rounds=rounds or ((9 if minutes is None else 5) if gpu else 3),
        seconds=seconds or ((1.0 if minutes is None else 0.4) if gpu else 0.3),
        baseline=baseline,
        profiled=profiled,
        threads=threads,
        assignments=assignments,
        also=tuple(engine.parse_also(text) for text in also),
        limited=minutes is not None,
    )
    shown = console.StudyConsole()
    others = [s for s in ("wrapper", "start", "packing") if suite in (s, "all")]
    others += [s for s in ("scale", "analysis") if suite == s]
    found: dict[str, Any] = {}
    for name in others:
        from study.suites import run_suite

        found[name], lines = run_suite(name, options, out, trials=trials)
        for line in [] if as_json else lines:
            console.say(line)
    if suite not in ("loop", "all"):
        if as_json:
            click.echo(json.dumps(found[suite], indent=2))
        return
    folder = BenchFolder(out)

    def say(text: str) -> None:
        if not sys.stderr.isatty():  # there the bar says it
            click.echo(f"[{time.monotonic() - begun:.0f} s] {text}", err=True)

    with shown.bar(engine.planned_windows(options)) as advance:
        deadline = Deadline(None if minutes is None else 60 * minutes, begun)
        result = engine.run_bench(options, folder, deadline=deadline, on_window=advance, say=say)
    if as_json:
        click.echo(json.dumps(folder.as_json(result) | found, indent=2))
    else:
        shown.bench(result.rows, result.profiles, result.lines(), result.over_baseline)
        shown.line(f"rows  {folder.path}" if result.rows else "no rows")
    if result.interrupted:
        left = (
            f"; {len(result.rows)} row(s) so far are in {folder.path}" if result.rows else ", nothing was measured yet"
        )
        console.error(f"interrupted{left}")
        sys.exit(INTERRUPTED)
    if not result.rows:
        raise RunError("nothing was measured")
