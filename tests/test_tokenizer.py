"""The tokenizer against hand-worked examples and slow references."""
import collections
import random
import re
from types import SimpleNamespace

import pytest
import torch

import data
from common import UserError
from data import Tokenizer

A, B, C, D = [Tokenizer.FIRST_BYTE + ord(letter) for letter in "abcd"]
TEXTS = ["the cat sat on the mat, the cat!", "a cat and the hat -- that hat", "мир миру мир",
         "猫猫猫 aaaa aaaaaa", "on on on the the\n\n\nthe", "sat sat   sat"]


def word_ids(text):
    """Bytes of the words of a text, words cut by a regular expression of its own."""
    words = re.findall(r" ?\w+| ?[^\w\s]+|\s", text)
    return [[Tokenizer.FIRST_BYTE + byte for byte in word.encode()] for word in words]


def slow_merge(ids, pair, new_id):
    for i in range(len(ids) - 1):
        if (ids[i], ids[i + 1]) == pair:
            return ids[:i] + [new_id] + slow_merge(ids[i + 2:], pair, new_id)
    return ids


def random_words(seed):
    draw = random.Random(seed)
    return ["".join(draw.choices("aabc ", k=draw.randrange(1, 60))) for _ in range(40)]


def slow_train(texts, vocab_size):
    """Count everything anew for each merge."""
    words = [ids for text in texts for ids in word_ids(text)]
    merges = []
    while 264 + len(merges) < vocab_size:
        counts = collections.Counter(pair for ids in words for pair in zip(ids, ids[1:]))
        if not counts or max(counts.values()) < 2:
            break
        merges.append(min(counts, key=lambda pair: (-counts[pair], pair)))
        words = [slow_merge(ids, merges[-1], 263 + len(merges)) for ids in words]
    return merges


@pytest.mark.parametrize("n_merges", [0, 24])
def test_any_text_comes_back_as_it_was_and_none_becomes_a_special_token(n_merges):
    tokenizer = Tokenizer.train(TEXTS, 264 + n_merges)
    assert len(tokenizer.merges) == n_merges
    texts = TEXTS + ["", " \t\r\n \x1c\x85\u2028", "e\u0301\u202e", "👩‍👩‍👧 שלום", " leading",
                     "end ", "<|endoftext|>", "[MASK]", "".join(map(chr, range(0xd800)))]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(8 <= i < tokenizer.vocab_size for i in ids)


def test_the_example_of_wikipedia():
    # aaabdaaabac: Z = aa; then Y = ab and Za tie at 2, the smaller ids win; then X = ZY: XdXac
    tokenizer = Tokenizer.train(["aaabdaaabac"], 1000)
    assert tokenizer.merges == [(A, A), (A, B), (264, 265)]
    assert tokenizer.encode("aaabdaaabac") == [266, D, 266, A, C]
    assert tokenizer.bytes[266] == b"aaab"
    assert Tokenizer.train(["aaabdaaabac"], 266).merges == [(A, A), (A, B)]  # no room for more


@pytest.mark.parametrize("texts, size", [(TEXTS, 1000), (random_words(1), 300)])
def test_training_agrees_with_counting_everything_anew_for_each_merge(texts, size):
    assert Tokenizer.train(texts, size).merges == slow_train(texts, size)


def test_encoding_applies_the_merges_in_the_order_they_were_learned():
    texts = TEXTS + random_words(2)
    tokenizer = Tokenizer.train(texts[:30], 1000)
    for text in texts:
        want = []
        for ids in word_ids(text):
            for i, pair in enumerate(tokenizer.merges):
                ids = slow_merge(ids, pair, 264 + i)
            want += ids
        assert tokenizer.encode(text) == want


def test_special_tokens_vanish_from_decoded_text_and_broken_bytes_are_marked():
    ids = [Tokenizer.BOS, A, Tokenizer.MASK, B, Tokenizer.EOS, Tokenizer.PAD, 999_999]
    assert Tokenizer().decode(ids) == "ab"
    assert Tokenizer().decode(torch.tensor([A, 8 + 0xc3])) == "a\ufffd"
    assert Tokenizer().decode(Tokenizer().encode("a\ud83d")).startswith("a\ufffd")


def test_padding_is_marked_and_a_cut_keeps_the_end_token():
    tokens, valid = Tokenizer().pad("aé", 7)
    assert tokens.tolist() == [1, 8 + 97, 8 + 0xc3, 8 + 0xa9, 2, 0, 0]
    assert valid.tolist() == 5 * [True] + 2 * [False]
    tokens, valid = Tokenizer().pad("abcd", 4)
    assert tokens.tolist() == [1, A, B, 2] and valid.all()


@pytest.mark.parametrize("raw", [
    b"{", b'{"special": 7, "merges": []}', b'{"special": 8, "merges": [["a", "b"]]}',
    b'{"special": 8, "merges": [[264, 105]]}',
])
def test_a_damaged_vocabulary_is_refused_in_one_line(tmp_path, raw):
    (tmp_path / "vocab.json").write_bytes(raw)
    with pytest.raises(UserError, match="vocab.json is not a vocabulary"):
        Tokenizer.load(str(tmp_path / "vocab.json"))


# ---- the tokenizer of a run ----

@pytest.fixture
def index(tmp_path):
    files = [("txt", b"one to one"), ("json", b'{"text_list": ["two", 3, "one to four"]}'),
             ("jpg", b"x"), ("json", b'{"captions": ["five"]}'), ("json", b"{")]
    samples = [(str(i), {suffix: raw}) for i, (suffix, raw) in enumerate(files)]
    data.write_shards([samples], str(tmp_path), "train")
    return data.Index([tmp_path / "train-00000.tar"])


def test_the_texts_of_a_vocabulary_are_captions_and_sentences(index):
    assert data.first_captions(index) == ["one to one", "two", "one to four", "five"]
    assert data.first_captions(index, limit=2) == ["one to one", "two", "one to four"]


def test_a_vocabulary_is_trained_on_captions_and_names_or_read_and_must_fit(tmp_path, index):
    cfg = SimpleNamespace(out=str(tmp_path), vocab=None, vocab_size=268)
    made = data.make_tokenizer(cfg, index, None, ["two"])
    assert made.merges == slow_train([*data.first_captions(index), "two"], 268)
    cfg = SimpleNamespace(out="nowhere", vocab=f"{tmp_path}/vocab.json", vocab_size=268)
    assert data.make_tokenizer(cfg, None, None).merges == made.merges
    cfg.vocab_size = 267
    with pytest.raises(UserError, match="268 ids, more than --vocab-size 267"):
        data.make_tokenizer(cfg, None, None)
    cfg.vocab = f"{tmp_path}/absent.json"
    with pytest.raises(UserError, match="absent.json cannot be read"):
        data.make_tokenizer(cfg, None, None)
