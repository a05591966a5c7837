"""Measure checkpoints: metrics as pure functions, protocols over shards, pictures, and one command line.

    python eval.py retrieval runs/align/last.pt --data '../shared/data/pairs/test-*.tar'
    python eval.py zeroshot runs/align/last.pt --data ../shared/data/labels
    python eval.py knn runs/align/last.pt                      # without --data: the built-in world's held-out split
    python eval.py linear runs/align/last.pt --protocol mae --data cifar/ pets/         # each folder is a data set; at the end their mean
    python eval.py finetune runs/mug/last.pt --data imagenet/ --percent 10              # trains: encoder and classifier; also segment, detect, vqa
    python eval.py segment vit.safetensors --data ade20k/ --frozen                      # an encoder file will do; the head alone
    python eval.py compare runs/*/last.pt --heads --out runs/report
    python eval.py export runs/align/last.pt --out vit.safetensors
    python eval.py search runs/align/last.pt --text 'a red circle' --image photo.jpg

Read the metrics first (each says whose definition it is), then the protocols, which ask a model for .vision, encode_image, encode_text, generate,
score and fused only, then Recipe, the four heads and train_head.
Every number is a fraction of the whole split. Several ranks share the work without padding: results do not depend on how many there are.

Dimension key: I images, T texts, C classes, P prompts of a class, E joint embedding, D width.
"""
import argparse, collections, colorsys, contextlib, copy, dataclasses, functools, hashlib, importlib, io, itertools, json, math, operator, os, re, sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import common
import data
from common import UserError, print0, rank, rank0_first, world

METHODS = {"ALIGN": "align", "MUG": "mug", "LCL": "lcl", "TiMix": "timix", "M3I": "m3i"}


# ---- metrics: fractions; of equal scores the earlier index ranks first, so a constant model does not score 100 %; a NaN never hits ----

def ranks(scores, target):                                   # scores (N, C), target (N,) column indices -> (N,) int64
    """Place of each row's target among the row's scores, 0 = best: how many are larger, or equal and earlier. A NaN target never hits."""
    places, column = [], torch.arange(scores.shape[1], device=scores.device)
    n = max(1, 2**22 // scores.shape[1])                     # rows per chunk: temporaries of 4 M scores, whatever N and C are
    for rows, t in zip(scores.split(n), target[:, None].split(n)):
        own = rows.gather(1, t)
        place = ((rows > own) | (rows == own) & (column < t)).sum(1)      # a NaN elsewhere compares false: it beats nobody
        places.append(place.masked_fill(own[:, 0].isnan(), torch.iinfo(torch.int64).max))
    return torch.cat(places)


def accuracy(scores, labels, k=1):                           # scores (N, C), labels (N,) in [0, C) -> fraction, or None
    """Share of items whose label is among the k best scores; None if k > C, where it means nothing (formats 9.1)."""
    assert len(scores) == len(labels) > 0, f"{len(scores)} rows of scores for {len(labels)} labels"
    return (ranks(scores, labels) < k).double().mean().item() if k <= scores.shape[1] else None


def recall_at_k(sim, owner, ks=(1, 5, 10)):                  # sim (T, I), owner (T,): the image of each text
    """{"i2t": {k: fraction}, "t2i": {k: fraction}} as ALBEF counts them (formats 9.2); rows are texts, columns images.

    t2i: share of texts whose image is among the k best images. i2t: share of images with at least one own text among the k best of all
    texts; images that own no text cannot be right or wrong and are left out (they still compete in t2i). k beyond the number of
    candidates gives 1, as the definition says. Nothing larger than a chunk of sim is built.
    """
    (texts, images), device = sim.shape, sim.device
    assert owner.shape == (texts,) and texts > 0, f"owner {tuple(owner.shape)} must name one image for each of {texts} texts"
    own = sim[torch.arange(texts, device=device), owner]     # only the best own text of an image matters: highest score, then earliest
    order = (-own).argsort(stable=True)                      # all texts in that order; NaN sorts last
    first = torch.full((images,), texts, device=device).scatter_reduce(0, owner, order.argsort(), "amin")   # texts = owns none
    i2t = ranks(sim.T, order[first.clamp(max=texts - 1)])[first < texts]
    t2i = ranks(sim, owner)
    return {name: {k: (place < k).double().mean().item() for k in ks} for name, place in (("i2t", i2t), ("t2i", t2i))}


def mean_per_class(pred, labels):                            # pred, labels (N,) class indices
    """Mean over the classes present in labels of the share predicted right (= balanced accuracy, scikit-learn)."""
    assert pred.shape == labels.shape and len(labels) > 0, f"{tuple(pred.shape)} predictions for {tuple(labels.shape)} labels"
    count = labels.bincount()
    right = labels[pred == labels].bincount(minlength=len(count))
    return (right[count > 0].double() / count[count > 0]).mean().item()


def knn(train, train_labels, test, k=20):                    # train (N, E), train_labels (N,), test (M, E), any length -> (M,)
    """Weighted vote of the k nearest by cosine, weight exp(sim / 0.07) (DINO eval_knn.py). A feature with NaN gets, and gives, no vote:
    a test item without any vote is labelled -1. Needs k <= N."""
    assert k <= len(train), f"k = {k} neighbours out of {len(train)} training features"
    train, labels = F.normalize(train, dim=1), []
    for rows in F.normalize(test, dim=1).split(max(1, 2**24 // len(train))):
        sim = (rows @ train.T).nan_to_num(nan=-torch.inf)
        last = sim.topk(k).values[:, -1:]                    # topk breaks ties as it likes, so take its k-th value, not its choice
        tied = sim == last
        near = (sim > last) | tied & (tied.cumsum(1) <= k - (sim > last).sum(1, keepdim=True))    # exactly k per row
        near = near.nonzero()[:, 1].view(len(rows), k)
        votes = sim.new_zeros(len(rows), int(train_labels.max()) + 1)
        best = votes.scatter_add(1, train_labels[near], (sim.gather(1, near) / 0.07).exp()).max(1)
        labels.append(best.indices.masked_fill(best.values == 0, -1))
    return torch.cat(labels)


def prompt_ensemble(embeds):                                 # (C, P, E): P prompts of each class, any length -> (C, E), unit length
    """Zero-shot classifier of CLIP: mean of unit vectors, made unit again. Without the inner step long vectors win (formats 11.1)."""
    return F.normalize(F.normalize(embeds, dim=-1).mean(1), dim=-1)


def logistic(x, y, C, start, most=1000):                    # x (N, E) float64, y (N,), start = weights (E, classes) and bias (classes,)
    """Logistic regression as scikit-learn states it: |W|^2 / 2 + C * summed cross-entropy, full-batch L-BFGS, until the gradient of the mean is
    below 1e-4 or for `most` iterations. -> weights, bias"""
    W, b = (p.clone().requires_grad_() for p in start)
    opt = torch.optim.LBFGS([W, b], max_iter=most, tolerance_grad=1e-4, line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(x @ W + b, y) + W.square().sum() / (2 * C * len(y))
        loss.backward()
        return loss
    opt.step(closure)
    return W.detach(), b.detach()


def linear_probe(train, train_labels, test):                 # train (N, E), train_labels (N,), test (M, E) -> labels (M,)
    """CLIP's probe: logistic regression on features as they are. C is searched as CLIP does (appendix A.3), coarser: the powers of a hundred from
    1e-6 to 1e6, then steps of 10, 3.2 and 1.8 around the best, by accuracy on every fifth training row after 100 iterations; then all rows
    are fitted."""
    assert len(train) >= 5, f"{len(train)} training rows: a fifth of them is needed to choose C"
    train, test, classes = train.double(), test.double(), int(train_labels.max()) + 1
    held, scores = torch.arange(len(train), device=train.device) % 5 == 4, {}
    fits = {-math.inf: (train.new_zeros(train.shape[1], classes), train.new_zeros(classes))}

    def predict(fit, x):
        return (x @ fit[0] + fit[1]).argmax(1)

    def score(power):
        if power not in scores:                              # started where the next smaller C ended: the optimum is the same, and near
            fits[power] = logistic(train[~held], train_labels[~held], 10.0 ** power, fits[max(p for p in fits if p < power)], 100)
            scores[power] = (predict(fits[power], train[held]) == train_labels[held]).double().mean().item()
        return scores[power]
    best = max(range(-6, 7, 2), key=score)
    for step in (1, 0.5, 0.25):
        best = max((best, best - step, best + step), key=score)
    return predict(logistic(train, train_labels, 10.0 ** best, fits[best]), test)


def mae_probe(train, train_labels, test, epochs=90, batch=16_384):
    """MAE's linear probe (main_linprobe.py): features through a batch norm without gain, a linear layer by LARS (momentum 0.9, trust 0.001, no
    decay), rate 0.1 x batch / 256 after 10 epochs of warm-up, then a cosine to 0. Ours: pooled patches instead of the class token, features computed
    once from central crops, so no augmentation, and a smaller bank is one batch. Made for ImageNet's 1.3 million images: on small banks the weights
    hardly leave their start."""
    g, N, batch, labels = common.generator(0), len(train), min(batch, len(train)), F.one_hot(train_labels).float()
    W, b = torch.nn.init.trunc_normal_(torch.empty(labels.shape[1], train.shape[1]), std=0.01, generator=g), torch.zeros(labels.shape[1])
    speed_W, speed_b, mean, var = torch.zeros_like(W), torch.zeros_like(b), torch.zeros(train.shape[1]), torch.ones(train.shape[1])
    for step in range(epochs * (N // batch)):
        epoch, place = divmod(step, N // batch)
        if place == 0:
            order = torch.randperm(N, generator=g)
        rows, done = order[place * batch:][:batch], step / (N // batch)
        lr = 0.1 * batch / 256 * (done / 10 if done < 10 else (1 + math.cos(math.pi * (done - 10) / (epochs - 10))) / 2)
        x = F.batch_norm(train[rows].float(), mean, var, training=True, eps=1e-6)
        error = ((x @ W.T + b).softmax(1) - labels[rows]) / batch                                # gradient of the mean cross-entropy
        grad = error.T @ x
        speed_W.mul_(0.9).add_(grad * 0.001 * W.norm() / grad.norm().clamp(min=1e-12))           # LARS leaves 1-D parameters alone
        speed_b.mul_(0.9).add_(error.sum(0))
        W, b = W - lr * speed_W, b - lr * speed_b
    return (F.batch_norm(test.float(), mean, var, eps=1e-6) @ W.T + b).argmax(1)


class AttentiveProbe(torch.nn.Module):
    """LCL's frozen protocol: one learned query pools the encoder's patch tokens, then layer norm and a linear classifier. LCL's norms of keys and of
    values are one here: the maps behind it absorb the gains. As there is one query, no token needs a key or a value of its own."""
    def __init__(self, dim, classes):
        super().__init__()
        self.heads = math.gcd(dim, max(1, dim // 64))        # 64 wide, as lcl.py's pool
        self.query, self.q = torch.nn.Parameter(torch.randn(dim)), torch.nn.Linear(dim, dim)
        self.norm, self.norm_pooled = torch.nn.LayerNorm(dim), torch.nn.LayerNorm(dim)
        self.k, self.v, self.out, self.head = (torch.nn.Linear(dim, n) for n in (dim, dim, dim, classes))      # k's bias has no effect
        self.apply(common.init_weights)

    def forward(self, tokens):                               # (B, N, D) -> (B, C)
        x, k, v = self.norm(tokens), *(m.weight.unflatten(0, (self.heads, -1)) for m in (self.k, self.v))      # (B, N, D), (H, D/H, D) twice
        query = self.q(self.query).view(self.heads, -1)      # (H, D/H)
        weight = (x @ torch.einsum("hd,hde->eh", query, k) * query.shape[1] ** -0.5).softmax(1)                # (B, N, H)
        pooled = torch.einsum("bhe,hde->bhd", weight.mT @ x, v).flatten(1) + self.v.bias
        return self.head(self.norm_pooled(self.out(pooled)))


def attentive_probe(train, train_labels, test, device="cpu", epochs=20, batch=256):      # (N, patches, D), (N,), (M, patches, D) -> labels (M,)
    """Train an AttentiveProbe and ask it. The paper's numbers were not available: AdamW, 1e-3, decay 0.05, 20 epochs or 500 steps, cosine: ours."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        probe = AttentiveProbe(train.shape[2], int(train_labels.max()) + 1).to(device)
    epochs, g = max(epochs, 500 // -(-len(train) // batch)), common.generator(0)
    steps = epochs * -(-len(train) // batch)
    cfg = SimpleNamespace(wd=0.05, warmup=steps // 10, steps=steps, schedule="cosine")
    opt = common.adamw(probe, cfg, (0.9, 0.95))
    rows = itertools.chain.from_iterable(torch.randperm(len(train), generator=g).split(batch) for _ in range(epochs))
    for step, r in enumerate(tqdm(rows, "attentive probe", steps, leave=False, disable=rank() > 0 or None)):
        for group in opt.param_groups:
            group["lr"] = common.lr_at(step + 1, cfg, 1e-3)
        loss = F.cross_entropy(probe(train[r].float().to(device)), train_labels[r].to(device))
        opt.zero_grad()
        loss.backward()
        opt.step()
    with torch.no_grad():
        return torch.cat([probe(x.float().to(device)).argmax(1).cpu() for x in test.split(batch)])


def rerank(sim, score, k=16):                                # sim (Q, C); score(queries (n,), candidates (n,)) -> (n,)
    """Each query's k best candidates by similarity put in the order of score, above all others, which keep theirs (ALBEF, whose k is 128 or 256).
    Ranks share the queries."""
    own = share_of(len(sim))
    sim = sim[own.start:own.stop]
    best = torch.cat([(-s).argsort(dim=1, stable=True)[:, :k] for s in sim.split(1024)])
    value = score(torch.arange(own.start, own.stop).repeat_interleave(best.shape[1]), best.flatten()).view(best.shape)
    return collect(sim.scatter(1, best, value - value.amin(1, keepdim=True) + sim.amax(1, keepdim=True) + 1))


def words(text):
    """Simple tokens (ours, for the reference's Java tokeniser; formats 9.10): lower case, split at white space, marks stripped."""
    return [w for w in (w.strip("'`\"()[]{}.?!,:;-") for w in text.lower().split()) if w]


def ngrams(text, most=4):
    """[Counter of n-grams for n = 1 .. most]."""
    tokens = words(text)
    return [collections.Counter(zip(*(tokens[i:] for i in range(n)))) for n in range(1, most + 1)]


def bleu(hyps, refs):                                        # hyps [str], refs [[str, ...]] -> [BLEU-1, .., BLEU-4]
    """Corpus BLEU as in the COCO caption evaluation, on simple tokens (formats 9.10)."""
    assert len(hyps) == len(refs) > 0, f"{len(hyps)} captions for {len(refs)} lists of references"
    match, made, c, r = [0] * 4, [0] * 4, 0, 0
    for hyp, ref in zip(hyps, refs):
        length, lengths = len(words(hyp)), [len(words(t)) for t in ref]
        c, r = c + length, r + min(lengths, key=lambda n: (abs(n - length), n))                  # the closest; of equal ones the shorter
        best, grams = [functools.reduce(operator.or_, column) for column in zip(*map(ngrams, ref))], ngrams(hyp)    # | is the larger count
        for n in range(4):
            match[n] += sum((grams[n] & best[n]).values())
            made[n] += sum(grams[n].values())
    precision = [math.log((m + 1e-15) / (t + 1e-9)) for m, t in zip(match, made)]
    brevity = min(0.0, 1 - r / c) if c else -math.inf
    return [math.exp(sum(precision[:n]) / n + brevity) for n in range(1, 5)]


def cider(hyps, refs):                                       # hyps [str], refs [[str, ...]] -> float, 0 .. 10
    """CIDEr-D over a split, on simple tokens (formats 9.10). Depends on the split through its document frequencies; one image gives 0."""
    assert len(hyps) == len(refs) > 0, f"{len(hyps)} captions for {len(refs)} lists of references"
    counts = [[ngrams(t) for t in ref] for ref in refs]
    frequency = collections.Counter(g for ref in counts for g in {g for grams in ref for c in grams for g in c})

    def vector(grams):
        weights = [{g: k * math.log(len(refs) / max(1, frequency[g])) for g, k in c.items()} for c in grams]
        return weights, [math.sqrt(sum(w * w for w in v.values())) for v in weights], sum(grams[1].values())
    scores = []
    for hyp, ref in zip(hyps, counts):
        h, h_norm, h_length = vector(ngrams(hyp))
        found = []
        for r, r_norm, r_length in map(vector, ref):
            cosine = [sum(min(w, v[g]) * v[g] for g, w in u.items() if g in v) / (a * b) if a and b else 0.0
                      for u, v, a, b in zip(h, r, h_norm, r_norm)]
            found.append(sum(cosine) / 4 * math.exp(-(h_length - r_length) ** 2 / 72))
        scores.append(10 * sum(found) / len(found))
    return sum(scores) / len(scores)


def confusion(pred, target, classes, ignore=0):              # integer maps of one shape -> (classes, classes) pixels by target and prediction
    """Pixels whose target is `ignore` count nowhere. AssertionError for a class beyond `classes`."""
    assert pred.shape == target.shape, f"prediction {tuple(pred.shape)} for a target of {tuple(target.shape)}"
    p, t = pred[target != ignore].long().cpu(), target[target != ignore].long().cpu()
    for name, x in (("prediction", p), ("target", t)):
        assert len(x) == 0 or 0 <= x.min() and x.max() < classes, f"{name} {x.min()} .. {x.max()} is not in 0 .. {classes - 1}"
    return (classes * t + p).bincount(minlength=classes ** 2).view(classes, classes)


def iou_of(counts, ignore=0):                                # what confusion() gave, summed over a split -> mean IoU or None, classes in it
    """ADE20K's (formats 9.6): a class that is neither there nor predicted leaves the mean (the reference gives it 0)."""
    both, union = counts.diag().double(), counts.sum(0) + counts.sum(1) - counts.diag()
    there = (union > 0) & (torch.arange(len(counts)) != ignore)
    return (both[there] / union[there]).mean().item() if there.any() else None, int(there.sum())


def mean_iou(pred, target, classes, ignore=0):               # integer maps of one shape, or lists of such maps -> fraction, or None
    """Mean over classes of intersection / union, each summed over the whole split; pixels whose target is `ignore` count nowhere. classes: number of
    indices, `ignore` included."""
    pairs = [(pred, target)] if isinstance(pred, torch.Tensor) else zip(pred, target, strict=True)
    return iou_of(sum(confusion(p, t, classes, ignore) for p, t in pairs), ignore)[0]


def overlaps(boxes, truths, crowd):                          # (D, 4), (G, 4) of x, y, width, height; crowd (G,) -> (D, G)
    """Intersection over union; for a crowd, over the box alone."""
    sides = np.minimum(boxes[:, None, :2] + boxes[:, None, 2:], truths[:, :2] + truths[:, 2:]) - np.maximum(boxes[:, None, :2], truths[:, :2])
    common_area, area = sides.clip(0).prod(2), boxes[:, None, 2:].prod(2)
    whole = np.where(crowd, area, area + truths[:, 2:].prod(1) - common_area)
    return np.divide(common_area, whole, out=np.zeros_like(whole), where=whole > 0)


IOUS, SIZES = np.linspace(0.5, 0.95, 10), np.array([(0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10)])     # all, small, medium, large


def match(found, real):
    """COCO's greedy assignment in one image and class -> hits and detections that do not count (sizes, IoUs, D), normal truths of each size."""
    boxes, truths = (np.array([x["bbox"] for x in xs], float).reshape(-1, 4) for xs in (found, real))
    crowd = np.array([bool(x.get("iscrowd")) for x in real], bool)
    outside, ignored = ((area < SIZES[:, :1]) | (area > SIZES[:, 1:]) for area in (                    # (sizes, D) and (sizes, G); borders belong
        boxes[:, 2:].prod(1), np.array([x.get("area", x["bbox"][2] * x["bbox"][3]) for x in real], float)))        # to both sizes, as there
    ignored, iou = ignored | crowd, overlaps(boxes, truths, crowd)
    hits, void = np.zeros((4, 10, len(found)), bool), np.repeat(outside[:, None], 10, 1)
    free = np.ones((4, 10, len(real)), bool)
    for d in np.flatnonzero((iou >= 0.5).any(1)):            # the others match nothing
        able = (iou[d] >= IOUS[:, None].clip(max=1 - 1e-10)) & (free | crowd)                          # (sizes, IoUs, G); a crowd is never used up
        normal = able & ~ignored[:, None]
        able = np.where(normal.any(2, keepdims=True), normal, able)
        best = len(real) - 1 - np.where(able, iou[d], -1)[..., ::-1].argmax(2)                         # of equal ones the last, as there
        taken, in_vain = able.any(2), np.take_along_axis(ignored, best, 1)
        hits[..., d], void[..., d] = taken & ~in_vain, np.where(taken, in_vain, void[..., d])
        free &= ~(taken[..., None] & (np.arange(len(real)) == best[..., None]))
    return hits, void, (~ignored).sum(1)


def average_precision(detections, truths, images=None):      # COCO dicts -> {"AP", "AP50", "AP75", "S", "M", "L"}: fractions, or None
    """Box AP as pycocotools counts it (formats 9.7): precision made non-increasing, read at 101 recalls, mean over classes and over IoUs of 0.5 to
    0.95; S, M, L by area. detections {"image_id", "category_id", "bbox": [x, y, w, h], "score"}, at most the best 100 of an image and class;
    truths the same without score, and maybe "iscrowd" and "area" (else w * h). None where there is nothing to find. images, {category: training
    images that show it}: also "rare" (at most 10 of them), "common" (at most 100) and "frequent", the groups of LVIS."""
    groups, classes, table = collections.defaultdict(lambda: ([], [])), collections.defaultdict(list), []
    for kind, rows in enumerate((detections, truths)):
        for row in rows:
            groups[row["category_id"], row["image_id"]][kind].append(row)
    for (c, _), (found, real) in sorted(groups.items(), key=lambda item: item[0]):
        found = sorted(found, key=lambda d: -d["score"])[:100]
        classes[c].append((np.array([d["score"] for d in found], float), *match(found, real)))
    for parts in classes.values():
        scores, hits, void, real = zip(*parts)
        order, real = (-np.concatenate(scores)).argsort(kind="stable"), sum(real)
        hits, void = (np.concatenate(x, 2)[..., order] for x in (hits, void))
        right, wrong = (hits & ~void).cumsum(2), (~hits & ~void).cumsum(2)
        precision = np.maximum.accumulate((right / (right + wrong).clip(1))[..., ::-1], 2)[..., ::-1]
        ap = np.full((4, 10), np.nan)
        for a, t in itertools.product(np.flatnonzero(real), range(10)):
            at = np.searchsorted(right[a, t] / real[a], np.linspace(0, 1, 101))
            ap[a, t] = np.append(precision[a, t], 0)[at].mean()
        table.append(ap)
    table = np.array(table).reshape(-1, 4, 10)
    rows = {"AP": table[:, 0], "AP50": table[:, 0, 0], "AP75": table[:, 0, 5], "S": table[:, 1], "M": table[:, 2], "L": table[:, 3]}
    if images is not None:
        shown = np.array([images.get(c, 0) for c in classes])
        rows |= {"rare": table[shown <= 10, 0], "common": table[(10 < shown) & (shown <= 100), 0], "frequent": table[shown > 100, 0]}
    return {name: float(x[~np.isnan(x)].mean()) if (~np.isnan(x)).any() else None for name, x in rows.items()}


NUMBERS = {"none": "0", **{word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}}
CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll
how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's
there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
you'd've you'll you're you've""".split()                     # the reference's: each restored from itself with any one apostrophe missing
RESTORE = {w[:i] + w[i + 1:]: w for w in CONTRACTIONS for i, char in enumerate(w) if char == "'"} | {"somebody'd": "somebodyd"}


def plain_answer(text):
    """An answer as VQA's official evaluation compares it, its slips included (formats 9.9)."""
    touched = re.search(r"\d,\d", text)
    out = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        out = out.replace(mark, "" if touched or f"{mark} " in text or f" {mark}" in text else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=32)             # the reference passes a flag in the place of the count
    out = [NUMBERS.get(w, w) for w in out.lower().split()]
    return " ".join(RESTORE.get(w, w) for w in out if w not in ("a", "an", "the"))


def vqa_accuracy(answer, answers):                           # str, [str] (ten of them) -> fraction
    """VQA's: the mean over the human answers of min(1, how many of the others equal the answer / 3); compared as plain_answer() has them, but as
    they stand where all humans agree. One human answer alone: equal or not (ours)."""
    answer, *answers = (a.replace("\n", " ").replace("\t", " ").strip() for a in (answer, *answers))
    assert answers, "a question needs an answer to compare with"
    if len(set(answers)) > 1:
        answer, *answers = map(plain_answer, (answer, *answers))
    equal = [a == answer for a in answers]
    return sum(min(1, (sum(equal) - e) / 3) for e in equal) / len(equal) if len(equal) > 1 else float(equal[0])


# ---- pictures: PIL only, sizes in pixels ----

FONT, HEAD = ImageFont.load_default(12), ImageFont.load_default(17)      # both draw a box for a character they lack
INK, GREY, PALE, BLUE, RED = "#222222", "#8a8a8a", "#ececec", "#1f5fa8", "#d1495b"


def as_picture(image):                                       # PIL, or uint8 (3, H, W) / (H, W, 3) as tensor or array -> PIL RGB
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    array = np.asarray(torch.as_tensor(image).cpu())
    assert array.dtype == np.uint8 and array.ndim == 3 and 3 in array.shape[::2], f"not a uint8 RGB picture: {array.dtype} {array.shape}"
    return Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0) if array.shape[0] == 3 else array))


def fit(image, size):
    """Picture scaled into size x size, aspect kept. Tiny ones (to 64) grow by a whole number, so that their pixels stay square."""
    image = as_picture(image)
    scale = size / max(image.size)
    tiny = scale >= 2 and max(image.size) <= 64
    return image.resize([max(1, round(s * (int(scale) if tiny else scale))) for s in image.size], Image.NEAREST if tiny else Image.BICUBIC)


def wrap(text, font, width, lines):
    """Text as a list of at most `lines` lines of `width` pixels, broken at spaces, or inside a word longer than a line; "…" where cut."""
    out = [""]
    for word in text[:1000].split():                         # a megabyte caption is not measured beyond what could be shown
        if out[-1] and font.getlength(f"{out[-1]} {word}") <= width:
            out[-1] += " " + word
            continue
        out += [""]
        for char in word:
            out += [""] if out[-1] and font.getlength(out[-1] + char) > width else []
            out[-1] += char
    out = [line for line in out if line]
    if len(out) > lines:
        last = out[lines - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        out = out[:lines - 1] + [last.rstrip(" ,.;") + "…"]
    return out


def blank(width, height, title):                             # -> white page with its title, and the pen for it
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    draw.text((14, 12), "".join(wrap(title, HEAD, width - 28, 1)), INK, HEAD)
    return page, draw


def ticks(low, high, log=False):
    """Three to eight round numbers in [low, high]: multiples of 1, 2 or 5 x 10^n; on a log axis powers of ten."""
    if log:
        powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        return [10.0**p for p in powers[::math.ceil(len(powers) / 5)]]
    raw = (high - low) / 4.5
    step = min((m * 10.0**math.floor(math.log10(raw)) for m in (1, 2, 5, 10)), key=lambda s: abs(math.log(s / raw)))
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def heat_colours(values):                                    # (...) floats in [0, 1] -> (..., 3) uint8
    """Five colours of matplotlib's viridis joined by straight lines: steady in lightness, safe for the colour-blind. NaN is grey."""
    anchors = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])
    rgb = np.stack([np.interp(values, np.linspace(0, 1, 5), channel) for channel in anchors.T], -1)
    return np.where(np.isnan(values)[..., None], 200, rgb).astype(np.uint8)


def class_colour(i):                                         # hues a golden section apart: far from each other, the same in all pictures
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(i * 0.61803 % 1, 0.75, 0.9))


def sheet(cells, path, columns, title="", size=112):
    """Write a labelled grid. A cell is (image, caption, frame): image None for a text cell; frame None or a colour name.

    The file is columns * (size + 14) + 14 wide; a row is as tall as its longest caption, at most four lines under a picture.
    """
    gap, line, top = 14, 15, 44 if title else 14
    words = [wrap(text, FONT, size - 16, (size - 12) // line) if image is None else wrap(text, FONT, size, 4) for image, text, _ in cells]
    below = [0 if image is None else len(lines) for (image, _, _), lines in zip(cells, words)]
    tall = [size + 6 + line * max(below[i:i + columns]) for i in range(0, len(cells), columns)]
    page, draw = blank(columns * (size + gap) + gap, top + sum(tall) + gap * len(tall), title)
    for i, (image, _, frame) in enumerate(cells):
        x, y = gap + i % columns * (size + gap), top + sum(tall[:i // columns]) + i // columns * gap
        box = (x, y, x + size, y + size)
        if image is None:
            draw.rounded_rectangle(box, 6, "#f4f4f4")
            draw.multiline_text((x + size / 2, y + size / 2), "\n".join(words[i]), INK, FONT, "mm", 3, "center")
        else:
            picture = fit(image, size)
            box = (x + (size - picture.width) // 2, y + (size - picture.height) // 2)
            page.paste(picture, box)
            box += (box[0] + picture.width, box[1] + picture.height)
            for n, text in enumerate(words[i]):
                draw.text((x + size / 2, y + size + 6 + n * line), text, INK, FONT, "ma")
        if frame:                                            # around the picture, never over it
            draw.rectangle((box[0] - 4, box[1] - 4, box[2] + 3, box[3] + 3), None, frame, 4)
    page.save(path)


def matrix(values, path, images, texts, title=""):           # values (n, n): rows texts, columns images, as in recall_at_k
    """Write a heat map of similarities: captions left, thumbnails on top, the diagonal (right pairs) framed, a colour bar right."""
    values, n, side, left, top = np.asarray(torch.as_tensor(values).detach().cpu().double()), len(texts), 44, 250, 94 if title else 64
    assert values.shape == (n, n) and len(images) == n, f"values {values.shape} for {n} texts and {len(images)} images"
    known = values[np.isfinite(values)]
    low, high = (known.min(), known.max()) if len(set(known)) > 1 else (0, 1)
    page, draw = blank(left + n * side + 90, top + n * side + 14, title)
    page.paste(Image.fromarray(heat_colours((values - low) / (high - low))).resize((n * side, n * side), Image.NEAREST), (left, top))
    for i, (image, text) in enumerate(zip(images, texts)):
        x, y, picture = left + i * side, top + i * side, fit(image, side - 4)
        page.paste(picture, (x + (side - picture.width) // 2, top - side + (side - 4 - picture.height) // 2))
        draw.multiline_text((left - 8, y + side / 2), "\n".join(wrap(text, FONT, left - 24, 2)), INK, FONT, "rm", 3, "right")
        draw.rectangle((x, y, x + side - 1, y + side - 1), None, "white", 2)
    x, tall = left + n * side + 16, min(n * side, 300)
    page.paste(Image.fromarray(heat_colours(np.linspace(1, 0, tall))[:, None]).resize((14, tall)), (x, top))
    for tick in ticks(low, high):
        y = top + (high - tick) / (high - low) * (tall - 1)
        draw.line((x + 14, y, x + 18, y), INK)
        draw.text((x + 22, y), f"{tick:.4g}", INK, FONT, "lm")
    page.save(path)


def curves(log, path, fields, title=""):
    """Write one panel per field of a log.jsonl over its steps: every value pale, their mean over a sliding 1/25 of the log strong.

    Null, missing and non-finite values are left out, and so is a last line cut short by a kill; a broken line before it is an error.
    Where values are positive and most of them span more than a factor of 100, the axis is logarithmic and the mean geometric.
    """
    records, lines = [], open(log, errors="replace").readlines()
    for n, text in enumerate(lines):
        try:
            records.append(json.loads(text))
        except ValueError:
            assert n == len(lines) - 1, f"{log}, line {n + 1}: not JSON: {text[:60]!r}"
    columns, start, fine = min(2, len(fields)), 40 if title else 6, 3
    wide, tall = columns * 480, start + -(-len(fields) // columns) * 250
    big, notes = Image.new("RGB", (fine * wide, fine * tall), "white"), []
    draw = ImageDraw.Draw(big)                               # lines are drawn three times as large and shrunk: smooth; text comes after

    def line(xs, ys, colour, width):
        draw.line([(fine * x, fine * y) for x, y in zip(xs, ys)], colour, fine * width, "curve")

    for i, field in enumerate(fields):
        x0, y0 = i % columns * 480 + 62, start + i // columns * 250 + 32
        x1, y1 = x0 + 394, y0 + 178
        pairs = [(r.get("step", n), r[field]) for n, r in enumerate(records) if isinstance(r.get(field), (int, float))]
        steps, v = np.array([p for p in pairs if math.isfinite(p[1])], float).reshape(-1, 2).T
        line((x0, x0, x1), (y0, y1, y1), GREY, 1)
        notes.append(((x0, y0 - 20), field + ("" if len(v) else ": no values"), INK, "la"))
        if not len(v):
            continue
        log_y = v.min() > 0 and v.max() > 100 * np.quantile(v, 0.05)   # a rate that ends at 0 stays linear
        u = np.log10(v) if log_y else v                      # what the y axis shows
        pad = 0.05 * np.ptp(u) or 0.1 * abs(u[0]) or 1       # a flat line runs through the middle
        low, high, left, right = u.min() - pad, u.max() + pad, steps.min(), max(steps.max(), steps.min() + 1)
        px = lambda s: x0 + (s - left) / (right - left) * (x1 - x0)
        py = lambda u: y1 - (u - low) / (high - low) * (y1 - y0)
        for tick in ticks(10**low, 10**high, True) if log_y else ticks(low, high):
            y = py(math.log10(tick) if log_y else tick)
            line((x0, x1), (y, y), PALE, 1)
            notes.append(((x0 - 7, y), f"{tick:.4g}", INK, "rm"))
        for tick in ticks(left, right):
            line((px(tick), px(tick)), (y1, y1 + 4), GREY, 1)
            notes.append(((px(tick), y1 + 7), f"{tick:,.10g}", INK, "ma"))
        notes.append(((x1, y1 + 22), "step", GREY, "ra"))
        window = np.ones(len(u) // 25 | 1)                   # odd, so that the mean is centred; it narrows at both ends
        line(px(steps), py(u), "#b9cfe8", 1)
        line(px(steps), py(np.convolve(u, window, "same") / np.convolve(np.ones(len(u)), window, "same")), BLUE, 2)
        last, least = f"last {v[-1]:.3g}", f"min {v.min():.3g} at {steps[v.argmin()]:,.10g}"
        for n, colour, text, x in ((v.argmin(), RED, least, x1 - FONT.getlength(last) - 16), (-1, BLUE, last, x1)):
            draw.circle((fine * px(steps[n]), fine * py(u[n])), 3 * fine, colour)
            notes.append(((x, y0 - 20), text, colour, "ra"))
    page, pen = blank(wide, tall, title)
    page.paste(big.reduce(fine).crop((0, start, wide, tall)), (0, start))
    for xy, text, colour, anchor in notes:
        pen.text(xy, text, colour, FONT, anchor)
    page.save(path)


def bars(groups, names, path, title=""):                     # {label: [fraction or None for each name]}
    """Write bars from 0 to 100 %: a group for each label, in it a bar for each name that has a value."""
    left, wide, thick, top = 230, 560, 15, 48 + 18 * len(names)
    values = {label: [(i, v) for i, v in enumerate(row) if v is not None and math.isfinite(v)] for label, row in groups.items()}
    page, draw = blank(left + wide + 70, top + 30 + sum(thick * max(1, len(row)) + 12 for row in values.values()), title)
    colours = [BLUE, "#e08e2b", "#3d9a6b", RED, "#7b5ea7", "#6b6b6b", "#4fb3bf", "#b59b3a"]
    for i, name in enumerate(names):
        draw.rectangle((left, 42 + 18 * i, left + 10, 52 + 18 * i), colours[i % 8])
        draw.text((left + 18, 47 + 18 * i), name, INK, FONT, "lm")
    for share in range(0, 101, 20):
        x = left + wide * share // 100
        draw.line((x, top, x, page.height - 24), PALE)
        draw.text((x, page.height - 20), f"{share} %", GREY, FONT, "ma")
    y = top + 6
    for label, row in values.items():
        tall = thick * max(1, len(row))
        draw.text((left - 10, y + tall / 2), "".join(wrap(label, FONT, left - 24, 1)), INK, FONT, "rm")
        for n, (i, v) in enumerate(row):
            end = left + wide * min(max(v, 0), 1)
            draw.rectangle((left, y + thick * n + 1, end, y + thick * (n + 1) - 2), colours[i % 8])
            draw.text((end + 5, y + thick * (n + 0.5)), f"{100 * v:.1f}", INK, FONT, "lm")
        y += tall + 12
    page.save(path)


def overlay(image, what, path=None):
    """PIL picture with `what` drawn over it, written to path if given. Images under 224 first grow by a whole number: labels need room.

    what is a float map (h, w): heat from its lowest to its highest value, stretched over the image; or an integer mask (H, W): one
    colour per class, 0 and below left clear; or a list of {"x", "y", "w", "h", "text"} in pixels of the image: boxes.
    """
    image = as_picture(image)
    grow = max(1, 224 // max(image.size))
    picture = image.resize([grow * s for s in image.size], Image.NEAREST)
    if isinstance(what, list):
        draw, labels = ImageDraw.Draw(picture), []
        for i, box in enumerate(what):
            x, y, w, h = (grow * box[key] for key in "xywh")
            draw.rectangle((x, y, x + max(w, 1) - 1, y + max(h, 1) - 1), None, class_colour(i), 2)      # the outline lies inside the box
            text = "".join(wrap(box.get("text") or "", FONT, picture.width - 8, 1))
            wide = FONT.getlength(text) + 8
            x, y = max(0, min(x, picture.width - wide)), max(0, y - 16)
            while any(abs(y - b) < 16 and x < a + c and a < x + wide for a, b, c, *_ in labels):
                y += 1                                       # below the labels it would cover
            labels += [(x, y, wide, text, class_colour(i))] if text else []
        for x, y, wide, text, colour in labels:              # after all outlines, so that no line crosses a label
            draw.rectangle((x, y, x + wide - 1, y + 15), colour)
            draw.text((x + 4, y + 8), text, "black" if sum(colour) > 400 else "white", FONT, "lm")
    else:
        what, share = torch.as_tensor(what).detach().cpu(), 0.55
        if what.is_floating_point():
            what = np.asarray(what.float())
            what = (what - np.nanmin(what)) / (np.nanmax(what) - np.nanmin(what) or 1)
            colours = heat_colours(np.asarray(Image.fromarray(what).resize(picture.size, Image.BICUBIC)))
        else:
            assert what.shape == image.size[::-1], f"mask {tuple(what.shape)} on an image of {image.size[::-1]} (H, W)"
            what = np.asarray(what.long()).repeat(grow, 0).repeat(grow, 1)
            colours = np.array([class_colour(i) for i in range(max(0, what.max()) + 1)])[what.clip(0)]
            share = share * (what > 0)[..., None]
        picture = Image.fromarray(((1 - share) * np.asarray(picture) + share * colours).round().astype(np.uint8))
    if path:
        picture.save(path)
    return picture


# ---- features: each rank its share of the samples ----

def collect(x):
    """Rows of all ranks in rank order; (n_r, ...) with any number of rows a rank -> (sum n_r, ...)."""
    if world() == 1:
        return x
    counts = common.all_gather(torch.tensor([len(x)], device=x.device)).tolist()
    padded = torch.cat([x, x.new_zeros(max(counts) - len(x), *x.shape[1:])])
    return torch.cat([part[:n] for part, n in zip(common.all_gather(padded).split(max(counts)), counts)])


def side_of(model):                                          # of the images that it takes, in pixels
    return model.vision.grid * model.vision.patch


def view_of(model):
    """What a model is shown of a PIL image that it did not train on -> uint8 (3, S, S)."""
    size = side_of(model)
    return (lambda image: data.squash(image, size, full=model.resize)) if hasattr(model, "resize") else lambda image: data.centre(image, size)


def share_of(n):
    """This rank's part of n things."""
    return range(rank() * n // world(), (rank() + 1) * n // world())


def decoded(index, numbers, wanted, view):
    """[(view(image), uint8 (3, S, S), wanted(sample), its number)] in order, and the reasons why some have none."""

    def one(i):
        try:
            sample = index[i]
            return view(sample.image()), wanted(sample), i
        except data.Skip as reason:
            return str(reason)
    with ThreadPoolExecutor(common.cores()) as pool:         # Pillow lets go of the interpreter while it decodes
        rows = list(pool.map(one, numbers))
    return [r for r in rows if not isinstance(r, str)], [r for r in rows if isinstance(r, str)]


def tell(lost, n):
    """Say how many of n samples could not be used, and why."""
    if lost:
        print(f"warning: {len(lost)} of {n} samples left out of the evaluation: {', '.join(sorted(set(lost)))}", file=sys.stderr)


def looks(index, wanted, model, view=None, block=2048):
    """This rank's share of an index, a block at a time: uint8 images (n, 3, S, S), wanted(sample) of each, their sample numbers. Unusable samples are
    left out and counted aloud."""
    share, lost = share_of(len(index)), []
    for start in tqdm(range(share.start, share.stop, block), "reading", unit=f"{block} images", leave=False, disable=rank() > 0 or None):
        rows, without = decoded(index, range(start, min(start + block, share.stop)), wanted, view or view_of(model))
        lost += without
        if rows:
            images, extras, ids = zip(*rows)
            yield torch.from_numpy(np.stack(images)), list(extras), list(ids)
    tell(lost, len(share))


def read(index, wanted, model):
    """All of that at once; sample numbers as a tensor. UserError if no rank has anything."""
    size, blocks = side_of(model), list(looks(index, wanted, model))
    images, extras, ids = zip(*blocks) if blocks else ((), (), ())
    ids = torch.tensor(sum(ids, []), dtype=torch.long)
    if not len(collect(ids)):
        raise UserError(f"none of the {len(index)} samples of {index.paths[0]} ... can be evaluated")
    return torch.cat([torch.zeros(0, 3, size, size, dtype=torch.uint8), *images]), sum(extras, []), ids


@torch.no_grad()
def in_batches(fn, cfg, device, *rows, size=256):
    """fn over batches of rows, in the run's precision -> float32 on the CPU."""
    with common.autocast(cfg, device):
        parts = [fn(*(r.to(device) for r in batch)).float().cpu() for batch in zip(*(r.split(size) for r in rows))]
    return torch.cat(parts)


def tokenize(tokenizer, texts, cfg):
    """Captions -> tokens and valid (T, L), L as the longest of all ranks needs it."""
    rows = torch.from_numpy(np.array([np.stack(tokenizer.pad(t, cfg.context)) for t in texts], np.int64).reshape(-1, 2, cfg.context))
    longest = int(collect(rows[:, 1].sum(1).max()[None] if len(rows) else rows.new_zeros(1)).max())
    return rows[:, 0, :longest], rows[:, 1, :longest] > 0


def encode_texts(model, tokenizer, texts, cfg, device):
    """Captions -> (T, E) unit."""
    return in_batches(model.encode_text, cfg, device, *tokenize(tokenizer, texts, cfg))


class Store:
    """Features of one checkpoint, each kind of each index computed once: kept in memory and, where a folder is given, in files there that a later
    call reads. Their names hold the hashes of checkpoint and index, so only a change of this code leaves them stale."""
    def __init__(self, folder=None, digest=""):
        self.folder, self.digest, self.found = folder, digest, {}

    def __call__(self, kind, index, make):
        name = f"{kind}-{self.digest}-{os.path.basename(index.file)[:12]}.pt"
        path = os.path.join(self.folder, name) if self.folder else ""
        if name not in self.found and os.path.exists(path):  # on all ranks or on none: rank 0 writes it when all have given their part
            self.found[name] = torch.load(path, weights_only=True, mmap=True)
        elif name not in self.found:
            self.found[name] = make()
            if path and rank() == 0:
                try:
                    torch.save(self.found[name], path + ".tmp")
                    os.replace(path + ".tmp", path)
                except (OSError, RuntimeError) as error:     # torch's word for a folder that may not be written
                    print(f"warning: features are not kept in {path} ({str(error).partition(chr(10))[0]})", file=sys.stderr)
        return self.found[name]


# What is computed of images: the joint embedding, and what a frozen encoder gives to a probe.
KINDS = {"images": lambda model: model.encode_image, "pooled": lambda model: lambda x: model.vision.patch_tokens(x).mean(1),
         "tokens": lambda model: model.vision.patch_tokens}


def class_or_none(sample):
    with contextlib.suppress(data.Skip):
        return sample.label()
    return -1


def embed(kind, model, index, cfg, device, store=None, block=2048):
    """Shards of any size -> features of one of KINDS (I, ...), class (I,), -1 = none, and sample number (I,) of every readable image. The
    others are counted aloud."""
    def make():
        fn, dtype = KINDS[kind](model), torch.float16 if kind == "tokens" else torch.float32     # tokens are many: half precision
        size = side_of(model)
        features, classes, numbers = [in_batches(fn, cfg, device, torch.zeros(0, 3, size, size, dtype=torch.uint8)).to(dtype)], [], []
        for images, labels, ids in looks(index, class_or_none, model, block=block):
            features.append(in_batches(fn, cfg, device, images).to(dtype))
            classes, numbers = classes + labels, numbers + ids
        return collect(torch.cat(features)), *(collect(torch.tensor(x, dtype=torch.long)) for x in (classes, numbers))
    found = (store or Store())(kind, index, make)
    if not len(found[0]):
        raise UserError(f"none of the {len(index)} samples of {index.paths[0]} ... has a readable image")
    return found


def embed_labelled(kind, model, index, cfg, device, store=None):
    """Features, labels (I,) and sample numbers (I,) of the images that have a class."""
    found = embed(kind, model, index, cfg, device, store)
    has = found[1] >= 0
    if not has.any():
        raise UserError(f"none of the {len(index)} samples of {index.paths[0]} ... can be evaluated: no class")
    if rank() == 0:
        tell(["no class"] * int((~has).sum()), len(has))
    return found if has.all() else [x[has] for x in found]


def embed_pairs(model, tokenizer, index, cfg, device, store=None):
    """Captioned shards -> images (I, E), texts (T, E), owner (T,) = each text's image, ids (I,) = sample numbers in the index."""
    image, _, ids = embed("images", model, index, cfg, device, store)

    def make():
        captions = []
        for i in ids[share_of(len(ids))].tolist():
            try:
                captions.append(index[i].captions(lines=True))
            except data.Skip:
                captions.append([])
        counts = collect(torch.tensor([len(c) for c in captions], dtype=torch.long))
        if not counts.any():
            raise UserError(f"none of the {len(index)} samples of {index.paths[0]} ... can be evaluated: no caption")
        return collect(encode_texts(model, tokenizer, [c for cs in captions for c in cs], cfg, device)), counts
    text, counts = (store or Store())("texts", index, make)
    if rank() == 0:
        tell(["no caption"] * int((counts == 0).sum()), len(counts))
    has = counts > 0
    return image[has], text, torch.repeat_interleave(torch.arange(int(has.sum())), counts[has]), ids[has]


# ---- search ----

def compose(image=None, text=None, minus=None, weights=(1, 2)):
    """Query (E,) of unit vectors (E,): weights[0] * image + weights[1] * (text - minus), made unit (ALIGN s7, footnote 4: 1 and 2)."""
    parts = [w * x for w, x in ((weights[0], image), (weights[1], text), (-weights[1], minus)) if x is not None]
    assert parts, "a query needs an image or a text"
    return F.normalize(sum(parts), dim=0)


def search(model, tokenizer, cfg, device, index, store, out, text=None, image=None, minus=None, weights=(1, 2), k=20):
    """The k images of an index nearest to a text, an image file, or both: out/search.png, and [(score, key)], best first."""
    def words_of(query):
        return encode_texts(model, tokenizer, [query], cfg, device)[0] if query else None
    picture = None
    if image:
        try:
            with open(image, "rb") as file:
                picture = data.Sample(image, {"jpg": file.read()}).image()
        except (OSError, data.Skip) as error:
            raise UserError(f"--image {image} cannot be read ({error}): give a JPEG, PNG or WebP file") from None
    features, _, numbers = embed("images", model, index, cfg, device, store)
    own = picture and in_batches(model.encode_image, cfg, device, torch.tensor(view_of(model)(picture))[None])[0]
    best = (features @ compose(own, words_of(text), words_of(minus), weights)).topk(min(k, len(features)))
    found = [(score, int(numbers[i])) for score, i in zip(best.values.tolist(), best.indices.tolist())]
    if rank() == 0:
        os.makedirs(out, exist_ok=True)
        query = " ".join(filter(None, [text, minus and f"minus {minus}"]))
        cells = [(picture, query, "blue")] if picture else [(None, query, "blue")]
        sheet(cells + [(index[i].image(), f"{score:.3f}", None) for score, i in found], f"{out}/search.png", 7,
              f"Query (blue) and the nearest of {len(features):,} images", 112)
    return [(score, index[i].key) for score, i in found]


# ---- protocols: each returns [(metric, value, n)] ----

def class_names(paths):
    names = data.beside(paths, "classes.txt", "classnames.txt")
    if names is None:
        raise UserError(f"no classes.txt or classnames.txt beside {paths[0]} or one folder up: each class needs a name")
    return names


def fitting(labels, names, paths):
    """The labels, (I,) or one; UserError where one has no name."""
    for label in int(labels.min()), int(labels.max()):
        if not 0 <= label < len(names):
            raise UserError(f"label {label} in {paths[0]}, but only {len(names)} class names beside it")
    return labels


def judged(name, pred, labels):
    """Accuracy, and the mean of the classes' accuracies, which counts rare classes as much as frequent ones."""
    return [(name, float((pred == labels).double().mean()), len(labels)), (f"{name}_mean_per_class", mean_per_class(pred, labels), len(labels))]


def pair_scores(model, tokenizer, index, ids, texts, cfg, device):
    """-> fn(image (n,), text (n,)) = model.score of those pairs of samples `ids` and texts. The tokens of all images are held in memory, in half
    precision."""
    rows, _ = decoded(index, ids[share_of(len(ids))].tolist(), lambda s: None, view_of(model))
    size = side_of(model)
    images = torch.from_numpy(np.array([r[0] for r in rows], np.uint8).reshape(-1, 3, size, size))
    seen, (tokens, valid) = collect(in_batches(model.vision, cfg, device, images).half()), tokenize(tokenizer, texts, cfg)
    fn = lambda i, t: model.score(seen[i.cpu()].float().to(device), *(x[t.cpu()].to(device) for x in (tokens, valid)))
    return lambda i, t: in_batches(fn, cfg, device, i, t)


def zeroshot(model, tokenizer, paths, cfg, device, store=None):
    """Prompt ensembling (formats of CLIP_benchmark): templates x class names beside the shards. With unseen.txt there, classes that never
    occurred in training are scored apart; every image competes among all classes. With model.rerank also _itm: each image's 16 best classes in
    the order of the mean of the prompts' scores."""
    names, index = class_names(paths), data.open_index(paths)
    templates = data.beside(paths, "zeroshot_classification_templates.txt") or ["a photo of a {c}."]
    image, labels, ids = embed_labelled("images", model, index, cfg, device, store)
    labels, P = fitting(labels, names, paths), len(templates)
    prompts = [t.replace("{c}", n).replace("{}", n) for n in names for t in templates]
    scores = {"": image @ prompt_ensemble(encode_texts(model, tokenizer, prompts, cfg, device).view(len(names), P, -1)).T}
    if getattr(model, "rerank", False):
        pair = pair_scores(model, tokenizer, index, ids, prompts, cfg, device)
        scores["_itm"] = rerank(scores[""], lambda i, c: torch.stack([pair(i, c * P + p) for p in range(P)]).mean(0))
    found = []
    for (suffix, rows), (mark, s) in itertools.product(seen_and_unseen(paths, names, labels).items(), scores.items()):
        name, s, own = f"zeroshot{suffix}{mark}", s[rows], labels[rows]
        found += judged(name, own.where(ranks(s, own) < 1, -1), own)
        found += [(f"{name}_top5", accuracy(s, own, 5), len(own))] if len(names) > 5 else []
    return found


def retrieval(model, tokenizer, paths, cfg, device, store=None):
    """Recall at 1, 5, 10 both ways over all captions of all images. With model.rerank also _itm: each query's 16 best in the order of score."""
    index = data.open_index(paths)
    image, text, owner, ids = embed_pairs(model, tokenizer, index, cfg, device, store)
    sim = text @ image.T
    recall = {"": recall_at_k(sim, owner)}
    if getattr(model, "rerank", False):
        pair = pair_scores(model, tokenizer, index, ids, [c for i in ids.tolist() for c in index[i].captions(lines=True)], cfg, device)
        by_image, by_text = rerank(sim.T, pair).T, rerank(sim, lambda t, i: pair(i, t))
        recall["_itm"] = {"i2t": recall_at_k(by_image, owner)["i2t"], "t2i": recall_at_k(by_text, owner)["t2i"]}
    return [(f"{way}_r{k}{mark}", v, len(image) if way == "i2t" else len(text))
            for mark, ways in recall.items() for way, at in ways.items() for k, v in at.items()]


def frozen(kind, model, paths, cfg, device, store=None):
    """Features and labels of the training shards beside the held-out ones, and those of the held-out images whose class is among them: no other
    has a right answer there."""
    bank = bank_of(paths)
    if not bank:
        raise UserError(f"kNN and the probes need labelled training shards: none in the folder of {paths[0]}")
    indices = [data.open_index(p) for p in (bank, paths)]
    (train, train_labels, _), (test, labels, _) = (embed_labelled(kind, model, index, cfg, device, store) for index in indices)
    known = torch.isin(labels, train_labels)
    if not known.any():
        raise UserError(f"no image of {paths[0]} ... has a class that one of {bank[0]} ... has")
    return train, train_labels, test[known], labels[known]


def nearest(model, tokenizer, paths, cfg, device, store=None):
    """Weighted k-nearest-neighbour accuracy (DINO, k = 20) of pooled encoder tokens; the bank is the train part beside the held-out one."""
    train, train_labels, test, labels = frozen("pooled", model, paths, cfg, device, store)
    return judged("knn", knn(train, train_labels, test, min(20, len(train))), labels)


def linear(model, tokenizer, paths, cfg, device, store=None, protocol="clip"):
    """Accuracy of CLIP's or MAE's linear probe on pooled encoder tokens, trained on the train part beside the held-out one."""
    train, train_labels, test, labels = frozen("pooled", model, paths, cfg, device, store)
    name, probe = {"clip": ("linear", linear_probe), "mae": ("linear_mae", mae_probe)}[protocol]
    return judged(name, probe(train, train_labels, test), labels)


def attentive(model, tokenizer, paths, cfg, device, store=None):
    """Accuracy of LCL's attentive probe on the encoder's patch tokens (all of them in memory), trained as the linear one is."""
    train, train_labels, test, labels = frozen("tokens", model, paths, cfg, device, store)
    return judged("attentive", attentive_probe(train, train_labels, test, device), labels)


def caption(model, tokenizer, paths, cfg, device, store=None):
    """Greedy captions. Captioned shards: BLEU-4 and CIDEr (simple tokens) against all references, and the mean cost of a reference's token given
    its own and given another image. Labelled shards with class names: share of captions in which the name of the class stands."""
    index = data.open_index(paths)
    labelled = has_classes(index)
    names = class_names(paths) if labelled else ()
    images, labels, numbers = read(index, lambda s: s.label() if labelled else s.captions(lines=True) and 0, model)
    texts = [tokenizer.decode(ids) for ids in collect(in_batches(model.generate, cfg, device, images).long()).tolist()]
    if labelled:
        labels, plain = fitting(collect(torch.tensor(labels, dtype=torch.long)), names, paths), [f" {' '.join(words(n))} " for n in names]
        named = torch.tensor([plain[c] in f" {' '.join(words(t))} " for t, c in zip(texts, labels)])
        groups = seen_and_unseen(paths, names, labels)
        return [(f"named{suffix}", named[rows].double().mean().item(), int(rows.sum())) for suffix, rows in groups.items()]
    refs = [index[i].captions(lines=True) for i in collect(numbers).tolist()]
    counts = common.all_gather(torch.tensor([len(images)])).tolist()[:rank()]                     # of the ranks before this one
    tokens, valid = tokenize(tokenizer, [r[0] for r in refs[sum(counts):][:len(images)]], cfg)
    edge = collect(images[-1:])[sum(n > 0 for n in counts) - 1:][:len(images)][:1]
    others = torch.cat([edge, images[:-1]])                  # each caption with the image before its own, on any number of ranks
    own, other = (-collect(in_batches(model.score, cfg, device, x, tokens, valid)).double().mean().item() for x in (images, others))
    return [("bleu4", bleu(texts, refs)[3], len(texts)), ("cider", cider(texts, refs), len(texts)), ("nats_per_token", own, len(texts)),
            ("nats_per_token_other_image", other, len(texts))]


def seen_and_unseen(paths, names, labels):
    """{metric suffix: rows}: classes listed in unseen.txt beside the shards never occurred in training and are scored apart."""
    unseen = torch.tensor([n in (data.beside(paths, "unseen.txt") or ()) for n in names])[labels]
    return {"_seen": ~unseen, "_unseen": unseen} if unseen.any() else {"": ~unseen}


def bank_of(paths):
    """The training shards of the folder that these held-out ones lie in; [] if there are none apart from them."""
    folder = os.path.dirname(os.path.abspath(paths[0]))
    for f in (folder, os.path.dirname(folder)):
        with contextlib.suppress(UserError):
            found = data.expand(f)
            if not {os.path.abspath(p) for p in found} & {os.path.abspath(p) for p in paths}:
                return found
    return []


# ---- trained heads: the transfers that ask for more than a frozen feature; each an encoder, a plain head and one loop ----

@dataclasses.dataclass
class Recipe:
    """How an encoder and its head are trained. The defaults are MAE's for fine-tuning ViT-B, without RandAugment and erasing."""
    epochs: float = 100          # MAE
    batch: int = 1024            # MAE; at most an eighth of the samples (ours)
    lr: float = 5e-4             # MAE, for 256 images; more for more of them, not less for fewer (ours)
    warmup: float = 0.05         # MAE: 5 of 100 epochs
    wd: float = 0.05             # MAE
    layer_decay: float = 0.65    # MAE, ViT-B: of the rate, from each layer to the one below
    drop_path: float = 0.1       # MAE, ViT-B: chance that the last block's branches are left out for an image, falling to 0 at the first
    scale: float = 0.08          # MAE: least area of the random resized crop
    flip: bool = True            # MAE
    mixup: float = 0.8           # MAE: both parameters of its beta distribution
    cutmix: float = 1.0          # MAE: likewise; each step takes one of the two
    smoothing: float = 0.1       # MAE
    frozen: bool = False         # is the head alone trained?
    shots: int = None            # training samples of a class; none = all
    percent: float = None        # of the training samples (finetune: of each class); none = all
    seed: int = 0                # ours
    out: str = None              # folder for pictures


RECIPES = {                                                  # crops are ours; the rate of heads beside frozen encoders: see recipe()
    "finetune": Recipe(),
    "segment": Recipe(epochs=128, batch=16, lr=1.28e-3, layer_decay=0.8, scale=0.25),            # a public run of MAE's ViT-B on ADE20K: 8e-5 for 16
    "detect": Recipe(epochs=100, batch=64, lr=4e-4, layer_decay=0.7, wd=0.1, scale=0.25),        # ours, near what plain ViT detectors use
    "vqa": Recipe(epochs=8, batch=256, lr=1e-4, layer_decay=1.0, wd=0.02, drop_path=0.0)}        # ALBEF's length and decay; rate ours
DEMO = {                                                     # the built-in world and small models on two CPU cores
    "finetune": dict(epochs=12, batch=64, lr=3e-3, scale=0.5, layer_decay=0.9, mixup=0, cutmix=0, drop_path=0),
    "segment": dict(epochs=0.9, batch=64, lr=8e-3, scale=0.8, layer_decay=1.0, drop_path=0),
    "detect": dict(epochs=0.7, batch=64, lr=3e-3, scale=0.8, layer_decay=0.9, drop_path=0),
    "vqa": dict(epochs=0.9, batch=64, lr=2e-3)}


def layers(head, how):
    """Parameter groups of a module with a ViT `vision` in it: MAE's rates, falling by how.layer_decay from the top to the embeddings, and no decay of
    1-D parameters, class token and positions (formats 10.4)."""
    groups, depth = {}, len(head.vision.blocks)
    inside = {id(p): name for name, p in head.vision.named_parameters()}
    for p in (p for p in head.parameters() if p.requires_grad):
        name = inside.get(id(p), "head")
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks") else 0 if name.startswith(("cls_", "pos_", "patch_")) else depth + 1
        key = how.layer_decay ** (depth + 1 - layer), 0.0 if p.ndim < 2 or name in ("cls_token", "pos_embed") else how.wd
        groups.setdefault(key, []).append(p)
    return [{"params": params, "scale": scale, "weight_decay": wd} for (scale, wd), params in groups.items()]


def drop_path(vision, rate):
    """Stochastic depth (arXiv 1603.09382): the branches of block i are left out of a row where its noise is below rate * i / (depth - 1), else they
    grow to make up for it. The noise, vision.noise (B, 2 * depth), comes with the rows; None: nothing is left out."""
    def drop(_, args, out, i, p):
        return out if vision.noise is None else out * ((vision.noise[:, i] >= p) / (1 - p))[:, None, None].to(out.dtype)
    vision.noise, depth = None, len(vision.blocks)
    for i, branch in enumerate(branch for block in vision.blocks for branch in (block.attn, block.mlp)):
        if p := rate * (i // 2) / max(1, depth - 1):
            branch.register_forward_hook(functools.partial(drop, i=i, p=p))


def mixed(images, labels, classes, how, step):
    """Mixup or CutMix of neighbouring rows, labels smoothed (timm's, as MAE uses them; there the last row meets the first). images (B, 3, S, S)
    float, labels (B,) -> images, targets (B, C)."""
    targets = F.one_hot(labels, classes) * (1 - how.smoothing) + how.smoothing / classes
    rng, S = data.rng_for(4, how.seed, step), images.shape[-1]                                   # the step's: the same on all ranks
    cut = how.cutmix > 0 and (how.mixup == 0 or rng.random() < 0.5)
    if not (how.mixup or how.cutmix):
        return images, targets
    lam, other = rng.beta(*2 * [how.cutmix if cut else how.mixup]), common.partner(images, 2)
    if cut:
        half, centre = S * math.sqrt(1 - lam) / 2, rng.integers(0, S, 2)
        (top, left), (bottom, right) = ((centre + d).round().clip(0, S).astype(int) for d in (-half, half))
        images = images.clone()
        images[..., top:bottom, left:right] = other[..., top:bottom, left:right]
        lam = 1 - (bottom - top) * (right - left) / S ** 2
    else:
        images = lam * images + (1 - lam) * other
    return images, lam * targets + (1 - lam) * common.partner(targets, 2)


class Classifier(torch.nn.Module):
    """MAE's: the mean of the patch tokens through a layer norm of its own, which stands for the encoder's last, and a linear layer."""
    def __init__(self, vision, classes, how):
        super().__init__()
        self.vision, self.how, width = vision, how, vision.pos_embed.shape[2]
        self.norm, self.head = torch.nn.LayerNorm(width, eps=1e-6), torch.nn.Linear(width, classes)
        torch.nn.init.trunc_normal_(self.head.weight, std=2e-5)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, images):                               # (B, 3, S, S) -> (B, C)
        x = self.vision(images, upto=len(self.vision.blocks))[:, self.vision.cls_token is not None:]
        return self.head(self.norm(x.mean(1)))

    def loss(self, batch, step):
        images = (batch["images"] / 255 - self.vision.mean) / self.vision.std
        images, targets = mixed(images, batch["label"], self.head.out_features, self.how, step)
        return -(targets * self(images).float().log_softmax(1)).sum(1).mean()


class Segmenter(torch.nn.Module):
    """A linear layer on each patch token; its logits are resized, bilinear, to the pixels."""
    def __init__(self, vision, classes):
        super().__init__()
        self.vision, self.head = vision, torch.nn.Linear(vision.pos_embed.shape[2], classes)

    def forward(self, images):                               # (B, 3, S, S) -> (B, C, n, n), n patches a side
        return self.head(self.vision.patch_tokens(images)).transpose(1, 2).unflatten(2, (self.vision.grid, -1))

    def loss(self, batch, step):                             # mean over the labelled pixels of all ranks
        logits = F.interpolate(self(batch["images"]).float(), batch["mask"].shape[1:], mode="bilinear")
        count = common.total((batch["mask"] > 0).sum()).clamp(min=1)
        return F.cross_entropy(logits, batch["mask"].long(), ignore_index=0, reduction="sum") * world() / count


class Detector(torch.nn.Module):
    """FCOS (arXiv 1904.01355) at one scale: each patch tells classes, distances to the four sides of a box around its middle, and centre-ness."""
    def __init__(self, vision, classes):
        super().__init__()
        width = vision.pos_embed.shape[2]
        self.vision, self.classes = vision, classes
        self.tower = torch.nn.ModuleList(torch.nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.out = torch.nn.Linear(width, classes + 5)
        torch.nn.init.normal_(self.out.weight, std=0.01)
        self.out.bias.data = torch.tensor([-math.log(99)] * classes + [0.0] * 5)                 # focal loss: at first each class has 1 %

    def forward(self, images):
        """(B, 3, S, S) -> logits of the classes (B, N, C), boxes (B, N, 4) as left, top, right, bottom in pixels, logits of centre-ness (B, N)."""
        x = self.vision.patch_tokens(images).transpose(1, 2).unflatten(2, (self.vision.grid, -1))
        for conv in self.tower:
            x = F.gelu(conv(x))
        classes, sides, centre = self.out(x.flatten(2).transpose(1, 2)).float().split([self.classes, 4, 1], 2)
        middle = middles(self.vision.grid, self.vision.patch).to(sides)
        near, far = (self.vision.patch * sides.clamp(max=8).exp()).chunk(2, 2)
        return classes, torch.cat([middle - near, middle + far], 2), centre[..., 0]

    def loss(self, batch, step):
        """Focal loss (2, 0.25) of the classes, generalised IoU of the boxes weighted by centre-ness, cross-entropy of centre-ness; means over the
        positive patches of all ranks, as there."""
        logits, boxes, centre = self(batch["images"])
        positive, truth = batch["cls"] >= 0, batch["box"]
        middle = middles(self.vision.grid, self.vision.patch).to(truth)
        pairs = torch.stack([middle - truth[..., :2], truth[..., 2:] - middle], 3)               # (B, N, 2, 2): to left and right, top and bottom
        weight = (pairs.amin(3) / pairs.amax(3).clamp(min=1e-6)).clamp(min=0).prod(2).sqrt() * positive
        target = F.one_hot(batch["cls"].clamp(min=0), self.classes) * positive[..., None]
        p = logits.sigmoid()
        focal = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
        focal = focal * (target * 0.25 * (1 - p) ** 2 + (1 - target) * 0.75 * p ** 2)
        count, mass = common.total(torch.stack([positive.sum().float(), weight.sum()])).clamp(min=1e-6)
        overlap = (1 - giou(boxes, truth)) * weight
        told = F.binary_cross_entropy_with_logits(centre, weight, reduction="none") * positive
        return world() * (focal.sum() / count.clamp(min=1) + overlap.sum() / mass.clamp(min=1e-3) + told.sum() / count.clamp(min=1))


def middles(n, patch):                                       # -> (n * n, 2): x, y of the middles of the patches, row by row
    at = (torch.arange(n) + 0.5) * patch
    return torch.stack([at.repeat(n), at.repeat_interleave(n)], 1)


def giou(a, b):                                              # (..., 4) as left, top, right, bottom -> (...): generalised IoU (arXiv 1902.09630)
    area = lambda low, high: (high - low).clamp(min=0).prod(-1)
    both = area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - both
    hull = area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    return both / union.clamp(min=1e-6) - (hull - union) / hull.clamp(min=1e-6)


def assign(boxes, classes, n, patch):
    """FCOS's targets of the n * n patches: boxes (K, 4) x, y, w, h in pixels of the view, classes (K,) -> class (N,), -1 = none, box (N, 4).

    A patch is positive for a box that holds its middle, within 1.5 patches of the box's; of several, for the smallest. The patch with the middle of
    a box always is (ours: else no patch would learn small boxes; such a box is taken to reach to the patch's middle).
    """
    middle, found, target = middles(n, patch).numpy(), np.full(n * n, -1), np.zeros((n * n, 4), np.float32)
    for k in sorted(range(len(boxes)), key=lambda k: -boxes[k][2] * boxes[k][3]):
        x, y, w, h = boxes[k]
        centre = np.array([x + w / 2, y + h / 2])
        away, own = np.abs(middle - centre), (centre // patch).clip(0, n - 1).astype(int)
        inside = (away <= np.minimum((w / 2, h / 2), 1.5 * patch)).all(1)
        inside[own[1] * n + own[0]] = True
        found[inside] = classes[k]
        target[inside] = np.concatenate([np.minimum((x, y), middle[inside] - 1), np.maximum((x + w, y + h), middle[inside] + 1)], 1)
    return found, target


def nms(boxes, scores, classes, iou=0.6):                    # (n, 4) x, y, w, h, (n,), (n,) arrays -> indices kept, best first
    """Non-maximum suppression within each class: a box goes if a better one that stays overlaps it by more than `iou` (FCOS: 0.6)."""
    order, kept = (-scores).argsort(kind="stable"), []
    rivals = (overlaps(boxes, boxes, np.zeros(len(boxes), bool)) > iou) & (classes[:, None] == classes)
    alive = np.ones(len(boxes), bool)
    for i in order:
        if alive[i]:
            kept.append(int(i))
            alive &= ~rivals[i]
    return kept


class Fusion(torch.nn.Module):
    """For methods that read no text beside an image: a question's tokens look at the image's in two blocks, all new (ours)."""
    def __init__(self, vision, vocab, length, dim=128):
        super().__init__()
        self.vision = vision
        self.text = common.TextTransformer(vocab, length, dim, 1, dim // 32, causal=False)
        self.blocks = torch.nn.ModuleList(common.CrossBlock(dim, vision.pos_embed.shape[2], dim // 32) for _ in range(2))
        self.norm = torch.nn.LayerNorm(dim, eps=1e-6)
        self.blocks.apply(common.init_weights)

    def fused(self, images, tokens, valid):                  # (B, 3, S, S), (B, L), (B, L) -> (B, dim): the state at the begin token
        return self.norm(common.run_blocks(self.blocks, self.text(tokens, valid), self.vision(images), valid[:, None, None]))[:, 0]


class Answerer(torch.nn.Module):
    """The state of a question read beside an image, by the method's own text path or a Fusion, and a linear layer over the answers."""
    def __init__(self, reader, width, answers):
        super().__init__()
        self.reader, self.vision = reader, reader.vision
        self.norm, self.head = torch.nn.LayerNorm(width, eps=1e-6), torch.nn.Linear(width, answers)

    def forward(self, images, tokens, valid):                # (B, 3, S, S), (B, L), (B, L) -> (B, answers)
        longest = int(valid.sum(1).max())                    # questions are short
        return self.head(self.norm(self.reader.fused(images, tokens[:, :longest], valid[:, :longest])))

    def loss(self, batch, step):
        return F.cross_entropy(self(batch["images"], batch["tokens"], batch["valid"]).float(), batch["answer"])


def ahead(batches, steps):
    """Items 0 .. steps - 1 of data.Batches, made by threads while the model computes: a process forked here, after threads have run, may hang."""
    workers = common.cores()
    with ThreadPoolExecutor(workers) as pool:
        waiting = collections.deque(pool.submit(batches.__getitem__, step) for step in range(min(steps, workers + 1)))
        for step in range(steps):
            batch = waiting.popleft().result()
            if "error" in batch:
                raise UserError(batch["error"])
            if step + workers + 1 < steps:
                waiting.append(pool.submit(batches.__getitem__, step + workers + 1))
            yield batch


def train_head(head, index, example, how, cfg, device, label):
    """Train a head on samples of an index, its encoder too unless how.frozen: AdamW, warm-up, cosine. example(sample, rng) -> {name: array}. Ranks
    share the rows of a step and end with the same weights."""
    head.vision.requires_grad_(not how.frozen)
    drop_path(head.vision, 0 if how.frozen else how.drop_path)
    unit = 2 * world()                                       # neighbours are mixed
    batch = max(1, min(how.batch, len(index) // 8) // unit) * unit
    steps = max(1, round(how.epochs * len(index) / batch))
    run = SimpleNamespace(steps=steps, warmup=round(how.warmup * steps), schedule="cosine")
    opt = torch.optim.AdamW(layers(head, how), betas=(0.9, 0.999))
    rows = data.Rows(index, data.Plan(index.starts, batch, how.seed, 64), example)
    batches, skipped = ahead(data.Batches([rows], batch, rank(), world()), steps), 0
    head.train()
    for step, taken in enumerate(tqdm(batches, f"{label}: steps of {batch}", steps, leave=False, disable=rank() > 0 or None)):
        skipped = skipped + taken.pop("skipped")
        taken = {name: x.to(device) for name, x in taken.items()}
        head.vision.noise = taken.pop("noise")
        with common.autocast(cfg, device):
            loss = head.loss(taken, step)
        for group in opt.param_groups:
            group["lr"] = common.lr_at(step + 1, run, how.lr * max(1, batch / 256)) * group["scale"]
        opt.zero_grad(set_to_none=True)
        loss.backward()
        common.average_gradients(head.parameters())
        opt.step()
    head.vision.noise = None
    head.eval()
    passed = {reason: n for reason, n in zip(data.REASONS, common.total(skipped).tolist()) if n}
    if passed:
        print0(f"{label}: passed over or mended in training: {', '.join(f'{n} {reason}' for reason, n in passed.items())}")


def trained(build, index, example, model, cfg, device, how, label):
    """(metric suffix, head), trained alike: "" from the model's weights, "_random" from new ones. build(model of its own) -> head."""
    for suffix, name in (("", label), ("_random", f"{label}, random encoder")):
        with torch.random.fork_rng():
            torch.manual_seed(how.seed)
            head = build(type(model)(cfg).to(device) if suffix else copy.deepcopy(model)).to(device)
        row = functools.partial(example, size=side_of(model), depth=len(model.vision.blocks), how=how)
        train_head(head, index, row, how, cfg, device, name)
        yield suffix, head


class Few:
    """Some samples of an index, for Plan and Rows."""
    def __init__(self, index, numbers):
        self.index, self.numbers, self.starts, self.paths = index, numbers, np.array([0, len(numbers)]), index.paths

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        return self.index[int(self.numbers[i])]


def chosen(paths, how, by_class=False):
    """The training samples beside the held-out ones: all, how.percent of them, or how.shots of each class, drawn with how.seed."""
    bank = bank_of(paths)
    if not bank:
        raise UserError(f"a head needs training shards: none in the folder of {paths[0]}")
    index = data.open_index(bank)
    if not (how.shots or how.percent):                       # nothing is read before it is needed
        return index
    label = [found[0] if found else -1 for found in survey(index, lambda s: [class_or_none(s)])] if by_class else [0] * len(index)
    size, taken, numbers = collections.Counter(label), collections.Counter(), []
    for i in data.rng_for(5, how.seed).permutation(len(label)).tolist():
        if label[i] >= 0 and taken[label[i]] < (how.shots or math.ceil(how.percent / 100 * size[label[i]])):
            taken[label[i]] += 1
            numbers.append(i)
    return Few(index, np.sort(numbers))


def survey(index, fn):
    """[fn(sample)] of all samples, [] for those that cannot be read."""
    def one(i):
        try:
            return fn(index[i])
        except data.Skip:
            return []
    return [one(i) for i in tqdm(range(len(index)), "reading records", leave=False, disable=rank() > 0 or None)]


def drawn(sample, rng, size, depth, how):
    """A training view: random resized crop, maybe flipped, with the noise of drop_path -> row, box (x, y, w, h), flipped, (width, height)."""
    image = sample.image()
    box, flip = data.random_box(rng, *image.size, how.scale), how.flip and rng.random() < 0.5
    return {"images": data.crop(image, box, size, flip), "noise": rng.random(2 * depth, np.float32)}, box, flip, image.size


def whole(size):
    """A view that shows all of an image, squashed: for what has places."""
    return lambda image: data.squash(image, size, full=1.0)


def class_row(sample, rng, size, depth, how, names, paths):
    return {**drawn(sample, rng, size, depth, how)[0], "label": fitting(np.int64(sample.label()), names, paths)}


def finetune(model, tokenizer, paths, cfg, device, store, how):
    """Accuracy after fine-tuning encoder and classifier on the train part; classes of unseen.txt are left out. _random: the same from new weights;
    _majority: what the most frequent held-out class would give."""
    names, index, train, found = class_names(paths), data.open_index(paths), chosen(paths, how, by_class=True), []
    row = functools.partial(class_row, names=names, paths=train.paths)
    for suffix, head in trained(lambda m: Classifier(m.vision, len(names), how), train, row, model, cfg, device, how, "fine-tuning"):
        pred, labels = [torch.zeros(0, dtype=torch.long)], []
        for images, own, _ in looks(index, data.Sample.label, model):
            pred, labels = pred + [in_batches(head, cfg, device, images).argmax(1)], labels + own
        pred, labels = collect(torch.cat(pred)), fitting(collect(torch.tensor(labels, dtype=torch.long)), names, paths)
        known = seen_and_unseen(paths, names, labels)
        known = known.get("_seen", known.get(""))
        found += judged(f"finetune{suffix}", pred[known], labels[known])
    return found + [("finetune_majority", int(labels[known].bincount().max()) / int(known.sum()), int(known.sum()))]


def mask_of(sample, size=None):
    """Class numbers of the pixels (H, W). Skip where there is no such mask, or not of the image's size (width, height)."""
    with contextlib.suppress(Exception):                     # Pillow's decoders fail in many ways
        mask = Image.open(io.BytesIO(sample.members["seg.png"]), formats=("PNG",))
        if size in (None, mask.size) and mask.width * mask.height <= data.MAX_PIXELS and (mask := np.asarray(mask)).ndim == 2:
            return mask.astype(np.int32)
    raise data.Skip("no mask")


def mask_row(sample, rng, size, depth, how, classes):
    row, (x, y, w, h), flip, shape = drawn(sample, rng, size, depth, how)
    mask, at = mask_of(sample, shape), (np.arange(size) + 0.5) / size
    if mask.max() >= classes:
        raise UserError(f"class {mask.max()} in the mask of {sample.key}, but only {classes} names in classes.txt (line 0 is 'unlabeled')")
    mask = mask[(y + at * h).astype(int)][:, (x + at * w).astype(int)]                           # nearest
    return {**row, "mask": np.ascontiguousarray(mask[:, ::-1] if flip else mask)}


def segment(model, tokenizer, paths, cfg, device, store, how):
    """mIoU (n = classes there) and pixel accuracy of a linear head on the patch tokens, at the size of the stored masks. _random: with an encoder of
    new weights; _majority: the most frequent held-out class everywhere."""
    index, train, found = data.open_index(paths), chosen(paths, how), []
    names = data.beside(paths, "classes.txt", "classnames.txt")
    top = [] if names else [survey(part, lambda s: [int(mask_of(s).max())]) for part in (train, index)]
    classes = len(names) if names else 1 + max(itertools.chain.from_iterable(sum(top, [])), default=0)
    if classes < 2:
        raise UserError(f"no mask (KEY.seg.png) with a class but 0 in {paths[0]} ... or the training shards beside it")
    row, view = functools.partial(mask_row, classes=classes), whole(side_of(model))
    for suffix, head in trained(lambda m: Segmenter(m.vision, classes), train, row, model, cfg, device, how, "segmenting"):
        counts, cells = torch.zeros(classes, classes, dtype=torch.long), []
        for images, masks, ids in looks(index, mask_of, model, view):
            for x, mask, i in zip(in_batches(head, cfg, device, images)[:, 1:], map(torch.from_numpy, masks), ids):
                pred = 1 + F.interpolate(x[None], mask.shape, mode="bilinear")[0].argmax(0)
                counts += confusion(pred, mask, classes)
                if len(cells) < 36 and i % max(1, len(index) // 12) == 0:
                    image = index[i].image()
                    shown_as = ([], ""), (mask, "truth"), (pred * (mask > 0), "told")
                    cells += [(overlay(image, what), note, None) for what, note in shown_as]
        counts = common.total(counts)
        value, present = iou_of(counts)
        if value is None:
            raise UserError(f"none of the {len(index)} samples of {paths[0]} ... has a labelled pixel")
        found += [(f"miou{suffix}", value, present), (f"pixel_accuracy{suffix}", int(counts.diag().sum()) / int(counts.sum()), int(counts.sum()))]
        if not suffix and rank() == 0:
            draw_to(how, "segment", cells, 6, f"Held-out images, their masks, and what is told where they are labelled; mIoU {100 * value:.1f} %")
    constant = torch.zeros_like(counts)
    constant[:, int(counts.sum(1).argmax())] = counts.sum(1)
    return found + [("miou_majority", *iou_of(constant))]


def draw_to(how, task, cells, columns, title):
    """A sheet in the folder of the pictures, runs/TASK where none is given."""
    out = how.out or f"runs/{task}"
    os.makedirs(out, exist_ok=True)
    sheet(cells, f"{out}/{task}.png", columns, title, 190)


def box_row(sample, rng, size, depth, how, names, n):
    row, (x, y, w, h), flip, shape = drawn(sample, rng, size, depth, how)
    boxes, classes = [], []
    for bx, by, bw, bh, name, crowd, _ in named_boxes(sample, shape):
        left, right, top, bottom = ((v - o) * size / side for v, o, side in ((bx, x, w), (bx + bw, x, w), (by, y, h), (by + bh, y, h)))
        left, right = (size - right, size - left) if flip else (left, right)
        if not crowd and 0 < (left + right) / 2 < size and 0 < (top + bottom) / 2 < size:        # a crop keeps the boxes whose middle it holds
            left, top, right, bottom = (min(max(v, 0), size) for v in (left, top, right, bottom))
            boxes.append((left, top, right - left, bottom - top))
            classes.append(names[name])
    found, target = assign(boxes, classes, n, size // n)
    return {**row, "cls": found, "box": target}


def named_boxes(sample, shape):
    """[(x, y, w, h, class name, is it a crowd?, area)]; the class is a box's "name", else its text."""
    return [(x, y, w, h, name if isinstance(name, str) else text, bool(crowd), float(area) if isinstance(area, (int, float)) else w * h)
            for x, y, w, h, text, name, crowd, area in sample.boxes(*shape, "name", "iscrowd", "area")]


def boxes_told(head, index, names, model, cfg, device):
    """A detector on held-out images -> its boxes (K, 7): image, class, x, y, w, h, score; the true ones (M, 8): image, class, x, y, w, h, crowd,
    area; the images' sizes (I, 3): image, width, height; cells for a picture. names: {class name: number}."""
    def wanted(sample):
        shape, boxes = sample.image().size, []
        with contextlib.suppress(data.Skip):                 # an image may have no box
            boxes = [(names[name], x, y, w, h, crowd, area) for x, y, w, h, name, crowd, area in named_boxes(sample, shape)]
        return shape, torch.tensor(boxes, dtype=torch.float32).view(-1, 7)

    def shown(i, boxes, note):
        what = [dict(zip("xywh", box), text=titles[int(c)]) for c, *box in boxes[:, :5].tolist()]
        return overlay(index[i].image(), what), note, None
    told, real, shapes, cells, titles = [torch.zeros(0, 7)], [torch.zeros(0, 8)], [torch.zeros(0, 3)], [], list(names)
    size = side_of(model)
    for images, truths, ids in looks(index, wanted, model, whole(size)):
        for x, (shape, boxes), i in zip(detections(head, images, cfg, device), truths, ids):
            x[:, 1:5] *= torch.tensor(shape).repeat(2) / size
            told.append(F.pad(x, (1, 0), value=i))
            real.append(F.pad(boxes, (1, 0), value=i))
            shapes.append(torch.tensor([[i, *shape]], dtype=torch.float32))
            if len(cells) < 24 and i % max(1, len(index) // 12) == 0:
                sure = x[x[:, 5] >= 0.3]
                first = nms(sure[:, 1:5].double().numpy(), sure[:, 5].numpy(), np.zeros(len(sure)))              # one class at a place
                cells += [shown(i, boxes, "truth"), shown(i, sure[first], "told")]
    return *(collect(torch.cat(x)) for x in (told, real, shapes)), cells


def mean_boxes(real, shapes):                                # as boxes_told() has them -> (K, 7), as well
    """The mean true box of each class, in shares of the images' sides, in every image; its score is the class's frequency."""
    sides = {int(i): torch.tensor([w, h]).repeat(2) for i, w, h in shapes.tolist()}
    share = real[:, 2:6] / torch.stack([sides[int(i)] for i in real[:, 0]])
    rows = []
    for c in real[:, 1].unique():
        own = share[real[:, 1] == c]
        rows += [torch.cat([torch.tensor([i, c]), own.mean(0) * side, torch.tensor([len(own) / len(real)])]) for i, side in sides.items()]
    return torch.stack(rows)


def detect(model, tokenizer, paths, cfg, device, store, how):
    """Box AP of a single-scale head on the patch tokens, all and by how many training images show the class (LVIS: rare to 10, common to 100,
    frequent). _random: with an encoder of new weights; _mean_box: each class's mean held-out box in every image."""
    index, train, n, found = data.open_index(paths), chosen(paths, how), model.vision.grid, []
    names_of = lambda sample: {box[4] for box in named_boxes(sample, (10 ** 9, 10 ** 9))}        # of any size: nothing is decoded
    seen, there = (collections.Counter(itertools.chain.from_iterable(survey(part, names_of))) for part in (train, index))
    if not seen or not there:
        raise UserError(f"no boxes in the json of {paths[0]} ... or of the training shards beside it")
    names = {name: i for i, name in enumerate(sorted(seen) + sorted(there.keys() - seen.keys()))}
    groups = dict(zip(("S", "M", "L", "rare", "common", "frequent"), "AP_small AP_medium AP_large AP_rare AP_common AP_frequent".split()))

    def ap(boxes, real):
        coco = [{"image_id": i, "category_id": c, "bbox": b, "score": score} for i, c, *b, score in boxes.tolist()]
        truth = [{"image_id": i, "category_id": c, "bbox": b, "iscrowd": crowd, "area": area} for i, c, *b, crowd, area in real.tolist()]
        return average_precision(coco, truth, {names[name]: images for name, images in seen.items()})
    row = functools.partial(box_row, names=names, n=n)
    for suffix, head in trained(lambda m: Detector(m.vision, len(seen)), train, row, model, cfg, device, how, "detecting"):
        told, real, shapes, cells = boxes_told(head, index, names, model, cfg, device)
        if not len(real):
            raise UserError(f"none of the {len(index)} samples of {paths[0]} ... can be evaluated: no box")
        values = ap(told, real)
        found += [(f"{groups.get(name, name)}{suffix}", v, len(real)) for name, v in values.items() if v is not None]
        if not suffix and rank() == 0:
            draw_to(how, "detect", cells, 6, f"Held-out images: true boxes, and the best told, from a score of 0.3; AP {100 * values['AP']:.1f} %")
    constant = ap(mean_boxes(real, shapes), real)
    return found + [(f"{name}_mean_box", constant[name], len(real)) for name in ("AP", "AP50")]


def detections(head, images, cfg, device, least=0.05, most=100):
    """images (n, 3, S, S) -> for each (K, 6): class, x, y, w, h in pixels of the view, score, best first; FCOS's: the root of class times
    centre-ness, of the classes with at least 0.05, non-maximum suppression, the best 100."""
    S, found = images.shape[-1], []
    for batch in images.split(256):
        with torch.no_grad(), common.autocast(cfg, device):
            logits, boxes, centre = (x.cpu() for x in head(batch.to(device)))
        p, boxes = logits.sigmoid(), boxes.clamp(0, S)
        for p, q, b in zip(p, centre.sigmoid(), torch.cat([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], 2)):
            at, c = (p >= least).nonzero().T
            value, order = (p[at, c] * q[at]).sqrt().sort(descending=True, stable=True)
            at, c, value = at[order][:1000], c[order][:1000], value[:1000]
            keep = nms(b[at].double().numpy(), value.numpy(), c.numpy())[:most]
            found.append(torch.cat([c[keep, None], b[at[keep]], value[keep, None]], 1))
    return found


def asked(sample):
    """[(question, [answers], type)]: the json's "qa" as VQA v2 has it ("answers", or one "answer"; "answer_type"), or a sentence and its "label", as
    NLVR has them."""
    if "label" in sample.json:
        return [(sample.captions()[0], [str(sample.json["label"]).lower()], "yes/no")]
    found, listed = [], lambda x: x if isinstance(x, list) else []
    for qa in (qa for qa in listed(sample.json.get("qa")) if isinstance(qa, dict)):
        answers = [a for a in listed(qa.get("answers")) or [qa.get("answer")] if isinstance(a, str)]
        if answers and isinstance(qa.get("question"), str):
            kind = "yes/no" if {*answers} <= {"yes", "no"} else "number" if all(a.isdigit() for a in answers) else "other"
            found.append((qa["question"], answers, qa["answer_type"] if qa.get("answer_type") in ANSWER_TYPES else kind))
    if not found:
        raise data.Skip("no question")
    return found


def usual(answers):                                          # the most frequent, of equal ones the first
    return collections.Counter(answers).most_common(1)[0][0]


def question_row(sample, rng, size, depth, how, answers, tokenizer, context):
    """An image, squashed, neither cropped nor flipped, as questions ask for left and right, and one of its questions."""
    known = [(q, answers[usual(a)]) for q, a, _ in asked(sample) if usual(a) in answers]
    if not known:
        raise data.Skip("no question")
    question, answer = known[int(rng.integers(len(known)))]
    tokens, valid = tokenizer.pad(question, context)
    return {"images": whole(size)(sample.image()), "noise": rng.random(2 * depth, np.float32), "tokens": tokens, "valid": valid,
            "answer": np.int64(answer)}


def vqa(model, tokenizer, paths, cfg, device, store, how):
    """VQA accuracy, all and by type of answer: the 3,129 most usual training answers ranked by the method's own text path (its `fused`), or where it
    has none by a small fusion head. _random: all new weights; _majority: always the most usual training answer of the question's type."""
    index, train, found = data.open_index(paths), chosen(paths, how), []
    questions = [qa for qas in survey(train, asked) for qa in qas]
    if not questions:
        raise UserError(f"no questions in the json of the training shards beside {paths[0]}")
    told = [a for a, _ in collections.Counter(usual(a) for _, a, _ in questions).most_common(3129)]
    guess = {kind: usual([usual(a) for _, a, k in questions if k == kind] or told[:1]) for kind in ANSWER_TYPES}

    own = getattr(model, "fused", None) is not None
    context, width = (cfg.context, cfg.text_dim) if own else (64, 128)
    tokenizer = tokenizer if own else data.Tokenizer.train([q for q, _, _ in questions], 4096)
    build = lambda m: Answerer(m if own else Fusion(m.vision, tokenizer.vocab_size, context, width), width, len(told))
    row = functools.partial(question_row, answers={a: i for i, a in enumerate(told)}, tokenizer=tokenizer, context=context)
    for suffix, head in trained(build, train, row, model, cfg, device, how, "answering"):
        judged_ones, cells = [torch.zeros(0, 3, dtype=torch.double)], []
        for images, questions, ids in looks(index, asked, model, whole(side_of(model))):
            flat = [(n, *qa) for n, qas in enumerate(questions) for qa in qas]
            tokens, valid = (torch.from_numpy(np.stack(x)) for x in zip(*(tokenizer.pad(q, context) for _, q, _, _ in flat)))
            pred = in_batches(head, cfg, device, images[[n for n, *_ in flat]], tokens, valid).argmax(1).tolist()
            judged_ones.append(torch.tensor([[vqa_accuracy(told[p], truth), vqa_accuracy(guess[kind], truth), ANSWER_TYPES.index(kind)]
                                             for p, (_, _, truth, kind) in zip(pred, flat)], dtype=torch.double))
            for k in range(0, len(flat), max(1, len(flat) // (12 - len(cells)))) if len(cells) < 12 else ():
                (n, question, truth, _), answer = flat[k], told[pred[k]]
                cells.append((index[ids[n]].image(), f"{question} {answer}", "green" if vqa_accuracy(answer, truth) >= 0.5 else "red"))
        right, constant, kinds = collect(torch.cat(judged_ones)).T
        groups = {"": kinds >= 0, **{f"_{kind}": kinds == k for k, kind in enumerate(ANSWER_TYPES) if (kinds == k).any()}}
        found += [(f"vqa{group}{mark}", value[rows].mean().item(), int(rows.sum())) for group, rows in groups.items()
                  for mark, value in ((suffix, right), ("_majority", constant)) if not (suffix and mark == "_majority")]
        if not suffix and rank() == 0:
            draw_to(how, "vqa", cells, 6, f"Held-out questions with the answers told; framed green where right; accuracy {100 * right.mean():.1f} %")
    return found


ANSWER_TYPES = ("yes/no", "number", "other")                 # VQA's


def recipe(task, args):
    """The Recipe of a task, DEMO's changes where no --data are given, what the command line gives, and the rate of a head alone (ours)."""
    how = dataclasses.replace(RECIPES[task], **({} if args.data else DEMO[task]))
    given = {f.name: v for f in dataclasses.fields(how) if (v := getattr(args, f.name, None)) is not None and v is not False}
    most = {"percent": 100, "scale": 1}
    wrong = [f"--{name} {v}" for name, v in given.items() if isinstance(v, (int, float)) and not 0 < v <= most.get(name, math.inf)]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: must be more than 0, --percent at most 100, --scale at most 1")
    if given.get("frozen") and "lr" not in given:
        given["lr"] = 1e-3
    return dataclasses.replace(how, **given)


# The protocols, and the method of a model that one needs beyond its .vision.
HEADS = {"finetune": finetune, "segment": segment, "detect": detect, "vqa": vqa}
TASKS = {"zeroshot": zeroshot, "retrieval": retrieval, "knn": nearest, "linear": linear, "attentive": attentive, "caption": caption, **HEADS}
NEEDS = {"zeroshot": "encode_text", "retrieval": "encode_text", "caption": "generate"}


def able(model, task):
    return task not in NEEDS or getattr(model, NEEDS[task], None) is not None


def first_sample(index):
    """The first readable sample, or one without anything."""
    for i in range(len(index)):
        with contextlib.suppress(data.Skip):
            sample = index[i]
            sample.json
            return sample
    return data.Sample("", {})


def has_classes(index):
    """Has the first readable record a label rather than a caption?"""
    sample = first_sample(index)
    return "cls" in sample.members and not sample.captioned()


def heads_for(paths):
    """The heads that can be trained on the train part beside these shards, told by the first record."""
    sample = first_sample(data.open_index(paths))
    fields = {"finetune": "cls" in sample.members and not sample.captioned(), "segment": "seg.png" in sample.members,
              "detect": bool({"boxes", "segments"} & sample.json.keys()), "vqa": bool({"qa", "label"} & sample.json.keys())}
    return [task for task, there in fields.items() if there and bank_of(paths)]


def tasks_for(paths):
    """What the first record of these shards allows: captions -> retrieval and captioning; classes -> zero-shot and classes named in captions,
    and if there is a bank kNN and linear probe."""
    if not has_classes(data.open_index(paths)):
        return ["retrieval", "caption"]
    return ["zeroshot", "caption"] + ["knn", "linear"] * bool(bank_of(paths))


def held_out(cfg):
    """Pairs to draw pictures from: the first captioned --val, else training shards -> (Index, what they are)."""
    paths = next((p for p in (data.expand(v, "test") for v in cfg.val or ()) if "retrieval" in tasks_for(p)), None)
    return data.open_index(paths or data.expand(cfg.data or cfg.labels)[:1]), "held-out pairs" if paths else "training images"


def specimens(index, n):
    """n samples spread over an index, for a picture: each with image and caption, or the next one that has both."""
    found = []
    for start in np.linspace(0, len(index) - 1, n).astype(int).tolist():
        for i in range(start, start + len(index)):
            with contextlib.suppress(data.Skip):
                sample = index[i % len(index)]
                found += [sample] if sample.image() and sample.captions() else []
                break
    return found


def shown(name, value):
    return "-" if value is None else f"{value:.3f}" if name.startswith(("nats", "cider")) else f"{100 * value:.1f} %"


def table(rows):
    """[(metric, value, n)] as lines of text."""
    return "\n".join(f"  {name:<32}{shown(name, value):>9}   n = {n:,}" for name, value, n in rows)


def evaluate(model, tokenizer, cfg, device):
    """A script's own evaluation on cfg.val: prints a table, writes out/result.json, returns it (flat, fractions). The attentive probe, which takes
    longer, is left to the command line."""
    if not cfg.val:
        print0("no --val: nothing held out to evaluate on")
        return {}
    rows, store = [], Store()
    for pattern in cfg.val:
        paths = data.expand(pattern, "test")
        for task in tasks_for(paths):
            if able(model, task):
                found = TASKS[task](model, tokenizer, paths, cfg, device, store)
                rows += [row for row in found if not row[0].endswith("_mean_per_class")]         # the command line tells these, too
    print0(f"held out:\n{table(rows)}")
    result = {name: value for name, value, _ in rows}
    write(result, cfg)
    return result


def write(result, cfg):
    if rank() == 0:
        with open(os.path.join(cfg.out, "result.json"), "w") as f:
            json.dump(result, f, indent=1)


# ---- command line ----

class Encoder(torch.nn.Module):
    """A vision transformer alone, as a file under timm's names holds it."""
    def __init__(self, cfg):
        super().__init__()
        self.vision = common.ViT(cfg.image_size, cfg.patch, cfg.dim, cfg.depth, cfg.heads, cls=cfg.cls, mean=cfg.mean, std=cfg.std)

    def encode_image(self, images):                          # (B, 3, S, S) -> (B, D) unit
        return common.unit(self.vision.patch_tokens(images).mean(1))

    @classmethod
    def read(cls, path):                                     # -> (model, cfg)
        (tensors, meta), sizes = common.read_encoder(path), common.encoder_sizes(path)
        norms = {name: json.loads(meta.get(name, "[0.5, 0.5, 0.5]")) for name in ("mean", "std")}
        size = math.isqrt(tensors["pos_embed"].shape[1]) * sizes["patch"]
        cfg = SimpleNamespace(image_size=size, cls="cls_token" in tensors, precision="auto", seed=0, **sizes, **norms)
        model = cls(cfg)
        common.init_encoder(model.vision, path)
        return model, cfg


def load(path, device="cpu"):
    """Checkpoint, or encoder file -> (model, tokenizer, cfg, hash of the file). Raises UserError for what is neither."""
    if path.endswith(".safetensors"):
        model, cfg = Encoder.read(path)
        return model.to(device).eval(), data.Tokenizer(), cfg, digest_of(path)
    try:
        state = common.read_checkpoint(path)
    except (FileNotFoundError, ValueError) as error:
        with contextlib.suppress(UserError):                 # an encoder as a torch file?
            model, cfg = Encoder.read(path)
            return model.to(device).eval(), data.Tokenizer(), cfg, digest_of(path)
        raise UserError(f"not a readable checkpoint: {error}") from None
    if state["method"] not in METHODS:
        raise UserError(f"{path} is a checkpoint of {state['method']}: known are {', '.join(METHODS)}")
    module = importlib.import_module(METHODS[state["method"]])
    try:
        cfg = module.Config(**state["config"])
        model = module.Model(cfg)
        model.load_state_dict(state["model"])
    except (TypeError, RuntimeError) as error:
        raise UserError(f"{path} was written by another version of {METHODS[state['method']]}.py: {str(error).splitlines()[0]}") from None
    return model.to(device).eval(), data.Tokenizer.loads(state["vocab"]), cfg, digest_of(path)


def digest_of(path):
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()[:12]


def data_sets(args, *parts, apart=False):
    """[(name, files)]: --data, where each of several folders is a data set; or these parts of the built-in world. apart: so is each pattern."""
    given = args.data or [f"{folder}/{part}" for folder in [rank0_first(data.make_world)] for part in parts]
    apart = apart or len(given) > 1 and all(map(os.path.isdir, given))
    return [(" ".join(g), data.expand(g, "test")) for g in ([[g] for g in given] if apart else [given])]


def records(task, subject, name, paths, device, **how):
    """One protocol on one data set -> what is kept of each metric."""
    model, tokenizer, cfg, digest, store = subject
    return [{"metric": m, "value": v, "n": n, "protocol": task, "split": name, "checkpoint": digest, "seed": cfg.seed}
            for m, v, n in TASKS[task](model, tokenizer, paths, cfg, device, store, **how)]


def main_metric(rows):
    """What stands for a data set in the mean over several (as in DataComp): both R@1, else the first metric, seen and unseen classes together."""
    first = rows[0]["metric"]
    names = ("i2t_r1", "t2i_r1") if first == "i2t_r1" else (first, first.replace("_seen", "_unseen"))
    rows = [r for r in rows if r["metric"] in names]
    weights = [1 if first == "i2t_r1" else r["n"] for r in rows]
    return sum(w * r["value"] for w, r in zip(weights, rows)) / sum(weights)


def measure(args, device):
    """One protocol on each checkpoint: a JSON line for each result, then a table; over several data sets their mean."""
    sets, how = data_sets(args, "pairs" if args.task in ("retrieval", "caption", "segment", "detect", "vqa") else "labels"), {}
    if args.task == "linear":
        how["protocol"] = args.protocol
    if args.task in HEADS:
        how["how"] = recipe(args.task, args)
    for checkpoint in args.checkpoint:
        subject, found = opened(checkpoint, device, args.task), []
        for name, paths in sets:
            found.append(records(args.task, subject, name, paths, device, **how))
        if len(sets) > 1:
            mean = sum(map(main_metric, found)) / len(found)
            found.append([{**found[0][0], "metric": "mean", "value": mean, "n": len(found), "split": " ".join(name for name, _ in sets)}])
        for rows in found:
            told = table([(r["metric"], r["value"], r["n"]) for r in rows])
            print0("\n".join([*map(json.dumps, rows), f"{checkpoint}, {args.task} on {rows[0]['split']}:", told]))
        if args.out and rank() == 0:
            os.makedirs(args.out, exist_ok=True)
            with open(os.path.join(args.out, "eval.jsonl"), "a") as f:
                f.writelines(json.dumps(r) + "\n" for rows in found for r in rows)


def compare(args, device):
    """Every protocol that each checkpoint can do, side by side: compare.md, compare.json and compare.png in --out."""
    found, columns, out = [], {}, args.out or "runs/compare"
    for checkpoint in args.checkpoint:
        subject = opened(checkpoint, device)
        label = f"{type(subject[0]).__name__} {os.path.basename(os.path.dirname(os.path.abspath(checkpoint)))}"
        columns[subject[3]] = label if label not in columns.values() else f"{label} {subject[3][:4]}"
        for name, paths in data_sets(args, "pairs", "labels", apart=True):
            tasks = tasks_for(paths)
            for task in tasks + ["attentive"] * ("knn" in tasks) + (heads_for(paths) if args.heads else []):
                if able(subject[0], task):
                    print0(f"{columns[subject[3]]}: {task} on {name}")
                    how = {"how": dataclasses.replace(recipe(task, args), out=f"{out}/{subject[3]}")} if task in HEADS else {}
                    found += records(task, subject, name, paths, device, **how)
    if rank():
        return
    cells = collections.defaultdict(dict)
    for r in found:
        cells[os.path.basename(r["split"].rstrip("/")), r["metric"], r["n"]][r["checkpoint"]] = r["value"]
    lines = [f"| data | metric | n | {' | '.join(columns.values())} |", "|---" * (3 + len(columns)) + "|"]
    for (split, metric, n), values in cells.items():
        lines.append(f"| {split} | {metric} | {n:,} | {' | '.join(shown(metric, values.get(c)) for c in columns)} |")
    print0("\n".join(lines))
    os.makedirs(out, exist_ok=True)
    with open(f"{out}/compare.md", "w") as f:
        f.write("\n".join(lines) + "\n")
    with open(f"{out}/compare.json", "w") as f:
        json.dump({"checkpoints": columns, "results": found}, f, indent=1)
    drawn = {f"{metric}, {split}": [values.get(c) for c in columns] for (split, metric, _), values in cells.items()
             if not metric.startswith(("nats", "cider")) and not metric.removesuffix("_itm").endswith(("mean_per_class", "top5", "r5", "r10"))}
    bars(drawn, list(columns.values()), f"{out}/compare.png", "Held out")


def export(args, device):
    """The encoder of a checkpoint as timm names it, in float32: FILE.safetensors (written by hand; formats 10.6) or FILE.pt."""
    if len(args.checkpoint) > 1 or not args.out or not args.out.endswith((".safetensors", ".pt")):
        raise UserError(f"export takes one checkpoint and --out FILE.safetensors or FILE.pt, not {len(args.checkpoint)} and --out {args.out}")
    model, _, _, digest = load(args.checkpoint[0])
    vision = model.vision
    tensors = {name: x.detach().float().contiguous() for name, x in vision.state_dict().items()}
    told = {name: json.dumps([round(v, 6) for v in getattr(vision, name).flatten().tolist()]) for name in ("mean", "std")}
    meta = {"format": "pt", "method": type(model).__name__, "checkpoint": digest, "image_size": str(vision.grid * vision.patch),
            "patch": str(vision.patch), "heads": str(vision.blocks[0].attn.heads), "pooling": "avg", **told}     # avg: timm's, with fc_norm=False
    if rank() == 0:
        os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
        if args.out.endswith(".pt"):
            torch.save({"model": tensors, "metadata": meta}, args.out)
        else:
            header, at = {"__metadata__": meta}, 0
            for name, x in tensors.items():
                header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [at, at := at + 4 * x.numel()]}
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            with open(args.out, "wb") as f:
                f.write(len(text).to_bytes(8, "little") + text)
                f.writelines(x.numpy().astype("<f4").tobytes() for x in tensors.values())
    print0(f"{args.out}: encoder of a {meta['method']}, {len(tensors)} tensors, {sum(x.numel() for x in tensors.values()):,} parameters; " +
           ", ".join(f"{k} {meta[k]}" for k in ("image_size", "patch", "heads", "pooling", "mean", "std")))


def find(args, device):
    """The search of each checkpoint."""
    if not (args.text or args.image):
        raise UserError("search needs --text, --image, or both")
    paths = [p for _, files in data_sets(args, "pairs") for p in files]
    index = data.open_index(paths)
    for checkpoint in args.checkpoint:
        model, tokenizer, cfg, _, store = opened(checkpoint, device, "retrieval" if args.text or args.minus else None)
        query = dict(text=args.text, image=args.image, minus=args.minus, weights=args.weights, k=args.k)
        found = search(model, tokenizer, cfg, device, index, store, args.out or "runs/search", **query)
        print0("\n".join(f"{score:7.3f}  {key}" for score, key in found))


def opened(checkpoint, device, task=None):
    """load(), and the store of its features, which is the checkpoint's folder. UserError if it cannot do the task."""
    model, tokenizer, cfg, digest = load(checkpoint, device)
    if task and not able(model, task):
        raise UserError(f"{checkpoint} is a {type(model).__name__}: it can do {', '.join(t for t in TASKS if able(model, t))}")
    return model, tokenizer, cfg, digest, Store(os.path.dirname(os.path.abspath(checkpoint)), digest)


COMMANDS = {**dict.fromkeys(TASKS, measure), "search": find, "compare": compare, "export": export}
FLAGS = {                                                    # flags of some commands, which no other takes
    "--epochs": ("finetune segment detect vqa", dict(help="how often each image is seen", type=float)),
    "--batch": ("finetune segment detect vqa", dict(help="images a step", type=int)),
    "--lr": ("finetune segment detect vqa", dict(help="rate for 256 images", type=float)),
    "--percent": ("finetune segment detect vqa", dict(help="how much of the training data [100]", type=float)),
    "--shots": ("finetune", dict(help="training images of a class [all]", type=int)),
    "--scale": ("finetune segment detect", dict(help="least area of the random crop", type=float)),
    "--frozen": ("segment detect vqa", dict(help="train the head alone", action="store_true")),
    "--heads": ("compare", dict(help="train them, too: finetune, segment, detect, vqa, some minutes each", action="store_true")),
    "--protocol": ("linear", dict(help="whose probe, clip or mae [clip]", choices=("clip", "mae"), default="clip")),
    "--text": ("search", dict(help="what the images should show")),
    "--image": ("search", dict(help="a picture file, alone or together with --text")),
    "--minus": ("search", dict(help="what they should not show")),
    "--weights": ("search", dict(help="of image and text [1 2]", nargs=2, type=float, default=(1, 2))),
    "--k": ("search", dict(help="how many images [20]", type=int, default=20))}


def main(argv=None):
    parser = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("task", choices=list(COMMANDS))
    parser.add_argument("checkpoint", nargs="+")
    parser.add_argument("--data", nargs="+", help="held-out shards; each of several folders is a data set; none = the built-in world's")
    parser.add_argument("--out", help="folder for eval.jsonl, to which results are added; for pictures of segment, detect, vqa [runs/TASK]; search "
                                      "[runs/search], compare [runs/compare]: for what they write; export: the file")
    for flag, (owner, how) in FLAGS.items():
        parser.add_argument(flag, **{**how, "help": f"{owner}: {how['help']}"})
    args = parser.parse_args(argv)
    for flag, (owner, how) in FLAGS.items():
        if args.task not in owner.split() and getattr(args, flag[2:]) != parser.get_default(flag[2:]):
            raise UserError(f"{flag} belongs to {owner}, not to {args.task}")
    COMMANDS[args.task](args, common.join())


if __name__ == "__main__":
    common.guard(main)
