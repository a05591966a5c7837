"""Speed as ratios, each measured in one run: medians of interleaved repeats.

    python tests/bench.py                # all subjects but the long one
    python tests/bench.py mug timix      # some of them
    python tests/bench.py long           # does anything grow? some minutes, Linux
"""
import argparse, contextlib, functools, os, statistics, sys, tempfile, time
from dataclasses import replace
from types import SimpleNamespace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import common
import torch

import align
import data
import lcl
import timix
from common import ViT

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DOCS = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "shared", "data", "docs", "train-*.tar")


def seconds(routes, repeats=3):
    """{name: median seconds}, the routes taken in turn, after one round that does not count."""
    taken = {name: [] for name in routes}
    for turn in range(repeats + 1):
        for name, route in routes.items():
            began = time.perf_counter()
            route()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            taken[name] += [time.perf_counter() - began] * (turn > 0)
    return {name: statistics.median(t) for name, t in taken.items()}


def forward_and_backward(module, *args):
    def route():
        module.zero_grad(set_to_none=True)
        with common.autocast(SimpleNamespace(precision="auto"), DEVICE):
            out = module(*args)
        out.float().square().mean().backward()
    return route


def mug_encoder():
    """Encoder of the visible quarter beside the whole, ViT-B/16 at 224."""
    model, images = ViT(224, 16, 768, 12, 12, fixed=True).to(DEVICE), torch.randn(4, 3, 224, 224, device=DEVICE)
    keep = torch.rand(4, 196, device=DEVICE).argsort(1)[:, :49]
    t = seconds({"quarter": forward_and_backward(model, images, keep), "whole": forward_and_backward(model, images)})
    yield "MUG encoder, ratio 0.75 / ratio 0", t["quarter"] / t["whole"], "<= 0.35"


def lcl_packing():
    """Rows of 2,048 tokens, images of 49: how full they are, and useful tokens a second through the language model."""
    index = data.Index(data.expand(DOCS))
    cfg = lcl.Config(image_size=112, context=2048, text_dim=128, text_depth=2, text_heads=2, vocab_size=8192)
    tokenizer, documents = data.Tokenizer.train(data.first_captions(index), cfg.vocab_size), []
    for i in range(len(index)):
        try:
            documents.append(lcl.example(index[i], data.rng_for(0, i), cfg, tokenizer))
        except data.Skip:
            pass
    fill = {}
    for pack in (True, False):
        cfg.pack, full = pack, []
        for start in range(0, len(documents) - 63, 64):
            full.append((lcl.pack(documents[start:start + 64], cfg)["doc"] >= 0).float().mean().item())
        fill[pack] = statistics.mean(full)
    yield "LCL fill of packed rows, real documents, 64 at a time", fill[True], ">= 0.85"
    yield "LCL fill of padded rows", fill[False], "-"
    blocks = torch.nn.ModuleList(common.Block(cfg.text_dim, cfg.text_heads) for _ in range(2)).to(DEVICE)
    routes, useful = {}, {}
    for pack in (True, False):
        cfg.pack = pack
        batch = lcl.pack(documents[:8], cfg)
        x, useful[pack] = torch.randn(*batch["ids"].shape, cfg.text_dim, device=DEVICE), (batch["doc"] >= 0).sum().item()
        mask = lcl.same_document(batch["doc"].to(DEVICE))
        routes[pack] = forward_and_backward(_Trunk(blocks), x, mask)
        fill[pack] = (batch["doc"] >= 0).float().mean().item()
    t = seconds(routes)
    gain = (useful[True] / t[True]) / (useful[False] / t[False])
    yield "LCL useful tokens a second, packed / padded, over the ratio of their fill", gain / (fill[True] / fill[False]), ">= 0.85"


class _Trunk(torch.nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, x, mask):
        return common.run_blocks(self.blocks, x, mask)


def m3i_mixture():
    """One pass over a mixture of two images beside a masked pass for each, masked patches replaced (as a CNN must) or left out (as a ViT can)."""
    model, images = ViT(224, 16, 768, 12, 12).to(DEVICE), torch.randn(4, 3, 224, 224, device=DEVICE)
    keep = torch.rand(8, 196, device=DEVICE).argsort(1)[:, :98]
    t = seconds({"mixture": forward_and_backward(model, images), "replaced": forward_and_backward(model, images.repeat(2, 1, 1, 1)),
                 "left out": forward_and_backward(model, images.repeat(2, 1, 1, 1), keep)})
    yield "M3I encoder, one mixture / two masked passes, masked patches replaced", t["mixture"] / t["replaced"], "<= 0.6"
    yield "M3I encoder, one mixture / two masked passes, masked patches left out", t["mixture"] / t["left out"], "-"


def timix_mixed_pass():
    """What mixing adds to a step on clean pairs and region images: all of it, and what is not an encoder pass. ViT-S, the released proportions."""
    cfg = timix.Config(dim=384, heads=6, text_dim=384, text_heads=6, batch=16, block=16)
    model = timix.TiMix(cfg).to(DEVICE)
    n, L, R = model.vision.grid, cfg.context, cfg.batch // 2
    pictures = lambda rows: torch.randint(0, 256, (rows, 3, cfg.image_size, cfg.image_size), dtype=torch.uint8, device=DEVICE)
    words = lambda *rows: torch.randint(8, 1000, (*rows, L), device=DEVICE)
    true = lambda *shape: torch.ones(*shape, dtype=torch.bool, device=DEVICE)
    batch = dict(images=pictures(cfg.batch), tokens=words(cfg.batch), valid=true(cfg.batch, L), region_images=pictures(R),
                 region_tokens=words(R, cfg.entries), region_valid=true(R, cfg.entries, L), region_patches=true(R, cfg.entries, n * n),
                 region_used=true(R, cfg.entries))
    noise = torch.rand(cfg.batch, 2 * L + 2 * cfg.block + n * n)

    def step(mixing):
        model.zero_grad(set_to_none=True)
        sum(timix.losses(model, batch, noise, common.generator(0), cfg, 1.0, mixing)[0].values()).backward()

    def mixing():
        mix = timix.text_aware_mix(batch["images"], noise[:, -n * n:].to(DEVICE), n // 2, cfg.block)
        timix.soft_labels(cfg.targets, mix, cfg.block, noise[:, :cfg.batch].to(DEVICE), noise[:, :cfg.batch].to(DEVICE))
    t = seconds({"clean": lambda: step(False), "mixed": lambda: step(True), "mixing": mixing})
    yield "TiMix, mixing alone (scores to images and labels) / step", t["mixing"] / t["mixed"], "<= 0.03"
    yield "TiMix, mixed pass / clean step", t["mixed"] / t["clean"] - 1, "<= 0.6"


def long_runs():
    """20,000 loader batches, then 2,000 tiny steps, of their workers too: does anything grow? The last quarter beside the first."""
    def probe():                                             # of this process and its workers
        own, kilobytes, files, threads = os.getpid(), 0, 0, 0
        with open(f"/proc/{own}/task/{own}/children") as f:
            pids = [str(own), *f.read().split()]
        for pid in pids:
            with open(f"/proc/{pid}/status") as f:
                status = dict(line.split(":", 1) for line in f)
            kilobytes, threads = kilobytes + int(status["VmRSS"].split()[0]), threads + int(status["Threads"])
            files += len(os.listdir(f"/proc/{pid}/fd"))
        return kilobytes, files, threads

    def rows(name, seen):
        quarter = len(seen) // 4
        for what, column in zip(("resident memory", "open files", "threads"), zip(*seen)):
            ratio = statistics.mean(column[-quarter:]) / statistics.mean(column[:quarter])
            yield f"{name}, {what}: last quarter / first, {column[-1]:,} at the end", ratio, "<= 1.05"

    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        shards = data.make_world(root=folder, scenes=2000, parts=("pairs",)) + "/pairs"
        cfg = align.Config(data=[shards], val=[shards], out=f"{folder}/run", image_size=16, patch=8, dim=16, depth=1, heads=2, text_dim=16,
                           text_depth=1, text_heads=2, context=16, vocab_size=300, batch=4, steps=20_000, workers=1, eval_every=-1, save_every=100)
        index = data.Index(data.expand(cfg.data))
        source = data.Rows(index, data.Plan(index.starts, cfg.batch, 0, 64), functools.partial(align.example, cfg=cfg, tokenizer=data.Tokenizer()))
        batches, seen = data.Loader(data.Batches([source], cfg.batch), 0, cfg, torch.device("cpu")), []
        for step in range(cfg.steps):
            next(batches)
            seen += [probe()] if step % 100 == 50 else []
        batches.close()
        yield from rows("20,000 loader batches", seen)
        following, seen = common.Log.next, []
        common.Log.next = lambda log, batches: seen.append(probe()) or following(log, batches)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            align.main(replace(cfg, steps=2000))
        common.Log.next = following
        yield from rows("2,000 steps", seen)


SUBJECTS = {"mug": mug_encoder, "lcl": lcl_packing, "m3i": m3i_mixture, "timix": timix_mixed_pass, "long": long_runs}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=", ".join(SUBJECTS))
    subjects = parser.parse_args().subjects or [s for s in SUBJECTS if s != "long"]
    if unknown := set(subjects) - SUBJECTS.keys():
        parser.error(f"{', '.join(unknown)}: choose of {', '.join(SUBJECTS)}")
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}\n\n| subject | measured | goal |\n|---|---|---|")
    for subject in subjects:
        for row in SUBJECTS[subject]():
            print(f"| {row[0]} | {row[1]:.3f} | {row[2]} |", flush=True)
