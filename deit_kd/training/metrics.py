"""What a run reports: metrics.jsonl (one JSON object a line), a progress bar or plain lines, and Accelerate's trackers."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from deit_kd.files.atomic import FULL, flush, write_text
from deit_kd.files.warn import optional, warn
from deit_kd.text import lines_for_terminal
from deit_kd.training.run_files import parse_line, read_lines

TERM = re.compile(r"(loss|ce|kd|feature)(_\d+)?")  # of several teachers kd_0, kd_1 ...
TIMES = ("seconds", "images_per_second", "seconds_data", "seconds_teacher", "seconds_student")  # differ between equal runs


class Clock:
    """Measures seconds by name. On a GPU it records events, and only `read` waits for them."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    @contextmanager
    def span(self, name: str, host: bool = False) -> Iterator[None]:
        """Times the block; `host` measures the time of the host, such as a wait for data."""
        start = self._mark(host)
        yield
        self._spans[name].append((start, self._mark(host)))

    def _mark(self, host: bool) -> Any:
        if host or not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Seconds since the last call, by name."""
        if self.on_gpu:
            torch.cuda.synchronize()
        seconds = {
            name: sum(end - start if isinstance(start, float) else start.elapsed_time(end) / 1000 for start, end in spans)
            for name, spans in self._spans.items()
        }
        self._spans.clear()
        return seconds


class Window:
    """The steps since the last log: how many, and how long they took without evaluation and saving."""

    def __init__(self, step: int):
        self.step, self.started = step, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the block's time out of the window."""
        before = time.perf_counter()
        yield
        self.started += time.perf_counter() - before

    def close(self, step: int, images_per_step: int, clock: Clock) -> dict[str, float]:
        """Images a second, and seconds a step by part; the next window begins."""
        seconds, steps, now = clock.read(), step - self.step, time.perf_counter()
        rate = steps * images_per_step / (now - self.started)
        self.step, self.started = step, now
        return {"images_per_second": rate, **{f"seconds_{name}": value / steps for name, value in seconds.items()}}


class Tracker:
    """Means over the steps between two logs, kept on the device; only `log` copies them to the host.

    Args:
        accelerator: for averaging over processes and for its trackers.
        folder: the run folder; metrics.jsonl grows there.
        total_steps: of the whole run, for the bar.
        goes_on: a full disk does not end the run.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, total_steps: int, goes_on: bool = False):
        self.accelerator, self.file, self.total_steps = accelerator, folder / "metrics.jsonl", total_steps
        self.goes_on, self._pending, self._said_full = goes_on, "", False
        self._held: str | None = None  # the lines that the checkpoint holds from which the run goes on
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._bar: tqdm[Any] | None = None
        self._started = time.monotonic()
        self._session = (0, time.monotonic())  # the step at which this process began, and when

    def start(self, step: int) -> None:
        """Begins or goes on at `step`; lines of later steps, written before an interruption, are dropped."""
        if not self.accelerator.is_main_process:
            return
        text = read_lines(self.file)
        if self._held is not None and not text.startswith(self._held):
            warn(f"{self.file}: has lost lines; those of the checkpoint take its place")
            text = self._held
        kept = "".join(f"{line}\n" for line in text.split("\n") if _step_of(line) <= step)
        if text or self.file.exists():
            write_text(self.file, kept)
        self._session = (step, time.monotonic())
        if not sys.stderr.isatty():
            self.say(f"start   step {step}/{self.total_steps}  at {time.strftime('%Y-%m-%d %H:%M:%S')}")
        else:
            self._bar = tqdm(total=self.total_steps, initial=step, unit="step", dynamic_ncols=True)

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl of this kind."""
        return [line for line in read_metrics(self.file.parent) if line["kind"] == kind]

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Adds a micro-step's 0-d tensors to the window."""
        for name, value in terms.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def advance(self) -> None:
        """Moves the progress bar by one optimizer step."""
        if self._bar is not None:
            self._bar.update()

    def means(self) -> dict[str, float]:
        """Means over the window and the processes, and a new window. Waits for the device."""
        names = list(self._sums)
        means = self._over_processes([self._sums[name].float() / self._counts[name] for name in names])
        self._sums, self._counts = {}, {}
        return dict(zip(names, means, strict=True))

    def _over_processes(self, values: list[Tensor]) -> list[float]:
        if not values:  # every step of the window was skipped
            return []
        means: list[float] = self.accelerator.reduce(torch.stack(values), reduction="mean").tolist()
        return means

    def state(self) -> dict[str, Any]:
        """The open window, averaged over processes, and the run's seconds so far, for a checkpoint."""
        sums = dict(zip(self._sums, self._over_processes(list(self._sums.values())), strict=True))
        return {"sums": sums, "counts": self._counts, "seconds": time.monotonic() - self._started}

    def restore(self, state: Mapping[str, Any], lines: str | None = None) -> None:
        """Restores what `state` returned; `lines` are those that metrics.jsonl had then, if known."""
        self._held = lines
        device = self.accelerator.device
        self._sums = {name: torch.tensor(value, device=device) for name, value in state["sums"].items()}
        self._counts = dict(state["counts"])
        self._started = time.monotonic() - state["seconds"]

    def log(self, kind: str, step: int, values: Mapping[str, Any], with_the_next: bool = False) -> None:
        """Writes one line of `kind` (train, eval, teacher, projector, skipped), shows it, and passes its numbers to the trackers.

        A line `with_the_next` is written together with the next one, so that a crash loses both or neither.
        """
        if not self.accelerator.is_main_process:
            return
        line = {"kind": kind, "step": step, **values, "seconds": time.monotonic() - self._started}
        self._pending += json.dumps(line) + "\n"
        if not with_the_next:
            self._write()
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        self.accelerator.log({f"{kind}/{name}": value for name, value in numbers.items()}, step=step)
        shown = "  ".join(f"{name} {_short(value)}" for name, value in numbers.items() if not name.startswith("seconds"))
        if kind == "train" and self._bar is not None:
            # A bar has room for these; the rest is in metrics.jsonl.
            terms = {name: value for name, value in numbers.items() if name == "lr" or TERM.fullmatch(name)}
            self._bar.set_postfix_str("  ".join(f"{name} {_short(value)}" for name, value in terms.items()), refresh=False)
        elif kind not in ("projector", "skipped"):
            left = f"  eta {self._eta(step)}" if kind == "train" else ""
            self.say(f"{kind:<7} step {step}/{self.total_steps}  {shown}{left}")

    def _eta(self, step: int) -> str:
        """Hours, minutes and seconds to the last step, at this process's pace so far, evaluations and saves included."""
        first, since = self._session
        pace = (time.monotonic() - since) / max(1, step - first)
        return str(timedelta(seconds=round(pace * (self.total_steps - step))))

    def _write(self) -> None:
        """Appends the pending lines. On a full disk a run that goes on keeps them for the next time and removes half a line."""
        size = self.file.stat().st_size if self.file.exists() else 0
        try:
            with self.file.open("a") as stream:
                stream.write(self._pending)
        except OSError as error:
            with optional(f"truncating {self.file}"):
                os.truncate(self.file, size)
            if not self.goes_on or error.errno not in FULL:
                raise
            if not self._said_full:
                self._said_full = True
                self.say(f"no space left on the device of {self.file}: lines are kept until there is; the run goes on")
            return
        self._pending = ""

    def say(self, text: str) -> None:
        """Prints a line, on the main process."""
        if self.accelerator.is_main_process:
            tqdm.write(lines_for_terminal(text), file=sys.stderr)

    def close(self) -> None:
        """Ends the bar and the trackers."""
        if self._bar is not None:
            self._bar.close()
        if self.accelerator.is_main_process and self.file.exists():
            flush(self.file)
        self.accelerator.end_training()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl, but for damaged ones, such as a last line that a crash cut off.

    Raises:
        UserError: the file cannot be read.
    """
    *lines, last = read_lines(folder / "metrics.jsonl").split("\n")
    found = [(line, parse_line(line)) for line in (*lines, last)]
    if damaged := sum(values is None and bool(line.strip()) for line, values in found[:-1]):
        warn(f"{folder / 'metrics.jsonl'}: {damaged} lines are damaged, and left out")
    return [values for _, values in found if values is not None]


def _step_of(line: str) -> float:
    values = parse_line(line)
    return float("inf") if values is None else float(values["step"])


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
