"""Several processes: who they are by arguments and schedulers, what they tell each other, and an engine led by one."""

import contextlib
import pickle
import socket
import threading
import time

import pytest

from jaxinfer.batch.runner import Admission
from jaxinfer.errors import ConfigError, InputError, JobError
from jaxinfer.sharding import launch, replica
from jaxinfer.sharding.launch import Launch, detect, first_node, launch_of
from jaxinfer.sharding.watch import EXIT_AGAIN, Watch

SLURM = {"SLURM_JOB_ID": "4097", "SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "gpu[03-05,9],b1"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}


def test_without_options_a_process_works_on_its_own():
    assert launch_of(None, None, None, SLURM) is None  # srun of independent workers joins nothing
    with launch.joined(None) as watch:
        assert watch is None
    with launch.joined(Launch("localhost:1", 1, 0)) as watch:
        assert watch is None


def test_arguments_say_it_all_or_are_refused():
    assert launch_of("node1:1234", 4, 2, {}) == Launch("node1:1234", 4, 2)
    assert Launch("[::1]:1234", 2, 0).host == "::1"
    for options, words in [
        ((None, 2, None), "processes: got it without a coordinator"),
        ((None, None, 0), "process id: got it without a coordinator"),
        (("node1:1234", None, None), "without processes and process id"),
        (("node1:1234", 2, None), "without process id"),
        (("node1", 2, 0), "coordinator: got 'node1'; accepted: host:port"),
        (("node1:99999", 2, 0), "accepted: host:port"),
        ((":1234", 2, 0), "accepted: host:port"),
        (("node1:1234", 0, 0), "processes: got 0; accepted: 1 or more"),
        (("node1:1234", 2, 2), r"process id: got 2 \(arguments\); accepted: 0 to 1"),
    ]:
        with pytest.raises(ConfigError, match=words):
            launch_of(*options, {})


def test_slurm_tells_everything():
    assert launch_of("auto", None, None, SLURM) == Launch("gpu03:61441", 8, 3, "SLURM_PROCID")
    assert detect(SLURM | {"SLURM_STEP_NUM_TASKS": "4"}).processes == 4  # of this step, not of the allocation
    with pytest.raises(ConfigError, match="processes: got 2, and SLURM_PROCID says 8"):
        launch_of("auto", 2, None, SLURM)
    with pytest.raises(ConfigError, match="under SLURM without SLURM_NTASKS"):
        detect({k: v for k, v in SLURM.items() if k != "SLURM_NTASKS"})
    with pytest.raises(ConfigError, match="SLURM_PROCID: got 'x'; accepted: a number"):
        detect(SLURM | {"SLURM_PROCID": "x"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("n[001-015],b", "n001"),
        ("n[1,7-9]", "n1"),
        ("r[2-3]-ib", "r2-ib"),
        ("n-1,n-2", "n-1"),
    ],
)
def test_the_first_of_a_node_list(nodes, first):
    assert first_node(nodes) == first


def test_kubernetes_tells_the_index_and_the_host_name_the_coordinator():
    found = detect(POD, processes=4, hostname="train-2.pods.ns.svc")
    assert found == Launch("train-0.pods.ns.svc:55527", 4, 2, "JOB_COMPLETION_INDEX")
    with pytest.raises(ConfigError, match="without the number of processes"):
        detect(POD, hostname="train-2.pods")
    with pytest.raises(ConfigError, match="host name: got 'box'; accepted: one that ends in -2"):
        detect(POD, processes=4, hostname="box")


def test_a_tpu_slice_tells_everything_and_nothing_is_an_error():
    found = detect({"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"})
    assert found == Launch("t0:55527", 2, 1, "TPU_WORKER_HOSTNAMES")
    with pytest.raises(ConfigError, match="no scheduler's variables are set .*SLURM_PROCID"):
        detect({})


def test_a_taken_port_and_an_absent_coordinator_are_told_before_the_runtime_waits():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"got port {port}, which process 0 cannot listen on"):
            with launch.joined(Launch(f"localhost:{port}", 2, 0)):
                pass
    with pytest.raises(launch.PeerLost, match=f"process 1 of 2: nobody listens at localhost:{port} after 0 s"):
        with launch.joined(Launch(f"localhost:{port}", 2, 1), timeout=0.3):
            pass


@contextlib.contextmanager
def watches(count, *, silence=30.0, kind=Watch):
    """Connected watches, all in this process; `left[i]` collects the codes that watch i would have exited with."""
    left = [[] for _ in range(count)]
    found = [kind(i, count, silence=silence, leave=left[i].append) for i in range(count)]
    listener = socket.create_server(("", 0))
    port = listener.getsockname()[1]
    accepting = threading.Thread(target=found[0]._accept, args=(listener, 7, 10.0))
    accepting.start()
    with socket.create_connection(("localhost", port)) as stranger:
        stranger.sendall(b"hello 1 8\n")  # does not know the token
    for watch in found[1:]:
        watch._call("localhost", port, 7, 10.0)
    accepting.join()
    for watch in found:
        watch._thread.start()
    try:
        yield found, left
    finally:
        for watch in found:
            watch.close()


def eventually(condition, seconds=5.0):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


def die(watch):
    """What the system does with the connections of a process that is killed."""
    watch._closing.set()
    watch._thread.join()
    for link in watch._links:
        link.socket.close()


@pytest.mark.parametrize("dead", [0, 2])
def test_a_dead_process_ends_all_others_with_the_retryable_code_and_its_name(dead, capfd):
    with watches(3) as (found, left):
        done = []
        found[1].before_exit.append(lambda: done.append(len(left[1])))
        die(found[dead])
        assert eventually(lambda: all(codes for i, codes in enumerate(left) if i != dead))
        assert left == [[] if i == dead else [EXIT_AGAIN] for i in range(3)]
        assert done == [0]  # before the exit
    told = capfd.readouterr().err
    for i in {0, 1, 2} - {dead}:
        assert f"jaxinfer: process {i}: process {dead} of 3 is gone (its connection is closed); stopped." in told


class Deaf(Watch):
    """The planted bug: nobody reads what the peers' connections say."""

    def _read(self, link):
        time.sleep(0.01)


def test_the_test_above_sees_a_watch_that_does_not_watch():
    with watches(2, kind=Deaf) as (found, left):
        die(found[1])
        assert not eventually(lambda: left[0], seconds=0.5)


def test_silence_is_a_loss_and_quiet_work_is_not(capfd):
    with watches(2, silence=0.6) as (found, left):
        time.sleep(1.0)
        assert left == [[], []]  # each has heard the other's beats
        found[1]._closing.set()  # its thread ends and its connection stays open: a machine that hangs
        found[1]._thread.join()
        assert eventually(lambda: left[0] == [EXIT_AGAIN])
        assert "process 1 of 2 is gone (not heard of for 1 s)" in capfd.readouterr().err


def test_goodbye_is_no_loss():
    with watches(3) as (found, left):
        found[2].close()
        found[0].close()
        time.sleep(0.3)
        assert left == [[], [], []]


def test_an_error_of_one_is_told_to_the_others_which_may_meet_their_own(monkeypatch, capfd):
    monkeypatch.setattr("jaxinfer.sharding.watch._OWN_END", 0.2)
    with watches(3) as (found, left):
        found[1].failed(JobError("no space\nleft"))
        found[1].close()
        assert eventually(lambda: left[0] and left[2])
        assert left == [[EXIT_AGAIN], [], [EXIT_AGAIN]]
    told = capfd.readouterr().err
    assert told.count("process 1 of 3 ended with an error: JobError: no space left; stopped.") == 2


def test_what_the_runtime_says_of_a_process_that_failed_is_told_as_its_error(monkeypatch, capfd):
    monkeypatch.setattr("jaxinfer.sharding.watch._ABORT_WAIT", 0.3)
    with watches(2) as (found, left):
        found[1].failed(InputError("disk"))
        found[0].failed(RuntimeError("Connection closed by peer"))
        assert left[0] == [EXIT_AGAIN]
    assert "process 1 of 2 ended with an error: InputError: disk" in capfd.readouterr().err


@pytest.mark.parametrize("asked", [0, 1])
def test_a_wish_to_stop_reaches_all(asked):
    with watches(3) as (found, _):
        assert not any(watch.stop_asked for watch in found)
        found[asked].ask_stop()
        assert eventually(lambda: all(watch.stop_asked for watch in found))


def test_data_of_process_0_comes_whole_and_in_order():
    sent = [b"", b"a\nb\n", bytes(range(256)) * 4000, b"end"]
    with watches(3) as (found, _):
        for data in sent:
            found[0].send(data)
        assert [[watch.receive() for _ in sent] for watch in found[1:]] == [sent, sent]


def test_what_process_0_finds_all_find_and_its_errors_too():
    def refuse():
        raise InputError("input x: got nothing")

    assert replica.from_process_0(None, lambda: 3) == 3
    with watches(2) as (found, _):
        assert replica.from_process_0(found[0], lambda: {"slots": 4}) == {"slots": 4}
        assert replica.from_process_0(found[1], refuse) == {"slots": 4}  # not asked there
        with pytest.raises(InputError, match="got nothing"):
            replica.from_process_0(found[0], refuse)
        with pytest.raises(InputError, match="got nothing"):
            replica.from_process_0(found[1], lambda: 3)


class Recorder:
    """An engine that notes its calls and fails where it is told to."""

    slots, limits = 2, None

    def __init__(self):
        self.calls = []

    def admit(self, admissions):
        self.calls.append(("admit", [(a.slot, a.row, a.key) for a in admissions]))
        if admissions[0].row == "poison":
            raise ValueError("poison")

    def advance(self):
        self.calls.append(("advance",))
        return "look"

    def release(self, slot):
        self.calls.append(("release", slot))

    def reset(self):
        self.calls.append(("reset",))


def test_the_followers_make_the_calls_of_the_leader_and_end_with_it():
    with watches(2) as (found, _):
        engines, ended = [Recorder(), Recorder()], []
        follower = threading.Thread(target=lambda: ended.append(replica.follow(engines[1], found[1])))
        follower.start()
        lead = replica.Lead(engines[0], found[0])
        lead.admit([Admission(0, "row", (1, 2))])
        assert lead.advance() == "look"
        with pytest.raises(ValueError, match="poison"):  # in both; the runner then resets
            lead.admit([Admission(1, "poison", (3, 4))])
        lead.reset()
        lead.release(1)
        lead.end(3)
        follower.join(5)
        assert ended == [3] and len(engines[0].calls) == 5
        assert engines[1].calls == engines[0].calls


def test_a_follower_that_is_asked_to_stop_tells_the_leader():
    with watches(2) as (found, _):
        follower = threading.Thread(target=replica.follow, args=(Recorder(), found[1], lambda: True))
        follower.start()
        assert eventually(lambda: found[0].stop_asked)
        found[0].send(pickle.dumps(("end", (0,))))
        follower.join(5)


def test_grammars_need_one_process():
    class Grammars(Recorder):
        class settings:
            grammars = True

    with watches(2) as (found, _), pytest.raises(ConfigError, match="accepted: in one process"):
        replica.Lead(Grammars(), found[0])
