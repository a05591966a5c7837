"""From tar shards to batches; and toy data, converters, filters and a check of shards.

    python data.py make                                  # write the toy data under runs/
    python data.py index 'cc3m/{00000..00331}.tar'       # count shards and samples
    python data.py check cc3m/                           # list what is wrong, exit 1 if anything is
    python data.py vocab 'cc3m/*.tar' --size 32000 --out vocab.json
    python data.py convert captions_train2017.json --from captions --images train2017 --out coco
    python data.py filter 'cc3m/*.tar' --against 'coco/test-*.tar' --out runs/filtered

A shard is a plain tar in which the files of a sample are neighbors and share a key, the part of
their name before the first dot:

    KEY.jpg      the image; or .jpeg, .png, .webp
    KEY.txt      its caption; in held-out shards each line is one
    KEY.cls      the number of its class; classes.txt beside the shards has a name a line, from 0
    KEY.seg.png  a mask of class numbers of the image's size, 0 is unlabeled
    KEY.json     any of
        {"caption": ["a red dog", "a dog"],
         "boxes": [{"x": 16, "y": 17, "w": 33, "h": 31, "text": "a red dog"}],
         "qa": [{"question": "is it red?", "answer": "yes"}],
         "text_list": ["This is a dog.", "Good night."],
         "image_info": [{"image_name": "KEY.0.jpg", "matched_text_index": 0, "matched_sim": 0.3}]}
      boxes are in pixels from the top left corner; the last two fields are a document, whose images
      are KEY.0.jpg, KEY.1.jpg, ...

Read in this order: Index (where each sample lies), Sample (what is in it), ShuffledOrder (which
sample at which step), TrainingSet (a row, or the next sample's where one cannot be used),
BatchDataset and loader (batches).

Departure from stream readers such as webdataset: samples are read by random access, so that the
order of the samples, and going on in the middle of it, depend on neither ranks nor workers.

Dimension key: B rows of a batch, H height, W width, S side of a square view.
"""
import argparse
import atexit
import collections
import contextlib
import csv
import dataclasses
import functools
import glob
import hashlib
import heapq
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import struct
import sys
import tarfile
import tempfile
import threading
import time
import typing
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageOps
from tqdm import tqdm

import common
from common import Stream, UserError, print0, printable

warnings.filterwarnings("ignore", module=r"PIL\.")  # odd metadata; what matters raises

IMAGES = ("jpg", "jpeg", "png", "webp")
MAX_PIXELS = 25_000_000  # open_clip's guard against decompression bombs
MAX_CAPTION = 10_000  # characters; what follows is beyond any context length here

# Why a sample is skipped. If too many are unreadable, a run stops; the others depend on the task.
UNREADABLE = ("shard gone", "shard changed", "unreadable json", "text not UTF-8", "no image",
              "unreadable image", "too many pixels", "no caption", "no class", "unreadable class",
              "no document", "no mask", "unreadable mask", "mask of another size")
REASONS = (*UNREADABLE, "empty caption", "no image left", "no box", "no question")


class Skip(Exception):
    """This sample cannot be used. The argument is one of REASONS."""


# ---- which files ----

# words in names of files and folders, and the part of the data that they mean
PARTS_OF_DATA = {"train": "train", "training": "train", "val": "test", "valid": "test",
                 "validation": "test", "test": "test", "testing": "test"}


def expand_braces(pattern):
    """As in a shell: {8..11} -> 8 9 10 11, {08..11} keeps the width, {a,b} -> a b, products."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    first, last, names = match.groups()
    if names is not None:
        choices = names.split(",")
    else:
        is_padded = re.match(r"0\d", first) or re.match(r"0\d", last)
        width = max(len(first), len(last)) if is_padded else 0
        step = 1 if int(first) <= int(last) else -1
        choices = [f"{i:0{width}d}" for i in range(int(first), int(last) + step, step)]
    before = pattern[:match.start()]
    endings = expand_braces(pattern[match.end():])
    return [before + choice + ending for choice in choices for ending in endings]


def is_hidden(name):
    """Is this a file that systems leave behind: .name, ._name, something in .name/ or __MACOSX/?"""
    parts = name.split("/")
    return "__MACOSX" in parts or any(p.startswith(".") and p not in (".", "..") for p in parts)


def part_of(name):
    """"train" or "test" if a word of the name says so ("cc3m-validation-00.tar"), else None."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)  # trainSet, TRAINset
    words += re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]+", name)  # COCOTrain
    parts = {PARTS_OF_DATA[word.lower()] for word in words if word.lower() in PARTS_OF_DATA}
    if len(parts) == 2:
        raise UserError(f"{name} is named both training and held-out: rename it, or give tar files")
    return parts.pop() if parts else None


def shards_in(folder, split):
    """The tar files of a folder and of its train/, val/, test/ that belong to `split`; None: all.

    Words in the names tell the parts apart (PARTS_OF_DATA). Without any such word, all files are in
    both parts; where only some names have one, UserError.
    """
    paths = sorted(glob.glob(f"{glob.escape(folder)}/*.tar"))
    for path in sorted(glob.glob(f"{glob.escape(folder)}/*/*.tar")):
        if part_of(os.path.basename(os.path.dirname(path))):
            paths.append(path)
    if split is None:
        return paths
    parts = {path: part_of(os.path.relpath(path, folder)) for path in paths}
    if not any(parts.values()):
        return paths
    for path, part in parts.items():
        if part is None:
            raise UserError(f"{path}: neither train, val nor test is a word of its name, as in "
                            "others of that folder: rename it, or give tar files")
    return [path for path, part in parts.items() if part == split]


def no_match(pattern, name, split):
    """Why a pattern, of which `name` is a part, gives no shards, and what to do about it."""
    if not os.path.isdir(name):
        return (f"{pattern}: no such shards (expanded to {name}): give tar files, a folder or a "
                "glob")
    if shards_in(name, None):
        word = "train" if split == "train" else "val or test"
        return (f"{pattern}: none of the shards in {name} has the word {word} in its name: rename "
                "those that you mean, or give tar files")
    compressed = sorted(glob.glob(f"{glob.escape(name)}/*.tar.*"))
    if compressed:
        return (f"{pattern}: the shards in {name} are compressed, such as {compressed[0]}: unpack "
                "them (gzip -d, zstd -d, ...)")
    return f"{pattern}: no tar files in {name}: give the folder that holds them, or tar files"


def expand(patterns, split="train"):
    """Patterns -> paths of existing tar files, each file once. UserError without a match.

    patterns: a string or a list, with :: between sources, braces, globs and folders. split: which
    part of a folder, "train", "test" (held out) or None (both).
    """
    if isinstance(patterns, str):
        patterns = [patterns]
    paths = {}  # real path: path, so that a link to a file already there adds nothing
    for pattern in itertools.chain.from_iterable(p.split("::") for p in patterns):
        for name in expand_braces(os.path.expanduser(pattern)):
            if os.path.isdir(name):
                matches = shards_in(name, split)
            elif os.path.exists(name):
                matches = [name]
            else:
                matches = sorted(glob.glob(name))
            if not matches:
                raise UserError(no_match(pattern, name, split))
            for path in matches:
                paths.setdefault(os.path.realpath(path), path)
    return list(paths.values())


# ---- text files: one reader for all ----

def decode_text(raw):
    """UTF-8 bytes -> str, a byte-order mark dropped. ValueError for anything else."""
    text = raw.decode("utf-8-sig")
    if "\0" in text:  # UTF-16 without a mark passes for UTF-8
        raise ValueError("NUL in a text")
    return text


def split_lines(text):
    """Lines end at \\n or \\r\\n alone, not at U+2028 or form feed as in str.splitlines."""
    return text.replace("\r\n", "\n").rstrip("\n").split("\n")


def read_text(path):
    """The text of a file. UserError if it cannot be read or is not UTF-8."""
    try:
        with open(path, "rb") as f:
            return decode_text(f.read())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError:
        raise UserError(f"{path} is not UTF-8 text: save it as UTF-8") from None


def read_lines_near(paths, *names):
    """Lines of the first of these text files that lies beside the shards or one folder up, or None.

    A line number is a class, so UserError for an empty line, and if folders have different lists.
    """
    lists = {}  # path of the file: its lines
    for folder in dict.fromkeys(os.path.dirname(os.path.abspath(p)) for p in paths):
        places = itertools.product((folder, os.path.dirname(folder)), names)
        files = [os.path.join(place, name) for place, name in places]
        files = [file for file in files if os.path.exists(file)]
        if not files:
            continue
        lines = [line.strip() for line in split_lines(read_text(files[0]))]
        if "" in lines:
            raise UserError(f"{files[0]}, line {lines.index('') + 1} is empty: fill it in or "
                            "remove it; in a list of classes a line's number is the class")
        lists[files[0]] = lines
    if not lists:
        return None
    path, lines = next(iter(lists.items()))
    for other_path, other_lines in lists.items():
        if other_lines != lines:
            raise UserError(f"{path} and {other_path} differ: use the shards one folder at a time")
    return lines


def read_class_names(paths):
    """The names of the classes: classes.txt or classnames.txt near the shards; None without one."""
    return read_lines_near(paths, "classes.txt", "classnames.txt")


# ---- index: where each sample lies ----

# Two tables: a row for each file of the shards, and for each sample its first file and where its
# key starts. The structs are the same rows, to write one.
MEMBER = np.dtype(
    [("sample", "<i8"), ("shard", "<i4"), ("suffix", "<i4"), ("offset", "<i8"), ("size", "<i8")]
)
MEMBER_ROW = struct.Struct("<qiiqq")
SAMPLE = np.dtype([("member", "<i8"), ("key", "<i8")])
SAMPLE_ROW = struct.Struct("<qq")

# what may be odd about an archive
COMPRESSED = "compressed, which rules out random access: unpack it (gzip -d, zstd -d, ...)"
NOT_TAR = "not a tar"
CUT = "cut short or damaged: what lies before is used"
JOINED = "data after the end mark, not used"
LINKS = "links left out"
HIDDEN = "hidden files left out"
REPEATED = "repeated suffixes of a key, each a new sample"
DOTTED = "samples lost, as keys end at the first dot of a file name: rename the files"


def split_name(name):
    """'a/b.seg.png' -> ('a/b', 'seg.png'): cut at the file name's first dot (webdataset)."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def tar_files(path, notes):
    """Yield name, offset, size of the files in a tar without reading them; count oddities in notes.

    Python's tarfile ends silently at many cuts and at a damaged header, so the block where it
    stopped must be the zeros that end an archive, and nothing but zeros may follow.
    """
    n_bytes = os.path.getsize(path)
    n_headers = 0
    with open(path, "rb") as f:
        if f.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
            notes[COMPRESSED] += 1
            return
        f.seek(0)
        try:
            with tarfile.open(fileobj=f, mode="r:") as tar:
                for member in tar:
                    tar.members = []  # tarfile would keep every header of the archive
                    n_headers += 1
                    leads_back = member.size < 0 or tar.offset <= member.offset
                    if leads_back or member.offset_data + member.size > n_bytes:
                        notes[CUT] += 1
                        return
                    if member.isreg():
                        yield member.name, member.offset_data, member.size
                    elif member.islnk() or member.issym():
                        notes[LINKS] += 1
        except Exception:  # tarfile fails in many ways: TarError, OSError, MemoryError, ...
            notes[CUT if n_headers else NOT_TAR] += 1
            return
        f.seek(tar.offset)
        if f.read(512) != bytes(512):
            notes[CUT] += 1
        elif any(block.strip(b"\0") for block in iter(functools.partial(f.read, 2**20), b"")):
            notes[JOINED] += 1


def lost_to_dots(suffixes):
    """How many samples besides this one its files seem to make, if keys had dots in them.

    frame_2024.05.01_0000.txt and frame_2024.05.01_0001.txt have the key frame_2024. A sample has
    one text and one class; only documents, which have a json, have numbered images.
    """
    if not any("." in suffix for suffix in suffixes):
        return 0
    kinds = collections.Counter()
    for suffix in suffixes:
        front, _, kind = suffix.rpartition(".")
        is_numbered = "json" not in suffixes and any(c.isdigit() for c in front)
        if kind in ("txt", "json", "cls") or (kind in IMAGES and is_numbered):
            kinds[kind] += 1
    return max(kinds.values(), default=1) - 1


class Scan(typing.NamedTuple):
    """What scan() finds in a shard. Numbers of samples and suffixes count from 0 in it."""
    members: np.ndarray  # MEMBER
    samples: np.ndarray  # SAMPLE
    keys: bytes
    suffixes: list
    notes: dict  # {oddity: count}


def scan(path):
    """One pass over the headers of a shard -> Scan."""
    notes = collections.Counter()
    members = bytearray()
    samples = bytearray()
    keys = bytearray()
    suffixes = {}  # suffix: its number
    n_samples = 0
    last_key = None
    in_sample = set()  # suffixes of the current sample
    for name, offset, size in tar_files(path, notes):
        if is_hidden(name):
            notes[HIDDEN] += 1
            continue
        key, suffix = split_name(name)
        if not suffix:
            continue
        if key != last_key or suffix in in_sample:
            notes[REPEATED] += key == last_key
            notes[DOTTED] += lost_to_dots(in_sample)
            samples += SAMPLE_ROW.pack(len(members) // MEMBER.itemsize, len(keys))
            keys += key.encode("utf-8", "surrogateescape")
            n_samples += 1
            last_key = key
            in_sample = set()
        in_sample.add(suffix)
        suffix_number = suffixes.setdefault(suffix, len(suffixes))
        members += MEMBER_ROW.pack(n_samples - 1, 0, suffix_number, offset, size)
    notes[DOTTED] += lost_to_dots(in_sample)
    notes = {note: n for note, n in notes.items() if n}
    return Scan(np.frombuffer(members, MEMBER), np.frombuffer(samples, SAMPLE), bytes(keys),
                list(suffixes), notes)


def parallel_map(fn, *columns, label, min_parallel):
    """Yield fn(*row) for each row of the columns, in order, with a bar.

    In other processes if there are at least `min_parallel` rows; starting them takes seconds.
    """
    n = len(columns[0])
    bar = functools.partial(tqdm, desc=label, total=n, unit="shard", leave=False, disable=None)
    if n < min_parallel:
        yield from bar(map(fn, *columns))
        return
    context = multiprocessing.get_context("spawn")  # torch may have threads, which fork would break
    with ProcessPoolExecutor(common.cpu_count(), mp_context=context) as pool:
        yield from bar(pool.map(fn, *columns))


class Index:
    """Random access to the samples of tar shards: neighboring files with one key are one sample.

    Where each file lies is found once and cached as memory-mapped tables, under the shards' paths,
    sizes and times, so that any sample can be read directly: a training order is a list of numbers.

    paths: the shards; starts (shards + 1,): number of each shard's first sample, and of samples;
    members: MEMBER rows of all files; samples: SAMPLE rows, and one that ends the last sample.
    cache_folder: of the tables; None = vlp-index in XDG_CACHE_HOME or ~/.cache.
    Raises UserError if a shard cannot be opened or there is no sample at all.
    """

    def __init__(self, paths, cache_folder=None):
        self.paths = [os.path.abspath(p) for p in paths]
        self.stamps = []  # [size, time] of the shards
        for path in self.paths:
            try:
                with open(path, "rb") as f:
                    status = os.fstat(f.fileno())
            except OSError as error:
                raise UserError(f"shard {path} cannot be read ({error.strerror})") from None
            self.stamps.append([status.st_size, status.st_mtime_ns])
        name = hashlib.sha256(json.dumps([self.paths, self.stamps]).encode()).hexdigest()[:24]
        if cache_folder is None:
            caches = os.environ.get("XDG_CACHE_HOME")
            if not caches:  # an empty one counts as none
                caches = os.path.expanduser("~/.cache")
            cache_folder = os.path.join(caches, "vlp-index")
        self.cache = os.path.join(cache_folder, name)
        if not self._load():
            self._build()
            assert self._load(), f"{self.cache}.* changed while it was written"

    def _load(self):
        """Map the cached tables. -> False if they are missing or incomplete."""
        try:
            with open(self.cache + ".json", encoding="utf-8") as f:
                meta = json.load(f)
            self.starts = np.array(meta["starts"])
            self.suffixes = meta["suffixes"]
            self.notes = meta["notes"]
            # as plain arrays: slices of a memmap are slow
            self.members = np.memmap(self.cache + ".members", MEMBER, "r").view(np.ndarray)
            self.samples = np.memmap(self.cache + ".samples", SAMPLE, "r").view(np.ndarray)
            self.keys = np.memmap(self.cache + ".keys", np.uint8, "r").view(np.ndarray)
            sizes = [table.nbytes for table in (self.members, self.samples, self.keys)]
            return sizes == meta["sizes"]
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _build(self):
        folder = os.path.dirname(self.cache)
        try:
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as new:
                self._scan_shards(new)
                for name in ("members", "samples", "keys", "json"):  # json last: it completes them
                    os.replace(f"{new}/{name}", f"{self.cache}.{name}")
        except OSError as error:
            raise UserError(f"the index cannot be written to {folder} ({error.strerror}): "
                            "set XDG_CACHE_HOME to a folder with room") from None

    def _scan_shards(self, folder):
        """Write the tables to a folder, a shard at a time, so that memory does not grow."""
        starts = [0]
        suffixes = {}  # suffix: its number
        self.notes = {}
        with (open(f"{folder}/members", "wb") as members_file,
              open(f"{folder}/samples", "wb") as samples_file,
              open(f"{folder}/keys", "wb") as keys_file):
            scans = parallel_map(scan, self.paths, label="indexing", min_parallel=50)
            for shard, (members, samples, keys, names, notes) in enumerate(scans):
                numbers = [suffixes.setdefault(name, len(suffixes)) for name in names]
                samples["member"] += members_file.tell() // MEMBER.itemsize
                samples["key"] += keys_file.tell()
                members["sample"] += starts[-1]
                members["shard"] = shard
                members["suffix"] = np.array(numbers, int)[members["suffix"]]
                members_file.write(members.tobytes())
                samples_file.write(samples.tobytes())
                keys_file.write(keys)
                starts.append(starts[-1] + len(samples))
                if notes:
                    self.notes[self.paths[shard]] = notes
            n_members = members_file.tell() // MEMBER.itemsize
            samples_file.write(SAMPLE_ROW.pack(n_members, keys_file.tell()))  # the last one's end
            sizes = [members_file.tell(), samples_file.tell(), keys_file.tell()]
        if starts[-1] == 0:
            line = f"no sample in {len(self.paths)} shard(s), the first is {self.paths[0]}"
            raise UserError("; ".join([line, *self.warnings()[:3]]))
        with open(f"{folder}/json", "w", encoding="utf-8") as f:
            json.dump({"sizes": sizes, "starts": starts, "suffixes": list(suffixes),
                       "notes": self.notes}, f)

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, i):
        """Sample i. Raises Skip."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        (first, _), (end, _) = self.samples[i:i + 2].tolist()
        members = self.members[first:end].tolist()
        shard = members[0][1]
        contents = {}
        try:
            with open(self.paths[shard], "rb") as f:
                status = os.fstat(f.fileno())
                if [status.st_size, status.st_mtime_ns] != self.stamps[shard]:
                    raise Skip("shard changed")
                for _, _, suffix, offset, size in members:
                    contents[self.suffixes[suffix]] = os.pread(f.fileno(), size, offset)
        except OSError:
            raise Skip("shard gone") from None
        return Sample(self.key(i), contents)

    def key(self, i):
        """The key of sample i: the names of its files up to their first dot."""
        (_, first), (_, end) = self.samples[i:i + 2].tolist()
        return self.keys[first:end].tobytes().decode(errors="replace")

    def place(self, i):
        """Where sample i lies, for messages: shard and key."""
        shard = int(np.searchsorted(self.starts, i, side="right")) - 1
        return f"{self.paths[shard]}: {self.key(i)}"

    def summary(self):
        n_bytes = sum(size for size, _ in self.stamps)
        return (f"{len(self.paths)} shards, {len(self):,} samples, {n_bytes / 1e9:.2f} GB, "
                f"first key {self.key(0)}")

    def warnings(self):
        """A line for each shard that is odd: what is odd, and how often."""
        lines = []
        for path, notes in self.notes.items():
            lines.append(f"{path}: " + ", ".join(f"{note} ({n})" for note, n in notes.items()))
        return lines

    def __reduce__(self):  # another process maps the tables anew, once, instead of getting a copy
        return received_index, (tuple(self.paths),)


@functools.lru_cache(maxsize=1)  # each task of parallel_map brings it again
def received_index(paths):
    return Index(paths)


def open_index(patterns, split="train"):
    """The Index of the shards that these patterns mean, built by rank 0 first; None for None."""
    if not patterns:
        return None
    paths = expand(patterns, split)
    return common.main_process_first(functools.partial(Index, paths))


# ---- sample: what is in it ----

# EXIF orientation: how a stored image is turned upright
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
           4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
           6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}


def without_metadata(png):
    """A PNG's bytes without chunks that change no pixel: Pillow refuses it for a damaged one."""
    kept = [png[:8]]
    start = 8
    while start < len(png):
        end = start + 12 + int.from_bytes(png[start:start + 4], "big")  # length, name, data, CRC
        name = png[start + 4:start + 8]
        is_sound = zlib.crc32(png[start + 4:end - 4]) == int.from_bytes(png[end - 4:end], "big")
        if name[:1].isupper() or (name in (b"tRNS", b"eXIf") and is_sound):  # upper case: critical
            kept.append(png[start:end])
        start = end
    return b"".join(kept)


def open_image(raw):
    """Open, but do not decode, a JPEG, PNG or WebP. Raises Skip."""
    if raw.startswith(b"\x89PNG"):
        raw = without_metadata(raw)
    try:
        image = Image.open(io.BytesIO(raw), formats=("JPEG", "PNG", "WEBP"))
    except Image.DecompressionBombError:
        raise Skip("too many pixels") from None
    except Exception:  # Pillow fails in many ways: OSError, SyntaxError, struct.error, ...
        raise Skip("unreadable image") from None
    if image.width * image.height > MAX_PIXELS:
        raise Skip("too many pixels")
    return image


def orientation(image):
    """The EXIF orientation, 1 to 8; 1, upright, if there is none that can be read."""
    try:
        value = image.getexif().get(0x0112, 1)
        return value if value in UPRIGHT else 1
    except Exception:  # damaged metadata does not harm the pixels
        return 1


def upright(image, turn):
    return image.transpose(UPRIGHT[turn]) if turn in UPRIGHT else image


class Sample:
    """One sample, decoded on demand. What is missing or damaged raises Skip with a reason."""

    def __init__(self, key, members):
        self.key = key
        self.members = members  # {suffix: bytes}

    @functools.cached_property
    def json(self):
        """The record, {} if there is none."""
        try:
            record = json.loads(decode_text(self.members.get("json", b"{}")))
        except (ValueError, RecursionError):
            raise Skip("unreadable json") from None
        if not isinstance(record, dict):
            raise Skip("unreadable json")
        return record

    def _caption_field(self):
        if self.json.get("caption") is not None:
            return self.json["caption"]
        return self.json.get("captions")

    def has_caption(self):
        """Does it claim to have a caption? captions() says whether it really has."""
        return "txt" in self.members or self._caption_field() is not None

    def captions(self, lines=False):
        """All captions, white space collapsed: KEY.txt, else "caption" or "captions" of the record.

        lines: each line of the .txt is a caption (evaluation sets), else all of it is one.
        """
        if "txt" in self.members:
            try:
                captions = decode_text(self.members["txt"])
            except ValueError:
                raise Skip("text not UTF-8") from None
            if lines:
                captions = split_lines(captions)
        else:
            captions = self._caption_field()
        if isinstance(captions, str):
            captions = [captions]
        if not isinstance(captions, list):
            raise Skip("no caption")
        captions = [" ".join(c[:MAX_CAPTION].split()) for c in captions if isinstance(c, str)]
        captions = [c for c in captions if c]
        if not captions:
            raise Skip("empty caption")
        return captions

    def caption(self, rng):
        """One caption, drawn where there are several."""
        captions = self.captions()
        if len(captions) == 1:
            return captions[0]
        return captions[int(rng.integers(len(captions)))]

    def has_label(self):
        return "cls" in self.members

    def label(self):
        """The class number in KEY.cls."""
        if not self.has_label():
            raise Skip("no class")
        try:
            label = int(decode_text(self.members["cls"]))
        except ValueError:
            raise Skip("unreadable class") from None
        if not 0 <= label < 2**31:
            raise Skip("unreadable class")
        return label

    def image_bytes(self):
        """The image file; Skip if there is none."""
        for suffix in IMAGES:
            if suffix in self.members:
                return self.members[suffix]
        raise Skip("no image")

    def image(self, min_size=None, member=None):
        """The image, RGB and upright.

        min_size: a JPEG may be decoded at a fraction of its size, both sides at least that long.
        member: the suffix of one of several images.
        """
        if member is None:
            raw = self.image_bytes()
        elif member in self.members:
            raw = self.members[member]
        else:
            raise Skip("no image")
        image = open_image(raw)
        try:
            if min_size:
                image.draft("RGB", (min_size, min_size))
            image.load()
            turn = orientation(image)
            if image.mode.startswith("I"):  # 16 bits: convert would clip all but the darkest
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode != "RGB":
                image = image.convert("RGB")
        except Exception:  # as in open_image
            raise Skip("unreadable image") from None
        return upright(image, turn)

    def size(self):
        """Width and height of the upright image, which is not decoded."""
        image = open_image(self.image_bytes())
        if orientation(image) >= 5:  # a quarter turn
            return image.height, image.width
        return image.size

    def mask(self):
        """Class numbers of the pixels (H, W), int32, of KEY.seg.png, turned as the image is.

        0 is unlabeled; so is 255 in a mask of 8 bits (Pascal VOC's border).
        """
        if "seg.png" not in self.members:
            raise Skip("no mask")
        image = open_image(self.image_bytes())
        try:
            stored = open_image(self.members["seg.png"])
            classes = np.array(stored)
        except Exception:  # as in open_image
            raise Skip("unreadable mask") from None
        if stored.size != image.size:
            raise Skip("mask of another size")
        if classes.ndim != 2:  # colors, not classes
            raise Skip("unreadable mask")
        if classes.dtype == np.uint8:
            classes[classes == 255] = 0
        mask = Image.fromarray(classes.astype(np.int32))
        return np.array(upright(mask, orientation(image)))

    def box_records(self):
        """The records of boxes, [] where there are none. Raises Skip."""
        records = self.json.get("boxes", self.json.get("segments", []))
        if not isinstance(records, list):
            raise Skip("no box")
        return records

    def boxes(self, *fields):
        """[(x, y, w, h, text, *its other `fields`)] in pixels of the upright image.

        From the record's "boxes" ({x, y, w, h, text}) or "segments" ({bbox, name}), in pixels of
        the image as stored; cut at its edges. What is malformed, outside or without a text is left
        out. Skip if none is left.
        """
        image = open_image(self.image_bytes())
        width, height = image.size
        turn = orientation(image)
        boxes = []
        for record in self.box_records():
            box = read_box(record, width, height)
            if box is not None:
                x, y, w, h, text = box
                others = [record.get(field) for field in fields]
                boxes.append((*turn_box(x, y, w, h, width, height, turn), text, *others))
        if not boxes:
            raise Skip("no box")
        return boxes

    def is_document(self):
        """Does it claim to be a document? document() says whether it really is."""
        return "text_list" in self.json

    def document(self, rng, min_size=None, min_similarity=0.24, max_images=6, image_first=0.5):
        """Sentences (str) and PIL images in reading order, of "text_list" and "image_info" (MMC4).

        LCL's rules (its released loader): images whose matched_sim is at least min_similarity, or
        not given; one for a sentence, drawn; the first max_images of them; each before its sentence
        with probability image_first, else after it. Skip if none of the images can be read.
        """
        texts = self.json.get("text_list")
        info = self.json.get("image_info")
        if not isinstance(texts, list) or not isinstance(info, list):
            raise Skip("no document")
        suffixes_of = collections.defaultdict(list)  # of the images of each sentence
        for entry in info:
            suffix, sentence, similarity = read_entry(entry, len(texts))
            if suffix is not None and similarity >= min_similarity:
                suffixes_of[sentence].append(suffix)
        images = {}
        for sentence in sorted(suffixes_of)[:max_images]:
            suffixes = suffixes_of[sentence]
            suffix = suffixes[int(rng.integers(len(suffixes)))]
            with contextlib.suppress(Skip):
                images[sentence] = self.image(min_size, suffix)
        if not images:
            raise Skip("no image left")
        segments = []
        for i, text in enumerate(texts):
            sentence = [text] if text and isinstance(text, str) else []
            if i not in images:
                segments += sentence
            elif rng.random() < image_first:
                segments += [images[i], *sentence]
            else:
                segments += [*sentence, images[i]]
        return segments


def read_entry(entry, n_sentences):
    """An entry of MMC4's image_info -> suffix of its image (None if malformed), number of its
    sentence, similarity to it (infinite if not given)."""
    try:
        suffix = split_name(entry["image_name"])[1]
        sentence = entry["matched_text_index"]
        similarity = entry.get("matched_sim")
        similarity = math.inf if similarity is None else float(similarity)
        if isinstance(sentence, int) and 0 <= sentence < n_sentences:
            return suffix, sentence, similarity
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        pass
    return None, None, None


def read_box(record, width, height):
    """x, y, w, h, text of a box in a json record, cut at the image's edges; None if it has none."""
    try:
        sides = record["bbox"] if "bbox" in record else [record[name] for name in "xywh"]
        x, y, w, h = map(float, sides)
        text = record["text"] if record.get("text") else record["name"]
        text = " ".join(text[:MAX_CAPTION].split())
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        return None
    left = max(x, 0.0)
    top = max(y, 0.0)
    w = min(x + w, width) - left
    h = min(y + h, height) - top
    if w > 0 and h > 0 and text:
        return left, top, w, h, text
    return None


def turn_box(x, y, w, h, width, height, turn):
    """A box (x, y, w, h) of an image stored as width x height, where EXIF orientation turns it."""
    if turn in (2, 3, 7, 8):
        x = width - x - w
    if turn in (3, 4, 6, 7):
        y = height - y - h
    if turn >= 5:
        return y, x, h, w
    return x, y, w, h


# ---- views: images -> uint8 (3, S, S) ----

def to_chw(image, flip=False):
    """An RGB image, mirrored or not -> uint8 (3, H, W), read-only: a view of the pixels' bytes."""
    if flip:
        image = ImageOps.mirror(image)
    pixels = np.frombuffer(image.tobytes(), np.uint8)
    return pixels.reshape(image.height, image.width, 3).transpose(2, 0, 1)


def resize_and_crop(image, size, rng=None, flip=False, full=346 / 289):
    """ALIGN's view (paper s5): both sides to full * size, then a crop, random or (no rng) central.

    One resize of the crop's box: nothing outside it is computed.
    """
    full_size = round(size * full)
    if rng is None:
        x = (full_size - size) // 2
        y = x
        flip = False
    else:
        x = int(rng.integers(full_size - size + 1))
        y = int(rng.integers(full_size - size + 1))
        flip = flip and rng.random() < 0.5
    x_scale = image.width / full_size
    y_scale = image.height / full_size
    box = (x * x_scale, y * y_scale, (x + size) * x_scale, (y + size) * y_scale)
    return to_chw(image.resize((size, size), Image.BILINEAR, box=box), flip)


def random_box(rng, width, height, scale, ratio=(3 / 4, 4 / 3)):
    """(x, y, w, h) of a random resized crop (torchvision's); central after ten misses.

    Its area is in (scale, 1) of the image's, its sides in `ratio`.
    """
    for _ in range(10):
        area = width * height * rng.uniform(scale, 1)
        aspect = np.exp(rng.uniform(*np.log(ratio)))
        w = round((area * aspect) ** 0.5)
        h = round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            x = int(rng.integers(0, width - w + 1))
            y = int(rng.integers(0, height - h + 1))
            return x, y, w, h
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def crop(image, box, size, flip=False):
    """The box (x, y, w, h) of an image, bicubic -> uint8 (3, size, size)."""
    x, y, w, h = box
    return to_chw(image.resize((size, size), Image.BICUBIC, box=(x, y, x + w, y + h)), flip)


def center_crop(image, size):
    """The usual evaluation view: short side to `size`, bicubic, central square."""
    short = min(image.size)
    box = ((image.width - short) / 2, (image.height - short) / 2, short, short)
    return crop(image, box, size)


# ---- order: which sample at which step ----

WINDOW = 64  # shards among which samples are shuffled


class ShuffledOrder:
    """Order of the samples of an epoch: shards permuted, samples shuffled inside windows of shards,
    cut into global batches, the tail dropped.

    The batch at a step depends on (seed, step, batch) alone, so that resuming costs nothing and any
    number of ranks sees the same. starts: first sample of each shard, and the number of samples.
    """

    def __init__(self, starts, batch, seed):
        self.starts = starts
        self.batch = batch
        self.seed = seed
        self.n = int(starts[-1])
        if batch > self.n:
            raise UserError(f"a batch takes {batch} samples of these data, which have {self.n}: "
                            "give a smaller --batch")
        self.steps_per_epoch = self.n // batch
        self.last_epoch = (None, None)  # epoch, what _shards gives for it
        self.last_window = (None, None)  # (epoch, window), its shuffled samples

    def __call__(self, step, row):
        """Sample in a row of the global batch of a step."""
        return self.sample(*self.position(step, row))

    def position(self, step, row):
        """(epoch, position in it) of a row of the global batch of a step."""
        epoch = step // self.steps_per_epoch
        return epoch, step % self.steps_per_epoch * self.batch + row

    def sample(self, epoch, position):
        _, ends = self._shards(epoch)
        window = int(np.searchsorted(ends, position, side="right"))
        start = ends[window - 1] if window else 0
        return int(self._samples(epoch, window)[position - start])

    def _shards(self, epoch):
        """The permuted shards, and the position at which each window of them ends."""
        key, shards = self.last_epoch
        if key != epoch:
            order = common.rng(Stream.SHARDS, self.seed, epoch).permutation(len(self.starts) - 1)
            ends = np.cumsum(np.diff(self.starts)[order])
            shards = order, np.append(ends[WINDOW - 1:-1:WINDOW], ends[-1])
            self.last_epoch = epoch, shards
        return shards

    def _samples(self, epoch, window):
        key, samples = self.last_window
        if key != (epoch, window):
            order, _ = self._shards(epoch)
            shards = order[window * WINDOW:(window + 1) * WINDOW]
            samples = np.concatenate([np.arange(*self.starts[s:s + 2]) for s in shards])
            common.rng(Stream.WINDOW, self.seed, epoch, window).shuffle(samples)
            self.last_window = (epoch, window), samples
        return samples


# ---- batches ----

class TrainingSet:
    """Training rows: samples of an index in a ShuffledOrder, each made by example(sample, rng).

    example gives {name: numpy array} and may raise Skip. A sample that cannot be used is replaced
    by the next one of the epoch that can, which then occurs twice; no other row moves. rng depends
    on (seed, epoch, sample) alone.
    """

    def __init__(self, index, order, example):
        self.index = index
        self.order = order
        self.example = example

    def __call__(self, step, row, skipped):
        """The row of the global batch of a step; skipped {reason: count} is counted up."""
        epoch, position = self.order.position(step, row)
        for p in range(position, position + self.order.n):
            i = self.order.sample(epoch, p % self.order.n)
            rng = common.rng(Stream.SAMPLE, self.order.seed, epoch, i)
            try:
                return self.example(self.index[i], rng)
            except Skip as reason:
                skipped[str(reason)] += 1
        counts = ", ".join(f"{n} {reason}" for reason, n in skipped.items() if n)
        raise UserError(f"none of the {self.order.n} samples can be used ({counts}): "
                        "python data.py check lists what is wrong")


def n_second_kind(rows, share):
    """How many of the first `rows` rows of a global batch are of the second kind."""
    return int(rows * share + 1e-9)


def two_sources(cfg, indices, share, example):
    """Training sets of two kinds of rows for BatchDataset, and the share of the second kind.

    indices: of the two kinds, None where there are no data; then all rows are of the other kind.
    """
    if indices[0] is None:
        share = 1.0
    if indices[1] is None:
        share = 0.0
    n_second = n_second_kind(cfg.batch, share)
    sources = []
    for i, n in enumerate((cfg.batch - n_second, n_second)):
        source = None
        if n > 0:
            order = ShuffledOrder(indices[i].starts, n, cfg.seed + i)
            source = TrainingSet(indices[i], order, example)
        sources.append(source)
    return sources, share


def stack(rows):
    """[{name: array}] -> {name: tensor (B, ...)}"""
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


class BatchDataset(torch.utils.data.Dataset):
    """Item `step`: collate(this rank's rows of the step's global batch), and "skipped", counts in
    the order of REASONS. A batch that cannot be made is {"error": line}.

    sources: one TrainingSet, or two, whose rows alternate evenly so that `share` of the global
    batch is of the second; either may be None where it has no rows.
    """

    def __init__(self, sources, batch, rank=0, world_size=1, share=0.0, collate=stack):
        self.sources = sources
        self.share = share
        self.collate = collate
        self.rows = range(rank * batch // world_size, (rank + 1) * batch // world_size)

    def __getitem__(self, step):
        skipped = dict.fromkeys(REASONS, 0)
        rows = []
        try:
            for row in self.rows:
                n_second = n_second_kind(row, self.share)  # among the rows before
                if n_second_kind(row + 1, self.share) > n_second:
                    rows.append(self.sources[1](step, n_second, skipped))
                else:
                    rows.append(self.sources[0](step, row - n_second, skipped))
        except UserError as error:  # raised here it would reach the main process as a traceback
            return {"error": str(error)}
        batch = self.collate(rows)
        batch["skipped"] = torch.tensor(list(skipped.values()))
        return batch


PREFETCH = 2  # batches that each worker makes ahead


def ignore_signals(worker):
    """A signal to the whole group must not end the workers before the run has been saved."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def check_shared_memory(batch, workers):
    """UserError if the batches that workers make ahead do not fit into /dev/shm: all would hang."""
    folder = "/dev/shm"
    if not os.path.isdir(folder):  # macOS
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this machine
    n_bytes = sum(x.nbytes for x in batch.values() if isinstance(x, torch.Tensor))
    needed = n_bytes * (PREFETCH * workers + 3) * ranks  # two in use, and one as sizes vary
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise UserError(f"{folder} has {free / 2**20:.1f} MiB free, the batches of {workers} "
                        f"loader worker(s) need {needed / 2**20:.1f}: give --workers 0 or fewer "
                        "workers, or make it larger (docker run --shm-size 8g)")


def loader(dataset, start_step, steps, workers, device):
    """Iterator over the batches of steps start_step ... steps - 1, on the device.

    workers: processes that make them, a few ahead; 0: this one; None: as many as cores but one, at
    most 16. A batch also holds "skipped" (counts, on the CPU) and "data_wait" (seconds it was
    waited for). close() ends the workers. Raises UserError if a batch cannot be made or a worker
    has died.
    """
    if workers is None:
        workers = max(1, min(16, common.cpu_count() - 1))
    start = time.perf_counter()
    first = []
    options = {}
    if start_step < steps:
        first.append(dataset[start_step])  # made here: the workers' memory depends on its size
    if first and workers:
        check_shared_memory(first[0], workers)
        options = {"num_workers": workers, "worker_init_fn": ignore_signals,
                   "prefetch_factor": PREFETCH}
    others = torch.utils.data.DataLoader(
        dataset, batch_size=None, sampler=range(start_step + 1, steps),
        pin_memory=device.type == "cuda", **options)
    batches = deliver(itertools.chain(first, iter(others)), device, start)
    if options and threading.current_thread() is threading.main_thread():
        # torch's handler raises wherever this process is; deliver notices a dead worker, too
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # after an exception Python would wait for ever for the workers, which ignore its TERM
    atexit.register(kill_workers)
    atexit.register(batches.close)  # called first
    return batches


def kill_workers():
    """End what Python would, also workers that an error keeps alive and that ignore TERM."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def deliver(batches, device, start):
    """The batches on the device, with the time that each was waited for (the first since start)."""
    try:
        for batch in batches:
            if "error" in batch:
                raise UserError(batch["error"])
            skipped = batch.pop("skipped")
            batch = {name: x.to(device, non_blocking=True) for name, x in batch.items()}
            yield {**batch, "skipped": skipped, "data_wait": time.perf_counter() - start}
            start = time.perf_counter()
    except Exception as error:
        is_torch = str(error).startswith("DataLoader worker (pid")
        if is_torch or isinstance(error, (ConnectionError, EOFError)):  # before torch notices
            raise UserError(f"a loader worker died ({str(error).strip()}): fewer --workers need "
                            "less memory") from None
        raise


# ---- tokenizer ----

class Tokenizer:
    """Byte-level byte-pair encoding. Ids: special tokens, 256 bytes, merges as they were learned.

    Special tokens exist as ids only: no string in a text becomes one. Without merges it is a plain
    byte tokenizer.
    """
    PAD, BOS, EOS, MASK, SOI, EOI, IMG, UNUSED = SPECIAL = range(8)
    FIRST_BYTE = len(SPECIAL)
    FIRST_MERGE = FIRST_BYTE + 256
    # each character belongs to exactly one word; bounded, since merging is quadratic in the length
    WORDS = re.compile(r" ?\w{1,64}| ?[^\w\s]{1,64}|\s")

    def __init__(self, merges=()):
        self.merges = [tuple(pair) for pair in merges]
        self.vocab_size = self.FIRST_MERGE + len(self.merges)
        self.merge_id = {pair: self.FIRST_MERGE + i for i, pair in enumerate(self.merges)}
        self.bytes = [b""] * self.FIRST_BYTE + [bytes([i]) for i in range(256)]  # of each id
        for a, b in self.merges:
            self.bytes.append(self.bytes[a] + self.bytes[b])
        self.cache = {}  # ids of a word

    @classmethod
    def train(cls, texts, vocab_size):
        """Merge the most frequent pair of neighbors, on ties the one with the smaller ids, until
        there are vocab_size ids or no pair occurs twice."""
        words = cls.count_words(texts)
        pair_counts = collections.Counter()
        words_with = collections.defaultdict(set)  # numbers of the words that have a pair
        for i, (ids, n) in enumerate(words):
            for pair in zip(ids, ids[1:]):
                pair_counts[pair] += n
                words_with[pair].add(i)
        heap = [(-n, pair) for pair, n in pair_counts.items()]
        heapq.heapify(heap)
        merges = []
        while heap and cls.FIRST_MERGE + len(merges) < vocab_size:
            negative_count, pair = heapq.heappop(heap)
            if -negative_count != pair_counts[pair]:  # outdated: pushed again when it changed
                continue
            if pair_counts[pair] < 2:
                break
            new_id = cls.FIRST_MERGE + len(merges)
            merges.append(pair)
            changed = set()
            for i in words_with.pop(pair):
                ids, n = words[i]
                for old_pair in zip(ids, ids[1:]):
                    pair_counts[old_pair] -= n
                    changed.add(old_pair)
                ids[:] = cls.merge(ids, pair, new_id)
                for new_pair in zip(ids, ids[1:]):
                    pair_counts[new_pair] += n
                    words_with[new_pair].add(i)
                    changed.add(new_pair)
            for other in changed:
                if other != pair and pair_counts[other] > 0:
                    heapq.heappush(heap, (-pair_counts[other], other))
        return cls(merges)

    @classmethod
    def count_words(cls, texts):
        """[(ids of the bytes of a word, how often it occurs)]"""
        counts = collections.Counter()
        for text in texts:
            counts.update(cls.WORDS.findall(text))
        return [(cls.byte_ids(word), n) for word, n in sorted(counts.items())]

    @classmethod
    def byte_ids(cls, word):
        # half of a surrogate pair, which JSON may hold, has no UTF-8 otherwise
        return [cls.FIRST_BYTE + byte for byte in word.encode("utf-8", "surrogatepass")]

    @staticmethod
    def merge(ids, pair, new_id):
        """ids with each occurrence of the pair, from the left, replaced by new_id."""
        merged = []
        i = 0
        while i < len(ids):
            if tuple(ids[i:i + 2]) == pair:
                merged.append(new_id)
                i += 2
            else:
                merged.append(ids[i])
                i += 1
        return merged

    def encode_word(self, word):
        if word not in self.cache:
            ids = self.byte_ids(word)
            while len(ids) > 1:
                # the pair that was learned first
                pair = min(zip(ids, ids[1:]), key=lambda p: self.merge_id.get(p, self.vocab_size))
                if pair not in self.merge_id:
                    break
                ids = self.merge(ids, pair, self.merge_id[pair])
            if len(self.cache) > 100_000:
                self.cache.clear()
            self.cache[word] = ids
        return self.cache[word]

    def encode(self, text):
        """Ids of a text, without special tokens."""
        return [i for word in self.WORDS.findall(text) for i in self.encode_word(word)]

    def pad(self, text, length):
        """BOS, the text cut so that EOS fits, EOS, PAD -> tokens int64, valid bool, (length,)."""
        ids = [self.BOS, *self.encode(text)[:length - 2], self.EOS]
        tokens = np.full(length, self.PAD)
        tokens[:len(ids)] = ids
        return tokens, np.arange(length) < len(ids)

    def decode(self, ids):
        """Text of ids. Special tokens vanish; bytes that are not UTF-8 become U+FFFD."""
        known = [self.bytes[int(i)] for i in ids if i < len(self.bytes)]
        return b"".join(known).decode(errors="replace")

    def dumps(self):
        return json.dumps({"type": "byte-level BPE", "special": len(self.SPECIAL),
                           "merges": self.merges})

    @classmethod
    def loads(cls, text, origin="vocabulary"):
        """The tokenizer that dumps() wrote. UserError for anything else."""
        try:
            fields = json.loads(text)
            if fields["special"] != len(cls.SPECIAL):
                raise ValueError("other special tokens")
            for k, (a, b) in enumerate(fields["merges"]):
                if min(a, b) < cls.FIRST_BYTE or max(a, b) >= cls.FIRST_MERGE + k:
                    raise ValueError("a merge of unknown ids")
            return cls(fields["merges"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{origin} is not a vocabulary of ours: "
                            "python data.py vocab makes one") from None

    def save(self, path):
        try:
            with open(path + ".tmp", "w", encoding="utf-8") as f:
                f.write(self.dumps())
            os.replace(path + ".tmp", path)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror})") from None

    @classmethod
    def load(cls, path):
        return cls.loads(read_text(path), path)


def first_captions(index, limit=100_000):
    """Texts of the first samples, to train a vocabulary. UserError if there are none."""
    texts = []
    for i in range(min(len(index), limit)):
        with contextlib.suppress(Skip):
            sample = index[i]
            if sample.is_document():
                sentences = sample.json["text_list"]
                if isinstance(sentences, list):
                    texts += [text for text in sentences if isinstance(text, str)]
            else:
                texts += sample.captions()
    if not texts:
        raise UserError(f"no caption in {index.paths[0]} ...: a caption is KEY.txt or "
                        '"caption" in KEY.json')
    return texts


def make_tokenizer(cfg, index, vocab, names=()):
    """The tokenizer of a run.

    vocab: text from a checkpoint, or None; then from --vocab, or else trained by rank 0 on the
    first captions of the index and on (class) names, into out/vocab.json. UserError if --vocab is
    not the checkpoint's, and if it has more ids than --vocab-size.
    """
    if vocab is not None:
        tokenizer = Tokenizer.loads(vocab)
        if cfg.vocab and Tokenizer.load(cfg.vocab).merges != tokenizer.merges:
            raise UserError(f"--vocab {cfg.vocab} is not the vocabulary of the checkpoint, whose "
                            "ids mean other words: leave it out")
        return tokenizer
    path = cfg.vocab
    if not path:
        path = os.path.join(cfg.out, "vocab.json")
        common.on_main_process(functools.partial(train_tokenizer, cfg, index, names, path))
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > cfg.vocab_size:
        raise UserError(f"--vocab {path} has {tokenizer.vocab_size} ids, more than --vocab-size "
                        f"{cfg.vocab_size}: give --vocab-size {tokenizer.vocab_size}")
    return tokenizer


def train_tokenizer(cfg, index, names, path):
    texts = first_captions(index) if index is not None else []
    Tokenizer.train([*texts, *names], cfg.vocab_size).save(path)


# ---- toy data: small scenes of simple objects, rich enough to show each method at work ----

TOY_VERSION = 2  # raise it with any change below: folder names depend on it
SIDE = 64  # of the images, in pixels
MARGIN = 4  # around the objects
COLORS = {"red": (225, 30, 35), "pink": (255, 125, 190), "yellow": (245, 220, 30),
          "green": (35, 165, 50), "cyan": (50, 210, 225), "blue": (40, 70, 235),
          "purple": (145, 45, 190), "white": (250, 250, 250)}  # each goes with "a", not "an"
BACKGROUNDS = {"grey": (112, 112, 114), "brown": (112, 84, 60), "dark": (52, 52, 58),
               "khaki": (92, 98, 60)}  # muted: unlike the color of any object
ANGLES = np.linspace(0, 2 * np.pi, 60, endpoint=False)
CIRCLE = (0.5 + 0.5 * np.sin(ANGLES), 0.5 - 0.5 * np.cos(ANGLES))
SPIKES = np.array([0.52, 0.22] * 5)  # radii
SHAPES = {  # x, y of the corners of polygons in the unit square
    "circle": CIRCLE,
    "square": ((0.06, 0.94, 0.94, 0.06), (0.06, 0.06, 0.94, 0.94)),
    "triangle": ((0.5, 1, 0), (0.03, 0.97, 0.97)),
    "star": (0.5 + SPIKES * np.sin(ANGLES[::6]), 0.52 - SPIKES * np.cos(ANGLES[::6])),
    "bar": ((0, 1, 1, 0), (0.34, 0.34, 0.66, 0.66)),
    "cross": ((0.33, 0.67, 0.67, 1, 1, 0.67, 0.67, 0.33, 0.33, 0, 0, 0.33),
              (0, 0, 0.33, 0.33, 0.67, 0.67, 1, 1, 0.67, 0.67, 0.33, 0.33)),
    "ring": CIRCLE,
    "pillar": ((0.34, 0.66, 0.66, 0.34), (0, 0, 1, 1)),
}
SHAPE_NAMES = list(SHAPES)  # place + 1 is the class in a mask
PAIRS = list(itertools.product(COLORS, SHAPES))  # place is the class of an image
# each color and each shape once; never in training
UNSEEN = [(color, SHAPE_NAMES[(3 * i + 2) % 8]) for i, color in enumerate(COLORS)]
SEEN = [pair for pair in PAIRS if pair not in UNSEEN]
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
PLACES = (("at the top left", "at the top", "at the top right"),
          ("on the left", "in the middle", "on the right"),
          ("at the bottom left", "at the bottom", "at the bottom right"))
TEMPLATES = ("{c}", "a {c}", "a picture of a {c}", "one {c}", "a small {c}", "a large {c}")
CHATTER = ("The weather was fine.", "Thank you for reading.", "We had coffee first.",
           "My brother likes music.", "The train was late.")
BOILERPLATE = ("IMG_{:04d}.jpg", "DSC{:05d}", "image {}x480", "click to enlarge",
               "photo {} of 9999", "all rights reserved")
TOY_PARTS = ("pairs", "labels", "docs")
TOY_STREAMS = ("pairs/train", "pairs/test", "labels/train", "labels/test", "docs/train",
               "docs/test", "noise")  # each draws numbers of its own


@dataclasses.dataclass
class Thing:
    """An object of a scene. x, y, w, h: its tight box, in pixels."""
    color: str
    shape: str
    size: str
    texture: str
    x: int
    y: int
    w: int
    h: int

    @property
    def name(self):
        return f"{self.color} {self.shape}"

    @property
    def full_name(self):
        if self.texture == "plain":
            return f"{self.size} {self.name}"
        return f"{self.size} {self.texture} {self.name}"

    @property
    def center(self):
        return self.x + self.w / 2, self.y + self.h / 2

    @property
    def place(self):
        """" at the top left", with a blank before it; "" where no place is clear."""
        column, row = map(third, self.center)
        if column is None or row is None:
            return ""
        return f" {PLACES[row][column]}"


@dataclasses.dataclass
class Scene:
    things: list  # the last one lies on top
    background: str
    image: Image.Image  # RGB
    mask: Image.Image  # 0 background, 1 + number of the shape


def third(x):
    """0, 1, 2: before, in or behind the middle of the image; None near a border of two.

    The middle is narrow: the centers of the largest objects lie in 23 ... 41.
    """
    if x <= 26:
        return 0
    if 28 <= x <= 36:
        return 1
    if x >= 38:
        return 2
    return None


@functools.lru_cache(maxsize=None)  # 384 combinations, each drawn once per process
def stencil(shape, side, texture):
    """Coverage of a shape, coverage of its darker texture, and its hard mask (side, side).

    Drawn 8 times larger and reduced, so that edges are smooth.
    """
    big = Image.new("L", (8 * side, 8 * side))
    draw = ImageDraw.Draw(big)
    draw.polygon([(8 * side * x, 8 * side * y) for x, y in zip(*SHAPES[shape])], fill=255)
    if shape == "ring":
        draw.ellipse([2 * side, 2 * side, 6 * side, 6 * side], fill=0)
    y, x = np.mgrid[:8 * side, :8 * side] / 8 - side / 2  # in pixels, from the middle of the shape
    if texture == "striped":
        ink = (x + y) % 5 < 2.3
    elif texture == "dotted":
        ink = np.hypot((x + 2) % 4 - 2, (y + 2) % 4 - 2) < 1.3
    else:
        ink = np.zeros_like(x)
    dark = ImageChops.multiply(big, Image.fromarray((255 * ink).astype(np.uint8)))
    cover = big.reduce(8)
    return cover, dark.reduce(8), Image.fromarray(np.uint8(255) * (np.asarray(cover) > 127))


def layout(rng, n):
    """x, y, side (n,) of n squares that stay apart, centered near nine places.

    Crowded layouts rarely fit, so 64 are drawn at a time; and small squares prevail in them.
    """
    small = (18, 22)
    large = (27, 31)
    if n == 1:
        small = (22, 24)
        large = (33, 39)
    while True:
        is_large = rng.integers(0, 2, (64, n))
        sides = np.where(is_large, rng.integers(*large, (64, n)), rng.integers(*small, (64, n)))
        corners = rng.choice((16, 32, 48), (2, 64, n)) - sides // 2  # x, y
        corners = corners.clip(MARGIN, SIDE - MARGIN - sides)
        ends = corners + sides
        # [try, i, j]: square i begins right of the end of square j, or below it
        is_beyond = (corners[..., :, None] > ends[..., None, :]).any(0)
        is_apart = is_beyond | is_beyond.swapaxes(1, 2) | np.eye(n, dtype=bool)
        fits = is_apart.all((1, 2))
        if fits.any():
            k = int(fits.argmax())
            return corners[0, k].tolist(), corners[1, k].tolist(), sides[k].tolist()


def background(rng, name):
    """A gradient, blobs, noise or bars around a color -> RGB image."""
    shape = [(2, 2), (5, 5), (32, 32), (1, 9), (9, 1)][rng.integers(5)]
    shade = rng.uniform(-14, 14, (*shape, 1)) + rng.uniform(-6, 6, (*shape, 3))
    grid = (np.array(BACKGROUNDS[name]) + shade).clip(0, 255).astype(np.uint8)
    resample = Image.NEAREST if 1 in shape else Image.BICUBIC
    return Image.fromarray(grid).resize((SIDE, SIDE), resample)


def make_scene(rng, n_objects=None, pair=None):
    """A Scene of objects whose (color, shape) differ and are SEEN; or of one of the given pair."""
    if pair is not None:
        n_objects = 1
    elif n_objects is None:
        n_objects = 1 if rng.random() < 0.75 else int(rng.integers(2, 5))
    pool = SEEN if pair is None else [pair]
    pairs = [pool[i] for i in rng.permutation(len(pool))[:n_objects]]  # all different
    squares = zip(*layout(rng, n_objects))  # x, y, side
    name = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    image = background(rng, name)
    mask = Image.new("L", (SIDE, SIDE))
    things = [paint(rng, image, mask, *pair, *square) for pair, square in zip(pairs, squares)]
    return Scene(things, name, image, mask)


def paint(rng, image, mask, color, shape, x, y, side):
    """Draw an object into a square of image and mask. -> Thing"""
    texture = ("plain", "plain", "plain", "plain", "striped", "dotted")[rng.integers(6)]
    cover, dark, hard = stencil(shape, side, texture)
    rgb = (np.array(COLORS[color]) * rng.uniform(0.9, 1.05)).clip(0, 255)
    image.paste(tuple(rgb.astype(int).tolist()), (x, y), cover)
    image.paste(tuple((0.7 * rgb).astype(int).tolist()), (x, y), dark)
    mask.paste(1 + SHAPE_NAMES.index(shape), (x, y), hard)
    left, top, right, bottom = hard.getbbox()
    size = "large" if side > 24 else "small"
    return Thing(color, shape, size, texture, x + left, y + top, right - left, bottom - top)


def relation(a, b):
    """How a stands to b; None where no direction clearly dominates. That of b to a is opposite."""
    dx = a.center[0] - b.center[0]
    dy = a.center[1] - b.center[1]
    for name, (ux, uy) in RELATIONS.items():
        if dx * ux + dy * uy > 1.5 * abs(dx * uy + dy * ux):
            return name
    return None


def pick(rng, options):
    return options[int(rng.integers(len(options)))]


def toy_captions(scene, rng):
    """Four different true captions, two brief, two detailed, of at most 24 words.

    Of several objects they may name only some.
    """
    things = [scene.things[i] for i in rng.permutation(len(scene.things))]
    if len(things) == 1:
        brief, detailed = captions_of_one(things[0], scene.background)
    else:
        brief, detailed = captions_of_several(things, scene.background, rng)
    # some are equal where a plain object stands at no clear place
    detailed = [caption for caption in dict.fromkeys(detailed) if caption not in brief]
    captions = []
    for options in (brief, detailed):
        captions += [options[i] for i in sorted(rng.permutation(len(options))[:2])]
    return captions


def captions_of_one(a, background):
    ground = f"on a {background} background"
    brief = [f"a {a.name}", f"a picture of a {a.name}", f"one {a.name}"]
    detailed = [f"a {a.size} {a.name}", f"one {a.name}{a.place}", f"a {a.name} {ground}",
                f"a {a.full_name}{a.place}", f"a {a.full_name}{a.place}, {ground}"]
    return brief, detailed


def captions_of_several(things, background, rng):
    a, b = things[:2]
    for pair in itertools.permutations(things, 2):
        if relation(*pair):
            a, b = pair
            break
    names = [f"a {thing.name}" for thing in things]
    some = " and ".join(names[:rng.integers(2, len(names) + 1)])
    count = ("two", "three", "four")[len(names) - 2]
    if relation(b, a):
        both = f"a {a.full_name}{a.place} and a {b.size} {b.name} {relation(b, a)} it"
    else:
        both = f"a {a.full_name}{a.place} and a {b.full_name}{b.place}"
    how = relation(a, b)
    if how is None:
        how = "with"
    brief = [f"a {a.name}", f"a {b.name} and a {a.name}", f"a picture of {some}"]
    detailed = [f"{count} objects: {', '.join(names[:-1])} and {names[-1]}",
                f"a {a.name} {how} a {b.name}",
                both,
                f"{both}, on a {background} background"]
    return brief, detailed


def toy_questions(scene, rng):
    """[{"question", "answer"}]: one for yes or no, one for a number, one other.

    Each has exactly one right answer.
    """
    things = scene.things
    is_yes = rng.random() < 0.5
    order = rng.permutation(len(things))
    a = things[order[0]]
    b = things[order[-1]]  # a itself if there is no other
    questions = [
        (pick(rng, yes_no_questions(things, a, b, is_yes, rng)), "yes" if is_yes else "no"),
        pick(rng, number_questions(things, a)),
        pick(rng, other_questions(things, a)),
    ]
    return [{"question": question, "answer": answer} for question, answer in questions]


def yes_no_questions(things, a, b, is_yes, rng):
    present = [(thing.color, thing.shape) for thing in things]
    half_right = []  # absent, but with the color or the shape of a
    for color, shape in SEEN:
        if (color == a.color or shape == a.shape) and (color, shape) not in present:
            half_right.append(f"{color} {shape}")
    name = a.name if is_yes else pick(rng, half_right)
    other_size = {"large": "small", "small": "large"}[a.size]
    size = a.size if is_yes else other_size
    questions = [f"is there a {name}?", f"is the {a.name} {size}?"]
    if relation(a, b):
        how = relation(a, b) if is_yes else relation(b, a)
        questions += 2 * [f"is the {a.name} {how} the {b.name}?"]  # as likely as both others
    return questions


def number_questions(things, a):
    n_of_color = sum(thing.color == a.color for thing in things)
    return [("how many objects are there?", str(len(things))),
            (f"how many {a.color} objects are there?", str(n_of_color))]


def other_questions(things, a):
    questions = [(f"what size is the {a.name}?", a.size),
                 (f"what pattern has the {a.name}?", a.texture)]
    if sum(thing.shape == a.shape for thing in things) == 1:
        questions.append((f"what color is the {a.shape}?", a.color))
    if sum(thing.color == a.color for thing in things) == 1:
        questions.append((f"what shape is the {a.color} object?", a.shape))
    for name, (ux, uy) in RELATIONS.items():
        on_that_side = []
        for thing in things:
            dx = thing.center[0] - a.center[0]
            dy = thing.center[1] - a.center[1]
            if dx * ux + dy * uy > 0:
                on_that_side.append(thing)
        # only if nothing else stands there, not even askew
        if len(on_that_side) == 1 and relation(on_that_side[0], a) == name:
            questions += 2 * [(f"what is {name} the {a.name}?", on_that_side[0].name)]
    return questions


def toy_document(rng, key):
    """The files of a document as MMC4 has them, {suffix: value}: 2 or 3 pictures, a sentence about
    each, perhaps a second, among chatter and remarks on the first."""
    texts = []
    info = []
    images = {}
    first = None  # object of the first picture
    for i in range(rng.integers(2, 4)):
        scene = make_scene(rng)
        about, more = rng.permutation(toy_captions(scene, rng)).tolist()[:2]
        if first is not None and rng.random() < 0.5:
            aside = f"The {first.name} in the first picture was {first.size}."
        else:
            aside = pick(rng, CHATTER)
        if first is None:
            first = scene.things[0]
        place_of_aside = rng.random()
        place_of_more = rng.random()
        if place_of_aside < 0.25:
            texts.append(aside)
        info.append({"image_name": f"{key}.{i}.jpg", "matched_text_index": len(texts),
                     "matched_sim": rng.integers(2300, 4000) / 1e4})
        texts.append(f"{about.capitalize()}.")
        if place_of_more > 0.5:
            texts.append(f"We can see {more}.")
        if place_of_aside > 0.75:
            texts.append(aside)
        images[f"{i}.jpg"] = scene.image
    return {"json": {"text_list": texts, "image_info": info}, **images}


def toy_record(stream, number, seed=0, noise=0.0, scenes=20_000):
    """{suffix: image or what JSON can hold}, a function of the arguments alone."""
    part, split = stream.split("/")
    rng = common.rng(Stream.TOY, seed, TOY_STREAMS.index(stream), number)
    if part == "docs":
        return toy_document(rng, f"{number:08d}")
    if part == "labels" and split == "train":
        scene = make_scene(rng, n_objects=1)
    elif part == "labels":
        scene = make_scene(rng, pair=PAIRS[number % len(PAIRS)])
    else:
        scene = make_scene(rng)
    record = {"jpg": scene.image}
    if len(scene.things) == 1:
        thing = scene.things[0]
        record["cls"] = PAIRS.index((thing.color, thing.shape))
    if part == "labels" and split == "test":
        return record
    captions = toy_captions(scene, rng)
    questions = toy_questions(scene, rng)
    if split == "train":
        captions = noisy_captions(captions, number, seed, noise, scenes)
    boxes = []
    for thing in scene.things:
        boxes.append({"x": thing.x, "y": thing.y, "w": thing.w, "h": thing.h,
                      "text": f"a {thing.full_name}", "name": thing.name})
    record["json"] = {"caption": captions, "boxes": boxes, "qa": questions}
    record["seg.png"] = scene.mask
    return record


def noisy_captions(captions, number, seed, noise, scenes):
    """The captions, or with probability `noise` those of another scene or boilerplate."""
    rng = common.rng(Stream.TOY, seed, TOY_STREAMS.index("noise"), number)
    if rng.random() >= noise:
        return captions
    if rng.random() < 0.5:
        other = (number + int(rng.integers(1, max(scenes, 2)))) % scenes
        return toy_record("pairs/train", other, seed)["json"]["caption"]
    return [pick(rng, BOILERPLATE).format(rng.integers(100, 10_000))]


def add_file(tar, name, raw):
    """Add bytes to a tar under a name; times and owners are 0, so that archives repeat."""
    info = tarfile.TarInfo(name)
    info.size = len(raw)
    tar.addfile(info, io.BytesIO(raw))


def write_toy_shard(path, stream, numbers, **options):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in numbers:
            for suffix, value in toy_record(stream, number, **options).items():
                if isinstance(value, Image.Image):
                    file = io.BytesIO()
                    value.save(file, "PNG" if suffix == "seg.png" else "JPEG", quality=90)
                    raw = file.getvalue()
                else:
                    raw = json.dumps(value).encode()
                add_file(tar, f"{number:08d}.{suffix}", raw)


def make_toy_data(root="runs", scenes=20_000, documents=4_000, seed=0, noise=0.0,
                  parts=("pairs", "labels")):
    """The folder of the toy data that the arguments describe, with a sub-folder for each part.

    A part that is missing is made, and appears when it is complete. noise: share of the training
    captions that are wrong.
    """
    what = json.dumps([TOY_VERSION, int(scenes), int(documents), int(seed), float(noise)])
    folder = os.path.join(root, f"toy-{hashlib.sha256(what.encode()).hexdigest()[:8]}")
    sizes = {  # samples in a shard, for training, held out
        "pairs": (1000, scenes, 500),
        "labels": (1000, 2000, 16 * len(PAIRS)),
        "docs": (500, documents, 200),
    }
    write = functools.partial(write_toy_shard, seed=seed, noise=noise, scenes=scenes)
    for part in parts:
        if os.path.isdir(f"{folder}/{part}"):
            continue
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{part}-", dir=folder) as tmp:
            new = f"{tmp}/{part}"  # one level down: only this user may enter tmp itself
            os.mkdir(new)
            write_toy_part(new, part, *sizes[part], write)
            if not os.path.isdir(f"{folder}/{part}"):  # else another process was faster
                os.rename(new, f"{folder}/{part}")
    return folder


def write_toy_part(folder, part, per_shard, n_train, n_test, write):
    paths = [f"{folder}/test-00000.tar"]
    streams = [f"{part}/test"]
    numbers = [range(n_test)]
    for k, start in enumerate(range(0, n_train, per_shard)):
        paths.append(f"{folder}/train-{k:05d}.tar")
        streams.append(f"{part}/train")
        numbers.append(range(start, min(start + per_shard, n_train)))
    list(parallel_map(write, paths, streams, numbers, label=f"making {part}", min_parallel=4))
    if part == "labels":
        write_lines(f"{folder}/classes.txt", [" ".join(pair) for pair in PAIRS])
        write_lines(f"{folder}/unseen.txt", [" ".join(pair) for pair in UNSEEN])
        write_lines(f"{folder}/zeroshot_classification_templates.txt", TEMPLATES)


def write_lines(path, lines):
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(f"{line}\n" for line in lines)


def use_toy_data(cfg, **fields):
    """cfg, with the toy data where it names no data of its own.

    fields: the part of the toy data that each field of cfg takes; data="pairs" if none is given.
    """
    if any(getattr(cfg, name) for name in common.training_fields(cfg)):
        return cfg
    if not fields:
        fields = {"data": "pairs"}
    parts = dict.fromkeys(["pairs", "labels", *fields.values()])
    folder = common.main_process_first(functools.partial(make_toy_data, parts=tuple(parts)))
    print0(f"demo on the toy data in {folder}; --{' --'.join(fields)} takes your shards")
    paths = {name: [f"{folder}/{part}"] for name, part in fields.items()}
    val = cfg.val
    if not val:
        val = [f"{folder}/pairs", f"{folder}/labels"]
    return dataclasses.replace(cfg, **paths, val=val)


# ---- converters ----
#
# A converter is a function of a Job that yields (name of an image, what is said about it) for each
# record; annotated_images puts together what is said about an image. Documents come as samples.

NOT_FOUND = "image not found, or found in several places"


class BadRecord(Exception):
    """A record of a source file that cannot be used. The argument is what is wrong with it."""


class Job:
    """What a converter reads, and what it has left out."""

    def __init__(self, sources, images, split, annotations):
        self.sources = sources  # paths of files, or of folders for ade20k and folder
        self.split = split
        self.annotations = annotations  # vqa: paths of the files of answers
        self.classes = []  # their names in order, filled by the converter
        self.counts = collections.Counter()  # of the reasons why something was left out
        self.first = {}  # place for each reason
        self.images = Images(images, self.drop)

    def drop(self, reason, place):
        self.counts[reason] += 1
        self.first.setdefault(reason, printable(place)[:300])

    @contextlib.contextmanager
    def record(self, what, row):
        """Around the use of a record: one that cannot be used is dropped, and the next follows."""
        try:
            yield
        except BadRecord as reason:
            place = row
            if isinstance(row, dict):
                names = ("id", "question_id", "image_id", "image_name", "filename")
                place = ", ".join(f"{name} {row[name]}" for name in names if name in row)
            self.drop(f"{what} with {reason}", place)


def suffix_of(name):
    return os.path.splitext(name)[1][1:].lower()


class Images:
    """The images below a folder.

    files: {place below the folder: path}, in which an image and the links to it have one path.
    """

    def __init__(self, folder, drop):
        self.files = {}
        self.paths_of = collections.defaultdict(set)  # of the last part of a place
        paths = []
        for root, folders, names in os.walk(folder):  # which follows no link to a folder
            for name in folders:
                path = os.path.join(root, name)
                if is_hidden(name):
                    drop("hidden file or folder", path)
                elif os.path.islink(path):
                    drop("link to a folder", path)
            for name in names:
                path = os.path.join(root, name)
                if is_hidden(name):
                    drop("hidden file or folder", path)
                elif suffix_of(name) not in IMAGES:
                    drop(f"file that is no image: .{suffix_of(name)}", path)
                else:
                    paths.append(path)
            folders[:] = [name for name in folders if not is_hidden(name)]
        path_of = {}  # of a real path
        for path in sorted(paths, key=lambda path: (os.path.islink(path), path)):
            place = os.path.relpath(path, folder)
            self.files[place] = path_of.setdefault(os.path.realpath(path), path)
            self.paths_of[os.path.basename(path)].add(self.files[place])

    def find(self, name):
        """Path of the image that a record calls `name`; None if unknown.

        As much of the end of the name is compared as is known below the folder: ../../x finds only
        an x inside. If of several parts the last alone is known, it must be that of one image.
        """
        parts = name.replace("\\", "/").split("/")
        for i in range(max(1, len(parts) - 1)):
            place = "/".join(parts[i:])
            if place in self.files:
                return self.files[place]
        paths = list(self.paths_of.get(parts[-1], []))
        return paths[0] if len(paths) == 1 else None


def read_bytes(path):
    """The bytes of an image or mask. Raises BadRecord, for a dead link for example."""
    try:
        with open(path, "rb") as f:
            return f.read()
    except OSError as error:
        raise BadRecord(f"a file that cannot be read ({error.strerror})") from None


def read_lists(path, *names):
    """A JSON file with these lists."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(value, dict) or not all(isinstance(value.get(n), list) for n in names):
        raise UserError(f"{path} does not have the lists {', '.join(names)}: is --from right?")
    return value


def field(record, name, kind, table=None):
    """record[name], of this kind and not blank, or the table's entry for it. Raises BadRecord."""
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind) or not str(value).strip():
        raise BadRecord(f"no usable {name}")
    if table is None:
        return value
    if value not in table:
        raise BadRecord(f"an unknown {name}")
    return table[value]


def image_names(job, rows):
    """{image id: file name} of a file of COCO's form."""
    names = {}
    for row in rows:
        name = "file_name"
        if isinstance(row, dict) and name not in row and "coco_url" in row:
            name = "coco_url"  # LVIS; its end is the file's name
        with job.record("image", row):
            names[field(row, "id", (int, str))] = field(row, name, str)
    return names


def from_captions(job):
    """COCO's captions, or Karpathy's split of them."""
    for path in job.sources:
        value = read_lists(path, "images")
        if "annotations" not in value:
            yield from karpathy_captions(job, value["images"])
            continue
        names = image_names(job, value["images"])
        for row in read_lists(path, "annotations")["annotations"]:
            with job.record("annotation", row):
                name = field(row, "image_id", (int, str), names)
                caption = field(row, "caption", str).strip()
                yield name, {"caption": [caption], "image_id": row["image_id"]}


def karpathy_captions(job, rows):
    """The rows of --split; restval belongs to train."""
    for row in rows:
        with job.record("image", row):
            name = field(row, "filename", str)
            if isinstance(row.get("filepath"), str):  # Flickr30k's rows have none
                name = f"{row['filepath']}/{name}"
            if field(row, "split", str).replace("restval", "train") != job.split:
                continue
            for sentence in field(row, "sentences", list):
                with job.record("sentence", row):
                    yield name, {"caption": [field(sentence, "raw", str).strip()]}


def from_instances(job):
    """COCO's boxes, crowds too. Classes are the categories' names, by their ids."""
    for path in job.sources:
        value = read_lists(path, "images", "annotations", "categories")
        classes = {}
        for row in value["categories"]:
            with job.record("category", row):
                classes[field(row, "id", int)] = clean_name(field(row, "name", str))
        for category_id, name in sorted(classes.items()):
            if list(classes.values()).count(name) > 1:
                job.drop("categories of one name, which are one class", f"{category_id} {name}")
            if name not in job.classes:
                job.classes.append(name)

        names = image_names(job, value["images"])
        for image_id, name in names.items():  # images without an object, too
            yield name, {"boxes": [], "image_id": image_id}
        for row in value["annotations"]:
            with job.record("annotation", row):
                name = field(row, "image_id", (int, str), names)
                yield name, {"boxes": [coco_box(row, classes)]}


def coco_box(row, classes):
    """A box, in pixels of the image as stored."""
    try:
        x, y, w, h = [float(side) for side in field(row, "bbox", list)]
    except (TypeError, ValueError, OverflowError):
        raise BadRecord("a bbox that is not four numbers") from None
    if not (w > 0 and h > 0 and math.isfinite(x + y + w + h)):
        raise BadRecord("a bbox without width or height")
    text = field(row, "category_id", int, classes)
    area = row.get("area")
    if not isinstance(area, (int, float)):
        area = w * h
    is_crowd = int(row.get("iscrowd") in (1, "1"))
    return {"x": x, "y": y, "w": w, "h": h, "text": text, "area": area, "iscrowd": is_crowd}


def from_vqa(job):
    """VQA v2: files of questions, and --annotations with ten answers to each.

    The most common of them becomes the answer; all are kept.
    """
    answers = {}
    for path in job.annotations:
        for row in read_lists(path, "annotations")["annotations"]:
            with job.record("annotation", row):
                given = [field(answer, "answer", str) for answer in field(row, "answers", list)]
                if not given:
                    raise BadRecord("no usable answers")
                answers[field(row, "question_id", int)] = {
                    "answer": collections.Counter(given).most_common(1)[0][0],
                    "answers": given,
                    "answer_type": row.get("answer_type"),
                }
    for path in job.sources:
        value = read_lists(path, "questions")
        for row in value["questions"]:
            with job.record("question", row):
                qa = {"question": field(row, "question", str),
                      **field(row, "question_id", int, answers),
                      "question_id": row["question_id"]}
                image = field(row, "image_id", int)
                yield f"COCO_{value.get('data_subtype')}_{image:012d}.jpg", {"qa": [qa]}


def from_ade20k(job):
    """ADE20K of SceneParse150: folders of masks, in which 0 is no class."""
    for folder in job.sources:
        if not job.classes:
            job.classes = ade20k_classes(folder)
        for path in sorted(glob.glob(f"{glob.escape(folder)}/*.png")):
            image = os.path.basename(path).replace(".png", ".jpg")
            yield image, {"seg.png": path}


def ade20k_classes(folder):
    """Names of the classes, from objectInfo150 beside the masks or up to two folders above."""
    for above, suffix in itertools.product((".", "..", "../.."), ("csv", "txt")):
        path = os.path.join(folder, above, f"objectInfo150.{suffix}")
        if os.path.exists(path):
            delimiter = "," if suffix == "csv" else "\t"
            rows = csv.DictReader(split_lines(read_text(path)), delimiter=delimiter)
            # the first of several names: "building;edifice" or "building, edifice"
            return ["unlabeled", *[re.split("[;,]", row["Name"])[0].strip() for row in rows]]
    return []


def from_folder(job):
    """A folder for each class; a class's number is its place among the sorted names.

    The images are shuffled (ours): batches from shards of one class each would hold few classes.
    """
    place_of = {}  # of each path, without further links to it
    for place, path in job.images.files.items():
        if "/" in place:
            place_of.setdefault(path, place)
        else:
            job.drop("image outside the class folders", place)
    places = sorted(place_of.values())
    folders = sorted({place.split("/")[0] for place in places})
    job.classes = [clean_name(name) for name in folders]
    number_of = {folder: number for number, folder in enumerate(folders)}
    for i in np.random.default_rng(0).permutation(len(places)):
        yield places[i], {"cls": number_of[places[i].split("/")[0]]}


def from_mmc4(job):
    """(key, members) of MMC4's documents, with the images that are there."""
    count = 0
    for path in job.sources:
        try:
            with open(path, "rb") as f:
                lines = f.readlines()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from None
        for i, line in enumerate(lines, 1):
            with job.record("line", f"{path}:{i}"):
                key = f"{count:09d}"
                members = mmc4_document(job, line, key)
                count += 1
                yield key, members


def mmc4_document(job, line, key):
    """-> {suffix: bytes}"""
    try:
        document = json.loads(decode_text(line))
    except (ValueError, RecursionError):
        raise BadRecord("no JSON in UTF-8") from None
    texts = field(document, "text_list", list)
    info = []
    images = {}
    for entry in field(document, "image_info", list):
        with job.record("entry of image_info", entry):
            path = job.images.find(field(entry, "image_name", str))
            if path is None:
                raise BadRecord("an " + NOT_FOUND)
            if field(entry, "matched_text_index", int) not in range(len(texts)):
                raise BadRecord("a matched_text_index outside text_list")
            suffix = f"{len(images)}.{suffix_of(path)}"
            images[suffix] = read_bytes(path)
            info.append({**entry, "image_name": f"{key}.{suffix}"})
    if not images:
        raise BadRecord("no image that can be used")
    record = {"url": document.get("url"), "text_list": texts, "image_info": info}
    return {"json": json.dumps(record).encode(), **images}


CONVERTERS = {
    "captions": from_captions,
    "instances": from_instances,
    "vqa": from_vqa,
    "ade20k": from_ade20k,
    "folder": from_folder,
    "mmc4": from_mmc4,
}
SPLITS = ("train", "val", "test")


def convert(layout, sources, images, out, per_shard=1000, split="train", annotations=()):
    """Files of another layout and a folder of their images -> <split>-00000.tar, ... in `out`.

    With classes.txt where there are classes. Images are copied as they are. Prints what was left
    out and why. Raises UserError for files of another layout, and if nothing is left.
    """
    if layout == "folder":
        if len(sources) > 1:
            raise UserError(f"--from folder takes one folder, not {len(sources)}")
        images = sources[0]
    for path in sources:
        if not os.path.exists(path):
            raise UserError(f"{path} does not exist: give the file or folder to convert")
    if images is None:
        raise UserError(f"--from {layout} needs --images FOLDER: it holds the images, in any "
                        "sub-folders")
    if not os.path.isdir(images):
        raise UserError(f"{images} is no folder: it holds the images, in any sub-folders")
    if layout == "vqa" and not annotations:
        raise UserError("--from vqa needs --annotations FILE: it holds the answers")

    require_new(out, split)
    job = Job(sources, images, split, annotations)
    samples = CONVERTERS[layout](job)
    if layout != "mmc4":
        samples = annotated_images(job, list(samples))
    check_same_classes(job.classes, out)

    def shard_of(sample):
        return int(sample[0]) // per_shard  # keys are numbers

    shards = itertools.groupby(samples, shard_of)
    count = write_shards((samples for _, samples in shards), out, split)
    print(f"{printable(out)}: {count} samples, {len(job.classes)} classes")
    for reason, n in job.counts.most_common():
        print(f"{n:8} dropped: {reason} (first: {job.first[reason]})")
    if not count:
        raise UserError(f"nothing of {sources[0]} could be converted: is --from {layout} right?")
    if job.classes:
        write_lines(f"{out}/classes.txt", job.classes)


def annotated_images(job, statements):
    """(key, members) of each image, with all that is said about it."""
    paths = {}  # of names
    records = collections.defaultdict(dict)  # of paths
    for name, fields in statements:
        if name not in paths:
            paths[name] = job.images.find(name)
            if paths[name] is None:
                job.drop(NOT_FOUND, name)
        if paths[name] is None:
            continue
        record = records[paths[name]]
        for key, value in fields.items():
            record[key] = record.get(key, []) + value if isinstance(value, list) else value

    count = 0
    for path, record in records.items():
        with job.record("image", path):
            members = {suffix_of(path): read_bytes(path)}
            if "seg.png" in record:
                members["seg.png"] = read_bytes(record.pop("seg.png"))
            if "cls" in record:
                members["cls"] = str(record.pop("cls")).encode()
            if record:
                members["json"] = json.dumps(record).encode()
            yield f"{count:09d}", members
            count += 1


def clean_name(text):
    """The name of a class as a line of classes.txt has it."""
    return " ".join(text.split()).encode("utf-8", "replace").decode()


def check_same_classes(classes, out):
    """Their numbers are lines of classes.txt, so all parts of a data set share one list."""
    path = f"{out}/classes.txt"
    if not classes or not os.path.exists(path):
        return
    known = read_lines_near([path], "classes.txt")
    if known != classes:
        raise UserError(f"{out}/classes.txt lists other classes ({len(known)}, here "
                        f"{len(classes)}): give another folder")


def require_new(out, split):
    if glob.glob(f"{glob.escape(out)}/{split}-*.tar"):
        raise UserError(
            f"--out {out} already holds {split}-*.tar: give another folder, or remove them first")


def write_shards(shards, out, split):
    """[[(key, {suffix: bytes})]] -> <split>-00000.tar, ... in `out`. Returns the number of samples.

    They appear there when all are written, so that a run cut short leaves none that could pass for
    the whole. Raises UserError where writing fails.
    """
    count = 0
    try:
        os.makedirs(out, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=out) as folder:
            for number, samples in enumerate(shards):
                path = f"{folder}/{split}-{number:05d}.tar"
                # PAX is USTAR but for names that are too long for it
                with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
                    for key, members in samples:
                        for suffix, raw in members.items():
                            add_file(tar, f"{key}.{suffix}", raw)
                        count += 1
            for name in os.listdir(folder):
                os.replace(f"{folder}/{name}", f"{out}/{name}")
    except OSError as error:
        raise UserError(f"stopped while writing --out {out} ({error})") from None
    return count


# ---- ALIGN's filters (paper s3) ----

WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")  # ours: the paper does not say how a text is cut

RULES = {  # what goes, by their names
    "I2": "images whose shorter side is at most --min-side pixels",
    "I3": "images whose sides are in a ratio of --max-ratio or more",
    "I4": "images with more than --max-texts texts",
    "I5": "images within --distance bits of one of --against, by difference hash (ours)",
    "T1": "texts of more than --max-images images",
    "T2": "texts with a token outside the --most-frequent unigrams and bigrams",
    "T3": "texts of less than --min-words or more than --max-words unigrams",
    "left": "samples without a text left",
}


@dataclasses.dataclass
class Thresholds:
    """Those of the paper, but for `distance`, of 64 bits."""
    min_side: int = 200
    max_ratio: float = 3.0
    max_texts: int = 1000
    distance: int = 4  # ours
    max_images: int = 10
    most_frequent: int = 100_000_000
    min_words: int = 3
    max_words: int = 20


class Measured(typing.NamedTuple):
    """What the rules need of a sample."""
    texts: list
    sides: list  # in pixels, of the original where img2dataset's fields give them
    digest: bytes  # of the image's file: which samples show one image
    hash: np.uint64


def difference_hash(image):
    """64 bits: is a pixel of the gray 9 x 8 image brighter than its right neighbor?

    Copies that are resized, compressed anew or slightly noisy differ in few bits.
    """
    # smoother filters than Lanczos take more other images for copies
    gray = np.asarray(image.convert("L").resize((9, 8), Image.LANCZOS))
    return np.packbits(gray[:, :-1] > gray[:, 1:]).view(np.uint64)[0]


def measure(index, first, last, with_texts):
    """Measured, or the reason why it cannot be used, of samples first ... last - 1."""
    results = []
    for i in range(first, last):
        try:
            sample = index[i]
            texts = sample.captions() if with_texts else []
            image_hash = difference_hash(sample.image(min_size=128))
            raw = sample.image_bytes()
            sides = [sample.json.get("original_width"), sample.json.get("original_height")]
            if not all(isinstance(side, int) and side > 0 for side in sides):
                sides = open_image(raw).size
            digest = hashlib.sha256(raw).digest()[:16]
            results.append(Measured(texts, sides, digest, image_hash))
        except Skip as reason:
            results.append(str(reason))
    return results


def measure_all(index, label, with_texts):
    fn = functools.partial(measure, index, with_texts=with_texts)
    starts = index.starts.tolist()
    parts = parallel_map(fn, starts[:-1], starts[1:], label=label, min_parallel=50)
    return list(itertools.chain.from_iterable(parts))


def grams(text):
    """Unigrams and bigrams."""
    words = WORD.findall(text.lower())
    return words + [f"{a} {b}" for a, b in zip(words, words[1:])]


def frequent_grams(texts, most_frequent):
    """The most frequent unigrams and bigrams, equals by alphabet; None if all are."""
    if sum(len(grams(text)) for text in texts) <= most_frequent:  # no table is needed
        return None
    counts = collections.Counter(gram for text in texts for gram in grams(text))
    by_count = heapq.nsmallest(most_frequent, counts, key=lambda gram: (-counts[gram], gram))
    return set(by_count)


def image_rule(measured, limits, evaluation_hashes):
    """The rule for single images that a sample fails, or None."""
    if min(measured.sides) <= limits.min_side:
        return "I2"
    if max(measured.sides) >= limits.max_ratio * min(measured.sides):
        return "I3"
    distances = np.bitwise_count(evaluation_hashes ^ measured.hash)
    if (distances <= limits.distance).any():
        return "I5"
    return None


def text_rule(text, limits, images_of, frequent):
    """The rule that a text fails, or None."""
    if images_of[text] > limits.max_images:
        return "T1"
    if frequent is not None and not frequent.issuperset(grams(text)):
        return "T2"
    if not limits.min_words <= len(WORD.findall(text)) <= limits.max_words:
        return "T3"
    return None


def apply_rules(samples, limits, evaluation_hashes):
    """-> {sample: its texts that pass}, {rule or reason: how often it dropped something}.

    Order (ours): I2, I3, I5 for each sample; I4 and T1 are counted on what is left, T2 on all
    texts. Each sample and text is counted under the first rule that it fails.
    """
    dropped = collections.Counter()
    passed = {}  # the rules for single images
    all_texts = []
    for i, measured in enumerate(samples):
        reason = measured
        if isinstance(measured, Measured):
            reason = image_rule(measured, limits, evaluation_hashes)
            all_texts += measured.texts
        if reason:
            dropped[reason] += 1
        else:
            passed[i] = measured
    pairs = {(measured.digest, text) for measured in passed.values() for text in measured.texts}
    texts_of = collections.Counter(digest for digest, _ in pairs)
    images_of = collections.Counter(text for _, text in pairs)
    frequent = frequent_grams(all_texts, limits.most_frequent)

    kept = {}
    for i, measured in passed.items():
        if texts_of[measured.digest] > limits.max_texts:
            dropped["I4"] += 1
            continue
        rules = {text: text_rule(text, limits, images_of, frequent) for text in measured.texts}
        dropped.update(rule for rule in rules.values() if rule)
        kept[i] = [text for text in measured.texts if rules[text] is None]
        if not kept[i]:
            dropped["left"] += 1
            del kept[i]
    return kept, dropped


def filter_pairs(paths, out, against=(), split="train", **thresholds):
    """Samples that pass ALIGN's rules -> <split>-*.tar in `out`, one for each shard.

    against: shards of evaluation sets, of whose images near copies are dropped. thresholds: fields
    of Thresholds. Prints what each rule dropped. Raises UserError if nothing is left.
    """
    require_new(out, split)
    limits = Thresholds(**thresholds)
    evaluation = []
    if against:
        evaluation = measure_all(Index(against), "hashing", with_texts=False)
    hashes = [m.hash for m in evaluation if isinstance(m, Measured)]
    index = Index(paths)
    samples = measure_all(index, "measuring", with_texts=True)
    kept, dropped = apply_rules(samples, limits, np.array(hashes, np.uint64))

    def shard_of(i):
        return int(np.searchsorted(index.starts, i, side="right"))

    shards = itertools.groupby(kept, shard_of)
    write_shards((kept_samples(index, numbers, kept) for _, numbers in shards), out, split)

    print(f"{limits}; {len(hashes)} of {len(evaluation)} images of --against can be read")
    print(f"{printable(out)}: {len(kept)} of {len(index)} samples kept; dropped:")
    for rule in [*RULES, *sorted(dropped.keys() - RULES.keys())]:
        print(f"{dropped[rule]:8} {rule}: {RULES.get(rule, 'samples')}")
    for line in index.warnings():
        print(printable(line))
    if not kept:
        raise UserError(f"none of {len(index)} samples is left: the report above says by which "
                        "rule; a flag sets each threshold")


def kept_samples(index, numbers, kept):
    """(key, members) of these samples; the record is a new one where some of the texts are gone."""
    for i in numbers:
        sample = index[i]
        if kept[i] != sample.captions():
            record = {**sample.json, "caption": kept[i]}
            record.pop("captions", None)
            sample.members["json"] = json.dumps(record).encode()
        yield sample.key, sample.members


# ---- check ----

def check(paths):
    """Print a line for each bad shard and each bad sample. Returns whether there is any."""
    n_samples = 0
    n_bad = 0
    for n, lines in parallel_map(check_shard, paths, label="checking", min_parallel=8):
        n_samples += n
        n_bad += len(lines)
        for line in lines:
            tqdm.write(printable(line))  # above the bar
    verdict = f"{n_bad:,} wrong" if n_bad else "nothing wrong"
    print(f"{len(paths)} shards, {n_samples:,} samples: {verdict}")
    return n_bad > 0


def check_shard(path):
    """-> number of samples, lines on what is wrong with the shard and with each of them."""
    lines = []
    names = None
    try:
        names = read_class_names([path])
    except UserError as error:
        lines.append(f"{path}: {error}")
    try:
        with tempfile.TemporaryDirectory() as folder:  # one table a shard would fill the cache
            index = Index([path], folder)
    except UserError as error:
        return 0, [*lines, f"{path}: {error}"]
    notes = index.notes.get(index.paths[0], {})
    lines += [f"{path}: {note} ({n})" for note, n in notes.items() if note != HIDDEN]
    for i in range(len(index)):
        try:
            reasons = check_sample(index[i], names)
        except Skip as reason:
            reasons = [str(reason)]
        if reasons:
            lines.append(f"{index.place(i)}: {', '.join(reasons)}")
    return len(index), lines


def check_sample(sample, names):
    """All that training and evaluation would find wrong with a sample, as a list of reasons.

    names: of the classes, or None.
    """
    reasons = []
    for part in (check_images, check_captions, check_classes, check_boxes):
        try:
            reasons += part(sample, names)
        except Skip as reason:
            reasons.append(str(reason))
    return list(dict.fromkeys(reasons))  # one fault may show in several ways


def check_images(sample, names):
    if not sample.is_document():
        sample.image()
        return []
    sample.document(common.rng(Stream.SAMPLE, 0, 0, 0), min_size=1, min_similarity=-math.inf)
    reasons = []
    for entry in sample.json["image_info"]:
        suffix, _, _ = read_entry(entry, len(sample.json["text_list"]))
        if suffix is None:
            reasons.append("malformed entry of image_info")
            continue
        try:
            sample.image(member=suffix)
        except Skip as reason:
            reasons.append(f"{reason} {suffix}")
    return reasons


def check_captions(sample, names):
    others = {"cls", "label", "segments", "boxes", "qa", "seg.png", "text_list"}
    if sample.has_caption() or not others & {*sample.members, *sample.json}:
        sample.captions()
    return []


def check_classes(sample, names):
    numbers = []
    if sample.has_label():
        numbers.append(sample.label())
    if "seg.png" in sample.members:
        numbers.append(sample.mask().max())
    if names is None:
        return []
    return [f"class {n}, but {len(names)} names of classes" for n in numbers if n >= len(names)]


def check_boxes(sample, names):
    records = sample.box_records()
    if not records:  # an image without an object, too
        return []
    width, height = open_image(sample.image_bytes()).size
    bad = sum(read_box(record, width, height) is None for record in records)
    return [f"{bad} of {len(records)} boxes malformed, outside or without a text"] if bad else []


# ---- command line ----

MAKE_HELP = """Write the toy data, which are scenes of simple objects.

pairs: with captions, boxes, masks and questions; labels: with classes, for training with captions
too; docs: in documents. A part that is there is not made again."""

CHECK_HELP = """List bad shards and samples, a line each: file, key, what is wrong. Exit code 1 if
there are any.

Reads everything as training and evaluation do: images, captions, classes, boxes, masks, documents.
Of a folder, the shards of all parts are taken, training and held-out."""

CONVERT_HELP = """Write data of another layout as shards <split>-00000.tar, ... of the folder --out.

  --from captions   FILE.json: COCO's captions; or Karpathy's splits (dataset_coco.json), of which
                    --split is taken, train with restval
  --from instances  FILE.json: COCO's boxes; makes classes.txt
  --from vqa        questions.json, with --annotations answers.json: VQA v2
  --from ade20k     FOLDER of masks: ADE20K (SceneParse150); makes classes.txt from objectInfo150
  --from folder     FOLDER with a folder of images for each class: ImageNet; makes classes.txt
  --from mmc4       FILE.jsonl: documents with text_list and image_info (MMC4, unzipped)

Images (jpg, png, webp) are copied as they are. They are found below --images by as much of the end
of their names as is known there. What cannot be used is left out, and the report says how often,
why, and where first. Keys of the samples are numbers.
"""

FILTER_HELP = """Copy the samples that pass ALIGN's rules (paper s3) to new shards, one for each.

What goes:
""" + "".join(f"  {rule}  {what}\n" for rule, what in RULES.items()) + """
Defaults are the paper's, but for --distance, in bits of 64: the paper has a model of similarity. I1
is not applied: the paper does not name its detector.
"""


def make_parser():
    parser = common.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")

    def add_task(name, summary, description=""):
        return tasks.add_parser(
            name, help=summary, description=description, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter)

    shards = {"nargs": "+", "metavar": "SHARDS", "help": "tar files, folders, globs, {000..123}"}
    split = {"choices": SPLITS, "default": "train", "help": "name of the shards [train]"}

    task = add_task("make", "write the toy data", MAKE_HELP)
    task.add_argument("--root", default="runs", help="folder above it [runs]")
    task.add_argument("--parts", nargs="+", choices=TOY_PARTS, default=list(TOY_PARTS))
    task.add_argument("--scenes", type=common.at_least(1), default=20_000,
                      help="training pairs [20000]")
    task.add_argument("--documents", type=common.at_least(1), default=4_000,
                      help="training documents [4000]")
    task.add_argument("--noise", type=float, default=0.0, help="share of wrong captions [0]")
    task.add_argument("--seed", type=common.at_least(0), default=0)

    task = add_task("index", "count shards and samples, say what is odd about archives")
    task.add_argument("shards", **shards)

    task = add_task("check", "list each bad shard and sample", CHECK_HELP)
    task.add_argument("shards", **shards)

    task = add_task("vocab", "train a vocabulary on the captions of the first 100,000 samples")
    task.add_argument("shards", **shards)
    task.add_argument("--size", type=int, default=32_000, help="number of ids [32000]")
    task.add_argument("--out", default="vocab.json", help="[vocab.json]")

    task = add_task("convert", "write another layout as shards", CONVERT_HELP)
    task.add_argument("sources", nargs="+", metavar="FILE")
    task.add_argument("--from", dest="layout", choices=CONVERTERS, required=True)
    task.add_argument("--images", metavar="FOLDER", help="not for --from folder")
    task.add_argument("--annotations", nargs="+", default=[], metavar="FILE", help="vqa: answers")
    task.add_argument("--split", **split)
    task.add_argument("--per-shard", type=common.at_least(1), default=1000,
                      help="samples in a shard [1000]")
    task.add_argument("--out", required=True, metavar="FOLDER")

    task = add_task("filter", "drop what ALIGN's rules drop", FILTER_HELP)
    task.add_argument("shards", **shards)
    task.add_argument("--against", nargs="+", default=[], metavar="SHARDS", help="evaluation sets")
    task.add_argument("--split", **split)
    task.add_argument("--out", required=True, metavar="FOLDER")
    for limit in dataclasses.fields(Thresholds):
        flag = common.flag(limit.name)
        task.add_argument(flag, type=limit.type, default=limit.default, help=f"[{limit.default}]")
    return parser


def main(argv=None):
    args = vars(make_parser().parse_args(argv))
    task = args.pop("task")
    if task == "make":
        print(make_toy_data(**args))
    elif task == "index":
        index = Index(expand(args["shards"], split=None))
        print(*map(printable, [index.summary(), *index.warnings()]), sep="\n")
    elif task == "check":
        sys.exit(int(check(expand(args["shards"], split=None))))
    elif task == "vocab":
        texts = first_captions(Index(expand(args["shards"])))
        tokenizer = Tokenizer.train(texts, args["size"])
        tokenizer.save(args["out"])
        print(f"{args['out']}: {tokenizer.vocab_size} ids")
    elif task == "convert":
        convert(**args)
    else:
        args["paths"] = expand(args.pop("shards"))
        args["against"] = expand(args["against"], "test")
        filter_pairs(**args)


if __name__ == "__main__":
    common.run_command(main)
