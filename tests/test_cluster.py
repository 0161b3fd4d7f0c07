"""How the processes of a job meet and end."""

import contextlib
import hmac
import itertools
import json
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vit_nabirds.errors import ConfigError, UserError
from vit_nabirds.parallel.accelerators import Seen
from vit_nabirds.parallel.group import ProcessGroup
from vit_nabirds.parallel.join import check_same_program, join
from vit_nabirds.parallel.meeting import _listening, is_loopback

REPOSITORY = Path(__file__).parent.parent


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


TOKEN = b"of this job"
END = """
import sys
from vit_nabirds.parallel.accelerators import Seen
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
    environment["VIT_NABIRDS_TOKEN"] = TOKEN.decode()
    return subprocess.Popen([sys.executable, "-c", END, str(process_id), *arguments], env=environment, **pipes)


@pytest.mark.parametrize(
    "ways, code, message",
    [
        (["leaves", "leaves", "leaves"], 0, ""),
        (["waits", "fails", "waits"], 2, "error: process 1 of 3 on node1: it rains\n"),
        (["fails", "waits", "waits"], 2, "error: process 0 of 3 on node0: it rains\n"),
        (["waits", "waits", "killed"], 74, "error: process 2 of 3 on node2 ended without a word"),
        (["killed", "waits", "waits"], 74, "error: process 0 of 3 on 127.0.0.1 ended without a word"),
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


def say(connection, **words):
    connection.sendall(json.dumps(words).encode() + b"\n")


def hear(connection) -> dict:
    return json.loads(connection.makefile().readline() or "{}")


def connect(port) -> socket.socket:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port), timeout=20)
    raise AssertionError("nobody listens")


def hello(connection, number, token=TOKEN, job="none.none", **changed) -> None:
    """What process `number` says first, or somebody who knows all but the token."""
    proof = hmac.new(token, f"{hear(connection)['nonce']} {number}".encode(), "sha256").hexdigest()
    words = dict(job=job, process=number, node=f"node{number}", gpus=[], allocated=0, nonce="mine", proof=proof)
    say(connection, **words | changed)


STRANGERS = {
    "speaks HTTP": lambda x: x.sendall(b"GET / HTTP/1.1\r\n\r\n"),
    "says nothing": lambda x: None,
    "stops in the middle": lambda x: x.sendall(b'{"job": '),
    "never ends": lambda x: x.sendall(b"a" * 100_000),
    "is deep": lambda x: x.sendall(b"[" * 10_000 + b"\n"),
    "is not an object": lambda x: say(x) or x.sendall(b"[1, 2]\n"),
    "has another job": lambda x: hello(x, 1, job="another job"),
    "guesses the token": lambda x: hello(x, 1, b"guessed"),
    "repeats a proof": lambda x: say(x, job="none.none", process=1, proof="0" * 64, nonce="x", node="x", gpus=[]),
    "has an odd proof": lambda x: hello(x, 1, proof="\u00e4"),
    "has an odd number": lambda x: hello(x, True),
    "goes at once": lambda x: x.close(),
}


def test_strangers_can_neither_join_nor_stall_nor_stop_a_job():
    """Process 0 is the real one; this test speaks for the two others, among many strangers."""
    port = free_port()
    process = start(0, "waits", "127.0.0.1", str(port))
    guests = []
    for _ in range(5):
        for act in STRANGERS.values():
            guests.append(connect(port))
            with contextlib.suppress(OSError):  # it hangs up while they speak
                act(guests[-1])
    began, peers = time.monotonic(), [connect(port), connect(port)]
    for number, peer in enumerate(peers, start=1):
        hello(peer, number)
    answer = {"met": True, "own": None, "proof": hmac.new(TOKEN, b"mine met", "sha256").hexdigest()}
    assert [hear(peer) for peer in peers] == [answer] * 2 and time.monotonic() - began < 5
    with pytest.raises(ConnectionRefusedError):  # nobody listens any more
        socket.create_connection(("127.0.0.1", port))
    say(peers[0], goodbye=True)
    say(peers[1], code=7, message="process 2 of 3 on node2: it rains")
    assert hear(peers[0]) == {"code": 7}
    assert process.wait(timeout=20) == 7
    assert process.stderr.read() == "error: process 2 of 3 on node2: it rains\n"


def test_a_process_is_not_fooled_by_who_listens_in_the_place_of_process_0():
    """By another program, or one that does not know the token."""
    answers = [b"HTTP/1.1 400\r\n\r\n", b'{"nonce": "x"}\n{"met": true, "own": null, "proof": "guessed"}\n', b"[]\n"]
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):  # it is closed
            for answer in itertools.cycle(answers):
                connection, _ = server.accept()
                connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(UserError, match="another program answers there|another VIT_NABIRDS_TOKEN"):
        ProcessGroup(1, 2).meet("127.0.0.1", server.getsockname()[1], timeout=1)
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


def test_processes_of_one_machine_listen_on_loopback_alone():
    with pytest.raises(ConnectionRefusedError), _listening("127.0.0.1", port := free_port(), 1):
        address = socket.gethostbyname(socket.gethostname())
        socket.create_connection((address if not is_loopback(address) else "127.0.0.2", port))
    assert is_loopback("::1") and is_loopback("localhost") and not is_loopback("gpu007")


def test_those_that_are_missing_are_named():
    group = ProcessGroup(0, 3)
    with pytest.raises(UserError, match=r"process 1, 2 of 3 did not reach process 0 on .* within 0 s"):
        group.meet("127.0.0.1", free_port(), timeout=0.2)


def test_processes_that_see_the_same_gpus_are_given_each_its_own_by_process_0():
    port, groups = free_port(), [ProcessGroup(number, 3) for number in range(3)]
    seen = [Seen("a", ["GPU-1", "GPU-2"]), Seen("a", ["GPU-1", "GPU-2"]), Seen("b", ["GPU-3"])]
    with ThreadPoolExecutor() as pool:
        own = list(pool.map(lambda group: group.meet("127.0.0.1", port, 20, seen[group.process_id]), groups))
    assert own == [[0], [1], None]


def test_a_wait_for_slow_processes_names_them_again_and_again(monkeypatch, capfd):
    monkeypatch.setattr("vit_nabirds.parallel.meeting.REMINDER", 0.1)
    with pytest.raises(UserError):
        ProcessGroup(0, 300).meet("127.0.0.1", free_port(), timeout=0.35)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0] == "waiting for process 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 289 more of 300, 0 s more"


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


def test_a_machine_whose_name_has_no_address():
    """As in a container: processes on CPUs find each other by it."""
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make namespaces")
    program = (
        "import jax; jax.config.update('jax_cpu_collectives_implementation', 'gloo'); "
        f"jax.distributed.initialize('127.0.0.1:{free_port()}', 1, 0); from vit_nabirds.parallel import devices; "
        "devices.all_devices()"
    )
    inside = f'hostname no.such.box && exec {sys.executable} -c "{program}"'
    done = subprocess.run(["unshare", "--uts", "bash", "-c", inside], capture_output=True, text=True)
    assert "UserError: this machine's name, 'no.such.box', has no address" in done.stderr, done.stderr
