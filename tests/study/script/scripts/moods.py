"""Misbehaves as its argument says."""

import os
import signal
import subprocess
import sys
import time

from mebm import Monitor


def main(run):
    mood = run.args.mood
    run.metric("fid", "minimize")
    for i in range(8):
        gap = 0.5 + 0.01 * (i % 3)
        if i == 5 and mood == "error":
            raise ValueError("shapes differ")
        if i == 5 and mood == "exit":
            sys.exit(3)
        if i == 5 and mood == "abort":
            os.abort()
        if i == 5 and mood == "vanish":
            os._exit(0)
        if i == 5 and mood == "back":
            run.step(2, gap, 0.1)
        if i == 5 and mood == "shape":
            import numpy as np

            run.step(i, np.zeros((8, 2)), 0.1)
        if i == 5 and mood == "text":
            run.step(i, "0.5", object())
        if i == 5 and mood == "fork" and os.fork() == 0:
            run.step(i, gap, 0.1)
        if i == 5 and mood == "second":
            Monitor(mood="second", iterations=1).__enter__()
        if i == 3 and mood == "children":
            subprocess.Popen(["sleep", "1234.5"], start_new_session=True)
        if mood == "chatty":
            (sys.stderr if i % 2 else sys.stdout).write("x" * 1000 * 1000 + "\n")
        if mood == "bar":
            sys.stdout.write(f"{i}/8\r")
        if mood == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        bad = i >= 4 and mood in ("nan", "deaf")
        stop = run.step(i, float("nan") if bad else gap, 0.1, 0.2)
        while stop and mood == "deaf":
            time.sleep(0.1)
        if stop:
            break
        if i % 4 == 3:
            run.epoch(fid=float("inf") if mood == "inf" else 40.0 - i)


with Monitor(mood="calm", iterations=8) as run:
    if run.args.mood == "silent":
        os._exit(0)
    main(run)
