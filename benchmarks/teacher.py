"""What a teacher's forward costs, and what each way of running it changes: folded, laid out, compiled, in half precision, of fewer pixels.

    python -m benchmarks.teacher --quick
    python -m benchmarks.teacher --teacher regnety_160 --batch-sizes 8
    python -m benchmarks.teacher --device cuda --batch-sizes 64 256 512 --dtypes float32 bfloat16 float16 --modes none default max-autotune

Every arm is the same network with the same random weights, its batch norms with statistics of random images. Errors are relative, of
pooled features and logits, against the plain float32 network. Times as in benchmarks/step.py. Prints a table and writes
results/speed_teacher_DEVICE.json.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.paired import cuda_rounds, facts, paired_rounds, ratio
from deit_kd.models import Teacher, load_teacher
from deit_kd.models.folding import fold_batch_norms

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PLAIN = "contiguous"


def arm(plain: Teacher, layout: str, folded: bool, dtype: torch.dtype, mode: str, image: Tensor) -> Teacher:
    """A copy of the teacher that is run so."""
    teacher = copy.deepcopy(plain)
    with torch.inference_mode():
        if folded:
            fold_batch_norms(teacher.model, lambda: teacher.model(image))
        teacher.lay_out(LAYOUTS[layout])
        teacher.use(dtype)
    if mode != "none":
        teacher.compile_forward(mode)
    return teacher


@torch.no_grad()
def calibrate(teacher: Teacher, images: Tensor) -> None:
    """Running statistics of these images, so that features of random weights stay of one size through the network."""
    norms = [each for each in teacher.modules() if isinstance(each, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the plain mean over batches
        norm.reset_running_stats()
        norm.train()
    teacher.model(images)
    for norm in norms:
        norm.eval()


def measure(options: argparse.Namespace, batch_size: int, size: int, device: torch.device) -> dict[str, Any]:
    """All arms at one batch and image size."""
    torch.manual_seed(0)
    plain = load_teacher(options.teacher, 1000, weights="random", precision="float32").to(device)
    images = torch.randn(max(batch_size, 8), 3, size, size, device=device)
    calibrate(plain, images[:8])
    images = images[:batch_size]
    exact = plain(images)
    teachers = {PLAIN: plain}
    dtypes = [getattr(torch, name) for name in options.dtypes]
    for layout, folded, dtype, mode in itertools.product(LAYOUTS, (False, True), dtypes, options.modes):
        words = [layout, *(["folded"] if folded else []), *([str(dtype)[6:]] if dtype != torch.float32 else [])]
        name = ", ".join([*words, *([f"compiled {mode}"] if mode != "none" else [])])
        if name not in teachers:
            teachers[name] = arm(plain, layout, folded, dtype, mode, images[:1])
    teachers[f"{PLAIN}, again"] = plain
    arms: dict[str, Callable[[], Any]] = {name: partial(teacher, images) for name, teacher in teachers.items()}
    on_gpu = device.type == "cuda"
    times = cuda_rounds(arms, options.rounds, steps=20) if on_gpu else paired_rounds(arms, options.rounds)
    rows = {}
    print(f"\n{options.teacher}, batch {batch_size}, {size} px, {device}")
    print(f"{'':<44}{'images/s':>10}{'times plain':>13}{'95 % interval':>17}{'feature error':>15}{'logit error':>13}")
    for name, seconds in times.items():
        output = teachers[name](images)
        errors = [((a - b).norm() / b.norm()).item() for a, b in ((output.features, exact.features), (output.logits, exact.logits))]
        middle, low, high = ratio(times[PLAIN], seconds)
        rate = batch_size / float(np.median(seconds))
        rows[name] = {
            "images_per_second": rate,
            "ratio": middle,
            "low": low,
            "high": high,
            "feature_error": errors[0],
            "logit_error": errors[1],
        }
        print(f"{name:<44}{rate:>10.4g}{middle:>13.2f}{f'{low:.2f} to {high:.2f}':>17}{errors[0]:>15.1g}{errors[1]:>13.1g}")
    return {"batch_size": batch_size, "img_size": size, "arms": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="regnety_160")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8])
    parser.add_argument("--img-sizes", type=int, nargs="+", default=[224])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--modes", nargs="+", default=["none"], help="of torch.compile: none default reduce-overhead max-autotune")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument(
        "--quick", action="store_true", help="regnety_016, batch 2, 3 rounds, nothing written unless --output says where"
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.teacher, options.batch_sizes, options.rounds = "regnety_016", [2], 3
    if options.device == "cpu":
        torch.set_num_threads(1)
    device = torch.device(options.device)
    results = [measure(options, batch, size, device) for batch, size in itertools.product(options.batch_sizes, options.img_sizes)]
    if options.output or not options.quick:
        output = options.output or ROOT / "results" / f"speed_teacher_{options.device}.json"
        content = {"command": "python -m benchmarks.teacher " + " ".join(sys.argv[1:]), **facts(), "teacher": options.teacher}
        output.write_text(json.dumps({**content, "rounds": options.rounds, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
