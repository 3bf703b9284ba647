"""JPEGs decoded on the device: images a second of the decoder, of what follows it, of the workers that only send files; and how equal they are.

    python benchmarks/decode.py [--device cuda] [--batch 256] [--rounds 15]

Real photos as JPEGs of 500x375 pixels, the recipe deit_ti. The device's arms by the clock, waiting for it after each batch; workers' arms by the
CPU time of this process, one thread: what a core delivers. On a CPU torchvision decodes the list one after another, which tells nothing of
a GPU. Writes results/speed_decode_DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.data import SIZES, compared, photos, sent
from benchmarks.paired import facts, paired_rounds
from deit_kd import recipe as recipes
from deit_kd.data.decode import Jpeg, as_jpeg, decode
from deit_kd.data.loader import _collate, _Item, _seeded
from deit_kd.data.on_device.augment import OnDevice, choose_augmentation

SETTINGS = ["run.augment_on=device"]


def batch_of(files: list[bytes], read: Callable[[bytes], Any], chosen: OnDevice) -> Any:
    """What a worker makes of a batch."""
    items = []
    for seed, content in enumerate(files):
        image = read(content)
        with _seeded(seed):
            items.append(_Item(chosen.worker(image), 0, None))
    return _collate(items)


def by_the_clock(arms: dict[str, Callable[[], Any]], rounds: int, images: int, device: torch.device) -> dict[str, Any]:
    """Images a second of each arm, waiting for the device at its end, and the part of that time before the host was free again."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for number in tqdm(range(rounds + 2), "rounds", delay=2, disable=None):
        for name in random.Random(number).sample(list(arms), len(arms)):
            started = time.perf_counter()
            arms[name]()
            free = time.perf_counter()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number > 1:
                times[name].append((time.perf_counter() - started, free - started))
    table = {}
    for name, each in times.items():
        whole, host = (median(values) for values in zip(*each, strict=True))
        table[name] = {"images_per_second": images / whole, "host_share": host / whole}
        print(f"  {name:<44}{images / whole:>9.0f} img/s, the host is busy for {host / whole:.0%}", flush=True)
    return table


def parity(files: list[bytes], device: torch.device, sends: Any, holds: Any, chosen: OnDevice) -> dict[str, float]:
    """Gray levels between this decoder's pixels and libjpeg's, and decibels between the crops of both ways."""
    contents = [as_jpeg(content) for content in files]
    ours = decode_jpeg([each.content for each in contents if each], ImageReadMode.RGB, device)
    differences = [(a.cpu().int() - decode(b).int()).abs() for a, b in zip(ours, files, strict=True)]
    assert chosen.finish.decoder is not None
    crops = chosen.finish.decoder(sends[1].jpegs).cpu().double()
    error = (crops - holds[0].double()).square().mean((1, 2, 3)).clamp(min=1e-9)
    decibel = 10 * torch.log10(255**2 / error)
    return {
        "pixels_mean": sum(each.double().mean().item() for each in differences) / len(files),
        "pixels_max": max(each.max().item() for each in differences),
        "crops_psnr_mean": decibel.mean().item(),
        "crops_psnr_min": decibel.min().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, help="default 256, on a CPU 20")
    parser.add_argument("--rounds", type=int, help="default 15, on a CPU 5")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device, on_gpu = torch.device(options.device), options.device == "cuda"
    batch, rounds = options.batch or (256 if on_gpu else 20), options.rounds or (15 if on_gpu else 5)
    torch.set_num_threads(1)
    worker: Any = torch.utils.data._utils.worker
    worker._worker_info = object()  # as in a worker, where no streams are put back after seeding
    found = photos(*SIZES["500x375 q90"])
    files = list(islice(cycle(found), batch))
    loaded = [recipes.load("deit_ti", [*SETTINGS, *more]) for more in ([], ["run.decode_on=device"])]
    chosen = [choose_augmentation(each.data, each.augmentation, each.run, device) for each in loaded]
    held, given = (each for each in chosen if isinstance(each, OnDevice))

    def read(content: bytes) -> Tensor | Jpeg:
        return as_jpeg(content) or decode(content)

    print("what a core delivers", flush=True)
    arms: dict[str, Callable[[], None]] = {
        "decoded by workers": lambda: sent(batch_of(files, decode, held)),
        "sent as it is": lambda: sent(batch_of(files, read, given)),
    }
    results = {"core": compared(paired_rounds(arms, rounds), batch)}
    holds, sends = batch_of(files, decode, held), batch_of(files, read, given)
    if on_gpu:
        holds, sends = (torch.utils.data._utils.pin_memory.pin_memory(each) for each in (holds, sends))
    assert given.finish.decoder is not None
    print("parity, in gray levels and decibels")
    results["parity"] = parity(files, device, sends, holds, given)
    print("  " + "  ".join(f"{key} {value:.4g}" for key, value in results["parity"].items()))
    listed = list(sends[1].jpegs.content.split(sends[1].jpegs.table[0].tolist()))
    print(f"what {device} does with a batch of {batch}", flush=True)
    results["device"] = by_the_clock(
        {
            "decode_jpeg(list)": partial(decode_jpeg, listed, ImageReadMode.RGB, device),
            "decoded, cropped, resized": partial(given.finish.decoder, sends[1].jpegs),
            "decoded, cropped, resized, augmented": partial(given.finish, *sends[:2]),
            "augmented, decoded by workers": partial(given.finish, *holds[:2]),
        },
        rounds,
        batch,
        device,
    )
    results["memory"] = {"peak_bytes": torch.cuda.max_memory_allocated(device)} if on_gpu else {}
    command = f"python benchmarks/decode.py --device {device} --batch {batch} --rounds {rounds}"
    output = options.output or ROOT / "results" / f"speed_decode_{device}.json"
    output.write_text(json.dumps({"command": command, **facts(), "results": results}, indent=2) + "\n")
    print(output)


if __name__ == "__main__":
    main()
