"""Inputs that take new ways through the code of a reader: ``python -m tests.fuzz.coverage READER``.

Needs atheris (the extra ``fuzz``). Further arguments are libFuzzer's, such as ``-runs=100000`` or
``-max_total_time=60``; it ends with the first failure, a warning among them, and leaves the input
in a file of the working directory.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import atheris  # type: ignore[import-untyped, import-not-found, unused-ignore]

with atheris.instrument_imports(include=["backcast", "service", "trainer"]):
    from tests.fuzz.targets import TARGETS

_LIMITS = ("-rss_limit_mb=4096", "-timeout=20", "-max_len=65536")


def main() -> None:
    """Fuzz one reader until something stops it."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"Name one of these readers: {', '.join(TARGETS)}.")
    target = TARGETS[sys.argv[1]]
    with tempfile.TemporaryDirectory() as folder:
        corpus, place = Path(folder) / "corpus", Path(folder) / "place"
        corpus.mkdir()
        place.mkdir()
        for number, content in enumerate(target.seeds()):
            (corpus / str(number)).write_bytes(content)
        accepts = target.reader(place)
        options = [*_LIMITS, *sys.argv[2:]]
        warnings.simplefilter("error")
        atheris.Setup([sys.argv[0], str(corpus), *options], lambda content: accepts(content) and 0)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
