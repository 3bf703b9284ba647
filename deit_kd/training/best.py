"""run.keep_best: the weights of the best evaluation, exported in the place of the last.

Each checkpoint holds them beside the last weights, so that a resumed run keeps the same best weights as an undisturbed one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from deit_kd.distributed import fsdp
from deit_kd.files.atomic import write_json
from deit_kd.training.metrics import Tracker
from deit_kd.training.run_files import read_run

BIASED = "chosen as the best of all evaluations on these same images, so that their numbers are biased upward"
UNBIASED = "chosen as the best of all evaluations on images held out of training"


class Best:
    """The student's weights, or their EMA's, of the best evaluation so far; of equal ones the first.

    Args:
        accelerator: its main process holds the weights.
        student: whose weights are kept.
        ema: of it, whose weights are kept in their place.
        held_out: whether images held out of training are measured: they choose, but not among EMAs, which they do not measure.
    """

    def __init__(self, accelerator: Accelerator, student: nn.Module, ema: ModelEmaV3 | None, held_out: bool):
        self.accelerator, self.student = accelerator, student if ema is None else ema.module
        self.chosen_by = "ema_top1" if ema is not None else "holdout_top1" if held_out else "top1"
        self.step, self.value = 0, float("-inf")
        self.tensors: dict[str, Tensor] = {}

    def offer(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the weights if their evaluation is the best; all processes must call this with the same metrics."""
        if metrics[self.chosen_by] <= self.value:
            return
        self.step, self.value = step, metrics[self.chosen_by]
        whole = fsdp.gather(self.student.state_dict())
        if self.accelerator.is_main_process:
            self.tensors = {name: value.detach().to("cpu", copy=True) for name, value in whole.items()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the tensors."""
        return {"step": self.step, "value": self.value}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Puts back what a checkpoint has."""
        self.step, self.value = int(state["step"]), float(state["value"])
        self.tensors = dict(tensors) if self.accelerator.is_main_process else {}

    @torch.no_grad()
    def put_into(self, student: nn.Module, output: Path, tracker: Tracker) -> None:
        """Gives the student, in one piece on the main process, these weights; run.json and metrics.jsonl say so.

        Where nothing was better than what a run began with before this key was set, the last weights stay.
        """
        if not self.tensors:
            return
        student.load_state_dict(self.tensors)
        said = {"chosen_by": self.chosen_by, self.chosen_by: self.value}
        if self.step not in {line["step"] for line in tracker.lines("best")[-1:]}:
            tracker.log("best", self.step, said)
        note = how(self.chosen_by, tracker.lines("eval"), self.value)
        write_json(output / "run.json", {**read_run(output), "exported": {"step": self.step, **said, "note": note}})


def how(chosen_by: str, evaluations: Sequence[Mapping[str, Any]] = (), value: float = 0.0) -> str:
    """How weights were chosen, and what that does to their numbers.

    Args:
        chosen_by: which number of an evaluation.
        evaluations: all of the run. Better ones took no part: they were made before run.keep_best was set.
        value: that number of the chosen ones.
    """
    text = UNBIASED if chosen_by == "holdout_top1" else BIASED
    better = [line["step"] for line in evaluations if line.get(chosen_by, float("-inf")) > value]
    return text.replace("all evaluations", f"the evaluations after step {max(better)}") if better else text


def exported(metrics: list[dict[str, Any]], run: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """(the evaluation of the weights that a run exported, how they were chosen); None: they are the last.

    Args:
        metrics: lines of metrics.jsonl; of a run that was not evaluated, the evaluation is empty.
        run: run.json.
    """
    evaluations = [line for line in metrics if line["kind"] == "eval"]
    if not run.get("exported") or not evaluations:
        return evaluations[-1] if evaluations else {}, None
    step = run["exported"]["step"]
    found = next((line for line in reversed(evaluations) if line["step"] == step), evaluations[-1])
    return found, run["exported"].get("note") or how(run["exported"]["chosen_by"])
