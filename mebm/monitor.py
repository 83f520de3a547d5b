"""`Monitor`: what a training script of yours says of its run, so that it can be supervised, searched over and resumed.

    with Monitor(sampling_steps=5, step_size=1.0, seed=0) as run:
        ...
        if run.step(iteration, energy_data, energy_samples, loss):
            break

Alone it writes a study's folder; in a trial of `mebm sweep` the study's worker reads along. Either way the reports are
files in a private folder, the wire. This file needs the standard library alone, Python 3.7 or later, and nothing of
the packages around it, so that a copy of it serves another interpreter.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from bisect import bisect_left, insort
from collections import deque
from typing import TYPE_CHECKING, Any, Deque, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple, Union

if TYPE_CHECKING:
    from types import FrameType, TracebackType

PROTOCOL = 1
"""Version of the wire."""
WIRE, PROBE, OUT, PYTHON, GPU_SHARE = "MEBM_WIRE", "MEBM_PROBE", "MEBM_OUT", "MEBM_PYTHON", "MEBM_GPU_SHARE"
"""Environment: the wire of a study's trial; a file that takes the declarations; where a run alone goes; the interpreter
that writes for one that lacks the packages; the share of a GPU's memory that a trial may take."""

START, EVENTS, RING, CONTROL, STOP, LOCK = (
    "start.json",
    "events.jsonl",
    "signals.ring",
    "control.json",
    "stop.json",
    "lock",
)
SEAL = "seal.json"
"""Of a checkpoint: size and SHA-256 of its files by name."""
ROW, HEADER, COUNTS, ROWS = struct.Struct("<qq6d"), struct.Struct("<8sII"), struct.Struct("<QQ"), 4096
"""A row: iteration, which of the values were given (a bit each), then mean E(x+), mean E(x-), loss, max |E|, gradient
norm, cross-entropy. The ring begins with magic, version and rows, then how many rows were written and how many signs
of life came besides."""
MAGIC, FIRST = b"MEBMRING", HEADER.size + COUNTS.size
VALUES = ("energy_data_mean", "energy_sample_mean", "loss", "energy_abs_max", "grad_param_norm", "cross_entropy")
MAX_LINE, MAX_METRICS = 65_536, 256
NAME = re.compile(r"[A-Za-z_][\w.-]{0,63}\Z", re.ASCII)
LOOK_SECONDS = 0.2
"""Time between two looks at the control file."""
ACK_SECONDS, STOP_SECONDS = 30.0, 30.0
AUTO_EPOCH = 1000
"""Iterations of an epoch where the script names none."""
Scalar = Union[bool, int, float, str, None]


class MonitorError(RuntimeError):
    """The script reports what cannot be; the message says what, and where."""


class Options(NamedTuple):
    """How a run is watched; its arguments are `Monitor`'s keywords.

    Attributes:
        out: folder of a run alone; default `runs/` and the script's name, or MEBM_OUT.
        rule: the divergence rule: `learnt` (the scale of the run's own gaps), `m-ebm` (that method's fixed limits), or
            `none`. All: non-finite values, |loss| > 1e5. A study's YAML wins.
        symbols: what an argument is in the paper's terms: {"n_steps": "sampling_steps"}; None: nothing.
        every: keep the signals of every n-th iteration; all are judged.
        read_every: iterations between two reads of values on an accelerator, which nothing waits for.
        learn_from: iteration from which the learnt rule learns.
        samples_range: (lowest, highest) pixel of `samples`.
        rank: of this process among those of the run; default RANK, SLURM_PROCID or OMPI_COMM_WORLD_RANK, else 0.
    """

    out: Optional[str] = None
    rule: str = "learnt"
    symbols: Mapping[str, Optional[str]] = {}
    every: int = 1
    read_every: int = 50
    learn_from: int = 0
    samples_range: Tuple[float, float] = (-1.0, 1.0)
    rank: Optional[int] = None


class LearntRule:
    """A divergence rule for energies of unknown scale: it learns the size of the run's own gaps.

    The scale is the median of the 100 records before the last 20, and never falls. Alarm: |gap| above 50 scales three
    records in a row, or above 1,000 scales once. Before 40 records there is no scale and so no alarm.

    Args:
        state: what `state` gave of an earlier one.
    """

    WINDOW, LAG, LEAST, PATIENCE, RUN, ONCE = 100, 20, 20, 3, 50.0, 1000.0

    def __init__(self, state: Optional[Mapping[str, Any]] = None) -> None:
        state = state or {}
        self.recent: Deque[float] = deque(state.get("recent", ()))
        self.window: Deque[float] = deque(state.get("window", ()))
        self.ordered = sorted(self.window)
        self.scale = float(state.get("scale", 0.0))
        """Size of a healthy gap; 0: not known yet."""
        self.run = int(state.get("run", 0))

    def alarm(self, size: float) -> Optional[str]:
        """The cause of an alarm at the next record, or None.

        Args:
            size: |gap|, finite.
        """
        scale = self.scale
        self.run = self.run + 1 if 0 < scale and size > self.RUN * scale else 0
        self._learn(size)
        if 0 < scale and size > self.ONCE * scale:
            return "energy_gap_hard"
        return "energy_gap" if self.run >= self.PATIENCE else None

    def _learn(self, size: float) -> None:
        self.recent.append(size)
        if len(self.recent) <= self.LAG:
            return
        old = self.recent.popleft()
        self.window.append(old)
        insort(self.ordered, old)
        if len(self.window) > self.WINDOW:
            del self.ordered[bisect_left(self.ordered, self.window.popleft())]
        n = len(self.ordered)
        if n >= self.LEAST:
            self.scale = max(self.scale, (self.ordered[n // 2] + self.ordered[(n - 1) // 2]) / 2)

    def state(self) -> Dict[str, Any]:
        """Plain values from which another goes on."""
        return {"recent": list(self.recent), "window": list(self.window), "scale": self.scale, "run": self.run}


class FixedRule:
    """A divergence rule with limits in energy units, M-EBM's where not given."""

    def __init__(self, limit: float = 2.0, patience: int = 3, hard: float = 20.0, run: int = 0) -> None:
        self.limit, self.patience, self.hard, self.run, self.scale = limit, patience, hard, run, 0.0

    def alarm(self, size: float) -> Optional[str]:
        """The cause of an alarm at the next record, or None."""
        self.run = self.run + 1 if size > self.limit else 0
        if size > self.hard:
            return "energy_gap_hard"
        return "energy_gap" if self.run >= self.patience else None

    def state(self) -> Dict[str, Any]:
        """Plain values from which another goes on."""
        return {"run": self.run}


class Judge:
    """What ends a run badly: an alarm of its rule, a value that is not finite, a loss above its limit, a collapse.

    Args:
        rule: name and limits as a study or a run alone resolved them: `rule`, and for fixed ones `gap_limit`,
            `gap_patience`, `hard_gap_limit`; `loss_limit`, `l2_weight` (lambda; 0: none), `collapse_patience`,
            `learn_from`.
        state: what `state` gave of an earlier one.
    """

    def __init__(self, rule: Mapping[str, Any], state: Optional[Mapping[str, Any]] = None) -> None:
        state = state or {}
        self._loss_limit = float(rule.get("loss_limit", 1e5))
        self._learn_from = int(rule.get("learn_from", 0))
        weight = float(rule.get("l2_weight") or 0.0)
        self._optimum = -1.0 / weight if weight > 0 else 0.0
        self._collapse = int(rule.get("collapse_patience", 20))
        self._near = int(state.get("near", 0))
        name = rule.get("rule", "learnt")
        self.rule: Union[LearntRule, FixedRule, None]
        if name == "learnt":
            self.rule = LearntRule(state.get("rule"))
        elif name == "none":
            self.rule = None
        else:
            limit = float(rule.get("gap_limit", 2.0))
            if weight > 0:
                limit = min(limit, float(rule.get("l2_fraction", 0.5)) / weight)
            run = int((state.get("rule") or {}).get("run", 0))
            self.rule = FixedRule(limit, int(rule.get("gap_patience", 3)), float(rule.get("hard_gap_limit", 20.0)), run)

    def verdict(
        self, iteration: int, gap: float, loss: Optional[float], grad_norm: Optional[float]
    ) -> Optional[Tuple[str, str]]:
        """(outcome, cause) where this record ends the run."""
        if not math.isfinite(gap):
            return "diverged", "nonfinite_energy"
        if loss is not None:
            if not math.isfinite(loss):
                return "diverged", "nonfinite_loss"
            if abs(loss) > self._loss_limit:
                return "diverged", "loss_limit"
        if grad_norm is not None and not math.isfinite(grad_norm):
            return "diverged", "nonfinite_gradient"
        cause = None
        if self.rule is not None and iteration >= self._learn_from:
            cause = self.rule.alarm(abs(gap))
        if self._optimum:
            self._near = self._near + 1 if abs(gap - self._optimum) <= 0.5 * abs(self._optimum) else 0
            if self._near >= self._collapse:
                return "collapsed", "trivial_optimum"
        return ("diverged", cause) if cause else None

    def state(self) -> Dict[str, Any]:
        """Plain values from which another goes on."""
        return {"near": self._near, "rule": self.rule.state() if self.rule is not None else None}


class Namespace:
    """The arguments of a run: `args.name`, `args["name"]`, `vars(args)`; read-only."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)

    def __getitem__(self, name: str) -> Any:
        return self.__dict__[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"arguments are read-only: {name}")

    def __repr__(self) -> str:
        return f"Namespace({', '.join(f'{k}={v!r}' for k, v in self.__dict__.items())})"


def typed(name: str, value: Any, default: Any) -> Any:
    """A study's value of an argument in its default's type.

    Raises:
        MonitorError: it has none there: 0.5 for an int.
    """
    if (
        default is None
        or value is None
        or isinstance(value, type(default))
        and isinstance(value, bool) is isinstance(default, bool)
    ):
        return value
    if isinstance(default, bool) or isinstance(value, bool):
        pass
    elif isinstance(default, float) and isinstance(value, (int, float)):
        return float(value)
    elif isinstance(default, int) and isinstance(value, float) and value == int(value):
        return int(value)
    elif isinstance(default, str) and isinstance(value, (int, float)):
        return str(value)
    raise MonitorError(f"{name}: {value!r} is not of type {type(default).__name__}, as its default {default!r} is")


def _caller() -> str:
    """Where the script called: the first frame out of this file."""
    frame: Optional[FrameType] = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}" if frame is not None else "?"


def _reduced(name: str, value: Any) -> Tuple[float, Optional[float]]:
    """Mean and largest size of energies: a number, which has none, or one per image (n,) or (n, 1)."""
    if type(value) is float:
        return value, None
    shape = getattr(value, "shape", None)
    if shape is None or len(shape) == 0:
        try:
            return float(value), None
        except (TypeError, ValueError):
            raise MonitorError(f"{name}: {type(value).__name__}, expected a number or (n,) at {_caller()}") from None
    if (len(shape) == 1 or len(shape) == 2 and shape[1] == 1) and shape[0] > 0:
        if hasattr(value, "detach"):
            value = value.detach()
        return float(value.mean()), float(abs(value).max())
    raise MonitorError(f"{name}: shape {tuple(shape)}, expected a number or (n,) at {_caller()}")


def _write_whole(path: str, data: bytes) -> None:
    """Write a file beside its place and rename it there."""
    handle, part = tempfile.mkstemp(prefix=".", suffix=".part", dir=os.path.dirname(path))
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def _read_json(path: str) -> Dict[str, Any]:
    """A JSON object of a file; empty where there is none or it is not whole."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError):
        return {}


class Monitor:
    """One run of a training script.

    Args:
        options: at most one `Options`.
        arguments: the run's parameters with their defaults. In a study its values come in their place.

    Raises:
        MonitorError: a value of the study does not fit its default; another `Monitor` is open; the writer of a run
            alone does not start.
    """

    _open: Optional["Monitor"] = None

    def __init__(self, *options: Options, **arguments: Any) -> None:
        if len(options) > 1 or any(not isinstance(o, Options) for o in options):
            raise MonitorError("Monitor takes one Options and keywords")
        self._options = options[0] if options else Options()
        self._declared = arguments
        if PROBE in os.environ:
            _write_whole(os.environ[PROBE], json.dumps(self._declaration(), default=str).encode())
            os._exit(0)
        ranks = (self._options.rank, *map(os.environ.get, ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")))
        self._rank = next((int(r) for r in ranks if r not in (None, "")), 0)
        self._shared = int(os.environ.get("WORLD_SIZE") or 1) > 1
        self._wire = os.environ.get(WIRE, "")
        self._writer: Optional[subprocess.Popen[bytes]] = None
        self._pid, self._guarded = os.getpid(), threading.RLock()
        self._start: Dict[str, Any] = _read_json(os.path.join(self._wire, START)) if self._wire else {}
        told = dict(self._start.get("args") or {})
        known = {n: typed(n, told.pop(n), d) if n in told else d for n, d in arguments.items()}
        if told and arguments and not self._start.get("templated"):
            raise MonitorError(f"no argument {', '.join(map(repr, told))}; Monitor(...) has {', '.join(arguments)}")
        self.seed = int(self._start.get("seed", arguments.get("seed") or 0))
        """Seed of the run."""
        if "seed" in known and self._wire:
            known["seed"] = self.seed
        self.args = Namespace({**told, **known})
        self.iteration = 0
        """The next iteration: 0, or the one after the checkpoint."""
        self.resumed, self.folder = False, self._start.get("folder") or ""
        self.checkpoint: Optional[str] = None
        """What `save=PATH` kept, when resumed."""
        self.stopping: Optional[str] = None
        """Why `step` says to stop: diverged, collapsed, budget, pruned, drained or interrupted."""
        self._entered = False
        self._torn = False  # an exception came in the middle of an iteration: what is registered belongs to none

    @classmethod
    def call(cls, place: str) -> None:
        """Call `module:function` with a run and its arguments, which are the function's parameters with defaults."""
        import importlib
        import inspect

        module, _, name = place.partition(":")
        function = getattr(importlib.import_module(module), name)
        _, *rest = inspect.signature(function).parameters.values()
        with cls(**{p.name: p.default for p in rest if p.default is not p.empty}) as run:
            function(run, **{n: run.args[n] for n in run._declared})

    def _declaration(self) -> Dict[str, Any]:
        kinds = {n: type(v).__name__ if v is not None else None for n, v in self._declared.items()}
        o = self._options
        return {
            "parameters": [[n, kinds[n], v] for n, v in self._declared.items()],
            "symbols": dict(o.symbols),
            "rule": o.rule,
            "learn_from": o.learn_from,
            "every": o.every,
        }

    # ------------------------------------------------------------------------------------------------ begin and end

    def __enter__(self) -> "Monitor":
        if Monitor._open is not None:
            raise MonitorError(f"another Monitor is open in this process, at {_caller()}")
        self._last, self._planned = -1, 0
        self._metrics: Dict[str, Dict[str, Any]] = {}
        self._pending: Dict[str, Optional[float]] = {}
        self._objects: Dict[str, Any] = {}
        self._restored: Dict[str, Any] = {}
        self._events, self._epoch, self._epoch_at = 0, 0, 0
        self._trained = self._evaluated = 0.0
        self._looked = 0.0
        self._by_hand = False
        self._interrupt_before: Any = None
        self._saves, self._kept = 0, []  # type: int, List[str]
        self._stop_at: Optional[int] = None
        self._device: Optional[_Device] = None
        self._waiting: Deque[Tuple[int, List[Any]]] = deque()
        self._dropped = 0
        self._log = self._ring = None  # type: Any
        if self._rank > 0:
            self._wire = self._wire or _shared_wire()
        else:
            self._begin()
        Monitor._open, self._entered = self, True
        self._since = self._saved_at = time.monotonic()
        return self

    def _begin(self) -> None:
        if not self._wire:
            self._write_alone()
        self.folder = self._start.get("folder") or self._wire
        self._lock = os.open(self._path(LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        import fcntl

        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise MonitorError(f"a second process reports ({os.getpid()}); pass rank= or report from rank 0") from None
        self._log = os.open(self._path(EVENTS), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        ring = os.open(self._path(RING), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(ring, FIRST + ROWS * ROW.size)
        self._ring = mmap.mmap(ring, FIRST + ROWS * ROW.size)
        os.close(ring)
        HEADER.pack_into(self._ring, 0, MAGIC, PROTOCOL, ROWS)
        self._written = self._alive = 0
        rule = dict(self._start.get("rule") or {"rule": self._options.rule})
        rule.setdefault("learn_from", self._options.learn_from)
        if not rule.get("l2_weight"):
            rule["l2_weight"] = next((v for n, v in vars(self.args).items() if self._symbol(n) == "l2_weight"), 0)
        state: Mapping[str, Any] = {}
        if self._start.get("resume"):
            state = self._resume(str(self._start["resume"]))
        self._judge = Judge(rule, state)
        self._plan_default()
        told = {**self._declaration(), "rule": rule, "planned": self._planned or None, "iteration": self.iteration}
        python = ".".join(map(str, sys.version_info[:3]))
        self._emit("hello", pid=os.getpid(), python=python, versions=_versions(), **told)
        if not os.environ.get(WIRE) and threading.current_thread() is threading.main_thread():
            self._handle_interrupts()

    def _symbol(self, name: str) -> Optional[str]:
        """The paper's name of an argument."""
        named = self._options.symbols.get(name, name)
        return {"l2": "l2_weight"}.get(named, named) if named else None

    def _plan_default(self) -> None:
        planned = vars(self.args).get("iterations")
        if isinstance(planned, int) and not isinstance(planned, bool) and planned > 0:
            self._planned = planned

    def _path(self, name: str) -> str:
        return os.path.join(self._wire, name)

    def _write_alone(self) -> None:
        """Start the process that writes this run's folder, and wait until it says where and from what to go on."""
        self._wire = _shared_wire() if self._shared else tempfile.mkdtemp(prefix="mebm-")
        script = os.path.abspath(sys.argv[0]) if sys.argv and sys.argv[0] not in ("", "-", "-c") else ""
        stem = os.path.splitext(os.path.basename(script))[0] or "run"
        out = self._options.out or os.environ.get(OUT) or os.path.join("runs", stem)
        told = {
            "out": os.path.abspath(out),
            "named": bool(self._options.out or os.environ.get(OUT)),
            "args": vars(self.args),
            "seed": self.seed,
            "script": script,
            "argv": sys.argv[1:],
            "pid": os.getpid(),
            **self._declaration(),
        }
        _write_whole(self._path("alone.json"), json.dumps(told, default=str).encode())
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        # Isolated, so that no file beside the script is imported in place of a module; what PYTHONPATH adds comes last.
        more = [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
        path = f"sys.path.insert(0, {root!r}); sys.path.extend({more!r})"
        code = f"import sys; {path}; from study.script.alone import main; main(sys.argv[1])"
        python = os.environ.get(PYTHON) or sys.executable
        with open(self._path("writer.log"), "wb") as log:
            self._writer = subprocess.Popen(
                [python, "-I", "-c", code, self._wire],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until = time.monotonic() + 120
        while not os.path.exists(self._path(START)):
            if self._writer.poll() is not None or time.monotonic() > until:
                said = self._writer_said() or "the writer of this run did not start"
                self._writer.kill()
                shutil.rmtree(self._wire, ignore_errors=True)
                raise MonitorError(said)
            time.sleep(0.01)
        self._start = _read_json(self._path(START))

    def _writer_said(self) -> str:
        with contextlib.suppress(OSError), open(self._path("writer.log"), encoding="utf-8", errors="replace") as log:
            lines = [line.strip() for line in log if line.strip()]
            return lines[-1] if lines else ""
        return ""

    def _handle_interrupts(self) -> None:
        before = signal.getsignal(signal.SIGINT)
        if before is not signal.default_int_handler:
            return

        def interrupted(*_: Any) -> None:
            if self.stopping is None:
                self._stop("interrupted")
                signal.signal(signal.SIGINT, before)

        signal.signal(signal.SIGINT, interrupted)
        self._interrupt_before = before

    def __exit__(self, kind: Optional[type], error: Optional[BaseException], trace: Optional["TracebackType"]) -> None:
        if not self._entered or Monitor._open is not self:
            return
        Monitor._open = None
        if self._rank > 0 or os.getpid() != self._pid:
            return
        try:
            self._settle()
            self._torn = not (error is None or isinstance(error, SystemExit) and error.code in (None, 0))
            if isinstance(error, KeyboardInterrupt):
                self.stopping = self.stopping or "interrupted"
            elif error is not None and self._torn:
                self._emit("error", **_described(error))
            # A part of an epoch is a row where the run ends here; one that goes on later finishes it.
            if self._pending or (self._iterated() and self.stopping is None):
                self._close_epoch(None, None, None)
            if self._objects and not self._torn and self.stopping in (None, "budget", "drained", "interrupted"):
                self._save(dict(self._objects))
            self._emit("end", iteration=self._last + 1, stopping=self.stopping, modules=_local_modules())
        finally:
            self._entered = False
            if self._interrupt_before is not None:
                signal.signal(signal.SIGINT, self._interrupt_before)
            os.close(self._log)
            self._ring.close()
            os.close(self._lock)
            self._end_writer()

    def _end_writer(self) -> None:
        if self._writer is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._writer.wait(120)
            said = self._writer_said()
            print(f"mebm: {said}" if code == 0 else f"mebm: the run's folder is not complete: {said}", file=sys.stderr)
        if self._writer.poll() is not None:
            shutil.rmtree(self._wire, ignore_errors=True)

    # ------------------------------------------------------------------------------------------------------- report

    def plan(self, iterations: int) -> None:
        """The run's whole budget in iterations; default: the argument `iterations`."""
        with self._turn():
            if iterations < 1:
                raise MonitorError(f"plan: iterations must be at least 1, got {iterations} at {_caller()}")
            self._planned = int(iterations)
            self._emit("plan", iterations=self._planned)

    def metric(
        self, name: str, direction: Optional[str] = None, unit: str = "", protocol: Optional[str] = None
    ) -> None:
        """Say what a metric is: `minimize`, `maximize` or neither; its unit; how it is measured."""
        with self._turn():
            if direction not in (None, "minimize", "maximize"):
                raise MonitorError(f"{name}: direction must be minimize or maximize, got {direction!r}")
            self._known(name)
            self._metrics[name] = {"direction": direction, "unit": unit, "protocol": protocol}
            self._emit("metric", name=name, direction=direction, unit=unit, protocol=protocol)

    def _known(self, name: str) -> None:
        if not NAME.match(name):
            raise MonitorError(f"metric {name!r}: letters, digits, '_', '.' and '-', at most 64, at {_caller()}")
        if name not in self._metrics:
            if len(self._metrics) >= MAX_METRICS:
                raise MonitorError(f"metric {name!r}: more than {MAX_METRICS} metrics")
            self._metrics[name] = {}

    def note(self, **attributes: Scalar) -> None:
        """Facts of the run, columns without a direction."""
        with self._turn():
            for name, value in attributes.items():
                if not NAME.match(name) or not isinstance(value, (bool, int, float, str, type(None))):
                    raise MonitorError(f"note {name!r}: {value!r} is not a number, text or truth value")
            self._emit("note", values=attributes)

    def step(
        self,
        iteration: int,
        energy_data: Any,
        energy_samples: Any,
        loss: Any = None,
        *,
        grad_norm: Any = None,
        cross_entropy: Any = None,
    ) -> bool:
        """Report an iteration, after the optimiser's step.

        Args:
            iteration: rises; gaps are allowed.
            energy_data: mean E(x+), or one energy per image, shape (n,). Low on data.
            energy_samples: mean E(x-), likewise.
            loss: the generative loss; without it there is no check of |loss|.
            grad_norm: norm of the loss's gradient; recorded, and judged where it is not finite.
            cross_entropy: of a hybrid model; recorded.

        Returns:
            True where the script should leave its loop; `stopping` says why.

        Raises:
            MonitorError: the iteration does not rise; energies of a wrong shape.
        """
        if os.getpid() != self._pid or not self._entered:
            raise MonitorError("step: outside of its `with`, or in a fork of its process")
        if self._rank > 0:
            return self._follow(iteration)
        with self._guarded:
            if iteration <= self._last:
                where = f"a run that goes on at {self.iteration}" if iteration < self.iteration else "its last"
                raise MonitorError(f"step({iteration}) after step({self._last}) of {where}, {_caller()}")
            self._last = iteration
            values = (energy_data, energy_samples, loss, grad_norm, cross_entropy)
            if any(hasattr(v, "is_ready") or getattr(v, "is_cuda", False) for v in (energy_data, energy_samples)):
                self._later(iteration, values)
            else:
                mean_data, size_data = _reduced("energy_data", energy_data)
                mean_samples, size_samples = _reduced("energy_samples", energy_samples)
                size = None if size_data is None or size_samples is None else max(size_data, size_samples)
                numbers = [None if v is None else float(v) for v in (loss, grad_norm, cross_entropy)]
                self._record(iteration, mean_data, mean_samples, numbers[0], size, numbers[1], numbers[2])
            now = time.monotonic()
            if now - self._looked > LOOK_SECONDS:
                self._look(now)
            if self._last - self._epoch_at >= AUTO_EPOCH - 1 and not self._by_hand:
                self._close_epoch(None, None, None)
            return self._leaves(iteration)

    def _leaves(self, iteration: int) -> bool:
        """Whether this rank leaves now: ranks that meet in every iteration leave in the same one."""
        if self.stopping is None:
            return False
        if self._shared:
            if self._stop_at is None:
                self._stop_at = iteration + 2
                _write_whole(self._path(STOP), json.dumps({"at": self._stop_at, "stop": self.stopping}).encode())
            return iteration >= self._stop_at
        return True

    def _follow(self, iteration: int) -> bool:
        """What a rank above 0 does: leave when rank 0 has said so."""
        if self._stop_at is None and os.path.exists(self._path(STOP)):
            told = _read_json(self._path(STOP))
            if "at" in told:
                self._stop_at, self.stopping = int(told["at"]), str(told.get("stop"))
        return self._stop_at is not None and iteration >= self._stop_at

    def _record(
        self, iteration: int, mean_data: float, mean_samples: float, loss: Optional[float], size: Optional[float],
        grad_norm: Optional[float], cross_entropy: Optional[float],
    ) -> None:  # fmt: skip
        verdict = None
        if self.stopping is None:
            verdict = self._judge.verdict(iteration, mean_data - mean_samples, loss, grad_norm)
        if verdict is not None or iteration % self._options.every == 0:
            values = (mean_data, mean_samples, loss, size, grad_norm, cross_entropy)
            given = sum(1 << i for i, v in enumerate(values) if v is not None)
            place = FIRST + self._written % ROWS * ROW.size
            ROW.pack_into(self._ring, place, iteration, given, *(0.0 if v is None else v for v in values))
            self._written += 1
            COUNTS.pack_into(self._ring, HEADER.size, self._written, self._alive)
        if verdict is not None:
            self._emit(
                "verdict",
                outcome=verdict[0],
                cause=verdict[1],
                iteration=iteration,
                scale=getattr(self._judge.rule, "scale", None),
            )
            self._stop(verdict[0])

    def _later(self, iteration: int, values: Tuple[Any, ...]) -> None:
        """Values on an accelerator: judged once they are there, nothing waits for them."""
        if getattr(values[0], "is_cuda", False) or getattr(values[1], "is_cuda", False):
            if self._device is None:
                self._device = _Device(self._options.read_every)
            for row in self._device.add(iteration, values):
                self._judged(row)
            return
        self._waiting.append((iteration, list(values)))
        while self._waiting and all(v.is_ready() for v in self._waiting[0][1] if hasattr(v, "is_ready")):
            self._judge_waiting()
        if len(self._waiting) > 2 * self._options.read_every:
            self._waiting.popleft()
            self._dropped += 1

    def _judge_waiting(self) -> None:
        iteration, (data, samples, loss, grad_norm, cross_entropy) = self._waiting.popleft()
        mean_data, size_data = _reduced("energy_data", data)
        mean_samples, size_samples = _reduced("energy_samples", samples)
        size = None if size_data is None or size_samples is None else max(size_data, size_samples)
        others = [None if v is None else float(v) for v in (loss, grad_norm, cross_entropy)]
        self._record(iteration, mean_data, mean_samples, others[0], size, others[1], others[2])

    def _judged(self, row: Tuple[int, List[Optional[float]]]) -> None:
        iteration, (data, samples, loss, size, grad_norm, cross_entropy) = row
        assert data is not None and samples is not None
        self._record(iteration, data, samples, loss, size, grad_norm, cross_entropy)

    def _settle(self) -> None:
        """Judge everything that was reported; may wait for the device."""
        if self._device is not None:
            for row in self._device.rest():
                self._judged(row)
        while self._waiting:
            self._judge_waiting()

    def log(self, **metrics: Optional[float]) -> None:
        """Numbers of the next epoch's row."""
        with self._turn():
            self._take(metrics)

    def _take(self, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            self._known(name)
            number = None if value is None else float(value)
            if number is not None and not math.isfinite(number):
                number = None
                self._emit("remark", text=f"{name} is not finite at epoch {self._epoch + 1}: stored as null")
            self._pending[name] = number

    def epoch(
        self, *, samples: Any = None, save: Any = None, learning_rate: Optional[float] = None,
        **metrics: Optional[float],
    ) -> bool:  # fmt: skip
        """Close a row of the run: its metrics, sample images and a checkpoint. Waits until the study has decided.

        Args:
            samples: images (n, C, H, W) in `Options.samples_range`, torch, NumPy or JAX; 64 are kept.
            save: objects by name to keep instead of those of `restore`, or the path of a file or folder.
            learning_rate: at the epoch's end.
            metrics: numbers by name.

        Returns:
            As `step`.
        """
        if self._rank > 0:
            return self.stopping is not None
        with self._turn():
            self._by_hand = True
            self._settle()
            self._take(metrics)
            self._close_epoch(samples, save, learning_rate)
            return self.stopping is not None

    def _iterated(self) -> bool:
        return self._last >= self._epoch_at and self._last >= 0

    def _close_epoch(self, samples: Any, save: Any, learning_rate: Optional[float]) -> None:
        now = time.monotonic()
        trained = now - self._since - self._evaluated
        self._epoch += 1
        picture = self._images(samples) if samples is not None else None
        values: Dict[str, Any] = {
            "epoch": self._epoch, "iteration": max(self._last + 1, self.iteration), "train": trained,
            "learning_rate": None if learning_rate is None else float(learning_rate), "metrics": self._pending,
            "samples": picture, "written": self._written,
        }  # fmt: skip
        stop = self.stopping
        if stop in ("diverged", "collapsed"):
            pass  # what is worth keeping was kept before
        elif save is not None:
            values["saved"] = self._save(save)
        elif self._objects and not self._torn and (stop in ("budget", "drained") or self._save_due()):
            values["saved"] = self._save(dict(self._objects))
        values["evaluation"] = self._evaluated + time.monotonic() - now
        number = self._emit("epoch", **values)
        self._pending, self._epoch_at = {}, self._last + 1
        self._wait_for(number)
        self._since, self._evaluated = time.monotonic(), 0.0

    def _wait_for(self, number: int) -> None:
        until, pause = time.monotonic() + ACK_SECONDS, 0.001
        while time.monotonic() < until:
            told = self._look(time.monotonic())
            if self.stopping is not None or int(told.get("ack") or 0) >= number:
                return
            if self._writer is not None and self._writer.poll() is not None:
                return
            time.sleep(pause)
            pause = min(0.05, 2 * pause)

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Around what is not training: its time is counted as evaluation."""
        began = time.monotonic()
        self.alive()
        try:
            yield
        finally:
            self._evaluated += time.monotonic() - began

    def alive(self) -> None:
        """A sign of life in a long evaluation."""
        if self._rank == 0:
            with self._turn():
                self._alive += 1
                COUNTS.pack_into(self._ring, HEADER.size, self._written, self._alive)

    # ----------------------------------------------------------------------------------------------------- internal

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        if os.getpid() != self._pid or not self._entered:
            raise MonitorError(f"outside of its `with`, or in a fork of its process, at {_caller()}")
        with self._guarded:
            yield

    def _look(self, now: float) -> Dict[str, Any]:
        """What the study says."""
        self._looked = now
        told = _read_json(self._path(CONTROL))
        if told.get("stop") and self.stopping is None:
            self._stop(str(told["stop"]))
        return told

    def _stop(self, reason: str) -> None:
        self.stopping = reason

    def _emit(self, kind: str, **values: Any) -> int:
        self._events += 1
        body = json.dumps({"n": self._events, "t": kind, **values}, allow_nan=False)
        if len(body) > MAX_LINE - 32:
            raise MonitorError(f"{kind}: a report of {len(body):,} characters, at most {MAX_LINE:,}")
        os.write(self._log, f'{body[:-1]}, "crc": "{zlib.crc32(body.encode()):08x}"}}\n'.encode())
        return self._events

    def _images(self, samples: Any) -> Optional[str]:
        """Write up to 64 images as uint8 (n, C, H, W); the name of the file."""
        import numpy as np

        if hasattr(samples, "detach"):
            samples = samples.detach().to("cpu").float().numpy()
        images = np.asarray(samples)[:64]
        if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
            raise MonitorError(
                f"samples: shape {images.shape}, expected (n, C, H, W) with 1 or 3 channels, {_caller()}"
            )
        low, high = self._options.samples_range
        if images.dtype != np.uint8:
            with np.errstate(invalid="ignore"):
                scaled = np.nan_to_num((images.astype(np.float64) - low) / (high - low) * 255, posinf=255.0)
            images = scaled.clip(0, 255).round().astype(np.uint8)
        name = f"samples-{self._epoch}.npy"
        np.save(self._path(name), images, allow_pickle=False)
        return name

    # -------------------------------------------------------------------------------------------------- checkpoints

    def restore(self, **objects: Any) -> Dict[str, Any]:
        """Register what makes the run, and take it up from the checkpoint of an earlier attempt.

        Args:
            objects: things with `state_dict` and `load_state_dict`, which are restored in place, or arrays, numbers,
                texts and nests of them.

        Returns:
            The objects by name: the restored ones, or those given.

        Raises:
            MonitorError: the checkpoint has no such object.
        """
        if self._rank == 0:
            with self._turn():
                self._objects.update(objects)
        if not self.resumed:
            return dict(objects)
        found = {}
        for name, value in objects.items():
            if name not in self._restored:
                raise MonitorError(f"restore: the checkpoint holds no {name!r}; it holds {', '.join(self._restored)}")
            state = self._restored[name]
            if hasattr(value, "load_state_dict"):
                value.load_state_dict(state)
                found[name] = value
            else:
                found[name] = state
        if self._rank == 0:
            with self._turn():
                self._objects.update(found)  # what goes on is what is saved next
        _set_random(self._restored.get("", {}))
        return found

    def _save_due(self) -> bool:
        return time.monotonic() - self._saved_at >= float(self._start.get("checkpoint_seconds", 60))

    def _save(self, what: Any) -> Optional[str]:
        """Write a sealed checkpoint; its name, or None where it cannot be written."""
        self._saves += 1
        self._saved_at = time.monotonic()
        name = f"checkpoint-{self._saves}"
        part, place = self._path(f".{name}"), self._path(name)
        try:
            shutil.rmtree(part, ignore_errors=True)
            os.mkdir(part, 0o700)
            meta: Dict[str, Any] = {
                "protocol": PROTOCOL, "iteration": max(self._last + 1, self.iteration), "epoch": self._epoch,
                "judge": self._judge.state(), "path": None,
            }  # fmt: skip
            if isinstance(what, Mapping):
                _write_objects(part, {n: v.state_dict() if hasattr(v, "state_dict") else v for n, v in what.items()})
            else:
                source = os.fspath(what)
                meta["path"] = os.path.basename(os.path.normpath(source))
                copy = os.path.join(part, meta["path"])
                shutil.copytree(source, copy) if os.path.isdir(source) else shutil.copy2(source, copy)
            _write_whole(os.path.join(part, "meta.json"), json.dumps(meta).encode())
            _write_whole(os.path.join(part, SEAL), json.dumps(_contents(part)).encode())
            os.rename(part, place)
        except (OSError, ValueError) as error:
            shutil.rmtree(part, ignore_errors=True)
            self._emit("remark", text=f"checkpoint not written ({error}); going on")
            return None
        self._kept.append(name)
        self._emit("saved", name=name, iteration=meta["iteration"], epoch=self._epoch)
        while len(self._kept) > 3:
            old = self._kept.pop(0)
            with contextlib.suppress(OSError):
                os.rename(self._path(old), part)  # so that a name is never that of half a checkpoint
            shutil.rmtree(part, ignore_errors=True)
        return name

    def _resume(self, folder: str) -> Mapping[str, Any]:
        """Take up a sealed checkpoint; the state of the judge."""
        meta = _read_json(os.path.join(folder, "meta.json"))
        self.iteration, self._epoch = int(meta["iteration"]), int(meta["epoch"])
        self._last, self._epoch_at, self.resumed = self.iteration - 1, self.iteration, True
        if meta.get("path"):
            self.checkpoint = os.path.join(folder, str(meta["path"]))
        else:
            self._restored = _read_objects(folder)
        state: Mapping[str, Any] = meta.get("judge") or {}
        return state


class _Device:
    """Rows of values on a CUDA device, brought over in blocks of `n` that nothing waits for.

    Two halves of a block's size take turns: one is filled while the other is on its way.
    """

    def __init__(self, n: int) -> None:
        self._n, self._rows, self.dropped = max(1, n), 0, 0
        self._device: Any = None
        self._told: List[List[Tuple[int, List[bool]]]] = [[(0, [])] * self._n, [(0, [])] * self._n]
        self._full: Deque[int] = deque()

    def add(self, iteration: int, values: Tuple[Any, ...]) -> Iterator[Tuple[int, List[Optional[float]]]]:
        """Take a row; yields those that have arrived."""
        import torch

        data, samples, loss, grad_norm, cross_entropy = values
        device = data.device if getattr(data, "is_cuda", False) else samples.device
        with torch.no_grad():
            row = [self._scalar(torch, device, n, v) for n, v in (("energy_data", data), ("energy_samples", samples))]
            sizes = [abs(v.detach()).max() for v in (data, samples) if len(getattr(v, "shape", ()))]
            size = torch.stack(sizes).max() if len(sizes) == 2 else None
            rest = (loss, size, grad_norm, cross_entropy)
            row += [self._scalar(torch, device, "value", 0.0 if v is None else v) for v in rest]
            if self._device is None:
                if os.environ.get(GPU_SHARE):  # Ray's fractions are bookkeeping; this is a limit
                    torch.cuda.set_per_process_memory_fraction(float(os.environ[GPU_SHARE]), device)
                self._device = torch.empty(2, self._n, 6, device=device)
                self._pinned = torch.empty(2, self._n, 6, pin_memory=True)
                self._done = [torch.cuda.Event(), torch.cuda.Event()]
            half, k = divmod(self._rows % (2 * self._n), self._n)
            while self._full and self._done[self._full[0]].query():
                yield from self._arrived(self._full.popleft(), self._n)
            if half in self._full:  # the host is far ahead: counted, never waited for
                self.dropped += 1
                return
            torch.stack(row, out=self._device[half, k])
            self._told[half][k] = iteration, [True, True, *(v is not None for v in rest)]
            self._rows += 1
            if k == self._n - 1:
                self._pinned[half].copy_(self._device[half], non_blocking=True)
                self._done[half].record()
                self._full.append(half)

    @staticmethod
    def _scalar(torch: Any, device: Any, name: str, value: Any) -> Any:
        if not hasattr(value, "detach"):
            return torch.full((), float(value), device=device)
        value = value.detach()
        if value.dim() > 2 or value.dim() == 2 and value.shape[1] != 1 or value.numel() == 0:
            raise MonitorError(f"{name}: shape {tuple(value.shape)}, expected a number or (n,) at {_caller()}")
        return value.to(device=device, dtype=torch.float32).mean()

    def _arrived(self, half: int, count: int) -> Iterator[Tuple[int, List[Optional[float]]]]:
        rows = self._pinned[half][:count].tolist()
        for (iteration, given), row in zip(self._told[half], rows):
            yield iteration, [v if there else None for v, there in zip(row, given)]

    def rest(self) -> Iterator[Tuple[int, List[Optional[float]]]]:
        """All rows that are left; waits for the device."""
        if self._device is None:
            return
        for half in list(self._full):
            self._done[half].synchronize()
            yield from self._arrived(half, self._n)
        self._full.clear()
        half, k = divmod(self._rows % (2 * self._n), self._n)
        if k:
            self._pinned[half][:k] = self._device[half, :k].cpu()
            yield from self._arrived(half, k)
        self._rows = 0


# ------------------------------------------------------------------------------------------------------- files of state


def _contents(folder: str) -> Dict[str, List[Any]]:
    """Size and SHA-256 of every file of a folder, by its name there."""
    found: Dict[str, List[Any]] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                for block in iter(lambda: file.read(1 << 20), b""):
                    digest.update(block)
                found[os.path.relpath(path, folder)] = [file.tell(), digest.hexdigest()]
    return found


def sealed(folder: str) -> bool:
    """Whether a checkpoint folder is whole."""
    try:
        seal = _read_json(os.path.join(folder, SEAL))
        there = {n: c for n, c in _contents(folder).items() if n != SEAL}
    except OSError:
        return False
    return bool(seal) and there == seal


def _write_objects(folder: str, objects: Mapping[str, Any]) -> None:
    """Write nests of tensors, arrays and plain values, and the state of the global random generators."""
    tensors: List[Any] = []
    arrays: Dict[str, Any] = {}
    plain = {"objects": _packed(objects, tensors, arrays, "save"), "random": _packed(_random(), tensors, arrays, "")}
    if tensors:
        import torch

        torch.save(tensors, os.path.join(folder, "tensors.pt"))
    if arrays:
        import numpy as np

        np.savez(os.path.join(folder, "arrays.npz"), **arrays)
    _write_whole(os.path.join(folder, "objects.json"), json.dumps(plain).encode())


def _read_objects(folder: str) -> Dict[str, Any]:
    """What `_write_objects` wrote, by name; under "" the state of the random generators."""
    plain = _read_json(os.path.join(folder, "objects.json"))
    tensors: Any = []
    arrays: Any = {}
    if os.path.exists(os.path.join(folder, "tensors.pt")):
        import torch

        tensors = torch.load(os.path.join(folder, "tensors.pt"), map_location="cpu", weights_only=True)
    if os.path.exists(os.path.join(folder, "arrays.npz")):
        import numpy as np

        with np.load(os.path.join(folder, "arrays.npz"), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    found: Dict[str, Any] = _unpacked(plain["objects"], tensors, arrays)
    found[""] = _unpacked(plain["random"], tensors, arrays)
    return found


def _packed(value: Any, tensors: List[Any], arrays: Dict[str, Any], where: str) -> Any:
    """A nest as JSON, its tensors and arrays put aside."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {"d": [[k, _packed(v, tensors, arrays, f"{where}.{k}")] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "l" if isinstance(value, list) else "t"
        return {kind: [_packed(v, tensors, arrays, f"{where}[{i}]") for i, v in enumerate(value)]}
    if hasattr(value, "detach"):
        tensors.append(value.detach().cpu().clone())
        return {"x": len(tensors) - 1}
    if hasattr(value, "__array__"):
        import numpy as np

        array = np.asarray(value)
        if array.dtype.hasobject:
            raise MonitorError(f"{where}: an array of objects cannot be saved")
        arrays[f"a{len(arrays)}"] = array
        return {"a": f"a{len(arrays) - 1}"}
    raise MonitorError(
        f"{where}: a {type(value).__name__} cannot be saved; expected tensors, arrays, numbers, texts, and lists and "
        "mappings of them, or something with state_dict"
    )


def _unpacked(value: Any, tensors: Any, arrays: Mapping[str, Any]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "d":
        return {k: _unpacked(v, tensors, arrays) for k, v in inner}
    if kind in "lt":
        items = [_unpacked(v, tensors, arrays) for v in inner]
        return items if kind == "l" else tuple(items)
    return tensors[inner] if kind == "x" else arrays[inner]


def _random() -> Dict[str, Any]:
    """State of the global random generators that are in use."""
    found: Dict[str, Any] = {"python": random.getstate()}
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if numpy is not None:
        found["numpy"] = numpy.random.get_state()
    if torch is not None:
        found["torch"] = torch.get_rng_state()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            found["cuda"] = torch.cuda.get_rng_state_all()
    return found


def _set_random(state: Mapping[str, Any]) -> None:
    if "python" in state:
        random.setstate(state["python"])
    if "numpy" in state:
        import numpy as np

        np.random.set_state(state["numpy"])
    if "torch" in state:
        import torch

        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda"])


# -------------------------------------------------------------------------------------------------------------- told


def _versions() -> Dict[str, str]:
    loaded = ((n, getattr(sys.modules.get(n), "__version__", None)) for n in ("torch", "jax", "numpy", "tensorflow"))
    return {name: str(version) for name, version in loaded if version}


def _local_modules() -> Dict[str, str]:
    """SHA-256 of the loaded modules that lie beside the script or below the working directory."""
    roots = {os.getcwd(), os.path.dirname(os.path.abspath(sys.argv[0])) if sys.argv else os.getcwd()}
    found: Dict[str, str] = {}
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None)
        if not path or "site-packages" in path or os.path.abspath(path) == os.path.abspath(__file__):
            continue
        inside = [r for r in roots if os.path.abspath(path).startswith(r + os.sep)]
        if inside and len(found) < 300:
            with contextlib.suppress(OSError), open(path, "rb") as file:
                found[os.path.relpath(path, min(inside))] = hashlib.sha256(file.read()).hexdigest()
    return found


def _described(error: BaseException) -> Dict[str, Any]:
    """An exception for the report: type, first line, where it was raised, and whether another start may help."""
    where = own = "?"
    trace = error.__traceback__
    libraries = (os.path.dirname(os.__file__) + os.sep, "<frozen")
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file != __file__:
            where = f"{file}:{trace.tb_lineno}"
            own = own if file.startswith(libraries) or "site-packages" in file else where
        trace = trace.tb_next
    where = where if own == "?" else own
    text = str(error).strip().splitlines()
    transient = isinstance(error, (MemoryError, ConnectionError)) or "out of memory" in str(error).lower()
    if isinstance(error, OSError) and error.errno is not None:
        import errno

        transient = transient or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM)
    return {
        "type": type(error).__name__, "text": (text[0] if text else "")[:500], "where": where, "transient": transient,
    }  # fmt: skip


def _shared_wire() -> str:
    """Wire of a run alone whose ranks are processes of one node: a folder that each of them finds."""
    run = "-".join(os.environ.get(n, "") for n in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "MASTER_PORT"))
    place = os.path.join(tempfile.gettempdir(), f"mebm-{os.getuid()}-{hashlib.sha256(run.encode()).hexdigest()[:12]}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(place, 0o700)
    found = os.lstat(place)
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or os.path.islink(place):
        raise MonitorError(f"{place}: not a private folder of this user")
    return place
