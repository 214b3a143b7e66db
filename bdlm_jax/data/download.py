"""Fetching published data sets: resumed, verified, and never half there.

    python -m bdlm_jax.data.download Grocery_and_Gourmet_Food --year 2014 --out data/grocery

A file grows as NAME.part and takes its name only when it is complete and its checksum fits. Archives are unpacked
member by member, and nothing in them can leave the folder or fill the disk.
"""

import argparse
import hashlib
import http.client
import os
import re
import shutil
import stat
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from bdlm_jax.runtime.door import REFUSED, refuse
from bdlm_jax.runtime.files import replacing, write_text
from bdlm_jax.types import InputError

_CHUNK = 1 << 20
_TIMEOUT = 60
_GROUPLENS = "https://files.grouplens.org/datasets/movielens"
# the md5 that GroupLens publishes for its frozen sets; latest-small is replaced from time to time and has none here
_MOVIELENS_MD5 = {
    "ml-100k": "0e33842e24a9c977be4e0107933c0723",
    "ml-1m": "c4d9eecfca2ab87c1945afe126590906",
    "ml-20m": "cd245b17a1ae2cc31bb14903e1204af3",
    "ml-latest-small": None,
}
_AMAZON = {
    2014: ("reviews_{}{}.json.gz", "meta_{}.json.gz"),
    2018: ("categoryFilesSmall/{}{}.json.gz", "metaFiles2/meta_{}.json.gz"),
    2023: ("review_categories/{}{}.jsonl.gz", "meta_categories/meta_{}.jsonl.gz"),
}
_AMAZON_PUBLISHERS = {
    2014: "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles",
    2018: "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2",
    2023: "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw",
}


def download(
    url: str, path: str | Path, *, sha256: str | None = None, md5: str | None = None, progress=True, retries: int = 4
) -> Path:
    """Fetches `url` to `path`, going on where an earlier attempt stopped; returns `path`.

    A file that is there already is kept if its checksum fits (or none is given); one that comes and does not fit is
    removed. `retries` counts the attempts after the first when the connection fails.
    """
    path = Path(path)
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url} is no http or https address; give the publisher's.")
    if path.exists() and _fits(path, sha256, md5):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part, tag = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.tag")
    for attempt in range(retries + 1):
        try:
            _fetch(url, part, tag, progress, has_checksum=bool(sha256 or md5))
            break
        except urllib.error.HTTPError as error:
            if error.code not in (408, 429, 500, 502, 503, 504) or attempt == retries:
                answer = f"{error.code} {error.reason}"
                raise InputError(f"{url} answers {answer}; check the address or try later.") from None
        except (OSError, http.client.HTTPException) as error:
            if attempt == retries:
                kept = f"; {part.stat().st_size} bytes are kept and the next call goes on" if part.exists() else ""
                raise InputError(f"{url} broke off {retries + 1} times ({error}){kept}.") from None
        time.sleep(min(0.1 * 2**attempt, 5.0))
    if not _fits(part, sha256, md5):
        part.unlink()
        tag.unlink(missing_ok=True)
        raise InputError(f"{url} is not the file that its checksum names, and was removed; fetch it again.")
    os.replace(part, path)
    tag.unlink(missing_ok=True)
    return path


def _fetch(url: str, part: Path, tag: Path, progress: bool, *, has_checksum: bool) -> None:
    """Makes `part` complete, or raises with what came kept in it."""
    start = part.stat().st_size if part.exists() else 0
    known = tag.read_text() if tag.exists() else ""
    if start and not known and not has_checksum:
        start = 0  # nothing could tell whether the publisher has changed the file since
    request = urllib.request.Request(url, headers={"User-Agent": "bdlm_jax", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
        if known:
            request.add_header("If-Range", known)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not start:
            raise
        error.close()
        if error.headers.get("Content-Range", "") == f"bytes */{start}":
            return  # the part was complete already
        part.unlink()
        raise OSError("the kept part does not fit the file any more") from None
    with response:
        answered = re.match(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        resumed = response.status == 206 and answered is not None and int(answered[1]) == start
        if response.status == 206 and not resumed:
            part.unlink(missing_ok=True)
            raise OSError("the server sent another range than the one asked for")
        start = start if resumed else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        etag = response.headers.get("ETag", "")
        tag.write_text("" if etag.startswith("W/") else etag or response.headers.get("Last-Modified", ""))
        shown = {"desc": part.name.removesuffix(".part"), "unit": "B", "unit_scale": True, "disable": not progress}
        with open(part, "ab" if resumed else "wb") as file, tqdm(initial=start, total=total, **shown) as bar:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and part.stat().st_size != total:
        raise OSError(f"{part.stat().st_size} of {total} bytes came")


def _digest(path: Path, name: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(name, usedforsecurity=False)).hexdigest()


def _fits(path: Path, sha256: str | None, md5: str | None) -> bool:
    wanted = {"sha256": sha256, "md5": md5}
    return all(_digest(path, name) == value.strip().lower() for name, value in wanted.items() if value)


def safe_unzip(archive: str | Path, folder: str | Path, *, max_bytes: int = 8 << 30) -> list[Path]:
    """Unpacks a zip into `folder` and nowhere else; the files, in the archive's order.

    Nothing is unpacked if the archive's own list shows a path outside, a link, or more than `max_bytes` in all; a
    member that is longer than the list claims is refused as broken.
    """
    folder = Path(folder)
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if not member.is_dir()]
            for member in members:
                _check_member(archive, member)
            if sum(member.file_size for member in members) > max_bytes:
                raise InputError(f"{archive} unpacks to more than {max_bytes} bytes; raise max_bytes if you trust it.")
            paths = []
            for member in members:
                target = folder / member.filename
                if not target.resolve().is_relative_to(folder.resolve()):
                    raise InputError(f"{archive}: {target} would leave the folder through a link; use another one.")
                if target.is_dir():
                    raise InputError(f"{archive}: {target} is a folder already; use another one.")
                with opened.open(member) as source, replacing(target) as partial, open(partial, "wb") as file:
                    shutil.copyfileobj(source, file, _CHUNK)
                paths.append(target)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{archive} cannot be unpacked ({error}); fetch it again.") from error
    return paths


def _check_member(archive, member: zipfile.ZipInfo) -> None:
    # The raw name too: ZipInfo cuts names at a NUL and turns the system's separator into "/".
    for name in {member.filename, member.orig_filename}:
        pure = PurePosixPath(name)
        if not pure.parts or pure.is_absolute() or ".." in pure.parts or re.search(r"^[A-Za-z]:|[\\\0]", name):
            raise InputError(f"{archive}: {name!r} points outside the folder; do not use this archive.")
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise InputError(f"{archive}: {member.filename!r} is a link or a special file; do not use this archive.")
    if member.flag_bits & 1:
        raise InputError(f"{archive}: {member.filename!r} is encrypted; unpack it yourself.")


def fetch_movielens(name: str, folder: str | Path, *, publisher: str = _GROUPLENS, progress: bool = True) -> Path:
    """Downloads a MovieLens set from GroupLens, checks its md5 and unpacks it; the folder is for `read_movielens`."""
    if name not in _MOVIELENS_MD5:
        raise InputError(f"there is no MovieLens set {name!r} here; use one of {', '.join(_MOVIELENS_MD5)}.")
    folder, url = Path(folder), f"{publisher}/{name}.zip"
    archive = folder / f"{name}.zip"
    md5 = _MOVIELENS_MD5[name] or _published_md5(url)
    if md5:
        download(url, archive, md5=md5, progress=progress)
    else:
        _download_recorded(url, archive, progress)
    target = folder / name
    done = target / ".unpacked"
    if not done.exists():
        safe_unzip(archive, folder)
        if not target.is_dir():
            raise InputError(f"{archive} does not hold the folder {name}; unpack it yourself.")
        done.write_text(_digest(archive, "sha256") + "\n")
    return target


def _published_md5(url: str) -> str | None:
    """The checksum in the publisher's file NAME.md5, or None where there is none."""
    try:
        with urllib.request.urlopen(f"{url}.md5", timeout=_TIMEOUT) as response:
            found = re.search(rb"\b[0-9a-fA-F]{32}\b", response.read(4096))
    except (OSError, http.client.HTTPException):
        return None
    return found[0].decode().lower() if found else None


def fetch_amazon(
    category: str,
    year: int,
    folder: str | Path,
    *,
    five_core: bool = True,
    publisher: str | None = None,
    progress: bool = True,
) -> dict[str, Path]:
    """Downloads the "reviews" and "metadata" of an Amazon category, for `read_amazon`.

    The terms of use are the publisher's (research), and so are the names: "Beauty" (2014), "All_Beauty" (2018, 2023).
    No checksum is published, so the sha256 of the first download is kept beside each file, and a file that changes
    later is refused. 2023 has no `five_core`.
    """
    if year not in _AMAZON:
        raise InputError(f"the Amazon reviews have no edition of {year}; use 2014, 2018 or 2023.")
    if not re.fullmatch(r"[A-Za-z0-9_]+", category):
        raise InputError(f"{category!r} is no category as the publisher spells them, 'Grocery_and_Gourmet_Food' say.")
    base, suffix = publisher or _AMAZON_PUBLISHERS[year], "_5" if five_core and year != 2023 else ""
    reviews, metadata = (name.format(category, suffix) for name in _AMAZON[year])
    return {
        kind: _download_recorded(f"{base}/{name}", Path(folder) / Path(name).name, progress)
        for kind, name in (("reviews", reviews), ("metadata", metadata))
    }


def _download_recorded(url: str, path: Path, progress: bool) -> Path:
    record = path.with_name(path.name + ".sha256")
    if record.exists():
        found = re.match(r"[0-9a-f]{64}\b", record.read_text())
        if not found:
            raise InputError(f"{record} holds no sha256; remove it to accept the file anew.")
        return download(url, path, sha256=found[0], progress=progress)
    download(url, path, progress=progress)
    write_text(record, f"{_digest(path, 'sha256')}  {path.name}\n")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bdlm_jax.data.download", description="Fetches the Amazon reviews and metadata of a category."
    )
    parser.add_argument("category", help="as the publisher spells it: Grocery_and_Gourmet_Food")
    parser.add_argument("--year", type=int, default=2014, help=f"the edition: {', '.join(map(str, _AMAZON))}")
    parser.add_argument("--out", required=True, help="the folder that config.data.path then names")
    given = parser.parse_args(arguments)
    try:
        for path in fetch_amazon(given.category, given.year, given.out).values():
            print(path)
    except REFUSED as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
