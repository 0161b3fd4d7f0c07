"""The place of a process in a Slurm step: coordinator, number and devices."""

import pytest

from vit_nabirds.cluster import Place, join, place_in_slurm
from vit_nabirds.errors import UserError

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
