"""Documents of general text: a plain file with one a line, or JSON lines with a field `text`."""

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path

from bdlm_jax.types import InputError

_OPENERS = {".gz": gzip.open, ".xz": lzma.open}
_BROKEN = (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error)


def read_documents(path: str | Path, *, max_tokens: float = float("inf")) -> list[str]:
    """Reads the documents of a .txt or .jsonl file, or of one with .gz or .xz behind; empty ones are left out.

    A record of JSON lines becomes "title (year). genres. text", as far as it has these fields. Reading ends behind the
    document whose words reach `max_tokens`, for a word is at least a token.
    """
    documents, words = [], 0
    try:
        for document in _lines(Path(path)):
            documents.append(document)
            words += document.count(" ") + 1
            if words > max_tokens:
                break
    except InputError:
        raise
    except _BROKEN as error:
        raise InputError(
            f"{path} cannot be read ({error}); give a whole UTF-8 text file (.txt, .gz, .xz), a document a line, or "
            "JSON lines (.jsonl) with a field text."
        ) from error
    if not (found := [document for document in documents if document]):
        raise InputError(f"{path} holds no text; give a document a line.")
    return found


def _lines(path: Path) -> Iterator[str]:
    is_json = ".jsonl" in path.suffixes[-2:]
    with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if "\0" in line:
                raise ValueError("it is no text")
            yield _document(line, f"{path}, line {number}") if is_json else line.strip()


def _document(line: str, where: str) -> str:
    if not line.strip():
        return ""
    try:
        record = json.loads(line)
        text = record["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: not a JSON object with a field text ({error!r}); mend that line.") from error
    year, genres = record.get("year"), record.get("genres") or []
    title = str(record.get("title") or "") + (f" ({year})" if year else "")
    genres = ", ".join(map(str, genres)) if isinstance(genres, list) else str(genres)
    parts = [part.strip() for part in (title, genres) if part.strip()]
    return " ".join(". ".join([*parts, str(text)]).split())
