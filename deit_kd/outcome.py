"""What a complete run leaves beside its metrics: student, card, plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from timm.utils import ModelEmaV3

from deit_kd import analysis, release
from deit_kd.classification import Classification
from deit_kd.files import warn
from deit_kd.text import for_terminal


def write(
    task: Classification, output: Path, ema: ModelEmaV3 | None, class_names: Sequence[str], say: Callable[[str], None]
) -> None:
    """Exports the student, on the main process; a card or plots that fail are a warning, because the student is there.

    Raises:
        UserError: the exported student gives other logits.
        OSError: the student cannot be written.
    """
    student = task.whole(task.student if ema is None else ema.module)
    if not task.accelerator.is_main_process:
        return
    licences = [teacher.info.license for teacher in task.teachers]
    licences += [task.origin["license"]] if task.recipe.finetune else []
    release.export_student(student, output / "student", task.recipe, class_names, licences)
    say(f"student {output / 'student'}")
    for name, make, again in (
        ("card", release.write_card, f"deit-kd card {output}"),
        ("plots", analysis.plot_run, "the same command"),
    ):
        try:
            make(output)
        except Exception as error:  # a disk, a name, a licence, a font: the weights are worth more than their description
            reason = for_terminal(" ".join(str(error).split())[:300]) or type(error).__name__
            warn(f"no {name} ({reason}); the student is whole, make the {name} again with {again}")
        else:
            say(f"{name:<7} {output / ('student/README.md' if name == 'card' else 'plots')}")
