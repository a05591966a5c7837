"""Damaged, odd and hostile shards, read as a training run and `data.py check` read them.

    python tests/fuzz.py                # every kind of damage once, some 280 shards
    python tests/fuzz.py --seconds 600  # go on with other random numbers for ten minutes

What must hold for each shard:
- samples that were not damaged come out as they were; those behind a damaged header of the archive
  may be missing if the index has a note about it
- a damaged sample is skipped and counted under a reason, or gives what is stored in it; or the
  whole shard is refused with one line; data.py check complains about all that is skipped
- no other exception, no hang, no file left open, at most 1 GiB more memory, nothing written outside
  of the cache

Prints a table of kinds, then what went wrong. Exit code 1 if anything did.
"""
import argparse
import bz2
import collections
import contextlib
import copy
import functools
import gc
import gzip
import io
import json
import os
import resource
import signal
import sys
import tarfile
import tempfile
import time
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


class Failed(Exception):
    """What is not as it must be."""


class Hang(BaseException):  # no Exception: data.py takes some of those for an unreadable image
    pass


def expect(condition, otherwise):
    if not condition:
        raise Failed(otherwise)


# ---- shards ----

def smooth(rng):
    """An image that no codec changes much, with other colors in each."""
    y, x = np.mgrid[:32, :48] * 5 + int(rng.integers(10))
    return Image.fromarray(np.stack([x, y, 255 - x * y // 255], -1).astype(np.uint8))


def encode(image, kind="PNG", **options):
    raw = io.BytesIO()
    image.save(raw, kind, **options)
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
    """[(key, {suffix: bytes})] of a pair, a document and a pair."""
    keys = [f"{prefix}{i}" for i in range(3)]
    return [(keys[0], make_pair(rng)), (keys[1], make_document(rng, keys[1])),
            (keys[2], make_pair(rng))]


class Shard:
    """The bytes of a tar of samples, which can be damaged, and what may come of the samples.

    hurt: keys of samples that may come out otherwise, or not at all; behind: of those that may be
    missing if the index has a note. change(path), if any, happens after indexing.
    """

    def __init__(self, samples, hurt=(), format=tarfile.GNU_FORMAT):
        self.samples = samples
        self.hurt = set(hurt)
        self.behind = set()
        self.change = None
        self.extents = []  # (start, end, key) of each sample in the tar
        self.files = []  # (start of the header, size) of each file
        tar_bytes = io.BytesIO()
        with tarfile.open(fileobj=tar_bytes, mode="w", format=format) as tar:
            for key, members in samples:
                start = tar.offset
                for suffix, raw in members.items():
                    self.files.append((tar.offset, len(raw)))
                    data.add(tar, f"{key}.{suffix}", raw)
                self.extents.append((start, tar.offset, key))
        self.end = self.extents[-1][1]  # of the last sample; the end mark follows
        self.raw = bytearray(tar_bytes.getvalue())

    def splice(self, start, end, new):
        """Replace bytes: this hurts the samples there, and puts the later ones behind."""
        end_of_damage = max(end, start + 1)
        for sample_start, sample_end, key in self.extents:
            if start < sample_end and sample_start < end_of_damage:
                self.hurt.add(key)
            elif sample_start >= end_of_damage:
                self.behind.add(key)
        self.raw[start:end] = new


def replaced(rng, kind="pair", **members):
    """A shard where members of one sample are replaced, or left out if None."""
    samples = make_samples(rng)
    key, old = samples[1] if kind == "document" else samples[2 * int(rng.integers(2))]
    for suffix, raw in members.items():
        del old[suffix]
        if raw is not None:
            old[suffix] = raw
    return Shard(samples, {key})


def pick(rng, options):
    return options[int(rng.integers(len(options)))]


# ---- kinds of damage to the archive: each yields shards ----

def cut_at_every_block(rng):
    samples = make_samples(rng)
    for block in range(0, Shard(samples).end + 1024, 512):
        for end in (block, block + int(rng.integers(1, 512))):
            shard = Shard(samples)
            shard.splice(end, len(shard.raw), b"")
            yield shard


def flipped_bytes_in_headers(rng):
    samples = make_samples(rng)
    for start, _ in Shard(samples).files:
        shard = Shard(samples)
        place = start + int(rng.integers(512))
        # one byte: two can cancel in the check sum
        shard.splice(place, place + 1, bytes([shard.raw[place] ^ int(rng.integers(1, 256))]))
        yield shard


def flipped_bytes_in_files(rng):
    samples = make_samples(rng)
    for start, size in Shard(samples).files:
        shard = Shard(samples)
        for place in rng.integers(start + 512, start + 512 + size, 3).tolist():
            shard.splice(place, place + 1, bytes([shard.raw[place] ^ int(rng.integers(1, 256))]))
        shard.behind = set()
        yield shard


def zeros_lost_or_added_bytes(rng):
    for _ in range(8):
        samples = make_samples(rng)
        place = int(rng.integers(Shard(samples).extents[-1][0]))  # at the end zeros are an end mark
        block, _ = pick(rng, Shard(samples).files[:-4])
        n = int(rng.integers(1, 512))
        for start, end, new in ((block, block + 512, bytes(512)), (place, place + n, bytes(n)),
                                (place, place + n, b""), (place, place, rng.bytes(n))):
            shard = Shard(samples)
            shard.splice(start, end, new)
            yield shard


def wrong_sizes_in_headers(rng):
    for size in (0, 1, None, 2**31, 2**40, 2**63, 2**80, -1, -512, -2**40):
        shard = Shard(make_samples(rng))
        start, true_size = pick(rng, shard.files)
        if size is None:
            size = true_size + 512  # the next header, too
        info = tarfile.TarInfo.frombuf(bytes(shard.raw[start:start + 512]), "utf-8", "strict")
        info.size = size
        shard.splice(start, start + 512, info.tobuf(tarfile.GNU_FORMAT))
        yield shard


def header(name, size=0, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.size = size
    info.type = kind
    info.linkname = link
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
    inserts = [sparse(100), sparse(5000), sparse(2**32)]
    inserts.append(3000 * extension(tarfile.GNUTYPE_LONGNAME, b"x.jpg"))
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
    for insert in inserts:
        shard = Shard(make_samples(rng))
        start, _ = pick(rng, shard.files)
        shard.splice(start, start, insert)
        if insert[156:157] == tarfile.XGLTYPE:
            shard.hurt |= shard.behind
        yield shard


def hostile_names(rng):
    for prefix in ("/etc/passwd", "../../../evil", "a/../../b", "~/evil", "$(touch evil)", " ",
                   "C:\\evil", "two\nlines", "caf\udce9", "\x1b[2J", "l/" * 200, "l" * 300):
        for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            yield Shard(make_samples(rng, prefix), format=format)
    for name in ("nodot", "x/.jpg", "..", "/", "OTHER.JPG", "0.jpg", "__MACOSX/0.jpg"):
        shard = Shard(make_samples(rng))
        start, _ = pick(rng, shard.files)
        shard.splice(start, start, header(name))
        shard.behind = set()
        yield shard


def no_tar_at_all(rng):
    samples = make_samples(rng)
    page = b"<!DOCTYPE html><title>403 Forbidden</title>"
    tar = bytes(Shard(samples).raw)
    for raw in (b"", b"\x1f\x8b", page, 500 * page, rng.bytes(5000), bytes(10_240),
                gzip.compress(tar), bz2.compress(tar)):
        shard = Shard(samples, [key for key, _ in samples])
        shard.raw = raw
        yield shard


def changed_after_indexing(rng):
    samples = make_samples(rng)
    tar = bytes(Shard(samples).raw)
    for new in (b"", tar[:3000], bytes(len(tar)), bytes(Shard(samples[::-1]).raw), None):
        shard = Shard(samples, [key for key, _ in samples])
        shard.change = os.remove if new is None else functools.partial(write, raw=new)
        yield shard


def write(path, raw):
    with open(path, "wb") as f:
        f.write(raw)


# ---- kinds of damage to what a sample holds ----

def damaged_images(rng):
    image = smooth(rng)
    jpeg = encode(image, "JPEG")
    png = encode(image)
    for raw in (b"", jpeg[:len(jpeg) // 2], jpeg[:20], png[:len(png) // 2], png[:60], b"<svg/>",
                rng.bytes(999), encode(image, "TIFF"), encode(image, "WEBP")[:100]):
        yield replaced(rng, jpg=raw)


def chunk(name, content):
    """A chunk of a PNG."""
    crc = zlib.crc32(name + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + name + content + crc


@functools.cache
def bombs():
    """Files whose headers or packed parts are far larger than they are."""
    png = encode(Image.new("RGB", (48, 32)))
    zeros = zlib.compress(bytes(2**26))
    size = (2**31 - 1).to_bytes(4, "big")
    jpeg = bytearray(encode(Image.new("RGB", (48, 32)), "JPEG"))
    place = jpeg.index(b"\xff\xc0") + 5
    jpeg[place:place + 4] = b"\xff" * 4
    return [bytes(jpeg), png[:8] + chunk(b"IHDR", size + size + png[24:29]) + png[33:],
            encode(Image.new("1", (10_000, 10_000))), encode(Image.new("L", (5000, 5000))),
            png[:33] + chunk(b"zTXt", b"a\0\0" + zeros) + png[33:],
            png[:33] + chunk(b"iCCP", b"a\0\0" + zeros) + png[33:],
            png[:33] + chunk(b"IDAT", zeros) + png[-12:]]


def bombs_as_images(rng):
    for raw in bombs():
        yield replaced(rng, jpg=raw)


def encodings_of_text(rng):
    for raw in (b"", b"caf\xe9", b"a\0dog", b"\xed\xa0\x80", rng.bytes(50) + b"\xff", b" \n\t",
                "a dog".encode("utf-16"), "\u202ea \U0001f600".encode(), b"x" * 2**20):
        yield replaced(rng, txt=raw)
    for text in ("\ud800", "a\0dog", "\udfff\ud800 x", "\u4e00" * 2**20):
        yield replaced(rng, txt=None, json=json.dumps({"caption": text}).encode())


JUNK = [None, 7, -1, True, 10**400, float("nan"), float("-inf"), "", "../../etc/passwd.jpg",
        "\ud800", [], [[]], [None, 5], {}, {"a": []}]


def replace_somewhere(rng, value, junk):
    """Put junk in the place of a field of a JSON value, or of one inside it."""
    places = list(value) if isinstance(value, dict) else range(len(value))
    place = pick(rng, list(places))
    inner = value[place]
    if isinstance(inner, (dict, list)) and inner and rng.random() < 0.7:
        replace_somewhere(rng, inner, junk)
    else:
        value[place] = copy.deepcopy(junk)


def json_of_wrong_types(rng):
    for junk in JUNK:
        for make, kind, without in ((make_pair(rng), "pair", {"txt": None}),
                                    (make_document(rng, "1"), "document", {})):
            record = json.loads(make["json"])
            for _ in range(int(rng.integers(1, 4))):
                replace_somewhere(rng, record, junk)
            yield replaced(rng, kind=kind, json=json.dumps(record).encode(), **without)


def broken_json(rng):
    deep = b"[" * 100_000 + b"]" * 100_000
    for raw in (b"", b"[]", b"null", b"\xff", b'{"caption": "x"', deep, b'{"caption": %s}' % deep,
                b'{"text_list": %s}' % deep, b'{"a": 1' + b"0" * 9999):
        yield replaced(rng, txt=None, json=raw)
        yield replaced(rng, kind="document", json=raw)


KINDS = (cut_at_every_block, flipped_bytes_in_headers, flipped_bytes_in_files,
         zeros_lost_or_added_bytes, wrong_sizes_in_headers, hostile_extensions, hostile_names,
         no_tar_at_all, changed_after_indexing, damaged_images, bombs_as_images, encodings_of_text,
         json_of_wrong_types, broken_json)


# ---- what comes of a shard ----

def make_row(sample, rng=None):
    """What a training run makes of a sample, and its key. Equal wherever the sample stands."""
    script = lcl if sample.is_document() else align
    return {"key": sample.key, **script.example(sample, common.rng(0, 0), CFG, BYTES)}


def are_equal(row, other):
    if row is None or row.keys() != other.keys():
        return False
    return all(np.array_equal(row[name], other[name]) for name in row)


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
    expect(is_bad == (len(lines) > 1), f"check prints {lines} and returns {is_bad}")
    "".join(lines).encode()  # raises if it could not be printed
    return is_bad


def index_refuses(path):
    """Is the shard alone refused? With one line."""
    try:
        data.Index([path])
    except UserError as error:
        expect("\n" not in str(error), f"more than one line: {error}")
        return True
    return False


def check_intact(sample, rows):
    row = make_row(sample)
    expect(are_equal(rows.get(sample.key), row), f"the intact sample {sample.key!r} has changed")


def check_complaint(shard, complains, reasons, notes):
    """data.py check must complain of what is skipped and noted, and not of a sound shard."""
    harmless = {data.HIDDEN, "no caption", "no image left"}  # boxes may do, where no caption is
    is_bad = (reasons | notes) - harmless
    expect(complains or not is_bad, f"check does not complain of {is_bad}")
    is_sound = not reasons and not notes and not shard.hurt
    expect(not complains or not is_sound, "check complains of a sound shard")


def examine(shard, path, intact_path, intact):
    """-> counts of what came of its samples. Raises Failed if that is not as it must be."""
    write(path, shard.raw)
    complains = check_complains(path)
    is_refused = index_refuses(path)
    index = data.Index([path, intact_path])
    notes = index.notes.get(path, {})
    if shard.change is not None:
        shard.change(path)
    rows, skipped = read_samples(index)
    n_samples = int(index.starts[1])
    n_missing = max(0, len(shard.samples) - n_samples)
    expect(notes or is_refused or not n_missing, f"{n_missing} samples are missing without a note")
    for key, members in [*shard.samples, *intact]:
        key = key.encode("utf-8", "surrogateescape").decode(errors="replace")
        is_missing = notes and key in shard.behind and key not in rows
        if key not in shard.hurt and not is_missing:
            check_intact(data.Sample(key, members), rows)
    if shard.change is None:
        check_complaint(shard, complains, set(skipped), set(notes))
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
        writes = event in ("os.mkdir", "os.rename", "os.truncate", "os.chmod")
        if event == "open":
            writes = bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if event.startswith(never) or (writes and not str(args[0]).startswith(root)):
            outside.append(f"{event} {args[0]}")

    sys.addaudithook(hook)


def raise_hang(number, frame):
    raise Hang(f"more than {SECONDS} s")


def count_open_files():
    gc.collect()  # an exception and its frames refer to each other
    return len(os.listdir("/dev/fd"))


def try_shard(shard, path, intact_path, intact, outside):
    """-> counts, and what went wrong or None"""
    n_files = count_open_files()
    counts = collections.Counter(shards=1)
    try:
        signal.alarm(SECONDS)
        counts = examine(shard, path, intact_path, intact)
        expect(count_open_files() <= n_files, "files are left open")
        expect(not outside, f"outside of the cache: {outside}")
    except Failed as error:
        return counts, str(error)
    except (Exception, Hang) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return counts, f"{type(error).__name__}: {error}, {last.filename}:{last.lineno}"[:300]
    finally:
        signal.alarm(0)
        outside.clear()
        if os.path.exists(path):
            os.remove(path)
    return counts, None


def print_table(table):
    columns = ("shards", "refused", "missing", "skipped", "read")
    print(f"{'kind':28}" + "".join(f"{name:>9}" for name in columns))
    for kind, counts in table.items():
        print(f"{kind:28}" + "".join(f"{counts[name]:9}" for name in columns))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0, help="go on for so long [one round]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.monotonic()
    signal.signal(signal.SIGALRM, raise_hang)
    table = {kind.__name__: collections.Counter() for kind in KINDS}
    failures = []
    outside = []
    with tempfile.TemporaryDirectory() as root:
        os.environ["XDG_CACHE_HOME"] = f"{root}/cache"
        intact = make_samples(np.random.default_rng(args.seed), "intact")
        intact_path = f"{root}/intact.tar"
        write(intact_path, Shard(intact).raw)
        bombs()  # made now, so that the memory for it does not count
        gc.freeze()
        watch(root, outside)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        round_number = 0
        while round_number == 0 or time.monotonic() - start < args.seconds:
            for number, kind in enumerate(KINDS):
                rng = np.random.default_rng([args.seed, round_number, number])
                for i, shard in enumerate(kind(rng)):
                    path = f"{root}/{round_number}-{number}-{i}.tar"
                    counts, problem = try_shard(shard, path, intact_path, intact, outside)
                    table[kind.__name__].update(counts)
                    if problem is not None:
                        failures.append(f"{kind.__name__} {i}, round {round_number}: {problem}")
            round_number += 1
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) // 1024
    if more > MORE_MEMORY:
        failures.append(f"{more} MiB more memory were needed")
    print_table(table)
    for line in failures:
        print(line)
    print(f"{sum(counts['shards'] for counts in table.values())} shards in "
          f"{time.monotonic() - start:.0f} s, {more} MiB more memory: {len(failures)} failures")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
