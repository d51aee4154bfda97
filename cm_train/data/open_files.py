"""From what a user names to the image files in it."""

import os
from pathlib import Path

from ..core.errors import InputError
from .folder_files import FolderFiles
from .image_files import SUFFIXES, ImageFiles
from .image_notes import unread
from .zip_files import ZipFiles


def open_files(root: str) -> ImageFiles:
    """The image files of a folder, of a .zip or of a folder in a .zip, read in place. Raises InputError without any."""
    path = Path(os.path.expanduser(root))  # os.path's functions take any text: no such user, a name too long
    if os.path.isdir(path):
        return FolderFiles(path)
    for archive in (path, *path.parents):
        if os.path.isfile(archive):
            return ZipFiles(archive, path.relative_to(archive).parts)
    raise InputError("no such data", str(path), "a folder of images, or a .zip of them", "set dataset.root=...")


def sorted_names(files: ImageFiles, root: str) -> list[str]:
    """All images in `files`, in the order of their indices. Raises InputError without any."""
    names = sorted(files.sizes)
    if not names:
        others = unread(files)
        got = root + (f", which has {others}" if others else "")
        raise InputError("no images found", got, f"files that end in {' '.join(SUFFIXES)}")
    return names
