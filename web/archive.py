"""The built page as one file, for machines without node: `python -m web.archive` writes web/page.zip from web/dist, for `python demo.py
--page web/page.zip`. Equal pages make equal archives."""

from __future__ import annotations

import argparse
import hashlib
import zipfile
from pathlib import Path

from demo import BUILT, require_page
from machine.files import replacing
from machine.interruption import refusals_in_one_line
from machine.paths import REPOSITORY, user_path

ARCHIVE = REPOSITORY / "web" / "page.zip"


def write_archive(folder: Path, path: Path) -> None:
    """Write a built page, without its compressed copies, into a zip file. Raises OSError without a page or for an unwritable file."""
    require_page(folder)
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file() and file.suffix != ".gz"}
    files["LICENSE.txt"] = REPOSITORY / "LICENSE"
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name), files[name].read_bytes(), zipfile.ZIP_DEFLATED)  # no date of the file


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the built page into one zip file.", allow_abbrev=False)
    parser.add_argument("--page", type=user_path, default=BUILT, help="folder of a built page; default: web/dist")
    parser.add_argument("--output", type=user_path, default=ARCHIVE, help="default: web/page.zip")
    arguments = parser.parse_args(argv)
    with refusals_in_one_line():
        write_archive(arguments.page, arguments.output)
    content = arguments.output.read_bytes()
    print(f"{arguments.output}: {len(content) / 1e6:.1f} MB, SHA-256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
