"""Converts files of weights as their authors wrote them into a folder of safetensors with config and card."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from timm.models import model_entrypoint

import deit_kd
from deit_kd.errors import UserError
from deit_kd.export.markdown import render
from deit_kd.export.student import fill_folder
from deit_kd.files.atomic import sha256, write_text
from deit_kd.files.documents import MEGABYTE, check, parse_json, read_bytes
from deit_kd.files.outputs import settle, workspace
from deit_kd.models.config_json import Labels
from deit_kd.models.loading import build_found, read_student

CLASS_NAMES = "give a JSON list of the class names, or a text file with a name a line"
LABELS: type[list[str]] = Labels  # as a config.json may have them
TEMPLATE = Path(__file__).with_name("converted.md.jinja")


def convert(source: Path, folder: Path, class_names: Path | None = None) -> list[str]:
    """Writes `folder` with model.safetensors, config.json and README.md, checked against the file's own logits.

    Args:
        source: see `deit_kd.load_student`.
        folder: where to; what is there is kept, unless it is a part of the same.
        class_names: a JSON list, or a text file with a name a line; without it the folder says none.

    Returns:
        Lines on the keys that were found, dropped and unknown.

    Raises:
        UserError: a file that cannot be read safely, or is of no student known here; a folder of something else; other class names.
    """
    if source.is_dir():
        raise UserError(f"{source}: is a folder, which timm loads as it is; give a file of weights")
    found = read_student(source)
    student = build_found(found)
    names = _class_names(class_names, student.num_classes)
    about = {"converted_from": source.name, "sha256": sha256(source)}
    size = student.patch_embed.img_size
    preprocessing = {"license": "unknown", "input_size": [3, *size]}
    parameters = sum(p.numel() for p in student.parameters())
    data = ModelCardData(
        license="unknown",
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "deit_kd"],
    )
    body = render(
        TEMPLATE,
        found=found,
        about=about,
        parameters=parameters,
        classes=student.num_classes,
        size=size[0],
        ours=model_entrypoint(found.architecture).__module__.startswith("deit_kd."),
        command=f"deit-kd convert {source.name} {folder.name}",
        version=deit_kd.__version__,
    )
    with workspace(folder, "deit-kd convert") as made:
        made.mkdir()
        fill_folder(student, made, preprocessing, found.arguments, names, about)
        write_text(made / "README.md", str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")))
        before = settle(made, folder)
    return [
        f"student    {found.architecture}{f' with {found.arguments}' if found.arguments else ''}, {parameters:,} parameters",
        *[f"dropped    {key}, which training alone needs" for key in found.dropped],
        *[f"unexpected {key}, which {found.architecture} has not: left out" for key in found.unexpected],
        f"{'unchanged ' if before else 'written   '} {folder}: {'is there already, whole; ' if before else ''}reloaded by timm, with the same logits",
    ]


def _class_names(file: Path | None, number: int) -> list[str] | None:
    if file is None:
        return None
    try:
        content = read_bytes(file, CLASS_NAMES, 16 * MEGABYTE)
        utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")  # as some editors on Windows write
        text = content.decode("utf-16" if utf16 else "utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise UserError(f"{file}: cannot be read as UTF-8 or UTF-16; {CLASS_NAMES}") from None
    lines = text.removesuffix("\n").split("\n")
    is_json = file.suffix == ".json"
    names = parse_json(text, str(file), LABELS, CLASS_NAMES) if is_json else check(lines, str(file), LABELS, CLASS_NAMES)
    if len(names) != number:
        raise UserError(f"{file}: is no list of {number} class names, as many as the student has; {CLASS_NAMES}")
    return names
