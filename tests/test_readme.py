"""What the README tells people to type, typed: in a copy of the project under a path with spaces, from another directory."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from conftest import ROOT
from deit_kd import recipe as recipes
from programs import Program, run_script

README = (ROOT / "README.md").read_text()
# docs/extending.md is typed by tests/recipe/test_registered.py, with the file that it shows
PAGES = [README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")) if path.stem != "extending")]
BASH = [
    line.split("#")[0].strip()
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    for line in block.splitlines()
    if line.split("#")[0].strip()
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git knows, with a .venv that is this environment."""
    target = tmp_path_factory.mktemp("with spaces") / "deit kd"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, listed):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    environment = target / ".venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (environment / "bin" / "python").chmod(0o755)
    for lock in ("requirements.lock", "requirements-dev.lock"):
        shutil.copy2(ROOT / lock, environment / lock)
    return target


def bash(script: Path, *arguments: str) -> str:
    done = subprocess.run(["bash", str(script), *arguments], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_two_commands_come_first() -> None:
    assert BASH[:3] == ["bash launch/quickstart.sh", "source .venv/bin/activate", "bash launch/test.sh"]


@pytest.fixture(scope="module")
def quick_start(copy: Path) -> str:
    """What the quick start prints; its run folder is there afterwards."""
    return bash(copy / "launch" / "quickstart.sh", "--max-steps", "4")


@pytest.mark.slow
def test_quick_start_and_what_follows_it(copy: Path, quick_start: str) -> None:
    printed = quick_start
    assert re.search(r"teacher +959,066 +91\.30", printed), printed
    assert re.search(r"student +465,620 +\d", printed), printed
    assert re.search(r"student alone +465,620 +84\.12", printed), printed
    assert "between 84.45 and 86.45" in printed
    assert "84.45 to 86.45" in README
    with Image.open(copy / "runs/quickstart/plots/contact_sheet.png") as sheet:
        assert sheet.size[0] > 800
    assert "is now in" in bash(copy / "launch" / "quickstart.sh", "--max-steps", "1"), "a second run keeps the first"
    for code in (code for page in PAGES for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL)):
        file = copy.parent / "typed.py"
        file.write_text(code)
        done = Program(file, cwd=copy)
        assert done.wait() == 0, f"{code}\n{done.printed()}"


@pytest.mark.usefixtures("quick_start")
@pytest.mark.slow
def test_what_is_done_with_students(copy: Path, fashion_folder: Path) -> None:
    """After the quick start: each line that needs neither ImageNet nor an authors' file."""
    picture = sorted((fashion_folder / "val/9 Ankle boot").iterdir())[0]
    done = []
    for line in BASH:
        verb, *arguments = shlex.split(line)
        needed = not {"IMAGENET", "IMAGENET_A", "ckpt_epoch_299.pth", "runs/deit_ti"} & set(arguments)
        if (
            verb != "deit-kd"
            or arguments[0] in ("grid", "class-means", "cache-teacher", "doctor", "pack", "plan", "bench")
            or not needed
        ):
            continue
        words = [{"FOLDERS": str(fashion_folder), "PICTURE.png": str(picture)}.get(word, word) for word in arguments]
        words += ["run.workers=0", "global_batch_size=120"] if words[0] == "finetune" else []
        ran = run_script("-m", "deit_kd", *words, cwd=copy)
        assert ran.returncode == 0, f"{line}\n{ran.stderr}"
        done.append(words[0])
    assert done == ["evaluate", "predict", "finetune", "publish", "export", "card"]
    assert (copy / "runs/mine/student/README.md").exists()
    assert (copy / "runs/quickstart/student/model.onnx").exists()


def test_the_front_page_is_short() -> None:
    assert len(README.splitlines()) <= 160


def test_the_map_of_the_code_is_true() -> None:
    rows = re.findall(r"^\| .* \| `(deit_kd/\w+/)`(?:: (.*?)(?:;|\|))?", README.partition("## Map of the code")[2], re.MULTILINE)
    assert {folder.split("/")[1] for folder, _ in rows} == {
        path.name for path in (ROOT / "deit_kd").iterdir() if (path / "__init__.py").exists()
    } - {"files"}
    for folder, files in rows:
        for name in re.findall(r"`(\w+\.py)`", files):
            assert (ROOT / folder / name).exists(), name


def test_the_test_command_finds_the_tests(copy: Path) -> None:
    assert re.search(
        r"test_losses.py: [1-9]\d*", bash(copy / "launch" / "test.sh", "--collect-only", "-q", "-n0", "tests/losses/test_losses.py")
    )


def test_other_commands_name_recipes_and_keys_that_exist() -> None:
    import train

    commands = [shlex.split(line)[shlex.split(line).index("train.py") + 1 :] for line in BASH if "train.py" in line]
    assert len(commands) >= 4
    for arguments in commands:
        options = train.parse(arguments)
        recipes.load(options.recipe, options.overrides)


def test_verbs_name_recipes_and_keys_that_exist() -> None:
    from deit_kd.sweep import _cells

    documents = [*PAGES, *(path.read_text() for path in (ROOT / "results").glob("*.md"))]
    commands = [shlex.split(line) for text in documents for line in re.findall(r"^`?(deit-kd [^`#\n]+)", text, re.MULTILINE)]
    assert {command[1] for command in commands} == {
        "grid",
        "class-means",
        "cache-teacher",
        *("plan", "bench"),
        *("convert", "evaluate", "predict", "finetune", "publish", "export", "card"),
    }
    for _, verb, recipe, *words in commands:
        if verb == "finetune":
            recipes.load("finetune", [word for word in words if "=" in word])
        if verb not in ("grid", "class-means", "cache-teacher", "plan", "bench"):
            continue
        for cell in _cells([word for word in words if "=" in word]):
            recipes.load(ROOT / recipe if recipe.endswith(".yaml") else recipe, [f"{key}={value}" for key, value in cell.items()])


def test_files_and_links_exist() -> None:
    for document in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("deit_kd/*/README.md")):
        for link in re.findall(r"\]\((?!https?://)([^)#]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document}: {link}"
