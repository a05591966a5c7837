"""Every mistake of a user ends with one line (the thing, its value, the remedy), exit code 2 and no traceback; asked through the scripts' own
entry, three times as a process of its own."""
import dataclasses, gzip, io, os, pathlib, re, shutil, subprocess, sys, tarfile
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

import align
import common
import data
import eval as evaluation

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_progress_bar_of_a_test_before():
    yield
    for bar in list(tqdm._instances):
        bar.close()


pytestmark = pytest.mark.usefixtures("one_thread")


def flags(cfg, **changes):
    """A Config as a command line."""
    argv = []
    for f in dataclasses.fields(cfg):
        value, flag = changes.pop(f.name, getattr(cfg, f.name)), f.name.replace("_", "-")
        if value != f.default:
            argv += [f"--{flag}" if value else f"--no-{flag}"] if f.type is bool else [f"--{flag}", *value] if f.type is list else [f"--{flag}", str(value)]
    assert not changes
    return argv


@pytest.fixture
def refused(capsys, monkeypatch):
    """refused(script, argv, *parts): the script says all parts in one line after `error: `, and ends with code 2."""
    def ask(script, argv, *parts):
        main = (lambda: align.main(common.parse(align.Config, align.DEMO, align.__doc__))) if script is align else script.main
        monkeypatch.setattr(sys, "argv", [pathlib.Path(script.__file__).name, *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            common.guard(main)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.startswith("error: ") and said.endswith("\n") and said.count("\n") == 1, said
        for part in parts:
            assert str(part) in said, f"{part!r} is not in {said!r}"
        return said
    return ask


@pytest.fixture
def trained(tiny, tmp_path):
    """A checkpoint of an ALIGN, untrained."""
    os.makedirs(tiny.out)
    model = align.ALIGN(tiny)
    common.save(tiny, model, align.Lamb(model.parameters()), 1, data.Tokenizer().dumps(), SimpleNamespace())
    return f"{tiny.out}/last.pt"


@pytest.fixture
def bare(tiny_world, tmp_path):
    """The held-out labels shard alone: no class names and no training shards beside it or above."""
    os.makedirs(tmp_path / "up/bare")
    shutil.copy(f"{tiny_world}/labels/test-00000.tar", tmp_path / "up/bare/test-00000.tar")
    return tmp_path / "up/bare"


def test_the_harness_itself_lets_a_right_command_pass(tiny, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["align.py", *flags(tiny, steps=1)])
    with pytest.raises(SystemExit) as ended:
        common.guard(lambda: align.main(common.parse(align.Config, align.DEMO, align.__doc__)))
    assert ended.value.code == 0 and os.path.exists(f"{tiny.out}/last.pt")


# -- which files --

@pytest.mark.parametrize("pattern,expanded", [("nix/{00..03}.tar", "nix/00.tar"), ("nix/{a,b}-{8..9}.tar", "nix/a-8.tar")])
def test_a_pattern_without_a_match_shows_what_it_became(refused, tiny, tmp_path, pattern, expanded):
    refused(align, flags(tiny, data=[f"{tmp_path}/{pattern}"]), f"{tmp_path}/{pattern}", f"{tmp_path}/{expanded}", "give tar files")


def test_a_glob_and_a_folder_without_shards_are_named(refused, tiny, tmp_path):
    os.makedirs(tmp_path / "hollow")
    for pattern in (f"{tmp_path}/*.tar", f"{tmp_path}/hollow", f"{tmp_path}/a.tar"):
        refused(align, flags(tiny, data=[pattern]), pattern, "give tar files, a folder or a glob")


def test_one_missing_shard_among_good_ones_is_named(refused, tiny, tmp_path):
    refused(align, flags(tiny, data=[*tiny.data, f"{tmp_path}/typo.tar"]), f"{tmp_path}/typo.tar")


def test_a_wrong_val_pattern_is_told_before_the_training_and_not_after_it(refused, tiny, tmp_path):
    refused(align, flags(tiny, val=[f"{tmp_path}/typo/*.tar"], eval_every=0), f"{tmp_path}/typo/*.tar")
    assert not os.path.exists(f"{tiny.out}/last.pt")         # no step was made for nothing


def test_a_web_page_saved_as_a_shard_is_no_shard(refused, tiny, tmp_path):
    (tmp_path / "page.tar").write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>\n" * 30)
    refused(align, flags(tiny, data=[f"{tmp_path}/page.tar"]), f"{tmp_path}/page.tar", "is it a tar of images?")


def test_an_empty_file_as_a_shard_is_no_shard(refused, tiny, tmp_path):
    (tmp_path / "empty.tar").write_bytes(b"")
    refused(align, flags(tiny, data=[f"{tmp_path}/empty.tar"]), f"{tmp_path}/empty.tar", "no sample")


@pytest.mark.parametrize("name", ["train.tar.gz", "train.tar"])
def test_a_compressed_shard_is_told_how_to_unpack_it(refused, tiny, tmp_path, name):
    with open(f"{tiny.data[0]}/test-00000.tar", "rb") as f:
        (tmp_path / name).write_bytes(gzip.compress(f.read(), 1))
    said = refused(align, flags(tiny, data=[f"{tmp_path}/{name}"]), f"{tmp_path}/{name}", "compressed", "gzip -dc")
    source, target = re.search(r"gzip -dc (\S+) > (\S+)", said).groups()
    assert source == f"{tmp_path}/{name}" and target != source                   # the remedy must not overwrite what it reads


def test_shards_without_captions_are_told_what_a_caption_is(refused, tiny, tiny_world):
    refused(align, flags(tiny, data=[f"{tiny_world}/labels"]), "no caption", f"{tiny_world}/labels/train-00000.tar", "KEY.txt")


# -- flags --

@pytest.mark.parametrize("flag,meant", [("--dtaa", "--data"), ("--batchsize", "--batch"), ("--log_every", "--log-every"), ("--dtaa=x", "--data")])
def test_an_unknown_flag_suggests_the_one_meant(refused, flag, meant):
    refused(align, [flag, "x"], flag, f"did you mean {meant}?")


def test_a_flag_like_no_other_points_to_the_help(refused):
    refused(align, ["--zzzzzz", "1"], "--zzzzzz", "align.py -h")


@pytest.mark.parametrize("argv,parts", [
    (["--size", "x"], ["--size x", "ti s b l h g"]), (["--seed", "-1"], ["--seed -1"]), (["--batch", "0"], ["--batch 0"]),
    (["--lr", "fast"], ["--lr", "fast"]), (["--steps", "1.5"], ["--steps", "1.5"]), (["--data"], ["--data"]), (["--flip", "yes"], ["yes"])])
def test_a_wrong_value_is_told_with_its_flag(refused, argv, parts):
    refused(align, argv, *parts)


@pytest.mark.parametrize("change,parts", [
    (dict(precision="fp16"), ["--precision fp16", "bf16", "fp32"]),
    (dict(image_size=50, patch=16), ["--image-size 50", "--patch 16", "48"]),
    (dict(batch=9999, micro=0), ["--batch 9999", "256"]),
    (dict(micro=5), ["--micro 5", "16"])])
def test_a_value_that_does_not_fit_is_told_with_its_flag(refused, tiny, change, parts):
    refused(align, flags(tiny, **change), *parts)


@pytest.mark.parametrize("change,flag", [
    (dict(schedule="lineer"), "--schedule lineer"), (dict(save_every=0), "--save-every 0"), (dict(log_every=0), "--log-every 0"),
    (dict(patch=0), "--patch 0"), (dict(image_size=0), "--image-size 0"), (dict(dim=0), "--dim 0"), (dict(heads=0), "--heads 0"), (dict(context=1), "--context 1"),
    (dict(temperature=0.0), "--temperature 0")])
def test_a_value_without_meaning_is_told_with_its_flag(refused, tiny, change, flag):
    refused(align, flags(tiny, **change), flag)


@pytest.mark.parametrize("change", [dict(heads=3), dict(text_heads=3)])
def test_heads_that_do_not_divide_the_width_are_told(refused, tiny, change):
    refused(align, flags(tiny, **change), "16", "3")


def test_a_file_in_the_place_of_the_out_folder_is_told(refused, tiny, tmp_path):
    (tmp_path / "note").write_text("x")
    refused(align, flags(tiny, out=f"{tmp_path}/note"), f"{tmp_path}/note")


# -- vocabularies --

def test_a_vocabulary_larger_than_the_table_is_told_with_both_sizes(refused, tiny, tmp_path):
    path = str(tmp_path / "v.json")
    data.Tokenizer([[8 + i, 9 + i] for i in range(136)]).save(path)
    refused(align, flags(tiny, vocab=path), path, "400 ids", "--vocab-size 300", "give --vocab-size 400")


def test_a_table_too_small_for_bytes_is_told_too(refused, tiny):
    refused(align, flags(tiny, vocab_size=100), "--vocab-size 100", "264")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"special": 8}', b'{"special": 8, "merges": [[1, 2, 3]]}', b'{"special": 7, "merges": []}',
                                     b'{"special": 8, "merges": [[9999, 8]]}', b'{"special": 8, "merges": null}', b"\xff\xfe\x80PK\x03\x04"])
def test_a_damaged_vocabulary_is_named_with_the_way_to_a_good_one(refused, tiny, tmp_path, content):
    (tmp_path / "v.json").write_bytes(content)
    refused(align, flags(tiny, vocab=f"{tmp_path}/v.json"), f"{tmp_path}/v.json", "data.py vocab")


def test_a_missing_vocabulary_is_named(refused, tiny, tmp_path):
    refused(align, flags(tiny, vocab=f"{tmp_path}/v.json"), f"--vocab {tmp_path}/v.json", "no such file", "data.py vocab")


# -- checkpoints --

def test_an_out_folder_of_another_recipe_names_what_differs(refused, tiny, trained):
    refused(align, flags(tiny, lr=0.5, depth=2), tiny.out, "--lr 0.01 -> 0.5", "--depth 1 -> 2", "--fresh")


def test_an_out_folder_of_another_method_names_both(refused, tiny, trained):
    state = common.read_checkpoint(trained)
    torch.save({**state, "method": "MUG"}, trained)
    refused(align, flags(tiny), tiny.out, "MUG", "ALIGN", "--fresh")


def test_an_out_folder_of_two_damaged_checkpoints_points_to_fresh(refused, tiny, trained):
    shutil.copy(trained, f"{tiny.out}/prev.pt")
    for name in ("last.pt", "prev.pt"):
        os.truncate(f"{tiny.out}/{name}", 1000)
    refused(align, flags(tiny), tiny.out, "last.pt", "prev.pt", "--fresh")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint\n", b"PK\x03\x04 cut"])
def test_what_is_not_a_checkpoint_cannot_be_evaluated(refused, tiny_world, tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    refused(evaluation, ["knn", tmp_path / "x.pt", "--data", f"{tiny_world}/labels"], "not a readable checkpoint", tmp_path / "x.pt")


def test_a_checkpoint_that_is_not_there_is_named(refused, tiny_world, tmp_path):
    refused(evaluation, ["knn", tmp_path / "typo.pt", "--data", f"{tiny_world}/labels"], tmp_path / "typo.pt")


def test_weights_of_another_program_cannot_be_evaluated(refused, tiny_world, tmp_path):
    torch.save({"state_dict": {"w": torch.zeros(2)}}, tmp_path / "theirs.pt")
    refused(evaluation, ["knn", tmp_path / "theirs.pt", "--data", f"{tiny_world}/labels"], tmp_path / "theirs.pt", "not one of our checkpoints")


def test_a_checkpoint_of_an_unknown_method_lists_the_known(refused, tiny_world, trained):
    torch.save({**common.read_checkpoint(trained), "method": "os"}, trained)     # nor is a module of that name imported
    refused(evaluation, ["knn", trained, "--data", f"{tiny_world}/labels"], trained, "checkpoint of os", "ALIGN", "M3I")


@pytest.mark.parametrize("change", [lambda s: s["config"].update(novel=1), lambda s: s["config"].update(dim=32), lambda s: s["model"].pop("temperature")])
def test_a_checkpoint_of_another_version_says_so(refused, tiny_world, trained, change):
    state = common.read_checkpoint(trained)
    change(state)
    torch.save(state, trained)
    refused(evaluation, ["knn", trained, "--data", f"{tiny_world}/labels"], trained, "another version of align.py")


# -- evaluation --

def test_zero_shot_without_class_names_says_where_they_belong(refused, trained, bare):
    refused(evaluation, ["zeroshot", trained, "--data", bare], f"{bare}/test-00000.tar", "classes.txt", "classnames.txt")


def test_zero_shot_with_too_few_class_names_tells_both_numbers(refused, trained, bare):
    (bare / "classes.txt").write_text("red circle\nred square\n")
    refused(evaluation, ["zeroshot", trained, "--data", bare], "label 63", "only 2 class names")


def test_knn_without_a_bank_says_what_it_needs(refused, trained, bare):
    refused(evaluation, ["knn", trained, "--data", bare], "kNN", "training shards", bare)


def test_held_out_shards_that_are_not_there_are_named(refused, trained, tmp_path):
    refused(evaluation, ["knn", trained, "--data", f"{tmp_path}/typo"], f"{tmp_path}/typo")


@pytest.mark.filterwarnings("ignore")
def test_retrieval_on_shards_without_captions_is_told(capsys, monkeypatch, trained, bare):
    monkeypatch.setattr(sys, "argv", ["eval.py", "retrieval", trained, "--data", str(bare)])
    with pytest.raises(SystemExit) as ended:
        common.guard(evaluation.main)
    last = capsys.readouterr().err.strip().splitlines()[-1]  # warnings may stand before it
    assert ended.value.code == 2 and last.startswith("error: ") and str(bare) in last and "caption" in last


def test_an_unknown_task_lists_the_known(refused):
    refused(evaluation, ["zeroshoot", "x.pt"], "zeroshoot", "'zeroshot'", "'knn'")


@pytest.mark.parametrize("argv,parts", [(["chek", "x.tar"], ["chek", "check"]), (["index", "/nix/a.tar"], ["/nix/a.tar"]), (["make", "--parts", "paris"], ["paris", "pairs"]),
                                        (["vocab"], ["shards"]), ([], ["make|index|check|vocab"])])
def test_data_py_refuses_in_one_line_too(refused, argv, parts):
    refused(data, argv, *parts)


def last_line(tiny, capsys, monkeypatch, **changes):
    """What stands on the terminal's last line after a training that begins and then fails: beside a progress bar nobody finds it."""
    monkeypatch.setattr(sys, "argv", ["align.py", *flags(tiny, **changes)])
    with pytest.raises(SystemExit) as ended:
        common.guard(lambda: align.main(common.parse(align.Config, align.DEMO, align.__doc__)))
    assert ended.value.code == 2
    return re.split(r"[\r\n]+", capsys.readouterr().err.replace("\x1b[A", "").strip())[-1]


def test_a_loss_that_is_no_number_gets_a_line_of_its_own(tiny, capsys, monkeypatch):
    said = last_line(tiny, capsys, monkeypatch, lr=1e30)
    assert re.match(r"error: .*at step 1\b.*none yet.*--lr", said), said


def test_shards_without_a_single_readable_image_get_a_line_of_their_own(tiny, tmp_path, capsys, monkeypatch):
    with tarfile.open(tmp_path / "bad.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in ((f"{i:03}.{s}", c) for i in range(20) for s, c in (("jpg", b"<html>404"), ("txt", b"a red circle"))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    said = last_line(tiny, capsys, monkeypatch, data=[f"{tmp_path}/bad.tar"])
    assert re.match(r"error: none of the 20 samples can be used.*unreadable image.*20.*data\.py check", said), said


# -- processes of their own --

@pytest.mark.parametrize("argv,parts", [
    (["align.py", "--dtaa", "x"], ["--dtaa", "--data"]), (["data.py", "index", "nix/{0..3}.tar"], ["nix/{0..3}.tar", "nix/0.tar"]),
    (["eval.py", "knn", "requirements.txt", "--data", "WORLD/labels"], ["not a readable checkpoint", "requirements.txt"])])
def test_a_process_ends_with_code_2_and_one_line(argv, parts, tiny_world):
    done = subprocess.run([sys.executable, *(a.replace("WORLD", tiny_world) for a in argv)], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr and all(part in done.stderr for part in parts), done.stderr
