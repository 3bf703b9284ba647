"""Losses, projectors and students of users: the page that explains them, run; exact over layouts; and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from torch import Tensor

from deit_kd import losses
from deit_kd import recipe as recipes
from deit_kd.errors import UserError
from deit_kd.files.imports import import_file
from deit_kd.models import projectors
from deit_kd.recipe.objectives import FEATURE_OBJECTIVES, LOGIT_OBJECTIVES, PROJECTORS
from deit_kd.training.metrics import read_metrics

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


@pytest.fixture
def clean() -> Iterator[None]:
    before = [dict(rows) for rows in (LOGIT_OBJECTIVES, FEATURE_OBJECTIVES, PROJECTORS)]
    yield
    for rows, kept in zip((LOGIT_OBJECTIVES, FEATURE_OBJECTIVES, PROJECTORS), before, strict=True):
        rows.clear()
        rows.update(kept)  # type: ignore[call-overload]


def of_page(file: Path, output: Path, *more: str) -> list[str]:
    words = [str(file) if word == "my_losses.py" else str(output) if word == "runs/own" else word for word in COMMAND]
    return [*words, *SHORT, *SMALL, *more]


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


def test_a_users_loss_that_couples_samples_is_exact_over_layouts(file: Path, tmp_path: Path) -> None:
    """Whole, accumulated, and in two processes: the same terms of two steps."""
    common = ["augmentation.label_smoothing=0.1", "student.drop_path=0"]
    launches = {
        "whole": ([sys.executable, "train.py"], []),
        "accumulated": ([sys.executable, "train.py"], ["--device-batch-size", "4"]),
        "two": ([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"], []),
    }
    terms = {}
    for name, (launch, more) in launches.items():
        words = of_page(file, tmp_path / name, *common)
        done = subprocess.run([*launch, *words, *more], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        terms[name] = [(line["loss"], line["feature"]) for line in read_metrics(tmp_path / name) if line["kind"] == "train"]
    for name in ("accumulated", "two"):
        torch.testing.assert_close(torch.tensor(terms[name]), torch.tensor(terms["whole"]), rtol=2e-5, atol=0)


def my_loss(student: Tensor, teacher: Tensor, scale: float = 1.0) -> Tensor:
    return scale * (student - teacher).square().mean()


@pytest.mark.parametrize(
    ("register", "fault"),
    [
        (lambda: losses.register(losses.dist, compares="logits"), "there is a loss dist already; rename yours"),
        (lambda: losses.register(3, compares="logits"), "needs a function with a name, got 3"),  # type: ignore[arg-type]
        (
            lambda: losses.register(my_loss, compares="features", keys={"power": losses.Key()}),
            "my_loss has no parameter power; add it, or leave it out of keys",
        ),
        (lambda: losses.register(my_loss, compares="logits", reads_labels=True), "my_loss has no parameter labels"),
        (lambda: projectors.register(torch.nn.Linear, keys={"rank": projectors.Key()}), "Linear has no parameter rank"),
    ],
)
def test_what_cannot_be_registered(register: Callable[[], object], fault: str, clean: None) -> None:
    with pytest.raises(UserError, match=re.escape(fault)):
        register()


def test_keys_of_a_users_loss_are_checked_as_others_are(clean: None) -> None:
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
            "line 2: losses.register: there is a loss dist",
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
