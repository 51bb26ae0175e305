"""What tests/bench/test_harness.py adds to the registry, in its own process and in those that a run starts."""

import torch

from bench.registry import Absent, Prepared, benchmark, peer, peers


@benchmark("tiny", ["4", "wrong"], ["4", "wrong"], peers=True)
def tiny(case, name):
    """Adds ones to [4]; the case "wrong" adds twos, which its check finds."""
    x = torch.zeros(4)
    calls = {"base": lambda: x + 1}
    about = {}
    if name:
        run = peers[name].build(None, x, x, 1)
        calls[name], about[name] = (lambda: run(x)), {"sqnr_db": 12.5}
    calls["ours"] = lambda: x + (2 if case == "wrong" else 1)
    assert torch.equal(calls["ours"](), torch.ones(4)), "the sum is off"
    return Prepared(calls, {"ours": {"sqnr_db": 50.0}, **about})


@peer("fake")
def fake(model, images, example, threads):
    return lambda x: x + 1


@peer("refusing")
def refusing(model, images, example, threads):
    raise Absent("takes no tensors of four")


@peer("dying")
def dying(model, images, example, threads):
    import os
    import sys

    print("out of everything", file=sys.stderr, flush=True)
    os._exit(7)


@peer("not installed", needs=["no_such_module"])
def not_installed(model, images, example, threads):
    raise AssertionError("is not even tried")


@peer("wide", overrides=None)
def wide(model, images, example, threads):
    return lambda x: x + 1
