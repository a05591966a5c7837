"""Damages shards and documents in every way we could think of and reads each as a training run and `data.py check` would.

    python tests/fuzz.py                                         # 500 variants, a minute or two
    python tests/fuzz.py --variants 40 --seed 1 cut_anywhere     # one kind of damage

Never a crash, a hang, a leak, a write outside the cache or a silent loss: what was not damaged is delivered as it was, what is passed over has
a reason of data.REASONS, or a note where the tar itself is broken, and check tells. Exit code 1 if not.
"""
import argparse, collections, contextlib, copy, glob, gzip, io, json, os, signal, sys, tarfile, tempfile, threading, traceback
from pathlib import Path
from types import SimpleNamespace

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
sys.dont_write_bytecode = True                               # a late import would write beside its source

import align
import lcl
import numpy as np
from PIL import Image

import data
from common import UserError

CFG = SimpleNamespace(image_size=16, patch=8, resize=1.0, scale=1.0, flip=False, context=16384, similarity=0, max_images=6, image_first=0.5)
STORED = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}          # EXIF orientation -> the Image.Transpose in which an upright picture is stored
KEYS = ["/etc/passwd", "../../../evil", "a/../../b", "~/evil", "$(touch evil)", "C:\\evil", "two\nlines", "caf\udce9", "l/" * 200 + "x", " "]
NAMES = ["nodot", "x/.jpg", "x/__meta.jpg__", "other.jpg", "OTHER.JPG", "../x.exe", ".."]
JUNK = [None, 7, -1, True, 10 ** 400, float("nan"), float("-inf"), "", "x", "../../etc/passwd.jpg", "\ud800", [], [[]], [None, 5], {}, {"a": []}]
LINKS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
X, G, L = tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME


class Hang(BaseException):                                   # no Exception: Sample.image takes each of those for an unreadable picture
    def raised(*_):
        raise Hang


class Shard:
    """Samples [key, {suffix: bytes}] to be damaged; raw is what the file will hold.

    Samples neither hurt nor behind must come out as they went in; those behind a broken header may be missing if that is noted. wrong: must check
    tell (None: if a reason or a note is given)? becomes: (suffix, picture or reason) or (None, caption), which the hurt sample must give.
    """
    def __init__(self, samples, rng):
        self.samples, self.rng = [[key, dict(members)] for key, members in samples], rng
        self.hurt, self.behind, self.wrong, self.becomes, self.raw, self.stats, self.later = set(), set(), None, (), None, None, None

    def any(self, choices):
        return choices[int(self.rng.integers(len(choices)))]

    def pack(self):
        """The samples as a tar; heads: each header's place, key and size."""
        out, self.heads = io.BytesIO(), []
        with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for key, members in self.samples:
                for suffix, raw in members.items():
                    self.heads.append((tar.offset, key, len(raw)))
                    data.add(tar, suffix if suffix in NAMES else f"{key}.{suffix}", raw)
            self.end = tar.offset
        self.raw = bytearray(out.getvalue())
        return self.raw

    def splice(self, at, until, new):
        """Other bytes in raw: hurts the samples there, puts the later ones behind."""
        self.raw[at:until] = new
        first, last = ([key for start, key, _ in self.heads if start <= place][-1] for place in (at, max(at, until - 1)))
        keys = [key for key, _ in self.samples]
        self.hurt, self.behind = set(keys[keys.index(first):keys.index(last) + 1]), set(keys[keys.index(last) + 1:])

    def victim(self):
        key, members = self.any(self.samples)
        self.hurt = {key}
        return members

    def fields(self, change):
        """change(fields) of a sample's json, which then alone tells the caption."""
        members = self.victim()
        fields, text = json.loads(members.get("json", b"{}")), members.pop("txt", None)
        fields.update({"caption": text.decode()} if text else {})
        change(fields)
        members["json"] = json.dumps(fields).encode()

    def say(self, text):
        self.fields(lambda f: f["text_list"].__setitem__(0, text) if "text_list" in f else f.update(caption=text))
        self.wrong, self.becomes = False, (None, json.loads(json.dumps(text)))                   # two surrogates can meet and make a letter

    def show(self, becomes, raw):
        members = self.victim()
        suffix = self.any([s for s in members if s.endswith(data.IMAGES) and s != "seg.png"])
        members[suffix] = raw(members[suffix]) if callable(raw) else raw
        self.wrong, self.becomes = isinstance(becomes, str) if becomes else None, (suffix, becomes) if becomes else ()


def header(name, size=0, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info.tobuf(tarfile.GNU_FORMAT)


def extended(kind, raw, told=None):
    return header("x", len(raw) if told is None else told, kind) + raw + bytes(-len(raw) % 512)


def sparse(size):
    """GNU's sparse file, of which nothing is stored, whatever size it tells."""
    block = bytearray(header("sparse.jpg", 0, tarfile.GNUTYPE_SPARSE))
    block[386:410], block[483:495], block[148:156] = b"%011o\0%011o\0" % (size, 0), b"%011o\0" % size, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def encoded(image, kind="PNG", **how):
    image.save(out := io.BytesIO(), kind, **how)
    return out.getvalue()


def smooth(rng, mode="RGB"):
    """A picture that no codec changes much and every turn does."""
    y, x = np.mgrid[:32, :48] * 5 + int(rng.integers(10))
    return Image.fromarray(np.stack([x, y, 255 - x * y // 255], -1).astype(np.uint8)).convert(mode)


class Damages:
    """Each takes a Shard, hurts it, and sets what must be found out."""
    nothing = lambda s: setattr(s, "wrong", False)

    def cut_anywhere(s):
        at = int(s.rng.integers(1, len(s.pack())))
        if at < s.end:
            s.splice(at, at + 1, b"")
        del s.raw[at:]
        s.wrong = at < s.end + 512

    def bit_flipped_in_a_header(s):                          # one, as two can cancel in the check sum
        s.pack()
        at = s.any(s.heads)[0] + int(s.rng.integers(512))
        s.splice(at, at + 1, bytes([s.raw[at] ^ 1 << int(s.rng.integers(8))]))

    def bits_flipped_in_a_body(s):
        s.pack()
        at, key, size = s.any(s.heads)
        for place in s.rng.integers(at + 512, at + 512 + min(size, s.any([100, size])), 10):     # half of the times where a picture has its header
            s.raw[place] ^= 1 << int(s.rng.integers(8))
        s.hurt = {key}

    def hole_of_zeros(s):
        s.pack()
        end = s.heads[-1][0]                                 # the last member zeroed to its end looks like the end of a shorter archive
        at = s.any([s.any(s.heads[:-1])[0], int(s.rng.integers(end))])
        until = min(end, at + s.any([512, 8192]))
        s.splice(at, until, bytes(until - at))

    def bytes_lost_or_added(s):
        s.pack()
        at, n = int(s.rng.integers(s.end - 512)), int(s.rng.integers(1, 512))
        s.splice(at, *s.any([(at, s.rng.bytes(n)), (at + n, b"")]))

    def header_tells_another_size(s):
        s.pack()
        at, _, size = s.any(s.heads)
        info = tarfile.TarInfo.frombuf(s.raw[at:at + 512], "utf-8", "surrogateescape")
        info.size = s.any([0, size // 2, size + 512, 2 ** 31, 2 ** 40, 2 ** 63, 2 ** 80, -1, -512, -2 ** 40])
        s.splice(at, at + 512, info.tobuf(tarfile.GNU_FORMAT))

    def hostile_header(s):
        s.pack()
        at = s.any(s.heads)[0]
        s.splice(at, at, s.any([
            *(extended(kind, b"", told) for kind in (X, G, L) for told in (2 ** 35, 2 ** 40, 2 ** 70, -512)), 3000 * extended(L, b"x.jpg"),
            *(extended(kind, b"12 size=512\n") + header("x.jpg", -512) for kind in (X, G)), *map(sparse, (100, 5000, 2 ** 32)),
            *(extended(kind, record) for kind in (X, G) for record in (b"16 size=-999999\n", b"17 size=99999999\n"))]))

    def sparse_file_at_the_end(s):
        s.pack()
        s.raw[s.end:s.end], s.wrong = sparse(2 ** s.any([25, 32])), True

    def links_and_devices(s):
        s.pack()
        for at, key, _ in reversed(s.heads):
            s.raw[at:at] = header(s.any([f"{key}.webp", "/tmp/evil.jpg", "../evil.txt"]), 0, s.any(LINKS), s.any(["/etc/passwd", "../../evil"]))
        s.wrong = False

    def hostile_keys(s):
        s.samples, s.wrong = [[f"{s.any(KEYS)}{i}", members] for i, (_, members) in enumerate(s.samples)], False

    def renamed_member(s):
        members, name = s.victim(), s.any(NAMES)
        renamed = s.any(list(members))
        for suffix in list(members):                         # their order stays
            members[name if suffix == renamed else suffix] = members.pop(suffix)

    def duplicate_keys(s):
        at = int(s.rng.integers(len(s.samples)))
        place = s.any([at + 1, len(s.samples)])
        s.wrong = place == at + 1
        s.samples.insert(place, s.samples[at])

    def two_archives_in_one(s):
        whole, half = s.samples, int(s.rng.integers(1, len(s.samples)))
        s.behind, s.wrong = {key for key, _ in whole[half:]}, True
        s.raw = Shard(whole[:half], s.rng).pack() + Shard(whole[half:], s.rng).pack()

    def no_tar_at_all(s):
        page = b"<!DOCTYPE html><title>403 Forbidden</title>"
        s.raw = s.any([b"", page, page * 500, gzip.compress(s.pack(), mtime=0), s.rng.bytes(5000), b"\x1f\x8b"])
        s.hurt, s.wrong = {key for key, _ in s.samples}, True

    def changed_after_it_was_indexed(s):
        raw = s.pack()
        new = s.any([None, b"", raw[:int(s.rng.integers(s.end))], bytes(len(raw)), Shard(s.samples[::-1], s.rng).pack(), header("0.jpg", -512) * 999])
        s.later = os.remove if new is None else lambda path: Path(path).write_bytes(new)
        s.hurt, s.wrong = {key for key, _ in s.samples}, False

    def broken_stats(s):
        s.stats, s.wrong = s.any([b"", b"[" * 10000, b"\xff", b"[]", b'{"successes": NaN}', b'{"successes": "\\ud800\\n"}']), True

    ten_thousand_pixels_a_side = lambda s: s.show("too many pixels", encoded(Image.new("1", (10_000, 10_000))))
    gif_of_100_frames = lambda s: s.show("unreadable image", encoded(smooth(s.rng), "GIF", save_all=True, append_images=[
        Image.new("RGB", (48, 32), (i, 0, 0)) for i in range(99)]))
    broken_picture = lambda s: s.show("unreadable image", s.any([
        b"", b"\xff\xd8", b"<svg/>", bytes(999), s.rng.bytes(999), lambda raw: raw[:len(raw) // 2], encoded(smooth(s.rng))[:60],
        encoded(smooth(s.rng), "TIFF"), encoded(smooth(s.rng), "BMP")]))
    odd_picture = lambda s: s.show(None, s.any([
        *(encoded(Image.new("RGB", size)) for size in ((1, 1), (1, 5000), (5000, 1))), lambda raw: raw + s.rng.bytes(3000),
        encoded(smooth(s.rng), "JPEG", exif=b"Exif\0\0" + s.rng.bytes(500))]))
    megabyte_caption = lambda s: s.say(s.any([
        "a red circle " * 80_000, "x" * 2 ** 20, "\u4e00" * 2 ** 20, " \n" * 10 + "y\0" * 2 ** 19, "<img> [MASK] " * 80_000]))
    nul_and_lone_surrogates = lambda s: s.say("".join(
        s.any(["\0", "\ud800", "\udfff", "\ufeff", "\u202e", "e", "\U0001f600", " "]) for _ in range(50)) + "!")

    def turned_by_exif(s):
        picture, how, exif = smooth(s.rng), s.any(list(STORED)), Image.Exif()
        exif[0x0112] = how
        s.show(picture, encoded(picture.transpose(STORED[how]), s.any(["JPEG", "PNG", "WEBP"]), exif=exif))

    def unusual_picture(s):
        plain, grey = smooth(s.rng), smooth(s.rng, "L")
        frames, deep = [Image.new("RGB", plain.size)] * 9, Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
        s.show(*s.any([(plain, encoded(plain.convert("CMYK"), "JPEG")), (plain, encoded(plain, "JPEG", progressive=True)), (grey, encoded(deep)),
                       (plain, encoded(plain.quantize(256), transparency=0)), (plain, encoded(plain.convert("RGBA"))),
                       (grey, encoded(grey.convert("LA"))), (grey, encoded(grey, "JPEG")),
                       *((plain, encoded(plain, kind, save_all=True, append_images=frames)) for kind in ("PNG", "WEBP"))]))

    def text_that_is_not_utf8(s):
        members = s.victim()
        members["json" if b"text_list" in members["json"] else "txt"], s.wrong = b"caf\xe9 \xff" + s.rng.bytes(20), True

    def empty_caption(s):
        s.say(s.any(["", " \n\t\u3000 "]))
        s.wrong, s.becomes = None if any(b"text_list" in members["json"] for _, members in s.samples) else True, ()

    def json_of_depth_10000(s):
        s.victim()["json"] = s.any([b'{"caption": %s1%s}', b"%s1%s", b'{"text_list": %s1%s}']) % (b"[" * 10_000, b"]" * 10_000)
        s.wrong = True

    def json_with_nan_and_other_types(s):
        def change(place):
            while isinstance(place, (dict, list)) and place:
                at = s.any(list(place) if isinstance(place, dict) else range(len(place)))
                if not isinstance(place[at], (dict, list)) or s.rng.random() < 0.4:
                    place[at] = copy.deepcopy(s.any(JUNK))
                    break
                place = place[at]
        s.fields(lambda fields: [change(fields) for _ in range(3)])

    def broken_json(s):
        members = s.victim()
        members["json"] = s.any([b"", b"[]", b"5", b"null", b"\xff", b'{"caption": "x"', b"{}", b'{"texts": [], "images": []}', members["json"][:-9]])


KINDS = {name: function for name, function in vars(Damages).items() if not name.startswith("_")}


def sources(root):
    """[(samples, example)]: pairs and documents of the built-in world, and real ones where they lie beside the project."""
    world = data.make_world(root=root, scenes=64, documents=32, parts=("pairs", "docs"))
    folders = [f"{folder}/{part}" for folder in (world, os.path.join(os.path.dirname(ROOT), "shared", "data")) for part in ("pairs", "docs")]
    indices = [data.Index(sorted(glob.glob(f"{folder}/train-*.tar"))[:1]) for folder in folders if os.path.isdir(folder)]
    tokenizer = data.Tokenizer.train(data.first_captions(indices[0]), 400)
    found = []
    for index in indices:
        samples = [(s.key, s.members) for s in map(index.__getitem__, range(32))]
        script = lcl if b"text_list" in samples[0][1]["json"] else align
        made = lambda sample, rng=None, example=script.example: example(sample, data.rng_for(9), CFG, tokenizer)     # whichever place it is read at
        found.append((samples, made))
        for key, members in samples:                         # what the variants are held to is itself held to Pillow and the text
            sample, fields, row = data.Sample(key, members), json.loads(members["json"]), made(data.Sample(key, members))
            for suffix in (s for s in members if s.endswith(data.IMAGES)):
                assert np.array_equal(sample.image(member=suffix), Image.open(io.BytesIO(members[suffix])).convert("RGB")), key
            texts = [members["txt"].decode()] if "txt" in members else fields.get("caption") or [" ".join(fields["text_list"])]
            assert tokenizer.decode(row["ids" if script is lcl else "tokens"]).split() in [text.split() for text in texts], key
    return found


def check_given(sample, suffix, wanted):
    """The picture of that suffix, the texts where it is None, or the reason why there is none, must be the wanted one."""
    try:
        if suffix:
            found = sample.image(member=suffix)
            near = not isinstance(wanted, str) and found.size == wanted.size and \
                np.abs(np.asarray(found, int) - np.asarray(wanted.convert("RGB"), int)).mean() < 6
        else:
            found = sample.document(data.rng_for(0), least=0) if "text_list" in sample.json else sample.captions()
            near = wanted in found or " ".join(wanted[:data.MAX_CAPTION].split()) in found
    except data.Skip as reason:
        found = str(reason)
        near = found == wanted
    assert near, f"{suffix or 'text'} should be {wanted!r:.80} and is {found!r:.80}"


def told(path):
    """What data.py check says of a shard: (is anything wrong, the text)."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        try:
            wrong = data.check([path])
            text = out.getvalue()
            assert wrong != ("nothing wrong" in text), text
        except UserError as error:
            wrong, text = True, str(error)
            assert "\n" not in text, f"more than one line: {text}"
    text.encode()                                            # a lone surrogate could not be printed
    return wrong


def read(shard, path, other, beside, made):
    """Counts of what became of a shard's samples, read with the intact shard `other` behind it; AssertionError if anything is not as it must be."""
    counts, reasons, before, seen = collections.Counter(), set(), told(path), {}
    try:
        index = data.Index([path, other])
    except UserError as error:
        assert "\n" not in str(error) and before and len(shard.hurt) == len(shard.samples), error
        return collections.Counter(refused=len(shard.samples))
    if shard.later:
        shard.later(path)
    for i in range(len(index)):
        try:
            sample = index[i]
            if sample.key in shard.hurt and shard.becomes:
                check_given(sample, *shard.becomes)
            seen[sample.key] = made(sample)
            counts["delivered"] += int(i < index.starts[1])
            reasons |= {"caption not UTF-8"} if sample.damaged_text else set()
        except data.Skip as reason:
            counts[str(reason)] += 1
            reasons.add(str(reason))
    try:
        data.first_captions(index)                           # for the vocabulary
    except UserError as error:
        assert "no caption in the first shard" in str(error), error

    rows, skipped = [], collections.Counter()
    source = data.Rows(index, data.Plan(index.starts, 1, 0, 4), lambda sample, _: rows.append(sample.key) or made(sample))
    for step in range(len(index)):
        source(step, 0, skipped)
    assert set(+skipped) == reasons <= set(data.REASONS), f"{reasons} of the samples, {set(+skipped)} of an epoch"
    notes = index.notes.get(path, {})
    assert notes or index.starts[1] >= len(shard.samples), f"{len(shard.samples) - index.starts[1]} samples lost silently"
    for key, members in [*shard.samples, *beside]:
        if key not in shard.hurt and not (key in shard.behind and notes and key not in seen):
            wanted, found = made(data.Sample(key, members)), seen.get(key, {})
            assert key in rows and all(np.array_equal(wanted[name], found.get(name)) for name in wanted), f"intact sample {key!r} is lost or another"
    hidden = reasons - {"no caption", "no image left"}       # a label needs no caption; a document's images may be beyond the context
    wrong = bool(notes or hidden) if shard.wrong is None else shard.wrong
    assert before == wrong or shard.wrong is None and before, f"check says {before}, wrong is {wrong}: {dict(counts)} {notes}"
    counts.update({f"note: {note}": n for note, n in notes.items()})
    return counts


def variant(kind, seed, number, source, root, outside):
    """One damaged shard -> (counts, what is wrong with it or None)."""
    samples, made = source
    rng = data.rng_for(seed, number)
    first, path, other = int(rng.integers(len(samples) - 10)), f"{root}/{number}.tar", f"{root}/{number}-other.tar"
    shard, beside = Shard(samples[first:first + 8], rng), samples[first + 8:first + 10]
    KINDS[kind](shard)
    Path(path).write_bytes(shard.raw if shard.raw is not None else shard.pack())
    Path(other).write_bytes(Shard(beside, rng).pack())
    if shard.stats is not None:
        Path(f"{root}/{number}_stats.json").write_bytes(shard.stats)
    files, threads, counts = len(os.listdir("/dev/fd")), threading.active_count(), collections.Counter()
    try:
        signal.alarm(60)
        counts = read(shard, path, other, beside, made)
        signal.alarm(0)
        left = len(os.listdir("/dev/fd")) - files
        assert not left and threading.active_count() == threads, f"{left} files and {threading.active_count() - threads} threads are left open"
        assert not outside, f"outside the cache: {outside}"
    except (Exception, Hang) as error:
        return counts, f"{error!r:.300} at " + " < ".join(f"{f.name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[:-6:-1])
    finally:
        signal.alarm(0)
        outside.clear()
    return counts, None


def watch(root, outside):
    """Notes in `outside` whatever is executed, connected, linked or opened for writing outside root."""
    def hook(event, args):
        if event.startswith(("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.symlink", "os.link", "os.fork", "socket.connect")) or (
                event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR) or event in ("os.mkdir", "os.rename")) and not str(args[0]).startswith(root):
            outside.append((event, str(args[0])))
    sys.addaudithook(hook)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], metavar="KIND")
    parser.add_argument("--variants", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.kinds = args.kinds or list(KINDS)
    counts, wrong, outside = {kind: collections.Counter() for kind in args.kinds}, collections.defaultdict(list), []
    signal.signal(signal.SIGALRM, Hang.raised)
    with tempfile.TemporaryDirectory() as root:
        os.environ["XDG_CACHE_HOME"] = f"{root}/cache"
        found = sources(root)
        watch(root, outside)
        for number in range(args.variants):
            kind, source = args.kinds[number % len(args.kinds)], found[number // len(args.kinds) % len(found)]
            result, problem = variant(kind, args.seed, number, source, root, outside)
            counts[kind].update(variants=1, **result)
            if problem:
                wrong[kind].append(f"variant {number}: {problem}")
    for kind in args.kinds:
        told = [f"{n} {what}" for what, n in counts[kind].items()]
        print(f"{kind}: {', '.join(told)}", *wrong[kind], sep="\n    ")
    print(f"{args.variants} variants, {sum(map(len, wrong.values()))} of them wrong")
    sys.exit(any(wrong.values()))


if __name__ == "__main__":
    main()
