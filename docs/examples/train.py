import numpy as np
from mebm import Monitor  # 1

with Monitor(iterations=400, sampling_steps=5, step_size=0.1, seed=0) as run:  # 2: its parameters and their defaults
    w = run.restore(w=np.zeros(4))["w"]  # 3: the arrays of the checkpoint; those given when fresh
    run.metric("error", "minimize")  # 4: what the search improves
    for i in range(run.iteration, run.args.iterations):
        rng = np.random.default_rng((run.seed, i))
        data, samples = rng.normal(1, 1, (16, 4)), rng.normal(w, 1, (16, 4))
        for _ in range(run.args.sampling_steps):
            samples -= run.args.step_size * (samples - w)
        w += 0.05 * (data.mean(0) - w)
        if run.step(i, ((data - w) ** 2).mean(1), ((samples - w) ** 2).mean(1)):  # 5: True: leave; see run.stopping
            break
        if i % 100 == 99:
            run.epoch(error=((w - 1) ** 2).sum(), save={"w": w})  # 6: scores, a checkpoint
