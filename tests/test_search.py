"""Search by text, by image and by both: the query's arithmetic, the nearest images, the command line."""
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import align
import data
import eval as E
from common import UserError

CPU = torch.device("cpu")


def test_a_query_adds_unit_vectors_with_the_papers_weights_and_takes_away_what_is_not_wanted():
    x, y, z = F.normalize(torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=1)
    torch.testing.assert_close(E.compose(x, y), (x + 2 * y) / (x + 2 * y).norm())
    torch.testing.assert_close(E.compose(x, y, weights=(1, 0)), x)
    torch.testing.assert_close(E.compose(x, y, weights=(0, 5)), y)
    torch.testing.assert_close(E.compose(text=y), y)
    torch.testing.assert_close(E.compose(x, y, z, (1, 1)), F.normalize(x + y - z, dim=0))


def test_an_image_less_its_word_plus_another_finds_the_image_of_that_word():
    """Additive embeddings: image = scene + word (align.md, oracle 26)."""
    g = torch.Generator().manual_seed(1)
    scenes, words = torch.randn(20, 64, generator=g), torch.randn(5, 64, generator=g)
    images = F.normalize((scenes[:, None] + words).flatten(0, 1), dim=1)         # (20 * 5, 64), scene by scene
    for scene, (old, new) in enumerate([(0, 3), (4, 1), (2, 0)]):
        length = (scenes[scene] + words[old]).norm()         # in units of the image, so that the word leaves entirely
        query = E.compose(images[5 * scene + old], words[new] / length, words[old] / length, (1, 1))
        assert (images @ query).argmax() == 5 * scene + new


@pytest.fixture
def trained(tiny):
    align.main(replace(tiny, steps=4))
    return f"{tiny.out}/last.pt"


def found(out):
    return [(float(line.split()[0]), line.split()[1]) for line in out.splitlines() if len(line.split()) == 2 and line.split()[1].isdigit()]


def test_an_image_finds_itself_first_and_a_text_what_the_encoders_say(trained, tiny_world, tmp_path, capsys):
    index = data.Index(data.expand(f"{tiny_world}/pairs", "test"))
    with open(tmp_path / "query.jpg", "wb") as f:
        f.write(index[7].members["jpg"])
    where = ["--data", f"{tiny_world}/pairs", "--out", str(tmp_path / "out")]
    E.main(["search", trained, *where, "--image", str(tmp_path / "query.jpg"), "--k", "5"])
    (score, key), *rest = found(capsys.readouterr().out)
    assert key == index[7].key and score == pytest.approx(1, abs=1e-3) and len(rest) == 4
    E.main(["search", trained, *where, "--text", "a red circle", "--minus", "a blue bar"])         # from the features kept by the first call
    model, tokenizer, cfg, _ = E.load(trained)
    image, _, _, ids = E.embed_pairs(model, tokenizer, index, cfg, CPU)
    want = image @ E.compose(None, *E.encode_texts(model, tokenizer, ["a red circle", "a blue bar"], cfg, CPU))
    hits = found(capsys.readouterr().out)
    assert [score for score, _ in hits] == pytest.approx(want.topk(20).values.tolist(), abs=2e-3)
    assert hits[0][1] == index[int(ids[want.argmax()])].key
    assert [n.startswith("images-") for n in os.listdir(os.path.dirname(trained))].count(True) == 1
    with Image.open(tmp_path / "out" / "search.png") as picture:
        assert picture.width == 7 * 126 + 14


def searched(checkpoint, world, cache):
    model, _, cfg, _ = E.load(checkpoint)
    os.makedirs(cache, exist_ok=True)
    return E.embed("images", model, data.Index(data.expand(f"{world}/pairs", "test")), cfg, CPU, E.Store(cache), block=7)


def test_features_do_not_depend_on_ranks_or_blocks(trained, tiny_world, tmp_path, pools):
    features, _, numbers = searched(trained, tiny_world, str(tmp_path / "one"))
    for theirs, _, order in pools(2)(searched, trained, tiny_world, str(tmp_path / "two")):
        torch.testing.assert_close(theirs, features, rtol=1e-5, atol=1e-6)
        assert torch.equal(order, numbers)


def test_a_query_that_makes_no_sense_is_told_in_one_line(trained, tiny_world, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    for argv, told in ((["search", trained], "needs --text, --image"), (["knn", trained, "--text", "x"], "--text belongs to search, not to knn"),
                       (["search", trained, "--data", f"{tiny_world}/pairs", "--image", str(tmp_path / "broken.jpg")], "broken.jpg cannot be read"),
                       (["search", trained, "--data", f"{tiny_world}/pairs", "--image", str(tmp_path / "none.jpg")], "none.jpg cannot be read")):
        with pytest.raises(UserError, match=told):
            E.main(argv)
