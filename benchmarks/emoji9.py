"""Builds Emoji9: 7,258 pictures of 1,906 emoji in four styles, 64 x 64 pixels on white, in nine classes, as an image folder.

    pip install resvg-py; python benchmarks/emoji9.py emoji9

Needs npm, whose packages (153 MB, kept in --packages) hold the pictures: Noto (Apache-2.0, Google), Twemoji (CC-BY-4.0, Twitter and
contributors), Fluent 3D and flat (MIT, Microsoft). The class is the Unicode group; variants of skin are left out. All styles of an emoji are
on one side of the split, so that no picture of a validation emoji is trained on.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

NOTO, TWEMOJI = "emoji-datasource-google@16.0.0", "emoji-datasource-twitter@16.0.0"
FLUENT_3D, FLUENT_FLAT = "@lobehub/fluent-emoji-3d@1.1.0", "@iconify-json/fluent-emoji-flat@1.2.6"
CLASSES = {
    "Activities": "activities",
    "Animals & Nature": "animals",
    "Flags": "flags",
    "Food & Drink": "food",
    "Objects": "objects",
    "People & Body": "people",
    "Smileys & Emotion": "smileys",
    "Symbols": "symbols",
    "Travel & Places": "travel",
}
SIDE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the folder to make")
    parser.add_argument("--packages", type=Path, default=Path("emoji9_packages"), help="where npm's archives are kept")
    options = parser.parse_args()
    if options.output.exists():
        sys.exit(f"error: {options.output}: is there already; give another name, or remove it")
    try:
        import resvg_py
    except ModuleNotFoundError:
        sys.exit("error: drawing SVG needs resvg-py: pip install resvg-py")

    emoji = json.loads(read(fetch(NOTO, options.packages), ["package/emoji.json"])["package/emoji.json"])
    class_of = {each["unified"]: CLASSES[each["category"]] for each in emoji if each["category"] in CLASSES}
    names = sorted(class_of)
    count = 0
    with tqdm(total=4 * len(names), unit="picture") as bar:
        for style, package in (("google", NOTO), ("twitter", TWEMOJI), ("fluent3d", FLUENT_3D), ("fluentflat", FLUENT_FLAT)):
            for name, picture in pictures(style, fetch(package, options.packages), names, resvg_py):
                split = "val" if int(hashlib.md5(name.encode()).hexdigest(), 16) % 5 == 0 else "train"
                folder = options.output / split / class_of[name]
                folder.mkdir(parents=True, exist_ok=True)
                on_white(picture).save(folder / f"{name}_{style}.webp", lossless=True)
                count += 1
                bar.update()
    print(f"{options.output}: {count:,} pictures")


def fetch(package: str, folder: Path) -> Path:
    """The archive of an npm package, downloaded once."""
    folder.mkdir(parents=True, exist_ok=True)
    name, _, version = package.removeprefix("@").replace("/", "-").rpartition("@")
    archive = folder / f"{name}-{version}.tgz"
    if not archive.exists():
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return archive


def read(archive: Path, wanted: list[str]) -> dict[str, bytes]:
    """Contents of members that are there."""
    names, found = set(wanted), {}
    with tarfile.open(archive) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.name in names else None
            if content is not None:
                found[member.name] = content.read()
    return found


def pictures(style: str, archive: Path, names: list[str], resvg_py: Any) -> Iterator[tuple[str, Image.Image]]:
    """(code points, picture) of each emoji that a style has."""
    if style == "fluentflat":
        content = read(archive, ["package/icons.json", "package/chars.json"])
        icons, chars = (json.loads(content[f"package/{name}.json"]) for name in ("icons", "chars"))
        for name in names:
            icon = icons["icons"].get(chars.get(name.lower()) or chars.get(name.lower().replace("-fe0f", "")))
            if icon is not None:
                size = icon.get("width", icons["width"]), icon.get("height", icons["height"])
                svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}">{icon["body"]}</svg>'
                yield name, Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE))))
        return
    pattern = {"fluent3d": "package/assets/{}.webp"}.get(style, f"package/img/{style}/64/{{}}.png")
    content = read(archive, [pattern.format(name.lower()) for name in names])
    for name in names:
        if (encoded := content.get(pattern.format(name.lower()))) is not None:
            yield name, Image.open(io.BytesIO(encoded))


def on_white(picture: Image.Image) -> Image.Image:
    """RGB, SIDE pixels a side."""
    picture = picture.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


if __name__ == "__main__":
    main()
