"""JPEGs decoded, cropped and resized on the device, whole batches at a time.

torchvision decodes the list of files: on a GPU nvJPEG, which has other inverse transforms and chroma filters than libjpeg, so that pixels
differ by some gray levels; on a CPU libjpeg, one after another. Crops are resized by Pillow's antialiasing filters as matrix products.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from deit_kd.data.decode import Jpeg
from deit_kd.data.on_device.draws import Jpegs
from deit_kd.errors import UserError

MOST_AT_ONCE = 2**24  # pixels of crops, padded to the largest: about 1 GB while they are resized


class UndecodedError(Exception):
    """The device's decoder refuses a file of a batch."""


class Decoder:
    """The images of a batch that workers sent as JPEGs.

    torchvision writes what it decodes on a stream of its own, without a look at who still reads the memory that it is given. So all of this
    is done on one stream, with memory of its own, and the host waits for that stream: not for the training step, which is on another.

    Args:
        size: of the images.
        device: where to.

    Raises:
        UserError: torchvision cannot decode there.
    """

    def __init__(self, size: int, device: torch.device):
        self.size, self.device = size, device
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._known = encode_jpeg(torch.zeros(3, 16, 16, dtype=torch.uint8))
        try:
            decode_jpeg([self._known], ImageReadMode.RGB, device)
        except RuntimeError as error:
            raise UserError(
                f"run.decode_on=device: torchvision decodes no JPEG there ({_short(error)}); use run.decode_on=workers"
            ) from None

    def __call__(self, jpegs: Jpegs) -> Tensor:
        """[J,3,S,S] uint8, on the device.

        Raises:
            UndecodedError: see there.
        """
        if self.stream is None:
            return self._crops(jpegs)
        training = torch.cuda.current_stream(self.device)
        self.stream.synchronize()  # the last batch may still be read
        with torch.cuda.stream(self.stream):
            crops = self._crops(jpegs)
        training.wait_stream(self.stream)
        crops.record_stream(training)
        return crops

    def takes(self, jpeg: Jpeg) -> bool:
        """Whether the decoder accepts the file alone.

        Raises:
            RuntimeError: it decodes nothing any more.
        """
        try:
            (alone,) = decode_jpeg([jpeg.content], ImageReadMode.RGB, self.device)
        except RuntimeError:
            decode_jpeg([self._known], ImageReadMode.RGB, self.device)
            return False
        return alone.shape[1:] == (jpeg.height, jpeg.width)

    def _crops(self, jpegs: Jpegs) -> Tensor:
        files = list(jpegs.content.split(jpegs.table[0].tolist()))
        try:
            flat = _flatten_dense_tensors(decode_jpeg(files, ImageReadMode.RGB, self.device))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UndecodedError(f"the device cannot decode a JPEG ({_short(error)})") from error
        if len(flat) != 3 * jpegs.table[1].sum():
            raise UndecodedError("the device decodes a JPEG to another size than its header says")
        return resized(flat, jpegs.table, self.size)


def resized(flat: Tensor, table: Tensor, size: int) -> Tensor:
    """Crops, resized as Pillow does it, bit for bit: sums in float64 are exact, so that it does not matter what else is in the batch.

    Args:
        flat: uint8, all images [3,H,W] one after another.
        table: [11,J] of `Jpegs`, on the host.
        size: of the results.

    Returns:
        [J,3,S,S] uint8.
    """
    numbers = table.to(flat.device, non_blocking=True)
    numbers = torch.cat([3 * (numbers[1:2].cumsum(1) - numbers[1:2]), numbers[1:]])  # where an image begins, instead of its bytes
    lines, length = table[4], table[7]
    at_once = max(1, MOST_AT_ONCE // int(lines.max() * length.max()))
    pieces = zip(lines.split(at_once), length.split(at_once), numbers.split(at_once, 1), strict=True)
    return torch.cat([_piece(flat, part, size, int(most_lines.max()), int(most.max())) for most_lines, most, part in pieces])


def _piece(flat: Tensor, numbers: Tensor, size: int, most_lines: int, most: int) -> Tensor:
    """Some of the crops, padded to so many lines of so many pixels."""
    start, plane, first, line_step, lines, lines_mirrored, step, length, mirrored, bicubic, columns = numbers[:, :, None]
    line = torch.arange(most_lines, device=flat.device).minimum(lines - 1)
    place = torch.arange(most, device=flat.device).minimum(length - 1)
    index = (start + first + line * line_step)[:, :, None] + (place * step)[:, None]
    crops = torch.stack([flat.take(index + channel * plane[:, None]) for channel in range(3)], 2)  # [b, lines, 3, length]
    along, across = _filter(length, mirrored, bicubic, size, most), _filter(lines, lines_mirrored, bicubic, size, most_lines)
    once = _rounded(crops.double().flatten(1, 2) @ along.mT)  # [b, lines x 3, S]
    twice = _rounded(across @ once.view(len(index), most_lines, 3 * size))  # [b, S, 3 x S]
    images = twice.to(torch.uint8).view(-1, size, 3, size).transpose(1, 2)
    return torch.where(columns[:, :, None, None] > 0, images.mT, images)


def _filter(length: Tensor, mirrored: Tensor, bicubic: Tensor, size: int, most: int) -> Tensor:
    """[b,S,most]: what each of `length` [b,1] pixels counts for each of S, which are mirrored or not, to Pillow's 22 bits.

    Cubic with a = -0.5, or linear, as wide as what is shrunk.
    """
    place = torch.arange(most, device=length.device)
    result = torch.arange(size, device=length.device)
    result = torch.where(mirrored > 0, size - 1 - result, result)
    scale = length.double() / size
    center = (result + 0.5) * scale
    x = (place - center[:, :, None] + 0.5).abs_() / scale.clamp(min=1)[:, :, None]
    near, far = ((1.5 * x - 2.5) * x) * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    cubic = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weight = torch.where(bicubic[:, :, None] > 0, cubic, (1 - x).clamp_(min=0)) * (place < length)[:, None]
    return (weight / weight.sum(2, keepdim=True)).mul_(2**22).round_().div_(2**22)


def _rounded(values: Tensor) -> Tensor:
    return values.add_(0.5).floor_().clamp_(0, 255)


def _short(error: RuntimeError) -> str:
    return " ".join(str(error).split())[:120]
