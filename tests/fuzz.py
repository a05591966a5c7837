"""Damaged, odd and hostile shards, read as a training run and `data.py check` read them.

    python tests/fuzz.py    # every kind of damage, some 270 shards, in seconds
    python tests/fuzz.py 7  # with other random numbers

What must hold for each shard:
- samples that were not damaged come out as they were; those behind a damaged header of the archive
  may be missing if the index has a note about it
- a damaged sample is skipped and counted under a reason, or gives what is stored in it; or the
  whole shard is refused with one line; data.py check complains about all that is skipped
- no other exception, no hang, no file left open, at most 1 GiB more memory, nothing written outside
  of the cache

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
from common import UserError
from data import Skip

# settings of align.example and lcl.example: whole images, so that nothing is drawn at random
CFG = SimpleNamespace(image_size=16, patch=8, resize=1.0, scale=1.0, flip=False, context=4096,
                      similarity=0, max_images=6, image_first=0.5)
BYTES = data.Tokenizer()
SECONDS = 60  # until a shard counts as a hang
MORE_MEMORY = 1024  # MiB, than before the first shard


# ---- shards ----

def smooth(rng):
    """An image that no codec changes much, with other colors in each."""
    y, x = np.mgrid[:32, :48] * 5 + int(rng.integers(10))
    return Image.fromarray(np.stack([x, y, 255 - x * y // 255], -1).astype(np.uint8))


def encode(image, kind="PNG"):
    raw = io.BytesIO()
    image.save(raw, kind)
    return raw.getvalue()


def make_pair(rng):
    name = f"a picture of number {rng.integers(1000)}"
    record = {"caption": name, "boxes": [{"x": 2, "y": 3, "w": 9, "h": 8, "text": name}],
              "qa": [{"question": "what is it?", "answer": name}]}
    return {"jpg": encode(smooth(rng), "JPEG"), "txt": name.encode(), "cls": b"3",
            "json": json.dumps(record).encode()}


def make_document(rng, key):
    info = []
    for i in range(2):
        info.append({"image_name": f"{key}.{i}.jpg", "matched_text_index": i, "matched_sim": 0.3})
    record = {"text_list": ["One thing.", f"And {rng.integers(1000)} others."], "image_info": info}
    return {"json": json.dumps(record).encode(), "0.jpg": encode(smooth(rng), "JPEG"),
            "1.jpg": encode(smooth(rng), "JPEG")}


def make_samples(rng, prefix=""):
    """{key: {suffix: bytes}} of a pair, a document and a pair."""
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
        end_of_damage = max(end, start + 1)
        for file_start, file_end, key in self.files:
            if file_start >= end_of_damage:
                shard.behind.add(key)
            elif file_end > start:
                shard.hurt.add(key)
        return shard

    def flipped(self, rng, start, end):
        """A copy with another byte, somewhere in start...end."""
        place = int(rng.integers(start, end))
        return self.damaged(place, place + 1, bytes([self.raw[place] ^ int(rng.integers(1, 256))]))


def pick(rng, options):
    return options[int(rng.integers(len(options)))]


# ---- kinds of damage to the archive: each yields shards ----

def cut(rng):
    """At each block, and inside it."""
    whole = Shard(make_samples(rng))
    _, end_of_files, _ = whole.files[-1]
    for block in range(0, end_of_files + 1024, 512):
        yield whole.damaged(block, len(whole.raw), b"")
        yield whole.damaged(block + int(rng.integers(1, 512)), len(whole.raw), b"")


def flipped_bytes(rng):
    """One in each header, where two might cancel in the check sum; three in each file."""
    whole = Shard(make_samples(rng))
    for start, end, _ in whole.files:
        yield whole.flipped(rng, start, start + 512)
        content = (start + 512, end)
        shard = whole.flipped(rng, *content).flipped(rng, *content).flipped(rng, *content)
        shard.behind = set()
        yield shard


def zeros_lost_or_added_bytes(rng):
    for _ in range(8):
        whole = Shard(make_samples(rng))
        header, _, _ = pick(rng, whole.files[:-4])  # in the last sample, zeros are an end mark
        yield whole.damaged(header, header + 512, bytes(512))
        place = int(rng.integers(whole.files[-4][0]))
        n = int(rng.integers(1, 512))
        yield whole.damaged(place, place + n, bytes(n))
        yield whole.damaged(place, place + n, b"")
        yield whole.damaged(place, place, rng.bytes(n))


def wrong_sizes_in_headers(rng):
    whole = Shard(make_samples(rng))
    for size in (0, 1, 2000, 2**31, 2**40, 2**63, 2**80, -1, -512, -2**40):
        start, _, _ = pick(rng, whole.files)
        info = tarfile.TarInfo.frombuf(whole.raw[start:start + 512], "utf-8", "strict")
        info.size = size
        yield whole.damaged(start, start + 512, info.tobuf(tarfile.GNU_FORMAT))


def header(name, size=0, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size = size
    info.type = kind
    return info.tobuf(tarfile.GNU_FORMAT)


def extension(kind, content, size=None):
    """A header that says something about the next: its long name, or records of pax."""
    size = len(content) if size is None else size
    return header("x", size, kind) + content + bytes(-len(content) % 512)


def pax(name, value, kind=tarfile.XHDTYPE):
    record = f" {name}={value}\n"
    length = len(record) + len(str(len(record) + 2))
    return extension(kind, f"{length}{record}".encode())


def sparse(size):
    """GNU's sparse file, of which nothing is stored, whatever its size."""
    block = bytearray(header("sparse.jpg", 0, tarfile.GNUTYPE_SPARSE))
    block[386:410] = b"%011o\0%011o\0" % (size, 0)  # one part, empty, at the end
    block[483:495] = b"%011o\0" % size
    block[148:156] = b" " * 8  # the check sum is of a header with blanks in its place
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def hostile_extensions(rng):
    """Long names, records of pax and sparse members whose sizes are wrong or huge."""
    inserts = [sparse(100), sparse(2**32), 3000 * extension(tarfile.GNUTYPE_LONGNAME, b"x.jpg")]
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
        for size in (0, 2**35, 2**70, -512):
            inserts.append(extension(kind, b"", size))
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE):  # for the next member, for all later ones
        for name, value in (("size", -999_999), ("size", 10**9), ("size", "x"),
                            ("path", "../../evil.jpg"), ("hdrcharset", "BINARY"),
                            ("GNU.sparse.map", "0,9,"), ("GNU.sparse.size", 10**12)):
            inserts.append(pax(name, value, kind))
        inserts.append(extension(kind, b"99999999999 path=x.jpg\n"))
        inserts.append(extension(kind, b"0 path=x.jpg\n"))
    version = pax("GNU.sparse.major", 1) + pax("GNU.sparse.minor", 0)
    inserts.append(version + header("sparse.jpg", 512) + b"999999999\n0\n".ljust(512, b"\0"))
    whole = Shard(make_samples(rng))
    for insert in inserts:
        start, _, _ = pick(rng, whole.files)
        shard = whole.damaged(start, start, insert)
        if insert[156:157] == tarfile.XGLTYPE:
            shard.hurt |= shard.behind
        yield shard


def hostile_names(rng):
    """Of all samples; of one more member."""
    for prefix in ("/etc/passwd", "../../../evil", "a/../../b", "~/evil", "$(touch evil)", " ",
                   "C:\\evil", "two\nlines", "caf\udce9", "\x1b[2J", "l/" * 200, "l" * 300):
        for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            yield Shard(make_samples(rng, prefix), format=format)
    whole = Shard(make_samples(rng))
    for name in ("nodot", "x/.jpg", "..", "/", "OTHER.JPG", "0.jpg", "__MACOSX/0.jpg"):
        start, _, _ = pick(rng, whole.files)
        shard = whole.damaged(start, start, header(name))
        shard.behind = set()
        yield shard


def no_tar_at_all(rng):
    whole = Shard(make_samples(rng))
    page = b"<!DOCTYPE html><title>403 Forbidden</title>"
    for raw in (b"", b"\x1f\x8b", page, 500 * page, rng.bytes(5000), bytes(10_240),
                gzip.compress(whole.raw)):
        yield whole.damaged(0, len(whole.raw), raw)


# ---- kinds of damage to what a sample holds ----

def replaced(rng, number, **members):
    """A shard where members of one sample are replaced, or left out if None."""
    samples = make_samples(rng)
    key = str(number)
    for suffix, raw in members.items():
        del samples[key][suffix]
        if raw is not None:
            samples[key][suffix] = raw
    return Shard(samples, hurt={key})


def damaged_images(rng):
    image = smooth(rng)
    jpeg = encode(image, "JPEG")
    png = encode(image)
    for raw in (b"", jpeg[:len(jpeg) // 2], jpeg[:20], png[:len(png) // 2], png[:60], b"<svg/>",
                rng.bytes(999), encode(image, "TIFF"), encode(image, "WEBP")[:100]):
        yield replaced(rng, 0, jpg=raw)


def png_chunk(name, content):
    crc = zlib.crc32(name + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + name + content + crc


def bombs_as_images(rng):
    """Files whose headers or packed parts are far larger than they are."""
    small = Image.new("RGB", (48, 32))
    jpeg = encode(small, "JPEG")
    size = jpeg.index(b"\xff\xc0") + 5
    png = encode(small)
    header, rest = png[:33], png[33:]
    huge = (2**31 - 1).to_bytes(4, "big")
    zeros = zlib.compress(bytes(2**26))
    for raw in (jpeg[:size] + b"\xff" * 4 + jpeg[size + 4:],
                png[:8] + png_chunk(b"IHDR", huge + huge + png[24:29]) + rest,
                encode(Image.new("1", (10_000, 10_000))),
                encode(Image.new("L", (5000, 5000))),
                header + png_chunk(b"zTXt", b"a\0\0" + zeros) + rest,
                header + png_chunk(b"iCCP", b"a\0\0" + zeros) + rest,
                header + png_chunk(b"IDAT", zeros) + png[-12:]):
        yield replaced(rng, 0, jpg=raw)


def encodings_of_text(rng):
    for raw in (b"", b"caf\xe9", b"a\0dog", b"\xed\xa0\x80", rng.bytes(50) + b"\xff", b" \n\t",
                "a dog".encode("utf-16"), "\u202ea \U0001f600".encode(), b"x" * 2**20):
        yield replaced(rng, 0, txt=raw)
    for text in ("\ud800", "a\0dog", "\udfff\ud800 x", "\u4e00" * 2**20):
        yield replaced(rng, 0, txt=None, json=json.dumps({"caption": text}).encode())


JUNK = [None, 7, -1, True, 10**400, float("nan"), float("-inf"), "", "../../etc/passwd.jpg",
        "\ud800", [], [[]], [None, 5], {}, {"a": []}]


def replace_somewhere(rng, value, junk):
    """Put junk in the place of a field of a JSON value, or of one inside it."""
    places = list(value) if isinstance(value, dict) else range(len(value))
    place = pick(rng, places)
    inner = value[place]
    if isinstance(inner, (dict, list)) and inner and rng.random() < 0.7:
        replace_somewhere(rng, inner, junk)
    else:
        value[place] = copy.deepcopy(junk)


def json_of_wrong_types(rng):
    for junk in JUNK:
        pair = json.loads(make_pair(rng)["json"])
        document = json.loads(make_document(rng, "1")["json"])
        for _ in range(int(rng.integers(1, 4))):
            replace_somewhere(rng, pair, junk)
            replace_somewhere(rng, document, junk)
        yield replaced(rng, 0, txt=None, json=json.dumps(pair).encode())
        yield replaced(rng, 1, json=json.dumps(document).encode())


def broken_json(rng):
    deep = b"[" * 100_000 + b"]" * 100_000
    for raw in (b"", b"[]", b"null", b"\xff", b'{"caption": "x"', deep, b'{"caption": %s}' % deep,
                b'{"text_list": %s}' % deep, b'{"a": 1' + b"0" * 9999):
        yield replaced(rng, 0, txt=None, json=raw)
        yield replaced(rng, 1, json=raw)


KINDS = (cut, flipped_bytes, zeros_lost_or_added_bytes, wrong_sizes_in_headers, hostile_extensions,
         hostile_names, no_tar_at_all, damaged_images, bombs_as_images,
         encodings_of_text, json_of_wrong_types, broken_json)


# ---- what must come of a shard ----

def write(path, raw):
    with open(path, "wb") as f:
        f.write(raw)


def make_row(sample):
    """What a training run makes of a sample, and its key. Equal wherever the sample stands."""
    script = lcl if sample.is_document() else align
    return {"key": sample.key, **script.example(sample, common.rng(0, 0), CFG, BYTES)}


def read_samples(index):
    """Each sample by itself. -> {key: row}, {reason: number of samples skipped}"""
    rows = {}
    reasons = collections.Counter()
    for i in range(len(index)):
        try:
            rows[index.key(i)] = make_row(index[i])
        except Skip as reason:
            reasons[str(reason)] += 1
    return rows, reasons


def check_complains(path):
    """Does data.py check find anything wrong?"""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        is_bad = data.check([path])
    lines = output.getvalue().splitlines()
    assert is_bad == (len(lines) > 1), f"check prints {lines} and returns {is_bad}"
    "".join(lines).encode()  # raises if it could not be printed
    return is_bad


def index_refuses(path):
    """Is the shard alone refused? With one line."""
    try:
        data.Index([path])
    except UserError as error:
        assert "\n" not in str(error), f"more than one line: {error}"
        return True
    return False


def expect_intact(key, members, rows):
    row = make_row(data.Sample(key, members))
    assert key in rows, f"the intact sample {key!r} is missing"
    assert rows[key].keys() == row.keys()
    for name in row:
        assert np.array_equal(rows[key][name], row[name]), f"{name} of {key!r} has changed"


def examine(shard, path, intact_path, intact):
    """-> counts of what came of its samples. AssertionError if that is not as it must be."""
    write(path, shard.raw)
    complains = check_complains(path)
    is_refused = index_refuses(path)
    index = data.Index([path, intact_path])
    notes = set(index.notes.get(path, {}))
    rows, skipped = read_samples(index)
    n_missing = max(0, len(shard.samples) - int(index.starts[1]))
    assert notes or is_refused or not n_missing, f"{n_missing} samples are missing without a note"
    for key, members in {**shard.samples, **intact}.items():
        key = key.encode("utf-8", "surrogateescape").decode(errors="replace")
        is_missing = notes and key in shard.behind and key not in rows
        if key not in shard.hurt and not is_missing:
            expect_intact(key, members, rows)
    # a hidden file is no fault; boxes may do where no caption is
    faults = (set(skipped) | notes) - {data.HIDDEN, "no caption", "no image left"}
    assert complains or not faults, f"check does not complain of {faults}"
    is_sound = not skipped and not notes and not shard.hurt
    assert not complains or not is_sound, "check complains of a sound shard"
    n_skipped = sum(skipped.values())
    return collections.Counter(
        shards=1, refused=is_refused, missing=n_missing, skipped=n_skipped,
        read=len(index) - len(intact) - n_skipped)


# ---- command line ----

def watch(root, outside):
    """Add to `outside` whatever is executed, connected, linked or written but below root."""
    never = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.symlink",
             "os.link", "socket.connect")

    def hook(event, args):
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event.startswith(never) or (writes and not str(args[0]).startswith(root)):
            outside.append(f"{event} {args[0]}")

    sys.addaudithook(hook)


def count_open_files():
    gc.collect()  # an exception and its frames refer to each other
    return len(os.listdir("/dev/fd"))


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # MiB


def try_kind(kind, rng, root, intact):
    """-> counts of its shards, and what went wrong"""
    counts = collections.Counter()
    failures = []
    n_files = count_open_files()
    for i, shard in enumerate(kind(rng)):
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            path = f"{root}/{kind.__name__}-{i}.tar"
            counts += examine(shard, path, f"{root}/intact.tar", intact)
        except Exception:
            failures.append(f"shard {i}: {traceback.format_exc(limit=-1)}")
    if count_open_files() > n_files:
        failures.append("files are left open")
    return counts, failures


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seed", nargs="?", type=int, default=0, help="[0]")
    seed = parser.parse_args().seed
    n_failures = 0
    outside = []
    with tempfile.TemporaryDirectory() as root:
        os.environ["XDG_CACHE_HOME"] = f"{root}/cache"
        intact = make_samples(np.random.default_rng(seed), "intact")
        write(f"{root}/intact.tar", Shard(intact).raw)
        watch(root, outside)
        memory = peak_memory()
        for number, kind in enumerate(KINDS):
            rng = np.random.default_rng([seed, number])
            counts, failures = try_kind(kind, rng, root, intact)
            failures += outside
            outside.clear()
            if peak_memory() > memory + MORE_MEMORY:
                failures.append(f"{peak_memory() - memory} MiB more memory")
            print(f"{kind.__name__}:", ", ".join(f"{n} {what}" for what, n in counts.items()))
            for line in failures:
                print(f"  FAILED: {line}")
            n_failures += len(failures)
    print(f"{n_failures} failures")
    sys.exit(n_failures > 0)


if __name__ == "__main__":
    main()
