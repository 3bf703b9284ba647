"""The export of a student: bare timm keys, contiguous copies, reloaded by plain timm and compared."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import model_entrypoint
from timm.models._hub import save_config_for_hf

from deit_kd.errors import UserError
from deit_kd.files.atomic import whole_folder, write_json, write_tensors
from deit_kd.files.imports import file_of
from deit_kd.models.features import TimmModel
from deit_kd.recipe import Data, Evaluation
from deit_kd.text import license_name

PERMISSIVE = ("none, random weights", "apache-2.0", "mit", "bsd-3-clause")


def export_student(
    student: TimmModel,
    folder: Path,
    data: Data,
    evaluation: Evaluation,
    model_args: Mapping[str, Any],
    class_names: Sequence[str],
    teacher_licenses: Sequence[object],
) -> None:
    """Writes a run's student with `fill_folder`; replaces `folder` whole.

    Args:
        student: the bare timm model.
        folder: where to.
        data: size and normalization of images.
        evaluation: how images are cropped.
        model_args: of the architecture.
        class_names: [K] names, stored as label_names.
        teacher_licenses: of the weights that it learned from.

    Raises:
        UserError: the reloaded model gives other logits.
    """
    size = data.img_size
    arguments = dict(model_args)
    if student.pretrained_cfg.get("fixed_input_size"):
        arguments["img_size"] = size
    preprocessing = {
        "license": license(teacher_licenses),
        "input_size": [3, size, size],
        "mean": list(data.mean),
        "std": list(data.std),
        "interpolation": evaluation.interpolation,
        "crop_pct": evaluation.crop_pct,
        "crop_mode": "center",
        "test_input_size": None,
        "test_crop_pct": None,
        "pool_size": None,
    }
    with whole_folder(folder) as temporary:
        about = {"recipe": "recipe.yaml"}
        if own_file := file_of(model_entrypoint(student.pretrained_cfg["architecture"]).__module__):
            about["architecture_in"] = own_file.name
        fill_folder(student, temporary, preprocessing, arguments, class_names, about)


def fill_folder(
    student: TimmModel,
    folder: Path,
    preprocessing: Mapping[str, Any],
    arguments: Mapping[str, Any],
    class_names: Sequence[str] | None,
    about: Mapping[str, Any],
) -> None:
    """Writes model.safetensors and config.json so that timm and transformers load the student, and compares what timm loads.

    Args:
        student: the bare timm model.
        folder: where to; it is there. `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it.
        preprocessing: of timm's pretrained_cfg, what differs from the architecture's own.
        arguments: of the architecture.
        class_names: [K] names, stored as label_names; None if unknown.
        about: what else config.json says, under deit_kd.

    Raises:
        UserError: the reloaded model gives other logits.
    """
    write_tensors(student.state_dict(), folder / "model.safetensors")
    _write_config(student, folder / "config.json", preprocessing, arguments, class_names, about)
    compare(student, folder)


def _write_config(
    student: TimmModel,
    file: Path,
    preprocessing: Mapping[str, Any],
    arguments: Mapping[str, Any],
    class_names: Sequence[str] | None,
    about: Mapping[str, Any],
) -> None:
    own = {
        "tag": "deit_kd",  # else timm writes the tag of its own weights of this architecture
        **dict.fromkeys(("origin_url", "paper_ids", "paper_name", "notes", "description")),  # of those weights, too
        "num_classes": student.num_classes,
        **preprocessing,
    }
    labels = {} if class_names is None else {"label_names": list(class_names)}
    content = {"pretrained_cfg": own, "deit_kd": dict(about), **labels}
    save_config_for_hf(student, str(file), model_config=content, model_args=dict(arguments))
    config = json.loads(file.read_text())
    # transformers' TimmWrapper passes num_classes itself and fails on a second one.
    config.get("model_args", {}).pop("num_classes", None)
    config["pretrained_cfg"] = {key: value for key, value in config["pretrained_cfg"].items() if value is not None}
    write_json(file, config)


def license(of_teachers: Sequence[object]) -> str:
    """Apache-2.0, unless a teacher's weights came under terms that are not permissive, or not known.

    What a teacher's configuration states may be of any type; what is no identifier, as the hub writes them, is `other`.
    """
    others = {name for each in of_teachers if (name := license_name(each)) not in PERMISSIVE}
    if not others:
        return "apache-2.0"
    name = others.pop()
    return name if not others and re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name) and not name.startswith("unknown") else "other"


@torch.inference_mode()
def compare(student: TimmModel, folder: Path) -> None:
    """Loads the folder with plain timm and compares logits on fixed random images.

    Raises:
        UserError: they differ.
    """
    reloaded: TimmModel = timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True).eval()
    shape = reloaded.pretrained_cfg["input_size"]
    images = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    device = next(student.parameters()).device
    was_training = student.training
    expected = student.eval()(images.to(device)).float().cpu()
    student.train(was_training)
    difference = (reloaded.to(device)(images.to(device)).float().cpu() - expected).abs().max().item()
    if not difference <= 1e-4 * max(1.0, expected.abs().max().item()):
        raise UserError(f"{folder}: the exported student gives other logits when reloaded (largest difference {difference:.3g})")
