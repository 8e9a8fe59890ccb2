"""Folders that Backcast makes for vectors, models and the registry."""

from pathlib import Path


def make_private(folder: Path) -> None:
    """Make a folder, and those on the way to it, for the user of this process alone (0700).

    Folders that are there keep the rights that somebody gave them.

    Raises:
        OSError: it cannot be made, or something else than a folder is in its place.
    """
    if not folder.is_dir():
        make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)  # another process may have made it meanwhile
