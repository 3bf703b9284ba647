"""Who may import whom, and what no file may name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "deit_kd"
STANDARD = {"errors", "seed", "text", "documents", "files", "outputs"}  # anyone may import them
# module or folder -> what of the package it may import; standard ones go without saying
MAY_IMPORT = {
    "__init__": {"models", "models.students", "recipe", "losses"},
    "errors": set(),
    "seed": set(),
    "text": set(),
    "documents": set(),
    "files": set(),
    "outputs": set(),
    "recipe": {"recipe"},
    "losses": {"losses"},
    "data": {"data", "recipe"},
    "models": {"models", "recipe"},
    "optim": {"recipe"},
    "sharding": set(),
    "checkpoint": {"sharding"},
    "run_files": set(),
    "tracking": {"run_files"},
    "stop": set(),
    "streams": set(),
    "vote": {"stop"},
    "processes": {"recipe"},
    "speed": {"models", "recipe"},
    "best": {"run_files", "sharding", "tracking"},
    "run_state": {"best", "checkpoint", "run_files", "sharding", "tracking"},
    "engine": {"best", "run_state", "stop", "tracking", "vote"},
    "build": {"data", "models", "recipe"},
    "collective": set(),
    "closeness": {"recipe"},
    "terms": {"collective", "data", "losses", "models", "recipe"},
    "class_means": {"checkpoint", "data", "models", "recipe"},
    "stream": {"checkpoint", "class_means", "data", "models", "recipe"},
    "teacher_cache": {"build", "checkpoint", "data", "evaluation", "models", "recipe", "stream"},
    "ready": {"build", "class_means", "data", "models", "optim", "plan", "recipe", "release", "run_start", "stream"},
    "classification": {
        "build",
        "class_means",
        "closeness",
        "collective",
        "data",
        "evaluation",
        "models",
        "ready",
        "recipe",
        "sharding",
        "stream",
        "terms",
        "tracking",
    },
    "plan": {"build", "models", "recipe", "terms"},
    "work": {"build", "models", "recipe"},
    "devices": {"recipe"},
    "roofline": {"build", "devices", "plan", "recipe", "work"},
    "bench": {
        "__init__",
        "build",
        "classification",
        "data",
        "engine",
        "optim",
        "plan",
        "processes",
        "recipe",
        "sharding",
        "speed",
        "spread",
        "tracking",
    },
    "verdict": {"bench", "recipe"},
    "forecast": {"__init__", "bench", "build", "data", "devices", "plan", "recipe", "roofline", "work"},
    "evaluation": {"data", "models"},
    "grid": {"analysis", "best", "recipe", "tracking"},
    "machine": {"data", "ready"},
    "doctor": {"build", "class_means", "data", "machine", "plan", "ready", "recipe"},
    "counts": set(),
    "report": {"analysis", "counts", "data", "models"},
    "predict": {"data", "models"},
    "command_line": set(),
    "cli": {
        "__init__",
        "bench",
        "build",
        "class_means",
        "command_line",
        "data",
        "doctor",
        "forecast",
        "grid",
        "models",
        "predict",
        "processes",
        "recipe",
        "release",
        "report",
        "speed",
        "streams",
        "teacher_cache",
        "verdict",
    },
    "__main__": {"cli"},
    "release": {"__init__", "best", "release", "checkpoint", "models", "recipe", "run_files", "tracking"},
    "analysis": {"recipe", "tracking"},
    "resume": {"data", "models", "recipe", "run_files", "stream"},
    "run_place": {"__init__", "checkpoint", "recipe", "run_files"},
    "run_start": {"__init__", "checkpoint", "classification", "data", "recipe", "resume", "run_files", "run_place", "tracking"},
    "run_folder": {
        "models",
        "plan",
        "processes",
        "sharding",
        "speed",
        "recipe",
        "classification",
        "data",
        "run_files",
        "run_start",
        "__init__",
    },
    "spread": {"classification", "optim", "recipe", "sharding"},
    "outcome": {"__init__", "analysis", "best", "classification", "release", "tracking"},
}
# third-party packages that only these may import
ONLY = {
    "accelerate": {
        "best",
        "build",
        "ready",
        "collective",
        "processes",
        "engine",
        "run_state",
        "vote",
        "evaluation",
        "tracking",
        "classification",
        "class_means",
        "teacher_cache",
        "run_folder",
        "run_start",
        "cli",
        "doctor",
        "bench",
        "speed",
        "spread",
    },
    "timm": {
        "best",
        "predict",
        "report",
        "data",
        "models",
        "optim",
        "engine",
        "outcome",
        "run_state",
        "spread",
        "release",
        "classification",
    },
    "torchvision": {"data"},
    "matplotlib": {"analysis"},
    "huggingface_hub": {"models", "release"},
    "pydantic": {"checkpoint", "data", "documents", "models", "recipe", "run_files", "run_state"},
    "yaml": {"recipe"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(file: Path) -> str:
    relative = file.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" if node.module == "deit_kd" else node.module for alias in node.names}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_down(file: Path) -> None:
    part = part_of(file)
    assert part in MAY_IMPORT, "a new part: say here what it may import"
    for name in imports(file):
        root, _, rest = name.partition(".")
        if root == "deit_kd":
            target = rest.partition(".")[0] or "__init__"
            assert target in MAY_IMPORT[part] | STANDARD, f"{part} may not import {name}"
        elif root in ONLY:
            assert part in ONLY[root], f"{part} may not import {name}"


def test_nothing_goes_past_the_wrapper() -> None:
    """`.module` calls inside DDP skip its gradient synchronisation; torch.distributed belongs to Accelerate, but for FSDP2."""
    for file in [*FILES, ROOT / "train.py"]:
        tree = ast.parse(file.read_text())
        names = imports(file)
        assert file.stem == "sharding" or not any(name.startswith("torch.distributed") for name in names), file
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "module":
                owner = ast.unparse(node.value)
                assert owner in ("self", "task", "self.task", "ema", "self.ema", "program"), (
                    f"{file}:{node.lineno}: {ast.unparse(node)}"
                )


def test_the_path_to_backward_is_short() -> None:
    """Own lines that a reader of one step passes: whole files of entry, loop and task, and the parts of leaves that they call."""
    leaves = {
        "losses/features": {"_batch_standardise", "_log_sum_of_powers", "logsum_correlation"},
        "losses/logits": {"kl_distillation"},
        "losses/precision": {"full_precision", "pair"},
        "models/distiller": {"StudentOutput", "Distiller", "_project"},
        "models/projectors": {"project"},
        "models/taps": {"Hidden", "run", "take", "pooled_features"},
        "models/teacher": {"TeacherOutput", "Teacher"},
    }
    lines = sum(
        len(file.read_text().splitlines())
        for file in (
            ROOT / "train.py",
            *(PACKAGE / f"{name}.py" for name in ("engine", "vote", "classification", "collective", "terms")),
        )
    )
    for leaf, names in leaves.items():
        nodes = [node for node in ast.parse((PACKAGE / f"{leaf}.py").read_text()).body if getattr(node, "name", None) in names]
        assert len(nodes) == len(names)
        lines += sum((node.end_lineno or 0) - node.lineno + 1 for node in nodes)
    assert lines <= 1400, lines


def test_the_project_names_no_machine() -> None:
    for file in [*FILES, ROOT / "train.py", *(ROOT / "recipes").iterdir(), *(ROOT / "launch").iterdir(), ROOT / "README.md"]:
        text = file.read_text()
        for word in ("/home/", "/Users/", "/mnt/"):
            assert word not in text, f"{file}: {word}"
