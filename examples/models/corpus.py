"""Collect the three domains' text, without duplicates, and split it by file into train and held-out.

The split is a hash of the file's relative name, so it does not depend on which other files a machine has; two versions
of one file fall on the same side. `sources.py` says where text is; `train_tokenizer.py` turns it into tokens.

    python corpus.py --work DIR        # writes DIR/texts.json
"""

import argparse
import hashlib
import json
from pathlib import Path

from sources import DOMAINS, documentation_topics, sources

HELD_OUT_PERCENT = 5
MAX_DOMAIN_BYTES = 10_000_000
"""Keeps the domains the same size (Python, the smallest, has 9.7 MB); files are taken in hash order."""


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def is_held_out(name: str) -> bool:
    """A claim about the name alone: about one name in twenty."""
    return int(digest(name), 16) % 100 < HELD_OUT_PERCENT


def collect() -> dict[str, dict[str, list[str]]]:
    """`texts[domain][split]`, each a list of file contents in an order fixed by the files' names."""
    named: dict[str, list[tuple[str, str]]] = {domain: [] for domain in DOMAINS}
    named["prose"] += documentation_topics()
    for source in sources():
        named[source.domain] += source.texts()
    texts: dict[str, dict[str, list[str]]] = {domain: {"train": [], "held_out": []} for domain in DOMAINS}
    for domain, files in named.items():
        seen: set[str] = set()
        num_bytes = 0
        for name, text in sorted(files, key=lambda file: digest(file[0])):
            content = digest(" ".join(text.split()))
            if content in seen or num_bytes > MAX_DOMAIN_BYTES:
                continue
            seen.add(content)
            num_bytes += len(text.encode())
            texts[domain]["held_out" if is_held_out(name) else "train"].append(text)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="scratch folder, outside the repository")
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    texts = collect()
    (work / "texts.json").write_text(json.dumps(texts))
    for domain, splits in texts.items():
        for split, files in splits.items():
            print(f"{domain:8s} {split:9s} {len(files):5d} files {sum(len(t.encode()) for t in files):10,d} bytes")


if __name__ == "__main__":
    main()
