"""`python -m experiments.data`: fetches every data set, checks it, says what it is."""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence

from attn_jax._program import program
from experiments.data import (
    byte_text,
    corpus,
    graphs,
    images,
    molecules,
    pronunciations,
    speech,
    text,
)
from experiments.data.fetch import DataError, DataSet, default_cache_dir

#: What loads a set that is none of images, by name; and the module's `Files`.
LOADERS: dict[str, Callable[[pathlib.Path], DataSet]] = {
    "brown": text.load_brown,
    "festvox_ru": speech.load_festvox_ru,
    "wordnet": graphs.load_wordnet,
    "melting_point": functools.partial(molecules.load_molecules, "melting_point"),
    "spam": byte_text.load_spam,
    "paragraphs": byte_text.load_paragraphs,
    "verses": byte_text.load_verses,
    "logp": functools.partial(molecules.load_molecules, "logp"),
    "cmudict": pronunciations.load_cmudict,
    "gcide": corpus.load_gcide,
}
NAMES = (*images.NAMES, *LOADERS)
#: What stands in, where that is allowed, for a set that cannot be had.
STAND_INS = {"festvox_ru": "fashion_mnist"}
_ROW = "{:<14} {:<12} {:>8} {:<16}  {}".format


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Fetch and describe data sets, a row each; 0 when all are there."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.data",
        description="Fetch data sets into the cache, check them and say what they are.",
    )
    parser.add_argument(
        "names",
        nargs="*",
        default=NAMES,
        metavar="NAME",
        help=f"{', '.join(NAMES)} or npz:PATH (default: all but npz:PATH)",
    )
    parser.add_argument(
        "--cache-dir",
        type=pathlib.Path,
        default=default_cache_dir(),
        help="where downloads are kept (default: %(default)s)",
    )
    parser.add_argument(
        "--allow-fallback",
        action="store_true",
        help="fetch Fashion-MNIST for recorded speech that cannot be had, and use "
        "scikit-learn's digits for images that cannot",
    )
    options = parser.parse_args(argv)
    print(_ROW("name", "cache", "MB", "sha256", "what it is, from where"))
    errors: dict[str, Exception] = {}
    names = [*options.names]
    for name in names:
        try:
            if name in LOADERS:
                data = LOADERS[name](options.cache_dir)
            else:
                data = images.load(
                    name,
                    cache_dir=options.cache_dir,
                    allow_fallback=options.allow_fallback,
                )
        except (DataError, ImportError, ValueError) as error:
            if options.allow_fallback and name in STAND_INS:
                names.append(STAND_INS[name])
                print(_ROW(name, "missing", "", "", f"{names[-1]} stands in: {error}"))
                continue
            errors[name] = error
            print(_ROW(name, "missing", "", "", "see below"))
            continue
        where, size = _kept(data.source, options.cache_dir)
        said = f"{data.contents()}, from {data.source}"
        print(_ROW(data.name, where, size, data.sha256[:16], said), flush=True)
    for name, why in errors.items():
        print(f"error: {name}: {why}", file=sys.stderr)
    return 1 if errors else 0


def _kept(source: str, cache: pathlib.Path) -> tuple[str, str]:
    """What the cache has to do with what came from `source`, and its megabytes."""
    origin, kept, folder = source.removesuffix(")").rpartition(" (kept in ")
    if not kept and not pathlib.Path(folder).is_relative_to(cache):
        return "not needed", ""
    files = (path for path in pathlib.Path(folder).iterdir() if path.is_file())
    size = sum(path.stat().st_size for path in files)
    return "fetched" if kept else "kept", f"{size / 1e6:.1f}"


if __name__ == "__main__":
    sys.exit(main())
