"""What a signal asks for, in a real process."""

from __future__ import annotations

import signal

from conftest import run_script

SCRIPT = """
import os, signal, time
from deit_kd.vote import Stop

with Stop() as stop:
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    print(stop.requested, flush=True)
    time.sleep(1.2)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here", flush=True)
"""


def test_signals_of_one_moment_are_one_request_and_a_later_one_ends_at_once() -> None:
    done = run_script("-c", SCRIPT)
    assert done.stdout == "True\n"
    assert done.returncode == -signal.SIGTERM
