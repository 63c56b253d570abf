"""The signals of a teacher on disk, so that training needs no teacher: written once, read shuffled and by several workers.

`writer.py` runs the teacher and writes, `reader.py` reads; `FORMAT.md` has the format of the files.
"""

from pathlib import Path

FORMAT_PATH = Path(__file__).parent / "FORMAT.md"
"""The format of the files, for programs that write or read them without this package."""
