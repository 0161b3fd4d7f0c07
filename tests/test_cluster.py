"""The place of a process in a Slurm step, and how the processes of a job meet and end."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vit_nabirds.errors import UserError
from vit_nabirds.parallel.launchers import Place, join, place_in_slurm

REPOSITORY = Path(__file__).parent.parent
STEP = {
    "SLURM_JOB_ID": "1000",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[007-009,12],login1",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
}


@pytest.mark.parametrize(
    "environ, gpus, devices",
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 0, [2]),  # --gpus-per-node=4: each task sees those of all
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_PER_TASK": "1"}, 0, None),  # each task sees its own as number 0
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "h100:2"}, 0, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_PER_TASK": "1"}, 0, [2]),  # with --gpu-bind=none
        ({"CUDA_VISIBLE_DEVICES": ",".join("01234567")}, 0, [4, 5]),
        ({}, 4, [2]),  # a cluster that hides nothing
        ({}, 0, None),  # no GPU
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 0, None),  # one task for each node
        ({"SLURM_STEP_TASKS_PER_NODE": "2,1", "CUDA_VISIBLE_DEVICES": "0,1"}, 0, None),
    ],
)
def test_a_task_gets_its_own_gpus(environ, gpus, devices):
    assert place_in_slurm(STEP | environ, gpus).local_device_ids == devices


def test_gpus_that_tasks_cannot_share_are_told():
    with pytest.raises(UserError, match="4 tasks cannot share the 6 GPUs of .* equally: .*--ntasks-per-node=6"):
        place_in_slurm(STEP, gpus=6)


@pytest.mark.parametrize(
    "environ, coordinator",
    [
        ({}, "gpu007:64344"),
        ({"SLURM_STEP_NODELIST": "login1,gpu[1-3]"}, "login1:64344"),
        ({"SLURM_STEP_NODELIST": "rack[2-3]gpu[10-11]"}, "rack2gpu10:64344"),
        ({"SLURM_STEP_NUM_NODES": "1"}, "127.0.0.1:64344"),  # whatever its name resolves to
        ({"SLURM_STEP_ID": "1"}, "gpu007:64345"),  # two steps of a job do not meet
        ({"JAX_COORDINATOR_PORT": "5000"}, "gpu007:5000"),
    ],
)
def test_the_first_process_is_the_coordinator(environ, coordinator):
    place = place_in_slurm(STEP | environ, gpus=0)
    assert place == Place(coordinator, num_processes=8, process_id=6)


def test_alone_without_srun():
    assert place_in_slurm({}) is None
    assert place_in_slurm({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is None  # a batch script
    assert place_in_slurm(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize(
    "place, message",
    [
        (("localhost:5000", None, None), "needs --num_processes and --process_id too"),
        (("localhost", 2, 1), "is no place: HOST:PORT of process 0"),
        (("localhost:5000", 2, 2), "is no place: .*numbers from 0 on"),
    ],
)
def test_flags_that_say_no_place(place, message, monkeypatch):
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    with pytest.raises(UserError, match=message):
        join(*place)


END = """
import sys
from vit_nabirds.parallel import link
number, how = int(sys.argv[2]), sys.argv[3]
link.meet(sys.argv[1], 3, number, timeout=10)
print("met", flush=True)
if how == "fails":
    link.fail("it rains", 2)
if how == "parts":
    link.part()
else:
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    "ways, code, message",
    [
        (["parts", "parts", "parts"], 0, ""),
        (["waits", "fails", "waits"], 2, "error: process 1 of 3 on node1: it rains\n"),
        (["fails", "waits", "waits"], 2, "error: process 0 of 3 on node0: it rains\n"),
        (["waits", "waits", "killed"], 1, "error: process 2 of 3 on node2 ended without a word"),
        (["killed", "waits", "waits"], 1, "error: process 0 of 3 on 127.0.0.1 ended without a word"),
    ],
)
def test_the_end_of_one_ends_all_with_one_message(ways, code, message):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = "127.0.0.1:{1}".format(*probe.getsockname())
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", END, coordinator, str(number), way],
            env={"SLURMD_NODENAME": f"node{number}", "PYTHONPATH": str(REPOSITORY)},
            **pipes,
        )
        for number, way in enumerate(ways)
    ]
    for process in processes:
        process.stdout.readline()  # they have met
    if killed := [process for process, way in zip(processes, ways, strict=True) if way == "killed"]:
        killed[0].kill()
    others = [process for process in processes if process not in killed]
    assert [process.wait(timeout=10) for process in others] == [code] * len(others)
    said = [text for process in others if (text := process.stderr.read())]
    assert len(said) == bool(message) and "".join(said).startswith(message)
