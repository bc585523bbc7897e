"""Ctrl-C and SIGTERM: a command saves first and says how to go on; a second Ctrl-C ends it at once."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from nabla_gfn_jax.stopping import stoppable
from nabla_gfn_jax.train import typed

# A command whose main thread is in one long operation, in which Python runs no signal handler.
# Programs in the background of a script are told to ignore some signals, and tests may run so: it listens first.
COMMAND = """
import hashlib, signal, sys, time
from nabla_gfn_jax.stopping import stoppable

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN if number in {ignored} else signal.SIG_DFL)

def save():
    print("saving", file=sys.stderr, flush=True)
    time.sleep({saving})
    {then}
    return "saved"

with stoppable("run this again") as stopping:
    if {armed}:
        stopping.save_first(save)
    with stopping.writing:
        print("ready", flush=True)
        time.sleep({writing})
        print("written", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes, without Python's lock, as JAX works
"""


def start(*, saving=0.0, writing=0.0, armed=True, then="pass", ignored=()):
    text = COMMAND.format(saving=saving, writing=writing, armed=armed, then=then, ignored=tuple(map(int, ignored)))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", text], **pipes)
    first = b""
    while not first.endswith(b"\n"):  # byte by byte: what else is there already is for `end`
        first += os.read(process.stdout.fileno(), 1) or b"ended\n"
    assert first == b"ready\n"
    return process


def end(process, seconds=15):
    try:
        out, error = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, out, error.strip().splitlines()


@pytest.mark.parametrize(
    ("number", "name", "code"),
    [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143), (signal.SIGHUP, "SIGHUP", 129)],
)
def test_a_signal_saves_and_says_how_to_go_on(number, name, code):
    process = start()
    process.send_signal(number)
    said = [f"{name}: saves and ends; Ctrl-C again ends at once", "saving", "saved", "run this again"]
    assert end(process) == (code, "written\n", said)


def test_what_is_being_written_is_finished_first():
    process = start(writing=1.0)
    process.send_signal(signal.SIGTERM)
    code, out, error = end(process)
    assert (code, out, error[1]) == (143, "written\n", "saving")


def test_a_second_ctrl_c_ends_at_once_though_saving_hangs():
    process = start(saving=1000)
    process.send_signal(signal.SIGINT)
    assert [process.stderr.readline() for _ in range(3)][-1] == "saving\n"
    process.send_signal(signal.SIGINT)  # by a wrapper that sends it on: the same Ctrl-C
    time.sleep(0.6)
    assert process.poll() is None
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, _, _ = end(process, 5)
    assert code == 130
    assert time.monotonic() - sent < 2


def test_before_there_is_something_to_save_a_signal_ends_the_command_too():
    process = start(armed=False)
    process.send_signal(signal.SIGTERM)
    code, _, error = end(process)
    assert (code, error[1:]) == (143, ["run this again"])


def test_a_save_that_fails_ends_the_command_and_says_why():
    process = start(then="raise OSError('the disk is full')")
    process.send_signal(signal.SIGINT)
    code, _, error = end(process)
    assert (code, error[2:]) == (130, ["error: the disk is full", "run this again"])


def test_an_ignored_signal_stays_ignored():
    """`nohup` ignores SIGHUP, and a shell ignores SIGINT in its background jobs."""
    process = start(ignored=[signal.SIGHUP])
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 143


def test_afterwards_signals_do_what_they_did():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    threads = threading.active_count()
    with stoppable("") as stopping:
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert stopping.requested == 0
    for _ in range(100):
        if threading.active_count() == threads:
            break
        time.sleep(0.02)
    assert threading.active_count() == threads


def test_a_thread_may_train():
    """Only the main thread may change what a signal does."""
    seen = []

    def run():
        with stoppable("") as stopping:
            seen.append(stopping)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["nabla-gfn train", "--config=emoji"], "nabla-gfn train --config=emoji"),
        (["/x/nabla_gfn_jax/train.py"], "python -m nabla_gfn_jax.train"),
        (["train", "--config.prompts=my prompts.txt:a"], "train '--config.prompts=my prompts.txt:a'"),
    ],
)
def test_the_command_can_be_typed_again(argv, expected):
    assert typed(argv) == expected
