"""A student in other formats: ONNX, torch.export, half precision; each reloaded and compared before it counts as done."""

from __future__ import annotations

import importlib.util
import io
import logging
import shutil
import warnings
from pathlib import Path

import torch
from torch import Tensor

from deit_kd.errors import UserError
from deit_kd.files.atomic import write_bytes, write_tensors
from deit_kd.files.outputs import settle, workspace
from deit_kd.models import load_student
from deit_kd.models.described import RELEASED, folder_of
from deit_kd.models.features import TimmModel

BESIDE = ("config.json", "README.md", "recipe.yaml", "metrics.jsonl", "LICENSE")  # weights, in a student's folder
FORMATS = ("onnx", "torch-export", "fp16", "bf16")
EXACT = 1e-4  # the largest difference of a logit that kernels of another library explain, relative to the largest logit


@torch.inference_mode()
def export(source: str, format_: str, output: Path | None) -> tuple[Path, float, bool]:
    """Writes a student in another format: images [B,3,H,W] as its preprocessing gives them -> logits [B,K], the mean of its heads.

    Args:
        source: see `load_student`.
        format_: one of FORMATS; onnx and torch-export take any batch size, fp16 and bf16 are folders that timm loads.
        output: the file or folder; None: beside the student, or in the current folder.

    Returns:
        Where it is, the largest difference of a logit, relative to the largest logit, and whether the same was there already.

    Raises:
        UserError: a package is missing, something else is at the output, or its logits differ.
    """
    student = load_student(source)
    folder = folder_of(source)
    names = {"onnx": "model.onnx", "torch-export": "model.pt2"}
    beside = Path() if folder is None or RELEASED in folder.parents else folder
    path = output or (beside / names[format_] if format_ in names else beside.parent / f"student_{format_}")
    shape = student.pretrained_cfg["input_size"]
    images = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    expected = student(images)
    write = {"onnx": _onnx, "torch-export": _torch_export}.get(format_)
    with workspace(path, "deit-kd export") as made:
        if write is not None:
            found = write(student, images, made)
        else:
            found = _halved(folder, {"fp16": torch.float16, "bf16": torch.bfloat16}[format_], made)(images)
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        if not difference < (EXACT if write else 0.05):
            raise UserError(
                f"{source} as {format_}: gives other logits than the student (relative difference {difference:.2g}); nothing is written"
            )
        return path, difference, settle(made, path)


def _onnx(student: TimmModel, images: Tensor, path: Path) -> Tensor:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            student,
            (images[:2],),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None, "it is, without a path"
    proto = program.model_proto
    for node in proto.graph.node:  # it holds paths of this machine
        del node.metadata_props[:]
    write_bytes(path, proto.SerializeToString())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    several, one = (session.run(None, {"images": part.numpy()})[0] for part in (images[:-1], images[-1:]))
    return torch.cat([torch.from_numpy(several), torch.from_numpy(one)])


def _torch_export(student: TimmModel, images: Tensor, path: Path) -> Tensor:
    program = torch.export.export(student, (images[:2].clone(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # it holds the paths of this machine
    memory = io.BytesIO()  # torch ends the process where it cannot write all to a file
    torch.export.save(program, memory)
    write_bytes(path, memory.getvalue())
    program = torch.export.load(path)
    reloaded = program.module()
    return torch.cat([reloaded(images[:-1]), reloaded(images[-1:])])


def _halved(folder: Path | None, kind: torch.dtype, path: Path) -> TimmModel:
    """Computed in float32 from halved weights, as `load_student` does."""
    from safetensors.torch import load_file

    if folder is None or not (folder / "model.safetensors").is_file():
        raise UserError("fp16 and bf16 are folders, made of one with a model.safetensors; make one with deit-kd convert first")
    (path / "plots").mkdir(parents=True)
    for file in (*(folder / name for name in BESIDE), *sorted((folder / "plots").glob("*.png"))):
        if file.is_file():
            shutil.copyfile(file, path / file.relative_to(folder))
    if not any((path / "plots").iterdir()):
        (path / "plots").rmdir()
    tensors = load_file(folder / "model.safetensors")
    halved = {name: value.to(kind) if value.is_floating_point() else value for name, value in tensors.items()}
    write_tensors(halved, path / "model.safetensors")
    return load_student(path)
