"""LCL: documents, rows, masks, losses and generation against the oracles of its specification."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import eval as evaluation
import lcl
from common import UserError, rank, world_size
from conftest import assert_same_gradients, gradients, painted_sample, run, tiny_config
from data import Skip, Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

PAD = Tokenizer.PAD
BOS = Tokenizer.BOS
EOS = Tokenizer.EOS
SOI = Tokenizer.SOI
EOI = Tokenizer.EOI
IMG = Tokenizer.IMG
IMAGE = [SOI, IMG, IMG, IMG, IMG, EOI]  # 16 pixels in patches of 8

# "3i2": three random tokens, a random image, two tokens. Of 22, 12, 35, 37, 14 and 13 tokens; the
# image of the last has nothing before it
LAYOUTS = ["3i2i3", "4i", "2i2ii1i4", "9i9i5", "3i3", "i5"]


def config(**changes):
    """4 patches an image, rows of 48 tokens, weights other than 1."""
    fields = dict(depth=1, text_depth=2, context=48, batch=12, w_gen=0.7, w_con=0.9)
    return tiny_config("lcl", "no data", "no folder", **{**fields, **changes})


def build(cfg=None, noise=0.1):
    """A model in float64. Noise on all weights, since biases of zero hide mistakes."""
    torch.manual_seed(0)
    model = lcl.LCL(cfg or config()).double()
    for p in model.parameters():
        p.data += noise * torch.randn_like(p)
    return model


def make_documents(*layouts, cfg=None):
    rng = np.random.default_rng(8)
    documents = []
    for layout in layouts:
        segments = []
        for c in layout:
            if c == "i":
                segments.append(rng.integers(0, 256, (3, 16, 16), np.uint8))
            else:
                segments.append(rng.integers(8, 300, int(c)).tolist())
        documents.append(lcl.sequence(segments, np.asarray, cfg or config()))
    return documents


def influences(state, inputs):
    """(n,): has each row of the inputs a gradient of the state that is not exactly 0?"""
    value = state.pow(3).sum()  # the squares of a unit vector have a constant sum
    grad, = torch.autograd.grad(value, inputs, retain_graph=True, materialize_grads=True)
    return grad.flatten(1).ne(0).any(1)


def losses_apart(model, documents, cfg):
    """The definition, from documents that go through the model one by one -> gen, con, reg."""
    batches = [lcl.pack([document], cfg) for document in documents]
    outs = [model(batch) for batch in batches]

    def join(parts, name):
        return torch.cat([part[name] for part in parts])

    image_tokens, latent = model.encode(join(batches, "images"))
    contrasted = join(batches, "soi_index") > 1  # more than the begin token stands before it
    if cfg.contrast_empty_context:
        contrasted[:] = True
    latent = F.normalize(latent[contrasted])
    logits = model.contrast_scale() * latent @ join(outs, "context")[contrasted].T
    own = torch.arange(len(latent))
    terms = {"con": (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2}
    if cfg.objective != "con":
        terms["gen"] = F.cross_entropy(join(outs, "logits"), join(batches, "labels"))
    if cfg.objective == "gen+reg":  # the targets take gradients too
        terms["reg"] = F.mse_loss(join(outs, "predicted_tokens"), image_tokens)
    return terms


# ---- samples (tests/test_data.py has LCL's rules for the images of MMC4) ----

def pair(text):
    return painted_sample(size=(20, 24), boxes=[], caption=text)


@pytest.mark.parametrize("image_first", [0.0, 1.0])
def test_a_caption_however_long_keeps_its_image(image_first):
    cfg = config(image_first=image_first)
    row = lcl.example(pair("long " * 50), np.random.default_rng(0), cfg, Tokenizer())
    text = Tokenizer().encode("long " * 50)[:40]
    middle = [*IMAGE, *text] if image_first else [*text, *IMAGE]
    assert row["ids"].tolist() == [BOS, *middle, EOS]
    assert len(row["images"]) == 1


def page(n_bytes):
    """A document whose image stands after n_bytes of text."""
    info = [{"image_name": "key.1.png", "matched_text_index": 1}]
    sample = painted_sample(text_list=["x" * n_bytes, "y"], image_info=info)
    sample.members["1.png"] = sample.members["jpg"]
    return sample


def test_documents_whose_first_image_does_not_fit_are_warned_of(capsys):
    index = [page(n) for n in (5, 40, 100, 5)]  # the second fits just so
    lcl.warn_of_long_documents(index, config(image_first=1.0), Tokenizer())
    line = capsys.readouterr().out
    assert "25% of the first 4 documents" in line
    assert "--context 108" in line  # begin token, 100 bytes, 6 of the image, end token


# ---- sequences and rows ----

def test_a_cut_leaves_no_part_of_an_image_and_as_much_as_fits():
    whole, = make_documents("3i2i3")
    ids = whole["ids"].tolist()
    with pytest.raises(Skip, match="no image left"):
        make_documents("3i2i3", cfg=config(context=10))
    # begin token, three words, the image and the end token are 11; with two more words 13; the
    # second image makes it 19
    for context, length in [(11, 11), (12, 12), (18, 13), (19, 19), (99, 22)]:
        cut, = make_documents("3i2i3", cfg=config(context=context))
        assert cut["ids"].tolist() == ids[:length - 1] + [EOS]
        n_images = 1 if length < 19 else 2
        assert np.array_equal(cut["images"], whole["images"][:n_images])


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
    apart = lcl.pack(documents, config(pack=False))
    assert apart["document"].amax(1).tolist() == [0] * 6


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_block_mask_for_cuda_is_the_dense_mask():
    document = lcl.pack(make_documents(*LAYOUTS), config())["document"]
    q, k, v = torch.randn(3, 3, 2, 48, 16)
    dense = common.attention(q, k, v, lcl.dense_mask(document))
    torch.testing.assert_close(common.attention(q, k, v, lcl.block_mask(document)), dense)


# ---- packed = apart ----

@pytest.mark.parametrize("weights, changes", [
    ({"gen": 0.7, "con": 0.9}, {}),
    ({"gen": 0.7, "con": 0.9}, {"contrast_empty_context": True}),
    ({"con": 0.9}, {"objective": "con"}),
    ({"gen": 0.7, "reg": 1.0}, {"objective": "gen+reg"}),
])
def test_losses_and_gradients_of_packed_documents_are_those_of_documents_apart(weights, changes):
    cfg = config(**changes)
    model = build(cfg)
    documents = make_documents(*LAYOUTS)
    loss, terms = lcl.losses(model, lcl.pack(documents, cfg), cfg)
    apart = losses_apart(model, documents, cfg)
    for name in weights:
        assert terms[name].item() == pytest.approx(apart[name].item(), rel=1e-10), name
    total = sum(weights[name] * apart[name] for name in weights)
    assert loss.item() == pytest.approx(total.item(), rel=1e-10)
    assert_same_gradients(gradients(model, loss), gradients(model, total))


# ---- what depends on what ----

def test_states_depend_on_all_up_to_their_place_and_on_nothing_later():
    """Of the context of an image, the logits of a label, and the prediction of an image token."""
    cfg = config(objective="gen+reg")
    model = build(cfg)
    batch = lcl.pack(make_documents("3i2i3i2"), cfg)
    batch["images"] = torch.randn(3, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    out = model(batch)
    first_predictions = out["predicted_tokens"][:, 0]
    last_predictions = out["predicted_tokens"][:, 3]
    soi = batch["soi_index"]
    for states, places in [(out["context"], soi), (out["logits"], batch["label_index"]),
                           (first_predictions, soi), (last_predictions, soi + 3)]:
        for state, place in zip(states, places):
            used = influences(state, model.pos_embed)
            assert used[:place + 1].all() and not used[place + 1:].any()
    for k, context in enumerate(out["context"]):  # blind to its own image
        used = influences(context, batch["images"])
        assert used[:k].all() and not used[k:].any()


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


def test_pairs_with_the_image_first_are_captioning():
    model = build()
    loss, terms = lcl.losses(model, lcl.pack(make_documents("i3", "i4", "i5"), config()), config())
    assert terms["con"].item() == 0
    unused = ("context_proj.", "norm_context.", "pool.query", "pool.norm_q.", "pool.norm_k.",
              "pool.q.", "pool.k.", "log_scale")
    for name, grad in gradients(model, loss).items():
        assert grad.isfinite().all()
        assert grad.eq(0).all() == name.startswith(unused), name


@pytest.mark.parametrize("log_scale, scale", [(9, 100), (-3, 1)])
def test_the_scale_stays_between_1_and_100(log_scale, scale):
    model = build()
    model.log_scale.data.fill_(log_scale)
    assert model.contrast_scale().item() == pytest.approx(scale)
    model.clamp_scale()
    assert model.log_scale.exp().item() == pytest.approx(scale)


def test_gradients_are_the_same_to_the_bit_each_time_with_many_threads():
    """x[index] with repeated positions would add up in the order of the threads."""
    cfg = config(dim=32, text_dim=64, batch=64, context=64)
    model = build(cfg).float()
    batch = lcl.pack(make_documents(*LAYOUTS * 8, cfg=cfg), cfg)
    torch.set_num_threads(4)
    try:
        runs = [gradients(model, lcl.losses(model, batch, cfg)[0]) for _ in range(6)]
    finally:
        torch.set_num_threads(1)
    for grads in runs[1:]:
        assert_same_gradients(grads, runs[0], rtol=0, atol=0)


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
    means = {name: common.all_reduce_sum(x).item() / world_size() for name, x in terms.items()}
    return means, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("objective", ["lcl", "gen+reg"])
def test_a_rank_may_have_other_numbers_of_images_and_labels_and_none_to_contrast(
        run_on_ranks, objective):
    terms, grads = losses_of_this_rank([6], objective)
    for other_terms, other_grads in run_on_ranks(2, losses_of_this_rank, [5, 1], objective):
        assert other_terms == pytest.approx(terms, rel=1e-9)
        assert_same_gradients(other_grads, grads)


def colored_documents(step, colors, cfg):
    """Three words, each before a noisy image of its color: no later word depends on the images."""
    rng = np.random.default_rng(step)
    documents = []
    for _ in range(16):
        segments = []
        for color in rng.integers(0, 6, 3).tolist():
            pixels = rng.normal(colors[color], 30, (3, 16, 16)).clip(0, 255)
            segments += [[20 + color], pixels.astype(np.uint8)]
        documents.append(lcl.sequence(segments, np.asarray, cfg))
    return documents


@pytest.mark.parametrize("objective", ["gen+reg", "lcl"])
def test_regression_makes_all_images_the_same_and_contrast_does_not(objective):
    cfg = config(dim=32, text_dim=32, objective=objective, w_gen=1.0, w_con=1.0, vocab_size=32,
                 batch=16)
    colors = np.random.default_rng(9).integers(90, 170, (6, 3, 1, 1))
    torch.manual_seed(0)
    model = lcl.LCL(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    for step in range(200):
        batch = lcl.pack(colored_documents(step, colors, cfg), cfg)
        loss, terms = lcl.losses(model, batch, cfg)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if objective == "lcl":
        assert terms["spread"] > 0.5 and terms["cosine"] < 0.5
    else:
        assert terms["spread"] < 0.1 and terms["cosine"] > 0.99


# ---- text and captions ----

def test_a_text_is_encoded_as_the_context_that_it_is_in_training():
    texts = ["a", "a red star", "two small blue circles"]
    cfg = config(image_first=0.0)
    model = build(cfg)
    contexts = []
    for text in texts:
        row = lcl.example(pair(text), np.random.default_rng(0), cfg, Tokenizer())
        contexts.append(model(lcl.pack([row], cfg))["context"][0])
    encoded = model.encode_text(*evaluation.tokenize(Tokenizer(), texts, 40))
    torch.testing.assert_close(encoded, torch.stack(contexts), rtol=1e-11, atol=1e-12)
    nothing = evaluation.encode_texts(model, Tokenizer(), [], cfg, torch.device("cpu"))
    assert nothing.shape == (0, 16)  # a rank may have no texts


def test_a_caption_scores_and_ends_as_in_training():
    """score: minus its cross-entropy after its image; fused: the normed state at its end."""
    model = build()
    text = "a red star"
    image = np.arange(768, dtype=np.uint8).reshape(3, 16, 16)
    # after the end token one more word, so that there are logits of the state at the end
    document = lcl.sequence([image, Tokenizer().encode(text) + [EOS, 9]], np.asarray, config())
    batch = lcl.pack([document], config())
    logits = model(batch)["logits"]
    loss = F.cross_entropy(logits[1:12], batch["labels"][1:12])  # ten bytes and the end token
    for length in (13, 48):  # with padding beyond the context
        tokens, valid = [torch.tensor(x)[None] for x in Tokenizer().pad(text, length)]
        score = model.score(batch["images"], tokens, valid)
        assert score.item() == pytest.approx(-loss.item(), rel=1e-10)
        fused = model.fused(batch["images"], tokens, valid)
        torch.testing.assert_close(model.head(fused), logits[12:13], rtol=1e-10, atol=1e-12)


def test_captions_are_the_likeliest_token_each_time_up_to_the_end_a_soi_or_the_context():
    cfg = config(vocab_size=12, context=24)
    model = build(cfg, noise=0.3)
    torch.manual_seed(12)  # large weights: captions differ, and end in all three ways
    model.token_embed.weight.data = 2 * torch.randn(12, 16, dtype=torch.float64)
    model.head.weight.data = torch.randn(12, 16, dtype=torch.float64)
    model.pool.out.weight.data = torch.randn(16, 16, dtype=torch.float64)
    images = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8)
    expected = torch.full((16, 20), PAD)
    for row, image in enumerate(images):
        ids = [BOS]
        while len(ids) < 18 and ids[-1] not in (EOS, SOI):  # the image takes 6 of the context
            states = model.caption_states(image[None], torch.tensor([ids]))
            ids.append(model.logits(states)[0, -1].argmax().item())
        expected[row, :len(ids) - 1] = torch.tensor(ids[1:])
    assert expected.eq(EOS).any() and expected.eq(SOI).any() and expected[:, 16].ne(PAD).any()
    assert torch.equal(model.generate(images, 20), expected)
    ended = expected.eq(EOS).any(1)
    assert torch.equal(model.generate(images[ended], 20), expected[ended])  # all ended early


def test_held_out_contexts_are_matched_by_the_vectors_of_training():
    model = build()
    documents = make_documents("3i2i3", "i5", "4i")
    which, similarity = lcl.match_contexts(model, documents, config(), torch.device("cpu"))
    assert which == [(0, 1), (2, 0)]  # the last of each; the second has nothing before its image
    first = model(lcl.pack(documents[:1], config()))
    last = model(lcl.pack(documents[2:], config()))
    contexts = torch.stack([first["context"][1], last["context"][0]])
    latents = torch.stack([first["latent"][1], last["latent"][0]])
    torch.testing.assert_close(similarity, contexts @ latents.T, rtol=1e-9, atol=1e-10)


# ---- runs ----

def test_pairs_alone_train_too(toy_data, tmp_path):
    cfg = tiny_config("lcl", toy_data, tmp_path, docs=None, data=[f"{toy_data}/pairs"], steps=2)
    rows, _, _ = run(lcl.main, cfg)
    assert all(row["con"] > 0 for row in rows)  # about half of them have their text before


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(UserError, match="--objective clip: choose lcl, gen, con, gen.reg"):
        lcl.LCL(config(objective="clip"))
    with pytest.raises(UserError, match="nothing to learn"):
        lcl.LCL(config(objective="con", w_con=0.0))
    with pytest.raises(UserError, match="--context 7 has no room .*of 4 patches.*8 is the least"):
        lcl.LCL(config(context=7))
    with pytest.raises(UserError, match="3 images in a batch that may have 2: .*--docs"):
        lcl.pad_rows(torch.ones(3, 2), 2)  # what ranks gather has one size
