"""Files of weights: read without running a pickle, and told apart by a hash of their tensors."""

from __future__ import annotations

import hashlib
import io
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.serialization import safe_globals

from deit_kd.errors import UserError

# Where training scripts keep weights, the first that is there: deit, timm, VkD, torchvision's references
INSIDE = ("model", "state_dict", "student", "module", "model_ema", "state_dict_ema", "student_ema")
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # of DataParallel and DDP, of torch.compile
# What a pickle of tensors and numbers names
TENSORS = re.compile(r"torch\.\w+|torch\._utils\.\w+|collections\.OrderedDict|numpy\.(dtype|dtypes\.\w+)|_codecs\.encode")
_NUMBER: Any = np.float64(0).__reduce__()[0]  # builds one of a data type and bytes
# Settings that training scripts keep beside weights. torch's reader builds a plain dictionary in their place; nothing of them is run.
HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (OrderedDict, "yacs.config.CfgNode"),
    (OrderedDict, "argparse.Namespace"),
    (str, "pathlib.PosixPath"),
    (str, "pathlib._local.PosixPath"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")),
    *[(_NUMBER, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")],
]


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or a torch checkpoint, without the prefixes of wrappers; no object of a pickle is ever built.

    Raises:
        UserError: no such file, not weights, cut off, larger than it looks, or a pickle that would run something; values not finite.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            _refuse_bombs(path)
            with safe_globals(HARMLESS):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch and safetensors raise many types for foreign and truncated files
        reason = " ".join(str(error).split())
        if foreign := _foreign_objects(path):
            reason = f"it holds the pickled object {foreign[0]}, which is not built, for it could run anything"
        elif "weights_only" in reason:  # torch's advice is the unsafe way
            reason = "no torch checkpoint of pickle protocol 2, which torch.save writes"
        raise UserError(f"{path}: cannot be read as weights ({reason[:200]}); ask for a safetensors file") from None
    for key in INSIDE:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    entries = content.items() if isinstance(content, Mapping) else ()
    tensors = {WRAPPERS.sub("", str(key)): value for key, value in entries if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no tensors")
    for key, value in tensors.items():
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise UserError(f"{path}: {key} is a sparse, quantised or empty (meta) tensor; save plain ones")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(
                f"{path}: {key} claims {value.numel():,} numbers and stores fewer; fetch the file again from its authors"
            )
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{path}: {key} is not finite; these weights are of a run that diverged")
    return tensors


def _foreign_objects(path: Path) -> list[str]:
    """Names in the pickles of a file that are no part of tensors; read from the opcodes, nothing is built."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            pickles = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    else:
        pickles = [path.read_bytes()]
    harmless = {entry[1] for entry in HARMLESS if isinstance(entry, tuple)}
    foreign = []
    for content in pickles:
        stream = io.BytesIO(content)
        try:
            while stream.tell() < len(content):  # the format before torch 1.6 has several, one behind the other
                latest, words = "", list[str]()
                memory: list[str] = []
                for opcode, argument, _ in pickletools.genops(stream):
                    if isinstance(argument, str) and "UNICODE" in opcode.name:
                        words.append(argument)
                        latest = argument
                    elif opcode.name == "MEMOIZE":
                        memory.append(latest)
                    elif opcode.name in ("BINGET", "LONG_BINGET") and memory:
                        words.append(memory[int(str(argument))])
                    else:
                        latest = ""
                    if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
                        name = ".".join(words[-2:]) if opcode.name == "STACK_GLOBAL" else str(argument).replace(" ", ".")
                        if name not in harmless and not TENSORS.fullmatch(name):
                            foreign.append(name)
        except (ValueError, IndexError, UnicodeDecodeError):  # no pickle, or what follows the pickles: the tensors' bytes
            pass
    return foreign


def _refuse_bombs(path: Path) -> None:
    """Torch stores without compression, so that entries larger than their file are no weights."""
    if not zipfile.is_zipfile(path):
        return  # the format before torch 1.6
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise UserError(
            f"{path}: cannot be read as weights (a zip file that unpacks to more than its size); torch writes no such files"
        )


def fingerprint(model: nn.Module) -> str:
    """sha256 over the names and bytes of all tensors, in order of name; empty for a model without data (meta device)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            return ""
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
