"""Files of weights: opened without running a pickle, and identified by a hash of their tensors."""

from __future__ import annotations

import hashlib
import io
import os
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.serialization import safe_globals

from deit_kd.errors import UserError
from deit_kd.files.documents import MEGABYTE, must_be_a_file
from deit_kd.models.pickles import Foreign, Unbounded, check_pickle
from deit_kd.text import printable

# Where training scripts keep weights, the first that is there: deit, timm, VkD, torchvision's references
INSIDE = ("model", "state_dict", "student", "module", "model_ema", "state_dict_ema", "student_ema")
TIMMS = ("state_dict_ema", "model_ema", "state_dict", "model")  # the order in which timm looks, for folders that timm reads
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # of DataParallel and DDP, of torch.compile
PLAIN = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8}
PLAIN |= {torch.uint8, torch.bool}
MOST_HEADER = 16 * MEGABYTE  # of the names and shapes before the numbers
MOST_DIMENSIONS = 8
MOST_DIRECTORY = 4 * MEGABYTE  # of a zip file's list of entries
MOST_LEGACY = 4000 * MEGABYTE  # of a file of before torch 1.6, which torch reads whole
LEGACY = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")  # such a file begins with this number


class Setting:
    """Stands for a number or path that a training script keeps beside weights, which is not built."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


# Settings that training scripts keep beside weights. torch's reader builds these in their place; nothing of them is run.
HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (OrderedDict, "yacs.config.CfgNode"),
    (OrderedDict, "argparse.Namespace"),
    *[(Setting, f"pathlib.{name}") for name in ("PosixPath", "_local.PosixPath", "WindowsPath", "_local.WindowsPath")],
    *[(Setting, f"numpy.{name}") for name in ("dtype", "core.multiarray.scalar", "_core.multiarray.scalar")],
]
_HARMLESS = {entry[1] for entry in HARMLESS if isinstance(entry, tuple)}


def read_weights(path: Path, inside: Sequence[str] = INSIDE) -> dict[str, Tensor]:
    """`open_weights`, and all numbers looked at.

    Raises:
        UserError: as there; or values that are not finite.
    """
    tensors = open_weights(path, inside)
    must_be_finite(tensors, path)
    return tensors


def open_weights(path: Path, inside: Sequence[str] = INSIDE) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or a torch checkpoint, without the prefixes of wrappers; no object of a pickle is ever built.

    Their numbers stay in the file until somebody reads them (but for files of before torch 1.6), so that their shapes can be looked at first.

    Args:
        path: the file.
        inside: the keys under which they may be, the first that is there.

    Raises:
        UserError: no such file, not weights, cut off, larger than it looks, or a pickle that would run something.
    """
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file")
    must_be_a_file(path, "ask for a safetensors file")
    try:
        content: Any = _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    except UserError:
        raise
    except Exception as error:  # torch, zipfile and safetensors raise many types for foreign and damaged files
        reason = printable(" ".join(str(error)[:1000].split()))
        if isinstance(error, Foreign):
            reason = f"it holds the pickled object {reason}, which is not built, for it could run anything"
        elif "weights_only" in reason:  # torch's advice is the unsafe way
            reason = "no torch checkpoint of pickle protocol 2, which torch.save writes"
        raise UserError(f"{path}: cannot be read as weights ({reason[:200]}); ask for a safetensors file") from None
    for key in inside:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    entries = content.items() if isinstance(content, Mapping) else ()
    tensors = {WRAPPERS.sub("", str(key)): value for key, value in entries if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no tensors")
    _must_be_plain(tensors, path)
    return tensors


def must_be_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Reads all numbers.

    Raises:
        UserError: one is not finite.
    """
    for key, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{path}: {printable(key)} is not finite; these weights are of a run that diverged")


def _must_be_plain(tensors: Mapping[str, Tensor], path: Path) -> None:
    claimed = 0
    for key, value in tensors.items():
        shown = printable(key[:200])
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise UserError(f"{path}: {shown} is a sparse, quantized or empty (meta) tensor; save plain ones")
        if value.ndim > MOST_DIMENSIONS:
            raise UserError(f"{path}: {shown} has {value.ndim} dimensions, at most {MOST_DIMENSIONS} are right; save plain tensors")
        if value.dtype not in PLAIN:
            raise UserError(f"{path}: {shown} is of {value.dtype}; save float32, float16 or bfloat16")
        if (size := value.numel() * value.element_size()) > value.untyped_storage().nbytes():
            raise UserError(
                f"{path}: {shown} claims {value.numel():,} numbers and stores fewer; fetch the file again from its authors"
            )
        claimed += size
    if claimed > 2 * path.stat().st_size:  # two names may have the same numbers
        raise UserError(f"{path}: its tensors claim {claimed:,} bytes, more than it stores; fetch the file again from its authors")


def _safetensors(path: Path) -> dict[str, Tensor]:
    """The library holds places and sizes against the file's; the length of the header is ours to bound."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if length > min(MOST_HEADER, path.stat().st_size):
        raise Unbounded(f"its header claims {length:,} bytes")
    with safe_open(path, "pt") as content:
        return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  # it is no mapping


def _torch(path: Path) -> Any:
    with path.open("rb") as stream:
        start = stream.read(64)
        is_zip = start.startswith(b"PK\x03\x04")  # as torch tells them apart
        if is_zip:
            for content in _pickles(path, stream):
                check_pickle(io.BytesIO(content), _HARMLESS)
        elif LEGACY in start:
            must_be_a_file(path, "ask for a safetensors file", MOST_LEGACY)
            stream.seek(0)
            beginning = io.BytesIO(stream.read(MOST_HEADER))
            for _ in range(5):  # one behind the other; the numbers follow
                check_pickle(beginning, _HARMLESS)
        else:
            raise Unbounded("no torch checkpoint")
    with warnings.catch_warnings(), safe_globals(HARMLESS):
        warnings.simplefilter("ignore")  # what torch warns of is refused, here or by torch
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def _pickles(path: Path, stream: IO[bytes]) -> list[bytes]:
    """Those of a zip file. torch stores without compression, so that entries larger than their file are no weights."""
    end: Any = zipfile._EndRecData(stream)  # type: ignore[attr-defined]
    if end is None or end[5] > MOST_DIRECTORY:  # the length of the list of entries, before it is read
        raise Unbounded("a zip file that is cut off, or of more entries than torch writes")
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        if any(entry.flag_bits & 1 for entry in entries):
            raise Unbounded("an encrypted zip file")
        if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise Unbounded("a zip file that unpacks to more than its size; torch writes no such files")
        pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
        if any(entry.file_size > MOST_HEADER for entry in pickles):
            raise Unbounded(f"its pickle is larger than {MOST_HEADER / MEGABYTE:g} MB")
        return [archive.read(entry) for entry in pickles]


def fingerprint(model: nn.Module) -> str:
    """sha256 over the names and bytes of all tensors, in order of name; empty for a model without data (meta device)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            return ""
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
