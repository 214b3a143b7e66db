import hashlib
import http.server
import io
import re
import threading
import zipfile

import pytest

from bdlm_jax.data import download as downloads
from bdlm_jax.data.download import download, fetch_amazon, fetch_movielens, safe_unzip
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


@pytest.mark.parametrize("name", ["/abs.txt", "../up.txt", "a/../../up.txt", "C:/x.txt", "a\\..\\..\\up.txt", "."])
def test_a_path_outside_is_refused_before_anything_is_written(tmp_path, name):
    archive = make_zip(tmp_path / "a.zip", [("fine.txt", b"fine"), (name, b"bad")])
    with pytest.raises(InputError, match="points outside the folder"):
        safe_unzip(archive, tmp_path / "out")
    assert names(tmp_path) == ["a.zip"]


def test_links_and_files_in_the_place_of_folders_are_refused(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with pytest.raises(InputError, match="is a link"):
        safe_unzip(make_zip(tmp_path / "a.zip", [(link, b"/etc")]), tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "d").symlink_to(tmp_path)
    with pytest.raises(InputError, match="would leave the folder through a link"):
        safe_unzip(make_zip(tmp_path / "b.zip", [("d/x.txt", b"x")]), tmp_path / "out")
    assert "x.txt" not in names(tmp_path)
    (tmp_path / "out" / "kept").mkdir()
    with pytest.raises(InputError, match="is a folder already"):
        safe_unzip(make_zip(tmp_path / "c.zip", [("kept", b"x")]), tmp_path / "out")
    assert (tmp_path / "out" / "kept").is_dir()


def test_bombs_are_refused_whatever_their_list_says(tmp_path):
    archive = make_zip(tmp_path / "a.zip", [("big", b"0" * 100_000)])
    with pytest.raises(InputError, match="unpacks to more than 99999 bytes"):
        safe_unzip(archive, tmp_path / "out", max_bytes=99_999)
    assert names(tmp_path) == ["a.zip"]
    lying = archive.read_bytes().replace((100_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    (tmp_path / "lying.zip").write_bytes(lying)
    with pytest.raises(InputError, match=r"lying\.zip cannot be unpacked"):
        safe_unzip(tmp_path / "lying.zip", tmp_path / "out", max_bytes=50)
    assert not (tmp_path / "out" / "big").exists()


def test_a_broken_zip_is_named(tmp_path):
    data = make_zip(tmp_path / "a.zip", [("a", b"abc" * 999)]).read_bytes()
    for broken in (b"", b"no zip", data[: len(data) // 2], data.replace(data[40:44], b"\xff\xff\xff\xff", 1)):
        (tmp_path / "b.zip").write_bytes(broken)
        with pytest.raises(InputError, match=r"b\.zip cannot be unpacked"):
            safe_unzip(tmp_path / "b.zip", tmp_path / "out")
    with pytest.raises(InputError, match=r"none\.zip cannot be unpacked"):
        safe_unzip(tmp_path / "none.zip", tmp_path / "out")


def movielens_zip(name):
    buffer = io.BytesIO()
    make_zip(buffer, [(f"{name}/ratings.csv", b"userId,movieId,rating,timestamp\n1,2,3.0,4\n")])
    return buffer.getvalue()


def test_movielens_is_checked_against_the_md5_that_is_known(server, tmp_path, monkeypatch):
    archive = movielens_zip("ml-1m")
    server.files["/ml-1m.zip"] = archive
    with pytest.raises(InputError, match="is not the file that its checksum names"):
        fetch_movielens("ml-1m", tmp_path, publisher=server.url, progress=False)
    monkeypatch.setitem(downloads._MOVIELENS_MD5, "ml-1m", hashlib.md5(archive).hexdigest())
    folder = fetch_movielens("ml-1m", tmp_path, publisher=server.url, progress=False)
    assert (folder / "ratings.csv").read_text().startswith("userId")
    n_asked = len(server.asked)
    assert fetch_movielens("ml-1m", tmp_path, publisher=server.url, progress=False) == folder
    assert len(server.asked) == n_asked
    with pytest.raises(InputError, match="no MovieLens set 'ml-2m'"):
        fetch_movielens("ml-2m", tmp_path)


def test_movielens_latest_takes_the_published_md5_or_records_its_own(server, tmp_path):
    archive = movielens_zip("ml-latest-small")
    server.files["/ml-latest-small.zip"] = archive
    server.files["/ml-latest-small.zip.md5"] = b"MD5 (ml-latest-small.zip) = " + b"0" * 32 + b"\n"
    with pytest.raises(InputError, match="checksum"):
        fetch_movielens("ml-latest-small", tmp_path / "a", publisher=server.url, progress=False)
    server.files["/ml-latest-small.zip.md5"] = hashlib.md5(archive).hexdigest().encode() + b"  ml-latest-small.zip\n"
    assert fetch_movielens("ml-latest-small", tmp_path / "a", publisher=server.url, progress=False).is_dir()
    del server.files["/ml-latest-small.zip.md5"]
    fetch_movielens("ml-latest-small", tmp_path / "b", publisher=server.url, progress=False)
    recorded = (tmp_path / "b" / "ml-latest-small.zip.sha256").read_text()
    assert recorded == f"{hashlib.sha256(archive).hexdigest()}  ml-latest-small.zip\n"


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
