"""Search by text, by image and by both: arithmetic of queries, nearest images, what is printed."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import align
import common
import data
import eval as evaluation
from conftest import refused, tiny_config
from eval import compose

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_query_adds_unit_vectors_with_the_papers_weights_and_subtracts_what_is_not_wanted():
    generator = torch.Generator().manual_seed(0)
    x, y, z = F.normalize(torch.randn(3, 8, dtype=torch.float64, generator=generator), dim=1)
    torch.testing.assert_close(compose(x, y), (x + 2 * y) / (x + 2 * y).norm())
    torch.testing.assert_close(compose(text=y), y)
    torch.testing.assert_close(compose(x, y, z), F.normalize(x + 2 * y - 2 * z, dim=0))


def test_an_image_less_its_word_plus_another_finds_the_image_of_that_word():
    """Additive embeddings: image = scene + word (ALIGN, Figure 5)."""
    generator = torch.Generator().manual_seed(1)
    scenes = torch.randn(20, 64, generator=generator)
    words = torch.randn(5, 64, generator=generator)
    images = F.normalize((scenes[:, None] + words).flatten(0, 1), dim=1)  # 20 * 5, scene by scene
    for scene, old, new in ((0, 0, 3), (1, 4, 1), (2, 2, 0)):
        length = 2 * (scenes[scene] + words[old]).norm()  # so that the word leaves entirely
        query = compose(images[5 * scene + old], words[new] / length, words[old] / length)
        assert evaluation.nearest_images(images, query, k=1)[1] == [5 * scene + new]


@pytest.fixture(scope="module")
def checkpoint(toy_data, tmp_path_factory):
    """An untrained ALIGN of tiny size."""
    cfg = tiny_config("align", toy_data, tmp_path_factory.mktemp("run"))
    torch.manual_seed(0)
    model = align.ALIGN(cfg)
    optimizer = torch.optim.SGD(model.parameters())
    common.save(cfg, model, optimizer, 0, data.Tokenizer().dumps())
    return f"{cfg.out}/last.pt"


@pytest.fixture(scope="module")
def index(toy_data):
    return data.Index(data.expand(f"{toy_data}/pairs", "test"))


def search_lines(capsys):
    """[(score, key)] of what was printed, and the lines."""
    lines = capsys.readouterr().out.splitlines()
    found = []
    for line in lines:
        if "test-00000.tar: " in line:
            key = line.split("test-00000.tar: ")[1].split()[0]
            found.append((float(line.split()[0]), key))
    return found, lines


def test_an_image_finds_itself_first_and_the_output_says_file_caption_and_sheet(
        checkpoint, index, toy_data, tmp_path, capsys):
    query = tmp_path / "query.jpg"
    query.write_bytes(index[7].image_bytes())
    out = tmp_path / "out"
    evaluation.main(["search", checkpoint, "--data", f"{toy_data}/pairs", "--image", str(query),
                     "--k", "5", "--out", str(out)])
    found, lines = search_lines(capsys)
    assert len(found) == 5 and found[0] == (pytest.approx(1, abs=1e-3), index[7].key)
    assert index[7].captions(lines=True)[0] in lines[0] and index.paths[0] in lines[0]
    assert lines[-1] == f"pictures: {out}/search.png"
    with Image.open(out / "search.png") as picture:
        assert picture.width == 7 * 126 + 14


def test_a_text_finds_what_the_encoders_say(checkpoint, index, toy_data, tmp_path, capsys):
    evaluation.main(["search", checkpoint, "--data", f"{toy_data}/pairs", "--out", str(tmp_path),
                     "--text", "a red circle", "--minus", "a blue bar"])
    found, _ = search_lines(capsys)
    model, tokenizer, cfg = evaluation.load_model(checkpoint, CPU)
    image, _, _, ids = evaluation.embed_pairs(model, tokenizer, index, cfg, CPU)
    texts = evaluation.encode_texts(model, tokenizer, ["a red circle", "a blue bar"], cfg, CPU)
    scores = image @ F.normalize(2 * texts[0] - 2 * texts[1], dim=0)
    assert [score for score, _ in found] == pytest.approx(scores.topk(20).values.tolist(), abs=2e-3)
    assert found[0][1] == index[int(ids[scores.argmax()])].key


def embed_on_rank(checkpoint, toy_data):
    model, _, cfg = evaluation.load_model(checkpoint, CPU)
    index = data.Index(data.expand(f"{toy_data}/pairs", "test"))
    return evaluation.embed_images(model, index, cfg, CPU)


def test_features_do_not_depend_on_ranks(checkpoint, toy_data, run_on_ranks):
    features, ids = embed_on_rank(checkpoint, toy_data)
    for their_features, their_ids in run_on_ranks(2, embed_on_rank, checkpoint, toy_data):
        torch.testing.assert_close(their_features, features, rtol=1e-5, atol=1e-6)
        assert torch.equal(their_ids, ids)


def test_blocks_of_images_are_the_same_images_in_order(index):
    def view(image):
        return data.center_crop(image, 16)

    blocks = list(evaluation.iter_images(index, view, read=data.Sample.captions, block=200))
    assert [len(ids) for _, _, ids in blocks] == [200, 200, 100]
    images, captions, ids = blocks[1]
    assert ids == list(range(200, 400))
    for i in (0, 57, 199):
        assert np.array_equal(images[i], view(index[ids[i]].image()))
        assert captions[i] == index[ids[i]].captions()


@pytest.mark.parametrize("flags,message", [
    ([], "needs --text, --image"),
    (["--text", "x", "--k", "0"], "--k 0"),
    (["--image", "FOLDER/broken.jpg"], "broken.jpg cannot be read"),
])
def test_a_query_that_makes_no_sense_gets_one_line(checkpoint, tmp_path, flags, message):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    flags = [flag.replace("FOLDER", str(tmp_path)) for flag in flags]
    assert message in refused(evaluation.main, ["search", checkpoint, *flags])
