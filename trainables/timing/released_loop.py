"""The released training loop of M-EBM and M-JEM as its authors run it: what the benchmark is measured against.

As sndnyang/mebm train_maebm.py at e3d2d34: the replay buffer in host memory, restart images drawn one by one, two
data loaders with worker processes, the loss read at every iteration, contiguous float32, PyTorch's default arithmetic,
no fused optimiser. The maths is the package's own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.utils.data import DataLoader, Dataset

from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.sampling.gaussians import Gaussian
from trainables.sampling.initial import build_initial
from trainables.training.build import build_model
from trainables.training.objective import learning_rate

METHODS = ("m-ebm", "m-jem")
"""Methods that the released script trains."""
LOADER_WORKERS = 4
"""Worker processes of each of its loaders."""


class _Pictures(Dataset[tuple[Tensor, int]]):
    """Images as torchvision's CIFAR gives them: arrays, turned into pictures and then into tensors."""

    def __init__(self, data: ImageData, transform: Any) -> None:
        images = data.images.cpu().permute(0, 2, 3, 1).numpy()
        self.images = images[..., 0] if images.shape[3] == 1 else images
        self.labels, self.transform = data.labels.cpu().tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(np.ascontiguousarray(self.images[index]))), self.labels[index]


def _cycle(loader: DataLoader[tuple[Tensor, int]]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def _quiet_worker(_worker: int) -> None:
    """Keep a loader's process from printing a traceback where the loop is interrupted while it takes over a batch."""
    sys.excepthook = lambda *_: None


class ReleasedLoop:
    """M-EBM or M-JEM as the released script trains it, in its own precision and layout; 0 `workers`: none."""

    def __init__(
        self, config: TrialConfig, data: ImageData, device: torch.device, workers: int = LOADER_WORKERS
    ) -> None:
        if config.method not in METHODS:
            raise ValueError(f"the released script trains {' and '.join(METHODS)}, not {config.method}")
        from torchvision import transforms as T

        self.config, self.device, self.iteration = config, device, 0
        self.model: nn.Module = build_model(config, data.shape, data.classes, config.seed).to(device)
        self.optimiser = torch.optim.SGD(
            self.model.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            foreach=False,
        )
        scale = [T.ToTensor(), T.Normalize((0.5,) * data.shape[0], (0.5,) * data.shape[0])]
        side = data.shape[1]
        crop: list[Any] = []
        if config.augment == "crop_flip":
            crop = [T.Pad(4, padding_mode="reflect"), T.RandomCrop(side), T.RandomHorizontalFlip()]
        self._energy_batches = _cycle(self._loader(data, T.Compose(scale), config.batch_size, workers))
        self._label_batches = _cycle(self._loader(data, T.Compose([*crop, *scale]), config.label_batch_size, workers))
        self._shape = data.shape
        # How p0 is fitted and the buffer filled is not timed, so the package's own serves; how restarts are drawn is.
        initial: Any = build_initial(
            config.initial, data.to(device), config.covariance_jitter, arguments=config.initial_args
        )
        gaussian = isinstance(initial, Gaussian)
        self._start = MultivariateNormal(initial.mean, scale_tril=initial.factor) if gaussian else None
        self.buffer = initial.sample(config.buffer_size, torch.Generator(device).manual_seed(config.seed)).cpu()

    def _loader(self, data: ImageData, transform: Any, batch: int, workers: int) -> DataLoader[tuple[Tensor, int]]:
        return DataLoader(
            _Pictures(data, transform),
            batch_size=batch,
            shuffle=True,
            num_workers=workers,
            drop_last=True,
            persistent_workers=workers > 0,
            worker_init_fn=_quiet_worker,
        )

    def _random(self, count: int) -> Tensor:
        images = torch.zeros(count, *self._shape)
        for i in range(count):
            if self._start is None:
                images[i] = torch.empty(self._shape).uniform_(-1, 1)
            else:
                images[i] = self._start.sample().view(self._shape)
        return images.clamp_(-1, 1)

    def _start_states(self) -> tuple[Tensor, Tensor]:
        c = self.config
        index = torch.randint(0, c.buffer_size, (c.batch_size,))
        kept, fresh = self.buffer[index], self._random(c.batch_size)
        restart = (torch.rand(c.batch_size) < c.reinit_probability).float()[:, None, None, None]
        return (restart * fresh + (1 - restart) * kept).to(self.device), index

    def _sample(self) -> Tensor:
        c = self.config
        x, index = self._start_states()
        x = x.requires_grad_()
        for _ in range(c.sampling_steps):
            gradient = torch.autograd.grad(-self.model(x).sum(), [x])[0]
            if c.gradient_clamp is not None:
                gradient = gradient.clamp(-c.gradient_clamp, c.gradient_clamp)
            x.data += c.step_size * gradient
            if c.noise_std > 0:
                x.data += c.noise_std * torch.randn_like(x)
            x.data.clamp_(-1, 1)
        samples = x.detach()
        self.buffer[index] = samples.cpu()
        return samples

    def step(self) -> float:
        """One iteration; returns its loss, which the host has waited for."""
        c = self.config
        rate = learning_rate(
            self.iteration,
            0,
            base=c.learning_rate,
            warmup_iterations=c.warmup_iterations,
            decay_epochs=(),
            factor=c.decay_factor,
        )
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.model.train()
        # Its label loader sets the pace for M-EBM too, which does not use the images.
        labelled, labels = next(self._label_batches)
        x = next(self._energy_batches)[0].to(self.device)
        positive = self.model(x)
        samples = self._sample()
        negative = self.model(samples)
        loss = positive.mean() - negative.mean()
        if c.l2_weight > 0:
            loss = loss + c.l2_weight * ((positive**2).mean() + negative.mean() ** 2)
        if loss.abs().item() > c.divergence.loss_limit:
            raise ArithmeticError("the loss is beyond the released limit")
        if c.classifies:
            logits = self.model.logits(labelled.to(self.device))  # type: ignore[operator]
            loss = loss + F.cross_entropy(logits, labels.to(self.device))
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.iteration += 1
        return float(loss.item())

    def close(self) -> None:
        """End the loaders' worker processes."""
        self._energy_batches.close()  # type: ignore[attr-defined]
        self._label_batches.close()  # type: ignore[attr-defined]
