"""The English text of Debian packages, as folders of .txt files that `small_teacher.py` and `larger_teacher.py` can read.

    apt-get download linux-doc-6.1 python3.11-doc anarchism ...
    python examples/benchmarks/debian_text.py --output text *.deb

Pages (.html), sources of pages (.rst.txt, .txt, .pod) and dictionaries (.dict.dz) are read; markup is dropped, and with it
the content of scripts, styles and navigation. One file a document in a folder a package; a package gives no more than
--megabytes, so that none outweighs the others. Packages are unpacked, not installed.
"""

import argparse
import gzip
import random
import re
import subprocess
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

SKIPPED = {"script", "style", "nav", "header", "footer", "head", "svg", "math", "select", "button"}
BLOCKS = {"p", "div", "br", "li", "tr", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "dt", "dd", "table", "section"}
SHORTEST = 400  # characters: pages of links alone are shorter
LANGUAGES = "de es fr it ja ko pt ru tr zh da nl pl sv cs hu vi id el ca ro uk sr nb fa ar hr fi".replace(" ", "|")
TRANSLATED = re.compile(rf"[./_-]({LANGUAGES})([-_][a-z]{{2,4}})?(\.utf8|[./]|$)", re.IGNORECASE)


class Words(HTMLParser):
    """Collects what a reader of a page sees of its text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in SKIPPED:
            self.hidden += 1
        elif tag in BLOCKS:
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in SKIPPED:
            self.hidden = max(0, self.hidden - 1)

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.pieces.append(data)


def text_of(file: Path) -> str:
    """Return the text of one file; of a page without its markup."""
    if file.name.endswith(".dz"):
        return gzip.decompress(file.read_bytes()).decode("utf-8", errors="replace")
    raw = file.read_bytes()
    raw = gzip.decompress(raw) if file.suffix == ".gz" else raw
    text = raw.decode("utf-8", errors="replace")
    if ".html" not in file.name:
        return text
    page = Words()
    page.feed(text)
    return re.sub(r"\n\s*\n\s*", "\n\n", "".join(page.pieces))


def documents(folder: Path) -> Iterator[str]:
    """Yield the documents of an unpacked package in an order that is the same each time, sources of pages before pages."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    files = [file for file in files if not TRANSLATED.search(str(file.relative_to(folder)))]
    sources = [file for file in files if "_sources" in file.parts and file.suffix == ".txt"]
    pages = [file for file in files if file.name.endswith((".html", ".html.gz"))]
    others = [file for file in files if file.suffix in (".txt", ".pod") or file.name.endswith((".dict.dz", ".txt.gz"))]
    chosen = sources or pages or others
    random.Random(0).shuffle(chosen)
    for file in chosen:
        if len(text := text_of(file)) >= SHORTEST:
            yield text


def write(package: Path, output: Path, most: int) -> int:
    """Write a package's documents, up to `most` characters, and return how many characters they are."""
    name = package.name.partition("_")[0]
    written = 0
    with tempfile.TemporaryDirectory() as unpacked:
        subprocess.run(["dpkg", "-x", package, unpacked], check=True)
        for number, text in enumerate(documents(Path(unpacked))):
            for part, start in enumerate(range(0, len(text), 1 << 20)):  # a dictionary is one long file
                (output / name).mkdir(parents=True, exist_ok=True)
                piece = text[start : start + (1 << 20)]
                (output / name / f"{number:05}-{part:02}.txt").write_text(piece, encoding="utf-8")
                written += len(piece)
                if written >= most:
                    return written
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, nargs="+", help=".deb files")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=12.0, help="at most, of each package")
    args = parser.parse_args()
    for package in args.packages:
        written = write(package, args.output, int(args.megabytes * 1e6))
        print(f"{package.name.partition('_')[0]:28} {written / 1e6:6.1f} MB", flush=True)


if __name__ == "__main__":
    main()
