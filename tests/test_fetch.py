"""Fetching through a server on loopback that fails on command: what each failure says, and what it
leaves on the disk."""

import errno
import gzip
import hashlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from sota_course.images import fetch as fetching
from sota_course.errors import DataError, DownloadError
from sota_course.images.fetch import SETS, fetch, fetch_source, is_whole, named_source, url_source

root = Path(__file__).resolve().parent.parent
QUICK = dict(progress=False, tries=2, timeout=10, pause=0.01)  # a busy machine may need 10 s


def jpeg(shade, size=(24, 16)):
    buf = io.BytesIO()
    Image.new("RGB", size, (shade, 90, 160)).save(buf, "JPEG")
    return buf.getvalue()


FILES = {
    f"imagenette2-160/{s}/{c}/{c}_{i}.JPEG": jpeg(20 * i)
    for s in ("train", "val")
    for c in ("n03028079", "n03425413")
    for i in range(5)
} | {"imagenette2-160/noisy_imagenette.csv": b"path,noisy_labels_0\n"}


def add(tar, name, data=b"", **kwargs):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for k, v in kwargs.items():
        setattr(info, k, v)
    tar.addfile(info, io.BytesIO(data))


def tgz(files=FILES, extra=(), level=9, finish=lambda tar: tar):
    """A `.tgz` of `files` and of `extra` members (dicts for `add`); `finish` gets the bytes of the
    tar file."""
    buf = io.BytesIO()
    with tarfile.open(fileobj=buf, mode="w") as tar:
        for k, v in files.items():
            add(tar, k, v)
        for o in extra:
            add(tar, **o)
    return gzip.compress(finish(buf.getvalue()), level)


class Site:
    """A server of one file, whose next answers are the functions in `plan` (None: as it should be);
    the last one stays."""

    def __init__(self, data):
        self.data, self.plan, self.asked, self.ranges = data, [None], [], True
        site = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                site.asked.append(self.headers["Range"])
                step = site.plan.pop(0) if len(site.plan) > 1 else site.plan[0]
                try:
                    (step or site.whole)(self)
                except (BrokenPipeError, ConnectionResetError):
                    pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/imagenette2-160.tgz"

    def head(self, h):
        start = int(h.headers["Range"][6:-1]) if self.ranges and h.headers["Range"] else 0
        if start and start >= len(self.data):
            h.send_error(416)
            return b""
        h.send_response(206 if start else 200)
        if start:
            h.send_header("Content-Range", f"bytes {start}-{len(self.data) - 1}/{len(self.data)}")
        h.send_header("Content-Length", str(len(self.data) - start))
        h.end_headers()
        return self.data[start:]

    def whole(self, h):
        h.wfile.write(self.head(h))

    def half(self, h):
        data = self.head(h)
        h.wfile.write(data[: len(data) // 2])

    def stall(self, h):
        self.half(h)
        time.sleep(120)

    def trickle(self, h):
        for i, b in enumerate(self.head(h)):
            h.wfile.write(bytes([b]))
            time.sleep(0.1)

    def slow(self, h):
        time.sleep(1.5)
        self.whole(h)

    @staticmethod
    def status(code):
        return lambda h: h.send_error(code)

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A `FASTAI_HOME` of its own."
    from fastai.data.external import fastai_cfg

    monkeypatch.setenv("FASTAI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "*")
    fastai_cfg.cache_clear()
    yield tmp_path / "home"
    fastai_cfg.cache_clear()


@pytest.fixture
def site():
    site = Site(tgz())
    yield site
    site.close()


@pytest.fixture
def src(site, home):
    return url_source(site.url)


def tree(path):
    return sorted(o.relative_to(path).as_posix() for o in path.rglob("*"))


def assert_absent(src):
    "Neither the data set nor anything half unpacked is there, nor an archive that looks finished."
    assert not src.folder.exists() and not src.archive.exists()
    if src.folder.parent.exists():
        assert tree(src.folder.parent) == []


def assert_helpful(e, src):
    for way in (src.url, 'get_data("drawn")', "train/<class>/ and val/<class>/", str(src.archive)):
        assert way in str(e.value)


# ---- the way that works ----


@pytest.fixture
def official(site, home, monkeypatch):
    "fastai's address of imagenette-160 is our server, and its list of checks knows the archive."
    from fastai.data.external import URLs

    monkeypatch.setattr(URLs, "IMAGENETTE_160", site.url)
    checks = {site.url: (len(site.data), hashlib.md5(site.data[: 2**20]).hexdigest())}
    monkeypatch.setattr("fastdownload.read_checks", lambda fmod: checks)
    return checks


def test_fetch_by_name(site, official, home, monkeypatch):
    folder = fetch("imagenette-160", progress=False)
    assert folder == home / "data" / "imagenette2-160"
    for name, data in FILES.items():
        assert (folder.parent / name).read_bytes() == data
    assert (home / "archive" / "imagenette2-160.tgz").read_bytes() == site.data
    assert tree(home / "data")[0] == "imagenette2-160"
    assert not (home / "archive" / "imagenette2-160.tgz.part").exists()
    site.close()  # from here on, without a network
    assert fetch("imagenette-160", progress=False) == folder
    assert os.listdir(home / "data") == ["imagenette2-160"], "it was unpacked a second time"
    from fastai.data.external import URLs, untar_data

    assert untar_data(URLs.IMAGENETTE_160) == folder
    assert site.asked == [None]


def test_fetch_through_a_mirror(site, official, home):
    mirror = Site(site.data)
    assert fetch("imagenette-160", url=mirror.url, progress=False).is_dir()
    assert site.asked == [] and mirror.asked == [None]
    mirror.close()


def test_the_official_archives_are_checked(home):
    for name in [k for k, o in SETS.items() if "://" not in o["url"]]:
        src = named_source(name)
        assert src.size > 9e7 and len(src.md5) == 32 and src.url.startswith("https://"), name
        assert src.folder.parent == home / "data"
    assert named_source("imagewoof").url.endswith("imagewoof2.tgz")


@pytest.mark.parametrize(
    "name, close",
    [("imagenet-160", "imagenette-160"), ("Imagewoof-320", "imagewoof-320"), ("xyz", None)],
)
def test_unknown_name(name, close, home):
    with pytest.raises(DataError) as e:
        fetch(name)
    assert (f"did you mean {close!r}" in str(e.value)) == bool(close)
    for o in (*SETS, repr(name), "get_data('drawn')", "train/<class>/"):
        assert o in str(e.value)


def test_progress_bar(src, site, capsys, monkeypatch):
    fastprogress = pytest.importorskip("fastprogress.fastprogress")
    monkeypatch.setattr(fastprogress, "progress_bar", fastprogress.ConsoleProgressBar)
    fetch_source(src, progress=True)
    shown = capsys.readouterr().out
    assert "100.00%" in shown and "imagenette2-160" in shown
    shutil.rmtree(src.folder)
    fetch_source(src, progress=False)
    assert capsys.readouterr().out == ""


def test_import_is_light():
    code = """
import sys, sota_course.images.fetch
sys.exit(bool({"torch", "fastai", "fastprogress", "PIL"} & set(sys.modules)))
"""
    env = {**os.environ, "PYTHONPATH": str(root)}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0


# ---- no network ----


def no_host(*args, **kwargs):
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


@pytest.mark.parametrize(
    "what, says",
    [
        ("refused", "the server refuses the connection"),
        ("dns", "the server's name isn't found"),
        ("404", "the server answers 404"),
        ("503", "the server answers 503"),
        ("stall", "the server stalls"),
        ("trickle", "the server stalls (only"),
        ("silent", "the server stalls"),
        ("cut", "the connection ended at"),
    ],
)
def test_no_download(what, says, src, site, monkeypatch):
    site.ranges = False
    if what == "refused":
        site.close()
    if what == "dns":
        monkeypatch.setattr(socket, "getaddrinfo", no_host)
    answers = dict(
        stall=site.stall, trickle=site.trickle, silent=lambda h: time.sleep(120), cut=site.half
    )
    site.plan = [Site.status(int(what)) if what.isdigit() else answers.get(what)]
    timeout = 0.5 if "stall" in says else QUICK["timeout"]
    start = time.monotonic()
    with pytest.raises(DownloadError) as e:
        fetch_source(src, **QUICK | dict(timeout=timeout))
    assert time.monotonic() - start < 60
    assert f"can't download {src.url}: {says}" in str(e.value) and e.value.__cause__ is not None
    assert_helpful(e, src)
    assert_absent(src)
    if what not in ("refused", "dns"):
        assert len(site.asked) == (1 if what == "404" else QUICK["tries"])


def test_not_an_address(home):
    with pytest.raises(DownloadError, match="unknown url type"):
        fetch_source(url_source("imagenette2-160.tgz"), **QUICK)


def test_retried(src, site):
    site.plan = [Site.status(503), Site.status(429), site.half, None]
    assert is_whole(src) is False
    fetch_source(src, **{**QUICK, "tries": 4})
    assert is_whole(src) and site.asked[:3] == [None] * 3 and site.asked[3].startswith("bytes=")


def test_pauses_double_and_end(src, site, monkeypatch):
    pauses = []
    monkeypatch.setattr(fetching.time, "sleep", pauses.append)
    site.plan = [Site.status(500)]
    with pytest.raises(DownloadError):
        fetch_source(src, progress=False, tries=4)
    assert pauses == [1, 2, 4]


def test_progress_renews_the_tries(home):
    """Each connection brings over 1 MiB: a bad line gets through with two tries, although it
    breaks off four times."""
    big = Site(tgz(FILES | {"imagenette2-160/noise.bin": os.urandom(6_000_000)}))

    def some(h):
        h.wfile.write(big.head(h)[:1_300_000])

    big.plan = [some]
    fetch_source(url_source(big.url), **QUICK)
    assert len(big.asked) == 5
    big.close()


# ---- going on ----


def test_resumes_an_earlier_download(src, site):
    src.part.parent.mkdir(parents=True)
    src.part.write_bytes(site.data[:1000])
    fetch_source(src, **QUICK)
    assert site.asked == ["bytes=1000-"] and is_whole(src)


def test_a_server_without_ranges_starts_again(src, site):
    site.ranges, site.plan = False, [site.half, None]
    fetch_source(src, **QUICK)
    assert is_whole(src) and src.archive.read_bytes() == site.data


def test_the_rest_of_another_file_is_not_joined(src, site):
    src.part.parent.mkdir(parents=True)
    src.part.write_bytes(b"x" * 1000)  # of a version that the server no longer has
    fetch_source(src, **QUICK)
    assert site.asked == ["bytes=1000-", None]
    assert is_whole(src)
    assert src.archive.read_bytes() == site.data


def test_nothing_left_to_ask_for(src, site):
    src.part.parent.mkdir(parents=True)
    src.part.write_bytes(site.data)  # killed between the last byte and the renaming
    fetch_source(src, **QUICK)
    assert is_whole(src)


def test_a_server_that_sends_other_parts(src, site):
    def odd(h):
        h.send_response(206)
        h.send_header("Content-Range", "bytes 7-9/10")
        h.end_headers()

    site.plan = [odd]
    with pytest.raises(DownloadError, match="a part of the file that nobody asked for"):
        fetch_source(src, **QUICK)


# ---- another file than announced ----


def test_wrong_size_is_seen_before_the_download(site, home):
    src = url_source(site.url, size=99003388)
    words = "and 99,003,388 are right: another file, or the log-in page"
    with pytest.raises(DownloadError, match=words) as e:
        fetch_source(src, **QUICK)
    assert_helpful(e, src)
    assert_absent(src)
    assert not src.part.exists() and len(site.asked) == 1


def test_wrong_size_without_a_length(site, home):
    def unmeasured(h):
        h.send_response(200)
        h.end_headers()
        h.wfile.write(site.data)

    site.plan = [unmeasured]
    src = url_source(site.url, size=len(site.data) - 1)
    with pytest.raises(DownloadError):
        fetch_source(src, **QUICK)
    assert_absent(src)


def test_wrong_hash(site, home):
    src = url_source(site.url, size=len(site.data), md5="0" * 32)
    with pytest.raises(DownloadError, match="is another file than announced") as e:
        fetch_source(src, **QUICK)
    assert_helpful(e, src)
    assert_absent(src)
    assert not src.part.exists(), "the next call would go on from a wrong file"


def test_wrong_hash_of_the_official_archive(site, official, home):
    official[site.url] = (len(site.data), "0" * 32)
    with pytest.raises(DownloadError, match="is another file than announced"):
        fetch("imagenette-160", **QUICK)


# ---- damage ----


def flipped():
    """One byte of an image is wrong, far behind the first MiB, in data that zlib passes through as
    it is."""
    big = {"imagenette2-160/train/n03028079/big.JPEG": os.urandom(2_000_000)}
    data = bytearray(tgz(FILES | big, level=0))
    data[-500_000] ^= 1
    return bytes(data)


def no_end(tar):
    "Cut between two members, as if that were all."
    with tarfile.open(fileobj=io.BytesIO(tar)) as t:
        return tar[: t.getmembers()[12].offset]


def broken_header(tar):
    with tarfile.open(fileobj=io.BytesIO(tar)) as t:
        at = t.getmembers()[12].offset
    return tar[:at] + b"\xff" * 512 + tar[at + 512 :]


DAMAGED = {
    "cut": lambda: tgz()[:-200],
    "cut in the trailer": lambda: tgz()[:-3],
    "flipped": flipped,
    "no end": lambda: tgz(finish=no_end),
    "broken header": lambda: tgz(finish=broken_header),
    "cut behind its padding": lambda: tgz(level=1, finish=lambda tar: tar + bytes(2**20))[:-3],
    "padded without end": lambda: tgz(level=1, finish=lambda tar: tar + bytes(2**24 + 2**20)),
    "empty": lambda: b"",
    "a page": lambda: b"<!DOCTYPE html><html>Please log in</html>",
    "a text": lambda: gzip.compress(b"not a tar file" * 100),
    "no zip": lambda: tgz()[:20] + b"\0" * 1000,
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_archive(what, src, site):
    site.data = DAMAGED[what]()
    words = r"imagenette2-160.tgz.part \([\d,]+ bytes\) is truncated or damaged: "
    with pytest.raises(DownloadError, match=words) as e:
        fetch_source(src, **QUICK)
    assert e.value.__cause__ is not None and not src.part.exists()
    assert_helpful(e, src)
    assert_absent(src)


@pytest.mark.parametrize(
    "files",
    [
        {"a/images/1.JPEG": b""},
        {"a/train/c/1.JPEG": b"", "a/test/c/1.JPEG": b""},
        {},
        {"train/1.JPEG": b"", "val/1.JPEG": b""},
    ],
)
def test_another_layout(files, src, site):
    site.data = tgz(files)
    with pytest.raises(DownloadError, match="has no train/<class>/ and val/<class>/ inside"):
        fetch_source(src, **QUICK)
    assert_absent(src)


def test_layout_without_a_folder_around_it(src, site):
    site.data = tgz({k.split("/", 1)[1]: v for k, v in FILES.items()})
    assert len(list(fetch_source(src, **QUICK).glob("*/*/*.JPEG"))) == 20


# ---- archives that mean harm ----

HOSTILE = {
    "../": [dict(name="../escaped")],
    "deep ../": [dict(name="imagenette2-160/train/../../../escaped")],
    "absolute": [dict(name="{out}/escaped")],
    "windows": [dict(name="C:\\escaped")],
    "backslash": [dict(name="..\\escaped")],
    "symlink": [
        dict(name="imagenette2-160/out", type=tarfile.SYMTYPE, linkname="{out}"),
        dict(name="imagenette2-160/out/escaped", data=b"x"),
    ],
    "relative symlink": [
        dict(name="imagenette2-160/out", type=tarfile.SYMTYPE, linkname="../../.."),
        dict(name="imagenette2-160/out/escaped", data=b"x"),
    ],
    "hardlink": [dict(name="imagenette2-160/hard", type=tarfile.LNKTYPE, linkname="{out}/secret")],
    "fifo": [dict(name="imagenette2-160/train/n03028079/f.JPEG", type=tarfile.FIFOTYPE)],
    "device": [dict(name="imagenette2-160/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3)],
}


@pytest.mark.parametrize("old_python", [False, True])
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_archive(what, old_python, src, site, tmp_path, monkeypatch):
    "Refused before anything is unpacked, with `tarfile`'s own filters or without them."
    if old_python:
        for name in ("data_filter", "tar_filter", "fully_trusted_filter"):
            monkeypatch.delattr(tarfile, name, raising=False)
    out = tmp_path / "out"
    out.mkdir()
    (out / "secret").write_text("secret")

    def filled(member):
        return {k: v.format(out=out) if isinstance(v, str) else v for k, v in member.items()}

    site.data = tgz(extra=[filled(o) for o in HOSTILE[what]])
    words = "isn't safe to unpack: its member .*Nothing was unpacked"
    with pytest.raises(DownloadError, match=words) as e:
        fetch_source(src, **QUICK)
    assert "link" not in what or "is a link to" in str(e.value)
    assert_helpful(e, src)
    assert_absent(src)
    assert tree(out) == ["secret"] and not list(tmp_path.rglob("escaped"))


def test_negative_size_does_not_loop(src, site):
    "Old versions of `tarfile` read such a header for ever."

    def backwards(tar):
        at = tar.index(b"imagenette2-160", 5000)  # a header, since the images don't hold the name
        assert at % 512 == 0
        head = bytearray(tar[at : at + 512])
        head[124:136] = b"\xff" * 10 + (-1024 & 0xFFFF).to_bytes(2, "big")
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
        return tar[:at] + bytes(head) + tar[at + 512 :]

    site.data = tgz(finish=backwards)
    seen = []

    def run():
        with pytest.raises(DownloadError):
            fetch_source(src, **QUICK)
        seen.append(True)

    t = threading.Thread(target=run, daemon=True)
    t.start()
    t.join(10)
    assert seen
    assert_absent(src)


def test_more_than_the_disk_holds(src, site, monkeypatch):
    "An archive of a few kilobytes that unpacks to 25 MB, on a disk with 10 MB."
    site.data = tgz(FILES | {"imagenette2-160/train/n03028079/bomb.JPEG": bytes(25_000_000)})
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 10_000_000))
    with pytest.raises(DownloadError, match=r"needs 25 MB in .*, where 10 MB are free"):
        fetch_source(src, **QUICK)
    assert_absent(src)


# ---- a full disk ----


class Full:
    "A file on a disk that is full after `room` bytes."

    def __init__(self, f, room):
        self.f, self.room = f, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.f.write(data)

    def __getattr__(self, k):
        return getattr(self.f, k)

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.close()

    def close(self):
        self.f.close()
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "ending, room",
    [(".part", 500), (".part", "all but the last bytes, written on closing"), (".JPEG", 100)],
)
def test_disk_runs_full(ending, room, src, site, monkeypatch):
    if isinstance(room, str):
        room = len(site.data)
    real = open

    def full(path, mode="r", *args, **kwargs):
        f = real(path, mode, *args, **kwargs)
        return Full(f, room) if str(path).endswith(ending) and mode in ("ab", "wb") else f

    monkeypatch.setattr(fetching, "open", full, raising=False)
    words = f"the disk is full while writing .*{ending}.*FASTAI_HOME"
    with pytest.raises(DownloadError, match=words) as e:
        fetch_source(src, **QUICK)
    assert e.value.__cause__.errno == errno.ENOSPC and len(site.asked) == 1
    assert_helpful(e, src)
    assert_absent(src)
    monkeypatch.undo()
    os.environ["FASTAI_HOME"] = str(src.folder.parent.parent)
    assert fetch_source(src, **QUICK) == src.folder


def test_no_room_is_seen_before_the_download(src, site, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 1000))
    with pytest.raises(DownloadError, match="a smaller set"):
        fetch_source(src, **QUICK)
    assert_absent(src)
    assert not src.part.exists()


REALLY_FULL = """
import shutil, sys
from collections import namedtuple
from pathlib import Path
from sota_course.images import fetch as f
src = f.Source(sys.argv[1], Path("archive/a.tgz"), Path("data/a"))
Path("archive").mkdir()
# Another process takes the room meanwhile.
shutil.disk_usage = lambda path: namedtuple("Usage", "total used free")(0, 0, 10**12)
try:
    f.fetch_source(src, progress=False, tries=2, pause=.01)
except f.DownloadError as e:
    print(e)
"""


def test_a_disk_that_is_really_full(site, tmp_path):
    "On a file system of 256 KiB, where the system allows to make one."
    site.data = tgz(FILES | {"imagenette2-160/noise.bin": os.urandom(10**6)})
    disk = tmp_path / "disk"
    disk.mkdir()
    shell = ["unshare", "-rm", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=256k none {disk}"
    able = shutil.which("unshare")
    if not able or subprocess.run([*shell, mount], capture_output=True).returncode:
        pytest.skip("can't mount a small file system here")
    command = f'{mount} && cd {disk} && "$0" -c "$1" {site.url}'
    env = {**os.environ, "PYTHONPATH": str(root), "no_proxy": "*"}
    args = [*shell, command, sys.executable, REALLY_FULL]
    run = subprocess.run(args, capture_output=True, text=True, env=env)
    assert "the disk is full while writing" in run.stdout, run.stderr
    assert run.stderr.strip() == ""


# ---- killed, interrupted, twice at once ----


def python(code, src):
    """Starts `code` in another process, with `f`, the module, and `src`; fastai isn't needed for
    that, which saves seconds."""
    env = {**os.environ, "PYTHONPATH": str(root), "no_proxy": "*"}
    head = """
import os, signal, sys
from pathlib import Path
from sota_course.images import fetch as f
src = f.Source(sys.argv[1], *map(Path, sys.argv[2:]))
"""
    args = [sys.executable, "-c", head + code, src.url, src.archive, src.folder]
    return subprocess.Popen(args, env=env, stdout=subprocess.PIPE, text=True)


def test_killed_while_unpacking(src, site):
    code = """
real, n = f.write_file, []
def write_file(*args):
    n.append(1)
    if len(n) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
f.write_file = write_file
f.fetch_source(src, progress=False)
"""
    assert python(code, src).wait() == -signal.SIGKILL
    assert not src.folder.exists()
    assert len(tree(src.folder.parent)) > 8, "it was to be killed in the middle"
    fetch_source(src, **QUICK)
    assert sorted(o.name for o in src.folder.parent.iterdir()) == [src.folder.name], "leftovers"
    assert len(list(src.folder.glob("*/*/*.JPEG"))) == 20


def test_interrupted_while_unpacking(src, site, monkeypatch):
    real, n = fetching.write_file, []

    def write_file(*args):
        n.append(1)
        if len(n) == 8:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(fetching, "write_file", write_file)
    with pytest.raises(KeyboardInterrupt):
        fetch_source(src, **QUICK)
    assert_absent(src)


def test_killed_while_downloading(src, site):
    site.plan = [site.stall, None]
    p = python("f.fetch_source(src, progress=False)", src)
    end = time.monotonic() + 60
    while not site.asked and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)
    p.kill()
    p.wait()
    assert_absent(src)
    fetch_source(src, **QUICK)
    assert is_whole(src) and src.archive.read_bytes() == site.data


def test_two_processes_at_once(src, site):
    site.plan = [site.slow]
    both = [python("print(f.fetch_source(src, progress=False))", src) for _ in range(2)]
    outs = [p.communicate(timeout=120)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0] and all(str(src.folder) in o for o in outs)
    assert len(site.asked) == 1
    assert is_whole(src)
    assert os.listdir(src.folder.parent) == [src.folder.name]


def test_two_threads_at_once(src, site):
    site.plan = [site.slow]
    threads = [threading.Thread(target=fetch_source, args=(src, False)) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert len(site.asked) == 1
    assert is_whole(src)
    assert os.listdir(src.folder.parent) == [src.folder.name]


def test_another_process_keeps_the_lock(src, site, capsys):
    with fetching.fetch_lock(src, 1):
        with pytest.raises(DataError, match="another process has held .*imagenette2-160.tgz.lock"):
            fetch_source(src, patience=0.1, **QUICK)
    assert "Another process is fetching imagenette2-160.tgz" in capsys.readouterr().out
    assert fetch_source(src, **QUICK)


def test_untar_data_waits_for_the_same_lock(src, site):
    "fastdownload locks the same file, where it locks at all."
    fastdownload = pytest.importorskip("fastdownload.core")
    if not getattr(fastdownload, "fcntl", None) or not hasattr(fastdownload, "_locked"):
        pytest.skip("this fastdownload doesn't lock")
    got = threading.Event()

    def other():
        from fastai.data.external import untar_data

        untar_data(src.url)
        got.set()

    site.plan = [site.whole]
    with fetching.fetch_lock(src, 1):
        t = threading.Thread(target=other, daemon=True)
        t.start()
        assert not got.wait(1) and site.asked == []
        fetching.fetch_archive(src, **QUICK)
    assert got.wait(30) and len(site.asked) == 1
    t.join()


# ---- what is there already ----


def images(src, n):
    return type(src)(src.url, src.archive, src.folder, images=dict(train=n, val=n))


def test_a_half_filled_folder_is_not_taken(src, site):
    "What an interrupted `untar_data` leaves moves aside; nothing is deleted."
    old = src.folder / "train" / "n03028079" / "old.JPEG"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    with pytest.warns(UserWarning, match="lacked images.*imagenette2-160.incomplete"):
        fetch_source(images(src, 10), **QUICK)
    assert len(list(src.folder.glob("*/*/*.JPEG"))) == 20
    aside = src.folder.with_name("imagenette2-160.incomplete")
    assert (aside / "train" / "n03028079" / "old.JPEG").read_bytes() == b"old"


def test_a_half_filled_folder_stays_when_the_download_fails(src, site):
    (src.folder / "train").mkdir(parents=True)
    site.close()
    with pytest.raises(DownloadError):
        fetch_source(images(src, 10), **QUICK)
    assert (src.folder / "train").exists()


def test_what_fastai_unpacked_is_taken(src, site):
    from fastai.data.external import untar_data

    assert untar_data(src.url) == src.folder
    site.close()
    whole = images(src, 10)
    assert fetch_source(whole, **QUICK) == src.folder
    next(src.folder.glob("train/*/*.JPEG")).unlink()  # its owner takes a bad image out
    assert fetch_source(whole, **QUICK) == src.folder
    assert os.listdir(src.folder.parent) == [src.folder.name]


def test_an_archive_put_there_by_hand(src, site):
    src.archive.parent.mkdir(parents=True)
    src.archive.write_bytes(site.data)
    site.close()
    assert len(list(fetch_source(src, **QUICK).glob("*/*/*.JPEG"))) == 20


def test_a_wrong_archive_put_there_by_hand(src, site):
    src.archive.parent.mkdir(parents=True)
    src.archive.write_bytes(site.data[:-100])
    with pytest.warns(UserWarning, match="truncated or damaged.*It is downloaded again"):
        fetch_source(src, **QUICK)
    assert is_whole(src) and src.archive.read_bytes() == site.data


@pytest.mark.parametrize("where", ["home", "home/archive", "home/data"])
def test_a_folder_that_cannot_be_written(where, site, tmp_path, monkeypatch):
    from fastai.data.external import fastai_cfg

    monkeypatch.setenv("FASTAI_HOME", str(tmp_path / "home"))
    fastai_cfg.cache_clear()
    (tmp_path / where).parent.mkdir(exist_ok=True)
    (tmp_path / where).write_text("a file is in the way")
    with pytest.raises(DataError, match="FASTAI_HOME"):
        fetch_source(url_source(site.url), **QUICK)
    fastai_cfg.cache_clear()


# ---- what killed calls leave ---------------------------------------------------------------------


def rest(src, name, lock=True):
    "What a call for the set `name` leaves when it is killed while it unpacks."
    tmp = src.folder.with_name(f".{name}.unpacking")
    (tmp / "train").mkdir(parents=True)
    src.archive.parent.mkdir(parents=True, exist_ok=True)
    if lock:
        src.archive.with_name(f"{name}.tgz.lock").touch()
    return tmp


def test_the_rest_of_another_set_goes_at_the_next_call(src, site):
    ours, foreign = rest(src, "imagewoof2"), rest(src, "elsewhere", lock=False)
    assert fetch_source(src, **QUICK) == src.folder
    assert not ours.exists() and foreign.exists(), "without a lock it is another program's"
    again = rest(src, "imagewoof2")
    fetch_source(src, **QUICK)  # which is there
    assert not again.exists()


def test_the_rest_of_a_living_process_stays(src, site):
    tmp = rest(src, "imagewoof2")
    with fetching.FileLock(src.archive.with_name("imagewoof2.tgz.lock")):
        code = f"""
from sota_course.images.fetch import delete_leftovers, url_source
delete_leftovers(url_source({src.url!r}))
"""
        assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
        assert tmp.exists()
    fetching.delete_leftovers(src)
    assert not tmp.exists()


def test_a_download_that_is_unpacked_already_goes(src, site):
    fetch_source(src, **QUICK)
    os.replace(src.archive, src.part)  # as after a kill between the two last steps
    assert fetch_source(src, **QUICK) == src.folder and not src.part.exists() and is_whole(src)


def test_the_bytes_of_a_set_that_is_not_there_stay(src, site):
    src.part.parent.mkdir(parents=True)
    src.part.write_bytes(site.data[:100])
    fetching.delete_leftovers(src)
    assert src.part.read_bytes() == site.data[:100]


def test_a_sweep_on_a_read_only_disk_is_silent(src, site, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    fetch_source(src, **QUICK)
    tmp = rest(src, "imagewoof2")
    with monkeypatch.context() as m:
        places = (os, "rmdir"), (os, "unlink"), (Path, "unlink"), (fetching, "FileLock")
        for where, name in places:
            m.setattr(where, name, refuse)
        assert fetch_source(src, **QUICK) == src.folder
    assert tmp.exists()


@pytest.mark.parametrize("name", ["tries", "timeout", "pause"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "3", None, True])
def test_numbers_of_a_download_are_checked(name, value, src, site):
    with pytest.raises(ValueError, match=f"{name} must be a number"):
        fetch_source(src, **{**QUICK, name: value})
    assert_absent(src)


@pytest.mark.parametrize("name", [None, 5, ["imagenette-160"], {}])
def test_what_is_no_name_is_refused(name, home):
    with pytest.raises(DataError, match="there is no data set"):
        fetch(name)
