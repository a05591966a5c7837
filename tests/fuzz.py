"""Damaged, odd and hostile shards, read as a training run and `data.py check` read them.

    python tests/fuzz.py    # every kind of damage, some 400 shards, in seconds
    python tests/fuzz.py 7  # with other random numbers

What must hold for each shard:
- samples that were not damaged come out as they were; those behind a damaged header of the archive
  may be missing if the index has a note about it
- a damaged sample is skipped and counted under a reason, or gives what is stored in it; or the
  whole shard is refused with one line; data.py check complains about all that is skipped
- no other exception, no hang, no file left open, at most 1 GiB more memory, nothing executed,
  nothing written but the tables of the index

Prints a line for each kind and what went wrong. Exit code 1 if anything did. A hang ends it.
"""
import argparse
import collections
import contextlib
import copy
import faulthandler
import gc
import gzip
import io
import json
import os
import resource
import sys
import tarfile
import tempfile
import traceback
import zlib
from types import SimpleNamespace

import numpy as np
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
sys.dont_write_bytecode = True  # a late import would write beside its source

import align
import common
import data
import lcl
from data import Skip, pick

# settings of align.example and lcl.example: whole images, so that nothing is drawn at random
CFG = SimpleNamespace(image_size=16, patch=8, resize=1.0, scale=1.0, flip=False, context=4096,
                      similarity=0, max_images=6, image_first=0.5)
SECONDS = 60  # until a shard counts as a hang
MORE_MEMORY = 1024  # MiB, than before the first shard


# ---- shards ----

def encode(image, kind="JPEG"):
    raw = io.BytesIO()
    image.save(raw, kind)
    return raw.getvalue()


def make_jpeg(rng):
    """Of one color, which is another in each."""
    return encode(Image.new("RGB", (48, 32), tuple(rng.integers(256, size=3).tolist())))


BOX = {"x": 2, "y": 3, "w": 9, "h": 8, "text": "a thing"}


def make_pair(rng):
    caption = f"a picture of number {rng.integers(1000)}"
    record = {"caption": caption, "boxes": [BOX]}
    return {"jpg": make_jpeg(rng), "txt": caption.encode(), "cls": b"3",
            "json": json.dumps(record).encode()}


def make_document(rng, key):
    info = [{"image_name": f"{key}.{i}.jpg", "matched_text_index": i, "matched_sim": 0.3}
            for i in range(2)]
    record = {"text_list": ["One thing.", f"And {rng.integers(1000)} others."], "image_info": info}
    return {"json": json.dumps(record).encode(), "0.jpg": make_jpeg(rng), "1.jpg": make_jpeg(rng)}


def make_samples(rng, prefix=""):
    """{key: {suffix: bytes}}"""
    document = f"{prefix}1"
    return {f"{prefix}0": make_pair(rng), document: make_document(rng, document),
            f"{prefix}2": make_pair(rng)}


class Shard:
    """The bytes of a tar of samples, which can be damaged, and what may come of the samples.

    hurt: keys of samples that may come out otherwise, or not at all; behind: of those that may be
    missing if the index has a note.
    """

    def __init__(self, samples, hurt=(), format=tarfile.GNU_FORMAT):
        self.samples = samples
        self.hurt = set(hurt)
        self.behind = set()
        self.files = []  # (start of the header, start of the next, key)
        tar_bytes = io.BytesIO()
        with tarfile.open(fileobj=tar_bytes, mode="w", format=format) as tar:
            for key, members in samples.items():
                for suffix, raw in members.items():
                    start = tar.offset
                    data.add_file(tar, f"{key}.{suffix}", raw)
                    self.files.append((start, tar.offset, key))
        self.raw = tar_bytes.getvalue()

    def damaged(self, start, end, new):
        """A copy with other bytes there: this hurts their samples and puts later ones behind."""
        shard = copy.deepcopy(self)
        shard.raw = self.raw[:start] + new + self.raw[end:]
        for file_start, file_end, key in self.files:
            if file_start >= max(end, start + 1):
                shard.behind.add(key)
            elif file_end > start:
                shard.hurt.add(key)
        return shard

    def write(self, path):
        self.path = path
        with open(path, "wb") as f:
            f.write(self.raw)


# ---- kinds of damage to the archive: each yields shards ----

def cut(rng):
    """At each block, and inside it."""
    whole = Shard(make_samples(rng))
    _, end_of_files, _ = whole.files[-1]
    for block in range(0, end_of_files + 1024, 512):
        yield whole.damaged(block, len(whole.raw), b"")
        yield whole.damaged(block + int(rng.integers(1, 512)), len(whole.raw), b"")


def other_lost_or_added_bytes(rng):
    """In each header and in each file; then, headers of zeros, as at the end of an archive."""
    whole = Shard(make_samples(rng))
    for start, end, _ in whole.files:
        for place in rng.integers([start, start + 512], [start + 512, end]):
            n = int(rng.integers(1, 512))
            yield whole.damaged(place, place + 1, rng.bytes(1))
            yield whole.damaged(place, place + n, bytes(n))
            yield whole.damaged(place, place + n, b"")
            yield whole.damaged(place, place, rng.bytes(n))
        yield whole.damaged(start, start + 512, bytes(512))


def wrong_sizes_in_headers(rng):
    whole = Shard(make_samples(rng))
    for size in (0, 1, 2000, 2**31, 2**63, 2**80, -1, -512, -2**40):
        start, _, _ = pick(rng, whole.files)
        info = tarfile.TarInfo.frombuf(whole.raw[start:start + 512], "utf-8", "strict")
        info.size = size
        yield whole.damaged(start, start + 512, info.tobuf(tarfile.GNU_FORMAT))


def header(name, size=0, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size = size
    info.type = kind
    return info.tobuf(tarfile.GNU_FORMAT)


def extension(kind, content):
    """A header that says something about the next one, or with XGLTYPE about all that follow."""
    return header("x", len(content), kind) + content.ljust(512, b"\0")


def record(name, value):
    """A record of pax, which begins with its own length."""
    text = f" {name}={value}\n"
    return f"{len(text) + 2}{text}".encode()


def hostile_extensions(rng):
    """Long names, records of pax and sparse members whose sizes are wrong or huge."""
    contents = [record("size", -999_999), record("size", 10**9), record("size", "none"),
                record("path", "../../evil.jpg"), record("hdrcharset", "BINARY"),
                record("GNU.sparse.map", "0,9,"), record("GNU.sparse.size", 10**12),
                b"99999999999 path=x.jpg\n", b"0 path=x.jpg\n"]
    sparse_1_0 = record("GNU.sparse.major", 1) + record("GNU.sparse.minor", 0)
    sparse_file = header("sparse.jpg", 512) + b"999999999\n0\n".ljust(512, b"\0")
    whole = Shard(make_samples(rng))
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
        inserts = [header("x", size, kind) for size in (0, 2**35, 2**70, -512)]
        inserts += [extension(kind, content) for content in contents]
        inserts.append(extension(kind, sparse_1_0) + sparse_file)
        inserts.append(3000 * extension(kind, record("path", "x.jpg")))
        for insert in inserts:
            start, _, _ = pick(rng, whole.files)
            shard = whole.damaged(start, start, insert)
            if kind == tarfile.XGLTYPE:
                shard.hurt |= shard.behind
            yield shard


def hostile_names(rng):
    """Of all samples; of one more member."""
    for prefix in ("/etc/passwd", "../../../evil", "~/evil", "$(touch evil)", " ", "C:\\evil",
                   "two\nlines", "caf\udce9", "\x1b[2J", "l/" * 200, "l" * 300):
        for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            yield Shard(make_samples(rng, prefix), format=format)
    whole = Shard(make_samples(rng))
    for name in ("nodot", "x/.jpg", "..", "/", "OTHER.JPG", "0.jpg", "__MACOSX/0.jpg"):
        start, _, _ = pick(rng, whole.files)
        yield whole.damaged(start, start, header(name))


def no_tar_at_all(rng):
    whole = Shard(make_samples(rng))
    page = b"<!DOCTYPE html><title>403 Forbidden</title>"
    for raw in (b"", b"\x1f\x8b", page, 500 * page, rng.bytes(5000), bytes(10_240),
                gzip.compress(whole.raw)):
        yield whole.damaged(0, len(whole.raw), raw)


# ---- kinds of damage to what a sample holds ----

def replaced(rng, key, **members):
    """A shard where members of one sample are replaced, or left out if None."""
    samples = make_samples(rng)
    for suffix, raw in members.items():
        del samples[key][suffix]
        if raw is not None:
            samples[key][suffix] = raw
    return Shard(samples, hurt={key})


def damaged_images(rng):
    image = Image.fromarray(rng.integers(256, size=(32, 48, 3), dtype=np.uint8))
    for raw in (b"", b"<svg/>", rng.bytes(999), encode(image, "TIFF")):
        yield replaced(rng, "0", jpg=raw)
    for kind in ("JPEG", "PNG", "WEBP"):
        raw = encode(image, kind)
        for n_bytes in (20, 60, len(raw) // 2):
            yield replaced(rng, "0", jpg=raw[:n_bytes])


def png_chunk(name, content):
    crc = zlib.crc32(name + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + name + content + crc


def bombs_as_images(rng):
    """PNGs whose headers or packed parts are far larger than they are."""
    png = encode(Image.new("RGB", (48, 32)), "PNG")
    head = png[:33]
    rest = png[33:]
    huge = (2**31 - 1).to_bytes(4, "big")
    zeros = zlib.compress(bytes(2**26))
    for raw in (png[:8] + png_chunk(b"IHDR", huge + huge + png[24:29]) + rest,
                encode(Image.new("1", (10_000, 10_000)), "PNG"),
                head + png_chunk(b"zTXt", b"a\0\0" + zeros) + rest,
                head + png_chunk(b"IDAT", zeros) + png[-12:]):
        yield replaced(rng, "0", jpg=raw)


def encodings_of_text(rng):
    for raw in (b"", b"caf\xe9", b"a\0dog", b"\xed\xa0\x80", b" \n\t", "a dog".encode("utf-16"),
                "\u202ea \U0001f600".encode(), b"x" * 2**20):
        yield replaced(rng, "0", txt=raw)
    for text in ("\ud800", "a\0dog", "\u4e00" * 2**20):
        yield replaced(rng, "0", txt=None, json=json.dumps({"caption": text}).encode())


JUNK = [None, 7, -1, True, 10**400, float("nan"), float("-inf"), "", "../../etc/passwd.jpg",
        "\ud800", [], [[]], [None, 5], {}, {"a": []}]


def json_of_wrong_types(rng):
    """In each field of a pair and of a document."""
    for junk in JUNK:
        boxes = [{**BOX, name: junk} for name in BOX]
        for change in ({"caption": junk}, {"caption": [junk]}, {"boxes": junk}, {"boxes": boxes}):
            record = {"caption": "a picture", **change}
            yield replaced(rng, "0", txt=None, json=json.dumps(record).encode())
        info = json.loads(make_document(rng, "1")["json"])["image_info"]
        entries = [{**info[0], name: junk} for name in info[0]]
        for change in ({"text_list": junk}, {"text_list": ["a", junk]}, {"image_info": junk},
                       {"image_info": [*entries, info[1]]}):
            record = {"text_list": ["a", "b"], "image_info": info, **change}
            yield replaced(rng, "1", json=json.dumps(record).encode())


def broken_json(rng):
    deep = b"[" * 100_000 + b"]" * 100_000
    for raw in (b"", b"[]", b"null", b"\xff", b'{"caption": "x"', deep, b'{"caption": %s}' % deep,
                b'{"text_list": %s}' % deep, b'{"a": 1' + b"0" * 9999):
        yield replaced(rng, "0", txt=None, json=raw)
        yield replaced(rng, "1", json=raw)


KINDS = (cut, other_lost_or_added_bytes, wrong_sizes_in_headers, hostile_extensions, hostile_names,
         no_tar_at_all, damaged_images, bombs_as_images, encodings_of_text, json_of_wrong_types,
         broken_json)


# ---- what must come of a shard ----

def make_row(sample):
    """What a training run makes of a sample, and its key. Equal wherever the sample stands."""
    script = lcl if sample.is_document() else align
    row = script.example(sample, common.rng(0, 0), CFG, data.Tokenizer())
    return {"key": sample.key, **row}


def read_samples(index):
    """Each sample by itself. -> {key: row}, {reason: number of samples skipped}"""
    rows = {}
    skipped = collections.Counter()
    for i in range(len(index)):
        try:
            rows[index.key(i)] = make_row(index[i])
        except Skip as reason:
            skipped[str(reason)] += 1
    return rows, skipped


def check_complains(path):
    """Does data.py check find anything wrong?"""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        is_bad = data.check([path])
    lines = output.getvalue().splitlines()
    assert is_bad == (len(lines) > 1), f"check prints {lines} and returns {is_bad}"
    "".join(lines).encode()  # raises if it could not be printed
    return is_bad


def examine(shard, intact):
    """Read it, and the intact shard behind it. -> counts of what came of its samples."""
    complains = check_complains(shard.path)
    index = data.Index([shard.path, intact.path])
    notes = set(index.notes.get(shard.path, {}))
    rows, skipped = read_samples(index)
    n_found = int(index.starts[1])
    n_missing = max(0, len(shard.samples) - n_found)
    is_said = complains and (notes or not n_found)
    assert is_said or not n_missing, f"{n_missing} samples are missing without a note"

    for key, members in {**shard.samples, **intact.samples}.items():
        name = key.encode("utf-8", "surrogateescape").decode(errors="replace")
        is_missing = notes and key in shard.behind and name not in rows
        if key not in shard.hurt and not is_missing:
            assert name in rows, f"the intact sample {name!r} is missing"
            np.testing.assert_equal(rows[name], make_row(data.Sample(name, members)))

    # a hidden file is no fault; boxes may do where no caption is
    faults = (set(skipped) | notes) - {data.HIDDEN, "no caption", "no image left"}
    assert complains or not faults, f"check does not complain of {faults}"
    is_sound = not skipped and not notes and not shard.hurt
    assert not complains or not is_sound, "check complains of a sound shard"
    n_skipped = sum(skipped.values())
    return collections.Counter(
        shards=1, missing=n_missing, skipped=n_skipped, read=n_found - n_skipped)


# ---- command line ----

def watch(root, outside):
    """Add to `outside` whatever is executed, connected, linked or written but below root."""
    never = ("subprocess.", "os.system", "os.exec", "os.fork", "os.link", "os.symlink",
             "socket.connect")

    def hook(event, args):
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event.startswith(never) or (writes and not str(args[0]).startswith(root)):
            outside.append(f"{event} {args[0]}")

    sys.addaudithook(hook)


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # MiB


def main(seed):
    n_failures = 0
    with tempfile.TemporaryDirectory() as root:
        os.environ["XDG_CACHE_HOME"] = f"{root}/cache"
        tempfile.tempdir = root  # where data.py check has its tables
        intact = Shard(make_samples(np.random.default_rng(seed), "intact"))
        intact.write(f"{root}/intact.tar")
        outside = []
        watch(root, outside)
        memory = peak_memory()
        n_files = len(os.listdir("/dev/fd"))
        for number, kind in enumerate(KINDS):
            counts = collections.Counter()
            failures = []
            for i, shard in enumerate(kind(np.random.default_rng([seed, number]))):
                faulthandler.dump_traceback_later(SECONDS, exit=True)
                shard.write(f"{root}/{kind.__name__}-{i}.tar")
                try:
                    counts += examine(shard, intact)
                except Exception:
                    failures.append(f"shard {i}: {traceback.format_exc(limit=-1)}")
            failures += outside
            outside.clear()
            gc.collect()  # an exception and its frames refer to each other
            if len(os.listdir("/dev/fd")) > n_files:
                failures.append("files are left open")
            if peak_memory() > memory + MORE_MEMORY:
                failures.append(f"{peak_memory() - memory} MiB more memory")
            print(f"{kind.__name__}:", ", ".join(f"{n} {what}" for what, n in counts.items()))
            for line in failures:
                print(f"  FAILED: {line}")
            n_failures += len(failures)
    print(f"{n_failures} failures")
    sys.exit(n_failures > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seed", nargs="?", type=common.at_least(0), default=0)
    main(parser.parse_args().seed)
