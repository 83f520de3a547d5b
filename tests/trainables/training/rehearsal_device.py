"""A second device made of the CPU's memory, as strict as a GPU: what a trial does on CUDA, watched operation by operation.

PyTorch keeps one device type free for back ends outside it and lets Python fill it (`PrivateUse1`). Its tensors hold
real values here, so whole trials run on it: backward passes, autocast, fused optimiser steps, evaluations, checkpoints,
and "CUDA graphs", which record operations with the memory they name and replay them.

PyTorch calls this way of adding a device experimental; written against torch 2.11 and 2.15.

Refused always: host and device tensors in one operation (but for what CUDA takes too), and a random draw that does not
come from a generator of its device. Refused while `Watch.strict`: whatever makes the host wait for the device, and
every copy between the two. Not seen: streams, the kernels' own demands and what C++ does below an operation.
"""

from __future__ import annotations

import re
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _foreach_utils
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
NAME = "rehearsal"
KEY = "PrivateUse1"
_PLAIN = frozenset({int, float, bool, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})
_COPIES = (aten.copy_.default, aten._to_copy.default)
_INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor)
_WAITING = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_DEVICE = torch.device("cpu")


class NotOnGpuError(RuntimeError):
    """Something that a GPU would refuse, or that costs a training loop its speed there."""


class DeviceTensor(torch.Tensor):
    """A tensor of the device; `values` are its values, in the CPU's memory."""

    values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor, requires_grad: bool = False) -> DeviceTensor:
        if type(values) is DeviceTensor:
            values = values.values
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=_DEVICE,
            requires_grad=requires_grad,
        )
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return watch.run(func, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values"], None

    @staticmethod
    def __tensor_unflatten__(parts: Mapping[str, Tensor], _context: None, _size: Any, _stride: Any) -> DeviceTensor:
        return DeviceTensor(parts["values"])

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"on the device: {self.values}"


class DeviceGenerator(torch.Generator):
    """A stream of random numbers of the device."""

    known: ClassVar[dict[int, DeviceGenerator]] = {}
    """By address: operations are given the same stream as another object."""

    def __init__(self) -> None:
        self.known[self._cdata] = self

    @property
    def device(self) -> torch.device:
        return _DEVICE

    def graphsafe_set_state(self, state: torch.Generator) -> None:
        self.set_state(state.get_state())


class _AnyGenerator(torch.Generator):
    """What `torch.Generator` is while the device is there."""

    def __new__(cls, device: torch.device | str = "cpu") -> torch.Generator:
        return DeviceGenerator() if torch.device(device).type == NAME else _HOST_GENERATOR(device)


_HOST_GENERATOR = torch.Generator


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for v in value:
            yield from _tensors(v)


@dataclass(frozen=True)
class _Operation:
    """What of an operation does not depend on what it is given."""

    name: str
    arguments: tuple[str, ...]
    writes: tuple[str, ...]
    """Arguments that it changes."""
    copies: bool
    indexes: bool
    waits: bool
    draws: bool
    """It takes random numbers."""
    fresh: bool
    """Its results are new memory, not a view or an argument."""
    counts: bool
    """A GPU has a kernel for it."""


_OPERATIONS: dict[int, _Operation] = {}


def _operation(func: Any) -> _Operation:
    known = _OPERATIONS.get(id(func))
    if known is not None:
        return known
    schema, name = func._schema, func._schema.name.removeprefix("aten::")
    writes = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    if name == "native_batch_norm":  # which does not say so
        writes += ["running_mean", "running_var"]
    fresh, indexes = all(r.alias_info is None for r in schema.returns), func in _INDEXED
    operation = _OPERATIONS[id(func)] = _Operation(
        name,
        arguments=tuple(a.name for a in schema.arguments),
        writes=tuple(writes),
        copies=func in _COPIES,
        indexes=indexes,
        waits=not indexes and any(tag in func.tags for tag in _WAITING),
        draws=torch.Tag.nondeterministic_seeded in func.tags,
        fresh=fresh,
        counts=bool(fresh or writes) and "empty" not in name,
    )
    return operation


class Watch:
    """Runs the device's operations and judges them.

    Attributes:
        strict: within a training iteration.
        launches: operations by name that a GPU has a kernel for.
        capture: the graph that operations are recorded into.
    """

    def __init__(self) -> None:
        self.strict = False
        self.launches: Counter[str] = Counter()
        self.capture: Graph | None = None

    @contextmanager
    def iteration(self) -> Iterator[None]:
        self.strict = True
        try:
            yield
        finally:
            self.strict = False

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        operation = _operation(func)
        wrappers: dict[int, Tensor] = {}
        others: list[Any] = []

        def unwrapped(value: Any) -> Any:
            kind = type(value)
            if kind is DeviceTensor:
                wrappers[id(value.values)] = value
                return value.values
            if kind is list or kind is tuple:
                return [unwrapped(v) for v in value]
            if kind not in _PLAIN and isinstance(value, Tensor | _HOST_GENERATOR):
                others.append(value)
            return value

        plain_args = [unwrapped(a) for a in args]
        plain_kwargs = {name: unwrapped(v) for name, v in kwargs.items()}
        if "device" in plain_kwargs:
            plain_kwargs["device"] = torch.device("cpu")
        to_host = operation.copies and self._judge_copy(func, args, kwargs)
        if not operation.copies:
            self._judge(operation, args, others)
        if self.capture is not None and operation.writes:
            given = dict(zip(operation.arguments, plain_args, strict=False)) | plain_kwargs
            self.capture.keep([given.get(name) for name in operation.writes])
        made = func(*plain_args, **plain_kwargs)
        if self.capture is not None:
            self.capture.record(func, plain_args, plain_kwargs, list(_tensors(made)) if operation.fresh else [])
        self.launches[operation.name] += operation.counts

        def wrapped(value: Any) -> Any:
            if type(value) is Tensor or isinstance(value, Tensor):
                known = wrappers.get(id(value))
                return known if known is not None else value if to_host else DeviceTensor(value)
            if isinstance(value, list | tuple):
                return type(value)([wrapped(v) for v in value])
            return value

        return wrapped(made)

    def _judge_copy(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a copy goes to the host."""
        target, source = (args[0], args[1]) if func is aten.copy_.default else (None, args[0])
        device = target.device if target is not None else kwargs.get("device") or source.device
        to_host = device.type == "cpu"
        if self.strict and device.type != source.device.type:
            raise NotOnGpuError("copy to the host, which waits for the device" if to_host else "copy from the host")
        return to_host

    def _judge(self, operation: _Operation, args: Sequence[Any], others: list[Any]) -> None:
        name = operation.name
        on_host = [t for t in others if isinstance(t, Tensor)]
        indices = list(_tensors(args[1])) if operation.indexes else []
        if self.strict:
            if operation.waits or any(i.dtype in (torch.bool, torch.uint8) for i in indices):
                raise NotOnGpuError(f"{name} makes the host wait for the device")
            if on_host:
                raise NotOnGpuError(f"{name} takes a tensor of the host")
        elif any(t.dim() and not any(t is i for i in indices) for t in on_host):
            raise NotOnGpuError(f"{name} takes tensors of two devices")
        if operation.draws:
            places = [g._cdata for g in others if isinstance(g, _HOST_GENERATOR)]
            if not places or places[0] not in DeviceGenerator.known:
                raise NotOnGpuError(f"{name} draws from no generator of the device")
            if self.capture is not None and all(places[0] != g._cdata for g in self.capture.generators):
                raise NotOnGpuError(f"{name} draws from a generator that the graph does not know")


watch = Watch()


class Graph:
    """What stands for `torch.cuda.CUDAGraph`: operations, with the very memory that they read and write."""

    def __init__(self) -> None:
        self.generators: dict[torch.Generator, Tensor] = {}
        self._steps: list[tuple[Any, list[Any], dict[str, Any], list[Tensor]]] = []
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators[generator] = generator.get_state()

    def keep(self, written: list[Any]) -> None:
        """Remember memory that is about to be written: a capture changes nothing."""
        for tensor in _tensors(written):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._before:
                self._before[storage.data_ptr()] = storage, storage.clone()

    def record(self, func: Any, args: list[Any], kwargs: dict[str, Any], made: list[Tensor]) -> None:
        self._steps.append((func, args, kwargs, made))

    def end(self) -> None:
        for storage, kept in self._before.values():
            storage.copy_(kept)
        for generator, state in self.generators.items():
            generator.set_state(state)

    def replay(self) -> None:
        for func, args, kwargs, made in self._steps:
            again = func(*args, **kwargs)
            for kept, new in zip(made, _tensors(again), strict=False):
                kept.copy_(new)

    def pool(self) -> tuple[int, int]:
        return (0, 0)


@contextmanager
def _captured(graph: Graph, **_: Any) -> Iterator[None]:
    watch.capture = graph
    try:
        yield
    finally:
        watch.capture = None
        graph.end()


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, _name: str) -> Callable[..., Any]:
        return lambda *_, **__: None


def _synchronize(*_: Any) -> None:
    if watch.strict:
        raise NotOnGpuError("synchronize makes the host wait for the device")


def _module() -> types.ModuleType:
    module = types.ModuleType(f"torch.{NAME}")
    for name, answer in (
        ("is_available", True),
        ("is_initialized", True),
        ("_is_in_bad_fork", False),
        ("device_count", 1),
        ("current_device", 0),
        ("get_amp_supported_dtype", [torch.bfloat16, torch.float16]),
    ):
        setattr(module, name, lambda answer=answer: answer)
    module.manual_seed_all = lambda _seed: None
    return module


def _factories() -> Iterator[tuple[str, Any]]:
    """Operations that make a tensor on a device they are told."""
    for full in torch._C._dispatch_get_all_op_names():
        name, _, overload = full.removeprefix("aten::").partition(".")
        if not full.startswith("aten::") or torch._C._dispatch_has_kernel_for_dispatch_key(
            full, "CompositeImplicitAutograd"
        ):
            continue
        try:
            op = getattr(getattr(aten, name), overload or "default")
        except AttributeError:
            continue
        arguments, returns = op._schema.arguments, op._schema.returns
        takes = {a.name for a in arguments if "Tensor" not in str(a.type)}
        if "device" in takes and len(takes) == len(arguments) and [str(r.type) for r in returns] == ["Tensor"]:
            yield full.removeprefix("aten::"), op


def _casts() -> Iterator[tuple[str, Any, str]]:
    """CUDA's own lists for autocast, from the headers of the torch that is installed: operation and kind of cast."""
    header = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
    text = header.read_text(encoding="utf-8").replace("\\\n", " ")
    for kind, body in re.findall(
        r"#define AT_FORALL_(LOWER_PRECISION_FP|FP32|FP32_SET_OPT_DTYPE|PROMOTE)\(_\)(.*)", text
    ):
        for name, overload in re.findall(r"\b_\((\w+)(?:, *(\w+))?\)", body):
            yield f"{name}.{overload}".removesuffix("."), getattr(getattr(aten, name), overload or "default"), kind


def _autocast_kernel(op: Any, kind: str) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        def cast(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)([cast(v) for v in value])
            if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
                return value.to(dtype)
            return value

        dtype = torch.float32
        if kind == "LOWER_PRECISION_FP" or (
            kind == "PROMOTE" and all(t.dtype != torch.float32 for t in _tensors([*args, *kwargs.values()]))
        ):
            dtype = torch.get_autocast_dtype(NAME)
        with torch.autocast(NAME, enabled=False):
            return op(*cast(args), **{name: cast(v) for name, v in kwargs.items()})

    return kernel


_libraries: list[torch.library.Library] = []


def install() -> torch.device:
    """Make the device known to this process, which cannot forget it: use its own process."""
    global _DEVICE
    _setup_privateuseone_for_python_backend(NAME, backend_module=_module())
    _DEVICE = torch.device(NAME, 0)
    _foreach_utils._foreach_supported_types.append(DeviceTensor)
    library, everything = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    _libraries.extend((library, everything))
    for name, op in _factories():
        library.impl(name, lambda *args, op=op, **kwargs: watch.run(op, args, kwargs), KEY)
    # torch.tensor(data, device=...) comes here directly
    library.impl("_copy_from", lambda source, target, _=False: watch.run(aten.copy_.default, (target, source), {}), KEY)
    everything.fallback(torch.library.fallthrough_kernel, f"Autocast{KEY}")
    for name, op, kind in _casts():
        library.impl(name, _autocast_kernel(op, kind), f"Autocast{KEY}")
    torch.Generator = _AnyGenerator
    torch.autograd.set_multithreading_enabled(False)
    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, _captured
    torch.cuda.Stream = torch.cuda.Event = _Stream
    torch.cuda.current_stream, torch.cuda.stream = lambda *_: _Stream(), lambda _stream: nullcontext()
    torch.cuda.synchronize, torch.cuda.current_device = _synchronize, lambda: 0
    torch.cuda.default_generators = (DeviceGenerator(),)
    return _DEVICE
