"""From tar shards to batches: index, plan, decode, tokenizer, and a built-in world of small scenes to train on without any data.

    python data.py make                                        # write the built-in world under runs/
    python data.py check '../shared/data/pairs/*.tar'          # what is wrong with these shards (exit 1 if anything is)
    python data.py index 'cc3m/{00000..00331}.tar'             # shards, samples, first key
    python data.py vocab 'cc3m/*.tar' --size 32000 --out vocab.json
    python data.py convert captions_train2017.json --from captions --images train2017 --out coco      # other layouts -> our shards
    python data.py filter 'cc3m/*.tar' --against 'coco/test-*.tar' --out runs/filtered               # ALIGN's rules for images and texts
    python data.py bench 'cc3m/*.tar'                          # images/s of the loader beside the bare decoding of the same bytes

A shard is a plain tar whose neighbouring members share a key: 0001.jpg 0001.txt 0001.json. Read Index (where is every sample), Plan (which
sample at which step), Sample (what is in it), Batches (how they meet).
Departure from stream readers: random access by an index, so that order and resume do not depend on ranks or workers.
"""
import argparse, atexit, base64, collections, contextlib, csv, ctypes, dataclasses, functools, glob, hashlib, heapq, io, itertools, json, mmap
import multiprocessing, os, re, signal, statistics, sys, tarfile, tempfile, time, warnings, zipfile, zlib
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageOps
from tqdm import tqdm

import common
from common import UserError, print0

warnings.filterwarnings("ignore", module=r"PIL\.")           # Pillow warns of odd metadata; what matters raises
IMAGES = ("jpg", "jpeg", "png", "webp")
MAX_PIXELS = 25_000_000          # open_clip's guard, checked before anything is decoded
MAX_CAPTION = 10_000             # characters; what lies beyond cannot reach any context length here
# Why a sample is passed over, and whether that counts towards the tenth that stops a run: "kept" is counted but delivered.
REASONS = {"shard gone": "hard", "cut sample": "hard", "unreadable json": "hard", "no image": "hard", "unreadable image": "hard",
           "too many pixels": "hard", "no caption": "hard", "no class": "hard", "no document": "hard", "empty caption": "soft",
           "no image left": "soft", "no box": "soft", "no mask": "hard", "no question": "soft", "caption not UTF-8": "kept"}


class Skip(Exception):
    """This sample cannot be used; the argument is one of REASONS."""


class _Seed(np.random.bit_generator.ISeedSequence):          # a digest in the place of numpy's SeedSequence, which takes five times as long
    def __init__(self, digest):
        self.digest = digest

    def generate_state(self, n_words, dtype=np.uint32):
        return np.frombuffer(self.digest, dtype, n_words)


def rng_for(*key):
    """numpy Generator for a tuple of integers; the first tells streams apart."""
    return np.random.Generator(np.random.PCG64(_Seed(hashlib.blake2b(repr([*map(int, key)]).encode(), digest_size=32).digest())))


# ---- which files ----

def braces(pattern):
    """{8..11} -> 8 9 10 11, {08..11} keeps the width, {a,b} -> a b, products; a brace without .. or , stays as it is."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not found:
        return [pattern]
    low, high, names = found.groups()
    width = max(len(low), len(high)) if low and any(len(end) > 1 and end[0] == "0" for end in (low, high)) else 0
    step = 1 if names or int(low) <= int(high) else -1
    choices = names.split(",") if names else [f"{i:0{width}d}" for i in range(int(low), int(high) + step, step)]
    return [pattern[:found.start()] + c + rest for c in choices for rest in braces(pattern[found.end():])]


def expand(patterns, split="train"):
    """Patterns (a string or a list; ::, braces, globs, folders) -> existing files. In a folder, train-*.tar or train/ is the training part,
    test-* val-* test/ val/ the held-out one; where nothing tells them apart, everything is. Raises UserError for a pattern without a match."""
    paths = []
    for pattern in itertools.chain.from_iterable(p.split("::") for p in ([patterns] if isinstance(patterns, str) else patterns)):
        for p in braces(os.path.expanduser(pattern)):
            if os.path.isdir(p):
                parts = {s: sorted(f for n in names for f in glob.glob(f"{glob.escape(p)}/{n}-*.tar") + glob.glob(f"{glob.escape(p)}/{n}/*.tar"))
                         for s, names in (("train", ["train"]), ("test", ["test", "val"]))}
                found = parts[split] if any(parts.values()) else sorted(glob.glob(f"{glob.escape(p)}/*.tar"))
            else:
                found = sorted(glob.glob(p)) if glob.has_magic(p) and not os.path.exists(p) else [p] * os.path.exists(p)
            if not found:
                seen = f" (expanded to {p})" if p != pattern else ""
                raise UserError(f"{pattern}: no such {split} shards{seen}: give tar files, a folder or a glob")
            paths += found
    return list(dict.fromkeys(paths))


def beside(paths, *names):
    """Lines of the first of these text files found beside the shards or one folder up; None if there is none."""
    folder = os.path.dirname(os.path.abspath(paths[0]))
    for path in (os.path.join(f, n) for f in (folder, os.path.dirname(folder)) for n in names):
        if os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                return [line.strip() for line in f if line.strip()]
    return None


# ---- where every sample is ----

def split_name(name):
    """Key and lower-case suffix, cut at the first dot after the last slash; (None, None) for names that belong to no sample."""
    base = name.rsplit("/", 1)[-1]
    if base.startswith("__") and base.endswith("__") or not 0 < base.find(".") < len(base) - 1:
        return None, None
    cut = len(name) - len(base) + base.index(".")
    return name[:cut], name[cut + 1:].lower()


ROW = np.dtype([("shard", "<i4"), ("offset", "<i8"), ("span", "<i4")])


def scan(path):
    """One pass over a tar's headers -> ([(offset, span)], first key, {note: count}). Python's tarfile ends silently on many cuts and on a
    damaged header, so the block where it stopped must be the zero block that ends an archive, and nothing but zeros may follow."""
    rows, notes, first, key, seen = [], collections.Counter(), None, None, set()
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        if f.read(2) == b"\x1f\x8b":
            raise UserError(f"{path} is compressed, which rules out random access: unpack it with  gzip -dc {path} > {path.removesuffix('.gz')}"
                            + ("" if path.endswith(".gz") else ".unpacked"))
        f.seek(0)
        try:
            with tarfile.open(fileobj=f, mode="r:") as tar:
                for member in tar:
                    tar.members = []                         # tarfile would keep every header of the archive
                    if member.size < 0 or tar.offset <= member.offset:                           # would lead back to an earlier member, for ever
                        raise tarfile.TarError
                    name, suffix = split_name(member.name) if member.isreg() else (None, None)
                    if not name:
                        continue
                    if member.offset_data + member.size > size:
                        notes["cut shard"] += 1
                        break
                    if name != key or suffix in seen:        # a repeated suffix starts a new sample of the same key
                        notes["duplicate suffix"] += name == key
                        key, seen, first = name, set(), first or name
                        rows.append([member.offset, 0])
                    seen.add(suffix)
                    rows[-1][1] = member.offset_data + -(-member.size // 512) * 512 - rows[-1][0]
                else:
                    f.seek(tar.offset)
                    if f.read(512) != bytes(512):
                        notes["cut shard"] += 1
                    elif any(block.strip(b"\0") for block in iter(lambda: f.read(2 ** 20), b"")):   # a hole in it, or archives joined
                        notes["data behind the end"] += 1
        except Exception:                                    # tarfile fails in many ways: TarError, OSError, MemoryError, RecursionError, ...
            notes["cut shard" if rows else "not a tar"] += 1
    if os.path.exists(stats := path.removesuffix(".tar") + "_stats.json"):
        try:
            with open(stats) as f:
                declared = json.load(f)["successes"]
            if declared != len(rows):
                notes[f"_stats.json declares {declared!r} samples, found {len(rows)}"] += 1
        except (ValueError, KeyError, TypeError, RecursionError):
            notes["unreadable _stats.json"] += 1
    notes["sample over 2 GiB"] = sum(span >= 2 ** 31 for _, span in rows)
    return [r for r in rows if r[1] < 2 ** 31], first and first.encode(errors="replace").decode(), {note: n for note, n in notes.items() if n}


def spread(work, *columns, label, least):
    """[work(*row)] over all cores, with a bar; in this process if there are fewer than `least` rows, as starting others takes seconds."""
    bar = functools.partial(tqdm, desc=label, total=len(columns[0]), unit="shard", leave=False, disable=None)
    if len(columns[0]) < least:
        return list(bar(map(work, *columns)))
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:       # not forked: torch and gloo may have threads here
        return list(bar(pool.map(work, *columns)))


class Index:
    """Every sample of a set of shards: a memory-mapped row (shard, offset, span) each, cached under the shards' paths, sizes and times.

    `notes` maps a shard to what was odd about it. Raises UserError if no sample is found.
    """
    def __init__(self, paths):
        self.paths, self.fds = [os.path.abspath(p) for p in paths], {}
        cache = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "vlp-index")
        stamps = []
        try:
            for p in self.paths:
                f = os.open(p, os.O_RDONLY)                  # what may not be read is told here; file objects would take twice the time
                stamps.append((p, (seen := os.fstat(f)).st_size, seen.st_mtime_ns))
                os.read(f, 0)                                # refused by a folder
                os.close(f)
        except OSError as error:
            raise UserError(f"shard {p} cannot be read ({error.strerror})") from None
        self.bytes = sum(size for _, size, _ in stamps)
        self.file = os.path.join(cache, hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:24])
        if not os.path.exists(self.file + ".npy"):
            self.build(cache)
        with open(self.file + ".json", encoding="utf-8") as f:
            self.starts, self.first_key, self.notes = json.load(f)
        self.starts = np.array(self.starts)
        self.rows = np.load(self.file + ".npy", mmap_mode="r")
        if len(self) == 0:
            raise UserError(f"no sample in {len(paths)} shard(s), the first is {paths[0]} ({self.notes or 'empty'}): is it a tar of images?")

    def build(self, cache):
        try:
            os.makedirs(cache, exist_ok=True)
            found = spread(scan, self.paths, label="indexing", least=50)
            rows = np.concatenate([np.array([(shard, *row) for row in f[0]], ROW) for shard, f in enumerate(found)])
            starts = np.cumsum([0] + [len(f[0]) for f in found]).tolist()
            notes = {p: f[2] for p, f in zip(self.paths, found) if f[2]}
            meta = json.dumps([starts, next((f[1] for f in found if f[1]), None), notes]).encode()
            for name, write in ((".json", lambda f: f.write(meta)), (".npy", lambda f: np.save(f, rows))):   # the rows last: they mark it complete
                with tempfile.NamedTemporaryFile(dir=cache, delete=False) as f:
                    write(f)
                os.replace(f.name, self.file + name)
        except OSError as error:
            raise UserError(f"the index cannot be written to {cache} ({error}): set XDG_CACHE_HOME to a folder with room") from None

    def __len__(self):
        return len(self.rows)

    def summary(self):
        return f"{len(self.paths)} shards, {len(self):,} samples, {self.bytes / 1e9:.2f} GB, first key {self.first_key}"

    def oddities(self):
        """A line for each shard that has notes."""
        return [f"{path}: {', '.join(f'{note} ({n})' for note, n in notes.items())}" for path, notes in self.notes.items()]

    def __reduce__(self):                                    # a worker that is not forked maps the rows anew instead of copying them
        return Index, (self.paths,)

    def __del__(self):                                       # an evaluation makes one each time
        while self.fds:
            os.close(self.fds.popitem()[1])

    def __getitem__(self, i):
        """Sample i, its bytes read by one pread. Raises Skip."""
        shard, offset, span = self.rows[i].item()
        try:
            if shard not in self.fds:
                if len(self.fds) >= 128:                     # stay far from the limit of open files
                    while self.fds:
                        os.close(self.fds.popitem()[1])
                    self.rows._mmap.madvise(mmap.MADV_DONTNEED)  # nor need the rows read so far stay in memory: 1.5 GiB of them in 10^8 samples
                self.fds[shard] = os.open(self.paths[shard], os.O_RDONLY)
            raw = os.pread(self.fds[shard], span, offset)
        except OSError:
            raise Skip("shard gone") from None
        if len(raw) < span:
            raise Skip("cut sample")
        return Sample(*unpack(raw))


def octal(field):
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def header(block):
    """Name and size of a member, and is it a plain file? The usual ones are read without tarfile, much faster. Raises TarError or ValueError."""
    if len(block) == 512 and block[156] == 48 and not block[345] and block[124] < 128:
        total = octal(block[148:156]) - 256 + sum(block[148:156])                                # the checksum takes its own field for eight spaces
        if (zlib.adler32(block) & 0xFFFF) == (1 + total) % 65521:                                # adler32's lower half: 1 + the sum of all bytes
            return block[:100].split(b"\0", 1)[0].decode("utf-8", "surrogateescape"), octal(block[124:136]), True
    info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    return info.name, info.size, info.type in (tarfile.REGTYPE, tarfile.AREGTYPE)


def unpack(raw):
    """The bytes of one sample -> (key, {suffix: bytes})."""
    members, at, key = {}, 0, None
    try:
        while at < len(raw):
            name, size, plain = header(raw[at:at + 512])
            if not plain:                                    # long names and the like: tarfile knows them all
                with tarfile.open(fileobj=io.BytesIO(raw + bytes(1024))) as tar:
                    pairs = [(split_name(m.name), tar.extractfile(m).read()) for m in tar if m.isreg()]
                if len(keys := {name for (name, _), _ in pairs if name}) != 1:
                    raise Skip("cut sample")
                return keys.pop(), {suffix: data for (_, suffix), data in pairs if suffix}
            name, suffix = split_name(name)
            if size < 0:                                     # would lead back, for ever
                raise Skip("cut sample")
            if suffix:
                if key not in (None, name):                  # the shard was rewritten since it was indexed
                    raise Skip("cut sample")
                key, members[suffix] = name, raw[at + 512:at + 512 + size]
            at += 512 + -(-size // 512) * 512
    except (tarfile.TarError, ValueError, OSError):
        raise Skip("cut sample") from None
    return key, members


# ---- what is in a sample ----

class Sample:
    """One sample's bytes, decoded on demand. Everything here raises Skip with a reason instead of failing."""
    def __init__(self, key, members):
        self.key, self.members, self.damaged_text = key, members, False

    @functools.cached_property
    def json(self):
        try:
            fields = json.loads(self.members.get("json", b"{}"))
            return fields if isinstance(fields, dict) else {}
        except (ValueError, RecursionError):
            raise Skip("unreadable json") from None

    def text(self, raw):
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.damaged_text = True
            return raw.decode(errors="replace")

    def captions(self, lines=False):
        """All captions, white space collapsed. lines: each line of the .txt is one (evaluation tars), else the .txt is one."""
        if "txt" in self.members:
            text = self.text(self.members["txt"])
            found = text.splitlines() if lines else [text]
        else:
            found = self.json.get("caption")
            found = [found] if isinstance(found, str) else found
            if not isinstance(found, list):
                raise Skip("no caption")
        found = [" ".join(c[:MAX_CAPTION].split()) for c in found if isinstance(c, str)]
        if not any(found):
            raise Skip("empty caption")
        return [c for c in found if c]

    def captioned(self):                                     # does this claim to have a caption? (whether there is one, captions() tells)
        return "txt" in self.members or "caption" in self.json

    def caption(self, rng):
        """One caption, drawn where there are several."""
        found = self.captions()
        return found[int(rng.integers(len(found)))] if len(found) > 1 else found[0]

    def label(self):
        try:
            return int(self.members["cls"])
        except (KeyError, ValueError):
            raise Skip("no class") from None

    def image_bytes(self):                                   # its image as stored, None if it has none
        return next((self.members[s] for s in IMAGES if s in self.members), None)

    def image(self, near=None, member=None):
        """RGB PIL image, upright. near: a JPEG may be decoded at a fraction of its size, both sides staying >= near. member: the suffix of one
        of several images."""
        raw = self.members.get(member) if member else self.image_bytes()
        if raw is None:
            raise Skip("no image")
        try:
            image = Image.open(io.BytesIO(raw), formats=("JPEG", "PNG", "WEBP"))
            if image.width * image.height > MAX_PIXELS:
                raise Skip("too many pixels")
            if near:
                image.draft("RGB", (near, near))
            if (image.format != "JPEG" or image.info.keys() & {"exif", "xmp"}) and image.getexif().get(0x0112, 1) != 1:
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):                   # 16 bits: convert("RGB") would clip all but the darkest to white
                image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
        except Image.DecompressionBombError:
            raise Skip("too many pixels") from None
        except Skip:
            raise
        except Exception:                                    # Pillow's decoders fail in many ways: OSError, SyntaxError, struct.error, ...
            raise Skip("unreadable image") from None

    def boxes(self, width, height, *fields):
        """[(x, y, w, h, text, *its other `fields`)] in pixels of the upright image, which is width x height: the json's "boxes" ({x, y, w, h, text})
        or "segments" ({bbox, name}), cut at the image's edges; what is malformed, outside or has no text is left out. Raises Skip if none is left."""
        found, turn, raw = [], 1, self.image_bytes() or b""
        with contextlib.suppress(Exception):                 # an unreadable image is image()'s business
            turn = Image.open(io.BytesIO(raw), formats=("JPEG", "PNG", "WEBP")).getexif().get(0x0112, 1)
        turn = turn if turn in range(1, 9) else 1            # as Pillow, which turns nothing where the tag holds anything else
        W, H = (height, width) if turn >= 5 else (width, height)                                 # as stored, where boxes are measured
        for box in next((b for b in map(self.json.get, ("boxes", "segments")) if isinstance(b, list)), []):
            try:
                sides = box["bbox"] if "bbox" in box else [box[k] for k in "xywh"]
                (x, y, w, h), text = map(float, sides), " ".join((box.get("text") or box["name"])[:MAX_CAPTION].split())
            except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
                continue
            x, y, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, W), min(y + h, H)
            w, h = right - x, bottom - y
            if w > 0 and h > 0 and text:
                x, y = W - right if turn in (2, 3, 7, 8) else x, H - bottom if turn in (3, 4, 6, 7) else y       # EXIF: mirrored, then transposed
                found.append((*((y, x, h, w) if turn >= 5 else (x, y, w, h)), text, *map(box.get, fields)))
        if not found:
            raise Skip("no box")
        return found

    def document(self, rng, near=None, least=0.24, most=6, first=0.5):
        """Sentences (str) and PIL images in reading order. Fields "texts" and "images", in which one of the two stands at each place
        (OBELICS), are in order already. "text_list" and "image_info" (MMC4) get LCL's rules (its released loader): images whose matched_sim is at
        least `least`, or not given; one for a sentence, drawn; the first `most`; each before its sentence with probability `first`, else
        after it. Images that are missing or unreadable are left out; Skip if none is left."""
        def picture(name):
            with contextlib.suppress(Skip):
                return self.image(near, split_name(name)[1] or "-")

        if self.has_document("texts", "images"):
            pairs = itertools.zip_longest(self.json["texts"], self.json["images"])
            places = [t if t and isinstance(t, str) else (n,) for t, n in pairs if isinstance(t or n, str)]        # an image's name in a tuple
            for extra in [i for i, p in enumerate(places) if isinstance(p, tuple)][:most - 1:-1]:
                del places[extra]
            segments = [picture(*p) if isinstance(p, tuple) else p for p in places]
        elif self.has_document("text_list", "image_info"):
            matched, texts, segments = {}, [t if isinstance(t, str) else "" for t in self.json["text_list"]], []
            for info in (i for i in self.json["image_info"] if isinstance(i, dict)):
                name, at, sim = (info.get(field) for field in ("image_name", "matched_text_index", "matched_sim"))
                similar = sim is None or isinstance(sim, (int, float)) and sim >= least
                if similar and isinstance(name, str) and isinstance(at, int) and 0 <= at < len(texts):
                    matched.setdefault(at, []).append(name)
            chosen = {at: picture(names[int(rng.integers(len(names)))]) for at, names in sorted(matched.items())[:most]}
            for at, text in enumerate(texts):
                block = [text, chosen.get(at)]
                segments += block[::-1] if block[1] and rng.random() < first else block
        else:
            raise Skip("no document")
        segments = [s for s in segments if s]
        if all(isinstance(s, str) for s in segments):
            raise Skip("no image left")
        return segments

    def has_document(self, *fields):
        return all(isinstance(self.json.get(f), list) for f in fields)

    def is_document(self):
        """Does this claim to be a document? (Whether it is a sound one, document() tells.)"""
        return bool({"text_list", "texts"} & self.json.keys())


def planes(image, flip=False):
    """An RGB image, mirrored or not -> uint8 (3, H, W), read-only: a view of rows of triples, an order that np.stack keeps, so no byte is moved."""
    if flip:
        image = ImageOps.mirror(image)
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, 3).transpose(2, 0, 1)


def squash(image, size, rng=None, flip=False, full=346 / 289):
    """ALIGN's view (paper s5): both sides to full * `size`, then a crop, random with rng, central without. -> uint8 (3, size, size).

    Squash and crop are one resize of the crop's box, so nothing outside it is computed.
    """
    full = round(size * full)
    x, y = (int(rng.integers(full - size + 1)) if rng is not None else (full - size) // 2 for _ in "xy")
    sx, sy = image.width / full, image.height / full
    view = image.resize((size, size), Image.BILINEAR, box=(x * sx, y * sy, (x + size) * sx, (y + size) * sy))
    return planes(view, rng is not None and flip and rng.random() < 0.5)


def random_box(rng, width, height, scale, ratio=(3 / 4, 4 / 3)):
    """(x, y, w, h) of a random resized crop (torchvision's): area in (scale, 1) of the image's, sides in `ratio`; central after ten misses."""
    for _ in range(10):
        area, r = width * height * rng.uniform(scale, 1), np.exp(rng.uniform(*np.log(ratio)))
        w, h = round((area * r) ** 0.5), round((area / r) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def crop(image, box, size, flip=False):
    """The box (x, y, w, h) of an image, bicubic -> uint8 (3, size, size)."""
    x, y, w, h = box
    return planes(image.resize((size, size), Image.BICUBIC, box=(x, y, x + w, y + h)), flip)


def centre(image, size):
    """The usual evaluation view: short side to `size`, bicubic, central square. -> uint8 (3, size, size)."""
    short = min(image.size)
    return crop(image, ((image.width - short) / 2, (image.height - short) / 2, short, short), size)


# ---- which sample at which step ----

class Plan:
    """Order of the samples: shards permuted with (seed, epoch), shuffled in windows of `window` shards, cut into global batches, tail dropped.

    The batch at a step depends on (seed, step, batch) alone, so resuming costs nothing. starts: first sample of each shard, and their number.
    """
    def __init__(self, starts, batch, seed, window):
        self.starts, self.batch, self.seed, self.window, self.n = starts, batch, seed, max(1, window), int(starts[-1])
        if batch > self.n:
            raise UserError(f"--batch {batch} is larger than the data ({self.n} samples)")
        self.steps_per_epoch, self.cached = self.n // batch, {}

    def remember(self, key, make):
        if (found := self.cached.get(key)) is None:          # threads may share a plan: at worst two of them make the same
            if len(self.cached) > 8:
                self.cached.clear()
            found = self.cached[key] = make()
        return found

    def shards(self, epoch):
        """Permuted shards, and the position in the epoch at which each window ends."""
        order = rng_for(1, self.seed, epoch).permutation(len(self.starts) - 1)
        ends = np.cumsum(np.diff(self.starts)[order])
        return order, np.append(ends[self.window - 1:-1:self.window], ends[-1])

    def shuffled(self, epoch, w):
        order, _ = self.remember((epoch,), lambda: self.shards(epoch))
        ids = np.concatenate([np.arange(self.starts[s], self.starts[s + 1]) for s in order[w * self.window:(w + 1) * self.window]])
        rng_for(2, self.seed, epoch, w).shuffle(ids)
        return ids

    def sample(self, epoch, position):
        _, ends = self.remember((epoch,), lambda: self.shards(epoch))
        w = int(np.searchsorted(ends, position, side="right"))
        ids = self.remember((epoch, w), lambda: self.shuffled(epoch, w))
        return int(ids[position - (ends[w - 1] if w else 0)])

    def position(self, step, row):
        """(epoch, position in it) of a row of the global batch of a step."""
        return step // self.steps_per_epoch, step % self.steps_per_epoch * self.batch + row


class Rows:
    """A source of training rows: samples of an index in the order of a plan, made by example(sample, rng) -> {name: numpy array}.

    example may raise Skip. A position that cannot be read is filled by the next one of the epoch that can, so nothing shifts. rng depends on
    (seed, epoch, sample) alone.
    """
    def __init__(self, index, plan, example):
        self.index, self.plan, self.example = index, plan, example

    def __call__(self, step, row, skipped):
        epoch, position = self.plan.position(step, row)
        for p in range(position, position + self.plan.n):
            i = self.plan.sample(epoch, p % self.plan.n)
            try:
                sample = self.index[i]
                made = self.example(sample, rng_for(3, self.plan.seed, epoch, i))
                skipped["caption not UTF-8"] += sample.damaged_text
                return made
            except Skip as reason:
                skipped[str(reason)] += 1
        raise UserError(f"none of the {self.plan.n} samples can be used ({dict(skipped)}): python data.py check tells more")


def open_index(paths):                                       # their Index, made by rank 0 if it is not cached; the others find it done
    return common.rank0_first(lambda: Index(paths))


def indices_of(*patterns):                                   # the Index of each set of training shards, None where there is none
    return [p and open_index(expand(p)) for p in patterns]


def mixture(cfg, indices, share, example):
    """Sources of two kinds of rows for Batches, and the share of the second kind: 1 (0) where only that (the other) is given."""
    share = share if all(indices) else float(bool(indices[1]))
    counts = shares(cfg.batch, share)
    return [Rows(index, Plan(index.starts, n, cfg.seed + i, cfg.window), example) if n else None
            for i, (index, n) in enumerate(zip(indices, counts))], share


def stack(rows):
    """[{name: array}] -> {name: tensor (B, ...)}"""
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


def shares(batch, share):
    """How many rows of a global batch are of the first and of the second kind: row i is of the second iff floor((i+1)p) > floor(ip)."""
    second = int(batch * share + 1e-9)
    return batch - second, second


class Batches(torch.utils.data.Dataset):
    """Item `step`: this rank's rows of the step's global batch, collate(rows), and "skipped", counts in the order of REASONS.

    sources: one Rows, whose plan cuts whole global batches, or two, whose plans' batches are shares(batch, share); either may be None where it
    has no rows.
    """
    def __init__(self, sources, batch, rank=0, world=1, share=0.0, collate=stack):
        self.sources, self.share, self.collate = sources, share, collate
        self.rows = range(rank * batch // world, (rank + 1) * batch // world)

    def __getitem__(self, step):
        skipped, rows = collections.Counter(), []
        try:
            for row in self.rows:
                before = int(row * self.share + 1e-9)        # rows of the second kind among the earlier ones
                second = int((row + 1) * self.share + 1e-9) > before
                rows.append(self.sources[second](step, before if second else row - before, skipped))
        except UserError as error:                           # an exception would reach the main process wrapped in a traceback
            return {"error": str(error)}
        return {**self.collate(rows), "skipped": torch.tensor([skipped[r] for r in REASONS])}


def _begin_worker(_):
    for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):    # the run finishes its step and ends its workers itself
        signal.signal(s, signal.SIG_IGN)
    with contextlib.suppress(AttributeError):                # glibc: what a batch frees stays for the next one, instead of coming anew page by page
        for threshold, size in ((-1, 2 ** 30), (-3, 2 ** 25)):                                   # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(threshold, size)


class Loader:
    """Iterator over Batches from step `first` on, made in order by --workers processes (0: in this one), a few ahead."""
    def __init__(self, batches, first, cfg, device):
        workers = cfg.workers if cfg.workers is not None else max(1, min(16, common.cores() - 1))
        ahead = {"prefetch_factor": 2, "worker_init_fn": _begin_worker} if workers else {}
        loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(first, cfg.steps), num_workers=workers,
                                             pin_memory=device.type == "cuda", **ahead)
        self.iterator = iter(loader)
        with contextlib.suppress(ValueError):                # torch would raise in the middle of a step; the next batch tells of a dead worker too
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        atexit.register(self.close)                          # before multiprocessing's own hook, which would wait for workers deaf to SIGTERM

    def __next__(self):
        try:
            batch = next(self.iterator)
        except (RuntimeError, OSError, EOFError):            # torch's word for a dead worker, or a connection to it that broke before torch knew
            for w in getattr(self.iterator, "_workers", ()):
                w.join(0.2)
                if w.exitcode:
                    raise UserError(f"a loader worker died (exit code {w.exitcode}): less --workers need less memory") from None
            raise
        if "error" in batch:
            raise UserError(batch["error"])
        return batch

    def close(self):
        workers = getattr(self.iterator, "_workers", ())
        self.iterator = None                                 # its destructor tells the workers to end and joins them
        for w in workers:                                    # one that hangs, after another was killed, is deaf to the SIGTERM of multiprocessing too
            w.kill()
        atexit.unregister(self.close)


# ---- tokenizer ----

class Tokenizer:
    """Byte-level byte-pair encoding. Ids: the special tokens, then the 256 bytes, then the merges in the order they were learned.

    Special tokens exist as ids only: no string in a text turns into one. Without merges it is a plain byte tokenizer.
    """
    PAD, BOS, EOS, MASK, SOI, EOI, IMG, UNUSED = SPECIAL = range(8)
    WORDS = re.compile(r" ?\w{1,64}| ?[^\w\s]{1,64}|\s")    # every character belongs to exactly one piece; merging is quadratic in its length

    def __init__(self, merges=()):
        self.merges = [tuple(m) for m in merges]
        self.first_byte = len(self.SPECIAL)
        self.vocab_size = self.first_byte + 256 + len(self.merges)
        self.rank = {m: self.first_byte + 256 + i for i, m in enumerate(self.merges)}
        self.bytes = [b""] * self.first_byte + [bytes([i]) for i in range(256)]
        for a, b in self.merges:
            self.bytes.append(self.bytes[a] + self.bytes[b])
        self.cache = {}

    @classmethod
    def train(cls, texts, vocab_size):
        """Merge the most frequent neighbouring pair (on ties the smaller ids) until vocab_size ids exist or no pair occurs twice."""
        first = len(cls.SPECIAL)
        counts = collections.Counter(w for text in texts for w in cls.WORDS.findall(text))
        words = [([first + b for b in w.encode("utf-8", "surrogatepass")], n) for w, n in sorted(counts.items())]
        pairs, where = collections.Counter(), collections.defaultdict(set)
        for i, (ids, n) in enumerate(words):
            for pair in zip(ids, ids[1:]):
                pairs[pair] += n
                where[pair].add(i)
        heap, merges = [(-n, pair) for pair, n in pairs.items()], []
        heapq.heapify(heap)
        while heap and first + 256 + len(merges) < vocab_size:
            n, pair = heapq.heappop(heap)
            if -n != pairs[pair]:                            # an outdated entry: the pair's count has changed since and was pushed again
                continue
            if -n < 2:
                break
            new, changed = first + 256 + len(merges), set()
            merges.append(pair)
            for i in where.pop(pair):
                ids, times = words[i]
                for old in zip(ids, ids[1:]):
                    pairs[old] -= times
                    changed.add(old)
                ids[:] = cls.merge(ids, pair, new)
                for now in zip(ids, ids[1:]):
                    pairs[now] += times
                    where[now].add(i)
                    changed.add(now)
            for p in changed - {pair}:
                if pairs[p] > 0:
                    heapq.heappush(heap, (-pairs[p], p))
        return cls(merges)

    @staticmethod
    def merge(ids, pair, new):
        out, i = [], 0
        while i < len(ids):
            hit = i + 1 < len(ids) and ids[i] == pair[0] and ids[i + 1] == pair[1]
            out.append(new if hit else ids[i])
            i += 2 if hit else 1
        return out

    def word(self, w):
        if w not in self.cache:
            ids = [self.first_byte + b for b in w.encode("utf-8", "surrogatepass")]
            while len(ids) > 1:
                pair = min(zip(ids, ids[1:]), key=lambda p: self.rank.get(p, len(self.bytes)))
                if pair not in self.rank:
                    break
                ids = self.merge(ids, pair, self.rank[pair])
            if len(self.cache) > 100_000:
                self.cache.clear()
            self.cache[w] = ids
        return self.cache[w]

    def encode(self, text):
        """Token ids of a text, without special tokens."""
        return [i for w in self.WORDS.findall(text) for i in self.word(w)]

    def pad(self, text, length):
        """bos + text + eos, cut so that the end token stays, padded to `length` -> (tokens int64, valid bool), numpy (length,)."""
        ids = [self.BOS, *self.encode(text)[:length - 2], self.EOS]
        return np.array(ids + [self.PAD] * (length - len(ids))), np.arange(length) < len(ids)

    def decode(self, ids):
        """Text of token ids; special tokens and ids without a meaning vanish, bytes that are not UTF-8 become the replacement character."""
        return b"".join(self.bytes[i] for i in map(int, ids) if i < len(self.bytes)).decode(errors="replace")

    def dumps(self):
        return json.dumps({"type": "byte-level BPE", "special": len(self.SPECIAL), "merges": self.merges})

    @classmethod
    def loads(cls, text, origin="vocabulary"):
        try:
            fields = json.loads(text)
            assert fields["special"] == len(cls.SPECIAL)
            assert all(len(cls.SPECIAL) <= i < len(cls.SPECIAL) + 256 + k for k, m in enumerate(fields["merges"]) for i in m)
            return cls(fields["merges"])
        except (ValueError, KeyError, TypeError, AssertionError, IndexError, RecursionError):
            raise UserError(f"{origin} is not a vocabulary of ours: python data.py vocab makes one") from None

    def save(self, path):
        with open(path + ".tmp", "w") as f:
            f.write(self.dumps())
        os.replace(path + ".tmp", path)

    @classmethod
    def load(cls, path):
        if not os.path.isfile(path):
            raise UserError(f"--vocab {path}: no such file; python data.py vocab makes one")
        with open(path, encoding="utf-8", errors="replace") as f:
            return cls.loads(f.read(), path)


def first_captions(index, most=100_000):
    """Captions of the first samples, for training a vocabulary. Raises UserError if the first shard has none."""
    found = []
    for i in range(min(len(index), most)):
        with contextlib.suppress(Skip):
            sample = index[i]
            texts = sample.json.get("text_list") or sample.json.get("texts") or sample.captions()
            found += [t for t in texts if isinstance(t, str)] if isinstance(texts, list) else []
        if not found and i + 1 == index.starts[index.starts > 0][0]:
            raise UserError(f"no caption in the first shard, {index.paths[0]}: a caption is KEY.txt or \"caption\" in KEY.json")
    return found


def vocabulary(cfg, index, state, names=()):
    """The run's tokenizer: from its checkpoint, from --vocab, or trained by rank 0 on the first captions (and class names) into out/vocab.json."""
    if state:
        return Tokenizer.loads(state["vocab"])
    path = cfg.vocab or os.path.join(cfg.out, "vocab.json")
    if not cfg.vocab and common.rank() == 0:
        Tokenizer.train((first_captions(index) if index else []) + list(names), cfg.vocab_size).save(path)
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > cfg.vocab_size:
        raise UserError(f"--vocab {path} has {tokenizer.vocab_size} ids, more than --vocab-size {cfg.vocab_size}: "
                        f"give --vocab-size {tokenizer.vocab_size}")
    return tokenizer


def with_world(cfg, **fields):
    """cfg, with the built-in world as its data where none is given. fields: the part of the world that each field takes, else data="pairs"."""
    for pattern in cfg.val or ():
        expand(pattern, "test")                              # a mistyped --val is told now, not after the last step
    if any(getattr(cfg, field, None) for field in ("data", "docs", "labels")):
        return cfg
    fields = fields or {"data": "pairs"}
    folder = common.rank0_first(lambda: make_world(parts=tuple(dict.fromkeys(("pairs", "labels", *fields.values())))))
    print0(f"demo on the built-in world in {folder}; --{' --'.join(fields)} takes your shards")
    return dataclasses.replace(cfg, **{field: [f"{folder}/{part}"] for field, part in fields.items()},
                               val=cfg.val or [f"{folder}/pairs", f"{folder}/labels"])


# ---- the built-in world: scenes of simple objects, small enough for a laptop, rich enough that every method here shows a result ----

GENERATOR, SIDE, MARGIN = 2, 64, 7     # raise the first with any change below: folder names depend on it; the margin survives a crop of 8 %
COLOURS = {"red": (225, 30, 35), "pink": (255, 125, 190), "yellow": (245, 220, 30), "green": (35, 165, 50),      # no word that may follow
           "cyan": (50, 210, 225), "blue": (40, 70, 235), "purple": (145, 45, 190), "white": (250, 250, 250)}    # "a" starts with a vowel
GROUNDS = {"grey": (112, 112, 114), "brown": (112, 84, 60), "dark": (52, 52, 58), "khaki": (92, 98, 60)}         # muted: no object's colour
TURN, SPIKES = np.linspace(0, 2 * np.pi, 60, endpoint=False), np.array([0.52, 0.22] * 5)
CIRCLE = 0.5 + 0.5 * np.sin(TURN), 0.5 - 0.5 * np.cos(TURN)
OUTLINES = {                                                           # x, y of polygons in the unit square; index + 1 is the mask's value
    "circle": CIRCLE, "square": ((0.06, 0.94, 0.94, 0.06), (0.06, 0.06, 0.94, 0.94)), "triangle": ((0.5, 1, 0), (0.03, 0.97, 0.97)),
    "star": (0.5 + SPIKES * np.sin(TURN[::6]), 0.52 - SPIKES * np.cos(TURN[::6])), "bar": ((0, 1, 1, 0), (0.34, 0.34, 0.66, 0.66)),
    "cross": ((.33, .67, .67, 1, 1, .67, .67, .33, .33, 0, 0, .33), (0, 0, .33, .33, .67, .67, 1, 1, .67, .67, .33, .33)), "ring": CIRCLE,
    "pillar": ((0.34, 0.66, 0.66, 0.34), (0, 0, 1, 1))}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
PLACES = (" at the top left", " at the top", " at the top right", " on the left", " in the middle", " on the right",
          " at the bottom left", " at the bottom", " at the bottom right")       # with a blank before, as some objects have none
PAIRS = [(colour, shape) for colour in COLOURS for shape in OUTLINES]  # class number = place in this list
UNSEEN = [(colour, list(OUTLINES)[(3 * i + 2) % 8]) for i, colour in enumerate(COLOURS)]     # each colour and shape once
SEEN = [pair for pair in PAIRS if pair not in UNSEEN]
TEMPLATES = ("{c}", "a {c}", "a picture of a {c}", "one {c}", "a small {c}", "a large {c}")  # zero-shot prompts, in the captions' own words
CHATTER = ("The weather was fine.", "Thank you for reading.", "We had coffee first.", "My brother likes music.", "The train was late.")
BOILERPLATE = ("IMG_{:04d}.jpg", "DSC{:05d}", "image {}x480", "click to enlarge", "photo {} of 9999", "all rights reserved")
PARTS = ("pairs", "labels", "docs")
STREAMS = ("pairs/train", "pairs/test", "labels/train", "labels/test", "docs/train", "docs/test", "noise")      # independent random numbers


@functools.lru_cache(maxsize=None)                                     # some 200 combinations, each drawn once per process
def stencil(shape, side, texture):
    """Coverage of the shape and of its darker texture (drawn 8 times larger, so both are smooth), and the hard mask."""
    big = Image.new("L", (8 * side, 8 * side))
    ImageDraw.Draw(big).polygon([(8 * side * x, 8 * side * y) for x, y in zip(*OUTLINES[shape])], fill=255)
    if shape == "ring":
        ImageDraw.Draw(big).ellipse([2 * side, 2 * side, 6 * side, 6 * side], fill=0)
    y, x = np.mgrid[:8 * side, :8 * side] / 8 - side / 2               # final pixels, from the middle of the object
    ink = {"plain": 0 * x, "striped": (x + y) % 5 < 2.3, "dotted": np.hypot((x + 2) % 4 - 2, (y + 2) % 4 - 2) < 1.3}[texture]
    dark, cover = ImageChops.multiply(big, Image.fromarray((255 * ink).astype(np.uint8))), big.reduce(8)
    return cover, dark.reduce(8), cover.point(lambda v: 255 * (v > 127))


def scene(rng, unseen=False, objects=None, pair=None):
    """Objects of SEEN pairs, of UNSEEN ones or of the one given: things (last lines), ground (its name), image (RGB), mask (0 = ground)."""
    n = 1 if pair else objects or (1 if rng.random() < 0.75 else int(rng.integers(2, 5)))
    pool = [pair] if pair else UNSEEN if unseen else SEEN
    chosen = [pool[i] for i in rng.permutation(len(pool))[:n]]         # all different, so "the red circle" is one object
    fits = np.zeros(64, dtype=bool)
    while not fits.any():                                              # 64 layouts at a time, until the boxes of one stay apart
        large = rng.integers(0, 2, (64, n))                            # so in crowded scenes, which rarely fit, small objects prevail
        sides = np.where(large, rng.integers(27, 32, (64, n)), rng.integers(17, 21, (64, n)))              # pixels
        starts = (rng.choice((17, 32, 47), (2, 64, n)) - sides // 2).clip(MARGIN, SIDE - MARGIN - sides)           # nine places
        clear = (starts[..., None, :] > (starts + sides)[..., None]).any(0)                # (64, n, n) [i, j]: j begins right of or below i
        fits = (clear | clear.swapaxes(1, 2) | np.eye(n, dtype=bool)).all((1, 2))
    ground, how = list(GROUNDS)[rng.integers(4)], [(2, 2), (5, 5), (32, 32), (1, 9), (9, 1)][rng.integers(5)]  # gradient, blobs, noise, bar
    grid = np.array(GROUNDS[ground]) + rng.uniform(-22, 22, (*how, 1)) + rng.uniform(-10, 10, (*how, 3))
    image = Image.fromarray(grid.clip(0, 255).astype(np.uint8)).resize((SIDE, SIDE), Image.NEAREST if 1 in how else Image.BICUBIC)
    mask, things = Image.new("L", (SIDE, SIDE)), []
    for (colour, shape), big, side, (x, y) in zip(chosen, large[fits][0], sides[fits][0].tolist(), starts[:, fits][:, 0].T.tolist()):
        size, texture = ("small", "large")[big], ("plain", "plain", "striped", "dotted")[rng.integers(4)]
        cover, dark, hard = stencil(shape, side, texture)
        rgb = (np.array(COLOURS[colour]) * rng.uniform(0.85, 1.05)).clip(0, 255)
        image.paste(tuple(rgb.astype(int).tolist()), (x, y), cover)
        image.paste(tuple((0.6 * rgb).astype(int).tolist()), (x, y), dark)
        mask.paste(1 + list(OUTLINES).index(shape), (x, y), hard)
        left, top, right, bottom = np.add(hard.getbbox(), (x, y, x, y)).tolist()             # tight
        cx, cy = (left + right) / 2, (top + bottom) / 2
        column, row = ((c > 26) + (c >= 28) + (c > 36) + (c >= 38) for c in (cx, cy))        # 0, 2, 4: clear; 1, 3: between, unnamed
        things.append(SimpleNamespace(
            colour=colour, shape=shape, size=size, texture=texture, number=PAIRS.index((colour, shape)), name=f"{colour} {shape}",
            full=f"{size} {colour} {shape}" if texture == "plain" else f"{size} {texture} {colour} {shape}",
            place="" if column % 2 or row % 2 else PLACES[3 * (row // 2) + column // 2],
            x=left, y=top, w=right - left, h=bottom - top, cx=cx, cy=cy))
    return SimpleNamespace(things=things, ground=ground, image=image, mask=mask)


def relation(a, b):
    """How a stands to b, None where neither direction clearly dominates; relation(b, a) is the opposite."""
    dx, dy = a.cx - b.cx, a.cy - b.cy
    return next((how for how, (ux, uy) in RELATIONS.items() if dx * ux + dy * uy > 1.5 * abs(dx * uy + dy * ux)), None)


def captions(scene, rng):
    """Four different true captions, from brief to detailed, at most 24 words. Of several objects they may name only some."""
    order = [scene.things[i] for i in rng.permutation(len(scene.things))]
    a, ground = order[0], f"on a {scene.ground} background"
    if len(order) == 1:
        brief = [f"a {a.name}", f"a picture of a {a.name}", f"one {a.name}"]
        detailed = [f"a {a.size} {a.name}", f"one {a.name}{a.place}", f"a {a.name} {ground}", f"a {a.full}{a.place}",
                    f"a {a.full}{a.place}, {ground}"]
    else:
        a, b = ([(a, b) for a in order for b in order if relation(a, b)] or [order])[0][:2]
        every = [f"a {thing.name}" for thing in order]
        both = f"a {a.full}{a.place} and " + (f"a {b.size} {b.name} {relation(b, a)} it" if relation(b, a) else f"a {b.full}{b.place}")
        brief = [f"a {a.name}", f"a {b.name} and a {a.name}", f"a picture of {' and '.join(every[:rng.integers(2, len(every) + 1)])}"]
        detailed = [f"{('two', 'three', 'four')[len(every) - 2]} objects: {', '.join(every[:-1])} and {every[-1]}",
                    f"a {a.name} {relation(a, b) or 'with'} a {b.name}", both, f"{both}, {ground}"]
    detailed = [d for d in dict.fromkeys(detailed) if d not in brief]  # a plain object between places makes some of them equal
    return [options[i] for options in (brief, detailed) for i in sorted(rng.permutation(len(options))[:2])]


def questions(scene, rng):
    """One yes / no question, one with a number, one with another answer; each has exactly one right answer."""
    things, yes = scene.things, rng.random() < 0.5
    a, b = (things[i] for i in rng.permutation(len(things))[[0, -1]])  # of a single object both, and no relation is asked
    colours, shapes = [o.colour for o in things], [o.shape for o in things]
    near = [f"{c} {s}" for c, s in SEEN if (c == a.colour or s == a.shape) and (c, s) not in zip(colours, shapes)]   # absent, half right
    binary = [f"is there a {a.name if yes else near[rng.integers(len(near))]}?",
              f"is the {a.name} {'large' if yes == (a.size == 'large') else 'small'}?"]
    binary += 2 * [f"is the {a.name} {relation(a, b) if yes else relation(b, a)} the {b.name}?"] * (relation(a, b) is not None)
    number = [("how many objects are there?", len(things)), (f"how many {a.colour} objects are there?", colours.count(a.colour))]
    other = [(f"what size is the {a.name}?", a.size), (f"what pattern has the {a.name}?", a.texture)]
    other += [(f"what colour is the {a.shape}?", a.colour)] * (shapes.count(a.shape) == 1)
    other += [(f"what shape is the {a.colour} object?", a.shape)] * (colours.count(a.colour) == 1)
    for how, (ux, uy) in RELATIONS.items():                            # asked only if nothing else stands on that side, not even askew
        there = [o for o in things if (o.cx - a.cx) * ux + (o.cy - a.cy) * uy > 0]
        other += 2 * [(f"what is {how} the {a.name}?", o.name) for o in there if len(there) == 1 and relation(o, a) == how]
    chosen = [(binary[rng.integers(len(binary))], "yes" if yes else "no"), number[rng.integers(2)], other[rng.integers(len(other))]]
    return [{"question": question, "answer": str(answer)} for question, answer in chosen]


def document(rng, key):
    """MMC4's json and 2-4 pictures: one or two sentences about each scene, among chatter and remarks on the first scene."""
    texts, info, images = [], [], {}
    for i in range(rng.integers(2, 5)):
        s = scene(rng)
        first = s.things[0] if i == 0 else first
        about, more = rng.permutation(captions(s, rng)).tolist()[:2]
        aside = f"The {first.name} in the first picture was {first.size}." if i and rng.random() < 0.5 else str(rng.choice(CHATTER))
        u, v = rng.random(2).tolist()                                  # where the aside and the second sentence about the picture stand
        before = [aside] * (u < 0.4) + [f"Next comes {more}."] * (v < 0.25)
        after = [f"We can see {more}."] * (v > 0.75) + [aside] * (u > 0.6)
        info.append(dict(image_name=f"{key}.{i}.jpg", matched_text_index=len(texts + before), matched_sim=rng.integers(2000, 4000) / 1e4))
        texts += before + [f"{about.capitalize()}."] + after
        images[f"{i}.jpg"] = s.image
    return {"json": {"text_list": texts, "image_info": info}, **images}


def record(stream, number, seed=0, noise=0.0, scenes=20000):
    """{suffix: image or what json can write}, a function of the arguments only, so that shards can be made in any order."""
    rng = np.random.default_rng([seed, STREAMS.index(stream), number])
    if stream.startswith("docs"):
        return document(rng, f"{number:08d}")
    s = scene(rng, objects=1 if stream == "labels/train" else None, pair=PAIRS[number % 64] if stream == "labels/test" else None)
    label = {"cls": s.things[0].number} if len(s.things) == 1 else {}
    if stream.startswith("labels"):
        return {"jpg": s.image, **label}
    texts, qa = captions(s, rng), questions(s, rng)
    rng = np.random.default_rng([seed, STREAMS.index("noise"), number])                      # of its own: images do not depend on noise
    if stream == "pairs/train" and rng.random() < noise:
        other = record(stream, (number + int(rng.integers(1, max(scenes, 2)))) % scenes, seed, 0, scenes)["json"]["caption"]
        texts = other if rng.random() < 0.5 else [str(rng.choice(BOILERPLATE)).format(rng.integers(100, 10000))]
    boxes = [{"x": o.x, "y": o.y, "w": o.w, "h": o.h, "text": f"a {o.full}", "name": o.name} for o in s.things]
    return {"jpg": s.image, "json": {"caption": texts, "boxes": boxes, "qa": qa}, **label, "seg.png": s.mask}


def write_shard(path, stream, numbers, **world):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in numbers:
            for suffix, value in record(stream, number, **world).items():
                raw = io.BytesIO()
                if isinstance(value, Image.Image):
                    value.save(raw, "PNG" if suffix == "seg.png" else "JPEG", quality=90)
                else:
                    raw.write(json.dumps(value).encode())
                add(tar, f"{number:08d}.{suffix}", raw.getvalue())


def make_world(root="runs", scenes=20000, documents=4000, seed=0, noise=0.0, parts=("pairs", "labels")):
    """Folder of the world that the arguments describe; a part that is missing is made and appears only when complete."""
    sizes = {"pairs": (1000, scenes, 500), "labels": (1000, 2000, 16 * 64), "docs": (500, documents, 200)}       # a shard, train, test
    what = json.dumps([GENERATOR, int(scenes), int(documents), int(seed), float(noise)])
    folder = os.path.join(root, f"world-{hashlib.sha256(what.encode()).hexdigest()[:8]}")
    os.makedirs(folder, exist_ok=True)
    for part, (step, train, test) in [(part, sizes[part]) for part in parts if not os.path.isdir(f"{folder}/{part}")]:
        with tempfile.TemporaryDirectory(prefix=f".{part}-{os.getpid()}-", dir=folder) as tmp:
            os.mkdir(making := f"{tmp}/{part}")                        # one level down: only this user may enter tmp itself
            jobs = [(f"{making}/train-{k:05d}.tar", f"{part}/train", range(k * step, min((k + 1) * step, train)))
                    for k in range(-(-train // step))] + [(f"{making}/test-00000.tar", f"{part}/test", range(test))]
            write = functools.partial(write_shard, seed=seed, noise=noise, scenes=scenes)
            spread(write, *zip(*jobs), label=f"making {folder}/{part}", least=4)
            texts = {"classes": map(" ".join, PAIRS), "unseen": map(" ".join, UNSEEN), "zeroshot_classification_templates": TEMPLATES}
            for name in texts if part == "labels" else ():
                with open(f"{making}/{name}.txt", "w") as file:
                    file.writelines(f"{line}\n" for line in texts[name])
            if not os.path.isdir(f"{folder}/{part}"):                  # else another process was faster, with the same bytes
                os.rename(making, f"{folder}/{part}")
    return folder


# ---- writing shards ----

def add(tar, name, raw):
    info = tarfile.TarInfo(name)                             # mtime, uid, gid are 0, so bytes repeat
    info.size = len(raw)
    tar.addfile(info, io.BytesIO(raw))


@contextlib.contextmanager
def new_shards(out, split):
    """Gives a function that opens the next <split>-00000.tar of folder `out`. All get these names at the end, so that a run cut short leaves none
    that could pass for the whole."""
    if glob.glob(f"{glob.escape(out)}/{split}-*.tar"):
        raise UserError(f"--out {out} already holds {split}-*.tar: give another folder, or remove them first")
    paths, current = [], contextlib.ExitStack()

    def following():
        current.close()
        paths.append(f"{out}/{split}-{len(paths):05d}.tar.part")
        return current.enter_context(tarfile.open(paths[-1], "w", format=tarfile.PAX_FORMAT))         # USTAR, unless a name is long
    try:
        os.makedirs(out, exist_ok=True)
        yield following
        current.close()
        for path in paths:
            os.replace(path, path.removesuffix(".part"))
    except OSError as error:
        raise UserError(f"stopped while writing --out {out} ({error})") from None
    finally:
        with contextlib.suppress(OSError):
            current.close()
        for path in paths:
            with contextlib.suppress(FileNotFoundError):     # renamed above, where all went well
                os.remove(path)


# ---- documents of other layouts -> our shards: functions of one document -> {suffix: bytes or path, "json": dict}, images named by suffix ----

def json_lines(paths, dropped):
    """Objects of .jsonl files, plain or inside a .zip, and of the .json members of .tar files."""
    for path in paths:
        try:
            with contextlib.ExitStack() as stack:
                files = [stack.enter_context(open(path, "rb"))]
                if zipfile.is_zipfile(path):
                    archive = stack.enter_context(zipfile.ZipFile(path))
                    files = [stack.enter_context(archive.open(name)) for name in archive.namelist() if name.endswith(".jsonl")]
                elif path.endswith(".tar"):
                    dropped.update(scan(path)[2])            # a cut archive: tarfile would not tell
                    tar = stack.enter_context(tarfile.open(path, "r:"))
                    files = ([tar.extractfile(member).read()] for member in tar if member.isreg() and member.name.endswith(".json"))
                for line in itertools.chain.from_iterable(files):
                    try:
                        found = json.loads(line)
                    except (ValueError, RecursionError):
                        found = None
                    if isinstance(found, dict):
                        yield found
                    else:
                        dropped["line that is no JSON object"] += 1
        except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
            raise UserError(f"{path} cannot be read ({error})") from None


def from_mmc4(doc, files, dropped):
    """MMC4 (formats 3.1): text_list, image_info with image_name, matched_text_index, matched_sim. Images that were never downloaded are normal.
    open_flamingo's tars (3.3 a) hold the same documents with image_base64 in the entries whose image was found."""
    if not all(isinstance(doc.get(k), list) for k in ("text_list", "image_info")):
        dropped["document without the lists text_list and image_info"] += 1
        return None
    images, info = {}, []
    for entry in (e for e in doc["image_info"] if isinstance(e, dict)):
        image, kind = files.get(os.path.basename(str(entry.get("image_name")))), "jpg"
        if isinstance(entry.get("image_base64"), str):
            with contextlib.suppress(ValueError):
                image = base64.b64decode(entry["image_base64"])
                kind = {b"\x89PNG": "png", b"RIFF": "webp"}.get(image[:4], kind)
        if not image:
            dropped["image that is not in the folder" if files else "image without bytes"] += 1
            continue
        suffix = f"{len(images)}.{image.rsplit('.', 1)[1].lower() if isinstance(image, str) else kind}"
        images[suffix] = image
        info.append({"image_name": suffix, **{k: entry[k] for k in ("matched_text_index", "matched_sim", "raw_url") if k in entry}})
    return {"json": {"url": doc.get("url"), "text_list": doc["text_list"], "image_info": info}, **images}


def from_obelics(doc, files, dropped):
    """OBELICS (formats 4): texts and images, of which one is set at each place; images are URLs or file names."""
    if not all(isinstance(doc.get(k), list) for k in ("texts", "images")):
        dropped["document without the lists texts and images"] += 1
        return None
    images, texts, names = {}, [], []
    for text, url in itertools.zip_longest(doc["texts"], doc["images"]):
        path = files.get(str(url)) or files.get(os.path.basename(str(url)))
        if isinstance(text, str) and text != "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED":
            texts, names = texts + [text], names + [None]
        elif isinstance(url, str) and path:
            suffix = f"{len(images)}.{path.rsplit('.', 1)[1].lower()}"
            images[suffix] = path
            texts, names = texts + [None], names + [suffix]
        elif isinstance(url, str):
            dropped["image that is not in the folder"] += 1
    return {"json": {"texts": texts, "images": names}, **images}


# ---- annotated images of other layouts -> our shards: generators of (image's name, what is said about it), which gather() joins ----

def read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error})") from None


def take(row, where, *keys):
    """The values of these keys. Raises UserError, which names the keys expected and those found."""
    if not isinstance(row, dict) or not row.keys() >= set(keys):
        found = f"the keys {', '.join(sorted(row)[:12])}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise UserError(f"{where}: expected the keys {', '.join(keys)}, found {found}: is --from right?")
    return [row[k] for k in keys]


def coco(job, path, found):
    """(image's file name, annotation) of a file of COCO's form."""
    images, annotations = take(found, path, "images", "annotations")
    names = dict(take(i, f"images of {path}", "id", "file_name") for i in images)
    for row in annotations:
        if (image := take(row, f"annotations of {path}", "image_id")[0]) in names:
            yield names[image], row
        else:
            job.dropped["annotation of an image that the file does not list"] += 1


def from_captions(job):
    """Captions in JSON, told apart by keys: COCO's (formats 6.1), Karpathy's, where train is train + restval (6.2), flat lists (6.3)."""
    for path in job.sources:
        found, splits = read_json(path), set()
        keys = set(found) if isinstance(found, dict) else set()
        if isinstance(found, list):
            for row in found:
                image, caption = take(row, path, "image", "caption")
                yield image, {"caption": caption if isinstance(caption, list) else [caption]}
        elif {"images", "annotations"} <= keys:
            for name, row in coco(job, path, found):
                yield name, {"caption": take(row, f"annotations of {path}", "caption"), "image_id": row["image_id"]}
        elif "images" in keys:
            for row in found["images"]:
                name, split, sentences = take(row, f"images of {path}", "filename", "split", "sentences")
                splits.add(split := "train" if split == "restval" else split)
                if split == job.split:
                    yield f"{row.get('filepath', '')}/{name}", {"caption": [take(s, f"sentences of {path}", "raw")[0] for s in sentences]}
            if job.split not in splits:
                raise UserError(f"--split {job.split}: the images of {path} are of {str(sorted(splits))[1:-1]}")
        else:
            take(found, path, "images and annotations (COCO), images with sentences (Karpathy), or image and caption in a list")


def from_flickr30k(job):
    """Flickr30k (formats 7): 1.jpg#0<TAB>caption, or a header line and 1.jpg,caption, in which captions hold commas as well."""
    for path in job.sources:
        with open(path, encoding="utf-8") as f:
            for number, line in enumerate(f):
                if found := re.match(r"([^\t]+?\.jpg)(?:#\d+\t|,)(.*)", line):
                    yield found[1], {"caption": [found[2]]}
                elif line.strip() and (number or "," not in line):                 # else the header
                    job.dropped["line that is neither NAME.jpg#number, tab, caption nor NAME.jpg, comma, caption"] += 1


def from_instances(job):
    """COCO's boxes (formats 8.2). Classes are the categories in the order of their ids, which have holes. Crowd regions are kept and marked."""
    names = {}
    for path in job.sources:
        found = read_json(path)
        names.update(take(c, f"categories of {path}", "id", "name") for c in take(found, path, "categories", "images", "annotations")[0])
        for row in found["images"]:                          # also those without an object
            image, name = take(row, f"images of {path}", "id", "file_name")
            yield name, {"boxes": [], "image_id": image}
        for name, row in coco(job, path, found):
            category, (x, y, w, h) = take(row, f"annotations of {path}", "category_id", "bbox")
            if category not in names:
                raise UserError(f"{path}: category_id {category!r} is not among its categories")
            yield name, {"boxes": [{"x": x, "y": y, "w": w, "h": h, "text": names[category], "area": row.get("area", w * h),
                                    "iscrowd": row.get("iscrowd", 0)}]}
    job.classes = [names[i] for i in sorted(names)]


def from_vqa(job):
    """VQA v2 (formats 8.4): files of questions, and --annotations with ten answers to each, the most common of which becomes the answer."""
    answers = {}
    for path in job.annotations:
        for row in take(read_json(path), path, "annotations")[0]:
            question, kind, given = take(row, f"annotations of {path}", "question_id", "answer_type", "answers")
            answers[question] = kind, [take(a, f"answers of {path}", "answer")[0] for a in given]
    for path in job.sources:
        questions, subset = take(read_json(path), path, "questions", "data_subtype")
        for row in questions:
            number, image, question = take(row, f"questions of {path}", "question_id", "image_id", "question")
            kind, given = answers.get(number, (None, None))
            if not given:
                job.dropped["question without an answer"] += 1
                continue
            name = f"COCO_{subset}_{image:012d}.jpg"
            qa = {"question": question, "answer": collections.Counter(given).most_common(1)[0][0], "answers": given, "answer_type": kind}
            yield name if name in job.files else f"{image:012d}.jpg", {"qa": [{**qa, "question_id": number}]}


def from_ade20k(job):
    """ADE20K of SceneParse150 (formats 8.1): folders of masks, 0 = other; names of the classes from objectInfo150.csv there or above, if it is."""
    for folder in job.sources:
        for above in (folder, f"{folder}/..", f"{folder}/../.."):
            if os.path.exists(table := f"{above}/objectInfo150.csv") and not job.classes:
                with open(table, encoding="utf-8", newline="") as f:
                    rows = {int(i): name for i, name in (take(row, table, "Idx", "Name") for row in csv.DictReader(f))}
                job.classes = ["unlabeled"] + [rows[i].split(";")[0].strip() for i in range(1, len(rows) + 1)]    # the first of several names
        for name in sorted(n for n in os.listdir(folder) if n.endswith(".png")):
            yield f"{name.removesuffix('.png')}.jpg", {"seg.png": f"{folder}/{name}"}


def from_folder(job):
    """A folder for each class (formats 5); the number of a class is its place among the sorted names."""
    job.classes = sorted(e.name for e in os.scandir(job.images) if e.is_dir() and not e.name.startswith("."))
    places = [(place.split("/")[0], place) for place in sorted(job.files) if "/" in place]
    if empty := sorted({*job.classes} - {name for name, _ in places}):
        raise UserError(f"{job.images}: no image in the class folder {empty[0]} (one of {len(empty)}): remove what is no class")
    number = {name: str(i).encode() for i, name in enumerate(job.classes)}
    job.dropped["image outside the class folders"] += len({*job.files.values()} - {None}) - sum(name in number for name, _ in places)
    yield from ((place, {"cls": number[name]}) for name, place in places if name in number)


LAYOUTS = {"mmc4": from_mmc4, "flamingo": from_mmc4, "obelics": from_obelics, "captions": from_captions, "flickr30k": from_flickr30k,
           "instances": from_instances, "vqa": from_vqa, "ade20k": from_ade20k, "folder": from_folder}
DOCUMENTS, SPLITS = ("mmc4", "flamingo", "obelics"), ("train", "val", "test")


def images_under(folder, dropped, ambiguous):
    """{name: path} of the images below a folder, by their place in it and by the bare name, where that is not of several (unless ambiguous)."""
    names, places = {}, {}
    for at, _, found in os.walk(folder, followlinks=True):
        for name in sorted(found):
            if name.lower().endswith(tuple(f".{suffix}" for suffix in IMAGES)):
                path = os.path.join(at, name)
                names[name] = path if ambiguous or name not in names else None
                places[os.path.relpath(path, folder)] = path
            else:
                dropped[f"file that is not read: {os.path.splitext(name)[1].lower() or 'no suffix'}"] += 1
    return {**names, **places}


def gather(layout, job):
    """[{suffix: bytes or path, "json": dict}]: an image once, with all that is said about it. Images that are missing are counted, and listed in
    out/missing-<split>.txt; more than a tenth of them raises UserError, as does a file of another kind."""
    records = {}
    try:
        for name, fields in tqdm(LAYOUTS[layout](job), "reading", unit="annotation", leave=False, disable=None):
            parts = str(name).strip("/").split("/")          # as much of the end of the name as is known below the folder
            path = next((found for i in range(len(parts)) if (found := job.files.get("/".join(parts[i:])))), None)
            if path is None:
                job.missing[str(name)] = True
                continue
            record = records.setdefault(path, {"json": {}})
            for key, value in fields.items():
                if key == "caption":
                    value = [c.strip() for c in value if isinstance(c, str) and c.strip()]
                    job.dropped["empty caption"] += len(fields[key]) - len(value)
                where = record if key in ("seg.png", "cls") else record["json"]
                where[key] = where.get(key, []) + value if isinstance(value, list) else value
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, OSError) as error:
        raise UserError(f"{job.sources[0]} is not what --from {layout} expects ({type(error).__name__}: {error})") from None
    if len(job.missing) > 0.1 * (len(job.missing) + len(records)):
        raise UserError(f"{len(job.missing)} of {len(job.missing) + len(records)} images are not under --images {job.images}, more than a tenth "
                        f"(the first: {', '.join(map(repr, list(job.missing)[:3]))}): is it the right folder?")
    kept = [{path.rsplit(".", 1)[1].lower(): path, **record} for path, record in records.items() if record["json"].get("caption") != []]
    job.dropped["image without a caption"] += len(records) - len(kept)
    # Departure: image folders are shuffled, as shards of a single class would give batches of few
    return [kept[i] for i in rng_for(4, 0).permutation(len(kept))] if layout == "folder" else kept


def convert(layout, sources, images, out, url_map=None, per_shard=1000, split="train", annotations=()):
    """Files of another layout and a folder of their images -> <split>-*.tar in `out`, with classes.txt where there are classes. Images are copied as
    they are. Prints what was dropped and why. Raises UserError for files of another layout."""
    documents, dropped = layout in DOCUMENTS, collections.Counter()
    images = images or sources[0] * (layout == "folder")
    if layout == "vqa" and not annotations:
        raise UserError("--from vqa needs --annotations FILE: it holds the answers")
    if layout == "folder" and len(sources) > 1 or per_shard < 1:
        raise UserError(f"--from folder takes one folder, and --per-shard {per_shard} must be at least 1")
    if not os.path.isdir(images) and (images or not all(path.endswith(".tar") for path in sources)):
        raise UserError(f"--images {images or '(not given)'} is no folder: it holds the images, with or without sub-folders")
    files = images_under(images, dropped if layout == "folder" else collections.Counter(), documents) if images else {}
    if url_map:
        files.update({url: files[os.path.basename(name)] for url, name in read_json(url_map).items() if os.path.basename(name) in files})
    job = SimpleNamespace(sources=sources, files=files, images=images, split=split, annotations=annotations, dropped=dropped, classes=[], missing={})
    records = (LAYOUTS[layout](doc, files, dropped) for doc in json_lines(sources, dropped)) if documents else gather(layout, job)
    if job.classes and os.path.exists(f"{out}/classes.txt") and (known := beside([f"{out}/x"], "classes.txt")) != job.classes:
        raise UserError(f"{out}/classes.txt lists other classes ({len(known)}, here {len(job.classes)}): give another folder")
    number = 0
    with new_shards(out, split) as following:
        for made in tqdm(records, "converting", unit="document" if documents else "image", leave=False, disable=None):
            if not made or documents and len(made) == 1:
                dropped["document without an image"] += made is not None
                continue
            if number % per_shard == 0:
                tar = following()
            key, fields = f"{number:09d}", made.pop("json")
            for entry in fields.get("image_info", ()):
                entry["image_name"] = f"{key}.{entry['image_name']}"
            if documents and "images" in fields:
                fields["images"] = [name and f"{key}.{name}" for name in fields["images"]]
            if fields:
                add(tar, f"{key}.json", json.dumps(fields).encode())
            for suffix, value in made.items():
                if isinstance(value, str):
                    with open(value, "rb") as f:
                        value = f.read()
                add(tar, f"{key}.{suffix}", value)
            number += 1
        for name, lines in (("classes", job.classes), (f"missing-{split}", job.missing)):
            if lines and number:
                with open(f"{out}/{name}.txt", "w", encoding="utf-8", errors="replace") as f:
                    f.writelines(f"{line}\n" for line in lines)
    if job.missing:
        dropped[f"image not found in the folder (as jpg, png or webp, once): listed in {out}/missing-{split}.txt"] = len(job.missing)
    print(f"{out}: {number} {'documents' if documents else 'images'}" + (f", {len(job.classes)} classes" if job.classes else "")
          + "".join(f"\n  {n:6} dropped: {reason}" for reason, n in dropped.most_common() if n))
    if not number:
        raise UserError(f"no {'document' if documents else 'image'} of {len(sources)} file(s) could be converted: is --from {layout} right?")


# ---- filter: ALIGN's rules (paper s3) ----

WORD = re.compile(r"\w+(?:['’-]\w+)*")     # ours, in lower case: the paper does not say how it cuts a text into unigrams


def grams(text):
    """Unigrams, and these with the bigrams."""
    words = WORD.findall(text.lower())
    return words, words + [f"{a} {b}" for a, b in zip(words, words[1:])]


def difference_hash(image):
    """64 bits: is a pixel of the grey 9 x 8 image brighter than its right neighbour. Resized, recompressed or slightly noisy copies differ in few."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.LANCZOS))            # smoother filters take more strangers for copies
    return np.packbits(grey[:, :-1] > grey[:, 1:]).view(np.uint64)[0]


def measure(path, rows, texts=True):
    """What the rules need of each sample of a shard: (texts, shorter side, longer side, digest of the image's bytes, difference hash), or the reason
    for which it cannot be used. The sides are those of the original where img2dataset's fields tell them, as shards hold resized images."""
    found = []
    with open(path, "rb") as f:
        for _, offset, span in rows:
            f.seek(offset)
            try:
                sample = Sample(*unpack(f.read(span)))
                code = difference_hash(sample.image(near=128))
                raw = sample.image_bytes()
                sides = [sample.json.get(f"original_{side}") for side in ("width", "height")]
                if not all(isinstance(side, int) and side > 0 for side in sides):
                    sides = Image.open(io.BytesIO(raw)).size
                found.append((sample.captions() if texts else [], *sorted(sides), hashlib.sha256(raw).digest()[:16], code))
            except Skip as reason:
                found.append(str(reason))
    return found


def measured(paths, label, **how):
    """The index of these shards, and measure() of each sample."""
    index = Index(paths)
    rows = [index.rows[a:b].tolist() for a, b in zip(index.starts, index.starts[1:])]
    return index, [*itertools.chain(*spread(functools.partial(measure, **how), index.paths, rows, label=label, least=50))]


def filter_pairs(paths, out, against=(), split="train", min_side=200, max_ratio=3.0, max_texts=1000, max_images=10, min_words=3, max_words=20,
                 most_frequent=100_000_000, distance=4):
    """Samples that pass ALIGN's rules -> <split>-*.tar in `out`, member by member as they are; only a list of captions of which some fail is written
    anew. Prints what each rule dropped. Raises UserError if nothing is left.

    Order (ours): I2, I3, I5 on each sample, then I4 and T1 counted on what is left, T2 on all texts as read; each is counted where it fails first.
    """
    with new_shards(out, split) as following:
        known = measured(against, "hashing", texts=False)[1] if against else []
        hashes = np.array([s[-1] for s in known if not isinstance(s, str)], np.uint64)
        index, samples = measured(paths, "measuring")
        rules = {"I2": f"images whose shorter side is at most {min_side} px", "I3": f"images whose sides are in a ratio of {max_ratio:g} or more",
                 "I5": f"images within {distance} bits of one of {len(hashes)} evaluation images, by difference hash (ours)",
                 "I4": f"images with more than {max_texts} texts", "T1": f"texts of more than {max_images} images",
                 "T2": f"texts with a token outside the {most_frequent} most frequent unigrams and bigrams",
                 "T3": f"texts of less than {min_words} or more than {max_words} unigrams", "left": "samples without a text left"}

        def image_rule(_, short, long, digest, code):
            return ("I2" if short <= min_side else "I3" if long >= max_ratio * short
                    else "I5" if len(hashes) and np.bitwise_count(hashes ^ code).min() <= distance else None)
        reasons = [s if isinstance(s, str) else image_rule(*s) for s in samples]
        pairs = {(s[3], text) for s, reason in zip(samples, reasons) if not reason for text in s[0]}
        texts_of, images_of = (collections.Counter(pair[i] for pair in pairs) for i in (0, 1))
        every, frequent = [text for s in samples if not isinstance(s, str) for text in s[0]], None
        if sum(len(grams(text)[1]) for text in every) > most_frequent:     # else all are frequent, and no table is needed
            counts = collections.Counter(gram for text in every for gram in grams(text)[1])
            frequent = set(heapq.nsmallest(most_frequent, counts, key=lambda gram: (-counts[gram], gram)))

        def text_rule(text):
            words, both = grams(text)
            return ("T1" if images_of[text] > max_images else "T2" if frequent is not None and not frequent.issuperset(both)
                    else "T3" if not min_words <= len(words) <= max_words else None)
        kept, dropped, shard = 0, collections.Counter(), None
        for i, (s, reason) in enumerate(zip(samples, reasons)):
            reason = reason or ("I4" if texts_of[s[3]] > max_texts else None)
            failed = [] if reason else [text_rule(text) for text in s[0]]
            dropped.update(filter(None, failed))
            if reason or all(failed):
                dropped[reason or "left"] += 1
                continue
            if shard != index.rows[i]["shard"]:              # ours hold what is left of one each
                shard, tar = index.rows[i]["shard"], following()
            kept, sample = kept + 1, index[i]
            if any(failed):
                left = {**sample.json, "caption": [text for text, f in zip(s[0], failed) if not f]}
                sample.members["json"] = json.dumps(left).encode()
            for suffix, raw in sample.members.items():
                add(tar, f"{sample.key}.{suffix}", raw)
    print(f"{out}: {kept} of {len(index)} samples kept; dropped:", *(f"{dropped.pop(rule, 0):8} {rule}: {what}" for rule, what in rules.items()),
          *(f"{n:8} {reason}" for reason, n in dropped.items()), "I1 is not applied: the paper does not name its detector",
          *[f"{len(known) - len(hashes)} evaluation images could not be read"] * (len(known) > len(hashes)), sep="\n")
    if not kept:
        raise UserError(f"none of {len(index)} samples is left: the report above says by which rule, a flag sets each threshold")


# ---- bench ----

def view(sample, rng, near, size):
    return {"image": squash(sample.image(near), size, rng)}


def bench(paths, image_size=224, workers=(0, 1, common.cores()), images=2000, repeats=3):
    """Images a second of the Loader, with ALIGN's view, beside Pillow alone, which decodes and resizes the same bytes in one process: medians of
    repeats that are taken in turn."""
    index = Index(paths)
    batch, near = max(1, min(64, images // 8, len(index) // 8)), round(image_size * 346 / 289)
    plan, steps, raws, speed = Plan(index.starts, batch, 0, 16), min(images, len(index)) // batch, [], collections.defaultdict(list)
    for p in range(steps * batch):
        with contextlib.suppress(Skip):
            raws += filter(None, [index[plan.sample(0, p)].image_bytes()])
    if len(raws) < 2 * batch or repeats < 1 or image_size < 1 or min(workers) < 0:
        raise UserError(f"{len(raws)} images to {image_size} px with --repeats {repeats}, --workers {min(workers)}: too few to time anything")

    def alone():
        for i, raw in enumerate(raws):
            with contextlib.suppress(Exception):             # what cannot be decoded the Loader passes over as well
                image = Image.open(io.BytesIO(raw))
                image.draft("RGB", (near, near))
                np.asarray(image.convert("RGB").resize((image_size, image_size), Image.BILINEAR))
            if (i + 1) % batch == 0:
                yield

    def loaded(workers):
        batches = Batches([Rows(index, plan, functools.partial(view, near=near, size=image_size))], batch)
        loader = Loader(batches, 0, SimpleNamespace(workers=workers, steps=steps), torch.device("cpu"))
        for _ in range(steps):
            yield next(loader)
        loader.close()
    for _ in range(repeats):
        for n in (None, *workers):
            ends = [time.perf_counter() for _ in (alone() if n is None else loaded(n))][min(n or 0, steps - 2):]     # not the workers' start
            speed[n].append((len(ends) - 1) * batch / (ends[-1] - ends[0]))
    print(f"{steps * batch} images to {image_size} px, median of {repeats}")
    for n, rates in speed.items():
        ratio = statistics.median(rates) / statistics.median(speed[None])
        print(f"{'Pillow alone' if n is None else f'--workers {n}':>14} {statistics.median(rates):9.0f} images/s {ratio:6.2f} x Pillow alone")


# ---- command line ----

def check(paths):
    """Read every sample of these shards as training would; print what is wrong. Returns whether anything is."""
    index = Index(paths)
    wrong, where = collections.Counter(), {}
    for i in tqdm(range(len(index)), "checking", unit="sample", leave=False, disable=None):
        try:
            sample = index[i]
            if sample.is_document():                         # its pictures are members 0.jpg, 1.jpg, ...
                pictures = [Sample(sample.key, {"jpg": raw}) for suffix, raw in sample.members.items() if suffix.endswith(IMAGES)]
            else:
                pictures = [sample]
                if "cls" in sample.members:
                    sample.label()
                given = {*sample.members, *sample.json}
                if given & {"txt", "caption"} or not given & {"cls", "label", "segments", "boxes", "qa", "seg.png"}:
                    sample.captions()
            for picture in pictures:
                picture.image()
            if pictures != [sample]:                         # its lists may be none, or name no picture that is there
                sample.document(rng_for(0), near=1, least=-np.inf)
            reasons = ["caption not UTF-8"] * sample.damaged_text
        except Skip as reason:
            reasons = [str(reason)]
        for reason in reasons:
            wrong[reason] += 1
            where.setdefault(reason, f"{index.paths[index.rows[i]['shard']]}, sample {i - index.starts[index.rows[i]['shard']]}")
    for path, notes in index.notes.items():
        for note, n in notes.items():
            wrong[note] += n
            where.setdefault(note, path)
    print(index.summary() + ": "
          + ("nothing wrong" if not wrong else "\n  " + "\n  ".join(f"{n:6} {reason} (first: {where[reason]})" for reason, n in wrong.most_common())))
    return bool(wrong)


def main(argv=None):
    parser = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="make|index|check|vocab|filter|convert|bench")
    for name, note in (("index", "locate the samples of shards, and say what is odd about the archives"),
                       ("check", "read every sample; exit 1 if any cannot be used"), ("vocab", "train a vocabulary on captions"),
                       ("filter", "drop what ALIGN's rules drop, with the paper's thresholds"),
                       ("bench", "speed of the loader beside the bare decoding of the same bytes")):
        tasks.add_parser(name, help=note, allow_abbrev=False).add_argument("shards", nargs="+")
    make, rules = tasks.add_parser("make", help="write the built-in world", allow_abbrev=False), tasks.choices["filter"]
    make.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    rules.add_argument("--out", required=True)
    rules.add_argument("--against", nargs="+", default=[], metavar="SHARDS", help="evaluation sets, whose near-duplicates are dropped")
    rules.add_argument("--split", choices=SPLITS, default="train", help="the name of the shards [train]")
    tasks.choices["bench"].add_argument("--workers", type=int, nargs="+", default=[0, 1, common.cores()], help=f"[0 1 {common.cores()}]")
    for name, default, note in (("make root", "runs", ""), ("make scenes", 20000, ""), ("make documents", 4000, ""), ("make seed", 0, ""),
                                ("make noise", 0.0, ""), ("vocab size", 32_000, "number of ids"), ("vocab out", "vocab.json", ""),
                                ("bench image-size", 224, ""), ("bench images", 2000, ""), ("bench repeats", 3, ""),
                                ("filter min-side", 200, "I2: shorter sides are above this, in pixels"),
                                ("filter max-ratio", 3.0, "I3: longer / shorter side is below this"), ("filter distance", 4, "I5: bits of 64, ours"),
                                ("filter max-texts", 1000, "I4: of an image"), ("filter max-images", 10, "T1: of a text"),
                                ("filter most-frequent", 100_000_000, "T2: this many unigrams and bigrams are not rare"),
                                ("filter min-words", 3, "T3"), ("filter max-words", 20, "T3")):
        task, name = name.split()
        tasks.choices[task].add_argument(f"--{name}", type=type(default), default=default, help=f"{note} [{default}]".strip())
    other = tasks.add_parser("convert", help="write another layout as shards", allow_abbrev=False)
    other.add_argument("sources", nargs="+", metavar="FILE", help="mmc4, obelics: .jsonl or .jsonl.zip; flamingo: .tar; captions, instances, vqa: "
                       ".json; flickr30k: its text file; ade20k: the folder of the masks; folder: the folder of the class folders")
    other.add_argument("--from", dest="layout", choices=LAYOUTS, required=True)
    other.add_argument("--images", help="folder of the images, searched with its sub-folders; not for flamingo and folder")
    other.add_argument("--annotations", nargs="+", default=(), metavar="FILE", help="vqa: the files of the answers")
    other.add_argument("--map", dest="url_map", help="JSON file {url: file name}, where documents name images by URL")
    other.add_argument("--split", choices=SPLITS, default="train", help="the shards' name, and the part of Karpathy's files that is taken [train]")
    other.add_argument("--per-shard", type=int, default=1000, help="samples in a shard [1000]")
    other.add_argument("--out", required=True)
    args = vars(parser.parse_args(argv))
    task, paths = args.pop("task"), expand(args.pop("shards", []))
    if task == "make":
        print(make_world(**args))
    elif task == "convert":
        convert(**args)
    elif task == "filter":
        filter_pairs(paths, against=expand(args.pop("against"), "test"), **args)
    elif task == "bench":
        bench(paths, **args)
    elif task == "check":
        sys.exit(int(check(paths)))
    elif task == "vocab":
        tokenizer = Tokenizer.train(first_captions(Index(paths)), args["size"])
        tokenizer.save(args["out"])
        print(f"{args['out']}: {tokenizer.vocab_size} ids")
    else:
        index = Index(paths)
        print("\n".join([index.summary(), *index.oddities()]))


if __name__ == "__main__":
    common.guard(main)
