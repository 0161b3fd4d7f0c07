"""What Slurm says about a process, and how the processes of a job meet and end."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vit_nabirds.errors import ConfigError, UserError
from vit_nabirds.parallel.group import ProcessGroup
from vit_nabirds.parallel.launchers import Launch, check_same_program, join, launched_by_slurm

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
    assert launched_by_slurm(STEP | environ, gpus).local_device_ids == devices


def test_gpus_that_tasks_cannot_share_are_an_error():
    with pytest.raises(UserError, match="4 tasks cannot share the 6 GPUs of .* equally: .*--ntasks-per-node=6"):
        launched_by_slurm(STEP, gpus=6)


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
    launch = launched_by_slurm(STEP | environ, gpus=0)
    assert launch == Launch(coordinator, num_processes=8, process_id=6)


def test_alone_without_srun():
    assert launched_by_slurm({}) is None
    assert launched_by_slurm({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is None  # a batch script
    assert launched_by_slurm(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize(
    "given, message",
    [
        (("localhost:5000", None, None), "needs --num_processes and --process_id too"),
        (("localhost", 2, 1), "is invalid: expected HOST:PORT of process 0"),
        (("localhost:70000", 2, 1), "is invalid: expected HOST:PORT of process 0"),
        (("localhost:5000", 2, 2), "is invalid: .* 0 <= process_id < num_processes"),
    ],
)
def test_wrong_flags_of_a_process_of_several(given, message, monkeypatch):
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    with pytest.raises(ConfigError, match=message):
        join(*given)


def test_a_process_alone_is_a_group_of_one(monkeypatch, tmp_path, capfd):
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    group = join()
    assert (group.process_id, group.num_processes, group.is_writer) == (0, 1, True)
    group.barrier("x")
    group.agree("x", {"a": 1}, "")
    check_same_program(group, {"seed": 1})
    entered = False
    with group.writer_first("x"):
        entered = True
    assert entered
    (tmp_path / "file").touch()
    group.check_shared(tmp_path / "file")
    group.end_if_several(None, RuntimeError("it rains"), None)
    group.leave()
    assert group.fail("it rains", 3) == 3 and group.fail_with(ConfigError("it pours")) == 2
    assert capfd.readouterr().err == "error: it rains\nerror: it pours\n"
    with pytest.raises(ZeroDivisionError):
        group.fail_with(ZeroDivisionError())


END = """
import sys
from vit_nabirds.parallel.group import ProcessGroup
process_id, how, host, port = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
group = ProcessGroup(process_id, 3)
group.meet(host, port, timeout=20)
print("met", flush=True)
if how == "fails":
    group.fail("it rains", 2)
if how == "leaves":
    group.leave()
else:
    sys.stdin.read()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(process_id, *arguments) -> subprocess.Popen:
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    environment = {"SLURMD_NODENAME": f"node{process_id}", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen([sys.executable, "-c", END, str(process_id), *arguments], env=environment, **pipes)


@pytest.mark.parametrize(
    "ways, code, message",
    [
        (["leaves", "leaves", "leaves"], 0, ""),
        (["waits", "fails", "waits"], 2, "error: process 1 of 3 on node1: it rains\n"),
        (["fails", "waits", "waits"], 2, "error: process 0 of 3 on node0: it rains\n"),
        (["waits", "waits", "killed"], 1, "error: process 2 of 3 on node2 ended without a word"),
        (["killed", "waits", "waits"], 1, "error: process 0 of 3 on 127.0.0.1 ended without a word"),
    ],
)
def test_the_end_of_one_ends_all_with_one_message(ways, code, message):
    port = str(free_port())
    processes = [start(process_id, way, "127.0.0.1", port) for process_id, way in enumerate(ways)]
    for process in processes:
        process.stdout.readline()  # they have met
    if killed := [process for process, way in zip(processes, ways, strict=True) if way == "killed"]:
        killed[0].kill()
    others = [process for process in processes if process not in killed]
    assert [process.wait(timeout=20) for process in others] == [code] * len(others)
    said = [text for process in others if (text := process.stderr.read())]
    assert len(said) == bool(message) and "".join(said).startswith(message)


def test_the_messages_are_lines_of_json():
    """Process 0 is the real one; this test speaks for the two others, after two strangers."""
    port = free_port()
    process = start(0, "waits", "127.0.0.1", str(port))

    def connect() -> socket.socket:
        while process.poll() is None:
            try:
                return socket.create_connection(("127.0.0.1", port), timeout=20)
            except ConnectionRefusedError:
                continue
        raise AssertionError(process.stderr.read())

    def say(connection, **words):
        connection.sendall(json.dumps(words).encode() + b"\n")

    def hear(connection) -> dict:
        return json.loads(connection.makefile().readline())

    connect().sendall(b"GET / HTTP/1.1\r\n\r\n")
    say(connect(), job="another job", process=1, node="stranger")
    peers = [connect(), connect()]
    for number, peer in enumerate(peers, start=1):
        say(peer, job="none.none", process=number, node=f"node{number}")
    assert [hear(peer) for peer in peers] == [{"met": True}] * 2
    say(peers[0], goodbye=True)
    say(peers[1], code=7, message="process 2 of 3 on node2: it rains")
    assert hear(peers[0]) == {"code": 7}
    assert process.wait(timeout=20) == 7
    assert process.stderr.read() == "error: process 2 of 3 on node2: it rains\n"


def test_those_that_are_missing_are_named():
    group = ProcessGroup(0, 3)
    with pytest.raises(UserError, match=r"process 1, 2 of 3 did not reach process 0 on .* within 0 s"):
        group.meet("127.0.0.1", free_port(), timeout=0.2)


def test_a_port_in_use_and_a_host_without_an_address():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with pytest.raises(UserError, match="process 0 cannot listen on port .*choose a free one"):
            ProcessGroup(0, 2).meet("127.0.0.1", taken.getsockname()[1], timeout=0.2)
    with pytest.raises(UserError, match="cannot resolve 'nowhere.invalid', the host of process 0"):
        ProcessGroup(1, 2).meet("nowhere.invalid", 5000, timeout=0.2)
    with pytest.raises(UserError, match=r"got no answer from process 0 at 127.0.0.1:\d+ within 0 s"):
        ProcessGroup(1, 2).meet("127.0.0.1", free_port(), timeout=0.2)
