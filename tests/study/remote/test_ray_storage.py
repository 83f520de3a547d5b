"""Ray's checkpoints in a store: written by its workers, found by name, brought to another worker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainables.results.store import Store, join

pytestmark = pytest.mark.ray


def test_ray_writes_checkpoints_to_the_store_and_a_worker_goes_on_from_one(ray_cluster, s3, tmp_path):
    from ray import tune

    class Counter(tune.Trainable):
        def setup(self, config):
            self.count = 0
            if config.get("resume_from"):
                folder = Path(config["scratch"]) / "checkpoint"
                Store(config["store"]).get_folder(config["resume_from"], folder)
                self.load_checkpoint(str(folder))

        def step(self):
            self.count += 1
            return {"count": self.count, "should_checkpoint": True}

        def save_checkpoint(self, checkpoint_dir):
            (Path(checkpoint_dir) / "state.json").write_text(json.dumps(self.count))

        def load_checkpoint(self, checkpoint):
            self.count = json.loads((Path(checkpoint) / "state.json").read_text())

    # Ray may have been started before there were credentials in the environment, so here they are in the URL.
    url = join(s3.bucket().replace("s3://", "s3://an-access-key:a-secret-key@"), "demo")
    store = Store(url)

    def run(name, config, stop):
        path, filesystem = f"{store.root}/tune", Store(url).filesystem
        return tune.Tuner(
            tune.with_resources(Counter, {"cpu": 1}),
            param_space=config,
            run_config=tune.RunConfig(
                name=name, storage_path=path, storage_filesystem=filesystem, stop={"count": stop}, verbose=0,
                checkpoint_config=tune.CheckpointConfig(num_to_keep=2, checkpoint_at_end=False),
            ),
            tune_config=tune.TuneConfig(trial_dirname_creator=lambda _trial: "t0001"),
        ).fit()[0]  # fmt: skip

    checkpoint = run("run-001", {}, 3).checkpoint
    assert checkpoint is not None
    name = store.name_of(checkpoint.path)
    assert name is not None and name.startswith("tune/run-001/t0001/checkpoint_")
    assert store.folders("tune") == ("run-001",)
    kept = {each.split("/")[3] for each in store.list("tune/run-001/t0001") if "checkpoint_" in each}
    assert len(kept) == 2  # Ray deletes the older ones in the store too
    again = run("run-002", {"store": url, "resume_from": name, "scratch": str(tmp_path)}, 4)
    assert again.metrics["count"] == 4 and again.metrics["training_iteration"] == 1
    store.delete(name)
    assert not store.exists(name)
