"""An energy |x - w|^2 / 2 and persistent Langevin chains in NumPy: unstable where the step size is above 2."""

import time

import numpy as np

from mebm import Monitor

with Monitor(iterations=60, sampling_steps=5, step_size=0.1, seed=0, pause=0.0) as run:
    run.metric("error", "minimize", unit="px")
    state = run.restore(w=np.zeros(4), samples=np.zeros((16, 4)))
    w, samples = state["w"], state["samples"]
    for i in range(run.iteration, run.args.iterations):
        rng = np.random.default_rng((run.seed, i))
        data = rng.normal(1, 1, (16, 4))
        for _ in range(run.args.sampling_steps):
            samples -= run.args.step_size * (samples - w) + 0.1 * rng.normal(size=(16, 4))
        w += 0.05 * (data.mean(0) - w)
        time.sleep(run.args.pause)
        if run.step(i, ((data - w) ** 2).mean(1), ((samples - w) ** 2).mean(1)):
            break
        if i % 20 == 19:
            run.epoch(error=((w - 1) ** 2).sum(), samples=np.zeros((4, 1, 4, 4)))
