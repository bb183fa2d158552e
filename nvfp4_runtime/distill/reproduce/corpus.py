"""`python -m nvfp4_runtime.distill.reproduce.corpus PACKAGES OUT`: English prose out of unpacked Debian packages.

PACKAGES holds a folder for each package, unpacked (`dpkg -x`): anarchism, debian-handbook, debian-history, dict-foldoc,
fortunes, stellarium-data, wesnoth-1.16-data. In OUT come train.jsonl and held.jsonl: paragraphs of at least 80
characters, mostly letters, in pieces of about 4,000, shuffled by a seed, in fixed shares. A piece that shares 13 words
in a row with a text named by --leave-out is dropped, so that nothing is trained on what it is measured by.
"""

from __future__ import annotations

import argparse
import gzip
import html.parser
import json
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

SHARES = {
    "anarchism": 0.50, "foldoc": 0.22, "fortunes": 0.08, "debian-handbook": 0.06, "stellarium": 0.05, "wesnoth": 0.04,
    "debian-history": 0.01,
}  # fmt: skip
CHARACTERS, HELD, PIECE, LEAST, NGRAM = 4_500_000, 60, 4000, 1500, 13
_BLOCKS = {"p", "div", "li", "h1", "h2", "h3", "h4", "br", "blockquote", "dd", "dt", "tr", "ul", "ol"}
_SKIPPED = {"script", "style", "head", "nav", "pre", "table"}
Document = tuple[str, str]  # (source, text)


class _Text(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skip = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skip += tag in _SKIPPED
        if tag in _BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in _SKIPPED and self._skip:
            self._skip -= 1
        if tag in _BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self._skip:
            self.parts.append(data)


def paragraphs(page: str) -> list[str]:
    """A page's paragraphs that are prose."""
    parser = _Text()
    parser.feed(page)
    found = (re.sub(r"\s+", " ", part).strip() for part in re.split(r"\n\s*\n", "".join(parser.parts)))
    return [p for p in found if len(p) >= 80 and p.count(" ") >= 12 and _letters(p) > 0.9]


def _letters(text: str) -> float:
    return sum(c.isalpha() or c in " ,.'" for c in text) / len(text)


def documents(root: Path) -> Iterator[Document]:
    """Every document of the packages below `root` with more than 600 characters."""
    for source, parts in _all_parts(root):
        text = "\n".join(parts)
        if len(text) > 600:
            yield source, text


def _all_parts(root: Path) -> Iterator[tuple[str, list[str]]]:
    for pattern, source in (
        ("anarchism/**/html/sec*.html", "anarchism"),
        ("debian-history/**/*.en.html", "debian-history"),
        ("debian-handbook/**/html/en-US/*.html", "debian-handbook"),
    ):
        for file in sorted(root.glob(pattern)):
            yield source, paragraphs(_decoded(file.read_bytes()))
    for file in root.glob("dict-foldoc/**/foldoc.dict.dz"):
        raw = gzip.decompress(file.read_bytes()).decode("utf-8", "replace")
        entries = [re.sub(r"[{}]", "", re.sub(r"\s+", " ", e)).strip() for e in re.split(r"\n(?=\S)", raw)]
        entries = [re.sub(r"<[^>]*>", "", entry) for entry in entries if len(entry) > 200]
        yield from (("foldoc", entries[i : i + 12]) for i in range(0, len(entries), 12))
    for pattern in ("description.en.utf8", "description.md", "*.en.html"):
        for file in sorted(root.glob(f"stellarium-data/**/{pattern}")):
            yield "stellarium", paragraphs(file.read_text(errors="replace"))
    for file in sorted(root.glob("fortunes/usr/share/games/fortunes/*")):
        if file.is_file() and file.suffix == "":
            quotes = file.read_text(errors="replace").split("\n%\n")
            yield "fortunes", [re.sub(r"\s+", " ", quote).strip() for quote in quotes if len(quote) > 200]
    for file in sorted(root.glob("wesnoth*/**/*.cfg")):
        told = re.findall(r'(?:story|message|description)\s*=\s*_\s*"([^"]{80,})"', file.read_text(errors="replace"))
        yield "wesnoth", [re.sub(r"\s+", " ", each) for each in told]


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("cp1252", "replace")


def pieces(found: Iterable[Document], left_out: set[tuple[str, ...]]) -> tuple[list[Document], int]:
    """(pieces of about PIECE characters, how many were dropped for words they share with what is left out)."""
    kept, dropped = list[Document](), 0
    for source, text in found:
        current, size = list[str](), 0
        for paragraph in [*text.split("\n"), None]:
            if paragraph is None or size > PIECE:
                piece = "\n".join(current)
                if len(piece) > LEAST:
                    if left_out.isdisjoint(ngrams(piece)):
                        kept.append((source, piece))
                    else:
                        dropped += 1
                current, size = [], 0
            if paragraph is not None:
                current.append(paragraph)
                size += len(paragraph)
    return kept, dropped


def ngrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


def deal(kept: Iterable[Document], seed: int) -> tuple[list[Document], list[Document]]:
    """(train, held out), each source in its share, in an order of the seed."""
    rng, by_source = random.Random(seed), defaultdict[str, list[Document]](list)
    for piece in kept:
        by_source[piece[0]].append(piece)
    for found in by_source.values():
        rng.shuffle(found)
    train, held = list[Document](), list[Document]()
    for source, found in by_source.items():
        count = max(1, int(HELD * SHARES[source]))
        held += found[:count]
        train += found[count : count + int(CHARACTERS * SHARES[source] / (PIECE + 100))]
    rng.shuffle(train)
    rng.shuffle(held)
    return train, held


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nvfp4_runtime.distill.reproduce.corpus", description=__doc__)
    parser.add_argument("packages", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--leave-out", type=Path, action="append", default=[], metavar="TEXT")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    left_out = set().union(*(ngrams(path.read_text(encoding="utf-8")) for path in args.leave_out))
    kept, dropped = pieces(documents(args.packages), left_out)
    if not kept:
        parser.error(f"no text found below {args.packages}; expected unpacked packages: see --help")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, part in zip(("train.jsonl", "held.jsonl"), deal(kept, args.seed), strict=True):
        lines = (json.dumps({"source": source, "text": text}) for source, text in part)
        (args.out / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{args.out / name}: {len(part)} pieces, {sum(len(text) for _, text in part):,} characters")
    print(f"{dropped} piece(s) dropped for words shared with the texts left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
