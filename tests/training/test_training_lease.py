"""Who may train: exactly one at a time, and never nobody."""

import json
import os
import signal
import threading
import time

import pytest
from interrupted_training import SCHEDULE
from rich.console import Console
from test_training_resume import start, wait_for
from training_data import CPU, make_data, small_network

from robustbench_local import leases
from robustbench_local.defenses import Standard
from robustbench_local.training import Schedule, fit, weights_key
from robustbench_local.training.store import LeaseLost, Shelf, trainings

BRIEF = Schedule(epochs=1, batch_size=32, learning_rate=0.01)
LEASE = 0.8


@pytest.fixture(autouse=True)
def short_lease(monkeypatch):
    monkeypatch.setattr(leases, "LEASE", LEASE)
    monkeypatch.setattr(leases, "HEARTBEAT", LEASE / 4)


def lease_file(cache):
    key = weights_key(make_data(), Standard(), BRIEF, seed=0, key={})
    path = cache / "training" / f"{key}.lease"
    path.parent.mkdir(parents=True)
    return path


def train(cache, console=None):
    return fit(small_network, make_data(), Standard(), BRIEF, seed=0, device=CPU, cache=cache,
               key={}, console=console)  # fmt: skip


def of(host, pid, *, mode="lease"):
    return f"filelock/2\npid={pid}\nhost={host}\nmode={mode}\ntoken=ab\nduration={LEASE!r}\n"


def dead_process():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


OFF = of("another-machine", 1)


@pytest.mark.parametrize(
    ("content", "age"),
    [("", 0), ("\0\xff torn", 0), (OFF[:20], 0), (OFF, 0), (OFF, 1e7), (OFF, -1e7)],
    ids=["empty", "damaged", "half", "of a machine that is off", "old", "of the future"],
)
def test_a_lease_that_nobody_renews_is_taken_over(tmp_path, content, age):
    path = lease_file(tmp_path)
    path.write_bytes(content.encode("latin1"))
    os.utime(path, (time.time() - age,) * 2)
    began = time.monotonic()
    assert not train(tmp_path).cached
    # Whatever the clock on the file says; spoilt ones wait for 2 more seconds in the library.
    assert 0.5 < time.monotonic() - began < 10
    assert len(trainings(tmp_path)) == 1 and not path.exists()


def test_a_lock_of_an_older_version_is_in_nobodys_way(tmp_path):
    lease_file(tmp_path).with_suffix(".lock").touch()
    assert not train(tmp_path).cached


def test_the_lease_of_a_dead_process_of_this_machine_is_taken_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "LEASE", 60.0)
    path = lease_file(tmp_path)
    shelf = Shelf(tmp_path, path.stem)
    with shelf.lock(None):
        record = path.read_text()
    path.write_text(record.replace(f"pid={os.getpid()}", f"pid={dead_process()}"))
    began = time.monotonic()
    train(tmp_path)
    assert time.monotonic() - began < 10


def test_a_lease_that_is_renewed_is_waited_for(tmp_path, capsys):
    path = lease_file(tmp_path)
    path.write_text(of("another-machine", 17))
    over = threading.Event()

    def live():
        for _ in range(15):
            time.sleep(LEASE / 5)
            os.utime(path)
        over.set()
        path.unlink()

    thread = threading.Thread(target=live)
    thread.start()
    train(tmp_path, Console(stderr=True))
    assert over.is_set()
    thread.join()
    said = capsys.readouterr().err
    assert said.count("trains the same weights") == 1 and "process 17 on another-machine" in said


def test_a_holder_notices_that_it_was_replaced(tmp_path):
    path = lease_file(tmp_path)
    with Shelf(tmp_path, path.stem).lock(None) as hold:
        hold.check()
        time.sleep(2 * LEASE)  # renewed meanwhile
        hold.check()
        path.unlink()
        path.write_text(of("another-machine", 17))
        with pytest.raises(LeaseLost):
            hold.check()
    assert "another-machine" in path.read_text()  # which is left alone


@pytest.mark.slow
def test_of_two_that_wait_for_a_process_that_is_killed_one_trains(tmp_path):
    first = start(tmp_path, MEET_IN=str(tmp_path))
    wait_for(lambda: list(tmp_path.glob("started-*")))
    waiting = [start(tmp_path) for _ in range(2)]
    for process in waiting:
        assert f"{first.pid} on" in process.stderr.readline()
    interrupted = start(tmp_path)
    assert "waiting" in interrupted.stderr.readline()
    interrupted.send_signal(signal.SIGINT)
    interrupted.communicate(timeout=30)
    assert interrupted.returncode != 0
    first.kill()
    first.communicate()
    began = time.monotonic()
    answers = [json.loads(process.communicate()[0]) for process in waiting]
    assert time.monotonic() - began < 30  # at once, not after a lease of two minutes
    assert sorted(answer["cached"] for answer in answers) == [False, True]
    assert len({answer["sha256"] for answer in answers}) == 1
    assert len(trainings(tmp_path)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("finished", [True, False], ids=["which has ended", "which still trains"])
def test_a_stopped_process_that_wakes_up_gives_way_to_who_took_over(tmp_path, finished):
    steps = 96 // SCHEDULE.batch_size
    file = tmp_path / "stopped"
    first = start(tmp_path, STOP_AT=f"{steps + 2} {file}", LEASE="2")
    wait_for(file.exists)
    # The second one goes on from the state of the first epoch; so it is not asked at step 0.
    second = start(tmp_path, LEASE="2", **({} if finished else {"STOP_AT": f"{2 * steps} {file}2"}))
    if finished:
        second.wait(60)
    else:
        wait_for((tmp_path / "stopped2").exists)
    first.send_signal(signal.SIGCONT)
    if not finished:
        time.sleep(0.5)  # less than a lease: the second one is alive
        second.send_signal(signal.SIGCONT)
    answers = [json.loads(process.communicate(timeout=60)[0]) for process in (first, second)]
    assert [answer["cached"] for answer in answers] == [True, False]
    assert answers[0]["sha256"] == answers[1]["sha256"]
    assert len(trainings(tmp_path)) == 1
    assert not list(tmp_path.rglob("*.damaged")) and not list(tmp_path.rglob("*.lease"))
