"""The examples for clusters: the scripts run with stand-ins for SLURM, Ray and mebm; the manifest is taken apart."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from importlib import resources
from pathlib import Path

import pytest
import yaml

from study.config.packaged import packaged_configs

CLUSTER = Path(str(resources.files("configs") / "cluster"))
SCRIPTS = ("by_hand.sh", "slurm.sbatch")
WAIT = 60

STAND_INS = {
    # The nodes of the job; anything else is written down.
    "scontrol": """
        if [ "$1 $2" = "show hostnames" ]; then printf '%s\\n' $NODES; else echo "scontrol $*" >> "$LOG"; fi
    """,
    # Runs its command in its own place, so that the end of a step is the end of what runs in it.
    "srun": """
        echo "srun $*" >> "$LOG"
        while [ "${1#-}" != "$1" ]; do case $1 in --nodelist=*) node=${1#*=} ;; esac; shift; done
        export NODE=$node
        exec "$@"
    """,
    # A node that is down never joins; the status lists those that did, as Ray 2.60 does.
    "ray": """
        case $1 in
        start)
            echo "ray on ${NODE:-here}, token of ${#RAY_AUTH_TOKEN}, $RAY_AUTH_MODE: $*" >> "$LOG"
            case " $DOWN " in *" ${NODE:-here} "*) exit 1 ;; esac
            echo " 1 node_${NODE:-here}" >> "$UP"
            case " $* " in *" --block "*) echo $$ >> "$PIDS"; exec sleep 600 ;; esac
            ;;
        status)
            printf '======== Autoscaler status ========\\nNode status\\n-----\\nActive:\\n'
            cat "$UP"
            printf 'Pending:\\n (no pending nodes)\\nRecent failures:\\n 1 node_that_failed\\n\\nResources\\n'
            ;;
        *) echo "ray $*" >> "$LOG" ;;
        esac
    """,
    # With WORKS it trains until a signal comes; without it is done at once with the exit code CODE.
    "mebm": """
        echo "mebm $*" >> "$LOG"
        mkdir -p "$STUDY" && touch "$STUDY/study.yaml"
        [ -n "${WORKS:-}" ] || exit "${CODE:-0}"
        trap 'echo "mebm got USR1" >> "$LOG"; sleep 1; echo "mebm has saved" >> "$LOG"; exit 130' USR1
        trap 'echo "mebm got TERM" >> "$LOG"; exit 130' TERM
        echo "mebm works" >> "$LOG"
        while :; do sleep 0.1; done
    """,
}


class Sandbox:
    """A folder with the stand-ins and what they wrote down."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log, self.up, self.pids = folder / "log", folder / "up", folder / "pids"
        self.study = folder / "results" / "cifar10_stability"
        programs = folder / "bin"
        programs.mkdir()
        for name, body in STAND_INS.items():
            path = programs / name
            path.write_text(f"#!/usr/bin/env bash\n{body}", encoding="utf-8")
            path.chmod(0o755)
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(folder),
            "LOG": str(self.log),
            "UP": str(self.up),
            "PIDS": str(self.pids),
            "STUDY": str(self.study),
            "NODES": "n1 n2 n3",
            "DOWN": "",
            "RESULTS": str(folder / "results"),
            "HEAD_IP": "10.0.0.1",
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": "n[1-3]",
            "SLURM_CPUS_PER_TASK": "8",
        }
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        for file in (self.log, self.up, self.pids):
            file.write_text("")
        process = subprocess.Popen(
            ["bash", str(CLUSTER / script), *arguments],
            env={**self.environment, **environment},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def run(self, script: str, *arguments: str, **environment: str) -> tuple[int, str]:
        process = self.start(script, *arguments, **environment)
        output, _ = process.communicate(timeout=WAIT)
        return process.returncode, output

    def lines(self, prefix: str = "") -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith(prefix)]

    def wait_for(self, line: str, process: subprocess.Popen[str]) -> None:
        until = time.monotonic() + WAIT
        while line not in self.lines():
            if process.poll() is not None or time.monotonic() > until:
                pytest.fail(f"{line!r} was to come:\n{self.log.read_text()}\n{process.communicate(timeout=5)[0]}")
            time.sleep(0.05)

    def steps_left(self) -> list[int]:
        """Ray nodes that still run; they are given a moment to go."""
        until = time.monotonic() + 10
        left = [int(pid) for pid in self.pids.read_text().split()]
        while left and time.monotonic() < until:
            left = [pid for pid in left if _alive(pid)]
            time.sleep(0.05)
        return left


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def sandbox(tmp_path):
    made = Sandbox(tmp_path)
    yield made
    for process in made.processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


# ------------------------------------------------------------------------------------------------------ scripts


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_whole(script):
    subprocess.run(["bash", "-n", str(CLUSTER / script)], check=True)
    assert (CLUSTER / script).read_text().startswith("#!/usr/bin/env bash\n")
    assert os.access(CLUSTER / script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing(script):
    # Below a warning is that a function is called by a trap alone.
    command = ["shellcheck", "--shell=bash", "--severity=warning", str(CLUSTER / script)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_what_the_job_asks_slurm_for():
    lines = (CLUSTER / "slurm.sbatch").read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {"--signal=B:USR1@120", "--requeue", "--ntasks-per-node=1"} <= set(options)
    # SLURM reads no option after the first command.
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(i < first for i, line in enumerate(lines) if line.startswith("#SBATCH"))


def test_a_job_runs_a_study_on_all_its_nodes(sandbox):
    code, output = sandbox.run("slurm.sbatch", "cifar10_stability", "--set", "search.trials=60")
    assert code == 0, output
    address = "10.0.0.1:20077"
    assert sandbox.lines("mebm") == [
        f"mebm sweep cifar10_stability --results {sandbox.folder}/results --address {address} --set search.trials=60"
    ]
    assert sandbox.lines("scontrol") == []
    started = sandbox.lines("ray on ")
    assert len(started) == 3
    assert all("token of 64, token:" in line and "--num-cpus=8" in line for line in started)
    head, *workers = started
    assert head.startswith("ray on n1,")
    assert "--head --node-ip-address=10.0.0.1 --port=20077 --include-dashboard=false" in head
    assert sorted(line.split(",")[0] for line in workers) == ["ray on n2", "ray on n3"]
    assert all(f"--address={address}" in line and "--head" not in line for line in workers)
    assert len(sandbox.pids.read_text().split()) == 3
    assert sandbox.steps_left() == []


def test_usr1_lets_mebm_save_and_the_job_is_queued_again_and_resumes(sandbox):
    process = sandbox.start("slurm.sbatch", "cifar10_stability", WORKS="1")
    sandbox.wait_for("mebm works", process)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 130, output
    log = sandbox.lines()
    assert log[-3:] == ["mebm got USR1", "mebm has saved", "scontrol requeue 77"]
    assert sandbox.steps_left() == []

    code, output = sandbox.run(
        "slurm.sbatch", "cifar10_stability", "--set", "search.trials=60", SLURM_RESTART_COUNT="1"
    )
    assert code == 0, output
    assert sandbox.lines("mebm") == [f"mebm resume {sandbox.study} --address 10.0.0.1:20077"]
    assert sandbox.lines("scontrol") == []


def test_a_second_signal_while_mebm_saves_loses_nothing(sandbox):
    process = sandbox.start("slurm.sbatch", "cifar10_stability", WORKS="1")
    sandbox.wait_for("mebm works", process)
    process.send_signal(signal.SIGUSR1)
    sandbox.wait_for("mebm got USR1", process)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=WAIT)
    assert process.returncode == 130
    assert sandbox.lines()[-1] == "scontrol requeue 77"


def test_a_cancelled_job_is_not_queued_again(sandbox):
    process = sandbox.start("slurm.sbatch", "cifar10_stability", WORKS="1")
    sandbox.wait_for("mebm works", process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 130
    assert "mebm got TERM" in sandbox.lines()
    assert sandbox.lines("scontrol") == []
    assert "cancelled" in output
    assert sandbox.steps_left() == []


def test_a_signal_before_there_is_a_driver_queues_the_job_again(sandbox):
    process = sandbox.start("slurm.sbatch", "cifar10_stability", DOWN="n3", WORKS="1")
    until = time.monotonic() + WAIT
    while len(sandbox.lines("ray on ")) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 130, output
    assert sandbox.lines("mebm") == []
    assert sandbox.lines("scontrol") == ["scontrol requeue 77"]


@pytest.mark.parametrize("code", [0, 1, 2, 127])
def test_a_study_that_ended_is_not_queued_again(sandbox, code):
    assert sandbox.run("slurm.sbatch", "cifar10_stability", CODE=str(code))[0] == code
    assert sandbox.lines("scontrol") == []


def test_mebm_that_was_interrupted_by_itself_is_queued_again_so_many_times(sandbox):
    assert sandbox.run("slurm.sbatch", "cifar10_stability", CODE="130")[0] == 130
    assert sandbox.lines("scontrol") == ["scontrol requeue 77"]
    again = {"CODE": "130", "SLURM_RESTART_COUNT": "5", "MOST_RESTARTS": "5"}
    code, output = sandbox.run("slurm.sbatch", "cifar10_stability", **again)
    assert code == 130
    assert sandbox.lines("scontrol") == []
    assert "MOST_RESTARTS" in output


def test_a_node_that_does_not_come_is_done_without(sandbox):
    code, output = sandbox.run("slurm.sbatch", "cifar10_stability", DOWN="n2", NODE_SECONDS="3")
    assert code == 0, output
    assert "of 3 nodes 2 are up; going on with these" in output
    assert len(sandbox.lines("mebm sweep")) == 1


def test_without_a_head_there_is_no_study(sandbox):
    code, output = sandbox.run("slurm.sbatch", "cifar10_stability", DOWN="n1", NODE_SECONDS="1")
    assert code == 1
    assert "Ray does not start on n1 (10.0.0.1:20077)" in output
    assert sandbox.lines("mebm") == sandbox.lines("scontrol") == []


def test_one_node_is_enough(sandbox):
    assert sandbox.run("slurm.sbatch", "cifar10_stability", NODES="n1")[0] == 0
    assert len(sandbox.lines("ray on ")) == len(sandbox.lines("mebm sweep")) == 1


def test_a_config_file_of_another_name_than_its_study(sandbox):
    sandbox.study.mkdir(parents=True)
    (sandbox.study / "study.yaml").touch()
    assert sandbox.run("slurm.sbatch", "/home/me/mine.yaml", STUDY_NAME="cifar10_stability")[0] == 0
    assert sandbox.lines("mebm resume") == [f"mebm resume {sandbox.study} --address 10.0.0.1:20077"]


def test_a_job_without_a_config_says_how_it_is_used(sandbox):
    code, output = sandbox.run("slurm.sbatch")
    assert code != 0
    assert "usage: sbatch slurm.sbatch CONFIG" in output


def test_by_hand(sandbox):
    code, output = sandbox.run("by_hand.sh", "head", GPUS="2")
    assert code == 0, output
    assert "on each of the others: by_hand.sh worker 10.0.0.1" in output
    made, started = sandbox.lines()
    assert made == "ray get-auth-token --generate"
    assert started.endswith(
        "token: start --head --node-ip-address=10.0.0.1 --port=6379 --include-dashboard=false --disable-usage-stats "
        "--num-gpus=2"
    )
    assert sandbox.run("by_hand.sh", "worker", "10.0.0.1")[0] == 0
    assert sandbox.lines()[0].endswith("token: start --address=10.0.0.1:6379 --disable-usage-stats")
    assert sandbox.run("by_hand.sh", "study", "cifar10_stability", "--set", "epochs=3")[0] == 0
    results = sandbox.folder / "results"
    assert sandbox.lines() == [f"mebm sweep cifar10_stability --results {results} --address auto --set epochs=3"]
    assert sandbox.run("by_hand.sh", "study", "cifar10_stability", CODE="130")[0] == 130
    assert sandbox.lines() == [f"mebm resume {sandbox.study} --address auto"]
    assert sandbox.run("by_hand.sh", "stop")[0] == 0
    assert sandbox.lines() == ["ray stop"]
    for wrong in ((), ("worker",), ("study",), ("sweep",)):
        code, output = sandbox.run("by_hand.sh", *wrong)
        assert code != 0
        assert "usage: by_hand.sh" in output


# ----------------------------------------------------------------------------------------------------- manifest


@pytest.fixture(scope="module")
def manifest():
    documents = yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text())
    return {document["kind"]: document for document in documents}


def pods(manifest):
    cluster = manifest["RayJob"]["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_the_manifest_has_what_each_kind_needs(manifest):
    versions = {kind: document["apiVersion"] for kind, document in manifest.items()}
    assert versions == {
        "PersistentVolumeClaim": "v1",
        "NetworkPolicy": "networking.k8s.io/v1",
        "RayJob": "ray.io/v1",
    }
    assert all(document["metadata"]["name"] for document in manifest.values())
    spec = manifest["RayJob"]["spec"]
    assert set(spec) <= {
        "entrypoint",
        "submissionMode",
        "backoffLimit",
        "shutdownAfterJobFinishes",
        "ttlSecondsAfterFinished",
        "rayClusterSpec",
    }
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode")
    assert type(spec["backoffLimit"]) is type(spec["ttlSecondsAfterFinished"]) is int
    cluster = spec["rayClusterSpec"]
    assert set(cluster) == {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert cluster["authOptions"] == {"mode": "token"}
    for group in pods(manifest):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())  # the CRD takes strings alone
        assert group["template"]["spec"]["containers"]
    for group in cluster["workerGroupSpecs"]:
        assert group["groupName"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_workers_have_gpus_and_every_pod_the_same_image_and_the_results(manifest):
    images = set()
    claim = manifest["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in pods(manifest):
        spec = group["template"]["spec"]
        [container] = spec["containers"]
        images.add(container["image"])
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        assert {"cpu", "memory"} <= set(limits)
        assert limits.get("nvidia.com/gpu") == requests.get("nvidia.com/gpu")  # Kubernetes takes no other request
        assert ("nvidia.com/gpu" in limits) == ("groupName" in group)
        volumes = {v["name"]: v for v in spec["volumes"]}
        mounted = {m["mountPath"]: volumes[m["name"]] for m in container["volumeMounts"]}
        assert mounted["/results"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert mounted["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert len(images) == 1


def test_ray_in_the_manifest_is_closed_to_others(manifest):
    labels = {"app.kubernetes.io/part-of": "mebm"}
    policy = manifest["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == labels
    assert policy["policyTypes"] == ["Ingress"]
    own, operator = policy["ingress"]
    assert own["from"] == [{"podSelector": {"matchLabels": labels}}]
    assert [p["port"] for p in operator["ports"]] == [8265]
    for group in pods(manifest):
        assert group["template"]["metadata"]["labels"] == labels
    assert manifest["RayJob"]["spec"]["rayClusterSpec"]["headGroupSpec"]["serviceType"] == "ClusterIP"


def test_the_entrypoint_begins_a_study_and_then_goes_on_with_it(manifest, sandbox):
    entrypoint = manifest["RayJob"]["spec"]["entrypoint"].replace("/results", str(sandbox.folder / "results"))
    assert entrypoint.count("cifar10_stability") == 2
    assert "cifar10_stability" in packaged_configs()
    for expected in (
        f"mebm sweep cifar10_stability --results {sandbox.folder}/results --address auto",
        f"mebm resume {sandbox.study} --address auto",
    ):
        sandbox.log.write_text("")
        ended = subprocess.run(entrypoint, shell=True, env={**sandbox.environment, "CODE": "130"})
        assert ended.returncode == 130  # KubeRay sees how it ended
        assert sandbox.lines() == [expected]


# ------------------------------------------------------------------------------------------------------- package


def test_the_folder_ships_and_is_no_study():
    assert {path.name for path in CLUSTER.iterdir() if not path.name.startswith("__")} == {
        "README.md", "by_hand.sh", "kuberay.yaml", "slurm.sbatch",
    }  # fmt: skip
    assert not {"kuberay", "cluster"} & set(packaged_configs())
    readme = (CLUSTER / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in (*SCRIPTS, "kuberay.yaml"))
