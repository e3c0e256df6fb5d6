"""Sort pictures into folders by their predicted class, for review by hand."""

import os
import re
import shutil
from pathlib import Path

from zoo.errors import ZooError
from zoo.files import printable
from zoo.images import NamedPicture, Picture
from zoo.predictor import Prediction


class Review:
    """FOLDER/CLASS/0.4120 NAME: sorted by name, the least sure answers come first. Bad pictures are left out.

    link   link instead of copying
    again  `folder` may hold pictures of an earlier part of the run; otherwise it must be empty or new
    Raises ZooError if it cannot be written, or if a picture to link to is in a zip.
    """

    def __init__(self, folder: Path, link: bool = False, again: bool = False):
        self.folder, self.link, self.flag = folder, link, "--link-to" if link else "--copy-to"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not again and any(folder.iterdir()):
                raise ZooError(f"{self.flag} {folder} is not empty: name a new folder.")
        except OSError as error:
            raise ZooError(f"{self.flag} {folder} cannot be written: {error.strerror or error}.") from error

    def add(self, row: Prediction, picture: Picture | NamedPicture, threshold: float | None = None) -> None:
        """Put one picture into the folder of its likeliest class, or into "unsure" below the threshold.

        Adding it again changes nothing.
        """
        if not row.top:
            return
        content = picture.picture if isinstance(picture, NamedPicture) else picture
        name = f"{row.top[0].probability:.4f} {file_name(row.source)}"
        unsure = threshold is not None and row.top[0].probability < threshold
        target = self.folder / ("unsure" if unsure else file_name(row.top[0].label)) / name
        try:
            target.parent.mkdir(exist_ok=True)
            target.unlink(missing_ok=True)
            if isinstance(content, bytes):
                if self.link:
                    raise ZooError(f"{printable(row.source)} is in a zip and cannot be linked to: use --copy-to.")
                target.write_bytes(content)
            elif self.link:
                target.symlink_to(os.path.abspath(str(content)))
            else:
                shutil.copyfile(str(content), target)
        except OSError as error:
            raise ZooError(f"{self.flag} {target} cannot be written: {error.strerror or error}.") from error


def file_name(text: str) -> str:
    """A file name that is valid on any system: slashes and other signs become _, a long name loses its start."""
    name = re.sub(r'[<>:"/\\|?*\x00-\x1f]+', "_", printable(text)).strip(" ").rstrip(".")
    return name.encode()[-200:].decode(errors="ignore") if name.strip(".") else "_"
