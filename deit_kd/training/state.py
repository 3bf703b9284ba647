"""Everything of a run that changes, saved and put back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from pydantic import Field, model_validator
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from deit_kd.distributed import fsdp
from deit_kd.errors import UserError
from deit_kd.files.atomic import FULL
from deit_kd.files.documents import Document, check
from deit_kd.training import checkpoint, run_files
from deit_kd.training.best import Best
from deit_kd.training.metrics import Tracker

_Finite = Annotated[float, Field(ge=-1e300, le=1e300)]
_Count = Annotated[int, Field(ge=0, le=10**12)]
_Setting = float | bool | str | list[float] | None


class _Window(Document):
    sums: dict[str, Annotated[float, Field(allow_inf_nan=True)]]
    counts: dict[str, Annotated[_Count, Field(ge=1)]]
    seconds: _Finite

    @model_validator(mode="after")
    def _of_the_same(self) -> _Window:
        if self.sums.keys() != self.counts.keys():
            raise ValueError("sums and counts are of other terms")
        return self


class _Optimizer(Document):
    state: dict[str, float | bool | None]
    param_groups: list[dict[str, _Setting | list[_Count]]]


class _Best(Document):
    step: _Count
    value: _Finite


class _State(Document):
    """What state.json says beside the hashes."""

    optimizer: _Optimizer
    window: _Window
    scaler: dict[str, float] | None
    steps_per_epoch: Annotated[_Count, Field(ge=1)]
    recipe: str
    layout: dict[str, int | str]
    depends_on: dict[str, Any] = {}
    folder: dict[str, str] = {}
    best: _Best | None = None


@dataclass
class RunState:
    """Module, optimizer, EMA, scaler and the open log window of a run, and where they are kept."""

    module: nn.Module  # bare
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None
    tracker: Tracker
    accelerator: Accelerator
    folder: Path
    steps_per_epoch: int
    recipe: str  # its fingerprint
    layout: dict[str, Any]  # how the global batch is cut
    depends_on: dict[str, Any]  # what a run that goes on must find again
    keep_checkpoints: int
    on_full_disk: str  # stop or go_on
    best: Best | None = None  # weights to keep beside the last ones
    reached: int = 0  # whole steps
    _saved: int = 0  # of them those that a checkpoint holds

    def save_if_newer(self) -> None:
        """Saves the steps that were reached, unless none was made since the last save; see `save`."""
        if self.reached > self._saved:
            self.save(self.reached)

    def save(self, step: int) -> None:
        """Saves; the checkpoints that are there stay until this one is whole.

        Raises:
            UserError: weights are not finite, or the disk is full and the run is to stop then.
        """
        tensors, rest = checkpoint.pack_optimizer(self.optimizer)
        parts = {"module": self.module.state_dict(), "optimizer": tensors}
        if self.ema is not None:
            parts["ema"] = self.ema.module.state_dict()
        if self.best is not None and self.best.tensors:
            parts["best"] = self.best.tensors
        parts = {name: fsdp.gather(part) for name, part in parts.items()}
        if not all(torch.stack([value.isfinite().all() for value in parts["module"].values()]).tolist()):
            raise UserError(
                f"step {step}: weights are not finite, so they are not saved; go on from {self.folder} with run.precision=no if it "
                "was not, or start anew with a lower optim.lr or a clip_grad"
            )
        fault: list[str | None] = [None]
        window = self.tracker.state()
        if self.accelerator.is_main_process:
            try:
                scaler = self.accelerator.scaler
                state = {
                    "optimizer": rest,
                    "window": window,
                    "scaler": scaler.state_dict() if scaler else None,
                    "steps_per_epoch": self.steps_per_epoch,
                    "recipe": self.recipe,
                    "layout": self.layout,
                    "depends_on": self.depends_on,
                    "folder": run_files.copies(self.folder.parent),
                    "best": self.best.state() if self.best is not None and self.best.tensors else None,
                }
                checkpoint.save(self.folder, step, parts, state, self.keep_checkpoints)
                run_files.note_saved(self.folder.parent)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                fault = [f"no space left on the device of {self.folder}: step {step} is not saved, earlier checkpoints are kept"]
        broadcast_object_list(fault)  # all stop, or none
        if fault[0] and self.on_full_disk == "stop":
            raise UserError(f"{fault[0]}; free some, and give the same command again")
        if fault[0]:
            self.tracker.say(f"{fault[0]}; the run goes on")
        else:
            self._saved = step

    def restore(self, path: Path) -> int:
        """Puts everything of a checkpoint back whose files are whole; returns the step that was reached.

        Raises:
            UserError: the checkpoint is damaged, or of another module, optimizer or data.
        """
        parts, state = checkpoint.load(path, verified=True)
        check(state, str(path / "state.json"), _State, checkpoint.REMEDY)
        if state["steps_per_epoch"] != self.steps_per_epoch:
            self.tracker.say(
                f"{path.name} was saved with {state['steps_per_epoch']} steps an epoch; going on at step {state['step']} with "
                f"{self.steps_per_epoch}"
            )
        try:
            _load(self.module, parts["module"])
            checkpoint.unpack_optimizer(self.optimizer, parts["optimizer"], state["optimizer"])
            if self.ema is not None:
                _load(self.ema.module, parts["ema"])
            if self.best is not None and "best" in parts:
                self.best.restore(state["best"], parts["best"])
            if self.accelerator.scaler and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise UserError(
                f"{path}: does not fit this recipe ({' '.join(str(error).split())[:200]}); give another checkpoint to --resume, or "
                "--resume none, which moves a run aside and begins anew"
            ) from None
        if state["layout"] != self.layout:
            before, now = (
                ", ".join(f"{key} {value}" for key, value in layout.items()) for layout in (state["layout"], self.layout)
            )
            self.tracker.say(f"{path.name} was saved with {before}; going on with {now}")
        self.tracker.restore(state["window"], state.get("folder", {}).get("metrics.jsonl"))
        self.reached = self._saved = int(state["step"])
        return self.reached


def _load(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = module.state_dict()
    module.load_state_dict({name: fsdp.shard_like(value, own[name]) if name in own else value for name, value in tensors.items()})
