"""Subjects of tests/bench.py: how much of the averaging of gradients is hidden behind backward; two gloo processes, a thread each."""
import contextlib, ctypes, functools, os, socket, statistics, subprocess, sys, time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import common
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import align
from common import ViT


@contextlib.contextmanager
def link(rate):
    """Names of two network namespaces that a link of this rate (as tc says it) joins: a network that takes its time, but no processor, as gloo's own
    way through this machine's memory does. Linux, root, iproute2."""
    names = [f"bench-{os.getpid()}-{i}" for i in range(2)]
    run = lambda line, **how: subprocess.run(line.split(), **how)
    try:
        for name in names:
            run(f"ip netns add {name}", check=True)
        run(f"ip link add wire netns {names[0]} type veth peer name wire netns {names[1]}", check=True)
        for i, name in enumerate(names):
            for line in (f"ip -n {name} address add 10.0.0.{i + 1}/24 dev wire", f"ip -n {name} link set wire up", f"ip -n {name} link set lo up",
                         f"tc -n {name} qdisc add dev wire root tbf rate {rate} burst 256kb latency 100ms"):
                run(line, check=True)
        yield names
    finally:
        for name in names:
            run(f"ip netns delete {name}", stderr=subprocess.DEVNULL)


def _averaging_rank(rank, port, repeats, results, namespaces=None):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if namespaces:
        os.environ.update(MASTER_ADDR="10.0.0.1", GLOO_SOCKET_IFNAME="wire")
        if ctypes.CDLL(None, use_errno=True).setns(os.open(f"/run/netns/{namespaces[rank]}", os.O_RDONLY), 0):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespaces[rank]}")
    torch.set_num_threads(1)
    device, found = common.join(), {}
    demo = align.ALIGN(align.Config(**align.DEMO)).to(device)
    images, tokens = torch.randint(0, 256, (32, 3, 48, 48), dtype=torch.uint8, device=device), torch.randint(8, 500, (32, 16), device=device)
    vit = ViT(224, 16, 384, 12, 6).to(device)
    for name, model, loss in (("ALIGN demo, 32 pairs", demo, lambda: sum(x.sum() for x in demo(images, tokens, tokens > 0))),
                              ("ViT-S/16, 6 images", vit, lambda: vit(torch.ones(6, 3, 224, 224, device=device)).square().mean())):
        def timed(work):                                     # together with the other rank
            dist.barrier()
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - began

        def step(routes):
            model.zero_grad(set_to_none=True)
            total = loss()
            return [timed(functools.partial(route, total)) for route in routes]

        def average(_):
            common.average_gradients(model.parameters())

        def one_after_the_other(total):
            total.backward()
            average(total)

        def overlapped(total):
            with common.averaging(model.parameters()):
                total.backward()
        taken = []
        for _ in range(repeats + 1):
            taken.append(step([torch.Tensor.backward, average]) + step([one_after_the_other]) + step([overlapped]))
        found[name] = [statistics.median(t) for t in zip(*taken[1:])], sum(p.numel() for p in model.parameters())
    if rank == 0:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()


def averaging_over_a_link(rate="1gbit", repeats=5):
    """The same over a link that is slower than this machine's memory, as between machines."""
    with link(rate) as namespaces:
        for what, *rest in averaging_behind_backward(repeats, namespaces):
            yield f"over a {rate} link: {what}", *rest


def averaging_behind_backward(repeats=7, namespaces=None):
    """Backward alone, with the averaging after it, and with the averaging while it runs; what the averaging costs by itself. The demo fits in one
    bucket, so nothing of it can be hidden."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_averaging_rank, args=(r, port, repeats, results, namespaces)) for r in range(2)]
    for p in ranks:
        p.start()
    found = results.get(timeout=600)
    for p in ranks:
        p.join()
    for name, ((alone, average, after, overlapped), numbers) in found.items():
        yield f"{name} a rank, {numbers / 1e6:.1f} M parameters: averaging alone / backward alone", average / alone, "-"
        yield f"{name}: backward, then averaging / backward alone", after / alone, "-"
        yield f"{name}: backward with averaging / backward alone", overlapped / alone, "<= 1.1"
        yield f"{name}: share of the averaging that is hidden", (alone + average - overlapped) / average, "-" if numbers < 2 ** 22 else ">= 0.8"
