import hashlib
import http.server
import io
import re
import threading
import zipfile

import pytest

from bdlm_jax.data import download as download_module
from bdlm_jax.data.download import _MOVIELENS_MD5, download, fetch_amazon, fetch_movielens, safe_unzip
from bdlm_jax.types import InputError

BODY = bytes(range(256)) * 4000
SHA256, MD5 = hashlib.sha256(BODY).hexdigest(), hashlib.md5(BODY).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """A publisher whose moods a test can choose; `asked` lists (path, Range header, bytes sent)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked = {}, []
        self.ranges, self.etag, self.cut_after, self.failures = True, '"v1"', None, 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        body = server.files.get(self.path)
        if body is None or server.failures > 0:
            code = 404 if body is None else 503
            server.failures -= 1
            self.send_error(code)
            return
        start = 0
        fresh = self.headers.get("If-Range") in (None, server.etag)
        if server.ranges and asked and fresh:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body) - start))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        sent = body[start:]
        if server.cut_after is not None:
            sent, server.cut_after = sent[: server.cut_after], None
        server.asked.append((self.path, asked, len(sent)))
        self.wfile.write(sent)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as running:
        running.files["/f.bin"] = BODY
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def fetch(server, folder, **options):
    """Downloads f.bin silently, and checks what came."""
    download(f"{server.url}/f.bin", folder / "f.bin", progress=False, **options)
    assert (folder / "f.bin").read_bytes() == BODY


def test_a_file_is_fetched_verified_and_kept(server, tmp_path, capsys):
    path = tmp_path / "new" / "f.bin"
    assert download(f"{server.url}/f.bin", path, sha256=SHA256.upper(), md5=MD5) == path
    assert path.read_bytes() == BODY
    assert names(path.parent) == ["f.bin"]
    assert re.search(r"f\.bin: 100%.*1\.02M/1\.02M", capsys.readouterr().err)
    download(f"{server.url}/f.bin", path, sha256=SHA256)
    assert len(server.asked) == 1


def test_a_broken_connection_goes_on_where_it_stopped(server, tmp_path, capsys):
    server.cut_after = 300_000
    fetch(server, tmp_path, sha256=SHA256)
    assert server.asked == [("/f.bin", None, 300_000), ("/f.bin", "bytes=300000-", len(BODY) - 300_000)]
    assert capsys.readouterr().err == ""


def test_a_part_of_an_earlier_run_goes_on(server, tmp_path):
    server.cut_after = 1000
    with pytest.raises(InputError, match=r"broke off 1 times .*1000 bytes are kept and the next call goes on"):
        fetch(server, tmp_path, retries=0)
    assert names(tmp_path) == ["f.bin.part", "f.bin.part.tag"]
    fetch(server, tmp_path)
    assert server.asked[-1] == ("/f.bin", "bytes=1000-", len(BODY) - 1000)
    assert names(tmp_path) == ["f.bin"]


@pytest.mark.parametrize(
    ("part", "tag", "moods", "checksum", "asked"),
    [
        (BODY[:5000], None, {"ranges": False}, SHA256, [("bytes=5000-", len(BODY))]),
        (b"old version", '"v0"', {}, None, [("bytes=11-", len(BODY))]),
        (b"nobody vouches for this", None, {"etag": ""}, None, [(None, len(BODY))]),
        (BODY, None, {}, SHA256, []),
        (BODY + b"too long", None, {}, SHA256, [(None, len(BODY))]),
    ],
)
def test_a_kept_part_is_built_upon_only_where_it_fits(server, tmp_path, part, tag, moods, checksum, asked):
    (tmp_path / "f.bin.part").write_bytes(part)
    if tag:
        (tmp_path / "f.bin.part.tag").write_text(tag)
    vars(server).update(moods)
    fetch(server, tmp_path, sha256=checksum)
    assert [entry[1:] for entry in server.asked] == asked


@pytest.mark.parametrize("checksum", [{"sha256": "0" * 64}, {"md5": "0" * 32}])
def test_a_corrupt_file_is_removed_and_a_wrong_one_replaced(server, tmp_path, checksum):
    with pytest.raises(InputError, match="is not the file that its checksum names"):
        fetch(server, tmp_path, **checksum)
    assert names(tmp_path) == []
    (tmp_path / "f.bin").write_bytes(b"another")
    fetch(server, tmp_path, sha256=SHA256)


def test_a_missing_file_is_said_at_once_and_a_busy_server_is_asked_again(server, tmp_path):
    with pytest.raises(InputError, match="answers 404"):
        download(f"{server.url}/none", tmp_path / "none", progress=False)
    server.failures = 2
    fetch(server, tmp_path)
    server.failures = 9
    with pytest.raises(InputError, match="answers 503"):
        download(f"{server.url}/f.bin", tmp_path / "g.bin", progress=False, retries=1)
    assert names(tmp_path) == ["f.bin"]
    with pytest.raises(InputError, match="no http or https address"):
        download("file:///etc/hostname", tmp_path / "x")


def make_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def test_a_plain_zip_unpacks(tmp_path):
    archive = make_zip(tmp_path / "a.zip", [("d/", b""), ("d/a.txt", b"A"), ("d/e/b.txt", b"B" * 3000)])
    paths = safe_unzip(archive, tmp_path / "out")
    assert [path.relative_to(tmp_path / "out").as_posix() for path in paths] == ["d/a.txt", "d/e/b.txt"]
    assert paths[1].read_bytes() == b"B" * 3000


LINK = zipfile.ZipInfo("link")
LINK.external_attr = 0o120777 << 16
OUTSIDE = "/abs.txt", "../up.txt", "a/../../up.txt", "C:/x.txt", "a\\..\\..\\up.txt", "."


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, "points outside the folder") for name in OUTSIDE),
        (LINK, "is a link"),
        ("d/x.txt", "would leave the folder through a link"),
        ("kept", "is a folder already"),
        ("big", "unpacks to more than 9999 bytes"),
    ],
)
def test_what_would_leave_or_fill_the_folder_is_refused(tmp_path, name, message):
    (tmp_path / "out" / "kept").mkdir(parents=True)
    (tmp_path / "out" / "d").symlink_to(tmp_path)
    size = 10_000 if name == "big" else 9
    archive = make_zip(tmp_path / "a.zip", [(name, b"0" * size), ("z.txt", b"")])
    with pytest.raises(InputError, match=message):
        safe_unzip(archive, tmp_path / "out", max_bytes=9999)
    assert (names(tmp_path), names(tmp_path / "out")) == (["a.zip", "out"], ["d", "kept"])


def test_a_broken_zip_is_named_and_so_is_one_whose_list_lies(tmp_path):
    data = make_zip(tmp_path / "a.zip", [("a", b"abc" * 999)]).read_bytes()
    broken = b"", b"no zip", data[: len(data) // 2], data.replace(data[40:44], b"\xff\xff\xff\xff", 1)
    lying = data.replace((2997).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    for content, max_bytes in (*((content, 9999) for content in broken), (lying, 50)):
        (tmp_path / "b.zip").write_bytes(content)
        with pytest.raises(InputError, match=r"b\.zip cannot be unpacked"):
            safe_unzip(tmp_path / "b.zip", tmp_path / "out", max_bytes=max_bytes)
    with pytest.raises(InputError, match=r"none\.zip cannot be unpacked"):
        safe_unzip(tmp_path / "none.zip", tmp_path / "out")
    assert not (tmp_path / "out" / "a").exists()


@pytest.fixture
def movielens(server, tmp_path):
    """(put, fetch): publishes a set and returns its md5 and sha256; fetches a set into a folder."""

    def put(name):
        buffer = io.BytesIO()
        make_zip(buffer, [(f"{name}/ratings.csv", b"userId,movieId,rating,timestamp\n1,2,3.0,4\n")])
        server.files[f"/{name}.zip"] = buffer.getvalue()
        return hashlib.md5(buffer.getvalue()).hexdigest(), hashlib.sha256(buffer.getvalue()).hexdigest()

    def fetch(name, folder="a"):
        return fetch_movielens(name, tmp_path / folder, publisher=server.url, progress=False)

    return put, fetch


def test_movielens_is_checked_against_the_md5_that_is_known(server, movielens, monkeypatch):
    put, fetch = movielens
    md5, _ = put("ml-1m")
    with pytest.raises(InputError, match="is not the file that its checksum names"):
        fetch("ml-1m")
    monkeypatch.setitem(_MOVIELENS_MD5, "ml-1m", md5)
    folder = fetch("ml-1m")
    assert (folder / "ratings.csv").read_text().startswith("userId")
    n_asked = len(server.asked)
    assert fetch("ml-1m") == folder
    assert len(server.asked) == n_asked
    with pytest.raises(InputError, match="no MovieLens set 'ml-2m'"):
        fetch("ml-2m")


def test_movielens_latest_takes_the_published_md5_or_records_its_own(server, movielens, tmp_path):
    put, fetch = movielens
    md5, sha256 = put("ml-latest-small")
    server.files["/ml-latest-small.zip.md5"] = b"MD5 (ml-latest-small.zip) = " + b"0" * 32 + b"\n"
    with pytest.raises(InputError, match="checksum"):
        fetch("ml-latest-small")
    server.files["/ml-latest-small.zip.md5"] = md5.encode() + b"  ml-latest-small.zip\n"
    assert fetch("ml-latest-small").is_dir()
    del server.files["/ml-latest-small.zip.md5"]
    fetch("ml-latest-small", "b")
    assert (tmp_path / "b" / "ml-latest-small.zip.sha256").read_text() == f"{sha256}  ml-latest-small.zip\n"


@pytest.mark.parametrize(
    ("year", "reviews", "metadata"),
    [
        (2014, "reviews_Beauty_5.json.gz", "meta_Beauty.json.gz"),
        (2018, "categoryFilesSmall/Beauty_5.json.gz", "metaFiles2/meta_Beauty.json.gz"),
        (2023, "review_categories/Beauty.jsonl.gz", "meta_categories/meta_Beauty.jsonl.gz"),
    ],
)
def test_amazon_files_are_fetched_and_held_to_their_first_hash(server, tmp_path, year, reviews, metadata):
    server.files |= {f"/{reviews}": b"reviews", f"/{metadata}": b"metadata"}
    paths = fetch_amazon("Beauty", year, tmp_path, publisher=server.url, progress=False)
    assert (paths["reviews"].read_bytes(), paths["metadata"].read_bytes()) == (b"reviews", b"metadata")
    record = paths["reviews"].with_name(paths["reviews"].name + ".sha256")
    assert record.read_text().split() == [hashlib.sha256(b"reviews").hexdigest(), paths["reviews"].name]
    paths["reviews"].unlink()
    server.files[f"/{reviews}"] = b"replaced"
    with pytest.raises(InputError, match="is not the file that its checksum names"):
        fetch_amazon("Beauty", year, tmp_path, publisher=server.url, progress=False)


def test_wrong_amazon_requests_are_named(tmp_path):
    with pytest.raises(InputError, match="no edition of 2019"):
        fetch_amazon("Beauty", 2019, tmp_path)
    with pytest.raises(InputError, match="is no category"):
        fetch_amazon("../Beauty", 2018, tmp_path)


def test_the_command_says_in_one_sentence_what_it_could_not_fetch(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(download_module, "_AMAZON_PUBLISHERS", {2014: server.url, 2018: "http://localhost:1"})
    monkeypatch.setattr(download_module.time, "sleep", lambda _: None)
    server.files |= {"/reviews_Beauty_5.json.gz": b"reviews", "/meta_Beauty.json.gz": b"metadata"}
    words = ["Beauty", "--out", str(tmp_path / "beauty")]
    assert download_module.main(words) == 0
    told = [tmp_path / "beauty" / name for name in ("reviews_Beauty_5.json.gz", "meta_Beauty.json.gz")]
    assert capsys.readouterr().out.split() == [*map(str, told)]
    for more, why in ((["--year", "2018"], "broke off 5 times"), (["--year", "2019"], "no edition of 2019")):
        assert download_module.main([*words, *more]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("bdlm_jax: ") and why in last
