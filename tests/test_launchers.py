"""What a launcher says about a process, and which GPUs are its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vit_nabirds.errors import ConfigError, UserError
from vit_nabirds.parallel.accelerators import Seen, check_plugin, see, share
from vit_nabirds.parallel.launchers import Launch, launched, processes_of_first_node, why_alone

STEP = {
    "SLURM_JOB_ID": "1000",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[007-009,12],login1",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_PROCID": "6",
}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu7", "MASTER_PORT": "29500"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}
JAX_JOB = {"PROCESS_ID": "1", "NUM_PROCESSES": "2", "COORDINATOR_ADDRESS": "birds-0.birds", "COORDINATOR_PORT": "6666"}
LOCAL = f"127.0.0.1:{61440 + os.getppid() % 4096}"


@pytest.mark.parametrize(
    "environ, coordinator",
    [
        ({}, "gpu007:64344"),
        ({"SLURM_STEP_NODELIST": "login1,gpu[1-3]"}, "login1:64344"),
        ({"SLURM_STEP_NODELIST": "rack[2-3]gpu[10-11]"}, "rack2gpu10:64344"),
        ({"SLURM_STEP_NUM_NODES": "1"}, "127.0.0.1:64344"),  # whatever its name resolves to
        ({"SLURM_STEP_ID": "1"}, "gpu007:64345"),  # two steps of a job do not meet
        ({"JAX_COORDINATOR_PORT": "5000"}, "gpu007:5000"),
        ({"PMI_RANK": "6", "PMI_SIZE": "8"}, "gpu007:64344"),  # srun --mpi=pmi2
        ({"PMIX_RANK": "6"}, "gpu007:64344"),
        ({"WORLD_SIZE": "8", "MASTER_ADDR": "gpu3"}, "gpu007:64344"),  # left by a job script for torch
    ],
)
def test_the_first_task_of_slurm_is_the_coordinator(environ, coordinator):
    assert launched(STEP | environ) == Launch(coordinator, num_processes=8, process_id=6)


@pytest.mark.parametrize(
    "environ, launch",
    [
        (TORCHRUN, Launch("gpu7:29500", 4, 3)),
        (TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"}, Launch("gpu7:29501", 4, 3)),
        (STEP | TORCHRUN, Launch("gpu7:29500", 4, 3)),  # one torchrun for each node, started by srun
        (OPEN_MPI, Launch(LOCAL, 2, 1)),
        (STEP | OPEN_MPI, Launch(LOCAL, 2, 1)),  # mpirun in an allocation starts its daemons by srun
        (OPEN_MPI | {"PMIX_RANK": "1"}, Launch(LOCAL, 2, 1)),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "MASTER_ADDR": "gpu7"}, Launch("gpu7:61440", 2, 1)),
        (OPEN_MPI | {"JAX_COORDINATOR_PORT": "5000"}, Launch("127.0.0.1:5000", 2, 1)),
        (HYDRA, Launch(LOCAL, 2, 1)),
        (JAX_JOB, Launch("birds-0.birds:6666", 2, 1)),
    ],
)
def test_other_launchers(environ, launch):
    assert launched(environ) == launch


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # a batch script, or salloc
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"RANK": "1"},
        {"PROCESS_ID": "main", "NUM_PROCESSES": "2"},  # another program's
    ],
)
def test_alone(environ):
    assert launched(environ) is None


@pytest.mark.parametrize(
    "environ, message",
    [
        ({"PMIX_RANK": "0"}, "an MPI launcher has started .* does not say how many"),
        (
            OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
            "mpirun has started 2 processes on several nodes: .*MASTER_ADDR",
        ),
        (STEP | {"SLURM_HET_SIZE": "2"}, "heterogeneous job"),
        ({name: value for name, value in STEP.items() if name != "SLURM_PROCID"}, "8 tasks .*SLURM_PROCID is missing"),
        (STEP | {"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST is missing"),
        (STEP | {"SLURM_PROCID": "six"}, "'six'.*start the tasks with srun"),
        (STEP | {"SLURM_DISTRIBUTION": "arbitrary"}, "SLURM_HOSTFILE, .*--coordinator"),
    ],
)
def test_half_an_environment_is_one_message(environ, message):
    with pytest.raises(ConfigError, match=message):
        launched(environ)


def test_the_user_may_say_where_process_0_is():
    several = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    assert launched(several, "gpu7:5000") == Launch("gpu7:5000", 2, 1)
    assert launched(STEP | {"SLURM_DISTRIBUTION": "arbitrary"}, "gpu7:5000") == Launch("gpu7:5000", 8, 6)


def test_with_an_arbitrary_distribution_the_file_says_where_task_0_is(tmp_path):
    (tmp_path / "hosts").write_text("gpu009\ngpu007\ngpu007\n")
    environ = {"SLURM_DISTRIBUTION": "arbitrary", "SLURM_HOSTFILE": str(tmp_path / "hosts")}
    assert launched(STEP | environ).coordinator == "gpu009:64344"


def test_a_command_typed_in_the_shell_of_srun_works_alone(monkeypatch):
    environ = STEP | {"SLURM_PTY_PORT": "40000", "SLURM_PROCID": "0"}
    assert launched(environ).num_processes == 8  # `srun python main.py` in such a shell
    monkeypatch.setattr("sys.stdin", open("/dev/ptmx"))
    assert launched(environ) is None and processes_of_first_node(environ) == 1


def test_why_one_process_works_alone_in_an_allocation_for_several():
    assert why_alone({}) is None and why_alone({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1"}) is None
    assert why_alone({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}).startswith("this allocation has 8 tasks")
    assert why_alone({"SLURM_JOB_ID": "1", "SLURM_HET_SIZE": "2"}).startswith("this is one task of a heterogeneous job")
    assert why_alone({"RANK": "1"}).startswith("RANK is set, as by torchrun, but WORLD_SIZE is not")
    assert why_alone({"PROCESS_ID": "0", "NUM_PROCESSES": "1"}) is None


@pytest.mark.parametrize(
    "environ, processes",
    [({}, 1), (STEP, 4), ({"SLURM_STEP_TASKS_PER_NODE": "2,1"}, 2), (TORCHRUN, 2), (OPEN_MPI, 2), (HYDRA, 2)],
)
def test_processes_of_the_first_node(environ, processes):
    assert processes_of_first_node(environ) == processes


def node_with(root: Path, count: int, uuids: bool = True) -> Path:
    """What NVIDIA's driver shows of a node, where the last GPU has the lowest address on the bus."""
    (root / "dev").mkdir(parents=True)
    for minor in range(count):
        (root / f"dev/nvidia{minor}").touch()
        if uuids:
            folder = root / f"proc/driver/nvidia/gpus/0000:{count - minor:02}:00.0"
            folder.mkdir(parents=True)
            text = f"Model: \t\t H100\nGPU UUID: \t GPU-{minor}abc\nDevice Minor: \t {minor}\n"
            (folder / "information").write_text(text)
    (root / "dev/nvidiactl").touch()
    return root


@pytest.mark.parametrize(
    "environ, gpus",
    [
        ({}, ["GPU-0abc", "GPU-1abc", "GPU-2abc"]),
        ({"CUDA_VISIBLE_DEVICES": "2,0"}, ["GPU-2abc", "GPU-0abc"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1"}, ["GPU-1abc"]),
        ({"CUDA_VISIBLE_DEVICES": "MIG-7,MIG-8"}, ["MIG-7", "MIG-8"]),
        ({"CUDA_VISIBLE_DEVICES": "0,7,1"}, ["GPU-0abc"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, []),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, []),
    ],
)
def test_gpus_that_a_process_sees(environ, gpus, tmp_path):
    root = node_with(tmp_path, 3)
    assert see("n", environ | {"SLURM_GPUS_ON_NODE": "3"}, root) == Seen("n", gpus, 3)


def test_gpus_that_do_not_count(tmp_path):
    """Of a training on the CPU, and CUDA's numbers where the GPUs are AMD's."""
    assert see("n", {"CUDA_VISIBLE_DEVICES": "0", "JAX_PLATFORMS": "cpu"}, tmp_path).gpus == []
    (tmp_path / "dev/dri").mkdir(parents=True)
    for file in ("kfd", "dri/renderD128"):
        (tmp_path / "dev" / file).touch()
    assert see("n", {"CUDA_VISIBLE_DEVICES": "0,1", "ROCR_VISIBLE_DEVICES": "0"}, tmp_path).gpus == ["renderD128"]


def test_gpus_without_uuids_those_of_a_cgroup_and_those_of_amd(tmp_path, monkeypatch):
    assert see("n", {}, node_with(tmp_path / "a", 2, uuids=False)).gpus == ["nvidia0", "nvidia1"]
    root = node_with(tmp_path / "b", 4)
    monkeypatch.setattr("vit_nabirds.parallel.accelerators._may_open", lambda file: file.name in ("nvidia2", "nvidia3"))
    assert see("n", {"CUDA_VISIBLE_DEVICES": "0,1"}, root).gpus == ["GPU-2abc", "GPU-3abc"]
    monkeypatch.undo()
    (tmp_path / "c/dev/dri").mkdir(parents=True)
    for number in range(128, 132):
        (tmp_path / f"c/dev/dri/renderD{number}").touch()
    assert see("n", {}, tmp_path / "c").gpus == []  # of a screen
    (tmp_path / "c/dev/kfd").touch()
    both = {"ROCR_VISIBLE_DEVICES": "1,2,3", "HIP_VISIBLE_DEVICES": "2"}
    assert see("n", both, tmp_path / "c").gpus == ["renderD131"]
    assert see("n", {"CUDA_VISIBLE_DEVICES": "0,1"}, tmp_path).gpus == ["0", "1"]  # nothing else is known of them


def seen(*lists, nodes=None, allocated=0) -> list[Seen]:
    return [Seen(nodes[i] if nodes else "a", list(gpus), allocated) for i, gpus in enumerate(lists)]


@pytest.mark.parametrize(
    "processes, shares",
    [
        (seen("", ""), [None, None]),
        (seen("0123", "0123"), [[0, 1], [2, 3]]),  # --gpus-per-node=4
        (seen("01", "23"), [None, None]),  # --gpu-bind=single:2, --gpus-per-task=2
        (seen("01", "10"), [[0], [0]]),  # in another order
        (seen("01", "01", nodes="ab"), [None, None]),
        (seen("0123", "0123", "0123", nodes="aab"), [[0, 1], [2, 3], None]),
        (seen(["MIG-1"], ["MIG-2"]), [None, None]),
        (seen("01", "23", allocated=4), [None, None]),
        (seen("01", allocated=4), [None]),  # one process alone was given two of them by hand
    ],
)
def test_gpus_are_shared(processes, shares):
    assert share(processes) == shares


@pytest.mark.parametrize(
    "processes, message",
    [
        (seen("012345", *["012345"] * 3), "4 tasks cannot share the 6 GPUs of a equally: .*--ntasks-per-node=6"),
        (seen("01", *["01"] * 3), "4 tasks cannot share the 2 GPUs"),
        (seen("0", "1", allocated=4), "2 of the 4 GPUs of the job on a would be idle: .*--allow_idle_gpus"),
        (seen("01", "12"), "processes 0 and 1 on a would share the GPU 1: "),
        (seen("01", ""), "process 1 on a sees no GPU"),
        (seen(["MIG-1", "MIG-2"], ["MIG-1", "MIG-2"]), "CUDA gives each the first"),
    ],
)
def test_gpus_that_would_be_shared_or_idle_are_an_error(processes, message):
    with pytest.raises(UserError, match=message):
        share(processes)


def test_idle_gpus_are_allowed_on_request():
    assert share(seen("0", "1", allocated=4), allow_idle=True) == [None, None]
    assert share(seen("01234", "01234"), allow_idle=True) == [[0, 1], [2, 3]]
    with pytest.raises(UserError, match="cannot share"):
        share(seen("0", "0"), allow_idle=True)


def test_gpus_that_jax_cannot_use_are_named(monkeypatch):
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [])  # tests of GPU programs have put one in
    assert check_plugin([], {}) is None and check_plugin(["GPU-1"], {"JAX_PLATFORMS": "cpu"}) is None
    assert "sees 1 GPU(s), but JAX has no plug-in" in check_plugin(["GPU-1"], {})


@pytest.mark.skipif(not shutil.which("mpirun"), reason="there is no mpirun")
def test_mpirun_starts_one_training_of_two_processes(prepared, tmp_path):
    main, config = (Path(__file__).parents[1] / name for name in ("main.py", "tests/tiny_config.py"))
    launcher = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"]
    training = [f"--config={config}", f"--config.data.root={prepared}", f"--workdir={tmp_path}", "--config.epochs=1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    run = subprocess.run(
        [*launcher, sys.executable, str(main), *training], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert "4 cpu device(s) of 2 process(es)" in run.stderr and run.stderr.count("finished: ") == 1
