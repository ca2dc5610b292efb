"""A signal ends a run within seconds with 128 + n, its workers with it; a second one ends it at once."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from ftp_lightning import __main__ as command_line
from ftp_lightning import stopping

sys.path.insert(0, str(Path(__file__).parent / "faults"))

import kill  # noqa: E402


def sleeping():
    while True:
        time.sleep(0.01)


def deaf():
    """A loop that swallows what it is told."""
    while True:
        try:
            time.sleep(0.01)
        except BaseException:  # noqa: B036  that is the test
            continue


class Slow:
    def __del__(self):
        sleeping()


def in_a_callback():
    """Python ignores errors in a finaliser, and goes on."""
    thing = Slow()
    del thing
    time.sleep(60)


def passed_off():
    """A library that makes an error of its own of whatever comes."""
    try:
        sleeping()
    except BaseException as error:
        raise RuntimeError("Caught an unknown exception!") from error


def in_a_library():
    """A call into C that goes on when a signal has come, so that Python's handlers are never run."""
    libc = ctypes.CDLL(None)
    semaphore = ctypes.create_string_buffer(64)
    libc.sem_init(semaphore, 0, 0)
    for number in stopping.SIGNALS:
        libc.siginterrupt(int(number), 0)
    libc.sem_wait(semaphore)


def unhurried():
    with stopping.unhurried():
        deaf()


def finishing():
    """Takes its time to leave, as a step of training does, and has then an exit status of its own."""
    with stopping.unhurried():
        try:
            sleeping()
        except stopping.Stopped:
            time.sleep(0.5)
            os._exit(7)


def signalled(work, numbers, pause=0.5, patience=0.3, before=lambda: None):
    """(status, seconds from the first signal) of a command line that does `work`, in a process of its own."""
    come, ready = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            before()
            stopping.PATIENCE = patience

            def run(argv):
                os.write(ready, b"x")
                work()

            command_line._run = run
            os._exit(command_line.main(["search"]))
        finally:
            os._exit(99)
    os.read(come, 1)
    time.sleep(0.05)
    began = time.monotonic()
    for number in numbers:
        os.kill(child, number)
        time.sleep(pause)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - began - pause * len(numbers)


@pytest.mark.parametrize("number", stopping.SIGNALS)
@pytest.mark.parametrize("work", [sleeping, deaf, passed_off, in_a_callback, in_a_library])
def test_every_signal_ends_a_run_whatever_it_is_doing(work, number):
    assert signalled(work, [number])[0] == 128 + number


def test_a_signal_that_comes_in_a_finaliser_does_not_wait_for_patience():
    for number in stopping.SIGNALS:
        status, seconds = signalled(in_a_callback, [number], patience=30)
        assert status == 128 + number and seconds < 25


def test_a_second_signal_does_not_wait_for_what_is_finished_first():
    assert signalled(unhurried, [signal.SIGTERM, signal.SIGINT])[0] == 128 + signal.SIGINT


def test_the_same_signal_told_twice_at_once_is_one(monkeypatch):
    monkeypatch.setattr(stopping, "SAME", 60.0)  # "at once" on a busy machine
    assert signalled(finishing, [signal.SIGTERM, signal.SIGTERM], pause=0.1)[0] == 7


def test_signals_that_the_parent_has_blocked_are_heard():
    def blocked():
        signal.pthread_sigmask(signal.SIG_BLOCK, stopping.SIGNALS)

    assert signalled(sleeping, [signal.SIGUSR1], before=blocked)[0] == 128 + signal.SIGUSR1


def test_a_shell_may_have_the_interrupt_ignored_but_nohup_is_obeyed():
    def background():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def nohup():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    assert signalled(sleeping, [signal.SIGINT], before=background)[0] == 130
    assert signalled(sleeping, [signal.SIGHUP, signal.SIGTERM], before=nohup)[0] == 128 + signal.SIGTERM


@pytest.mark.parametrize("gone", ["a pipe that nobody reads", "/dev/full"])
def test_a_stream_that_is_gone_changes_no_status(gone):
    """As that of a terminal which is closed: SIGHUP comes with it."""

    def before():
        reader, stream = os.pipe()
        os.close(reader)
        sys.stderr = open(gone if gone.startswith("/") else stream, "w")

    assert signalled(sleeping, [signal.SIGHUP], before=before)[0] == 128 + signal.SIGHUP


def test_a_forked_process_that_lives_on_holds_nothing_up():
    began = time.monotonic()
    with stopping.heeding():
        child = os.fork()
        if child == 0:
            time.sleep(20)
            os._exit(0)
    taken = time.monotonic() - began
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert taken < 15


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    with stopping.heeding():
        assert [signal.getsignal(number) for number in stopping.SIGNALS] != before
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1]) == {signal.SIGUSR1}


def test_workers_end_with_their_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import multiprocessing, time\n"
        "from ftp_lightning import stopping\n"
        "def work(queue):\n"
        "    stopping.end_with_parent()\n"
        "    queue.put(1)\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    queue = context.Queue()\n"
        "    worker = context.Process(target=work, args=(queue,))\n"
        "    worker.start()\n"
        "    queue.get()\n"
        "    print(worker.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    import subprocess

    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{worker}/stat").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.02)
    else:
        assert not Path(f"/proc/{worker}").exists()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Undisturbed folders of the stages, and how long each took."""
    kill._import_all()
    folder = tmp_path_factory.mktemp("base")
    return folder, {
        name: kill.run(kill.arguments_of(name, folder, folder / name)).seconds for name in ("search", "train", "run")
    }


@pytest.mark.slow
@pytest.mark.parametrize("number", stopping.SIGNALS)
@pytest.mark.parametrize("name", ["search", "train", "run"])
def test_a_stage_that_is_stopped_anywhere_comes_to_the_same_result(base, tmp_path, name, number):
    """At 20 moments, spread over the time that it takes. `run`: half an hour for all signals."""
    folder, took = base
    whole = kill.files(folder / name, name)
    for turn in range(20):
        output = tmp_path / str(turn)
        after = took[name] * (turn + 0.5) / 20
        ended, left_in = kill.signalled(kill.arguments_of(name, folder, output), number, after)
        assert kill.heeded(ended, number, output) and left_in < 5.5, (turn, left_in, ended)
        assert kill.run(kill.arguments_of(name, folder, output)).status == 0
        assert kill.differences(whole, kill.files(output, name)) == []
