"""What a complete run leaves beside its metrics: student, card, plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from timm.utils import ModelEmaV3

from deit_kd import export, plots
from deit_kd.files.warn import warn
from deit_kd.recipe import Recipe
from deit_kd.text import for_terminal
from deit_kd.training.best import Best
from deit_kd.training.metrics import Tracker
from deit_kd.training.task import Task


def write(
    task: Task,
    recipe: Recipe,
    accelerator: Accelerator,
    output: Path,
    ema: ModelEmaV3 | None,
    best: Best | None,
    class_names: Sequence[str],
    tracker: Tracker,
) -> None:
    """Exports the student, on the main process; a card or plots that fail are a warning, because the student is there.

    Raises:
        UserError: the exported student gives other logits.
        OSError: the student cannot be written.
    """
    student = task.unsharded(task.student if ema is None else ema.module)
    if not accelerator.is_main_process:
        return
    if best is not None:
        best.put_into(student, output, tracker)
    licenses = [teacher.info.license for teacher in task.teachers]
    origin = task.facts()["finetuned_from"]
    licenses += [origin["license"]] if origin else []
    export.export_student(
        student, output / "student", recipe.data, recipe.evaluation, recipe.student.model_args, class_names, licenses
    )
    say = accelerator.print
    say(f"student {output / 'student'}")
    for name, make, again in (
        ("card", export.write_card, f"deit-kd card {output}"),
        ("plots", plots.plot_run, "the same command"),
    ):
        try:
            make(output)
        except Exception as error:  # a disk, a name, a license, a font: the weights are worth more than their description
            reason = for_terminal(" ".join(str(error).split())[:300]) or type(error).__name__
            warn(f"no {name} ({reason}); the student is whole, make the {name} again with {again}")
        else:
            say(f"{name:<7} {output / ('student/README.md' if name == 'card' else 'plots')}")
