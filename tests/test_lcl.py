"""LCL: documents, rows, masks, losses and generation against the oracles of its specification."""
import io
import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import data
import lcl
from common import UserError, l2_normalize, rank, world_size
from conftest import assert_same_gradients, gradients, run, tiny_config
from data import Sample, Skip, Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

PAD = Tokenizer.PAD
BOS = Tokenizer.BOS
EOS = Tokenizer.EOS
SOI = Tokenizer.SOI
EOI = Tokenizer.EOI
IMG = Tokenizer.IMG
IMAGE = [SOI, IMG, IMG, IMG, IMG, EOI]  # 16 pixels in patches of 8

# a few thousand parameters, 4 patches an image, rows of 48 tokens
SMALL = dict(
    image_size=16, patch=8, dim=16, depth=1, heads=2, text_dim=16, text_depth=2, text_heads=2,
    context=48, vocab_size=300, batch=12, scale=1.0, precision="fp32", w_gen=0.7, w_con=0.9,
    docs=["documents"],
)
# the terms of each objective
PARTS = {"lcl": ("gen", "con"), "gen": ("gen",), "con": ("con",), "gen+reg": ("gen", "reg")}
# "3i2": three random tokens, a random image, two tokens. Of 22, 12, 13, 35, 37 and 14 tokens
LAYOUTS = ["3i2i3", "4i", "i5", "2i2ii1i4", "9i9i5", "3i3"]


def config(**changes):
    return lcl.Config(**{**SMALL, **changes})


def build(cfg=None, noise=0.1):
    """A model in float64. Noise on all weights, since biases of zero hide mistakes."""
    torch.manual_seed(0)
    model = lcl.LCL(cfg or config()).double()
    for p in model.parameters():
        p.data += noise * torch.randn_like(p)
    return model


def make_documents(*layouts, cfg=None, first_id=8, last_id=300):
    rng = np.random.default_rng(first_id)
    documents = []
    for layout in layouts:
        segments = []
        for c in layout:
            if c == "i":
                segments.append(rng.integers(0, 256, (3, 16, 16), np.uint8))
            else:
                segments.append(rng.integers(first_id, last_id, int(c)).tolist())
        documents.append(lcl.sequence(segments, np.asarray, cfg or config()))
    return documents


def with_image_gradients(model, batch):
    """The batch with its images as normalized pixels that take gradients."""
    pixels = (batch["images"] / 255 - model.vision.mean) / model.vision.std
    return {**batch, "images": pixels.double().requires_grad_()}


def influences(value, inputs):
    """(n,): has each row of the inputs a gradient of value that is not exactly 0?"""
    grad, = torch.autograd.grad(value, inputs, retain_graph=True, materialize_grads=True)
    return grad.flatten(1).ne(0).any(1)


def random_projection(vector):
    """A number that depends on all of the vector; the sum of a normalized one may not."""
    generator = torch.Generator().manual_seed(2)
    return vector @ torch.randn(len(vector), dtype=vector.dtype, generator=generator)


def infonce_by_hand(latent, context, scale):
    logits = scale * latent @ context.T
    own = torch.arange(len(latent))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def losses_apart(model, documents, cfg):
    """The definition, from documents that go through the model one by one -> gen, con, reg."""
    token_losses = []
    errors = []
    latents = []
    contexts = []
    for document in documents:
        batch = lcl.pack([document], cfg)
        out = model(batch)
        token_losses.append(F.cross_entropy(out["logits"], batch["labels"], reduction="none"))
        for k, place in enumerate((document["ids"] == SOI).nonzero()[0]):
            if place > 1 or cfg.contrast_empty_context:
                latents.append(out["latent"][k])
                contexts.append(out["context"][k])
        if cfg.objective == "gen+reg":
            image_tokens, _ = model.encode(batch["images"])  # the targets take gradients too
            errors.append((out["predicted_tokens"] - image_tokens).square().mean((1, 2)))
    terms = {"gen": torch.cat(token_losses).mean()}
    scale = model.contrast_scale()
    terms["con"] = infonce_by_hand(torch.stack(latents), torch.stack(contexts), scale)
    if errors:
        terms["reg"] = torch.cat(errors).mean()
    return terms


# ---- documents on disk: data.Sample.document has LCL's rules for MMC4 ----

def png(shade):
    raw = io.BytesIO()
    Image.new("RGB", (20, 24), (shade, 0, 0)).save(raw, "PNG")
    return raw.getvalue()


def page(fields, **members):
    """A sample with the json fields and images k.0.png ... k.5.png of shades 0, 10 ... 50."""
    images = {f"{i}.png": png(10 * i) for i in range(6)}
    return Sample("k", {"json": json.dumps(fields).encode(), **images, **members})


def mmc4(*info, n_texts=4, **members):
    """info: (number of the image, its sentence, similarity)"""
    fields = ("image_name", "matched_text_index", "matched_sim")
    info = [dict(zip(fields, (f"k.{i}.png", at, similarity))) for i, at, similarity in info]
    texts = [f"s{i}" for i in range(n_texts)]
    return page({"text_list": texts, "image_info": info}, **members)


def reading(sample, seed=0, **rules):
    """"s0 #2 s1": image 2 stands between two sentences."""
    words = []
    for segment in sample.document(np.random.default_rng(seed), **rules):
        if not isinstance(segment, str):
            segment = f"#{segment.getpixel((0, 0))[0] // 10}"
        words.append(segment)
    return " ".join(words)


def test_the_specified_document_reads_as_specified():
    sample = mmc4((0, 2, 0.30), (1, 0, 0.24), (2, 1, 0.239), (3, 2, 0.50))
    readings = {reading(sample, seed, image_first=1.0) for seed in range(20)}
    # similarity 0.24 stays, 0.239 goes; of two images of one sentence one is drawn
    assert readings == {"#1 s0 s1 #0 s2 s3", "#1 s0 s1 #3 s2 s3"}


def test_each_image_stands_before_or_after_its_sentence_by_a_coin_of_its_own():
    sample = mmc4((0, 3, 0.5), (1, 1, 0.5))
    assert reading(sample, image_first=1.0) == "s0 #1 s1 s2 #0 s3"
    assert reading(sample, image_first=0.0) == "s0 s1 #1 s2 s3 #0"
    assert len({reading(sample, seed) for seed in range(30)}) == 4


def test_the_first_images_stay_not_the_most_similar():
    sample = mmc4(*[(i, 5 - i, 0.3 + i / 10) for i in range(6)], n_texts=6)
    assert reading(sample, image_first=0.0, max_images=2) == "s0 #5 s1 #4 s2 s3 s4 s5"


def test_missing_and_broken_images_are_left_out():
    sample = mmc4((0, 0, 0.9), (8, 1, 0.9), (1, 2, 0.9), (3, 3, None), (2, 9, 0.9),
                  **{"0.png": b"no image", "1.png": png(10)[:60]})
    assert reading(sample, image_first=0.0) == "s0 s1 s2 s3 #3"  # of no known similarity: taken


def test_texts_and_images_that_alternate_keep_their_order():
    texts = ["a", None, None, "b", None]
    images = [None, "k.2.png", "k.9.png", None, "k.0.png"]
    assert reading(page({"texts": texts, "images": images}), image_first=1.0) == "a #2 b #0"


@pytest.mark.parametrize("sample, reason", [
    (page({"text_list": ["a"]}), "no document"),
    (mmc4((0, 0, 0.1)), "no image left"),
    (Sample("k", {"json": b"{"}), "unreadable json"),
])
def test_what_holds_no_image_is_passed_over_with_its_reason(sample, reason):
    with pytest.raises(Skip, match=reason):
        sample.document(np.random.default_rng(0))


def pair(text):
    return Sample("k", {"txt": text.encode(), "png": png(30)})


@pytest.mark.parametrize("image_first", [0.0, 1.0])
def test_a_caption_however_long_keeps_its_image(image_first):
    cfg = config(image_first=image_first)
    row = lcl.example(pair("long " * 50), np.random.default_rng(0), cfg, Tokenizer())
    text = Tokenizer().encode("long " * 50)[:40]
    middle = [*IMAGE, *text] if image_first else [*text, *IMAGE]
    assert row["ids"].tolist() == [BOS, *middle, EOS]
    assert (row["images"][0, 0] == 30).all()


def test_a_pair_comes_in_both_orders():
    rows = [lcl.example(pair("a"), np.random.default_rng(seed), config(), Tokenizer())
            for seed in range(100)]
    image_first = [row["ids"][1] == SOI for row in rows]
    assert 35 < sum(image_first) < 65


def test_special_words_on_a_page_are_text():
    texts = ["<|endoftext|> <soi>", "[IMG]<img> </s><pad>", "\x00\x01\x04\x06"]
    info = [{"image_name": "k.1.png", "matched_text_index": 1}]
    sample = page({"text_list": texts, "image_info": info})
    cfg = config(context=200, image_first=0.0)
    ids = lcl.example(sample, np.random.default_rng(0), cfg, Tokenizer())["ids"].tolist()
    special = [i for i in ids if i in Tokenizer.SPECIAL]
    assert special == [BOS, *IMAGE, EOS]
    assert Tokenizer().decode([i for i in ids if i not in special]) == " ".join(texts)


def test_documents_whose_first_image_does_not_fit_are_warned_of(capsys):
    def document(n_bytes):
        info = [{"image_name": "k.1.png", "matched_text_index": 1}]
        return page({"text_list": ["x" * n_bytes, "y"], "image_info": info})

    index = [document(n) for n in (5, 30, 100, 5)] + [page({})]  # the last is no document
    cfg = config(image_first=1.0)
    lcl.warn_of_long_documents(index, cfg, Tokenizer())
    line = capsys.readouterr().out
    assert "25% of the first 4 documents" in line and "--context 48" in line
    needed = int(line.split("--context")[2].split()[0])
    with pytest.raises(Skip, match="no image left"):
        lcl.example(index[2], np.random.default_rng(0), config(context=needed - 1), Tokenizer())
    cfg = config(image_first=1.0, context=needed)
    assert len(lcl.example(index[2], np.random.default_rng(0), cfg, Tokenizer())["images"]) == 1
    lcl.warn_of_long_documents(index, cfg, Tokenizer())
    assert capsys.readouterr().out == ""


# ---- sequences and rows ----

def test_a_cut_leaves_no_part_of_an_image_and_as_much_as_fits():
    whole, = make_documents("3i2i3")
    ids = whole["ids"].tolist()
    assert len(ids) == 22
    for context in range(8, 11):  # begin token, three words, the image and the end token are 11
        with pytest.raises(Skip, match="no image left"):
            make_documents("3i2i3", cfg=config(context=context))
    for context in range(11, 25):
        cut, = make_documents("3i2i3", cfg=config(context=context))
        *kept, end = cut["ids"].tolist()
        assert end == EOS and kept == ids[:len(kept)] and len(kept) < context
        assert kept.count(SOI) == kept.count(EOI) == kept.count(IMG) / 4 == len(cut["images"])
        assert np.array_equal(cut["images"], whole["images"][:len(cut["images"])])
        fills_up = len(kept) + 1 in (context, 22)
        next_image_too_long = ids[len(kept)] == SOI and len(kept) + len(IMAGE) + 1 > context
        assert fills_up or next_image_too_long


def test_the_labels_of_the_specified_example():
    image = np.zeros((3, 16, 16), np.uint8)
    segments = [[10, 11, 12], image, [20, 21], image, [30, 31]]
    document = lcl.sequence(segments, np.asarray, config())
    batch = lcl.pack([document], config())
    ids = [BOS, 10, 11, 12, *IMAGE, 20, 21, *IMAGE, 30, 31, EOS]
    assert batch["ids"][0].tolist() == ids + [PAD] * 27
    labels = batch["labels"].tolist()
    assert labels == [10, 11, 12, SOI, 20, 21, SOI, 30, 31, EOS]  # SOI, but not what follows it
    assert [ids[t + 1] for t in batch["label_index"]] == labels
    assert ids[batch["label_index"][4]] == EOI  # the word after an image, from its last token
    assert batch["soi_index"].tolist() == [4, 12]


def test_first_fit_the_longest_document_first():
    documents = make_documents(*LAYOUTS)
    batch = lcl.pack(documents, config())
    lengths = [[int((row == n).sum()) for n in range(row.max() + 1)] for row in batch["document"]]
    assert lengths == [[37], [35, 13], [22, 14, 12]]
    assert (batch["document"][1] >= 0).all()  # full to the last token
    order = [4, 3, 2, 0, 5, 1]
    images = np.concatenate([documents[d]["images"] for d in order])
    assert torch.equal(batch["images"], torch.from_numpy(images))
    apart = lcl.pack(documents, config(pack=False))
    assert apart["document"].amax(1).tolist() == [0] * 6


def test_every_word_end_and_begin_of_an_image_of_packed_documents_is_a_label_once():
    documents = make_documents(*LAYOUTS)
    batch = lcl.pack(documents, config())
    ids = [i for document in documents for i in document["ids"].tolist()]
    labels = batch["labels"].tolist()
    assert Counter(labels) == Counter(i for i in ids if i not in (BOS, IMG, EOI))
    assert torch.equal(batch["ids"].flatten()[batch["label_index"] + 1], batch["labels"])
    # the first word of each document is predicted by its own begin token
    assert (batch["position"].flatten()[batch["label_index"]] == 0).sum() == 6


# ---- masks ----

def test_a_token_sees_itself_and_earlier_tokens_of_its_document():
    batch = lcl.pack(make_documents(*LAYOUTS), config())
    mask = lcl.dense_mask(batch["document"])
    assert mask.shape == (3, 1, 48, 48)
    for row, query, key in itertools.product(range(3), range(48), range(48)):
        same_document = batch["document"][row, query] == batch["document"][row, key]
        assert mask[row, 0, query, key] == (same_document and key <= query)
    assert mask.any(3).all()  # padding too sees something: no NaN


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_block_mask_for_cuda_is_the_dense_mask():
    document = lcl.pack(make_documents(*LAYOUTS), config())["document"]
    q, k, v = torch.randn(3, 3, 2, 48, 16)
    dense = common.attention(q, k, v, lcl.dense_mask(document))
    torch.testing.assert_close(common.attention(q, k, v, lcl.block_mask(document)), dense)


# ---- packed = apart ----

@pytest.mark.parametrize("changes", [
    {}, {"pack": False}, {"objective": "gen"}, {"objective": "con"}, {"objective": "gen+reg"},
    {"contrast_empty_context": True}, {"micro": 2}, {"context": 64}])
def test_losses_and_gradients_of_packed_documents_are_those_of_documents_apart(changes):
    cfg = config(**changes)
    model = build(cfg)
    documents = make_documents(*LAYOUTS)
    loss, terms = lcl.losses(model, lcl.pack(documents, cfg), cfg)
    apart = losses_apart(model, documents, cfg)
    for name in PARTS[cfg.objective]:
        assert terms[name].item() == pytest.approx(apart[name].item(), rel=1e-10), name
    weights = {"gen": cfg.w_gen, "con": cfg.w_con, "reg": 1.0}
    total = sum(weights[name] * apart[name] for name in PARTS[cfg.objective])
    assert loss.item() == pytest.approx(total.item(), rel=1e-10)
    assert_same_gradients(gradients(model, loss), gradients(model, total))


def test_no_document_takes_anything_from_its_neighbors():
    """Gradients on the words (each document has its own) and images of the others are exactly 0."""
    documents = []
    for d, layout in enumerate(LAYOUTS):
        documents += make_documents(layout, first_id=10 + 40 * d, last_id=50 + 40 * d)
    model = build()
    batch = with_image_gradients(model, lcl.pack(documents, config()))
    out = model(batch)
    document = torch.tensor([4, 3, 2, 0, 5, 1])  # in the order of the rows
    first = batch["document"].flatten().diff(prepend=torch.tensor([-1])).ne(0)
    first |= batch["position"].flatten() == 0
    number = (first & (batch["document"].flatten() >= 0)).cumsum(0) - 1  # of each place
    of_image = document[number[batch["soi_index"]]]
    of_label = document[number[batch["label_index"]]]
    for d in range(6):
        own = out["logits"][of_label == d].square().sum()
        own = own + out["context"][of_image == d].pow(3).sum()
        words = influences(own, model.token_embed.weight)
        assert words[10 + 40 * d:50 + 40 * d].any()
        assert not words[10:10 + 40 * d].any() and not words[50 + 40 * d:].any()
        assert not influences(own, batch["images"])[of_image != d].any()


def test_the_order_of_documents_does_not_matter():
    model = build()
    documents = make_documents(*LAYOUTS, "2i3i3", "i4")
    results = []
    for order in (documents, documents[::-1]):
        loss, _ = lcl.losses(model, lcl.pack(order, config()), config())
        results.append((loss, gradients(model, loss)))
    assert results[0][0].item() == pytest.approx(results[1][0].item(), rel=1e-11)
    assert_same_gradients(results[0][1], results[1][1])


def test_every_image_goes_to_its_own_places():
    """No two may be exchanged unnoticed; that the order is right, documents apart have shown."""
    model = build()
    batch = lcl.pack(make_documents("3i2i3", "4i1i2"), config())
    _, terms = lcl.losses(model, batch, config())
    for i, j in itertools.combinations(range(4), 2):
        order = [0, 1, 2, 3]
        order[i], order[j] = j, i
        _, other = lcl.losses(model, {**batch, "images": batch["images"][order]}, config())
        assert abs(other["gen"] - terms["gen"]) > 1e-7 and abs(other["con"] - terms["con"]) > 1e-7


@pytest.mark.parametrize("objective, unused", [
    ("gen", "context_proj"), ("gen+reg", "context_proj"), ("con", "head")])
def test_a_term_that_an_arm_leaves_out_is_not_computed(objective, unused):
    cfg = config(objective=objective)
    model = build(cfg)
    getattr(model, unused).weight.data.fill_(math.nan)
    loss, terms = lcl.losses(model, lcl.pack(make_documents(*LAYOUTS), cfg), cfg)
    assert terms.keys() == {*PARTS[objective], "spread", "cosine"}
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name


# ---- what depends on what ----

def test_a_context_is_blind_to_its_image_and_to_all_that_follows():
    model = build()
    batch = with_image_gradients(model, lcl.pack(make_documents("3i2i3i2"), config()))
    out = model(batch)
    for k, place in enumerate(batch["soi_index"]):
        context = random_projection(out["context"][k])
        images = influences(context, batch["images"])
        places = influences(context, model.pos_embed)
        assert images[:k].all() and not images[k:].any()
        assert places[:place + 1].all() and not places[place + 1:].any()


def test_logits_depend_on_all_up_to_their_place_and_on_nothing_later():
    model = build()
    batch = lcl.pack(make_documents("3i2i3i2"), config())
    logits = model(batch)["logits"]
    for m, place in enumerate(batch["label_index"]):
        places = influences(random_projection(logits[m]), model.pos_embed)
        assert places[:place + 1].all() and not places[place + 1:].any()


def test_an_image_token_is_regressed_from_the_state_just_before_it():
    cfg = config(objective="gen+reg")
    model = build(cfg)
    batch = lcl.pack(make_documents("3i2i3"), cfg)
    predicted = model(batch)["predicted_tokens"]
    for k, n in itertools.product(range(2), range(4)):
        place = batch["soi_index"][k] + n
        places = influences(random_projection(predicted[k, n]), model.pos_embed)
        assert places[:place + 1].all() and not places[place + 1:].any()


def test_a_latent_is_of_its_image_alone():
    model = build()
    batch = with_image_gradients(model, lcl.pack(make_documents(*LAYOUTS), config()))
    latent = model(batch)["latent"]
    for k in range(4):
        value = random_projection(latent[k])
        assert influences(value, batch["images"]).nonzero().tolist() == [[k]]
        assert not influences(value, model.token_embed.weight).any()
    torch.testing.assert_close(model.encode_image(batch["images"]), latent, rtol=1e-12, atol=0)


def test_embeddings_of_image_places_and_of_padding_are_never_used():
    model = build()
    loss, _ = lcl.losses(model, lcl.pack(make_documents(*LAYOUTS), config()), config())
    used = influences(loss, model.token_embed.weight)
    assert not used[[IMG, PAD]].any() and used[[BOS, SOI, EOI]].all()


def test_with_uniform_attention_the_latent_is_the_mean_of_the_tokens():
    model = build()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    tokens, latent = model.encode(images)
    assert (tokens.mean(1) - latent).abs().max() > 1e-3
    for p in model.pool.q.parameters():
        p.data.zero_()
    tokens, latent = model.encode(images)
    torch.testing.assert_close(tokens.mean(1), latent, rtol=1e-12, atol=1e-14)


def test_pairs_with_the_text_first_are_clip():
    cfg = config(objective="con", w_con=1.0)
    model = build(cfg)
    batch = lcl.pack(make_documents("3i", "4i", "5i", "6i", "7i"), cfg)
    out = model(batch)
    loss, _ = lcl.losses(model, batch, cfg)
    clip = infonce_by_hand(out["latent"], out["context"], model.contrast_scale())
    assert loss.item() == pytest.approx(clip.item(), rel=1e-12)
    grads = gradients(model, loss)
    assert grads["head.weight"] is None and grads["norm_head.weight"] is None
    assert grads["vision.cls_token"].ne(0).all()  # it takes part in attention, though not a token


def test_pairs_with_the_image_first_are_captioning():
    model = build()
    loss, terms = lcl.losses(model, lcl.pack(make_documents("i3", "i4", "i5"), config()), config())
    assert terms["con"].item() == 0
    unused = ("context_proj.", "norm_context.", "pool.query", "pool.norm_q.", "pool.norm_k.",
              "pool.q.", "pool.k.", "log_scale")
    for name, grad in gradients(model, loss).items():
        assert grad.isfinite().all()
        assert grad.eq(0).all() == name.startswith(unused), name


def test_an_image_between_texts_learns_from_both_losses_and_from_the_contrast_of_a_later_image():
    model = build()
    batch = with_image_gradients(model, lcl.pack(make_documents("3i2i3", "4i"), config()))
    _, terms = lcl.losses(model, batch, config())
    assert influences(terms["gen"], batch["images"])[:2].all()
    assert influences(terms["con"], batch["images"])[:2].all()
    later = random_projection(model(batch)["context"][1])
    assert influences(later, batch["images"]).tolist() == [True, False, False]


@pytest.mark.parametrize("demanded", [False, True])
def test_an_image_with_nothing_before_it_is_contrasted_only_on_demand(demanded):
    cfg = config(contrast_empty_context=demanded)
    batch = lcl.pack(make_documents("i3", "3i3", "i5", "4i", "ii2", cfg=cfg), cfg)
    empty = batch["position"].flatten()[batch["soi_index"]] == 1
    assert empty.sum() == 3  # the second image of "ii" has one before it
    assert torch.equal(lcl.has_context(batch), ~empty)
    model = build(cfg)
    out = model(batch)
    contexts = out["context"][empty]
    torch.testing.assert_close(contexts, contexts[:1].expand(3, -1))  # one vector for all of them
    used = ~empty | demanded
    loss = infonce_by_hand(out["latent"][used], out["context"][used], model.contrast_scale())
    _, terms = lcl.losses(model, batch, cfg)
    assert terms["con"].item() == pytest.approx(loss.item(), rel=1e-10)


def test_fresh_losses_are_those_of_a_guess_and_the_scale_is_clips():
    cfg = config(context=96, dim=64, text_dim=64, heads=4, text_heads=4, batch=36)
    model = build(cfg, noise=0)
    batch = lcl.pack(make_documents(*LAYOUTS * 6, cfg=cfg), cfg)
    _, terms = lcl.losses(model, batch, cfg)
    assert terms["gen"].item() == pytest.approx(math.log(300), abs=0.4)
    assert -0.1 < terms["con"].item() - math.log(60) < 1.5
    assert model.contrast_scale().item() == pytest.approx(1 / 0.07)


@pytest.mark.parametrize("log_scale, scale", [(9, 100), (-3, 1), (0.7, math.exp(0.7))])
def test_the_scale_stays_between_1_and_100(log_scale, scale):
    model = build()
    model.log_scale.data.fill_(log_scale)
    assert model.contrast_scale().item() == pytest.approx(scale)
    model.clamp_scale()
    assert model.log_scale.exp().item() == pytest.approx(scale)


def test_gradients_are_the_same_to_the_bit_each_time_with_many_threads():
    """x[index] with repeated positions would add up in the order of the threads."""
    cfg = config(dim=32, text_dim=64, batch=64, context=64)
    torch.manual_seed(0)
    model = lcl.LCL(cfg)
    batch = lcl.pack(make_documents(*LAYOUTS * 8, cfg=cfg), cfg)
    torch.set_num_threads(4)
    try:
        loss, _ = lcl.losses(model, batch, cfg)
        first = gradients(model, loss)
        for _ in range(5):
            loss, _ = lcl.losses(model, batch, cfg)
            for name, grad in gradients(model, loss).items():
                assert torch.equal(grad, first[name]), name
    finally:
        torch.set_num_threads(1)


def test_a_third_number_of_images_and_rows_compiles_nothing_new():
    cfg = config()
    model = build(cfg)
    plain = build(cfg)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model.encode = torch.compile(model.encode, fullgraph=True, backend=count)
    model.decode = torch.compile(model.decode, fullgraph=True, backend=count)
    n_graphs = []
    for n in (2, 6, 5, 4, 3):
        batch = lcl.pack(make_documents(*LAYOUTS[-n:]), cfg)
        loss, _ = lcl.losses(model, batch, cfg)
        expected, _ = lcl.losses(plain, batch, cfg)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        n_graphs.append(len(graphs))
    assert n_graphs[1:] == [4] * 4  # of each tower: for the first number, and for any


# ---- contrast, and the collapse that it prevents ----

def test_contrast_of_two_orthogonal_pairs_by_hand():
    # cosines are the identity: each of the four cross-entropies is -log(e / (e + 1)) = 0.31326
    pairs = torch.eye(2)
    valid = torch.tensor([True, True])
    loss = lcl.info_nce(pairs, pairs, valid, torch.tensor(1.0))
    assert loss.item() == pytest.approx(0.31326, abs=1e-5)
    # a third pair that is not valid changes nothing, however well it fits
    three = torch.cat([pairs, pairs[:1]])
    valid = torch.tensor([True, True, False])
    assert lcl.info_nce(three, three, valid, torch.tensor(1.0)) == loss


def test_more_images_than_the_gathered_size_are_no_silent_loss():
    padded = lcl.pad_rows(torch.ones(2, 3), 4)
    assert padded.tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0]]
    with pytest.raises(UserError, match="3 images in a batch of 2 pairs: .*--docs"):
        lcl.pad_rows(torch.ones(3, 2), 2)


def contrast_of_this_rank(latent, context, valid):
    """Loss of this rank's rows, and its share of the gradients of the mean over ranks."""
    latent = latent.chunk(world_size())[rank()].clone().requires_grad_()
    context = context.chunk(world_size())[rank()].clone().requires_grad_()
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    loss = lcl.info_nce(latent, context, valid.chunk(world_size())[rank()], scale)
    loss.backward()
    grads = [x.grad / world_size() for x in (latent, context, scale)]
    return loss.item(), *[grad.numpy() for grad in grads]


@pytest.mark.parametrize("counts", [(3, 0), (1, 4), (0, 0)])
def test_contrast_of_ranks_with_unequal_numbers_of_pairs_is_that_of_one(run_on_ranks, counts):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 8, dtype=torch.float64, generator=generator)
    latent, context = l2_normalize(x)
    valid = (torch.arange(4) < torch.tensor(counts)[:, None]).flatten()
    results = run_on_ranks(2, contrast_of_this_rank, latent, context, valid)
    z = latent[valid].requires_grad_()
    y = context[valid].requires_grad_()
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    loss = 0 * (z.sum() + y.sum() + scale)
    if sum(counts):
        loss = infonce_by_hand(z, y, scale)
    loss.backward()
    assert np.mean([result[0] for result in results]) == pytest.approx(loss.item(), abs=1e-10)
    for i, leaf in ((1, z), (2, y)):
        grad = np.concatenate([result[i] for result in results])
        np.testing.assert_allclose(grad[valid], leaf.grad.numpy(), atol=1e-10)
        assert not grad[~valid].any()
    assert sum(result[3] for result in results) == pytest.approx(scale.grad.item(), abs=1e-10)


def losses_of_this_rank(counts, objective):
    """Terms and averaged gradients, with `counts` of the documents on each rank."""
    cfg = config(objective=objective)
    model = build(cfg)
    documents = make_documents(*LAYOUTS)
    start = sum(counts[:rank()])
    batch = lcl.pack(documents[start:start + counts[rank()]], cfg)
    loss, terms = lcl.losses(model, batch, cfg)
    loss.backward()
    common.average_gradients(model.parameters())
    shares = {name: x.detach().double() for name, x in {"loss": loss, **terms}.items()}
    means = {name: common.all_reduce_sum(x).item() / world_size() for name, x in shares.items()}
    return means, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("objective", ["lcl", "gen+reg"])
def test_ranks_with_unequal_numbers_of_images_and_labels_are_one_run(run_on_ranks, objective):
    terms, grads = losses_of_this_rank([6], objective)
    for other_terms, other_grads in run_on_ranks(2, losses_of_this_rank, [5, 1], objective):
        assert other_terms == pytest.approx(terms, rel=1e-9)
        assert_same_gradients(other_grads, grads)


def test_collapse_metrics_are_deviation_and_cosine_by_definition():
    rng = np.random.default_rng(0)
    tokens = rng.normal(0.5, 1, (6, 4, 16))
    latent = rng.normal(0.2, 1, (6, 16))
    latent /= np.linalg.norm(latent, axis=1, keepdims=True)
    metrics = lcl.collapse_metrics(torch.from_numpy(tokens), torch.from_numpy(latent))
    spread = tokens.mean(1).std(0).mean() / np.sqrt((tokens**2).mean())
    cosines = [latent[i] @ latent[j] for i, j in itertools.combinations(range(6), 2)]
    assert metrics["spread"].item() == pytest.approx(spread, rel=1e-10)
    assert metrics["cosine"].item() == pytest.approx(np.mean(cosines), rel=1e-10)


def test_collapse_metrics_of_equal_images_are_0_and_1_and_of_orthogonal_latents_0():
    tokens = torch.full((8, 4, 16), 3.0)
    latent = l2_normalize(torch.ones(8, 16))
    metrics = lcl.collapse_metrics(tokens, latent)
    assert metrics["spread"].item() == 0
    assert metrics["cosine"].item() == pytest.approx(1, abs=1e-6)
    assert lcl.collapse_metrics(tokens, torch.eye(8, 16))["cosine"].item() == 0
    alone = lcl.collapse_metrics(tokens[:1], torch.eye(1, 16))
    assert alone["spread"].item() == alone["cosine"].item() == 0


def train(cfg, batches):
    """Terms of the last step."""
    torch.manual_seed(0)
    model = lcl.LCL(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    for documents in batches:
        loss, terms = lcl.losses(model, lcl.pack(documents, cfg), cfg)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: x.item() for name, x in terms.items()}


@pytest.mark.parametrize("objective", ["gen+reg", "lcl"])
def test_regression_makes_all_images_the_same_and_contrast_does_not(objective):
    """Documents of three words, each before a noisy image of its color: no later word depends on
    the images."""
    cfg = config(dim=32, text_dim=32, objective=objective, w_gen=1.0, w_con=1.0, vocab_size=32,
                 batch=16)
    colors = np.random.default_rng(9).integers(90, 170, (6, 3, 1, 1))

    def make_batch(step):
        rng = np.random.default_rng(step)
        documents = []
        for _ in range(16):
            segments = []
            for color in rng.integers(0, 6, 3).tolist():
                pixels = rng.normal(colors[color], 30, (3, 16, 16)).clip(0, 255)
                segments += [[20 + color], pixels.astype(np.uint8)]
            documents.append(lcl.sequence(segments, np.asarray, cfg))
        return documents

    terms = train(cfg, [make_batch(step) for step in range(200)])
    if objective == "lcl":
        assert terms["spread"] > 0.5 and terms["cosine"] < 0.5
    else:
        assert terms["spread"] < 0.1 and terms["cosine"] > 0.99


def test_eight_documents_are_learned_by_heart():
    cfg = config(dim=32, text_dim=32, w_gen=1.0, w_con=1.0)
    documents = make_documents(*["2i2i2i1"] * 8)
    terms = train(cfg, [documents] * 120)
    assert terms["con"] < 0.05 and terms["gen"] < 1  # a document's first word cannot be known


# ---- text and captions ----

def padded(tokenizer, texts, length):
    tokens, valid = zip(*[tokenizer.pad(text, length) for text in texts])
    return torch.from_numpy(np.stack(tokens)), torch.from_numpy(np.stack(valid))


def test_a_text_is_encoded_as_the_context_that_it_is_in_training():
    texts = ["a", "a red star", "two small blue circles"]
    cfg = config(image_first=0.0)
    model = build(cfg)
    contexts = []
    for text in texts:
        row = lcl.example(pair(text), np.random.default_rng(0), cfg, Tokenizer())
        contexts.append(model(lcl.pack([row], cfg))["context"][0])
    tokens, valid = padded(Tokenizer(), texts, 40)
    before = tokens.clone()
    encoded = model.encode_text(tokens, valid)
    torch.testing.assert_close(encoded, torch.stack(contexts), rtol=1e-11, atol=1e-12)
    assert torch.equal(tokens, before)  # the released code overwrites it


def test_a_caption_scores_and_ends_as_in_training():
    """score: minus its cross-entropy after its image; fused: the normed state at its end."""
    texts = ["a red star", "two"]
    cfg = config()
    model = build(cfg)
    images = [document["images"][0] for document in make_documents("i1", "i1")]
    scores = []
    ends = []
    for text, image in zip(texts, images):
        segments = [image, Tokenizer().encode(text)]
        batch = lcl.pack([lcl.sequence(segments, np.asarray, cfg)], cfg)
        image_tokens, _ = model.encode(batch["images"])
        x = model.embed(batch["ids"], batch["position"], batch["soi_index"], image_tokens)
        x = model.decode(x)[0]
        labels = batch["ids"][0, 7:7 + len(text) + 1]  # after eoi, with the end token
        loss = F.cross_entropy(model.logits(x[6:6 + len(labels)]), labels)
        scores.append(-loss.item())
        ends.append(model.norm_head(x[6 + len(labels)]))
    images = torch.from_numpy(np.stack(images))
    for length in (13, 48):  # with padding beyond the context
        tokens, valid = padded(Tokenizer(), texts, length)
        assert model.score(images, tokens, valid).tolist() == pytest.approx(scores, rel=1e-10)
        fused = model.fused(images, tokens, valid)
        torch.testing.assert_close(fused, torch.stack(ends), rtol=1e-10, atol=1e-12)


def test_generation_with_kept_keys_and_values_is_generation_anew():
    cfg = config(vocab_size=12, context=24)
    model = build(cfg, noise=0.3)
    torch.manual_seed(5)  # large weights: captions differ, and end at many lengths
    model.token_embed.weight.data = 2 * torch.randn(12, 16, dtype=torch.float64)
    model.head.weight.data = torch.randn(12, 16, dtype=torch.float64)
    model.pool.out.weight.data = torch.randn(16, 16, dtype=torch.float64)
    images = np.concatenate([d["images"] for d in make_documents(*["i1"] * 16)])
    images = torch.from_numpy(images)
    expected = torch.full((16, 20), PAD)
    for row, image in enumerate(images):
        image_tokens, _ = model.encode(image[None])
        ids = [BOS, *IMAGE]
        while len(ids) < 24 and ids[-1] != EOS:
            position = torch.arange(len(ids))
            x = model.embed(torch.tensor([ids]), position, torch.tensor([1]), image_tokens)
            ids.append(model.logits(model.decode(x))[0, -1].argmax().item())
        expected[row, :len(ids) - 7] = torch.tensor(ids[7:])
    lengths = (expected != PAD).sum(1)
    assert len(lengths.unique()) > 3 and lengths.max() == 17  # no caption passes the context
    assert torch.equal(model.generate(images, 20), expected)
    assert torch.equal(model.generate(images, 5), expected[:, :5])
    assert torch.equal(model.generate(images[3:4], 20), expected[3:4])
    assert model.generate(images[:0], 5).shape == (0, 5)  # a rank may have no rows


@pytest.mark.parametrize("contrast_empty_context", [False, True])
def test_held_out_contexts_are_matched_by_the_vectors_of_training(contrast_empty_context):
    cfg = config(contrast_empty_context=contrast_empty_context)
    model = build(cfg)
    documents = make_documents(*LAYOUTS)
    which, similarity = lcl.match_contexts(model, documents, cfg, torch.device("cpu"))
    # the image of the third document has nothing before it
    assert which == [(0, 0), (0, 1), (1, 0), (3, 0), (3, 1), (3, 2), (3, 3), (4, 0), (4, 1), (5, 0)]
    latents = []
    contexts = []
    for d, k in which:
        out = model(lcl.pack([documents[d]], cfg))
        latents.append(out["latent"][k])
        contexts.append(out["context"][k])
    expected = torch.stack(contexts) @ torch.stack(latents).T
    torch.testing.assert_close(similarity, expected, rtol=1e-9, atol=1e-10)


def test_a_picture_shows_the_text_around_an_image_across_other_images():
    cfg = config(context=96)
    images = [np.zeros((3, 16, 16), np.uint8)] * 7  # of 42 tokens, more than are shown
    segments = [Tokenizer().encode("a red star"), *images, Tokenizer().encode("and a cat")]
    document = lcl.sequence(segments, np.asarray, cfg)
    for k in (0, 3, 6):
        before, _, after = lcl.text_around(
            build(cfg).float(), Tokenizer(), document, k, cfg, torch.device("cpu"))
        assert before == "a red star" and after == "and a cat"


# ---- runs ----

def test_documents_and_pairs_share_batches(toy_data, tmp_path):
    cfg = tiny_config("lcl", toy_data, tmp_path, data=[f"{toy_data}/pairs"], steps=2)
    rows, _, _ = run(lcl.main, cfg)
    assert [row["step"] for row in rows] == [0, 1]
    source = data.open_index(cfg.docs), data.open_index(cfg.data)
    assert source[0][0].is_document() and not source[1][0].is_document()


def test_pairs_alone_train_too_and_gather_one_image_each(toy_data, tmp_path, monkeypatch):
    sizes = set()
    info_nce = lcl.info_nce

    def note_size(latent, *args):
        sizes.add(len(latent))
        return info_nce(latent, *args)

    monkeypatch.setattr(lcl, "info_nce", note_size)
    cfg = tiny_config("lcl", toy_data, tmp_path, docs=None, data=[f"{toy_data}/pairs"], steps=2)
    rows, _, _ = run(lcl.main, cfg)
    assert all(row["con"] > 0 for row in rows)  # about half of them have their text before
    assert sizes == {cfg.batch}


def test_held_out_documents_are_part_of_the_result(toy_data, tmp_path):
    cfg = tiny_config("lcl", toy_data, tmp_path, steps=1, eval_every=0)
    _, _, result = run(lcl.main, cfg)
    assert {"context_r1", "image_r1"} <= result.keys()
    assert json.loads((tmp_path / "result.json").read_text()) == result


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(UserError, match="--objective clip: choose lcl, gen, con, gen.reg"):
        lcl.LCL(config(objective="clip"))
    with pytest.raises(UserError, match="--objective con has nothing to learn .*--w-con 0"):
        lcl.LCL(config(objective="con", w_con=0.0))
    with pytest.raises(UserError, match="--context 7 has no room .*of 4 patches.*8 is the least"):
        lcl.LCL(config(context=7))
    lcl.LCL(config(context=8))
