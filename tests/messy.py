"""A folder as people have it: python -m tests.messy DIR makes DIR/messy, and a part of it in DIR/disk."""

import struct
import sys
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image

from tests.test_images import as_bytes, drawing, icon, png
from tests.test_own_pictures import paint, paint_classes
from tests.test_pixels import RAMP, stack, tiff


def odd_pictures() -> dict[str, tuple[bytes, bool]]:
    """Pictures that files leave something open about, or that are not read; and whether an answer comes of them."""
    jpeg = as_bytes(drawing(size=(320, 400)), "JPEG", quality=90)
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = (RAMP * 257).astype(np.uint16)
    huge = b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 30000, 30000, 1, 24, *[0] * 6)
    return {
        "12 bits.tif": (tiff((RAMP * 16).astype(np.uint16)), True),
        "white is zero.tif": (tiff(deep, photometric=0), True),
        "32 bits.tif": (tiff((RAMP * 2**24).astype(np.uint32)), True),
        "bigtiff.tif": (tiff(RAMP.astype(np.uint8), big=True), True),
        "bigtiff big-endian.tif": (tiff(RAMP.astype(np.uint8), ">", big=True), False),
        "float colours.tif": (tiff(np.zeros((4, 4, 3), np.float32), photometric=2), False),
        "pages.tif": (stack(*(np.full((30, 40), value, np.uint8) for value in (10, 90, 50))), True),
        "no end.jpg": (jpeg[:-2], True),
        "nearly no end.jpg": (jpeg[: len(jpeg) * 9 // 10], True),
        "half.jpg": (jpeg[: len(jpeg) // 2], False),
        "30 megapixels.png": (png(6000, 5000, 1, 0, bytes(5000 * 751)), True),
        "900 megapixels.bmp": (huge, False),
        "on its side.jpg": (as_bytes(drawing(), "JPEG", exif=exif), True),
        "four colours.jpg": (as_bytes(drawing("CMYK"), "JPEG"), True),
        "moving.gif": (as_bytes(drawing("P"), "GIF", save_all=True, append_images=[drawing("P")]), True),
        "icon named.png": (icon(as_bytes(Image.new("RGBA", (16, 16), "red"))), True),
        "icon of 30000 pixels a side.png": (icon(png(30000, 30000, 1, 0, b"")), False),
        "text.jpg": (b"not a picture", False), "nothing.png": (b"", False)}


def messy(root: Path, disk: Path) -> Path:
    """Two classes, ant and bee, of pictures good and bad, among all that cameras and systems leave behind."""
    paint_classes(root, {"ant": 12})
    paint_classes(disk, {"bee": 12})
    paint(root / "ant/deep/deeper/x.png", 5)
    paint(root / "ant" / unicodedata.normalize("NFD", "é ß.png"), 6)
    for name, (content, _) in odd_pictures().items():
        (disk / "bee" / name).write_bytes(content)
    touch(root, "ant/phone.HEIC", "ant/raw.NEF", "ant/Thumbs.db", "ant/000.xmp", "ant/@eaDir/000.png/x.jpg",
          "ant/._0.png", "__MACOSX/ant/._000.png", "ant/movie.MP4", "ant/labels.csv", "ant/locked/hidden.png")
    (root / "bee").symlink_to(disk / "bee")
    touch(disk, "bee/desktop.ini", "bee/broken.jpg")
    (disk / "bee/gone.png").symlink_to(disk / "no such.png")
    (disk / "bee/loop").symlink_to(root)
    (root / "cat").mkdir()
    return root


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


if __name__ == "__main__":
    print(messy(Path(sys.argv[1]) / "messy", Path(sys.argv[1]) / "disk"))
