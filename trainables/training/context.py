"""`Context`: what a method's hooks see of an iteration, and everything that a run is. The order is `iteration`'s."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainables.config.arguments import is_own as is_own_part
from trainables.config.trial import MAX_UNFILLED, TrialConfig
from trainables.data.datasets import ImageData
from trainables.data.pixels import RANGES
from trainables.data.subset import subset, training_images
from trainables.networks.arithmetic import set_precision
from trainables.networks.energy_model import EnergyModel
from trainables.networks.layers import FrozenWeights
from trainables.results.schema import SIGNAL_NAMES
from trainables.sampling.initial import Initial, build_initial
from trainables.sampling.langevin import Energy, Langevin
from trainables.sampling.replay import ReplayBuffer, build_buffer
from trainables.training.build import Make, check_images
from trainables.training.cost import check_fits
from trainables.training.detector import DivergenceLatch
from trainables.training.device import derive_seed, random_state, resolve_device, set_random_state
from trainables.training.execution import (
    Branch,
    Passes,
    autocast,
    copies_dtype,
    layout_of,
    not_branched,
    resolve_execution,
    side_stream,
    within,
)
from trainables.training.hooks import HookError, energies, images, is_own, of_kind, place
from trainables.training.method import Batch, Method, Outputs, Progress, Stream, Variant
from trainables.training.network import TrainedNetwork
from trainables.training.objective import sampler_term
from trainables.training.streams import Streams

NEIGHBOURS = 100
"""KL-EBM's entropy term compares with this many buffer samples (improved_contrastive_divergence train.py:423-455)."""
PURPOSES = ("data", "labels", "augment", "chains", "noise", "input", "dropout")
"""Streams of random numbers, one per purpose: a change of one does not shift the others."""
T = TypeVar("T")


@dataclass
class Found:
    """What an iteration has found so far: energies of x+ and x-, signals, the generative loss, what else went back."""

    energies: dict[str, Tensor] = field(default_factory=dict)
    scalars: dict[str, Tensor] = field(default_factory=dict)
    loss: Tensor | None = None
    rest: Tensor | None = None


class Context:
    """What a method's hooks see.

    Args:
        trial: the run.
        data: its images, before `train_images` and `validation_images`; read with `load_dataset` where not given.

    Attributes:
        networks: what is trained, by name.
        initial: p0, where x- comes from chains.
        buffer: replay buffer of the chains; None for a method without.
        chain: the sampler's settings.
        variant: the form of the iteration under way.
        execution: how iterations are issued; `remarks` has a line for each thing asked for that cannot be done.
        last_samples: x- of the newest iteration, float (batch_size, C, H, W) in [-1, 1]; None before the first.
    """

    def __init__(self, trial: TrialConfig, data: ImageData | None = None) -> None:
        self.trial = c = trial
        self.method = cast("Method", c.method_args)
        self.device = resolve_device(c.device)
        self.data_set = (training_images(c) if data is None else subset(data, c)).to(self.device)
        check_images(c, self.data_set)
        set_precision(c.precision, cudnn_benchmark=c.cudnn_benchmark)
        self.execution = resolve_execution(c, self.device)
        self.remarks = [self.execution.remark] if self.execution.remark else []
        self.generators = {
            purpose: torch.Generator(self.device).manual_seed(derive_seed(c.seed, purpose))
            for purpose in (*PURPOSES, *self.method.purposes)
        }
        self.pixels = RANGES[c.pixel_range]
        self.layout = layout_of(c)
        check_fits(c, self.data_set.shape, self.data_set.classes, self.device)
        if self._own_energy and c.inner_steps > 1:
            raise ValueError(f"inner_steps > 1 descends the network's energy, and {c.method} has its own")
        if c.sam_rho > 0 and type(self.method).update is not Method.update:
            raise ValueError(f"sam_rho must be 0 for {c.method}, which takes its gradients in its own way")
        found = self.method.networks(Make(self))
        self.networks = of_kind(found, dict, self.method, "networks", TrainedNetwork)
        if "energy" not in found:
            raise HookError(f"{place(self.method, 'networks')} has no 'energy': begin with super().networks(make)")
        self._gate()
        self._nets: dict[str, Any] = {name: trained.network for name, trained in self.networks.items()}
        own = any(is_own_part(part, name) for part, name in (("network", c.network), ("optimiser", c.optimiser)))
        self._own_random = own or (c.chains and is_own_part("initial", c.initial))
        if self._own_random:  # somebody's code may draw without a generator
            torch.manual_seed(derive_seed(c.seed, "own parts"))
        self._nets["energy"] = self.passes = Passes(self.model, compiled=self.execution.compiled, refused=self.refused)
        self._frozen: dict[str, FrozenWeights] = {}
        self.initial: Initial | None = None
        self.buffer: ReplayBuffer | None = None
        if c.chains:
            self.initial = build_initial(
                c.initial, self.data_set, c.covariance_jitter, rank=c.initial_rank, arguments=c.initial_args
            )
            self.buffer = build_buffer(c, self.initial, self.generators["chains"])
        self.chain = Langevin.of(c)
        self.streams = Streams(self.data_set, self.generators, self.pixels, self.layout)
        self.streams.match(of_kind(self.method.streams(c), Mapping, self.method, "streams", Stream))
        self.last_samples: Tensor | None = None
        weight = c.l2_weight if "l2" in self.method.uses else 0.0
        self.latch = DivergenceLatch(c.divergence, weight / self.method.trivial_optimum(), self.device)
        self.variant = Variant()
        self.entered: list[str] = []
        # What the host tells an iteration; the memory stays, because a captured graph reads it from where it is.
        self.number = torch.zeros((), dtype=torch.int64, device=self.device)
        self._inputs: dict[str, Tensor] = {}
        self.signals = torch.zeros(len(SIGNAL_NAMES), device=self.device)
        self._memo: dict[str, Any] = {}
        self._found = Found()
        self.branch: Branch | None = None
        if c.parallel_branches:
            if reason := not_branched(c):
                self.remarks.append(f"no parallel branches: {reason}")
            else:
                self.branch = Branch(self.model, side_stream("branch") if self.execution.graphed else None)

    def _gate(self) -> None:
        """Say which optimisers are gated by copy and select. A CUDA graph is only for those that were made for one."""
        gated = {name: type(n.optimiser).__name__ for name, n in self.networks.items() if n.gated}
        for name, kind in gated.items():
            self.remarks.append(f"{kind} ({name}) takes no found_inf: its steps are gated by copy and select, slower")
        if gated and self.execution.graphed:
            self.execution = replace(self.execution, graphed=False)
            self.remarks.append(f"no CUDA graph: {', '.join(gated.values())} is not made for one")
            self.model.trunk.speed = replace(self.model.trunk.speed, fused_norm=False)

    @property
    def refused(self) -> Callable[[str], None] | None:
        """Told why the compiler does not take a user's network; None for ours, where that is a bug."""
        return self._without_compiler if is_own_part("network", self.trial.network) else None

    def _without_compiler(self, remark: str) -> None:
        self.execution = replace(self.execution, compiled=False)
        if remark not in self.remarks:
            self.remarks.append(remark)

    @cached_property
    def _own(self) -> bool:
        """Whether the method is a user's own."""
        return is_own(self.method)

    @cached_property
    def _own_energy(self) -> bool:
        """Whether the method says what the energy of an image is."""
        return type(self.method).energy is not Method.energy

    @property
    def model(self) -> EnergyModel:
        """The network that has the energy and the class logits."""
        return cast("EnergyModel", self.networks["energy"].network)

    def autocast(self) -> AbstractContextManager[Any]:
        """The run's precision."""
        return autocast(self.trial.precision, self.device)

    def network(self, name: str = "energy") -> nn.Module:
        """A network of the method's."""
        return self.networks[name].network

    def random(self, purpose: str) -> torch.Generator:
        """The stream of random numbers of a purpose."""
        return self.generators[purpose]

    def once(self, key: str, make: Callable[[], T]) -> T:
        """A value that is made once an iteration, also where an update rule runs the gradients twice."""
        if key not in self._memo:
            self._memo[key] = make()
        return cast("T", self._memo[key])

    def batch(self, stream: str) -> Batch:
        """The batch of a stream."""
        return self.once(f"batch {stream}", partial(self.streams.batch, stream))

    def data(self) -> Batch:
        """x+; it asks for a gradient where there is a penalty on it."""

        def make() -> Batch:
            batch = self._images(self.method.data(self), "data")
            batch.x.requires_grad_(self.trial.gradient_penalty > 0)
            return batch

        return self.once("data", make)

    def samples(self) -> Batch:
        """x-, which the buffer then has; what runs beside the chains is waited for."""

        def make() -> Batch:
            batch = self._images(self.method.sample(self), "sample")
            if batch.kept and batch.slots is not None and self.buffer is not None:
                self.buffer.write(batch.slots, batch.x)
            if self.branch is not None:
                self.branch.join(self.trial.sampling_steps)
            self.last_samples = self._enlarged(self.pixels.to_signed(batch.x))
            self.signal("clamped_pixel_share", self.pixels.edge_share(batch.x))
            return batch

        return self.once("samples", make)

    def _enlarged(self, x: Tensor) -> Tensor:
        """Images at the data's side, also those of a method that begins with smaller ones."""
        side = self.data_set.shape[-1]
        return x if x.shape[-1] == side else F.interpolate(x, size=self.data_set.shape[1:], mode="nearest")

    def _images(self, found: Batch | Tensor, hook: str) -> Batch:
        """What a hook gave as a batch; a plain tensor stands for the ends of this iteration's chains."""
        if not self._own:
            return cast("Batch", found)
        batch = found if isinstance(found, Batch) else None
        x = images(found if batch is None else batch.x, self.data_set.shape, self.method, hook).detach()
        if batch is not None:
            return replace(batch, x=x)
        start = cast("Batch | None", self._memo.get("chains")) if hook == "sample" else None
        return Batch(x, kept=False) if start is None or len(start.x) != len(x) else replace(start, x=x)

    def chains(self) -> Batch:
        """Where this iteration's chains start: states of the buffer, some of them new, or p0."""

        def make() -> Batch:
            count = self.trial.batch_size
            if self.buffer is not None:
                slots, start = self.buffer.draw(count)
                return Batch(start, slots=slots)
            if self.initial is None:
                raise RuntimeError(f"{self.trial.method} has no p0")
            return Batch(self.pixels.from_signed(self.initial.sample(count, self.generators["chains"])))

        return self.once("chains", make)

    def langevin(
        self,
        start: Batch,
        *,
        steps: int | None = None,
        network: str = "energy",
        potential: Callable[[Tensor], Tensor] | None = None,
        random: torch.Generator | None = None,
        **changes: Any,
    ) -> Batch:
        """Chains of the trial's sampler, or of one with `changes` (`Langevin`), from `start` to their ends.

        Args:
            steps: K; None: the trial's.
            network: whose energy they descend; `potential`, (N, C, H, W) to (N,), is added to it.
            random: source of the noise; None: the run's.
        """
        c, net, module = self.trial, self._nets[network], self.networks[network].network
        chain = replace(self.chain, **changes) if changes else self.chain
        energy, cut = self._energy_of(net, start.cond), None
        if chain.inner_steps > 1:
            cut = within(self.autocast, net.stem), within(self.autocast, net.energy_from_stem)
        if c.sampler_norm_mode == "eval":
            module.eval()
        x, generator = start.x.contiguous(memory_format=self.layout), random or self.generators["noise"]
        descended = energy if potential is None else lambda x: energy(x) + potential(x)
        with self.constant(network):
            ends, point = chain.run_keeping(descended, x, steps or c.sampling_steps, generator, cut)
        module.train()
        return replace(start, x=ends, point=point)

    def constant(self, network: str = "energy") -> AbstractContextManager[None]:
        """A block in which a network's parameters are constants."""
        if network not in self._frozen:
            self._frozen[network] = FrozenWeights(self.networks[network].network, copies_dtype(self.trial))
        return self._frozen[network].hold()

    def _energy_of(self, net: Any, cond: tuple[Tensor, ...]) -> Energy:
        if not (self._own and self._own_energy):
            return within(self.autocast, lambda x: self.method.energy(net, x, *cond))
        return within(self.autocast, lambda x: energies(self.method.energy(net, x, *cond), x, self.method))

    def energy(self, x: Tensor, *cond: Tensor, network: str = "energy") -> Tensor:
        """E(x), (N,), with a graph to x alone: its parameters are constants."""
        with self.constant(network):
            return self._energy_of(self._nets[network], cond)(x)

    def value(self, x: Tensor, *cond: Tensor, network: str = "energy") -> Tensor:
        """E(x), (N,), without a graph."""
        with torch.no_grad():
            return self._energy_of(self._nets[network], cond)(x)

    def outputs(self, batch: Batch, *, twice: bool = False) -> Outputs:
        """What losses see of a batch; `twice`: with second derivatives, which compiled passes do not have."""
        with self.autocast():
            found = self.method.outputs(self.model if twice else self.passes, batch)
        if self._own:
            of_kind(found, Outputs, self.method, "outputs")
            if self._own_energy:
                energies(found.terms, batch.x, self.method)
        return found

    def logits(self, batch: Batch) -> Tensor:
        """Class logits of a batch."""
        with self.autocast():
            return self.passes.logits(batch.x)

    def data_outputs(self, *, twice: bool = False) -> Outputs:
        """`outputs` of x+, whose energies are signals."""
        out = self.outputs(self.data(), twice=twice)
        self._found.energies["data"] = out.terms.detach()
        return out

    def sample_outputs(self, samples: Batch) -> Outputs:
        """`outputs` of x-, likewise."""
        out = self.outputs(samples)
        self._found.energies["samples"] = out.terms.detach()
        return out

    def joint_terms(self) -> tuple[Tensor, Tensor]:
        """Energies of x+ and x- of one forward; x- are drawn first."""
        samples, data = self.samples(), self.data()
        e_data, e_samples = self.outputs(replace(data, x=torch.cat([data.x, samples.x]))).terms.split(
            [len(data.x), len(samples.x)]
        )
        self._found.energies |= {"data": e_data.detach(), "samples": e_samples.detach()}
        return e_data, e_samples

    def backward(
        self, loss: Tensor | None, extra: Tensor | None = None, *, then: Callable[[], Tensor | None] | None = None
    ) -> None:
        """Propagate a part of the generative loss back, and add it to the signals.

        Args:
            extra: no part of the loss; propagated with it.
            then: called after; what it returns belongs to the loss and has been propagated.
        """
        total = loss if extra is None else extra if loss is None else loss + extra
        assert total is not None
        total.backward()
        found, part = self._found, None if loss is None else loss.detach()
        if then is not None and (more := then()) is not None:
            part = _sum(part, more)
        if part is not None:
            found.loss = _sum(found.loss, part)
        if extra is not None:
            found.rest = _sum(found.rest, extra.detach())

    def through_sampler(self, samples: Batch) -> Tensor | None:
        """KL-EBM's terms, propagated back: the loss through the chains' last step. None where they are off."""
        c = self.trial
        if samples.point is None or not (c.kl_weight > 0 or c.entropy_weight > 0):
            return None
        neighbours = None
        if self.buffer is not None and self.buffer.filled > MAX_UNFILLED:
            neighbours = self.once("neighbours", partial(self.buffer.compare, NEIGHBOURS))

        # A compiled pass has no second derivative, and would write running statistics in a way that spoils the graph of
        # the last step.
        moved = self.chain.differentiable_step(self._energy_of(self.model, samples.cond), samples.point)
        return sampler_term(
            lambda x: self.outputs(replace(samples, x=x), twice=True).terms,
            moved,
            neighbours,
            kl_weight=c.kl_weight,
            entropy_weight=c.entropy_weight,
        )

    def in_order(self, *passes: Callable[[Context], None]) -> None:
        """x+, x- and labels one after another; or x+ and labels beside x-, where the trial wants that."""
        positive, negative, labelled = passes
        branch = self.branch
        if branch is None:
            for run in passes:
                run(self)
            return
        with branch.fork():
            with branch.data():
                positive(self)
            if "labels" in self.streams:
                with branch.labels():
                    labelled(self)
        negative(self)
        if "labels" in self.streams:
            branch.add_labels()

    def step(self, name: str, gradients: Callable[[], Tensor]) -> None:
        """A step of another network, which a verdict or a value that is not finite stops.

        `gradients` leaves gradients in the network's parameters and returns its loss.
        """
        trained = self.networks[name]
        trained.zero_grad()
        loss = gradients().detach()
        norm = trained.gradient_norm()
        # The loss as well: where it is linear in a value that is not finite, its slope is finite all the same.
        bad = ~(torch.isfinite(norm) & torch.isfinite(loss))
        trained.step(torch.maximum(self.latch.tripped, bad.to(torch.float32)), norm)
        if trained.watched:
            self.latch.update_companion(self.number, loss=loss, grad=norm)

    def input(self, name: str) -> Tensor:
        """A scalar that the host tells (`Method.inputs`): float32, on the device."""
        return self._inputs[name]

    def tell(self, at: Progress) -> None:
        """Write what the host knows, before an iteration is issued."""
        self.number.fill_(at.iteration)
        for name, value in of_kind(self.method.inputs(at), Mapping, self.method, "inputs").items():
            if name not in self._inputs:
                self._inputs[name] = torch.zeros((), device=self.device)
            self._inputs[name].fill_(value)

    def signal(self, name: str, value: Tensor) -> None:
        """Record a scalar of this iteration (`schema.SIGNALS`)."""
        self._found.scalars[name] = value.detach()

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Inside, nothing counts as a signal."""
        found, self._found = self._found, Found()
        try:
            yield
        finally:
            self._found = found

    def begin(self, variant: Variant) -> None:
        """Forget the last iteration."""
        self.variant = variant
        self._memo.clear()
        self._found = Found()
        for trained in self.networks.values():
            trained.network.train()

    @torch.no_grad()
    def judge(self, norm: Tensor) -> None:
        """Write the signals of this iteration and show them to the latch; `norm` is the main gradient's."""
        found, zero = self._found, torch.zeros((), device=self.device)
        energies = [found.energies.get(name) for name in ("data", "samples")]
        data_mean, sample_mean = (zero if e is None else e.mean() for e in energies)
        sizes = [e.abs().max() for e in energies if e is not None]
        largest = zero if not sizes else sizes[0] if len(sizes) == 1 else torch.maximum(*sizes)
        gap, loss = data_mean - sample_mean, zero if found.loss is None else found.loss
        clamped, cross_entropy = (found.scalars.get(n, zero) for n in ("clamped_pixel_share", "cross_entropy"))
        self.signals.copy_(torch.stack((data_mean, sample_mean, gap, loss, largest, norm, clamped, cross_entropy)))
        total = loss if found.rest is None else loss + found.rest
        self.latch.update(self.number, loss=loss, total=total, gap=gap, energy_max=largest, grad=norm)

    def state_dict(self) -> dict[str, Any]:
        """Everything that goes on from one iteration to the next; live tensors."""
        return {
            "networks": {name: trained.state_dict() for name, trained in self.networks.items()},
            "buffer": None if self.buffer is None else self.buffer.state_dict(),
            "streams": self.streams.state_dict(),
            "latch": self.latch.state_dict(),
            "generators": {name: g.get_state() for name, g in self.generators.items()},
            "entered": list(self.entered),
            "shape": list(self.data_set.shape),
            **({"own_random": random_state(self.device)} if self._own_random else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        for name, trained in self.networks.items():
            trained.load_state_dict(state["networks"][name])
        if self.buffer is not None:
            self.buffer.load_state_dict(state["buffer"])
        self.streams.load_state_dict(state["streams"])
        self.latch.load_state_dict(state["latch"])
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][name].cpu())
        self.entered = list(state["entered"])
        if "own_random" in state:
            set_random_state(self.device, state["own_random"])

    def close(self) -> None:
        """Drop everything that takes memory; the context is of no use afterwards."""
        self.__dict__.clear()


def _sum(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else old + new
