"""The one export: bare timm keys, contiguous copies, reloaded by plain timm and compared before it counts as done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from timm.models._hub import save_config_for_hf

from deit_kd.checkpoint import replace_folder, write_tensors
from deit_kd.errors import UserError
from deit_kd.models.taps import TimmModel
from deit_kd.recipe import Recipe


def export_student(
    student: TimmModel, folder: Path, recipe: Recipe, class_names: Sequence[str], teacher_licences: Sequence[str]
) -> None:
    """Writes model.safetensors and config.json so that timm and transformers load the student; replaces `folder` whole.

    Args:
        student: the bare timm model.
        folder: where to; `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it.
        recipe: for the preprocessing and the arguments of the architecture.
        class_names: [K] names, stored as label_names.
        teacher_licences: of the weights that it learnt from.

    Raises:
        UserError: the reloaded model gives other logits.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_tensors(student.state_dict(), temporary / "model.safetensors")
    _write_config(student, temporary / "config.json", recipe, class_names, teacher_licences)
    _compare(student, temporary, recipe)
    replace_folder(temporary, folder)


def _write_config(
    student: TimmModel, file: Path, recipe: Recipe, class_names: Sequence[str], teacher_licences: Sequence[str]
) -> None:
    size = recipe.data.img_size
    arguments = dict(recipe.student.model_args)
    if student.pretrained_cfg.get("fixed_input_size"):
        arguments["img_size"] = size
    preprocessing = {
        "tag": "deit_kd",  # else timm writes the tag of its own weights of this architecture
        "license": licence(teacher_licences),
        "input_size": [3, size, size],
        "mean": list(recipe.data.mean),
        "std": list(recipe.data.std),
        "interpolation": recipe.evaluation.interpolation,
        "crop_pct": recipe.evaluation.crop_pct,
        "crop_mode": "center",
        "test_input_size": None,
        "test_crop_pct": None,
        "pool_size": None,
        **dict.fromkeys(("origin_url", "paper_ids", "paper_name", "notes", "description")),  # of timm's own weights
        "num_classes": len(class_names),
    }
    save_config_for_hf(
        student,
        str(file),
        model_config={"pretrained_cfg": preprocessing, "label_names": list(class_names), "deit_kd": {"recipe": "recipe.yaml"}},
        model_args=arguments,
    )
    config = json.loads(file.read_text())
    # transformers' TimmWrapper passes num_classes itself and fails on a second one.
    config.get("model_args", {}).pop("num_classes", None)
    config["pretrained_cfg"] = {key: value for key, value in config["pretrained_cfg"].items() if value is not None}
    file.write_text(json.dumps(config, indent=2) + "\n")


def licence(of_teachers: Sequence[str]) -> str:
    """Apache-2.0, unless a teacher's weights came under terms that are not permissive, or not known."""
    permissive = ("none, random weights", "apache-2.0", "mit", "bsd-3-clause")
    others = sorted({each for each in of_teachers if each not in permissive})
    if not others:
        return "apache-2.0"
    return others[0] if len(others) == 1 and not others[0].startswith("unknown") else "other"


@torch.inference_mode()
def _compare(student: TimmModel, folder: Path, recipe: Recipe) -> None:
    """Loads the folder as a stranger would and compares logits on fixed random images."""
    reloaded: TimmModel = timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True).eval()
    images = torch.randn(4, 3, recipe.data.img_size, recipe.data.img_size, generator=torch.Generator().manual_seed(0))
    device = next(student.parameters()).device
    was_training = student.training
    expected = student.eval()(images.to(device)).float().cpu()
    student.train(was_training)
    difference = (reloaded.to(device)(images.to(device)).float().cpu() - expected).abs().max().item()
    if not difference <= 1e-4 * max(1.0, expected.abs().max().item()):
        raise UserError(f"{folder}: the exported student gives other logits when reloaded (largest difference {difference:.3g})")
