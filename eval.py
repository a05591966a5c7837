"""Measure checkpoints: features, metrics, protocols, search, pictures, and one command line.

    python eval.py retrieval runs/align/last.pt --data 'coco/test-*.tar'
    python eval.py zeroshot runs/align/last.pt --data cifar10/
    python eval.py linear runs/mug/last.pt  # without --data: the toy data
    python eval.py linear runs/mug/last.pt --random-init  # the same encoder, untrained
    python eval.py finetune runs/mug/last.pt --data imagenet/  # segment, detect, vqa likewise
    python eval.py search runs/align/last.pt --text 'a red circle left of a blue star'
    python eval.py compare runs/*/last.pt --out runs/report
    python eval.py export runs/align/last.pt --out vit.safetensors

Reading order: features (images -> vectors), metrics (pure functions, each with its source),
protocols (features -> metrics), results (metrics -> a table). What follows stands by itself:
search, pictures, checkpoints and encoder files, trained heads, command line.

A model has `vision` and `held_out_view`, and is asked for encode_image, encode_text, generate,
score, match_score, fused where it has them. Numbers are fractions of a whole split; ranks share
the work without padding, so that no result depends on how many there are.

Dimension key: I images, T texts, C classes, P prompts of a class, N patches, E embedding, D width.
"""
import argparse
import collections
import copy
import functools
import importlib
import itertools
import json
import math
import os
import re
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm import tqdm

import common
import data
from common import UserError, print0, rank, world_size


# ---- features ----

def rank_slice(n):
    """This rank's part of n things, as a range; those of all ranks, in order, are range(n)."""
    return range(rank() * n // world_size(), (rank() + 1) * n // world_size())


def all_gather_rows(x):
    """Rows of all ranks in rank order: (n_r, ...), any number of rows a rank -> (I, ...)."""
    if world_size() == 1:
        return x
    counts = common.all_gather(torch.tensor([len(x)], device=x.device)).tolist()
    longest = max(counts)
    padding = x.new_zeros(longest - len(x), *x.shape[1:])
    parts = common.all_gather(torch.cat([x, padding])).split(longest)
    return torch.cat([part[:n] for part, n in zip(parts, counts)])


def progress(items, label, total):
    """The items; rank 0 shows how far they are: a bar on a terminal, else a line now and then."""
    if rank() > 0:
        yield from items
        return
    if sys.stderr.isatty():
        yield from tqdm(items, label, total, leave=False)
        return
    last = time.monotonic()
    for n, item in enumerate(items):
        if time.monotonic() - last > 5:
            print(f"{label}: {n:,} of {total:,}", file=sys.stderr, flush=True)
            last = time.monotonic()
        yield item


def iter_images(index, view, read=None, block=256):
    """This rank's share of an index, a block at a time -> images, values, sample numbers.

    images: uint8 (n, 3, S, S), view(PIL image) of each; values: [read(sample)], None without read.
    Samples of which one of the two raises data.Skip are left out and counted.
    """
    numbers = rank_slice(len(index))
    skipped = collections.Counter()

    def load(number):
        try:
            sample = index[number]
            return view(sample.image()), None if read is None else read(sample), number
        except data.Skip as reason:
            return reason

    starts = range(0, len(numbers), block)
    with ThreadPoolExecutor(common.cpu_count()) as pool:  # Pillow decodes outside Python's lock
        for start in progress(starts, f"reading images, blocks of {block}", len(starts)):
            rows = []
            for row in pool.map(load, numbers[start:start + block]):
                if isinstance(row, data.Skip):
                    skipped[str(row)] += 1
                else:
                    rows.append(row)
            if rows:
                images, values, ids = zip(*rows)
                yield torch.from_numpy(np.stack(images)), list(values), list(ids)
    if skipped:
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items()))
        print(f"warning: {skipped.total()} of {len(numbers)} samples are not evaluated: {reasons}",
              file=sys.stderr)


@torch.no_grad()
def in_batches(fn, cfg, device, *rows, size=256):
    """fn over batches of rows, in the run's precision -> its rows on the CPU, at least float32."""
    parts = []
    with common.autocast(cfg.precision, device):
        for batch in zip(*(x.split(size) for x in rows)):
            n = len(batch[0])
            if n == 0:  # attention on CUDA fails without rows; ones are a text of a token, too
                batch = [x.new_ones(1, *x.shape[1:]) for x in batch]
            out = fn(*(x.to(device) for x in batch))[:n]
            parts.append(common.at_least_float32(out).cpu())
    return torch.cat(parts)


def check_evaluated(n, index):
    if n == 0:
        raise UserError(f"none of the {len(index)} samples of {index.paths[0]} ... can be "
                        "evaluated: the warning above counts why")


def embed_samples(model, index, cfg, device, fn, read=None):
    """Every usable image of an index through fn, on the CPU.

    -> features (I, ...) of all ranks, [read(sample)] of this rank's share, sample numbers (I,).
    """
    size = model.vision.image_size
    no_images = torch.zeros(0, 3, size, size, dtype=torch.uint8)  # for a rank without any
    features = [in_batches(fn, cfg, device, no_images)]
    values = []
    ids = []
    for images, block_values, block_ids in iter_images(index, model.held_out_view, read):
        features.append(in_batches(fn, cfg, device, images))
        values += block_values
        ids += block_ids
    ids = all_gather_rows(torch.tensor(ids, dtype=torch.long))
    check_evaluated(len(ids), index)
    return all_gather_rows(torch.cat(features)), values, ids


def embed_images(model, index, cfg, device, fn=None):
    """Every readable image of an index through fn (encode_image if none is given).

    -> features (I, ...) on the CPU, sample numbers (I,).
    """
    if fn is None:
        fn = model.encode_image
    features, _, ids = embed_samples(model, index, cfg, device, fn)
    return features, ids


def embed_labelled(model, index, cfg, device, fn):
    """The same for the images that have a class -> features, classes (I,), sample numbers (I,)."""
    features, labels, ids = embed_samples(model, index, cfg, device, fn, data.Sample.label)
    return features, all_gather_rows(torch.tensor(labels, dtype=torch.long)), ids


def tokenize(tokenizer, texts, context):
    """Texts -> tokens and valid (T, L); L is as long as the longest of them, at most context."""
    tokens = torch.zeros(len(texts), context, dtype=torch.long)
    valid = torch.zeros(len(texts), context, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids, is_token = tokenizer.pad(text, context)
        tokens[row] = torch.as_tensor(ids)
        valid[row] = torch.as_tensor(is_token)
    longest = int(valid.sum(1).max()) if texts else 1
    return tokens[:, :longest], valid[:, :longest]


def encode_texts(model, tokenizer, texts, cfg, device):
    """Texts -> (T, E), unit length."""
    tokens, valid = tokenize(tokenizer, texts, cfg.context)
    return in_batches(model.encode_text, cfg, device, tokens, valid)


def read_captions(sample):
    """All captions of a sample; each line of its .txt is one (evaluation tars)."""
    return sample.captions(lines=True)


def embed_pairs(model, tokenizer, index, cfg, device):
    """Captioned shards -> what retrieval compares.

    -> image (I, E), text (T, E), owner (T,) = row of each text's image, sample numbers (I,).
    """
    image, captions, ids = embed_samples(
        model, index, cfg, device, model.encode_image, read_captions)
    counts = all_gather_rows(torch.tensor([len(c) for c in captions], dtype=torch.long))
    texts = [text for image_captions in captions for text in image_captions]
    text = all_gather_rows(encode_texts(model, tokenizer, texts, cfg, device))
    owner = torch.arange(len(counts)).repeat_interleave(counts)
    return image, text, owner, ids


# ---- metrics ----
# Fractions of 1, but for CIDEr. Of equal scores the earlier index ranks first, so that a constant
# model does not score 100 %; target_ranks and knn never count a NaN as right.

def target_ranks(scores, target):
    """Place of each row's target, 0 = best: how many in its row are larger, or equal and earlier.

    scores (N, C), target (N,) column numbers -> (N,) int64. A target with a NaN is last of all.
    """
    column = torch.arange(scores.shape[1], device=scores.device)
    rows_at_a_time = max(1, 2**22 // scores.shape[1])  # temporaries of 4 M scores, whatever N is
    places = []
    chunks = zip(scores.split(rows_at_a_time), target[:, None].split(rows_at_a_time))
    for rows, own_column in chunks:
        own = rows.gather(1, own_column)
        better = (rows > own) | ((rows == own) & (column < own_column))  # never true for a NaN
        place = better.sum(1)
        places.append(place.masked_fill(own[:, 0].isnan(), torch.iinfo(torch.int64).max))
    return torch.cat(places)


def accuracy(scores, labels, k=1):
    """Share of rows whose label is among the k best scores; scores (N, C), labels (N,).

    None if k > C, where it means nothing.
    """
    assert len(scores) == len(labels) > 0, f"{len(scores)} rows of scores, {len(labels)} labels"
    if k > scores.shape[1]:
        return None
    return (target_ranks(scores, labels) < k).double().mean().item()


def recall_at_k(sim, owner, ks=(1, 5, 10)):
    """Retrieval recall as ALBEF counts it -> {"i2t": {k: fraction}, "t2i": {k: fraction}}.

    sim (T, I): rows are texts, columns images; owner (T,): the image of each text.
    t2i: share of texts whose image is among the k best images. i2t: share of images with at least
    one own text among the k best of all texts; images without a text are left out there. Nothing
    larger than a chunk of sim is built.
    """
    n_texts, n_images = sim.shape
    assert owner.shape == (n_texts,) and n_texts > 0, f"owner {tuple(owner.shape)}, {n_texts} texts"
    t2i = target_ranks(sim, owner)

    # of an image's own texts only the best one matters: the highest score, then the earliest
    own_scores = sim.gather(1, owner[:, None])[:, 0]
    order = (-own_scores).argsort(stable=True)  # texts, best first; NaN last
    place = order.argsort()  # of each text in that order
    first = torch.full((n_images,), n_texts, device=sim.device)  # n_texts: no text of its own
    first = first.scatter_reduce(0, owner, place, "amin")
    best_text = order[first.clamp(max=n_texts - 1)]
    i2t = target_ranks(sim.T, best_text)[first < n_texts]

    return {
        "i2t": {k: (i2t < k).double().mean().item() for k in ks},
        "t2i": {k: (t2i < k).double().mean().item() for k in ks},
    }


def mean_per_class(predicted, labels):
    """Mean over the classes present in labels of the share predicted right; both (N,).

    The same as scikit-learn's balanced accuracy.
    """
    assert predicted.shape == labels.shape and len(labels) > 0
    count = labels.bincount()
    right = labels[predicted == labels].bincount(minlength=len(count))
    present = count > 0
    return (right[present].double() / count[present]).mean().item()


def k_nearest(sim, k):
    """Columns (R, k) of the k largest of each row, unsorted; of equal ones the earlier, NaN last.

    topk breaks ties as it likes, so only its k-th value is used.
    """
    sim = sim.masked_fill(sim.isnan(), -torch.inf)  # topk takes a NaN for the largest
    kth = sim.topk(k).values[:, -1:]
    above = sim > kth
    tied = sim == kth
    room = k - above.sum(1, keepdim=True)
    selected = above | (tied & (tied.cumsum(1) <= room))
    return selected.nonzero()[:, 1].view(len(sim), k)


def knn(train, train_labels, test, k=20):
    """Weighted vote of the k nearest by cosine, weight exp(sim / 0.07) (DINO's eval_knn.py).

    train (N, E), train_labels (N,), test (M, E), of any length -> labels (M,). A feature with a NaN
    gets no vote and gives none: a test row without any vote is labelled -1.
    """
    if k > len(train):
        raise ValueError(f"k = {k} neighbours out of {len(train)} training features")
    train = F.normalize(train, dim=1)
    n_classes = int(train_labels.max()) + 1
    predicted = []
    for rows in F.normalize(test, dim=1).split(max(1, 2**24 // len(train))):
        sim = rows @ train.T
        nearest = k_nearest(sim, k)
        weight = (sim.gather(1, nearest) / 0.07).exp().nan_to_num(nan=0)
        votes = sim.new_zeros(len(rows), n_classes).scatter_add(1, train_labels[nearest], weight)
        best = votes.max(1)
        predicted.append(best.indices.masked_fill(best.values == 0, -1))
    return torch.cat(predicted)


def prompt_ensemble(embeds):
    """CLIP's zero-shot classifier: (C, P, E) prompts of each class, of any length -> (C, E) unit.

    The mean of unit vectors, made unit again. Without the inner step long vectors would win.
    """
    return F.normalize(F.normalize(embeds, dim=-1).mean(1), dim=-1)


def logistic_regression(x, y, C, start, max_iter):
    """Minimize |W|^2 / 2 + C * summed cross-entropy (scikit-learn's objective) by L-BFGS.

    x (N, E) float64, y (N,); start: weight (E, classes) and bias (classes,). Stops where the
    gradient of the mean is below 1e-4. -> weight, bias
    """
    weight = start[0].clone().requires_grad_()
    bias = start[1].clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=max_iter, tolerance_grad=1e-4, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        penalty = weight.square().sum() / (2 * C * len(y))
        loss = F.cross_entropy(x @ weight + bias, y) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def linear_probe(train, train_labels, test):
    """CLIP's linear probe: logistic regression on features as they are -> labels (M,).

    train (N, E), train_labels (N,), test (M, E). C is searched as CLIP does (appendix A.3) but more
    coarsely (ours): powers of a hundred from 1e-6 to 1e6, then steps of 10, 3.2 and 1.8 around the
    best, by accuracy on a random fifth of the training rows after 100 iterations; then all rows are
    fitted.
    """
    if len(train) < 5:
        raise UserError(f"a linear probe needs at least 5 labelled training images, here are "
                        f"{len(train)}")
    n_classes = int(train_labels.max()) + 1
    center = train.double().mean(0)  # as the bias is free, the optimum stays; it is found sooner
    train = train.double() - center
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    held_out = order.to(train.device) % 5 == 4  # random, as files may hold the classes in turn
    no_weight = train.new_zeros(train.shape[1], n_classes)
    fits = {-math.inf: (no_weight, train.new_zeros(n_classes))}  # power of ten -> weight, bias
    scores = {}

    def predict(fit, x):
        return (x @ fit[0] + fit[1]).argmax(1)

    def score(power):
        """Accuracy on the held-out fifth with C = 10^power; started from the next smaller C."""
        if power not in scores:
            start = fits[max(p for p in fits if p < power)]
            x = train[~held_out]
            y = train_labels[~held_out]
            fits[power] = logistic_regression(x, y, 10.0**power, start, max_iter=100)
            right = predict(fits[power], train[held_out]) == train_labels[held_out]
            scores[power] = right.double().mean().item()
        return scores[power]

    best = max(range(-6, 7, 2), key=score)
    for step in (1, 0.5, 0.25):
        best = max((best, best - step, best + step), key=score)
    fit = logistic_regression(train, train_labels, 10.0**best, fits[best], max_iter=1000)
    return predict(fit, test.double() - center)


def words(text):
    """Simple tokens: lower case, split at white space, punctuation stripped.

    Ours; the reference runs the Stanford tokenizer in Java.
    """
    stripped = [word.strip("'`\"()[]{}.?!,:;-") for word in text.lower().split()]
    return [word for word in stripped if word]


def ngram_counts(text, n):
    """{n-gram: how often it occurs}."""
    tokens = words(text)
    return collections.Counter(zip(*(tokens[i:] for i in range(n))))


def bleu(captions, references):
    """Corpus BLEU as in the COCO caption evaluation, on simple tokens -> [BLEU-1, .., BLEU-4].

    captions: one str an image; references: a list of str for each image.
    """
    assert len(captions) == len(references) > 0
    caption_length = 0
    reference_length = 0
    for caption, refs in zip(captions, references):
        n = len(words(caption))
        lengths = [len(words(ref)) for ref in refs]
        caption_length += n
        reference_length += min((abs(length - n), length) for length in lengths)[1]  # the closest
    if caption_length == 0:
        return [0.0] * 4
    brevity = min(0.0, 1 - reference_length / caption_length)

    log_precisions = []
    for n in (1, 2, 3, 4):
        matches = 0
        total = 0
        for caption, refs in zip(captions, references):
            counts = ngram_counts(caption, n)
            most = collections.Counter()
            for ref in refs:
                most |= ngram_counts(ref, n)  # the larger count of each n-gram
            matches += sum((counts & most).values())
            total += sum(counts.values())
        log_precisions.append(math.log((matches + 1e-15) / (total + 1e-9)))
    return [math.exp(sum(log_precisions[:n]) / n + brevity) for n in (1, 2, 3, 4)]


def cider(captions, references):
    """CIDEr-D of a split, on simple tokens -> 0 .. 10.

    captions: one str an image; references: a list of str for each image. An n-gram weighs the less
    the more images have it in a reference, so the score depends on the split; one image gives 0.
    """
    assert len(captions) == len(references) > 0
    return 10 * sum(cider_of_ngrams(captions, references, n) for n in (1, 2, 3, 4)) / 4


def cider_of_ngrams(captions, references, n):
    """Mean over images of the mean over references of clipped cosine times length penalty."""
    reference_counts = []
    document_frequency = collections.Counter()
    for refs in references:
        counts = [ngram_counts(ref, n) for ref in refs]
        reference_counts.append(counts)
        document_frequency.update(set().union(*counts))

    def tf_idf(counts):
        idf = {g: math.log(len(references) / max(1, document_frequency[g])) for g in counts}
        return {g: count * idf[g] for g, count in counts.items()}

    total = 0.0
    for caption, refs, counts in zip(captions, references, reference_counts):
        vector = tf_idf(ngram_counts(caption, n))
        for ref, ref_counts in zip(refs, counts):
            gap = n_bigrams(caption) - n_bigrams(ref)  # of length, as the reference counts it
            similarity = clipped_cosine(vector, tf_idf(ref_counts))
            total += similarity * math.exp(-(gap**2) / (2 * 6**2)) / len(refs)
    return total / len(captions)


def clipped_cosine(a, b):
    """sum of min(a, b) * b over |a| |b|, for sparse vectors {n-gram: weight}."""
    norm = math.sqrt(sum(w * w for w in a.values())) * math.sqrt(sum(w * w for w in b.values()))
    if norm == 0:
        return 0.0
    return sum(min(w, b[g]) * b[g] for g, w in a.items() if g in b) / norm


def n_bigrams(text):
    return max(0, len(words(text)) - 1)


def confusion(predicted, target, classes, ignore=0):
    """Pixel counts (classes, classes), by target and prediction; integer maps of one shape.

    Pixels whose target is `ignore` count nowhere. Raises ValueError for a class beyond `classes`.
    """
    assert predicted.shape == target.shape, f"{tuple(predicted.shape)}, {tuple(target.shape)}"
    predicted = predicted[target != ignore].long().cpu()
    target = target[target != ignore].long().cpu()
    for name, x in (("prediction", predicted), ("target", target)):
        if len(x) and (x.min() < 0 or x.max() >= classes):
            raise ValueError(f"{name} {x.min()} .. {x.max()} is not in 0 .. {classes - 1}")
    counts = (classes * target + predicted).bincount(minlength=classes**2)
    return counts.view(classes, classes)


def iou_of_counts(counts, ignore=0):
    """Sum of confusion() over a split -> mean IoU (None without any class), number of classes.

    A class that is neither in the targets nor predicted leaves the mean (ADE20K's code gives it 0).
    """
    intersection = counts.diag().double()
    union = counts.sum(0) + counts.sum(1) - counts.diag()
    present = (union > 0) & (torch.arange(len(counts)) != ignore)
    if not present.any():
        return None, 0
    return (intersection[present] / union[present]).mean().item(), int(present.sum())


def mean_iou(predicted, target, classes, ignore=0):
    """Mean over classes of intersection / union, each summed over the whole split first (ADE20K).

    predicted, target: integer maps of one shape, or lists of such maps. classes counts `ignore`.
    """
    if isinstance(predicted, torch.Tensor):
        predicted = [predicted]
        target = [target]
    maps = zip(predicted, target, strict=True)
    return iou_of_counts(sum(confusion(p, t, classes, ignore) for p, t in maps), ignore)[0]


IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)


def box_iou(boxes, truths, crowd=None):
    """Intersection over union of boxes (D, 4) and (G, 4), each x, y, width, height -> (D, G).

    crowd (G,) bool: regions for which it is intersection over the area of the box (COCO).
    """
    low = np.maximum(boxes[:, None, :2], truths[:, :2])
    high = np.minimum(boxes[:, None, :2] + boxes[:, None, 2:], truths[:, :2] + truths[:, 2:])
    intersection = (high - low).clip(0).prod(2)
    box_area = boxes[:, None, 2:].prod(2)
    union = box_area + truths[:, 2:].prod(1) - intersection
    if crowd is not None:
        union = np.where(crowd, box_area, union)
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def match_boxes(detections, truths):
    """COCO's greedy assignment in one image and class -> tp, ignored (10 thresholds, D) bool.

    detections by falling score. Each takes the free truth of largest IoU, of equal ones the last;
    one that fits only a crowd region is ignored, and a crowd region is never used up.
    """
    tp = np.zeros((len(IOU_THRESHOLDS), len(detections)), bool)
    ignored = np.zeros_like(tp)
    boxes = np.array([d["bbox"] for d in detections], float).reshape(-1, 4)
    regions = np.array([t["bbox"] for t in truths], float).reshape(-1, 4)
    crowd = np.array([bool(t.get("iscrowd")) for t in truths], bool)
    iou = box_iou(boxes, regions, crowd)
    for i, threshold in enumerate(IOU_THRESHOLDS):
        free = ~crowd
        for d in np.flatnonzero((iou >= threshold).any(1)):
            fits = iou[d] >= threshold
            candidates = np.flatnonzero(fits & free)
            if len(candidates):
                best = max(candidates, key=lambda g: (iou[d, g], g))
                free[best] = False
                tp[i, d] = True
            else:
                ignored[i, d] = (fits & crowd).any()
    return tp, ignored


def interpolated_precision(tp, ignored, n_truths):
    """Mean precision at recalls 0, 0.01, .., 1; tp, ignored (D,) bool by falling score.

    Precision is made non-increasing from the right first (COCO).
    """
    n_tp = tp.cumsum()
    n_fp = (~tp & ~ignored).cumsum()
    precision = n_tp / np.maximum(n_tp + n_fp, 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    first = np.searchsorted(n_tp / n_truths, np.linspace(0, 1, 101))  # where recall is reached
    return np.append(precision, 0)[first].mean()


def class_average_precision(images):
    """AP of one class at the 10 thresholds, or None without a truth that is no crowd region.

    images: {image: (detections, truths)}.
    """
    scores = []
    tp = []
    ignored = []
    n_truths = 0
    for _, (detections, truths) in sorted(images.items()):
        detections = sorted(detections, key=lambda box: -box["score"])[:100]
        scores += [box["score"] for box in detections]
        image_tp, image_ignored = match_boxes(detections, truths)
        tp.append(image_tp)
        ignored.append(image_ignored)
        n_truths += sum(not box.get("iscrowd") for box in truths)
    if n_truths == 0:
        return None
    order = np.argsort(-np.array(scores, float), kind="stable")  # of equal scores the earlier image
    tp = np.concatenate(tp, 1)[:, order]
    ignored = np.concatenate(ignored, 1)[:, order]
    thresholds = range(len(IOU_THRESHOLDS))
    return np.array([interpolated_precision(tp[i], ignored[i], n_truths) for i in thresholds])


def average_precision(detections, truths, train_images=None):
    """Box AP as pycocotools counts it -> {"AP", "AP50", "AP75"}: fractions, or None.

    detections: dicts {"image_id", "category_id", "bbox": [x, y, w, h], "score"}, of which the best
    100 of an image and class count; truths: the same without score, maybe with "iscrowd". AP is the
    mean over classes and over IoU thresholds 0.5, 0.55, .., 0.95. None: nothing to find.
    train_images {category: number of training images with it}: also "AP_rare" (at most 10),
    "AP_common" (at most 100) and "AP_frequent", the groups of LVIS.
    """
    by_class = collections.defaultdict(lambda: collections.defaultdict(lambda: ([], [])))
    for kind, boxes in enumerate((detections, truths)):
        for box in boxes:
            by_class[box["category_id"]][box["image_id"]][kind].append(box)

    table = {}  # category -> AP at each of the 10 thresholds
    for category, images in sorted(by_class.items()):
        ap = class_average_precision(images)
        if ap is not None:
            table[category] = ap

    def mean(categories, thresholds=slice(None)):
        values = [table[category][thresholds] for category in categories]
        return float(np.mean(values)) if values else None

    result = {"AP": mean(table), "AP50": mean(table, 0), "AP75": mean(table, 5)}
    if train_images is not None:
        groups = {"AP_rare": [], "AP_common": [], "AP_frequent": []}
        for category in table:
            n_images = train_images.get(category, 0)
            if n_images <= 10:
                groups["AP_rare"].append(category)
            elif n_images <= 100:
                groups["AP_common"].append(category)
            else:
                groups["AP_frequent"].append(category)
        for name, categories in groups.items():
            result[name] = mean(categories)
    return result


SPELLED_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}
CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
you're you've""".split()
# the reference's table restores each of them from itself with any one apostrophe missing
RESTORED = {"somebody'd": "somebodyd"}  # a slip of the reference
for _word in CONTRACTIONS:
    for _i, _character in enumerate(_word):
        if _character == "'":
            RESTORED[_word[:_i] + _word[_i + 1:]] = _word


def normalize_answer(text):
    """An answer as VQA's official evaluation compares it, slips of the reference included."""
    out = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        beside_space = f"{mark} " in text or f" {mark}" in text
        if beside_space or re.search(r"\d,\d", text):
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    out = re.sub(r"\.(?!\d)", "", out, count=32)  # the reference passes a flag as the count
    tokens = [SPELLED_NUMBERS.get(word, word) for word in out.lower().split()]
    tokens = [word for word in tokens if word not in ("a", "an", "the")]
    return " ".join(RESTORED.get(word, word) for word in tokens)


def vqa_accuracy(answer, answers):
    """VQA's: mean over the human answers of min(1, how many of the others equal the answer / 3).

    answers: the (ten) human answers. Compared after normalize_answer, but as they are where all
    humans agree. One human answer alone: equal or not (ours).
    """
    answer, *answers = (a.replace("\n", " ").replace("\t", " ").strip() for a in (answer, *answers))
    if not answers:
        raise ValueError("a question needs a human answer to compare with")
    if len(set(answers)) > 1:
        answer, *answers = (normalize_answer(a) for a in (answer, *answers))
    equal = [a == answer for a in answers]
    if len(equal) == 1:
        return float(equal[0])
    return sum(min(1, (sum(equal) - e) / 3) for e in equal) / len(equal)


# ---- protocols ----
# protocol(model, tokenizer, paths, cfg, device) -> [(metric, value, n)]. A metric with one of these
# endings is a baseline of the metric without it; the table writes both in one line.

BASELINES = {
    "_random": "untrained encoder",
    "_majority": "most frequent answer",
    "_other_image": "another image",
    "_chance": "chance",
}


def class_names(paths):
    """A name for each class: the lines of classes.txt or classnames.txt beside the shards."""
    names = data.read_class_names(paths)
    if names is None:
        raise UserError(f"no classes.txt or classnames.txt beside {paths[0]} or one folder up: "
                        "each class needs a name, one a line")
    return names


def class_templates(paths):
    """Prompts with {c} or {} for the class, from beside the shards; else one of CLIP's."""
    templates = data.read_lines_near(paths, "zeroshot_classification_templates.txt")
    if not templates:
        return ["a photo of a {c}."]
    for template in templates:
        if "{c}" not in template and "{}" not in template:
            raise UserError(f"template {template!r} beside {paths[0]} has no place for the class: "
                            "write {} or {c} where its name belongs")
    return templates


def check_labels(labels, names, paths):
    """UserError where a label, of an integer or a tensor of them, has no name."""
    largest = int(torch.as_tensor(labels).max())
    if largest >= len(names):
        raise UserError(f"label {largest} in {paths[0]}, but only {len(names)} class names beside "
                        "it: add the missing lines")


def unseen_classes(paths, names):
    """(C,) bool: is the class in unseen.txt, whose classes do not occur in training?"""
    unseen = data.read_lines_near(paths, "unseen.txt")
    if unseen is None:
        unseen = []
    for name in unseen:
        if name not in names:
            raise UserError(f"{name!r} in unseen.txt beside {paths[0]} is not in its class names: "
                            "correct one of the two")
    return torch.tensor([name in unseen for name in names])


def seen_and_unseen(paths, names, labels):
    """{metric suffix: (I,) bool}: classes that do not occur in training are scored apart.

    Without such classes there is one group, without a suffix.
    """
    unseen = unseen_classes(paths, names)[labels]
    if not unseen.any():
        return {"": ~unseen}
    groups = {"_seen": ~unseen, "_unseen": unseen}
    return {suffix: rows for suffix, rows in groups.items() if rows.any()}


def top1_and_per_class(name, predicted, labels):
    """Accuracy, and the mean of the classes' accuracies, in which rare ones count as much."""
    top1 = (predicted == labels).double().mean().item()
    per_class = mean_per_class(predicted, labels)
    return [(name, top1, len(labels)), (f"{name}_mean_per_class", per_class, len(labels))]


def rerank(sim, score, k=16):
    """The k best candidates of each query in the order of score, above all others (ALBEF).

    sim (Q, C); score(queries (n,), candidates (n,)) -> (n,) -> new scores (Q, C). Ranks share the
    queries. k: ours; ALBEF 128 or 256.
    """
    share = rank_slice(len(sim))
    sim = sim[share.start:share.stop]
    best = torch.cat([k_nearest(rows, min(k, sim.shape[1])) for rows in sim.split(1024)])
    queries = torch.arange(share.start, share.stop).repeat_interleave(best.shape[1])
    value = score(queries, best.flatten()).view(best.shape)
    value = value - value.amin(1, keepdim=True) + sim.amax(1, keepdim=True) + 1
    return all_gather_rows(sim.scatter(1, best, value))


def match_scorer(model, tokenizer, index, texts, cfg, device):
    """-> score(images (n,), texts (n,)) = model.match_score of captioned images and texts.

    The tokens of all images are kept in memory.
    """
    image_tokens, _, _ = embed_samples(model, index, cfg, device, model.vision, read_captions)
    tokens, valid = tokenize(tokenizer, texts, cfg.context)

    def score(images, texts):
        scores = [torch.zeros(0)]
        for i, t in zip(images.split(256), texts.split(256)):
            rows = (image_tokens[i], tokens[t], valid[t])
            scores.append(in_batches(model.match_score, cfg, device, *rows))
        return torch.cat(scores)

    return score


def zeroshot_classifier(model, tokenizer, names, templates, cfg, device):
    """Every template filled with every class name -> (C, E), a unit vector for each class (CLIP).
    """
    prompts = []
    for name in names:
        prompts += [template.replace("{c}", name).replace("{}", name) for template in templates]
    text = encode_texts(model, tokenizer, prompts, cfg, device)
    return prompt_ensemble(text.unflatten(0, (len(names), len(templates))))


def zeroshot(model, tokenizer, paths, cfg, device):
    """Zero-shot accuracy by class names in prompts (CLIP).

    Templates and class names are those beside the shards; every image competes among all classes.
    """
    names = class_names(paths)
    templates = class_templates(paths)
    index = data.open_index(paths)
    image, labels, _ = embed_labelled(model, index, cfg, device, model.encode_image)
    check_labels(labels, names, paths)

    classifier = zeroshot_classifier(model, tokenizer, names, templates, cfg, device)
    scores = image @ classifier.T
    predicted = labels.where(target_ranks(scores, labels) < 1, -1)  # -1: another class is first

    rows = []
    for suffix, group in seen_and_unseen(paths, names, labels).items():
        metric = f"zeroshot{suffix}"
        n = int(group.sum())
        rows += top1_and_per_class(metric, predicted[group], labels[group])
        rows.append((f"{metric}_chance", 1 / len(names), n))
        if len(names) > 5:
            rows.append((f"{metric}_top5", accuracy(scores[group], labels[group], 5), n))
    return rows


def retrieval(model, tokenizer, paths, cfg, device):
    """Recall at 1, 5, 10 from image to text and text to image, over all captions of all images.

    With match_score also _itm: each query's 16 best in the order of that score.
    """
    index = data.open_index(paths)
    image, text, owner, ids = embed_pairs(model, tokenizer, index, cfg, device)
    sim = text @ image.T
    rows = recall_rows(recall_at_k(sim, owner), owner)
    rows += recall_rows(chance_recall(owner), owner, "_chance")
    if hasattr(model, "match_score"):
        texts = []
        for i in ids.tolist():
            texts += read_captions(index[i])
        match = match_scorer(model, tokenizer, index, texts, cfg, device)

        def match_text_first(texts, images):
            return match(images, texts)

        by_image = recall_at_k(rerank(sim.T, match).T, owner)
        by_text = recall_at_k(rerank(sim, match_text_first), owner)
        rows += recall_rows({"i2t": by_image["i2t"], "t2i": by_text["t2i"]}, owner, "_itm")
    return rows


def chance_recall(owner, ks=(1, 5, 10)):
    """What recall_at_k would be for random scores, if they were drawn anew for each text."""
    own = owner.bincount().double()  # texts of each image
    i2t = {k: (1 - (1 - min(1, k / len(owner))) ** own).mean().item() for k in ks}
    return {"i2t": i2t, "t2i": {k: min(1, k / len(own)) for k in ks}}


def recall_rows(recall, owner, mark=""):
    """recall as recall_at_k gives it; each image of owner has a text."""
    n_queries = {"i2t": int(owner.max()) + 1, "t2i": len(owner)}
    rows = []
    for direction, values in recall.items():
        for k, value in values.items():
            rows.append((f"{direction}_r{k}{mark}", value, n_queries[direction]))
    return rows


def training_shards(paths):
    """The training part beside each of these held-out shards or one folder up; [] if none has any.
    """
    held_out = {os.path.realpath(path) for path in paths}
    found = []
    for folder in dict.fromkeys(os.path.dirname(os.path.abspath(path)) for path in paths):
        for place in (folder, os.path.dirname(folder)):
            try:
                part = data.expand(place, "train")
            except UserError:
                continue
            if not held_out & {os.path.realpath(path) for path in part}:
                found += part
                break
    return list(dict.fromkeys(found))


def open_parts(paths, need):
    """-> Index of the training part near the held-out shards, Index of these.

    need: how the refusal begins where there is no training part.
    """
    train_paths = training_shards(paths)
    if not train_paths:
        folder = os.path.dirname(os.path.abspath(paths[0]))
        raise UserError(f"{need}, of which none was found in {folder} or one folder up: put "
                        "train-*.tar there, and the word train, val or test into all names")
    return data.open_index(train_paths), data.open_index(paths)


def frozen_features(model, paths, cfg, device, fn):
    """fn of the labelled training images and of the held-out ones: what a probe needs.

    -> train (N, ...), train_labels (N,), test (M, ...), labels (M,). Held-out images of a class
    that no training image has are left out: a probe cannot know it. Classes are numbered anew,
    without gaps.
    """
    train_index, index = open_parts(paths, "knn and linear also need labelled training shards")
    data.read_class_names(paths)  # refuses folders whose numbers mean different classes
    train, train_labels, _ = embed_labelled(model, train_index, cfg, device, fn)
    test, labels, _ = embed_labelled(model, index, cfg, device, fn)
    known = torch.isin(labels, train_labels)
    if not known.any():
        raise UserError(f"no image of {paths[0]} ... has a class that one of "
                        f"{train_index.paths[0]} ... has: give a training part of the same classes")
    classes, train_labels = train_labels.unique(return_inverse=True)
    return train, train_labels, test[known], torch.searchsorted(classes, labels[known])


def probe_rows(name, predicted, labels):
    """Accuracy; _majority: of always answering the most frequent held-out class."""
    majority = int(labels.bincount().max()) / len(labels)
    rows = top1_and_per_class(name, predicted, labels)
    return rows + [(f"{name}_majority", majority, len(labels))]


def frozen_accuracy(probes, model, tokenizer, paths, cfg, device):
    """Accuracy of kNN (k = 20, DINO) and linear probe on pooled patch tokens, computed once.

    probes: those of "knn" and "linear" that are wanted.
    """

    def pooled_tokens(images):
        return model.vision.patch_tokens(images).mean(1)

    features = frozen_features(model, paths, cfg, device, pooled_tokens)
    train, train_labels, test, labels = features
    rows = []
    if "knn" in probes:
        predicted = knn(train, train_labels, test, k=min(20, len(train)))
        rows += probe_rows("knn", predicted, labels)
    if "linear" in probes:
        rows += probe_rows("linear", linear_probe(train, train_labels, test), labels)
    return rows


def untrained(model, cfg, device, seed=0):
    """A model of the same class and sizes with new weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return type(model)(cfg).to(device).eval()


def probes_and_untrained(model, tokenizer, paths, cfg, device):
    """kNN and linear probe, each beside what an untrained encoder's features give (_random)."""
    probes = ("knn", "linear")
    rows = frozen_accuracy(probes, model, tokenizer, paths, cfg, device)
    other = untrained(model, cfg, device)
    for metric, value, n in frozen_accuracy(probes, other, tokenizer, paths, cfg, device):
        if metric in probes:
            rows.append((f"{metric}_random", value, n))
    return rows


CAPTION_LENGTH = 40  # tokens, ours


def caption(model, tokenizer, paths, cfg, device):
    """Greedy captions, against the reference captions or, on labelled shards, the class's name."""
    index = data.open_index(paths)
    has_classes = kind_of(index) == "classes"

    def generate(images):
        return model.generate(images, min(CAPTION_LENGTH, cfg.context - 1))

    read = data.Sample.label if has_classes else read_captions
    tokens, values, ids = embed_samples(model, index, cfg, device, generate, read)
    captions = [tokenizer.decode(row) for row in tokens.tolist()]
    if has_classes:
        labels = all_gather_rows(torch.tensor(values, dtype=torch.long))
        return named_class_rows(captions, labels, paths)
    return reference_rows(model, tokenizer, index, captions, ids.tolist(), cfg, device)


def named_class_rows(captions, labels, paths):
    """Share of captions in which the name of the image's class stands, as whole words."""
    names = class_names(paths)
    check_labels(labels, names, paths)
    is_named = []
    for text, label in zip(captions, labels.tolist()):
        is_named.append(f" {' '.join(words(names[label]))} " in f" {' '.join(words(text))} ")
    is_named = torch.tensor(is_named).double()
    rows = []
    for suffix, group in seen_and_unseen(paths, names, labels).items():
        n = int(group.sum())
        rows.append((f"named{suffix}", is_named[group].mean().item(), n))
        rows.append((f"named{suffix}_majority", int(labels[group].bincount().max()) / n, n))
    return rows


def reference_rows(model, tokenizer, index, captions, ids, cfg, device):
    """BLEU-4 and CIDEr against all references, and the cost of a token of the first reference.

    _other_image: each reference with the caption of another image, or given another image.
    """
    references = [read_captions(index[i]) for i in ids]
    others = captions[-1:] + captions[:-1]
    rows = [
        ("bleu4", bleu(captions, references)[3], len(ids)),
        ("bleu4_other_image", bleu(others, references)[3], len(ids)),
        ("cider", cider(captions, references), len(ids)),
        ("cider_other_image", cider(others, references), len(ids)),
    ]
    if hasattr(model, "score"):
        first = [refs[0] for refs in references]
        texts = {
            "nats_per_token": dict(zip(ids, first)),
            "nats_per_token_other_image": dict(zip(ids, first[1:] + first[:1])),
        }
        costs = nats_per_token(model, tokenizer, index, texts, cfg, device)
        rows += [(metric, cost, len(ids)) for metric, cost in costs.items()]
    return rows


def nats_per_token(model, tokenizer, index, texts, cfg, device):
    """Minus the mean over images of model.score, for each {sample number: text} of `texts`.

    texts, result: {metric: ...}. Images are read once for all of them.
    """
    scores = {metric: [torch.zeros(0)] for metric in texts}
    for images, _, ids in iter_images(index, model.held_out_view, read_captions):
        for metric, text_of in texts.items():
            tokens, valid = tokenize(tokenizer, [text_of[i] for i in ids], cfg.context)
            scores[metric].append(in_batches(model.score, cfg, device, images, tokens, valid))
    costs = {}
    for metric, parts in scores.items():
        costs[metric] = -all_gather_rows(torch.cat(parts).double()).mean().item()
    return costs


PROTOCOLS = {
    "zeroshot": zeroshot,
    "retrieval": retrieval,
    "knn": functools.partial(frozen_accuracy, ("knn",)),
    "linear": functools.partial(frozen_accuracy, ("linear",)),
    "caption": caption,
}
NEEDS = {"zeroshot": "encode_text", "retrieval": "encode_text", "caption": "generate",
         "vqa": "fused"}


def supports(model, task):
    return task not in NEEDS or hasattr(model, NEEDS[task])


# ---- results ----

def kind_of(index):
    """What shards hold, by their first readable sample: "captions", "classes" or "documents"."""
    for i in range(len(index)):
        try:
            sample = index[i]
            if sample.is_document():
                return "documents"
            if sample.has_label() and not sample.has_caption():
                return "classes"
            return "captions"
        except data.Skip:
            continue
    return "captions"


def protocols_for(model, paths):
    """{task: protocol}: what these shards and this model allow within minutes."""
    kind = kind_of(data.open_index(paths))
    tasks = {}
    if kind == "captions":
        tasks = {"retrieval": retrieval, "caption": caption}
    if kind == "classes":
        tasks = {"zeroshot": zeroshot, "caption": caption}
        if training_shards(paths):
            tasks["knn, linear"] = probes_and_untrained
    return {task: protocol for task, protocol in tasks.items() if supports(model, task)}


def run_protocols(model, tokenizer, patterns, cfg, device):
    """What these shards and this model allow -> a pattern, task, rows, None; or [], reason."""
    for pattern in patterns:
        paths = data.expand(pattern, "test")
        for task, protocol in protocols_for(model, paths).items():
            rows = []
            reason = None
            try:
                rows = protocol(model, tokenizer, paths, cfg, device)
            except UserError as error:
                reason = str(error)
            yield pattern, task, rows, reason


def format_value(metric, value):
    if value is None or not math.isfinite(value):
        return "-"
    if metric.startswith(("nats", "cider")):
        return f"{value:.3f}"
    return f"{100 * value:.1f} %"


def shown(rows):
    """[(metric, value, n)] -> [(metric, value, n, baselines)] as texts.

    Rows that are baselines of others stand behind these, in brackets.
    """
    values = {metric: value for metric, value, _ in rows}
    is_baseline = {metric + suffix for metric in values for suffix in BASELINES}
    texts = []
    for metric, value, n in rows:
        if metric in is_baseline:
            continue
        baselines = []
        for suffix, name in BASELINES.items():
            if metric + suffix in values:
                baselines.append(f"{name} {format_value(metric, values[metric + suffix])}")
        in_brackets = f"({', '.join(baselines)})" if baselines else ""
        texts.append((metric, format_value(metric, value), f"{n:,}", in_brackets))
    return texts


def table(rows):
    """[(metric, value, n)] as lines of text; baselines stand in the line of their metric."""
    lines = []
    for metric, value, n, baselines in shown(rows):
        lines.append(f"  {metric:<30}{value:>9}   n = {n}   {baselines}".rstrip())
    return "\n".join(lines)


def evaluate(model, tokenizer, cfg, device):
    """A script's own evaluation on cfg.val -> {metric: value}, also in out/result.json.

    Of two held-out sets with the same metric, the later one's is called "METRIC on SET". A protocol
    that cannot run is a line with its reason. Trained heads take longer and are left to the command
    line.
    """
    if not cfg.val:
        print0("no --val: nothing held out to evaluate on")
        return {}
    result = {}
    rows_of = collections.defaultdict(list)  # of a pattern
    results = run_protocols(model, tokenizer, cfg.val, cfg, device)
    for pattern, task, rows, reason in results:
        rows_of[pattern] += [row for row in rows if not row[0].endswith("_mean_per_class")]
        if reason is not None:
            print0(f"{task} on {pattern}: - ({reason})")
    for pattern, rows in rows_of.items():
        if rows:
            print0(f"held out, {pattern}:\n{table(rows)}")
        for metric, value, _ in rows:
            name = metric if metric not in result else f"{metric} on {pattern}"
            result[name] = value
    write_result(result, cfg)
    return result


def write_result(result, cfg):
    """{metric: value} to out/result.json."""
    if rank() == 0:
        with open(os.path.join(cfg.out, "result.json"), "w") as f:
            json.dump(result, f, indent=1)


def check_held_out(cfg):
    """For the start of a training: UserError where classes of cfg.val lack names or prompts, and a
    warning where held-out shards are also trained on."""
    trained_on = set()
    for name in common.training_fields(cfg):
        if getattr(cfg, name):
            trained_on.update(map(os.path.realpath, data.expand(getattr(cfg, name))))
    for pattern in cfg.val if cfg.val else []:
        paths = data.expand(pattern, "test")
        both = [path for path in paths if os.path.realpath(path) in trained_on]
        if both:
            print0(f"warning: {len(both)} of the held-out shards are also trained on, such as "
                   f"{both[0]}: give --data a folder, which leaves them out, or other files")
        index = data.open_index(paths)
        if kind_of(index) != "classes":
            continue
        names = class_names(paths)
        class_templates(paths)
        unseen_classes(paths, names)
        for i in np.unique(np.linspace(0, len(index) - 1, 1000).astype(int)).tolist():
            try:
                check_labels(index[i].label(), names, paths)
            except data.Skip:
                continue


def held_out_pairs(cfg):
    """-> Index of captioned images for pictures, and what they are.

    The first --val with captions, else the first training shard.
    """
    for pattern in cfg.val if cfg.val else []:
        index = data.open_index(pattern, "test")
        if kind_of(index) == "captions":
            return index, "held-out pairs"
    fields = [getattr(cfg, name) for name in common.training_fields(cfg)]
    training = [patterns for patterns in fields if patterns]
    return data.open_index(data.expand(training[0])[:1]), "training images"


def pick_samples(index, n, captioned=False):
    """n samples spread over an index, each with an image, or with a caption too -> [Sample]."""
    samples = []
    for start in np.linspace(0, len(index) - 1, n).astype(int).tolist():
        for offset in range(len(index)):
            try:
                sample = index[(start + offset) % len(index)]
                sample.image()
                if captioned:
                    sample.captions()
            except data.Skip:
                continue
            samples.append(sample)
            break
    return samples


# ---- search ----

TEXT_WEIGHT = 2  # of texts beside an image: ALIGN s7, footnote 4


def compose(image=None, text=None, minus=None):
    """Query of unit vectors (E,): image + TEXT_WEIGHT * (text - minus), made unit."""
    query = 0
    if image is not None:
        query = query + image
    if text is not None:
        query = query + TEXT_WEIGHT * text
    if minus is not None:
        query = query - TEXT_WEIGHT * minus
    return F.normalize(query, dim=0)


def nearest_images(features, query, k):
    """The k rows of features (I, E) with the largest product with query (E,) -> scores, rows."""
    best = (features @ query).topk(min(k, len(features)))
    return best.values.tolist(), best.indices.tolist()


def search(model, tokenizer, index, cfg, device, text=None, picture=None, minus=None, k=20):
    """The k images of an index nearest to a text, a PIL image or both -> [(score, number)]."""
    parts = {}
    if picture is not None:
        images = torch.tensor(model.held_out_view(picture))[None]
        parts["image"] = in_batches(model.encode_image, cfg, device, images)[0]
    if text is not None:
        parts["text"] = encode_texts(model, tokenizer, [text], cfg, device)[0]
    if minus is not None:
        parts["minus"] = encode_texts(model, tokenizer, [minus], cfg, device)[0]
    features, ids = embed_images(model, index, cfg, device)
    scores, rows = nearest_images(features, compose(**parts), k)
    return list(zip(scores, ids[rows].tolist()))


# ---- pictures: PIL alone, sizes in pixels ----

FONT = ImageFont.load_default(12)
TITLE_FONT = ImageFont.load_default(17)
INK = "#222222"
GAP = 14  # around cells
LINE = 15  # height of a line of text


@functools.cache
def is_drawable(character):
    """Does the font have this letter? It draws the same box for all that it lacks."""
    if not character.isprintable():
        return False
    return bytes(FONT.getmask(character)) != bytes(FONT.getmask("\U0010ffff"))


def wrap(text, width, max_lines):
    """Text as lines of about `width` pixels; letters that the font lacks as codes (\\xe9)."""
    drawn = ""
    for character in " ".join(text[:1000].split()):
        if not is_drawable(character):
            character = character.encode("ascii", "backslashreplace").decode()
        drawn += character
    columns = max(1, int(width / FONT.getlength("n")))
    return textwrap.wrap(drawn, columns, max_lines=max_lines, placeholder="…")


def to_pil(image):
    """A PIL image, or uint8 (3, H, W) or (H, W, 3) as tensor or array -> PIL, RGB."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    array = np.asarray(torch.as_tensor(image).cpu())
    if array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(array))


def fit(image, size):
    """The picture scaled into size x size; a small one by a whole number, so that pixels stay."""
    image = to_pil(image)
    scale = size / max(image.size)
    method = Image.BICUBIC
    if scale >= 2:
        scale = int(scale)
        method = Image.NEAREST
    return image.resize([max(1, round(side * scale)) for side in image.size], method)


def sheet(cells, path, columns, title="", size=112):
    """Write a labelled grid of pictures to path.

    cells: [(image, caption, frame)]; image as to_pil takes it, or None for a cell of text; frame a
    color name or None. A row is as tall as its longest caption, of at most four lines.
    """
    rows = [cells[i:i + columns] for i in range(0, len(cells), columns)]
    heights = []
    for row in rows:
        captions = [wrap(text, size, 4) for image, text, _ in row if image is not None]
        heights.append(size + 6 + LINE * max(map(len, captions), default=0))
    y = 44 if title else GAP
    width = GAP + columns * (size + GAP)
    page = Image.new("RGB", (width, y + sum(heights) + GAP * len(rows)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((GAP, 12), title, INK, TITLE_FONT)
    for row, height in zip(rows, heights):
        for column, (image, text, frame) in enumerate(row):
            x = GAP + column * (size + GAP)
            draw_cell(page, draw, (x, y, x + size, y + size), image, text, frame)
        y += height + GAP
    page.save(path)


def draw_cell(page, draw, box, image, text, frame):
    """A picture with its caption below, or a text, in a square box; the frame lies around it."""
    x0, y0, x1, y1 = box
    size = x1 - x0
    center = (x0 + x1) / 2
    if image is None:
        draw.rounded_rectangle(box, 6, "#f4f4f4")
        lines = "\n".join(wrap(text, size - 16, size // LINE - 1))
        draw.multiline_text((center, (y0 + y1) / 2), lines, INK, FONT, "mm", 3, "center")
    else:
        picture = fit(image, size)
        x0 += (size - picture.width) // 2
        y0 += (size - picture.height) // 2
        box = (x0, y0, x0 + picture.width, y0 + picture.height)
        page.paste(picture, box)
        draw.multiline_text((center, y1 + 6), "\n".join(wrap(text, size, 4)), INK, FONT, "ma", 3,
                            "center")
    if frame:
        draw.rectangle((box[0] - 4, box[1] - 4, box[2] + 3, box[3] + 3), None, frame, 4)


VIRIDIS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])


def overlay(image, heat):
    """PIL picture with a map (h, w) stretched over it, colored from its least to its largest value.

    Small images first grow by a whole number.
    """
    image = to_pil(image)
    grow = max(1, 224 // max(image.size))
    picture = image.resize([grow * side for side in image.size], Image.NEAREST)
    heat = heat.detach().float().cpu().numpy()
    heat = (heat - heat.min()) / max(np.ptp(heat), 1e-12)
    heat = np.asarray(Image.fromarray(heat).resize(picture.size))
    colors = np.stack([np.interp(heat, np.linspace(0, 1, 5), c) for c in VIRIDIS.T], -1)
    blended = 0.45 * np.asarray(picture) + 0.55 * colors
    return Image.fromarray(blended.round().astype(np.uint8))


def curves(log_path, path, fields, title=""):
    """Write a small panel for each field of a log.jsonl: its values over the steps, linear axes.

    Values that are missing, null or not finite are left out.
    """
    records = []
    with open(log_path, errors="replace") as f:
        for line in f:
            try:
                records.append(json.loads(line))
            except ValueError:  # the last line, cut by a kill
                continue
    columns = min(2, len(fields))
    width = 470
    height = 200
    y = 44 if title else GAP
    n_rows = math.ceil(len(fields) / columns)
    page = Image.new("RGB", (columns * width, y + n_rows * height), "white")
    draw = ImageDraw.Draw(page)
    draw.text((GAP, 12), title, INK, TITLE_FONT)
    for i, field in enumerate(fields):
        points = []
        for record in records:
            value = record.get(field)
            if isinstance(value, (int, float)) and math.isfinite(value):
                points.append((record["step"], value))
        left = i % columns * width + 70
        top = y + i // columns * height + 24
        draw_panel(draw, (left, top, left + width - 86, top + height - 54), field, points)
    page.save(path)


def draw_panel(draw, box, name, points):
    """A line through points (step, value) in a box, with the least and largest of both."""
    left, top, right, bottom = box
    draw.rectangle(box, None, "#8a8a8a")
    if not points:
        draw.text((left, top - 4), f"{name}: no values", INK, FONT, "ls")
        return
    steps, values = np.array(points, float).T
    draw.text((left, top - 4), f"{name}, last {values[-1]:.4g}", INK, FONT, "ls")
    draw.text((left - 6, top), f"{values.max():.4g}", INK, FONT, "rt")
    draw.text((left - 6, bottom), f"{values.min():.4g}", INK, FONT, "rb")
    draw.text((left, bottom + 4), f"step {steps.min():,.0f}", INK, FONT, "la")
    draw.text((right, bottom + 4), f"{steps.max():,.0f}", INK, FONT, "ra")
    x = left + (right - left) * (steps - steps.min()) / max(np.ptp(steps), 1)
    y = np.full(len(values), (top + bottom) / 2)  # a flat line runs through the middle
    if np.ptp(values):
        y = bottom - (bottom - top) * (values - values.min()) / np.ptp(values)
    draw.line(list(zip(x, y)), "#1f5fa8", 2)


# ---- checkpoints and encoder files ----

METHODS = {"ALIGN": "align", "MUG": "mug", "LCL": "lcl", "TiMix": "timix", "M3I": "m3i"}


def load_model(path, device):
    """A checkpoint of a script -> model, tokenizer, cfg."""
    try:
        state = common.read_checkpoint(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give last.pt of a run")
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}): give last.pt of a run; an encoder file "
                        "starts one with --init")
    method = state["method"]
    if method not in METHODS:
        raise UserError(f"{path} is a checkpoint of {method}: known are {', '.join(METHODS)}")
    module = importlib.import_module(METHODS[method])
    try:
        cfg = module.Config(**state["config"])
        model = getattr(module, method)(cfg)
        model.load_state_dict(state["model"])
    except (TypeError, RuntimeError) as error:
        raise UserError(f"{path} was written by another version of {METHODS[method]}.py "
                        f"({common.one_line(error)}): use that version, or train again")
    if device.type == "cpu" and cfg.precision == "bf16":  # trained on another device
        cfg = replace(cfg, precision="auto")
    return model.to(device).eval(), data.Tokenizer.loads(state["vocab"]), cfg


def read_safetensors(path):
    """-> {name: tensor}, {metadata: str}. Header length (8 bytes), JSON header, then the bytes."""
    types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
             "BF16": torch.bfloat16}
    with open(path, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        if size > os.path.getsize(path) - 8:
            raise ValueError("no safetensors header")
        header = json.loads(f.read(size))
        body = bytearray(f.read())
    meta = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        if not 0 <= start < stop <= len(body):
            raise ValueError(f"{name} lies outside the file")
        values = torch.frombuffer(body[start:stop], dtype=types[entry["dtype"]])
        tensors[name] = values.view(entry["shape"])
    return tensors, meta


def read_torch_file(path):
    """-> {name: tensor}, {metadata: str} of a checkpoint's encoder, or of a file of tensors."""
    state = common.load_torch_file(path)
    meta = state.get("metadata", {})
    if "method" in state and "config" in state:  # a checkpoint of this project: its encoder
        meta = {name: json.dumps(state[name]) for name in ("mean", "std")}
        meta["heads"] = str(state["config"]["heads"])
        prefix = "vision."
        tensors = {name: x for name, x in state["model"].items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): x for name, x in tensors.items()}, meta
    for key in ("model", "state_dict"):
        state = state.get(key, state)
    return state, meta


def read_encoder(path):
    """Weights of a timm-named ViT in float32, without classifier -> {name: tensor}, metadata."""
    try:
        if path.endswith(".safetensors"):
            found, meta = read_safetensors(path)
        else:
            found, meta = read_torch_file(path)
        tensors = {}
        for name, x in found.items():
            name = re.sub(r"^((module|_orig_mod)\.)+", "", name)
            if isinstance(x, torch.Tensor) and not name.startswith(("head.", "fc_norm.")):
                tensors[name] = x.float()
        for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"):
            if name not in tensors:
                raise ValueError(f"no {name}, so no ViT as timm names it")
    except Exception as error:  # JSON, pickle, zip and torch each have their own errors
        raise UserError(f"{path} cannot be read ({common.one_line(error)}): give a checkpoint of "
                        "this project, or a ViT with timm's names as .safetensors or plain tensors")
    return tensors, meta


def encoder_sizes(tensors, meta):
    """dim, depth, heads, patch of an encoder. heads is None where the file does not say."""
    dim, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    numbers = [int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")]
    sizes = {"dim": dim, "depth": max(numbers) + 1, "heads": None, "patch": patch}
    if "heads" in meta:
        sizes["heads"] = int(meta["heads"])
    else:  # heads leave no trace in the weights: only a well-known width and depth tell them
        for known_dim, known_depth, known_heads in common.SIZES.values():
            if (dim, sizes["depth"]) == (known_dim, known_depth):
                sizes["heads"] = known_heads
    return sizes


def resize_positions(pos_embed, grid):
    """(1, [1+]g*g, D) -> the class token's row (1, 0 or 1, D), the patches' on another grid.

    Bicubic with antialiasing, as timm resamples them.
    """
    side = math.isqrt(pos_embed.shape[1])
    cls, patches = pos_embed.split([pos_embed.shape[1] - side**2, side**2], 1)
    if side != grid:
        patches = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, (grid, grid), mode="bicubic", antialias=True)
        patches = patches.flatten(2).transpose(1, 2)
    return cls, patches


def init_encoder(vision, path):
    """Load a timm-named encoder into a ViT. UserError where shapes or heads differ.

    Positions are resized to the ViT's grid; fixed ones stay. A class token that only one of the
    two has stays as initialized, or is left out.
    """
    tensors, meta = read_encoder(path)
    own = {name: x.detach().cpu() for name, x in vision.state_dict().items()}
    n_positions = tensors["pos_embed"].shape[1]
    n_cls = int("cls_token" in tensors)
    if n_positions - math.isqrt(n_positions) ** 2 > n_cls:
        raise UserError(f"{path} does not fit: its {n_positions} positions are not those of a "
                        "square grid and at most a class token")
    cls, patches = resize_positions(tensors["pos_embed"], vision.grid)
    if vision.cls_token is None:
        tensors.pop("cls_token", None)
        cls = cls[:, :0]
    elif "cls_token" not in tensors:
        tensors["cls_token"] = own["cls_token"]
        cls = own["pos_embed"][:, :1]
    tensors["pos_embed"] = torch.cat([cls, patches], 1)
    if not vision.pos_embed.requires_grad:
        tensors["pos_embed"] = own["pos_embed"]

    for name in {**own, **tensors}:  # in this order, so that the line is the same each time
        theirs = tuple(tensors[name].shape) if name in tensors else "missing"
        ours = tuple(own[name].shape) if name in own else "missing"
        if theirs != ours:
            raise UserError(f"{path} does not fit: {name} is {theirs} there and {ours} here; it "
                            "must be a plain ViT, whose sizes are left to the file")
    heads = vision.blocks[0].attn.heads
    if meta.get("heads", str(heads)) != str(heads):
        raise UserError(f"{path} has {meta['heads']} heads, not {heads}: leave out --heads")
    vision.load_state_dict(tensors)
    print0(f"encoder from {path}: width {patches.shape[2]}, {len(vision.blocks)} blocks, "
           f"{heads} heads")
    for name in ("mean", "std"):
        here = getattr(vision, name).flatten().cpu()
        if name in meta and (torch.tensor(json.loads(meta[name])) - here).abs().max() > 1e-3:
            print0(f"warning: {path} normalized its images by {name} {meta[name]}, "
                   f"here it is {here.tolist()}")


def checkpoint_of(path, method):
    """The checkpoint at `path` if it is one of this method, else None."""
    try:
        state = common.read_checkpoint(path)
    except (ValueError, OSError):
        return None
    return state if state["method"] == method else None


def fields_from_init(path, Config, given):
    """Config fields that the file of --init decides; UserError where a flag says otherwise."""
    state = checkpoint_of(path, Config.method)
    if state is not None:
        missing = [name for name in Config.model_fields if name not in state["config"]]
        if missing:
            raise UserError(f"--init {path} is of another version, without {missing[0]}: "
                            "train it again")
        sizes = {name: state["config"][name] for name in Config.model_fields}
    else:
        tensors, meta = read_encoder(path)
        sizes = encoder_sizes(tensors, meta)
        if "heads" in given and "heads" not in meta:
            sizes["heads"] = given["heads"]
        if sizes["heads"] is None:
            raise UserError(f"--init {path} does not say how many heads a width of {sizes['dim']} "
                            "has: give --heads")
    for name, value in sizes.items():
        if name in given and given[name] != value:
            raise UserError(f"{common.flag(name)} {given[name]}: {path} has {value}; "
                            "leave the flag out")
    return sizes


def init_model(cfg, model):
    """Start from cfg.init: all weights of the same method, or an encoder; -> vocabulary or None."""
    state = checkpoint_of(cfg.init, cfg.method)
    if state is None:
        init_encoder(model.vision, cfg.init)
        if hasattr(model, "update_ema"):
            model.update_ema(0)  # a teacher starts where its student does
        return None
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        reason = str(error).partition("\n\t")[2].partition("\n")[0]
        raise UserError(f"--init {cfg.init} does not fit ({reason}): repeat the settings of that "
                        "run, or start from its encoder alone (python eval.py export)")
    print0(f"weights and vocabulary from {cfg.init}, step {state['step']}")
    return state["vocab"]


def write_safetensors(path, tensors, meta):
    """The format read_safetensors reads: header length, JSON header, float32 tensors."""
    header = {"__metadata__": meta}
    start = 0
    for name, x in tensors.items():
        stop = start + 4 * x.numel()
        header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little"))
        f.write(text)
        for x in tensors.values():
            f.write(x.cpu().numpy().astype("<f4").tobytes())


def export(vision, path):
    """A ViT under timm's names, in float32, to FILE.safetensors or FILE.pt -> its metadata.

    timm's models with mean pooling need fc_norm=False: ours pools after the final norm.
    """
    meta = {
        "format": "pt",
        "heads": str(vision.blocks[0].attn.heads),
        "mean": json.dumps([round(v, 6) for v in vision.mean.flatten().tolist()]),
        "std": json.dumps([round(v, 6) for v in vision.std.flatten().tolist()]),
    }
    tensors = {}
    for name, x in vision.state_dict().items():
        tensors[name] = x.detach().float().contiguous()
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    if path.endswith(".pt"):
        torch.save({"model": tensors, "metadata": meta}, path)
    else:
        write_safetensors(path, tensors, meta)
    return meta


# ---- trained heads ----
# task(model, tokenizer, paths, cfg, device, args) -> [(metric, value, n)]. A head is a module with
# `vision`, forward and loss(batch). It starts from a copy of the model's encoder and is trained,
# encoder included unless the recipe says frozen, on the training part beside the held-out shards.
# Departure from MAE's fine-tuning: no mixup, cutmix, RandAugment, erasing or stochastic depth.

@dataclass
class Recipe:
    """How an encoder and its head are trained. The defaults are MAE's for fine-tuning ViT-B."""
    epochs: float = 100.0  # MAE
    batch: int = 1024  # MAE; at most an eighth of the training images (ours)
    lr: float = 2e-3  # MAE: 5e-4 for 256 images, so this for 1024; not scaled with --batch
    min_lr: float = 1e-6  # MAE
    warmup: float = 0.05  # MAE: 5 of 100 epochs
    wd: float = 0.05  # MAE
    layer_decay: float = 0.65  # MAE: rate of a layer over that of the layer above
    min_area: float = 0.08  # MAE: of the random resized crop, as a share of the image
    frozen: bool = False  # train the head alone
    seed: int = 0  # ours
    workers: int = None  # loader processes of a rank; None = its cores less one


RECIPES = {
    "finetune": Recipe(),
    # rate, batch and length of a public run of MAE's ViT-B on ADE20K; the rest is ours
    "segment": Recipe(epochs=128.0, batch=16, lr=8e-5, layer_decay=0.8, min_area=0.25),
    # ours, near ViTDet's
    "detect": Recipe(epochs=100.0, batch=64, lr=1e-4, layer_decay=0.7, wd=0.1, min_area=0.25),
    # ours; the encoder is frozen, which is LCL's
    "attentive": Recipe(epochs=20.0, batch=256, lr=1e-3, frozen=True),
    # ALBEF's, but for the rate
    "vqa": Recipe(epochs=8.0, batch=256, lr=1e-4, layer_decay=1.0, wd=0.02),
}
# toy data and small models: about a minute on two CPU cores (ours)
TOY_RECIPES = {
    "finetune": dict(epochs=20, batch=64, lr=1.5e-3, layer_decay=0.9, min_area=0.9),
    "segment": dict(epochs=0.9, batch=64, lr=8e-3, layer_decay=1.0, min_area=0.8),
    "detect": dict(epochs=0.7, batch=64, lr=3e-3, layer_decay=0.9, min_area=0.8),
    "attentive": dict(epochs=16, batch=64, lr=3e-3, min_area=0.8),
    "vqa": dict(epochs=0.9, batch=64, lr=2e-3),
}


def add_head_arguments(parser, task):
    texts = {
        "epochs": "passes over the training images",
        "batch": "images a step on all ranks, at most an eighth of them",
        "lr": "highest learning rate, between warm-up and cosine",
    }
    for name, text in texts.items():
        default = getattr(RECIPES[task], name)
        toy_default = TOY_RECIPES[task].get(name, default)
        parser.add_argument(f"--{name}", type=type(default),
                            help=f"{text} [{default:g}; toy data {toy_default:g}]")
    parser.add_argument("--frozen", action="store_true", default=None,
                        help="leave the image encoder as it is and train the rest")
    parser.add_argument("--workers", type=common.at_least(0),
                        help="loader processes of a rank [its cores less one]")


def recipe_for(task, args):
    """The Recipe of a task, changed for the toy data if there are no --data, then by the flags."""
    recipe = RECIPES[task]
    if args.data is None:
        recipe = replace(recipe, **TOY_RECIPES[task])
    for name in ("epochs", "batch", "lr", "frozen", "seed", "workers"):
        if getattr(args, name, None) is not None:
            recipe = replace(recipe, **{name: getattr(args, name)})
    for name in ("epochs", "batch", "lr"):
        if not 0 < getattr(recipe, name) < math.inf:
            raise UserError(f"--{name} {getattr(recipe, name)}: give a number above 0")
    return recipe


# -- training --

def read_records(index, read):
    """read(sample) of every sample, in order; None where it raises data.Skip. Ranks share them."""
    numbers = rank_slice(len(index))
    values = []
    for i in progress(numbers, "reading records", len(numbers)):
        try:
            values.append(read(index[i]))
        except data.Skip:
            values.append(None)
    if world_size() == 1:
        return values
    parts = [None] * world_size()
    torch.distributed.all_gather_object(parts, values)
    return list(itertools.chain.from_iterable(parts))


def layer_number(name, depth):
    """Layer of a head's parameter: 0 = embeddings, i + 1 = block i, depth + 1 = what follows."""
    if name.startswith(("vision.cls_token", "vision.pos_embed", "vision.patch_embed")):
        return 0
    if name.startswith("vision.blocks."):
        return int(name.split(".")[2]) + 1
    return depth + 1


def layerwise_groups(head, recipe):
    """Parameter groups with "lr_scale", which falls from the top layer to the embeddings (MAE).

    No weight decay of vectors, class token and positions.
    """
    depth = len(head.vision.blocks)
    groups = {}  # (lr_scale, weight decay): parameters
    for name, p in head.named_parameters():
        if not p.requires_grad:
            continue
        lr_scale = recipe.layer_decay ** (depth + 1 - layer_number(name, depth))
        wd = recipe.wd
        if p.ndim < 2 or name in ("vision.cls_token", "vision.pos_embed"):
            wd = 0.0
        groups.setdefault((lr_scale, wd), []).append(p)
    return [{"params": params, "lr_scale": lr_scale, "weight_decay": wd}
            for (lr_scale, wd), params in groups.items()]


def batch_size(batch, n):
    """The recipe's batch, at most an eighth of n images, such that 2, 4 or 8 ranks share it."""
    batch = max(1, min(batch, n // 8))
    if batch > 8:
        batch -= batch % 8
    return math.ceil(batch / world_size()) * world_size()


def head_batches(train, example, n_rows, steps, recipe, device):
    """data.loader's batches of all samples of an Index, shuffled as one shard."""
    order = data.ShuffledOrder([0, len(train)], n_rows, recipe.seed)
    rows = data.TrainingSet(train, order, example)
    dataset = data.BatchDataset([rows], n_rows, rank(), world_size())
    return data.loader(dataset, 0, steps, recipe.workers, device)


def train_head(head, train, example, recipe, cfg, device, task):
    """Train a head in place: AdamW, linear warm-up, half a cosine. Where there are too few images
    for the recipe's batch, its rate falls in proportion (ours).

    train: an Index. example(sample, rng) -> {name: array}. Ranks share the rows of a step and end
    with the same weights.
    """
    n_rows = batch_size(recipe.batch, len(train))
    max_lr = recipe.lr * min(1, n_rows / recipe.batch)
    steps = max(1, round(recipe.epochs * len(train) / n_rows))
    warmup = round(recipe.warmup * steps)
    batches = head_batches(train, example, n_rows, steps, recipe, device)

    head.to(device).train()
    head.vision.requires_grad_(not recipe.frozen)  # fixed sine positions, too, as MAE's code
    optimizer = torch.optim.AdamW(layerwise_groups(head, recipe), betas=(0.9, 0.999))
    skipped = torch.zeros(len(data.REASONS), dtype=torch.long)
    print0(f"{task}: {len(train):,} training images, {steps:,} steps of {n_rows}, lr {max_lr:g}")
    for step, batch in enumerate(progress(batches, f"{task}, training steps", steps)):
        lr = recipe.min_lr + common.cosine_lr(step, steps, warmup, max_lr - recipe.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        with common.autocast(cfg.precision, device):
            loss = head.loss(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        common.average_gradients(head.parameters())
        optimizer.step()
        skipped += batch["skipped"]
    head.eval()
    check_training(task, skipped, loss)


def check_training(task, skipped, loss):
    """Say what was skipped; UserError unless the last loss is finite on every rank."""
    counts = common.all_reduce_sum(skipped).tolist()
    reasons = [f"{n} {reason}" for reason, n in zip(data.REASONS, counts) if n]
    if reasons:
        print0(f"{task}: training samples skipped: {', '.join(reasons)}")
    if not common.all_reduce_sum(loss).isfinite():
        raise UserError(f"{task}: the loss is no longer finite after training: try a lower --lr")


def random_view(sample, rng, size, min_area):
    """A random resized crop, mirrored half of the time.

    -> uint8 (3, size, size), box of the crop (x, y, w, h), is it mirrored?
    """
    image = sample.image()
    box = data.random_box(rng, *image.size, min_area)
    flip = rng.random() < 0.5
    return data.crop(image, box, size, flip), box, flip


def whole_view(vision):
    """The view where places matter: both sides to the encoder's size, nothing cut off."""
    return functools.partial(data.resize_and_crop, size=vision.image_size, full=1.0)


# -- classes --

class Classifier(nn.Module):
    """MAE's: mean of the patch tokens, a norm in place of the encoder's last, a linear layer."""

    def __init__(self, vision, classes):
        super().__init__()
        self.vision = vision
        dim = vision.pos_embed.shape[2]
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # MAE
        nn.init.zeros_(self.head.bias)

    def forward(self, images):  # (B, 3, S, S) -> (B, C)
        x = self.vision.blocks_until(images, len(self.vision.blocks))
        patches = x[:, -self.vision.grid**2:]  # without the class token
        return self.head(self.norm(patches.mean(1)))

    def loss(self, batch):
        logits = common.at_least_float32(self(batch["images"]))
        return F.cross_entropy(logits, batch["label"], label_smoothing=0.1)  # MAE


class AttentiveProbe(nn.Module):
    """LCL's frozen protocol: one learned query pools the patch tokens, then a linear classifier.

    Departure: LCL's norms of keys and of values are one here; the maps behind it absorb the gains.
    """

    def __init__(self, vision, classes):
        super().__init__()
        dim = vision.pos_embed.shape[2]
        self.heads = math.gcd(dim, max(1, dim // 64))  # 64 wide, as lcl.py's pool
        self.query = nn.Parameter(torch.randn(dim))
        self.norm = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.norm_pooled = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)
        self.apply(common.init_weights)
        self.vision = vision

    def forward(self, images):  # (B, 3, S, S) -> (B, C)
        x = self.norm(self.vision.patch_tokens(images))
        q = self.q(self.query).expand(len(x), 1, -1)  # (B, 1, D)
        q, k, v = (common.split_heads(part, self.heads) for part in (q, self.k(x), self.v(x)))
        pooled = common.attention(q, k, v).flatten(1)  # (B, H, 1, D/H) -> (B, D)
        return self.head(self.norm_pooled(self.out(pooled)))

    def loss(self, batch):
        logits = common.at_least_float32(self(batch["images"]))
        return F.cross_entropy(logits, batch["label"])


def class_example(sample, rng, size, min_area, names, paths):
    label = sample.label()
    check_labels(label, names, paths)
    view, _, _ = random_view(sample, rng, size, min_area)
    return {"images": view, "label": np.int64(label)}


def classify(task, Head, model, tokenizer, paths, cfg, device, args):
    """Accuracy of a trained classifier; classes of unseen.txt are left out."""
    recipe = recipe_for(task, args)
    names = class_names(paths)
    train, test = open_parts(paths, f"{task} also needs training shards")
    labels = [label for label in read_records(test, data.Sample.label) if label is not None]
    if not labels:
        raise UserError(f"no sample of {paths[0]} ... has a class (KEY.cls): give labelled shards")
    check_labels(labels, names, paths)  # before training
    known = ~unseen_classes(paths, names)

    torch.manual_seed(recipe.seed)
    head = Head(copy.deepcopy(model.vision), len(names))
    example = functools.partial(class_example, size=model.vision.image_size,
                                min_area=recipe.min_area, names=names, paths=train.paths)
    train_head(head, train, example, recipe, cfg, device, task)
    logits, labels, _ = embed_labelled(model, test, cfg, device, head)
    rows = known[labels]
    check_evaluated(int(rows.sum()), test)
    return probe_rows(task, logits[rows].argmax(1), labels[rows])


# -- masks --

class Segmenter(nn.Module):
    """A linear layer on each patch token; its logits are resized, bilinear, to the pixels."""

    def __init__(self, vision, classes):
        super().__init__()
        self.vision = vision
        self.head = nn.Linear(vision.pos_embed.shape[2], classes)

    def forward(self, images):  # (B, 3, S, S) -> (B, C, g, g), a row and a column for each patch
        x = self.head(self.vision.patch_tokens(images))
        return x.transpose(1, 2).unflatten(2, (self.vision.grid, self.vision.grid))

    def loss(self, batch):
        """Mean cross-entropy over the labelled pixels of all ranks; this rank's share of it."""
        mask = batch["mask"].long()  # (B, S, S), 0 = unlabeled
        logits = common.at_least_float32(self(batch["images"]))
        logits = F.interpolate(logits, mask.shape[1:], mode="bilinear")
        n_labelled = common.all_reduce_sum((mask > 0).sum()).clamp(min=1)
        loss = F.cross_entropy(logits, mask, ignore_index=0, reduction="sum")
        return loss * world_size() / n_labelled


def crop_mask(mask, box, size, flip):
    """What data.crop does to an image, done to its mask (H, W) -> (size, size), nearest pixels."""
    x, y, w, h = box
    centers = (np.arange(size) + 0.5) / size
    rows = (y + centers * h).astype(int)
    columns = (x + centers * w).astype(int)
    if flip:
        columns = columns[::-1]
    return mask[rows][:, columns]


def mask_example(sample, rng, size, min_area, classes):
    mask = sample.mask()
    check_mask_class(int(mask.max()), classes, f"the mask of {sample.key}")
    view, box, flip = random_view(sample, rng, size, min_area)
    return {"images": view, "mask": crop_mask(mask, box, size, flip)}


def check_mask_class(largest, classes, place):
    if largest >= classes:
        raise UserError(f"class {largest} in {place}, but only {classes} names in classes.txt, of "
                        "which the first is that of 0, unlabeled: add the missing lines")


def largest_class(sample):
    return int(sample.mask().max())


def count_mask_classes(train, test, paths):
    """Lines of classes.txt, else one more than the largest class in a mask; 0, unlabeled, counts.

    UserError before training where the held-out masks do not fit.
    """
    largest = max(filter(None, read_records(test, largest_class)), default=0)
    if largest == 0:
        raise UserError(f"no mask (KEY.seg.png) of {paths[0]} ... labels a pixel: segment needs "
                        "masks as large as their images")
    names = data.read_class_names(paths)
    if names is None:
        trained = max(filter(None, read_records(train, largest_class)), default=0)
        return 1 + max(largest, trained)
    check_mask_class(largest, len(names), f"the masks of {paths[0]} ...")
    return len(names)


def segment(model, tokenizer, paths, cfg, device, args):
    """Mean IoU of a linear head on the patch tokens."""
    recipe = recipe_for("segment", args)
    train, test = open_parts(paths, "segment also needs training shards")
    classes = count_mask_classes(train, test, paths)

    torch.manual_seed(recipe.seed)
    head = Segmenter(copy.deepcopy(model.vision), classes)
    example = functools.partial(mask_example, size=model.vision.image_size,
                                min_area=recipe.min_area, classes=classes)
    train_head(head, train, example, recipe, cfg, device, "segment")
    return evaluate_segmenter(head, test, classes, cfg, device)


def predict_mask(logits, shape):
    """Logits (C, g, g) of one image -> the best class of each pixel (H, W), never 0, unlabeled."""
    logits = F.interpolate(logits[None, 1:], shape, mode="bilinear")
    return 1 + logits[0].argmax(0)


def evaluate_segmenter(head, index, classes, cfg, device):
    """Mean IoU at the size of the stored masks, n = classes present; _majority: one everywhere."""
    counts = torch.zeros(classes, classes, dtype=torch.long)
    view = whole_view(head.vision)
    for images, masks, _ in iter_images(index, view, data.Sample.mask):
        for logits, mask in zip(in_batches(head, cfg, device, images), masks):
            counts += confusion(predict_mask(logits, mask.shape), torch.from_numpy(mask), classes)
    counts = common.all_reduce_sum(counts)
    check_evaluated(int(counts.sum()), index)
    constant = torch.zeros_like(counts)
    constant[:, counts.sum(1).argmax()] = counts.sum(1)
    return [("miou", *iou_of_counts(counts)), ("miou_majority", *iou_of_counts(constant))]


# -- boxes --

class Detector(nn.Module):
    """FCOS (arXiv 1904.01355) at one scale: each patch predicts classes, the distances from its
    center to the four sides of a box, and center-ness, how near it is to the middle of the box."""

    def __init__(self, vision, classes):
        super().__init__()
        dim = vision.pos_embed.shape[2]
        self.vision = vision
        self.classes = classes
        self.tower = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(2))
        self.out = nn.Linear(dim, classes + 5)
        nn.init.normal_(self.out.weight, std=0.01)
        nn.init.zeros_(self.out.bias)
        self.out.bias.data[:classes] = -math.log(99)  # focal loss: at first each class has 1 %

    def forward(self, images):
        """(B, 3, S, S) -> class logits (B, N, C), boxes (B, N, 4), center-ness logits (B, N).

        Boxes are left, top, right, bottom in pixels of the view.
        """
        grid = self.vision.grid
        patch = self.vision.patch
        x = self.vision.patch_tokens(images).transpose(1, 2).unflatten(2, (grid, grid))
        for conv in self.tower:
            x = F.gelu(conv(x))
        x = common.at_least_float32(self.out(x.flatten(2).transpose(1, 2)))  # (B, N, C + 5)
        logits, distances, centerness = x.split([self.classes, 4, 1], 2)
        distances = patch * distances.clamp(max=8).exp()
        centers = patch_centers(grid, patch).to(x)
        boxes = torch.cat([centers - distances[..., :2], centers + distances[..., 2:]], 2)
        return logits, boxes, centerness[..., 0]

    def loss(self, batch):
        """FCOS's three terms, means over the positive patches of all ranks; this rank's share.

        batch: images; label (B, N), -1 where a patch is not positive; box (B, N, 4).
        """
        logits, boxes, centerness = self(batch["images"])
        positive = batch["label"] >= 0
        n_positive = common.all_reduce_sum(positive.sum()).clamp(min=1)

        # classes: focal loss at every patch
        target = F.one_hot(batch["label"].clamp(min=0), self.classes) * positive[..., None]
        class_loss = focal_loss(logits, target.to(logits.dtype)).sum() / n_positive

        # boxes: generalized IoU, weighted by center-ness
        centers = patch_centers(self.vision.grid, self.vision.patch).to(boxes)
        weight = true_centerness(centers, batch["box"]) * positive
        total_weight = common.all_reduce_sum(weight.sum()).clamp(min=1e-3)
        box_loss = ((1 - generalized_iou(boxes, batch["box"])) * weight).sum() / total_weight

        # center-ness, at positive patches
        error = F.binary_cross_entropy_with_logits(centerness, weight, reduction="none")
        center_loss = (error * positive).sum() / n_positive
        return world_size() * (class_loss + box_loss + center_loss)


def patch_centers(grid, patch):
    """(N, 2): x, y of the centers of the patches in pixels, row by row."""
    at = (torch.arange(grid) + 0.5) * patch
    return torch.stack([at.repeat(grid), at.repeat_interleave(grid)], 1)


def focal_loss(logits, target):
    """Focal loss (arXiv 1708.02002) with gamma 2 and alpha 0.25, elementwise."""
    p = logits.sigmoid()
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return loss * (target * 0.25 * (1 - p)**2 + (1 - target) * 0.75 * p**2)


def true_centerness(centers, boxes):
    """FCOS Eq. 3: 1 in the middle of a box, 0 at its border and outside.

    centers (N, 2), boxes (B, N, 4) as left, top, right, bottom -> (B, N)
    """
    to_low = centers - boxes[..., :2]  # (B, N, 2): to the left side, to the top
    to_high = boxes[..., 2:] - centers
    ratio = torch.minimum(to_low, to_high) / torch.maximum(to_low, to_high).clamp(min=1e-6)
    return ratio.clamp(min=0).prod(2).sqrt()


def generalized_iou(a, b):
    """arXiv 1902.09630, of boxes (..., 4) as left, top, right, bottom -> (...), in -1 .. 1."""
    def area(low, high):
        return (high - low).clamp(min=0).prod(-1)

    a_low, a_high = a.split(2, -1)
    b_low, b_high = b.split(2, -1)
    intersection = area(torch.maximum(a_low, b_low), torch.minimum(a_high, b_high))
    hull = area(torch.minimum(a_low, b_low), torch.maximum(a_high, b_high))
    union = area(a_low, a_high) + area(b_low, b_high) - intersection
    return intersection / union.clamp(min=1e-6) - (hull - union) / hull.clamp(min=1e-6)


Box = collections.namedtuple("Box", "x y w h name crowd")


def read_boxes(sample):
    """[Box] in pixels of the image; the class is a box's "name", else its text."""
    boxes = []
    for x, y, w, h, text, name, crowd in sample.boxes("name", "iscrowd"):
        boxes.append(Box(x, y, w, h, name if isinstance(name, str) else text, bool(crowd)))
    return boxes


def boxes_in_view(boxes, crop, size, flip):
    """[Box] of an image -> (K, 4) left, top, right, bottom in pixels of a view of its crop."""
    x, y, w, h = crop
    corners = np.array([(b.x, b.y, b.x + b.w, b.y + b.h) for b in boxes]).reshape(-1, 4)
    corners = (corners - [x, y, x, y]) * size / [w, h, w, h]
    if flip:
        corners[:, [0, 2]] = size - corners[:, [2, 0]]
    return corners


def assign_boxes(boxes, labels, grid, patch):
    """FCOS's targets: boxes (K, 4) as left, top, right, bottom in pixels, labels (K,) -> label of
    each patch (N,), -1 = none, and its box (N, 4).

    A patch is positive for a box that holds its center, within 1.5 patches of the middle of the
    box; of several, for the smallest. The patch that holds the middle of a box always is (ours: no
    patch would learn small boxes otherwise; such a box is widened to hold the patch's center).
    """
    centers = patch_centers(grid, patch).numpy()
    patch_label = np.full(len(centers), -1)
    patch_box = np.zeros((len(centers), 4), np.float32)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for k in np.argsort(-areas, kind="stable"):  # the smallest last: it overwrites larger ones
        low, high = np.split(boxes[k], 2)
        middle = (low + high) / 2
        reach = np.minimum((high - low) / 2, 1.5 * patch)
        positive = (np.abs(centers - middle) <= reach).all(1)
        column, row = (middle // patch).clip(0, grid - 1).astype(int)
        positive[row * grid + column] = True
        patch_label[positive] = labels[k]
        patch_box[positive, :2] = np.minimum(low, centers[positive] - 1)
        patch_box[positive, 2:] = np.maximum(high, centers[positive] + 1)
    return patch_label, patch_box


def box_example(sample, rng, size, min_area, labels, grid):
    """A crop keeps the boxes whose middle it holds, but no crowds. labels: {class name: number}."""
    view, crop, flip = random_view(sample, rng, size, min_area)
    boxes = [box for box in read_boxes(sample) if not box.crowd]
    corners = boxes_in_view(boxes, crop, size, flip)
    middles = (corners[:, :2] + corners[:, 2:]) / 2
    inside = ((0 < middles) & (middles < size)).all(1)
    box_labels = np.array([labels[box.name] for box in boxes], int)[inside]
    label, box = assign_boxes(corners[inside].clip(0, size), box_labels, grid, size // grid)
    return {"images": view, "label": label, "box": box}


def detect(model, tokenizer, paths, cfg, device, args):
    """Box AP of a single-scale detector on the patch tokens."""
    recipe = recipe_for("detect", args)
    train, test = open_parts(paths, "detect also needs training shards")
    trained = images_with_class(train)
    held_out = images_with_class(test)
    if not trained or not held_out:
        raise UserError(f"no boxes in the json of {paths[0]} ... or of the training shards beside "
                        "it: detect needs \"boxes\" or \"segments\" in both")
    names = sorted(trained) + sorted(held_out.keys() - trained.keys())
    labels = {name: i for i, name in enumerate(names)}

    torch.manual_seed(recipe.seed)
    head = Detector(copy.deepcopy(model.vision), len(trained))
    example = functools.partial(box_example, size=model.vision.image_size, labels=labels,
                                min_area=recipe.min_area, grid=model.vision.grid)
    train_head(head, train, example, recipe, cfg, device, "detect")
    train_images = {labels[name]: n for name, n in trained.items()}
    return evaluate_detector(head, test, labels, train_images, cfg, device)


def box_names(sample):
    return {box.name for box in read_boxes(sample)}


def images_with_class(index):
    """{class name: number of images with a box of it}"""
    counts = collections.Counter()
    for names in read_records(index, box_names):
        counts.update(names or ())
    return counts


def nms(boxes, scores, classes, threshold=0.6, most=100):
    """Non-maximum suppression within each class, with FCOS's numbers -> rows kept, best first.

    A box is dropped if a better one that is kept overlaps it by more than the threshold. Arrays:
    boxes (K, 4) x, y, w, h; scores (K,); classes (K,).
    """
    order = (-scores).argsort(kind="stable")
    kept = []
    while len(order) and len(kept) < most:
        best = order[0]
        rest = order[1:]
        kept.append(int(best))
        overlap = box_iou(boxes[best][None], boxes[rest])[0]
        order = rest[(overlap <= threshold) | (classes[rest] != classes[best])]
    return kept


def decode_boxes(logits, boxes, centerness, size):
    """What a Detector predicts for one image -> (K, 6): class, x, y, w, h, score, best first.

    FCOS's: score = sqrt(class probability * center-ness), of all classes of at least 0.05; the best
    1000 enter nms.
    """
    probability = logits.sigmoid()
    patch, label = (probability >= 0.05).nonzero().T
    score = (probability[patch, label] * centerness.sigmoid()[patch]).sqrt()
    best = score.argsort(descending=True, stable=True)[:1000]
    low, high = boxes[patch[best]].clamp(0, size).split(2, 1)
    rows = torch.cat([label[best, None], low, high - low, score[best, None]], 1).double()
    return rows[nms(rows[:, 1:5].numpy(), rows[:, 5].numpy(), rows[:, 0].numpy())]


@torch.no_grad()
def predict_boxes(head, images, cfg, device):
    """decode_boxes() of each of images (n, 3, S, S)."""
    predictions = []
    for batch in images.split(256):
        with common.autocast(cfg.precision, device):
            logits, boxes, centerness = head(batch.to(device))
        for outputs in zip(logits.cpu(), boxes.cpu(), centerness.cpu()):
            predictions.append(decode_boxes(*outputs, head.vision.image_size))
    return predictions


def true_boxes(sample, labels, size):
    """(M, 6): class, x, y, w, h in pixels of the whole view, crowd; an image may have no box."""
    width, height = sample.size()
    try:
        boxes = read_boxes(sample)
    except data.Skip:
        boxes = []
    corners = boxes_in_view(boxes, (0, 0, width, height), size, flip=False)
    low, high = torch.from_numpy(corners).split(2, 1)
    label = torch.tensor([labels[box.name] for box in boxes])
    crowd = torch.tensor([box.crowd for box in boxes])
    return torch.cat([label[:, None], low, high - low, crowd[:, None]], 1)


def coco_records(rows, last):
    """(K, 7): image, class, x, y, w, h and the field `last` -> records as COCO has them."""
    return [{"image_id": image, "category_id": label, "bbox": box, last: value}
            for image, label, *box, value in rows.tolist()]


def evaluate_detector(head, index, labels, train_images, cfg, device):
    """Box AP; AP_rare, AP_common, AP_frequent: of classes by their number of training images.

    Boxes are in pixels of the view, in which IoU is what it is in the image.
    """
    predictions = [torch.zeros(0, 7, dtype=torch.double)]  # image, class, x, y, w, h, score
    truths = [torch.zeros(0, 7, dtype=torch.double)]  # image, class, x, y, w, h, crowd
    read = functools.partial(true_boxes, labels=labels, size=head.vision.image_size)
    for images, values, ids in iter_images(index, whole_view(head.vision), read):
        for i, predicted, true in zip(ids, predict_boxes(head, images, cfg, device), values):
            predictions.append(F.pad(predicted, (1, 0), value=i))
            truths.append(F.pad(true, (1, 0), value=i))
    predictions = all_gather_rows(torch.cat(predictions))
    truths = all_gather_rows(torch.cat(truths))
    check_evaluated(len(truths), index)

    ap = average_precision(coco_records(predictions, "score"), coco_records(truths, "iscrowd"),
                           train_images)
    return [(metric, value, len(truths)) for metric, value in ap.items()]


# -- questions --

N_ANSWERS = 3129  # usual for VQA v2
QUESTION_LENGTH = 64  # tokens at most, ours
Question = collections.namedtuple("Question", "text answers")


def most_common(values):
    """The most frequent value, of equally frequent ones the first."""
    return collections.Counter(values).most_common(1)[0][0]


def read_question(record):
    """{"question", "answers" or "answer"} -> Question; None if malformed."""
    if not isinstance(record, dict):
        return None
    text = record.get("question")
    answers = record.get("answers")
    if not isinstance(answers, list) or not answers:
        answers = [record.get("answer")]
    answers = [answer for answer in answers if isinstance(answer, str)]
    if not isinstance(text, str) or not answers:
        return None
    return Question(text, answers)


def read_questions(sample):
    """[Question] of a sample. Skip if it has none.

    From "qa" of its record, a list as of VQA v2, or from a caption with "label", which says whether
    it is true (NLVR); another label is a class, no answer.
    """
    records = sample.json.get("qa")
    if isinstance(records, list):
        questions = [question for question in map(read_question, records) if question is not None]
        if questions:
            return questions
    label = str(sample.json.get("label")).lower()
    if label in ("true", "false", "yes", "no"):
        return [Question(sample.captions()[0], [label])]
    raise data.Skip("no question")


class Answerer(nn.Module):
    """The state of a question read beside an image, and a linear layer over the answers.

    model: has vision, and fused(images, tokens, valid) -> (B, dim).
    """

    def __init__(self, model, dim, answers):
        super().__init__()
        self.vision = model.vision  # first, so that its parameters' names begin with "vision."
        self.model = model
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, answers)

    def forward(self, images, tokens, valid):  # (B, 3, S, S), (B, L), (B, L) -> (B, answers)
        return self.head(self.norm(self.model.fused(images, tokens, valid)))

    def loss(self, batch):
        longest = int(batch["valid"].sum(1).max())  # waits for the device, but questions are short
        tokens = batch["tokens"][:, :longest]
        valid = batch["valid"][:, :longest]
        logits = self(batch["images"], tokens, valid)
        return F.cross_entropy(common.at_least_float32(logits), batch["answer"])


def question_example(sample, rng, view, labels, tokenizer, context):
    """The whole image, not mirrored, as questions say left and right, and one of its questions.

    labels: {answer: number}. The answer to learn is the one that most humans gave.
    """
    known = [q for q in read_questions(sample) if most_common(q.answers) in labels]
    if not known:
        raise data.Skip("no question")
    question = known[int(rng.integers(len(known)))]
    label = labels[most_common(question.answers)]
    tokens, valid = tokenizer.pad(question.text, context)
    return {"images": view(sample.image()), "tokens": tokens, "valid": valid,
            "answer": np.int64(label)}


def all_questions(index):
    """[Question] of all samples."""
    questions = []
    for sample_questions in read_records(index, read_questions):
        questions += sample_questions or []
    return questions


def vqa(model, tokenizer, paths, cfg, device, args):
    """VQA accuracy: the most frequent training answers, ranked by the method's own text path."""
    recipe = recipe_for("vqa", args)
    train, test = open_parts(paths, "vqa also needs training shards")
    questions = all_questions(train)
    if not questions or not all_questions(test):
        raise UserError(f"no questions in the json of {paths[0]} ... or of the training shards "
                        "beside it: vqa needs \"qa\", a list of {question, answers}, or a caption "
                        "and \"label\", true or false")
    answers = frequent_answers(questions)
    labels = {answer: i for i, answer in enumerate(answers)}
    context = min(cfg.context, QUESTION_LENGTH)

    torch.manual_seed(recipe.seed)
    head = Answerer(copy.deepcopy(model), cfg.text_dim, len(answers))
    example = functools.partial(question_example, view=whole_view(model.vision), labels=labels,
                                tokenizer=tokenizer, context=context)
    train_head(head, train, example, recipe, cfg, device, "vqa")

    def answer(images, questions):
        """images (n, 3, S, S) and n Questions -> n of the answers."""
        tokens, valid = tokenize(tokenizer, [q.text for q in questions], context)
        best = in_batches(head, cfg, device, images, tokens, valid).argmax(1)
        return [answers[i] for i in best.tolist()]

    return evaluate_answers(answer, answers[0], test, whole_view(model.vision))


def frequent_answers(questions):
    """The N_ANSWERS most frequent answers, of each question the one that most humans gave."""
    counts = collections.Counter(most_common(q.answers) for q in questions)
    return [answer for answer, _ in counts.most_common(N_ANSWERS)]


def evaluate_answers(answer, guess, index, view):
    """VQA accuracy of answer(images, questions) -> [str]; _majority: of one answer to all."""
    scores = []  # accuracy, accuracy of the guess
    for images, values, _ in iter_images(index, view, read_questions):
        questions = [q for image_questions in values for q in image_questions]
        counts = torch.tensor([len(image_questions) for image_questions in values])
        predicted = answer(images.repeat_interleave(counts, 0), questions)
        for question, text in zip(questions, predicted):
            scores.append((vqa_accuracy(text, question.answers),
                           vqa_accuracy(guess, question.answers)))
    scores = all_gather_rows(torch.tensor(scores, dtype=torch.double).view(-1, 2))
    check_evaluated(len(scores), index)
    accuracy, majority = scores.mean(0).tolist()
    return [("vqa", accuracy, len(scores)), ("vqa_majority", majority, len(scores))]


HEADS = {
    "attentive": functools.partial(classify, "attentive", AttentiveProbe),
    "finetune": functools.partial(classify, "finetune", Classifier),
    "segment": segment,
    "detect": detect,
    "vqa": vqa,
}


# ---- command line ----

HELP = {
    "zeroshot": "accuracy by class names in prompts",
    "retrieval": "recall at 1, 5, 10 between images and captions",
    "knn": "accuracy of the 20 nearest training images (DINO)",
    "linear": "accuracy of a linear probe (CLIP's)",
    "caption": "greedy captions against references",
    "attentive": "train LCL's attentive probe on the frozen encoder",
    "finetune": "train encoder and classifier",
    "segment": "train encoder and segmentation head",
    "detect": "train encoder and detector",
    "vqa": "train encoder and answers to questions",
    "search": "images nearest to a text, an image, or both",
    "compare": "what several checkpoints can do within minutes, side by side",
    "export": "write the encoder under timm's names",
}
ON_LABELS = ("zeroshot", "knn", "linear", "attentive", "finetune")  # the others: on captioned pairs


def held_out_shards(args, part):
    """-> what --data says, or that part of the toy data; its held-out shards."""
    patterns = args.data
    if patterns is None:
        patterns = [os.path.join(common.main_process_first(data.make_toy_data), part)]
    return " ".join(patterns), data.expand(patterns, "test")


def result_lines(rows, task, split, checkpoint, args):
    """A line of JSON for each result."""
    lines = []
    for metric, value, n in rows:
        if value is not None and not math.isfinite(value):
            value = None
        record = {"metric": metric, "value": value, "n": n, "protocol": task, "split": split,
                  "checkpoint": checkpoint, "seed": args.seed, "random_init": args.random_init}
        lines.append(json.dumps(record) + "\n")
    return lines


def make_folder(path):
    """At the start, so that a mistyped one costs nothing."""
    if path is not None and rank() == 0:
        os.makedirs(path, exist_ok=True)


def append(lines, folder):
    """Add lines to eval.jsonl."""
    if folder is not None and rank() == 0:
        with open(os.path.join(folder, "eval.jsonl"), "a") as f:
            f.writelines(lines)


def run_protocol(args, device):
    """One protocol or head on one checkpoint: a line of JSON for each result, then a table."""
    task = args.command
    make_folder(args.out)
    model, tokenizer, cfg = load_model(args.checkpoint, device)
    if not supports(model, task):
        supported = [name for name in [*PROTOCOLS, *HEADS] if supports(model, name)]
        raise UserError(f"{task} needs {NEEDS[task]}, which {type(model).__name__} of "
                        f"{args.checkpoint} does not have: it can do {', '.join(supported)}")
    split, paths = held_out_shards(args, "labels" if task in ON_LABELS else "pairs")
    if args.random_init:
        model = untrained(model, cfg, device, args.seed)
    if task in HEADS:
        rows = HEADS[task](model, tokenizer, paths, cfg, device, args)
    else:
        rows = PROTOCOLS[task](model, tokenizer, paths, cfg, device)
    lines = result_lines(rows, task, split, args.checkpoint, args)
    note = " with new weights" if args.random_init else ""
    print0(f"{''.join(lines)}{args.checkpoint}{note}, {task} on {split}:\n{table(rows)}")
    append(lines, args.out)


def read_picture(path):
    """An image file as images in shards are read: RGB, upright."""
    try:
        with open(path, "rb") as f:
            return data.Sample(path, {"jpg": f.read()}).image()
    except (OSError, data.Skip) as error:
        raise UserError(f"--image {path} cannot be read ({error}): give a JPEG, PNG or WebP file")


def run_search(args, device):
    """The nearest images: score, file, sample and caption of each, and a sheet."""
    if args.text is None and args.image is None:
        raise UserError("search needs --text, --image, or both")
    make_folder(args.out)
    picture = None if args.image is None else read_picture(args.image)
    model, tokenizer, cfg = load_model(args.checkpoint, device)
    if not supports(model, "retrieval") and (args.text is not None or args.minus is not None):
        raise UserError(f"{type(model).__name__} of {args.checkpoint} reads no text: search by "
                        "--image alone")
    _, paths = held_out_shards(args, "pairs")
    index = data.open_index(paths)
    found = search(model, tokenizer, index, cfg, device, args.text, picture, args.minus,
                   args.k)
    query = "" if args.text is None else args.text
    if args.minus is not None:
        query += f" minus {args.minus}"
    cells = [(picture, query, "blue")]
    for score, number in found:
        sample = index[number]
        try:
            text = read_captions(sample)[0]
        except data.Skip:
            text = ""
        print0(common.printable(f"{score:7.3f}  {index.place(number)}  {text}"))
        cells.append((sample.image(), f"{score:.3f} {text}", None))
    if rank() == 0:
        sheet(cells, os.path.join(args.out, "search.png"), 7,
              f"Query (framed) and the nearest of {len(index):,} samples")
    print0(f"pictures: {os.path.join(args.out, 'search.png')}")


def run_export(args, device):
    if not args.out.endswith((".safetensors", ".pt")):
        raise UserError(f"--out {args.out}: export writes FILE.safetensors or FILE.pt")
    model, _, _ = load_model(args.checkpoint, device)
    if rank() == 0:
        meta = export(model.vision, args.out)
        print0(f"{args.out}: " + ", ".join(f"{name} {value}" for name, value in meta.items()))


def run_compare(args, device):
    """What each checkpoint can do within minutes, side by side: compare.md in --out."""
    patterns = args.data
    if patterns is None:
        folder = common.main_process_first(data.make_toy_data)
        patterns = [os.path.join(folder, part) for part in ("pairs", "labels")]
    make_folder(args.out)
    columns = {}  # title of a checkpoint -> {(data, metric, n): text}
    reasons = []
    for checkpoint in args.checkpoint:
        model, tokenizer, cfg = load_model(checkpoint, device)
        title = f"{type(model).__name__}, {checkpoint}"
        columns[title] = {}
        results = run_protocols(model, tokenizer, patterns, cfg, device)
        for pattern, task, rows, reason in results:
            print0(f"{title}: {task} on {pattern}")
            append(result_lines(rows, task, pattern, checkpoint, args), args.out)
            for metric, value, n, baselines in shown(rows):
                columns[title][pattern, metric, n] = f"{value} {baselines}".rstrip()
            if reason is not None:
                columns[title][pattern, task, "-"] = "-"
                reasons.append(f"{title}, {task} on {pattern}: {reason}")
            if rank() == 0:  # after each: nothing is lost
                with open(os.path.join(args.out, "compare.md"), "w", encoding="utf-8") as f:
                    f.write(report(columns, reasons) + "\n")
    print0(report(columns, reasons))


def report(columns, reasons):
    """A Markdown table, a row a metric and a column a checkpoint; then what could not run, and why.

    columns {title: {(data, metric, n): text}}.
    """
    rows = [["data", "metric", "n", *columns], ["---"] * (3 + len(columns))]
    keys = dict.fromkeys(key for cells in columns.values() for key in cells)  # each once, in order
    for key in keys:
        rows.append([*key, *[cells.get(key, "-") for cells in columns.values()]])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n\n".join(["\n".join(lines), *reasons])


def add_command(commands, name, run, nargs=None):
    """A sub-command -> its parser, with the arguments that all of them have."""
    parser = commands.add_parser(name, help=HELP[name], description=HELP[name], allow_abbrev=False)
    parser.set_defaults(run=run, random_init=False, seed=0)
    parser.add_argument("checkpoint", nargs=nargs, help="last.pt of a run")
    return parser


def make_parser():
    parser = common.Parser(description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    shards = "held-out shards: files, folders, globs [toy data]"

    for name in [*PROTOCOLS, *HEADS]:
        command = add_command(commands, name, run_protocol)
        command.add_argument("--data", nargs="+", metavar="PATH", help=shards)
        command.add_argument("--out", metavar="FOLDER", help="add the results to its eval.jsonl")
        if name in ("knn", "linear", *HEADS):
            command.add_argument("--random-init", action="store_true",
                                 help="new weights of the same sizes: what training has to beat")
            command.add_argument("--seed", type=common.at_least(0), default=0,
                                 help="of new weights and training [0]")
        if name in HEADS:
            add_head_arguments(command, name)

    command = add_command(commands, "search", run_search)
    command.add_argument("--data", nargs="+", metavar="PATH", help=shards)
    command.add_argument("--out", metavar="FOLDER", default="runs/search",
                         help="folder of search.png [runs/search]")
    command.add_argument("--text", help="what the images should show")
    command.add_argument("--image", metavar="FILE", help="a picture that they should resemble")
    command.add_argument("--minus", metavar="TEXT", help="what they should not show")
    command.add_argument("--k", type=common.at_least(1), default=20, help="how many images [20]")

    command = add_command(commands, "compare", run_compare, nargs="+")
    command.add_argument("--data", nargs="+", metavar="PATH", help=f"{shards}; each is a data set")
    command.add_argument("--out", metavar="FOLDER", default="runs/compare",
                         help="folder of compare.md and eval.jsonl [runs/compare]")

    command = add_command(commands, "export", run_export)
    command.add_argument("--out", metavar="FILE", required=True, help=".safetensors or .pt")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    args.run(args, common.init_distributed())


if __name__ == "__main__":
    common.run_command(main)
