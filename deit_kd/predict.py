"""What a network takes images for: a JSON object a line."""

from __future__ import annotations

import io
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image

from deit_kd.data.decode import rgb
from deit_kd.data.sources import readable
from deit_kd.errors import UserError
from deit_kd.models.taps import TimmModel

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises for files that are no images


@torch.inference_mode()
def predict(model: TimmModel, names: Sequence[str], device: torch.device, batch_size: int, top: int) -> Iterator[dict[str, Any]]:
    """A line an image, in their order: image, and predictions (label, index, probability), or error.

    Args:
        model: in eval mode; its own preprocessing and class names are used.
        names: files and folders; - reads standard input, an image or paths a line.
        device: where to.
        batch_size: images at once.
        top: how many predictions of each.

    Raises:
        UserError: an empty standard input.
    """
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    labels = model.pretrained_cfg.get("label_names")
    if labels is None and model.num_classes == 1000:
        labels = timm.data.ImageNetInfo("imagenet-1k").label_descriptions()
    model = model.to(device)
    files = iter([each for name in names for each in _expand(name)])
    while some := list(itertools.islice(files, batch_size)):
        lines: list[dict[str, Any]] = []
        images = []
        for name, content in some:
            try:
                if Path(name).is_dir():
                    raise ValueError("a folder without images")
                with Image.open(name if content is None else io.BytesIO(content)) as image:
                    images.append(transform(rgb(image)))
                lines.append({"image": name, "predictions": []})
            except UNREADABLE as error:
                lines.append({"image": name, "error": " ".join(str(error).split())})
        if images:
            probabilities, indices = model(torch.stack(images).to(device)).float().softmax(1).topk(min(top, model.num_classes))
            rows = zip([line for line in lines if "error" not in line], probabilities.tolist(), indices.tolist(), strict=True)
            for line, values, places in rows:
                line["predictions"] = [
                    {"label": labels[place] if labels else str(place), "index": place, "probability": round(value, 6)}
                    for value, place in zip(values, places, strict=True)
                ]
        yield from lines


def _expand(name: str) -> list[tuple[str, bytes | None]]:
    """(name, content if it is read already) of each image that an argument stands for."""
    if name == "-":
        content = sys.stdin.buffer.read()
        try:
            Image.open(io.BytesIO(content)).close()
        except UNREADABLE:
            paths = [os.fsdecode(line) for line in content.splitlines() if line.strip()]
            if not paths:
                raise UserError("-: standard input is empty; pipe an image or a path a line into it") from None
            return [each for path in paths for each in (_expand(path) if path != "-" else [])]
        return [("-", content)]
    if not Path(name).is_dir():
        return [(name, None)]
    walked = os.walk(name)
    found = sorted(os.path.join(folder, file) for folder, _, files in walked for file in files if file.lower().endswith(readable()))
    return [(path, None) for path in found] or [(name, None)]
