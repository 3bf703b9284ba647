"""Files of weights: read without running a pickle, and told apart by a hash of their tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from deit_kd.errors import UserError


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or a torch checkpoint; nothing in a pickle but tensors is ever built."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many types for foreign and truncated files
        raise UserError(f"{path}: cannot be read as weights ({' '.join(str(error).split())[:200]})") from None
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    entries = content.items() if isinstance(content, Mapping) else ()
    tensors = {key.removeprefix("module."): value for key, value in entries if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no tensors")
    return tensors


def fingerprint(model: nn.Module) -> str:
    """sha256 over the names and bytes of all tensors, in order of name; empty for a model without data (meta device)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            return ""
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
