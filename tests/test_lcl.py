"""LCL's documents, rows, model, contrast and training run against the oracles of its specification."""
import io, itertools, json, math, os, zipfile
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import conftest
import data
import lcl
from common import UserError, unit
from data import Sample, Skip, Tokenizer

torch.set_num_threads(1)
BOS, EOS, SOI, EOI, IMG = Tokenizer.BOS, Tokenizer.EOS, Tokenizer.SOI, Tokenizer.EOI, Tokenizer.IMG
BLOCK = [SOI, IMG, IMG, IMG, IMG, EOI]                                   # an image of 16 pixels in patches of 8


def config(**changes):
    """An LCL of a few thousand parameters: 4 patches an image, rows of 48 tokens."""
    tiny = dict(image_size=16, patch=8, dim=16, depth=1, heads=2, text_dim=16, text_depth=2, text_heads=2, context=48, vocab_size=300, batch=12,
                steps=20, warmup=2, lr=1e-2, wd=0.05, scale=1.0, workers=0, save_every=100, eval_every=-1, precision="fp32")
    return lcl.Config(**{**tiny, **changes})


def build(scale=0.1, cfg=None, **changes):
    """In float64, with no bias left at zero, as zeros hide mistakes; scale=0: as initialised."""
    torch.manual_seed(0)
    model = lcl.LCL(cfg or config(**changes)).double()
    for p in model.parameters():
        p.data += scale * torch.randn_like(p)
    return model


def documents(*layouts, cfg=None, seed=0, vocab_size=300):
    """"3i2": three random tokens, a random image, two tokens. All images differ."""
    rng = np.random.default_rng(seed)
    segment = lambda c: rng.integers(0, 256, (3, 16, 16), np.uint8) if c == "i" else rng.integers(8, vocab_size, int(c)).tolist()
    return [lcl.sequence([segment(c) for c in layout], cfg or config()) for layout in layouts]


MIXED = "3i2i3", "4i", "i5", "2i2ii1i4", "9i9i5", "3i3"                  # 22 12 13 35 37 14 tokens: into rows of 37, 35 + 13, 22 + 14 + 12


def forward(model, cfg, *batches):
    """main's step on one rank. Several batches go through the model apart and meet in the losses."""
    parts = []
    for b in batches:
        tokens, latent = model.encode(b["images"])
        embedded = model.embed(b["ids"], b["position"], b["slots"], tokens)
        rows = model.trunk(embedded, lcl.same_document(b["doc"]) if cfg.pack else None)
        x = F.pad(rows.flatten(0, 1), (0, 0, 0, 1))
        parts.append((tokens, unit(latent), model.contexts(x[b["soi"]]), model.logits(x[b["label_at"]]), x[b["slots"] - 1], b["labels"],
                      b["context"], b["real"]))
    tokens, latent, context, logits, before, labels, valid, real = map(torch.cat, zip(*parts))
    costs = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
    gen, con = costs.sum() / (labels >= 0).sum(), lcl.contrast(latent, context, valid, model.scale())
    total = cfg.w_gen * (cfg.objective != "con") * gen + cfg.w_con * (cfg.objective in ("lcl", "con")) * con
    if model.regress:
        total = total + (model.regress(before) - tokens).square().mean((1, 2))[real].mean()
    return SimpleNamespace(gen=gen, con=con, total=total, tokens=tokens, latent=latent, context=context, logits=logits, labels=labels, valid=valid,
                           real=real, costs=costs, embedded=embedded, rows=rows)


def gradients(model, loss):
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), retain_graph=True, materialize_grads=True)))


def same(model, ours, theirs, tol=1e-9):
    """Losses and all gradients of two results of forward."""
    for loss in ("gen", "con", "total"):
        torch.testing.assert_close(getattr(ours, loss), getattr(theirs, loss), rtol=tol, atol=tol)
    a, b = gradients(model, ours.total), gradients(model, theirs.total)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tol, atol=1e-3 * tol, msg=name)


def floating(model, batch):
    """The batch with its images as a leaf that takes gradients."""
    return {**batch, "images": ((batch["images"] / 255 - model.vision.mean) / model.vision.std).double().requires_grad_()}


def touched(loss, *leaves):
    """For each leaf, which of its rows (two leading dimensions; of images one) have a gradient that is not exactly 0."""
    return [g.flatten(2 if leaf.ndim == 3 else 1).ne(0).any(-1) for leaf, g in
            zip(leaves, torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True))]


def infonce(latent, context, scale):
    """Symmetric InfoNCE, halved, told in numpy term by term."""
    z, y, n = latent.detach().numpy(), context.detach().numpy(), len(latent)
    s = scale * z @ y.T
    return sum(math.log(np.exp(t[i]).sum()) - t[i, i] for t in (s, s.T) for i in range(n)) / (2 * n)


# ---- sequences ----

def test_a_cut_leaves_no_part_of_an_image_and_as_much_as_fits():
    whole, = documents("3i2i3")
    assert whole["ids"].tolist().count(SOI) == 2 and len(whole["ids"]) == 22
    for context in range(8, 30):
        cfg = config(context=context)
        if context < 11:                                     # begin, 3 words, image, end
            with pytest.raises(Skip, match="no image left"):
                documents("3i2i3", cfg=cfg)
            continue
        (got,), full = documents("3i2i3", cfg=cfg), whole["ids"].tolist()
        ids = got["ids"].tolist()
        kept = ids[:-1]
        assert ids[-1] == EOS and len(ids) <= context and kept == full[:len(kept)]
        assert len(got["images"]) == kept.count(SOI) == kept.count(EOI) == kept.count(IMG) / 4
        assert np.array_equal(got["images"], whole["images"][:len(got["images"])])
        assert len(ids) in (context, 22) or full[len(kept)] == SOI and len(kept) + 6 > context - 1


def test_the_labels_of_the_specified_example():
    """Words, soi and end; not slots, eoi, begin or what stands behind the end; each predicted from the place before it."""
    image = np.zeros((3, 16, 16), np.uint8)
    batch = lcl.pack([lcl.sequence([[10, 11, 12], image, [20, 21], image, [30, 31]], config())], config())
    assert batch["ids"][0, :21].tolist() == [BOS, 10, 11, 12, *BLOCK, 20, 21, *BLOCK, 30, 31, EOS]
    at, labels = (batch[k][batch["labels"] >= 0] for k in ("label_at", "labels"))
    assert labels.tolist() == [10, 11, 12, SOI, 20, 21, SOI, 30, 31, EOS]
    assert batch["ids"].flatten()[at + 1].tolist() == labels.tolist() and batch["ids"].flatten()[at[4]] == EOI


def test_every_word_end_and_image_of_packed_documents_is_a_label_once():
    docs = documents(*MIXED)
    batch, flat = lcl.pack(docs, config()), [i for d in docs for i in d["ids"].tolist()]
    counted = Counter(i for i in flat if i not in (BOS, IMG, EOI))
    assert Counter(batch["labels"][batch["labels"] >= 0].tolist()) == counted
    assert batch["real"].sum() == flat.count(SOI) == 11
    first = batch["position"].flatten()[batch["label_at"][batch["labels"] >= 0]]
    assert (first == 0).sum() == 6                           # the first word of each, from its own begin token


# ---- documents on disk ----

def png(shade):
    raw = io.BytesIO()
    Image.new("RGB", (20, 24), (shade, 0, 0)).save(raw, "PNG")
    return raw.getvalue()


def page(fields, pictures=6, **members):
    return Sample("k", {"json": json.dumps(fields).encode(), **{f"{i}.png": png(10 * i) for i in range(pictures)}, **members})


def mmc4(*info, texts=4, **members):
    """info: (number of the picture, sentence, similarity)"""
    info = [dict(zip(("image_name", "matched_text_index", "matched_sim"), (f"k.{i}.png", *rest))) if isinstance(i, int) else i for i, *rest in info]
    return page({"text_list": [f"s{i}" for i in range(texts)], "image_info": info}, **members)


def reading(sample, seed=0, **rules):
    """"#2" is the picture of shade 20."""
    return " ".join(s if isinstance(s, str) else f"#{s.getpixel((0, 0))[0] // 10}" for s in sample.document(data.rng_for(seed), **rules))


def test_the_specified_document_reads_as_specified():
    found = {reading(mmc4((0, 2, .30), (1, 0, .24), (2, 1, .239), (3, 2, .50)), seed, first=1.0) for seed in range(20)}
    assert found == {"#1 s0 s1 #0 s2 s3", "#1 s0 s1 #3 s2 s3"}           # 0.24 stays, 0.239 goes, one of two of a sentence is drawn


def test_each_picture_stands_before_or_after_its_sentence():
    sample = mmc4((0, 3, .5), (1, 1, .5))
    assert reading(sample, first=1.0) == "s0 #1 s1 s2 #0 s3" and reading(sample, first=0.0) == "s0 s1 #1 s2 s3 #0"
    assert len({reading(sample, seed) for seed in range(30)}) == 4       # a coin for each


def test_the_first_pictures_stay_not_the_best():
    sample = mmc4(*((i, 5 - i, .3 + i / 10) for i in range(6)), texts=7)
    assert reading(sample, first=0.0, most=2) == "s0 #5 s1 #4 s2 s3 s4 s5 s6"
    many = mmc4(*((i, i, .5) for i in range(9)), texts=9, **{f"{i}.png": png(10 * i) for i in range(6, 9)})
    assert reading(many, first=0.0).count("#") == 6


def test_pictures_that_are_missing_or_broken_and_entries_that_make_no_sense_are_left_out():
    odd = [{}, {"image_name": 7, "matched_text_index": 0}, {"image_name": "k.0.png", "matched_text_index": "0"},
           {"image_name": "k.0.png", "matched_text_index": 9}, {"image_name": "k.0.png", "matched_text_index": -1},
           {"image_name": "k.0.png", "matched_text_index": 0, "matched_sim": "high"}, {"image_name": "json", "matched_text_index": 1}]
    sample = mmc4((1, 0, .9), (8, 1, .9), (2, 2, .9), *((e,) for e in odd), (3, 3, None), **{"1.png": b"no image", "2.png": png(20)[:60]})
    sample.json["image_info"] += ["text", None, 5]
    sample.json["text_list"].insert(2, None)
    assert reading(sample, first=0.0) == "s0 s1 s2 #3 s3"    # of no known similarity: taken


def test_a_page_in_order_keeps_it():
    texts, images = ["a", None, None, "b", None, ""], [None, "k.2.png", "k.9.png", None, "k.0.png", None]
    assert reading(page({"texts": texts, "images": images}), first=1.0) == "a #2 b #0"
    assert reading(page({"texts": [None, "a"] + [None] * 4, "images": ["k.4.png", None, "k.3.png", "k.2.png", "k.1.png", 8]}), most=2) == "#4 a #3"


@pytest.mark.parametrize("sample,why", [
    (page({"text_list": ["a"]}), "no document"), (page({"texts": ["a"], "images": "k.0.png"}), "no document"),
    (mmc4((0, 0, .1)), "no image left"), (mmc4((0, 0, .9), **{"0.png": b""}), "no image left"), (mmc4(), "no image left"),
    (page({"texts": ["a", None], "images": [None, "k.9.png"]}), "no image left"),
    (Sample("k", {"json": b"{"}), "unreadable json"), (Sample("k", {"json": b'["text_list"]'}), "no document")])
def test_what_holds_no_picture_is_passed_over_with_its_reason(sample, why):
    with pytest.raises(Skip, match=why):
        sample.document(data.rng_for(0))
    assert why in data.REASONS


def words(ids):
    return Tokenizer().decode(i for i in ids if i not in Tokenizer.SPECIAL)


@pytest.mark.parametrize("first,order", [(1.0, [BOS, *BLOCK]), (0.0, [*BLOCK, EOS])])
def test_a_caption_however_long_keeps_its_image(first, order):
    sample = Sample("k", {"txt": b"long " * 50, "png": png(30)})
    got = lcl.example(sample, data.rng_for(0), config(image_first=first), Tokenizer())
    ids = got["ids"].tolist()
    assert (ids[:7] if first else ids[-7:]) == order and 47 <= len(ids) <= 48 and ids[-1] == EOS
    assert words(ids) == ("long " * 50)[:40] and (got["images"][:, 0] == 30).all()


def test_special_words_on_a_page_are_just_text():
    texts = ["<|endoftext|> <soi>", "[IMG]<img> </s><pad>", "\x00\x01\x04\x06"]
    sample = page({"text_list": texts, "image_info": [{"image_name": "k.1.png", "matched_text_index": 1}]})
    ids = lcl.example(sample, data.rng_for(0), config(context=200, image_first=0.0), Tokenizer())["ids"].tolist()
    assert [i for i in ids if i in Tokenizer.SPECIAL] == [BOS, *BLOCK, EOS] and words(ids) == " ".join(texts)


# ---- rows ----

def test_packed_rows_are_their_documents_run_apart():
    """Losses and all gradients; documents that end exactly at the end of their row among them."""
    cfg, alone, model, docs = config(), config(pack=False), build(), documents(*MIXED)
    packed, apart = lcl.pack(docs, cfg), [lcl.pack([d], alone) for d in docs]
    assert len(packed["ids"]) == 3 < len(lcl.pack(docs, alone)["ids"]) and (packed["doc"] >= 0).all(1).any() and (packed["doc"] == 2).any()
    want = forward(model, alone, *apart)
    assert want.valid.sum() == 10 and 0 < want.con
    same(model, forward(model, cfg, packed), want)
    same(model, forward(model, alone, lcl.pack(docs, alone)), want)
    same(model, forward(model, cfg, *(lcl.pack([d], cfg) for d in docs)), want)


def test_no_document_takes_anything_from_its_neighbours():
    """Neither from their images nor from their embeddings, exactly."""
    model, cfg, docs = build(), config(), documents(*MIXED)
    batch = floating(model, lcl.pack(docs, cfg))
    out, doc = forward(model, cfg, batch), batch["doc"]
    owner = torch.where(doc >= 0, 10 * torch.arange(len(doc))[:, None] + doc, -1)                # a number for each document
    of_label, of_image = (F.pad(owner.flatten(), (0, 1), value=-1)[batch[k]] for k in ("label_at", "soi"))
    for own in owner.unique()[1:]:
        for loss in (out.costs[of_label == own].sum(), out.context[of_image == own].sum()):
            images, places = touched(loss, batch["images"], out.embedded)
            assert not places[owner != own].any() and not images[of_image != own].any()
        assert touched(out.costs[of_label == own].sum(), out.embedded)[0][owner == own][:-1].all()


def test_padding_changes_nothing():
    model, cfg = build(), config()
    plain, (L, g) = lcl.pack(documents(*MIXED), cfg), (48, torch.Generator().manual_seed(1))
    end = plain["ids"].numel()
    move = lambda v, k: F.pad(torch.where(v >= end, end + 2 * L, v), (0, 0) * (v.ndim - 1) + (0, k), value=end + 2 * L)
    more = {"doc": F.pad(plain["doc"], (0, 0, 0, 2), value=-1), **{k: F.pad(plain[k], (0, 0, 0, 2)) for k in ("ids", "position")},
            **{k: move(plain[k], n) for k, n in (("slots", 3), ("soi", 3), ("label_at", 5))}, "labels": F.pad(plain["labels"], (0, 5), value=-1),
            **{k: F.pad(plain[k], (0, 3)) for k in ("real", "context")},
            "images": torch.cat([plain["images"], torch.randint(0, 256, (3, 3, 16, 16), generator=g, dtype=torch.uint8)])}
    more["ids"] = more["ids"].where(more["doc"] >= 0, torch.randint(8, 300, more["ids"].shape, generator=g))
    same(model, forward(model, cfg, more), forward(model, cfg, plain), 1e-11)


# ---- what depends on what ----

def test_a_context_is_blind_to_its_image_and_to_all_that_follows_and_logits_to_what_comes_after():
    model, cfg = build(), config()
    batch = floating(model, lcl.pack(documents("3i2i3i2"), cfg))
    out, g = forward(model, cfg, batch), torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for k, at in enumerate(batch["soi"][batch["real"]].tolist()):
        images, places = touched(out.context[k] @ g, batch["images"], out.embedded)
        assert places[0, :at + 1].all() and not places[0, at + 1:].any()
        assert images[:k].all() and not images[k:].any()
        other = {**batch, "images": torch.cat([batch["images"][:k], torch.randn_like(batch["images"][:1]), batch["images"][k + 1:]])}
        moved = (forward(model, cfg, other).rows != out.rows).any(2)[0]
        assert not moved[:at + 1].any() and moved[at + 1:batch["ids"].tolist()[0].index(EOS) + 1].all()
    for t in range(0, 30, 3):
        places, = touched(model.logits(out.rows[0, t]) @ torch.randn(300, dtype=torch.float64), out.embedded)
        assert places[0, :t + 1].all() and not places[0, t + 1:].any()


def test_a_latent_is_of_its_image_alone():
    model, cfg = build(), config()
    batch = floating(model, lcl.pack(documents(*MIXED), cfg))
    out = forward(model, cfg, batch)
    for k in range(4):
        images, places = touched(out.latent[k].sum(), batch["images"], out.embedded)
        assert images.nonzero().tolist() == [[k]] and not places.any()
    torch.testing.assert_close(model.encode_image(batch["images"][3:4])[0], out.latent[3], rtol=1e-12, atol=1e-14)


def test_embeddings_of_slots_and_padding_are_never_used():
    model, cfg = build(), config()
    grad = gradients(model, forward(model, cfg, lcl.pack(documents(*MIXED), cfg)).total)["token_embed.weight"].ne(0).any(1)
    assert not grad[[IMG, Tokenizer.PAD]].any() and grad[[BOS, EOI, SOI]].all()


def test_with_uniform_attention_the_latent_is_the_mean_of_the_tokens():
    model = build()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    tokens, latent = model.encode(images)
    assert (tokens.mean(1) - latent).abs().max() > 1e-3
    for p in model.pool.q.parameters():
        p.data.zero_()
    tokens, latent = model.encode(images)
    torch.testing.assert_close(tokens.mean(1), latent, rtol=1e-12, atol=1e-14)


def test_text_first_pairs_are_clip():
    """And only the end token behind its image teaches the encoder to write."""
    cfg = config(w_gen=0.0, w_con=1.0)
    model, batch = build(), lcl.pack(documents("3i", "4i", "5i", "6i", "7i"), cfg)
    out = forward(model, cfg, batch)
    assert out.total.item() == pytest.approx(infonce(out.latent[:5], out.context[:5], model.scale().item()), rel=1e-12)
    grad = gradients(model, out.total)
    assert grad["head.weight"].eq(0).all() and grad["norm_head.weight"].eq(0).all() and grad["vision.patch_embed.proj.weight"].ne(0).all()
    assert grad["vision.cls_token"].ne(0).all()              # takes part in attention, though it is no token of the image's
    for end in (False, True):
        grad = gradients(model, out.costs[(out.labels == EOS) == end].sum())
        assert grad["head.weight"].ne(0).any() and grad["vision.patch_embed.proj.weight"].ne(0).any() == end


def test_image_first_pairs_are_captioning():
    model, cfg = build(), config()
    out = forward(model, cfg, lcl.pack(documents("i3", "i4", "i5"), cfg))
    assert out.con.item() == 0 and not out.valid.any() and out.total.isfinite()
    grad = gradients(model, out.total)
    unused = "context_proj.", "norm_context.", "pool.query", "pool.norm_q.", "pool.norm_k.", "pool.q.", "pool.k.", "log_scale"
    for name, value in grad.items():
        assert name.startswith(unused) == value.eq(0).all().item(), name
        assert value.isfinite().all()


def test_an_image_between_texts_learns_from_both_and_an_earlier_one_through_the_next_ones_context():
    model, cfg = build(), config()
    batch = floating(model, lcl.pack(documents("3i2i3", "4i"), cfg))
    out = forward(model, cfg, batch)
    for loss in (out.gen, out.con):
        assert touched(loss, batch["images"])[0][:2].all()
    batch["context"] = torch.tensor([False, True, True, False])[:len(out.valid)]                 # the first one's own pair left out
    assert touched(forward(model, cfg, batch).con, batch["images"])[0].tolist()[:3] == [True] * 3


def test_an_image_with_nothing_before_it_is_contrasted_only_on_demand():
    docs, model = documents("i3", "3i3", "i5", "4i", "ii2"), build()
    for flag in (False, True):
        cfg = config(contrast_empty_context=flag)
        batch = floating(model, lcl.pack(docs, cfg))
        out, empty = forward(model, cfg, batch), batch["position"].flatten()[batch["soi"].clamp(max=batch["ids"].numel() - 1)] == 1
        empty &= batch["real"]
        assert empty.sum() == 3 and out.valid.sum() == 3 + 3 * flag and (out.valid & empty).sum() == 3 * flag    # the second of "ii" has one
        assert out.con.item() == pytest.approx(infonce(out.latent[out.valid], out.context[out.valid], model.scale().item()), rel=1e-12)
        assert touched(out.con, out.latent)[0][empty].tolist() == [flag] * 3
        torch.testing.assert_close(*out.context[empty][:2], rtol=1e-12, atol=1e-13)              # one vector for all of them


def test_the_order_of_documents_does_not_matter():
    model, cfg, docs = build(), config(), documents(*MIXED, "2i3i3", "i4", "5i")
    both = [lcl.pack(ds, cfg) for ds in (docs, docs[::-1])]
    assert not torch.equal(both[0]["images"], both[1]["images"])
    outs = [forward(model, cfg, b) for b in both]
    same(model, *outs)
    one, two = ({b["images"][k].numpy().tobytes(): (out.latent[k], out.context[k]) for k in range(15)} for b, out in zip(both, outs))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-10, atol=1e-12)


def test_every_image_goes_to_its_own_slots():
    """No two may change places unnoticed; that the order is right is told by the documents run apart."""
    model, cfg = build(), config()
    batch = lcl.pack(documents("3i2i3", "4i1i2"), cfg)
    want = forward(model, cfg, batch)
    for i, j in itertools.combinations(range(4), 2):
        order = [{i: j, j: i}.get(k, k) for k in range(len(batch["images"]))]
        out = forward(model, cfg, {**batch, "images": batch["images"][order]})
        assert abs(out.gen - want.gen) > 1e-7 and abs(out.con - want.con) > 1e-7


def test_fresh_losses_are_those_of_a_guess_and_the_scale_is_clips():
    cfg = config(context=96, dim=64, text_dim=64, heads=4, text_heads=4)
    model = build(0, cfg)
    out = forward(model, cfg, lcl.pack(documents(*MIXED * 6, cfg=cfg), cfg))
    n = out.valid.sum().item()
    assert out.gen.item() == pytest.approx(math.log(300), abs=0.4) and n == 60
    assert -0.1 < out.con.item() - math.log(n) < 1.5
    assert model.scale().item() == pytest.approx(14.2857, rel=1e-5)


@pytest.mark.parametrize("start,want", [(9.0, 100.0), (math.log(100), 100.0), (-3.0, 1.0), (0.7, math.exp(0.7))])
def test_the_scale_stays_between_1_and_100(start, want):
    model = build()
    model.log_scale.data.fill_(start)
    assert model.scale().item() == pytest.approx(want)


# ---- text and captions ----

def test_a_text_is_encoded_as_the_context_it_has_in_training():
    texts, cfg, tokenizer = ["a", "a red star", "two small blue circles"], config(image_first=0.0), Tokenizer()
    model = build(cfg=cfg)
    docs = [lcl.example(Sample("k", {"txt": t.encode(), "png": png(40)}), data.rng_for(0), cfg, tokenizer) for t in texts]
    want = torch.cat([forward(model, cfg, lcl.pack([d], cfg)).context[:1] for d in docs])
    tokens, valid = (torch.from_numpy(np.stack(v)) for v in zip(*(tokenizer.pad(t, 40) for t in texts)))
    before = tokens.clone()
    torch.testing.assert_close(model.encode_text(tokens, valid), want, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(model.encode_text(tokens[:2, :12], valid[:2, :12]), want[:2], rtol=1e-11, atol=1e-12)
    assert torch.equal(tokens, before)                       # the released code overwrites it


def test_generation_with_kept_keys_and_values_is_generation_anew():
    cfg = config(vocab_size=12, context=24)
    model, images = build(0.3, cfg), torch.from_numpy(np.concatenate([d["images"] for d in documents(*["i1"] * 16)]))
    torch.manual_seed(2)                                     # large weights: captions differ from image to image and end at many lengths
    for weight, large in ((model.token_embed.weight, 2), (model.head.weight, 1), (model.pool.out.weight, 1)):
        weight.data = large * torch.randn_like(weight)
    want = torch.full((16, 20), Tokenizer.PAD)
    for row, image in enumerate(images):
        ids = [BOS, *BLOCK]
        while len(ids) < 24 and ids[-1] != EOS:
            x = model.embed(torch.tensor([ids]), torch.arange(len(ids)), torch.tensor([[2, 3, 4, 5]]), model.encode(image[None])[0])
            ids.append(model.logits(model.trunk(x))[0, -1].argmax().item())
        want[row, :len(ids) - 7] = torch.tensor(ids[7:])
    lengths = (want != Tokenizer.PAD).sum(1)
    assert torch.equal(model.generate(images, 20), want) and len(lengths.unique()) > 3 and lengths.max() == 17   # no row past the context
    assert torch.equal(model.generate(images, 5), want[:, :5]) and torch.equal(model.generate(images[3:4], 20), want[3:4])


def test_a_caption_scores_what_its_words_cost_in_training():
    cfg, model, tokenizer = config(), build(), Tokenizer()
    texts, images = ["a red star", "two"], [d["images"][0] for d in documents("i1", "i1")]
    want = []
    for text, image in zip(texts, images):
        out = forward(model, cfg, lcl.pack([lcl.sequence([image, tokenizer.encode(text)], cfg)], cfg))
        costs = out.costs[out.labels >= 0]
        assert len(costs) == len(text) + 2                   # the first is soi's
        want.append(-costs[1:].mean().item())
    tokens, valid = (torch.from_numpy(np.stack(v)) for v in zip(*(tokenizer.pad(t, 48) for t in texts)))
    assert model.score(torch.from_numpy(np.stack(images)), tokens, valid).tolist() == pytest.approx(want, rel=1e-5)


def test_drawn_ranks_compare_the_contexts_and_latents_of_training():
    model, cfg, docs = build(), config(), documents(*MIXED)
    which, sim = lcl.rank_images(model, docs, cfg, torch.device("cpu"))
    out = forward(model, cfg, *(lcl.pack([d], cfg) for d in docs))
    assert which == [(0, 0), (0, 1), (1, 0), *((3, k) for k in range(4)), (4, 0), (4, 1), (5, 0)]           # the third has nothing before its image
    torch.testing.assert_close(sim, (out.context[out.valid] @ out.latent[out.valid].T), rtol=1e-9, atol=1e-10)


# ---- collapse ----

def test_the_gauges_are_deviation_and_cosine_by_definition():
    rng = np.random.default_rng(0)
    tokens, latent, real = rng.normal(0.5, 1, (9, 4, 16)), rng.normal(0.2, 1, (9, 16)), np.arange(9) < 6
    got = lcl.gauge(*map(torch.from_numpy, (tokens, latent, real)))
    t, z = tokens[real], latent[real] / np.linalg.norm(latent[real], axis=1, keepdims=True)
    assert got["spread"].item() == pytest.approx(t.mean(1).std(0).mean() / np.sqrt((t ** 2).mean()), rel=1e-5)
    assert got["cosine"].item() == pytest.approx(np.mean([z[i] @ z[j] for i in range(6) for j in range(6) if i != j]), rel=1e-4)


def train(cfg, steps, batch):
    """The helper's step, `steps` times on batch(step). -> the last result."""
    torch.manual_seed(0)
    model = lcl.LCL(cfg)
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    for step in range(steps):
        out = forward(model, cfg, lcl.pack(batch(step), cfg))
        opt.zero_grad()
        out.total.backward()
        opt.step()
    return out


@pytest.mark.parametrize("objective", ["gen+reg", "lcl"])
def test_regression_makes_all_images_the_same_and_contrast_does_not(objective):
    """Documents of three words, each before a noisy picture of its colour: nothing that is written later asks for the pictures."""
    cfg, colours = config(dim=32, text_dim=32, objective=objective, w_con=1.0, vocab_size=32), data.rng_for(9).integers(90, 170, (6, 3, 1, 1))

    def toys(step):
        rng = data.rng_for(step)
        picture = lambda c: np.clip(rng.normal(colours[c], 30, (3, 16, 16)), 0, 255).astype(np.uint8)
        return [lcl.sequence([part for c in rng.integers(0, 6, 3) for part in ([20 + int(c)], picture(c))], cfg) for _ in range(16)]
    out = train(cfg, 200, toys)
    gauge = lcl.gauge(out.tokens, out.latent, out.real)
    if objective == "lcl":
        assert gauge["spread"] > 0.5 and gauge["cosine"] < 0.5
    else:
        assert gauge["spread"] < 0.1 and gauge["cosine"] > 0.99


def test_eight_documents_are_learned_by_heart():
    cfg, docs = config(dim=32, text_dim=32, w_con=1.0), documents(*["2i2i2i1"] * 8)
    out = train(cfg, 120, lambda step: docs)
    assert out.con < 0.05 and out.gen < 1                    # the first word of a document cannot be known


# ---- mixtures ----

@pytest.mark.parametrize("share", ["0.25", "0.5", "0.3", "0", "1"])
def test_a_batch_takes_each_source_in_its_own_order_at_the_specified_rows(share):
    """Row i holds a document iff floor((i+1)p) > floor(ip), on any number of ranks."""
    p, counts = Fraction(share), data.shares(12, float(share))
    assert sum(counts) == 12
    sources = [data.Rows([Sample(str(i), {}) for i in range(40 + k)], data.Plan(np.array([0, 13, 40 + k]), n, 7 + k, 1),
                         lambda sample, rng, k=k: {"it": np.array([k, int(sample.key)])}) if n else None for k, n in enumerate(counts)]
    for world, step in itertools.product((1, 2), range(6)):
        got = torch.cat([data.Batches(sources, 12, r, world, float(share))[step]["it"] for r in range(world)])
        assert got[:, 0].tolist() == [math.floor((i + 1) * p) - math.floor(i * p) for i in range(12)]
        for k, source in enumerate(sources):
            plan = source and source.plan
            assert got[got[:, 0] == k, 1].tolist() == [plan.sample(*plan.position(step, row)) for row in range(counts[k])]


# ---- whole runs ----

TERMS = "loss", "gen", "con", "spread", "cosine", "temperature"


run = partial(conftest.run, lcl.main)


def first_step(cfg, naive=False):
    """Gradients of the first step, caught where the optimiser would use them, and this rank's batch.
    naive: as if all ranks had as many labels and pairs as this one."""
    batches, pack, total = [], lcl.pack, common.total
    lcl.pack = lambda *args, **kwargs: (batches.append(pack(*args, **kwargs)), batches[-1].copy())[1]
    if naive:
        common.total = lambda count: count * common.world()
    try:
        caught = conftest.first_step(lcl.main, cfg)
    finally:
        lcl.pack, common.total = pack, total
    return caught, batches[0]


def far(a, b):
    """Leaves out the pool's key biases, which no softmax notices: their gradients are rounding."""
    return max(((x - y).norm() / y.norm()).item() for x, y in zip(a, b, strict=True) if y.norm() > 1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return data.make_world(root=str(tmp_path_factory.mktemp("world")), scenes=64, documents=96, parts=("pairs", "docs"))


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """Twenty steps on pairs and documents in one process: what they logged and saved; gradients of the first."""
    cfg = config(data=[f"{folder}/pairs"], docs=[f"{folder}/docs"], docs_share=0.5, seed=1, context=64, w_gen=0.5, w_con=2.0,
                 out=str(tmp_path_factory.mktemp("lcl") / "run"))
    return cfg, *run(cfg)[:2], first_step(cfg)


def test_a_step_goes_along_the_gradients_that_the_tests_above_are_about(whole):
    cfg, log, _, (caught, batch) = whole
    torch.manual_seed(cfg.seed)
    model = lcl.LCL(cfg)
    out = forward(model, cfg, batch)
    out.total.backward()
    assert far(caught, [p.grad for g in common.adamw(model, cfg, (0.9, 0.98)).param_groups for p in g["params"]]) < 1e-5
    assert [log[0][k] for k in TERMS[:3]] == pytest.approx([v.item() for v in (out.total, out.gen, out.con)], rel=1e-5)
    for r in log:
        assert r["loss"] == pytest.approx(0.5 * r["gen"] + 2 * r["con"], rel=1e-5) and 0.01 <= r["temperature"] <= 1
    assert log[-1]["gen"] < log[0]["gen"] - 0.5


def test_stopped_and_resumed_is_bitwise_the_run_without_a_stop(whole, monkeypatch):
    cfg, log, saved, _ = whole
    conftest.resumes_bitwise(lcl.main, cfg, log, saved, (*TERMS, "lr", "grad_norm"), monkeypatch)


@pytest.mark.parametrize("changes,calls", [({}, 3), (dict(pack=False), 3), (dict(micro=4), None), (dict(grad_checkpoint=True), 6)])
def test_recomputing_and_packing_change_no_gradient(whole, monkeypatch, changes, calls):
    cfg, _, _, (plain, _) = whole
    seen, block = [], common.Block.forward
    monkeypatch.setattr(common.Block, "forward", lambda *args, **kwargs: (seen.append(1), block(*args, **kwargs))[1])
    assert far(first_step(replace(cfg, **changes))[0], plain) < 1e-5
    assert len(seen) == calls or changes.get("micro") and len(seen) > 12         # images and rows in fours, each twice


def test_compiling_changes_no_gradient(whole, monkeypatch):
    cfg, _, _, (plain, _) = whole
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile(f, backend="aot_eager"))             # the graphs, without a C++ compiler
    assert far(first_step(replace(cfg, compile=True))[0], plain) < 1e-5


@pytest.mark.parametrize("objective", ["lcl", "gen", "con", "gen+reg"])
def test_each_arm_trains_on_its_own_terms(folder, tmp_path, objective):
    """Documents alone; the method's own arm to the end, with its pictures."""
    end = 0 if objective == "lcl" else -1
    cfg = config(docs=[f"{folder}/docs"], out=str(tmp_path / "run"), objective=objective, steps=2, context=64, batch=4, eval_every=end)
    log, state, _ = run(cfg)
    for r in log:
        want = {"lcl": r["gen"] + 0.1 * r["con"], "gen": r["gen"], "con": 0.1 * r["con"], "gen+reg": r["gen"] + r.get("reg", 0)}[objective]
        assert r["loss"] == pytest.approx(want, rel=1e-5) and ("reg" in r) == (objective == "gen+reg") == ("regress.weight" in state["model"])
    if objective == "lcl":
        with Image.open(f"{cfg.out}/document.png") as picture, open(f"{cfg.out}/result.json") as f:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
            assert {"context_r1", "image_r1"} <= json.load(f).keys()


def test_pairs_alone_train_too(folder, tmp_path):
    log, _, _ = run(config(data=[f"{folder}/pairs"], out=str(tmp_path / "run"), steps=2, docs_share=0.9))
    assert all(r["con"] > 0 for r in log)                    # about half of them have their text before


def test_what_cannot_be_trained_is_refused(tmp_path):
    with pytest.raises(UserError, match="--objective clip: choose lcl, gen, con or gen.reg"):
        lcl.main(config(objective="clip", out=str(tmp_path / "run")))
    with pytest.raises(UserError, match="--context 7 has no room for an image of 4 patches .*8 is the least"):
        lcl.LCL(config(context=7))
    lcl.LCL(config(context=8))


# ---- ranks ----

def shares(latent, context, valid, tokens):
    """This rank's contrast of its part of the rows, its share of the gradients of the mean over ranks, and its gauge."""
    latent, context, valid, tokens = (x.chunk(common.world())[common.rank()] for x in (latent, context, valid, tokens))
    leaves = [x.clone().requires_grad_() for x in (latent, context, torch.tensor(9.0, dtype=torch.float64))]
    loss = lcl.contrast(*leaves[:2], valid, leaves[2])
    loss.backward()
    return loss.item(), *((x.grad / common.world()).numpy() for x in leaves), [v.item() for v in lcl.gauge(tokens, latent, valid).values()]


@pytest.mark.parametrize("world,counts", [(2, (3, 0)), (2, (1, 4)), (2, (0, 0)), (4, (3, 0, 1, 2))])
def test_contrast_of_ranks_with_unequal_numbers_of_pairs_is_that_of_one_process(pools, world, counts):
    g = torch.Generator().manual_seed(0)
    latent, context = (unit(torch.randn(4 * world, 8, dtype=torch.float64, generator=g)) for _ in range(2))
    valid, tokens = (torch.arange(4) < torch.tensor(counts)[:, None]).flatten(), torch.randn(4 * world, 4, 8, generator=g)
    found = pools(world)(shares, latent, context, valid, tokens)
    z, y, s = (x.clone().requires_grad_() for x in (latent[valid], context[valid], torch.tensor(9.0, dtype=torch.float64)))
    loss = sum(F.cross_entropy(t, torch.arange(len(z))) for t in (s * z @ y.T, s * y @ z.T)) / 2 if len(z) else (s * 0 + z.sum() + y.sum())
    loss.backward()
    assert np.mean([f[0] for f in found]) == pytest.approx(loss.item(), abs=1e-10)
    for i, leaf in ((1, z), (2, y)):
        grad = np.concatenate([f[i] for f in found])
        np.testing.assert_allclose(grad[valid], leaf.grad.numpy(), atol=1e-10)
        assert not grad[~valid].any()
    assert sum(f[3] for f in found) == pytest.approx(s.grad.item(), abs=1e-10)
    alone = [v.item() for v in lcl.gauge(tokens, latent, valid).values()]
    assert all(f[4] == pytest.approx(alone, rel=1e-4, nan_ok=True) for f in found)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_with_unequal_numbers_of_labels_and_pairs_are_one_run(whole, pools, world):
    cfg, log, _, (alone, _) = whole
    found = pools(world)(first_step, cfg)
    assert all(far(theirs, alone) < 1e-5 for theirs, _ in found)
    assert all(len({b[k].gt(-1 + (k == "context")).sum().item() for _, b in found}) > 1 for k in ("labels", "context"))
    assert far(pools(world)(first_step, cfg, True)[0][0], alone) > 1e-3          # so a mean of the ranks' means would have been noticed
    theirs, _, _ = pools(world)(run, replace(cfg, out=f"{cfg.out}-{world}"))[0]
    for a, b in zip(log, theirs, strict=True):
        assert [b[k] for k in TERMS] == pytest.approx([a[k] for k in TERMS], rel=1e-4)


# ---- other layouts ----

@pytest.fixture
def crawl(tmp_path):
    """A folder of images with a sub-folder, and one image beside it that no document may reach."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for name, shade in (("images/a.png", 10), ("images/sub/b.png", 20), ("images/sub/c.PNG", 30), ("outside.png", 40)):
        (tmp_path / name).write_bytes(png(shade))
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path


def entry(name, at):
    return {"image_name": name, "matched_text_index": at, "matched_sim": 0.3, "raw_url": "web:x", "face_detections": None}


def lines(*docs):
    return "".join((d if isinstance(d, str) else json.dumps(d)) + "\n" for d in docs)


def converted(crawl, capsys, *args, **kwargs):
    """Documents of the shards that convert writes, {reason: number dropped}; that they check clean and nothing else was written."""
    files = lambda: {str(p.relative_to(crawl)) for p in crawl.rglob("*") if p.is_file()}
    before = files()
    data.convert(*args, str(crawl / "images"), str(crawl / "new" / "out"), **kwargs)
    said = capsys.readouterr().out.splitlines()
    paths = data.expand([str(crawl / "new" / "out")])
    assert files() - before == {f"new/out/{os.path.basename(p)}" for p in paths} and all(os.path.basename(p).startswith("train-") for p in paths)
    index = data.Index(paths)
    assert not data.check(paths) and "nothing wrong" in capsys.readouterr().out
    return index, {reason: int(n) for n, reason in (line.split(" dropped: ") for line in said if "dropped" in line)}, said[0]


def test_mmc4_becomes_shards(crawl, capsys):
    one = {"url": "u", "text_list": ["one", "two"], "image_info": [entry("gone.jpg", 0), entry("../outside.png", 0), entry("a.png", 1), "odd", {}]}
    two = {"text_list": ["x", "y"], "image_info": [entry("../../sub/b.png", 0), entry("c.PNG", 1)], "similarity_matrix": [[0.1]]}
    none = {"text_list": ["a"], "image_info": [entry("no.png", 0)]}
    (crawl / "d.jsonl").write_text(lines(one, "{", "[1, 2]", {"text_list": "a", "image_info": []}, none))
    with zipfile.ZipFile(crawl / "d_v2.jsonl.zip", "w") as archive:
        archive.writestr("d_v2.jsonl", lines(two))
        archive.writestr("readme.txt", "not read")
    index, dropped, said = converted(crawl, capsys, "mmc4", [str(crawl / "d.jsonl"), str(crawl / "d_v2.jsonl.zip")], per_shard=1)
    assert len(index) == len(index.paths) == 2 and said.endswith("2 documents")
    assert [reading(index[i], first=0.0) for i in range(2)] == ["one two #1", "x #2 y #3"]
    assert dropped == {"line that is no JSON object": 2, "image that is not in the folder": 4, "document without an image": 1,
                       "document without the lists text_list and image_info": 1}
    assert index[0].json["image_info"] == [{"image_name": "000000000.0.png", "matched_text_index": 1, "matched_sim": 0.3, "raw_url": "web:x"}]
    assert index[1].members["0.png"] == png(20)              # the bytes as they were


def test_obelics_becomes_shards(crawl, capsys):
    doc = {"texts": [None, "a", None, None, "b", "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED", None], "metadata": "[]",
           "images": ["web:x/1?w=9", None, "web:x/2", "web:x/sub/a.png", None, None, "web:x/3"]}
    (crawl / "d.jsonl").write_text(lines(doc, "", {"texts": ["a"], "images": [None]}, {"texts": ["a"]}))
    (crawl / "map.json").write_text(json.dumps({"web:x/1?w=9": "../elsewhere/c.PNG", "web:x/2": "gone.png", "web:x/3": "../outside.png"}))
    index, dropped, _ = converted(crawl, capsys, "obelics", [str(crawl / "d.jsonl")], url_map=str(crawl / "map.json"))
    assert len(index) == 1 and reading(index[0]) == "#3 a #1 b"
    assert dropped == {"line that is no JSON object": 1, "image that is not in the folder": 2, "document without an image": 1,
                       "document without the lists texts and images": 1}


@pytest.mark.parametrize("layout,text", [("mmc4", ""), ("obelics", lines({"text_list": ["a"], "image_info": [entry("a.png", 0)]})),
                                         ("mmc4", lines({"text_list": ["a"], "image_info": [entry("../outside.png", 0)]}))])
def test_nothing_to_convert_is_told(crawl, layout, text):
    (crawl / "d.jsonl").write_text(text)
    with pytest.raises(UserError, match=f"no document of 1 file.s. could be converted: is --from {layout} right"):
        data.convert(layout, [str(crawl / "d.jsonl")], str(crawl / "images"), str(crawl / "out"))
    assert not list((crawl / "out").iterdir())
