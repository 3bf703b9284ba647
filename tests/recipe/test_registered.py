"""Losses, projectors and students of users: the page that explains them, run; exact over layouts; and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from conftest import ROOT
from deit_kd import losses
from deit_kd import recipe as recipes
from deit_kd.data import Batch
from deit_kd.data.build import open_data
from deit_kd.distributed.global_batch import GlobalBatch
from deit_kd.errors import UserError
from deit_kd.files.imports import import_file
from deit_kd.models import StudentOutput, TeacherOutput, projectors
from deit_kd.models.build import build_teachers
from deit_kd.models.projectors.vectors import build_projector
from deit_kd.recipe.objectives import LOGIT_OBJECTIVES
from deit_kd.tasks.distillation import TeacherTerms
from deit_kd.training.metrics import read_metrics
from programs import run_script

PAGE = (ROOT / "docs" / "extending.md").read_text()
(CODE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMAND = next(line.split()[2:] for line in PAGE.splitlines() if line.startswith("python train.py --import"))
SHORT = ["--device", "cpu", "--max-steps", "2", "epochs=2", "global_batch_size=16", "run.workers=0", "run.log_every_steps=1"]
SMALL = ["student.model_args={patch_size: 7, embed_dim: 48, num_heads: 3}", "run.precision=no"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "my_losses.py"
    path.write_text(CODE)
    return path


def of_page(file: Path, output: Path, *more: object) -> list[str]:
    words = [str(file) if word == "my_losses.py" else str(output) if word == "runs/own" else word for word in COMMAND]
    return [*words, *SHORT, *SMALL, *map(str, more)]


@pytest.mark.slow
def test_the_page_trains_and_the_card_names_the_file(file: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = run_script("train.py", *of_page(file, output))
    assert done.returncode == 0, done.stderr
    card = (output / "student" / "README.md").read_text()
    (digest,) = json.loads((output / "run.json").read_text())["imports"].values()
    assert "| Own code | `my_losses.py`" in card
    assert digest[:16] in card
    again = run_script("train.py", "--recipe", output, "--device", "cpu")
    assert again.returncode == 2
    assert "the run used my_losses.py; give --import with its path" in again.stderr
    changed = tmp_path / "my_losses.py"
    changed.write_text(f"{CODE}\n# changed\n")
    other = run_script("train.py", *of_page(changed, output, "epochs=2"))
    assert other.returncode == 2
    assert "imports: my_losses.py" in other.stderr
    assert "import my_losses  # the file that registers the architecture" in card
    without = run_script("-m", "deit_kd", "evaluate", output, "--device", "cpu")
    assert without.returncode == 2
    assert "timm knows no 'my_deit'; give --import with the path of 'my_losses.py', which registers it" in without.stderr
    looked = run_script("-m", "deit_kd", "evaluate", output, "--import", file, "--output", tmp_path / "report", "--device", "cpu")
    assert looked.returncode == 0, looked.stderr


@pytest.mark.slow
def test_two_processes_import_the_file(file: Path, fashion_folder: Path, tmp_path: Path) -> None:
    """They log the terms of one process; tests/distributed/test_global_batch.py has more layouts, in float64."""
    data = ["--data", fashion_folder, "data.source=image_folder", "teacher.weights=random", "student.drop_path=0"]
    terms = []
    for launch in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]):
        output = tmp_path / str(len(launch))
        done = run_script(*launch, "train.py", *of_page(file, output, *data))
        assert done.returncode == 0, done.stderr
        terms.append([(line["loss"], line["feature"]) for line in read_metrics(output) if line["kind"] == "train"])
    torch.testing.assert_close(torch.tensor(terms[1]), torch.tensor(terms[0]), rtol=2e-5, atol=0)


def my_loss(student: Tensor, teacher: Tensor, scale: float = 1.0) -> Tensor:
    return scale * (student - teacher).square().mean()


def needs_scale(student: Tensor, teacher: Tensor, scale: float) -> Tensor:
    return scale * (student - teacher).abs().mean()


def test_labels_come_by_name_and_a_changed_function_replaces_the_one_before(forgets: None) -> None:
    def labelled(student: Tensor, teacher: Tensor, scale: float, labels: Tensor) -> Tensor:
        return scale * (student - teacher)[torch.arange(len(labels)), labels].square().mean()

    for scale in (1, 2):
        losses.register(labelled, compares="logits", keys={"scale": losses.Key(at_least=scale)}, reads_labels=True)
    assert LOGIT_OBJECTIVES["labelled"].keys["scale"].at_least == 2
    recipe = recipes.load("quickstart", ["distill.kd_loss=labelled", "distill.parameters.scale=3"])
    (distillation,) = recipe.distillations()
    accelerator = Accelerator(cpu=True)
    global_batch = GlobalBatch(accelerator, 1)
    teacher = build_teachers(recipe, open_data(recipe.data, None)[0].class_names)[0]
    terms = TeacherTerms(distillation.distill, 0, 0, teacher, None, global_batch, epochs=1, seed=0, sees_global_batch=True)
    ours, theirs, targets = torch.randn(4, 10), torch.randn(4, 10), torch.eye(10)[[3, 1, 4, 1]]
    batch = Batch(torch.zeros(4, 3, 28, 28), targets, targets.argmax(1), torch.arange(4), 0, 0)
    value = terms.kd(StudentOutput(ours, (ours,), ()), TeacherOutput(theirs, theirs, {}), batch)
    difference = (ours - theirs)[torch.arange(4), targets.argmax(1)]
    torch.testing.assert_close(value, 3 * difference.square().mean())


@pytest.mark.parametrize(
    ("loss", "fault"),
    [
        (lambda s, t: (s - t).square().mean(1), r"must return a 0-d tensor, got one of shape \[4\]"),
        (lambda s, t: (s - t).square().mean().item(), "must return a 0-d tensor, got float"),
        (lambda s, t: (s - t).square().mean().detach(), "has no gradient to the student"),
    ],
)
def test_what_a_users_loss_returns(loss: Callable[[Tensor, Tensor], Any], fault: str, forgets: None) -> None:
    def mine(student: Tensor, teacher: Tensor) -> Any:
        return loss(student, teacher)

    losses.register(mine, compares="features")
    with pytest.raises(UserError, match=f"loss mine: .*{fault}"):
        losses.function_of("mine")(torch.randn(4, 3, requires_grad=True), torch.randn(4, 3))


def test_a_projector_that_is_no_module_is_one_line(forgets: None) -> None:
    def nothing(student_width: int, teacher_width: int) -> None:
        return None

    projectors.register(nothing)  # type: ignore[arg-type]
    (distillation,) = recipes.load("quickstart", ["projector.kind=nothing"]).distillations()
    with pytest.raises(UserError, match="projector.kind: nothing must return a module, got NoneType"):
        build_projector(distillation.projector, 3, 4)


@pytest.mark.parametrize(
    ("register", "fault"),
    [
        (lambda: losses.register(losses.dist, compares="logits"), "the name dist is taken; rename yours"),
        (lambda: losses.register(3, compares="logits"), "needs a function or a class with a name, got 3"),  # type: ignore[arg-type]
        (
            lambda: losses.register(my_loss, compares="features", keys={"power": losses.Key()}),
            "my_loss has no parameter power after the first two; add it, or leave it out of keys",
        ),
        (lambda: losses.register(my_loss, compares="logits", reads_labels=True), "my_loss has no parameter labels"),
        (
            lambda: losses.register(needs_scale, compares="logits"),
            "needs_scale has a parameter scale without a value; add it to keys",
        ),
        (
            lambda: losses.register(my_loss, compares="features", taps=("poled",)),
            "my_loss compares the tap 'poled', which does not exist",
        ),
        (lambda: losses.register(my_loss, compares="features", paper="Me, 2026"), "paper of my_loss must be a BibTeX entry"),
        (
            lambda: losses.register(my_loss, compares="features", projector="liner"),
            "needs the projector 'liner', which does not exist",
        ),
        (lambda: losses.register(my_loss, compares="logits", any_width=True), "are for compares='features'; leave them out"),
        (lambda: losses.register(my_loss, compares="maps"), "compares must be 'logits' or 'features', got 'maps'"),  # type: ignore[arg-type]
        (lambda: losses.register(torch.dot, compares="logits"), "dot is not written in Python"),
        (lambda: projectors.register(torch.nn.Linear, keys={"rank": projectors.Key()}), "Linear has no parameter rank"),
    ],
)
def test_what_cannot_be_registered(register: Callable[[], object], fault: str, forgets: None) -> None:
    with pytest.raises(UserError, match=re.escape(fault)):
        register()


def test_keys_of_a_users_loss_are_checked_as_others_are(forgets: None) -> None:
    losses.register(my_loss, compares="features", keys={"scale": losses.Key(above=0, at_most=10)})
    loads = ["distill.feature_loss=my_loss"]
    assert recipes.load("quickstart", [*loads, "distill.parameters.scale=2"]).distill is not None
    for more, fault in (
        ([], "distill.parameters.scale: missing"),
        (["distill.parameters.scale=0"], "distill.parameters.scale: must be above 0, got 0"),
        (["distill.parameters.scale=11"], "distill.parameters.scale: must be at most 10, got 11"),
        (["distill.parameters.scale=big"], "distill.parameters.scale: must be a number, got big"),
        (["distill.parameters.scale=1", "distill.parameters.power=1"], "distill.parameters.power: nothing reads it; leave it out"),
    ):
        with pytest.raises(recipes.RecipeError, match=re.escape(fault)):
            recipes.load("quickstart", [*loads, *more])
    with pytest.raises(recipes.RecipeError, match=r"distill.feature_loss: must be .* got 'my_los' \(did you mean my_loss\?\)"):
        recipes.load("quickstart", ["distill.feature_loss=my_los"])


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("import torch\n\nx = 1 / 0\n", "line 3: ZeroDivisionError: division by zero"),
        ("def f(:\n", "line 1: SyntaxError"),
        (
            "from deit_kd import losses\nlosses.register(losses.dist, compares='logits')\n",
            "line 2: losses.register: the name dist is taken",
        ),
        (None, "is no Python file"),
    ],
)
def test_a_file_that_cannot_be_imported_is_one_line(content: str | None, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=re.escape(fault)) as raised:
        import_file(path)
    assert "\n" not in str(raised.value)
