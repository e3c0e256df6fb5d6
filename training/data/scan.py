"""Scan all pictures in parallel: which cannot be decoded, their sizes, copies and brightness."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from zoo.errors import PictureError
from zoo.files import PICTURE_SUFFIXES, READ_SUFFIXES, suffix
from zoo.images import read
from zoo.machine import cores
from zoo.pixels import PUBLIC, Reading, Remarks

AT_ONCE = 32  # pictures per task
SHOWN_FROM = 2000  # pictures; with fewer there is no progress bar


@dataclass(frozen=True)
class Looked:
    """What a scan found in N pictures.

    errors      place of each picture that cannot be decoded -> why
    keys        equal if the pixels are equal; None for an unreadable picture
    sizes       int32 (N, 2): width and height, upright; 0 for an unreadable one
    moments     float64 (N, 2, 3): mean and mean square of each channel, in [0, 1]
    remarks     what files left open: pages, missing ends, the range of 16-bit grey
    """

    errors: dict[int, str]
    keys: list[bytes | None]
    sizes: np.ndarray
    moments: np.ndarray
    remarks: Remarks = field(default_factory=Remarks)


def look_at(paths: Sequence[Path], names: Sequence[str], reading: Reading = PUBLIC) -> Looked:
    """Decode every picture, on all cores (Pillow's decoders run outside Python's lock). `names` are for messages."""
    looked = Looked({}, [None] * len(paths), np.zeros((len(paths), 2), np.int32), np.zeros((len(paths), 2, 3)))

    def look(start: int) -> int:
        places = range(start, min(start + AT_ONCE, len(paths)))
        for i in places:
            try:
                picture, facts = read(paths[i], names[i], reading=reading)
            except PictureError as error:
                looked.errors[i] = str(error)
                continue
            looked.remarks.add(facts)
            pixels = picture.tobytes()
            looked.keys[i] = hashlib.blake2b(pixels, digest_size=16, salt=picture.width.to_bytes(8, "big")).digest()
            looked.sizes[i] = picture.size
            if picture.width * picture.height > 64 * 64:
                picture = picture.resize((64, 64), Image.Resampling.BOX)
            array = np.asarray(picture, np.float32).reshape(-1, 3) / 255
            looked.moments[i] = array.mean(0), (array**2).mean(0)
        return len(places)

    with (ThreadPoolExecutor(cores()) as pool,
          tqdm(total=len(paths), unit="picture", desc="scanning the pictures",
               disable=len(paths) < SHOWN_FROM or None) as bar):
        for done in pool.map(look, range(0, len(paths), AT_ONCE)):
            bar.update(done)
    return looked


def glance_at(paths: Sequence[Path], names: Sequence[str], reading: Reading = PUBLIC) -> Looked:
    """Check only that each file exists and has a known format, without decoding.

    Mean and standard deviation are those of ImageNet.
    """
    errors = {i: f"{names[i]} does not exist." for i, path in enumerate(paths) if not path.is_file()}
    errors |= {i: f"{name} has a format that is not supported: save it as JPEG or PNG." for i, name in enumerate(names)
               if suffix(name) in PICTURE_SUFFIXES - READ_SUFFIXES}
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return Looked(errors, [None] * len(paths), np.zeros((len(paths), 2), np.int32),
                  np.broadcast_to(np.stack([mean, mean**2 + std**2]), (len(paths), 2, 3)))
