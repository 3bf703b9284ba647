"""What a signal asks for, in a real process."""

from __future__ import annotations

import signal

from conftest import run_script

SCRIPT = """
import os, signal, time
from deit_kd.stop import Stop

with Stop() as stop:
    if os.fork() == 0:  # as a loading process does
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    os.wait()
    time.sleep(0.3)
    print(stop.requested, flush=True)
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.3)
    print(stop.requested, flush=True)
    time.sleep(1.2)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
    print("still here", flush=True)
"""

WAITING = """
import ctypes, os, signal, subprocess, sys
from deit_kd.stop import Stop

with Stop():
    killer = f"import os, time; [(time.sleep(pause), os.kill({os.getpid()}, 15)) for pause in (0.5, 1.5)]"
    subprocess.Popen([sys.executable, "-c", killer])
    read, write = os.pipe()
    libc = ctypes.CDLL(None)
    while True:  # in C until something comes, as in a collective whose peer hangs; interrupted calls are taken up again
        libc.read(read, ctypes.create_string_buffer(1), 1)
"""


def test_signals_of_one_moment_are_one_request_and_a_later_one_ends_at_once() -> None:
    done = run_script("-c", SCRIPT)
    assert done.stdout == "False\nTrue\n"
    assert done.returncode == 128 + signal.SIGTERM


def test_a_process_that_waits_for_another_ends_at_the_second_signal_too() -> None:
    assert run_script("-c", WAITING, timeout=20).returncode == 128 + signal.SIGTERM
