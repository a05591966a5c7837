"""W gloo processes are one run: same losses, same gradients, same results, one decision to stop."""
import contextlib, importlib, json, os, signal
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import align
import common
import data
import eval as evaluation

G = 12                                                       # rows of the global batch: divides into 1, 2, 3 and 4 ranks


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(6, 4, dtype=torch.float64), nn.Linear(5, 4, dtype=torch.float64)
        self.temperature = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))


def rows():
    g = torch.Generator().manual_seed(1)
    return torch.randn(G, 6, generator=g, dtype=torch.float64), torch.randn(G, 5, generator=g, dtype=torch.float64)


def two_block_loss(image, text, temperature, e, gather):
    """Each rank scores its rows against all columns of the gathered other side: exact only if `gather` carries gradients."""
    target = common.rank() * len(image) + torch.arange(len(image))
    return (F.cross_entropy(image @ gather(text).T / temperature, target, label_smoothing=e)
            + F.cross_entropy(text @ gather(image).T / temperature, target, label_smoothing=e))


LOSSES = {"one block": lambda i, t, s: align.contrastive_loss(i, t, s, 0.1),
          "one block in chunks": lambda i, t, s: align.contrastive_loss(i, t, s, 0.1, chunk=2),
          "one block in chunks, strided": lambda i, t, s: align.contrastive_loss(i.T.contiguous().T, t.T.contiguous().T, s, 0.1, chunk=2),
          "one block, strided": lambda i, t, s: align.contrastive_loss(i.T.contiguous().T, t.T.contiguous().T, s, 0.1),
          "two blocks, our gather": lambda i, t, s: two_block_loss(i, t, s, 0.1, common.gather),
          "two blocks, plain gather": lambda i, t, s: two_block_loss(i, t, s, 0.1, common.all_gather)}


def loss_and_gradients(name, lamb=False):
    """This rank's rows through the towers; the loss averaged over ranks, the averaged gradients (or the weights after one step)."""
    model, (images, texts) = Towers(), rows()
    own = lambda x: x.chunk(common.world())[common.rank()]
    loss = LOSSES[name](common.unit(model.image(own(images))), common.unit(model.text(own(texts))), model.temperature)
    loss.backward()
    common.average_gradients(model.parameters())
    mean = common.all_gather(loss.detach()[None]).mean()
    if lamb:
        align.Lamb(model.parameters(), lr=0.1, wd=0.01).step()
    return mean, [p.detach() if lamb else p.grad for p in model.parameters()]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", list(LOSSES)[:-1])
def test_sharded_batch_gives_the_loss_and_gradients_of_the_whole_batch(pools, world, name):
    loss, grads = loss_and_gradients(name)
    for sharded, theirs in pools(world)(loss_and_gradients, name):
        assert sharded.item() == pytest.approx(loss.item(), rel=1e-12)
        for a, b in zip(theirs, grads):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_a_plain_gather_would_have_been_noticed(pools):
    name = "two blocks, plain gather"
    _, grads = loss_and_gradients(name)
    _, theirs = pools(2)(loss_and_gradients, name)[0]
    off = [((a - b).norm() / b.norm()).item() for a, b in zip(theirs, grads)]
    assert off[0] < 1e-10 and min(off[1:]) > 1e-2            # the temperature's gradient is right, the towers' are not


def test_one_lamb_step_gives_the_same_weights_on_1_and_4_ranks(pools):
    _, weights = loss_and_gradients("one block", lamb=True)
    for _, theirs in pools(4)(loss_and_gradients, "one block", True):
        for a, b in zip(theirs, weights):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def some_gradients():
    a, b, c, d = (nn.Parameter(torch.zeros(3)) for _ in range(4))
    d.requires_grad_(False)
    a.grad = torch.full((3,), 1.0 + common.rank())           # on all ranks
    if common.rank() == 1:
        b.grad = torch.full((3,), 4.0)                       # on one of them
    common.average_gradients([a, b, c, d], bucket=4)
    return a.grad, b.grad, c.grad, d.grad


def test_a_missing_gradient_counts_as_zero_unless_nobody_has_one(pools):
    for a, b, c, d in pools(2)(some_gradients):
        assert torch.equal(a, torch.full((3,), 1.5)) and torch.equal(b, torch.full((3,), 2.0)) and c is None and d is None


@contextlib.contextmanager
def watched(params, started):
    """common.averaging in buckets of 2,048 numbers; tells `started` how many were on their way at the end of backward, and how many there are."""
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda *args, **how: (calls.append(how.get("group")), all_reduce(*args, **how))[1]
    try:
        with common.averaging(params, 2 ** 11):
            yield
            started.append(calls.count(common._own))
        started.append(calls.count(common._own))
    finally:
        dist.all_reduce = all_reduce


@contextlib.contextmanager
def afterwards(params, _):
    yield
    common.average_gradients(params, 2 ** 11)


def averaged(name, cfg, how, backend=None):
    """Gradients of a script's first step, and what `how` told."""
    script, started, caught, compile = importlib.import_module(name), [], [], torch.compile

    @contextlib.contextmanager
    def averaging(params):
        params = list(params)
        with how(params, started):
            yield
        caught.extend(None if p.grad is None else p.grad.clone() for p in params)
    torch.compile = lambda f: compile(f, backend=backend)
    script.averaging = averaging
    try:
        script.main(cfg)
    finally:
        script.averaging, torch.compile = common.averaging, compile
    return caught, started


@pytest.mark.parametrize("name,world,changes", [
    *((name, 2, {}) for name in ("align", "mug", "lcl", "timix", "m3i")), ("mug", 4, {}), ("m3i", 4, {}), ("align", 2, dict(micro=2)),
    ("lcl", 2, dict(micro=2)), ("timix", 2, dict(grad_checkpoint=True)), ("align", 2, dict(compile=True))])
def test_averaging_while_backward_runs_gives_to_the_bit_what_averaging_after_it_does(pools, tiny_world, tmp_path, name, world, changes):
    script = importlib.import_module(name)
    small = dict(image_size=16, patch=8, dim=16, depth=2, heads=2, text_dim=16, text_depth=1, text_heads=2, vocab_size=300, batch=16, steps=1,
                 workers=0, precision="fp32", eval_every=-1, data=[f"{tiny_world}/pairs"])
    small.update({"block": 4} if "block" in script.DEMO else {}, **({"labels": [f"{tiny_world}/labels"]} if name == "m3i" else {}))
    cfg = script.Config(**{**script.DEMO, **small, **changes})
    found = [pools(world)(averaged, name, replace(cfg, out=str(tmp_path / how.__name__)), how, "aot_eager") for how in (watched, afterwards)]
    for (early, (started, buckets)), (late, _) in zip(*found):
        assert started == buckets > 4                        # none waited for the end of backward
        assert any(g is not None for g in late) and [g is None for g in early] == [g is None for g in late]
        assert all(torch.equal(a, b) for a, b in zip(early, late) if a is not None)


def unlike_graphs(plain, again=False):
    """Rank 0 has no use for b, the others none for c, nobody for e; f was frozen since. Rank 0 sends c and d before it comes to the gather's
    backward, the others after."""
    e, a, b, d, c, f = parameters = [nn.Parameter(torch.full((2,), float(i), dtype=torch.float64)) for i in range(1, 7)]
    rank, started = common.rank(), []
    (f.sum() * 7).backward()
    f.requires_grad_(False)
    if again:                                                # gradients of a pass before count as well
        (a.sum() * (rank + 1)).backward()
    x = common.gather((a * (rank + 1) if rank == 0 else a * b)[:, None]).sum()
    x = x * d.sum() * (c.prod() if rank == 0 else 1)
    with contextlib.nullcontext() if plain else common.averaging(parameters, 2):
        x.backward()
    if plain:
        common.average_gradients(parameters, 2)
    return [p.grad for p in parameters]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_with_unlike_graphs_and_collectives_in_backward_average_alike(pools, world, again):
    want, found = (pools(world)(unlike_graphs, plain, again) for plain in (True, False))
    for grads, theirs in zip(found, want):
        assert [g is None for g in grads] == [True] + [False] * 5 and grads[5].tolist() == [7, 7]     # what is frozen is left alone
        assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(grads[1:], theirs[1:], want[0][1:]))


def second_after_a_failure():
    """A backward that raises in its middle on all ranks, then one that does not, in another model too."""
    class Fails(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())

        @staticmethod
        def backward(ctx, grad):
            raise ValueError("in the middle")
    models = [nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2)]
    with pytest.raises(ValueError, match="middle"), common.averaging(models[0].parameters(), 4):
        models[0][1](Fails.apply(models[0][0](torch.ones(2, 3)))).sum().backward()
    found = []
    for model in models:
        model.zero_grad()
        with common.averaging(model.parameters(), 4):
            model(torch.full((2, 3), 1.0 + common.rank())).sum().backward()
        found += [p.grad for p in model.parameters()]
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    return found


def test_a_backward_that_raised_leaves_nothing_behind(pools):
    for (a, b) in zip(*pools(2)(seeded, second_after_a_failure)):
        assert torch.equal(a, b) and a.abs().sum() > 0


def seeded(fn):
    torch.manual_seed(0)
    return fn()


def gather_gradient(weights):
    x = torch.full((2, 1), 1.0 + common.rank(), dtype=torch.float64, requires_grad=True)
    out = common.gather(x)
    (out[:, 0] * weights * (1 + common.rank())).sum().backward()
    return out.detach(), x.grad


def test_gather_keeps_rank_order_and_sums_gradients_over_ranks(pools):
    weights = torch.arange(4, dtype=torch.float64)
    for r, (out, grad) in enumerate(pools(2)(gather_gradient, weights)):
        assert out.flatten().tolist() == [1, 1, 2, 2]
        assert grad.flatten().tolist() == [3 * w for w in weights[2 * r:2 * r + 2].tolist()]         # factors 1 + 2 of the two ranks' losses


def unequal_rows():
    return evaluation.collect(torch.full((3 * common.rank(), 2), common.rank()))


def test_collect_joins_any_number_of_rows_without_padding(pools):
    for found in pools(4)(unequal_rows):
        assert found[:, 0].tolist() == [1] * 3 + [2] * 6 + [3] * 9


def run(cfg):
    torch.manual_seed(99 + common.rank())                    # what the process did before must not matter
    result = align.main(cfg)
    with open(f"{cfg.out}/log.jsonl") as f:
        return result, [json.loads(line) for line in f]


def gradients(cfg):
    """Gradients of the first step, caught where the optimiser would use them."""
    caught = []
    step, align.Lamb.step = align.Lamb.step, lambda opt: caught.extend(p.grad.clone() for g in opt.param_groups for p in g["params"])
    try:
        align.main(cfg)
    finally:
        align.Lamb.step = step
    return caught


@pytest.mark.parametrize("world", [2, 4])
def test_twenty_steps_log_the_same_losses_on_any_number_of_ranks(tiny, tiny_world, pools, world):
    cfg = replace(tiny, steps=20, eval_every=0, val=[f"{tiny_world}/pairs"], window=1)
    alone, log = run(replace(cfg, out=cfg.out + "1"))
    shared, theirs = pools(world)(run, replace(cfg, out=cfg.out + str(world), workers=int(world == 2)))[0]
    assert [r["step"] for r in theirs] == list(range(20))
    for a, b in zip(log, theirs):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4) and b["temperature"] == pytest.approx(a["temperature"], rel=1e-4)
    assert shared.keys() == alone.keys() and shared["i2t_r10"] == pytest.approx(alone["i2t_r10"], abs=0.02)      # weights differ in the last bits


@pytest.mark.parametrize("world", [2, 4])
def test_first_gradients_agree_on_any_number_of_ranks(tiny, pools, world):
    cfg = replace(tiny, steps=1)
    alone = gradients(replace(cfg, out=cfg.out + "1"))
    for theirs in pools(world)(gradients, replace(cfg, out=cfg.out + str(world))):
        for a, b in zip(theirs, alone):
            assert ((a - b).norm() / b.norm().clamp(min=1e-12)).item() < 1e-5


def evaluated(path, cfg):
    model, tokenizer, _, _ = evaluation.load(path)
    return evaluation.evaluate(model, tokenizer, cfg, torch.device("cpu"))


def test_evaluation_does_not_depend_on_the_number_of_ranks(tiny, tiny_world, pools):
    cfg = replace(tiny, steps=2, val=[f"{tiny_world}/pairs", f"{tiny_world}/labels"])
    align.main(cfg)
    alone = evaluated(f"{cfg.out}/last.pt", cfg)
    for theirs in pools(4)(evaluated, f"{cfg.out}/last.pt", cfg):
        assert theirs == alone


def stopped_by_a_signal_to_rank(victim, cfg):
    calls, following = [0], common.Log.next

    def next_and_signal(log, batches):
        calls[0] += 1
        if calls[0] == 3 and common.rank() == victim:
            os.kill(os.getpid(), signal.SIGTERM)
        return following(log, batches)
    common.Log.next = next_and_signal
    try:
        align.main(cfg)
    finally:
        common.Log.next = following
    return calls[0], common.read_checkpoint(f"{cfg.out}/last.pt")["step"] if common.rank() == 0 else None


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tiny, pools):
    (steps, saved), (theirs, _) = pools(2)(stopped_by_a_signal_to_rank, 1, replace(tiny, steps=50, save_every=50))
    assert steps == theirs == saved == 4                     # sent at step 3, read one step late, saved when that step was read clean


def not_finite_on_rank(victim, cfg):
    loss, calls = align.contrastive_loss, [0]

    def poisoned(*args):
        calls[0] += 1
        return loss(*args) * (float("nan") if calls[0] == 3 and common.rank() == victim else 1)
    align.contrastive_loss = poisoned
    try:
        align.main(cfg)
    except common.UserError as error:
        return calls[0], str(error)
    finally:
        align.contrastive_loss = loss


def test_a_nan_on_one_rank_stops_all_together_and_names_the_last_good_checkpoint(tiny, pools):
    first, second = pools(2)(not_finite_on_rank, 1, replace(tiny, steps=50, save_every=2))
    assert first == second and first[0] == 4                 # the loss of step 2 is read during step 3
    assert "step 2" in first[1] and "last.pt of step 2" in first[1]
    assert common.read_checkpoint(f"{tiny.out}/last.pt")["step"] == 2


def skipped(cfg):
    log = run(cfg)[1]
    return [r["skipped"] for r in log]


def test_skipped_samples_are_counted_over_all_ranks(tiny, pools, tmp_path):
    """Two of 40 samples have empty captions; in each epoch every sample is met once, whichever rank meets it."""
    import io, tarfile
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        picture = io.BytesIO()
        data.Image.new("RGB", (16, 16), "red").save(picture, "JPEG")
        for i in range(40):
            for suffix, raw in (("jpg", picture.getvalue()), ("txt", b" " if i in (3, 21) else b"a red square")):
                info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    cfg = replace(tiny, data=[str(tmp_path / "s.tar")], batch=20, steps=2, micro=0)
    alone = skipped(replace(cfg, out=cfg.out + "1"))
    shared = pools(2)(skipped, replace(cfg, out=cfg.out + "2"))[0]
    assert shared == alone and sum(alone) >= 2
