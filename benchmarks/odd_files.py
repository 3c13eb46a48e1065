"""What is done with broken and odd image files: by each decoder, under `on_error=raise` and `skip`.

python benchmarks/odd_files.py [--out FILE]
"""

from __future__ import annotations

import argparse
import io
import os
import struct
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from paired import provenance, report  # noqa: E402
from PIL import Image  # noqa: E402

from augmentation.policies import imagenet  # noqa: E402
from crucible.options import ConfigError  # noqa: E402
from crucible.pictures import Decoder, installed  # noqa: E402
from datasets.image_folder import ImageFolderDataModule  # noqa: E402

SIDE = 48


def picture(seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((64, SIDE), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(picture(), exif=exif.tobytes())


def sixteen_bits() -> bytes:
    return saved(Image.fromarray(np.arange(SIDE * 64, dtype=np.uint16).reshape(SIDE, 64) * 21), "PNG")


def bomb_png() -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = (header, b"IDAT" + zlib.compress(bytes(100)), b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks
    )


def bomb_jpeg() -> bytes:
    content = bytearray(saved(picture()))
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", 60_000, 60_000)
    return bytes(content)


def damaged() -> bytes:
    content = bytearray(saved(picture(), quality=95))
    middle = len(content) * 3 // 4
    content[middle : middle + 12] = bytes(range(1, 13))
    return bytes(content)


def holding(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def no_permission(path: Path) -> None:
    path.write_bytes(saved(picture()))
    path.chmod(0)


FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "plain JPEG": ("jpg", holding(saved(picture()))),
    "truncated JPEG": ("jpg", holding(saved(picture())[:-300])),
    "JPEG without its last 2 bytes": ("jpg", holding(saved(picture())[:-2])),
    "12 bytes changed inside a JPEG": ("jpg", holding(damaged())),
    "header only": ("jpg", holding(saved(picture())[:200])),
    "empty": ("jpg", holding(b"")),
    "a text called .jpg": ("jpg", holding(b"not a picture")),
    "CMYK JPEG": ("jpg", holding(saved(picture().convert("CMYK")))),
    "grey JPEG": ("jpg", holding(saved(picture().convert("L")))),
    "progressive JPEG": ("jpg", holding(saved(picture(), progressive=True))),
    "EXIF orientation 6": ("jpg", holding(turned())),
    "1x1": ("jpg", holding(saved(Image.new("RGB", (1, 1), (9, 90, 200))))),
    "PNG called .jpg": ("jpg", holding(saved(picture(), "PNG"))),
    "16-bit PNG": ("png", holding(sixteen_bits())),
    "palette with transparency": ("png", holding(saved(picture().quantize(16), "PNG", transparency=0))),
    "RGBA": ("png", holding(saved(picture().convert("RGBA"), "PNG"))),
    "float TIFF": ("tif", holding(saved(Image.fromarray(np.ones((SIDE, 64), np.float32)), "TIFF"))),
    "animated GIF": ("gif", holding(saved(picture(), "GIF", save_all=True, append_images=[picture(1)]))),
    "animated WebP": ("webp", holding(saved(picture(), "WEBP", save_all=True, append_images=[picture(1)]))),
    "PNG of 50,000 x 50,000 (header)": ("png", holding(bomb_png())),
    "JPEG of 60,000 x 60,000 (header)": ("jpg", holding(bomb_jpeg())),
    "dangling link": ("jpg", lambda path: path.symlink_to("nowhere.jpg")),
    "a folder called .jpg": ("jpg", Path.mkdir),
    "no permission to read": ("jpg", no_permission),
}  # fmt: skip


def outcome(root: Path, name: str, decoder: Decoder, on_error: str) -> str:
    """What comes of a file among sound ones, read by a loader."""
    data = ImageFolderDataModule(
        name="odd", data_root_dir=str(root), batch_size=4, num_workers=0, test_split=0.0, val_split=0.5, cache="none",
        decoder=decoder, on_error=on_error, train_transforms=imagenet.TestTransform(size=16),
        test_transforms=imagenet.TestTransform(size=16),
    )  # fmt: skip
    data.setup("fit")
    names = list(data.train_dataset.names)
    if f"a/{name}" not in names:
        return "not listed: searched as a folder"
    samples = data.samples("test" if on_error == "skip" else "train")
    samples.indices = np.array([names.index(f"a/{name}"), names.index("b/sound.png")])
    samples.mark_unreadable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            batch = samples[0, [0, 1]]
        except ConfigError as error:
            return str(error).partition("cannot be read as an image (")[2].partition("); replace")[0] or str(
                error
            )
    if len(batch.index) < 2:
        return "skipped and counted"
    raw = data.train_dataset[names.index(f"a/{name}")][0]
    return f"read, {'x'.join(map(str, raw.shape))}, mean {raw.double().mean():.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for what, (suffix, make) in FILES.items():
        if what == "no permission to read" and os.geteuid() == 0:
            lines.append(f"| {what} | (root reads everything) | | |")
            continue
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            for label in "ab":
                (root / label).mkdir()
                picture(1).save(root / label / "sound.png")
            make(root / "a" / f"odd.{suffix}")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = [outcome(root, f"odd.{suffix}", *how) for how in
                         (("pil", "raise"), ("simplejpeg", "raise"), ("simplejpeg", "skip"))]  # fmt: skip
        lines.append(f"| {what} | {' | '.join(found)} |")
    version = getattr(installed(), "__version__", "")
    report(
        "# Broken and odd image files, and what is done with each\n\n"
        f"{provenance()}- Pillow {Image.__version__}, simplejpeg {version}\n\n"
        "The cells under `raise` are what was read (channels x height x width, and the mean of its pixels), or the "
        "reason in the error, which names the file and ends the run.\n\n"
        "| file | PIL, `raise` | simplejpeg, `raise` | `skip` |\n| --- | --- | --- | --- |\n"
        + "\n".join(lines) + "\n\n"
        "No decoder can tell that bytes inside a JPEG have changed: `task=pack` keeps a checksum of each record.",
        args.out,
    )  # fmt: skip


if __name__ == "__main__":
    main()
