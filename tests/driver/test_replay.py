"""mode="reduce-overhead": what is recorded and what is declined; recordings by one that needs no GPU, and by CUDA graphs on a GPU."""

import pytest
import torch
from support import in_threads, on_gpu
from tilewright.driver import replay
from tilewright.driver.receipt import receipts
from tilewright.driver.replay import Replayed, device_to_record, refusal
from tilewright.ir.dims import SymbolRange, symbol
from tilewright.ir.graph import graph_input, make_graph
from tilewright.ir.ops import OPS
from tilewright.ir.types import TensorType
from tilewright.passes.base import Notes, Reason


def t(*shape, device="cuda:0"):
    return TensorType(torch.float32, shape, device)


def graph(outputs, *kinds, name="model", **fields):
    inputs = [graph_input(f"x{i}", kind) for i, kind in enumerate(kinds)]
    made = outputs(*inputs)
    return make_graph(name, inputs, made if isinstance(made, list) else [made], **fields)


def exp(x):
    return OPS["exp"](x)


REFUSED = {
    "sizes": (lambda: graph(exp, t(symbol("s"), 4), symbols={"s": SymbolRange(1, 9)}), Reason.VARYING_SIZE, "s"),
    "cpu": (lambda: graph(exp, t(4, device="cpu")), Reason.NOT_ON_ONE_GPU, "cpu"),
    "two": (lambda: graph(lambda x, y: [exp(x), exp(y)], t(4), t(4, device="cuda:1")), Reason.NOT_ON_ONE_GPU, "cuda:0, cuda:1"),
    "training": (lambda: graph(exp, t(4), name="model_forward"), Reason.TRAINING, "model_forward"),
    "a view of an input": (lambda: graph(lambda x: OPS["permute"](x, dims=(1, 0)), t(2, 3)), Reason.RETURNED, "permute"),
    "an output twice": (lambda: graph(lambda x: [y := exp(x), OPS["permute"](y, dims=(1, 0))], t(2, 3)), Reason.RETURNED, "permute"),
}  # fmt: skip


@pytest.mark.parametrize("make, reason, value", REFUSED.values(), ids=REFUSED)
def test_declined(make, reason, value):
    notes, made = Notes(), make()
    assert refusal(made) == (reason, value)
    assert device_to_record(made, notes) is None
    assert [(d.reason, d.value) for d in notes.declined] == [(reason, value)] and not notes.applied


def test_taken():
    notes = Notes()
    assert device_to_record(graph(lambda x, y: [exp(x), OPS["add"](x, y)], t(4), t(4)), notes) == "cuda:0"
    assert [a.what for a in notes.applied] == ["the launches of model on cuda:0"] and not notes.declined


class Fake:
    """Records nothing: runs again on the same tensors, and leaves the results in the same memory, as a recording does."""

    def __init__(self, fails=False):
        self.recorded, self.replays, self.fails, self.busy = 0, 0, fails, False

    def record(self, run, inputs, held):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recorded += 1
        own = [x if i in held else torch.empty_like(x) for i, x in enumerate(inputs)]
        return FakeRecording(self, run, own, run(list(inputs)))

    def ordered(self, work):
        return work()

    def idle(self):
        return not self.busy


class FakeRecording:
    def __init__(self, recorder, run, inputs, outputs):
        self.recorder, self.run, self.inputs, self.outputs = recorder, run, inputs, outputs

    def replay(self):
        self.recorder.replays += 1
        for old, new in zip(self.outputs, self.run(list(self.inputs))):
            old.copy_(new)


def scaled(inputs):
    x, w = inputs
    inputs.clear()
    return [(x * w).t(), x + w]


def test_replays():
    fake, w = Fake(), torch.randn(3, 4)
    called = Replayed(scaled, [1], 2, fake)
    results = []
    for n in range(4):
        x = torch.full((3, 4), float(n))
        given = [x, w]
        results.append((called(given), (x * w).t(), x + w))
        assert given == []
    for got, first, second in results:  # outputs of earlier calls stay what they are
        assert torch.equal(got[0], first) and torch.equal(got[1], second) and got[0].stride() == first.stride()
    assert (fake.recorded, fake.replays) == (1, 3)


class Deferring(Fake):
    """Does nothing while it records, as a device."""

    def record(self, run, inputs, held):
        self.recorded += 1
        own = [x if i in held else torch.empty_like(x) for i, x in enumerate(inputs)]
        return FakeRecording(self, run, own, run([x.clone() for x in inputs]))


def counted(inputs):
    """A step of decoding: notes what it is given in a cache, and goes on by one."""
    x, cache, position = inputs
    inputs.clear()
    cache[position] = x
    position += 1
    return [cache.sum(0)]


def test_what_is_written_is_written_where_it_lies(monkeypatch):
    cache, position = graph_input("cache", t(8, 3)), graph_input("position", t(1))
    x = graph_input("x", t(1, 3))
    made = make_graph("model", [x, cache, position], [OPS["exp"](cache)],
                      writes=[(cache, OPS["add"](cache, x)), (position, OPS["add"](position, 1.0))])  # fmt: skip
    assert refusal(made) is None
    fake = Deferring()
    monkeypatch.setattr(replay, "CudaRecorder", lambda device: fake)
    called = replay.replayed(counted, made, {}, "cuda:0")
    for recorded in (1, 2):  # another cache is recorded for itself
        theirs, at = torch.zeros(8, 3), torch.tensor([0])
        for n in range(5):
            value = torch.randn(1, 3)
            before = theirs.sum(0)
            (got,) = called([value, theirs, at])
            torch.testing.assert_close(got, before + value[0])
            assert at.item() == n + 1 and torch.equal(theirs[n], value[0])
        assert fake.recorded == recorded
    assert fake.replays == 8


def test_other_parameters_are_recorded_for_themselves():
    fake, x = Fake(), torch.randn(3, 4)
    called = Replayed(scaled, [1], 2, fake)
    layers = [torch.randn(3, 4) for _ in range(2)]
    for _ in range(3):
        for w in layers:
            assert torch.equal(called([x, w])[1], x + w)
    assert (fake.recorded, fake.replays) == (2, 4)
    layers[0].add_(1)  # changed where it lies: read there
    assert torch.equal(called([x, layers[0]])[1], x + layers[0]) and fake.recorded == 2


def test_a_call_that_someone_else_records_runs_as_ever():
    fake, w = Fake(), torch.randn(3, 4)
    called = Replayed(scaled, [1], 2, fake)
    for busy in (False, True, True, False, True, False):
        fake.busy = busy
        x = torch.randn(3, 4)
        assert torch.equal(called([x, w])[1], x + w)
    assert (fake.recorded, fake.replays) == (1, 2)


def test_inputs_of_any_layout():
    called = Replayed(scaled, [1], 2, Fake())
    w = torch.randn(3, 4)
    for x in (torch.randn(3, 4), torch.randn(4, 3).t(), torch.randn(1, 4).expand(3, 4)):
        assert torch.equal(called([x, w])[1], x + w)


def test_what_cannot_be_recorded_runs_as_ever():
    called = Replayed(scaled, [1], 2, Fake(fails=True))
    x, w = torch.randn(3, 4), torch.randn(3, 4)
    called([x, w])
    with pytest.warns(RuntimeWarning, match="cannot be recorded, and run as ever: operation not permitted"):
        called([x, w])
    assert torch.equal(called([x, w])[1], x + w)


def test_on_a_cpu_the_mode_is_declined():
    torch._dynamo.reset()
    model = torch.nn.Linear(3, 4)
    with torch.no_grad():
        x = torch.randn(2, 3)
        got = torch.compile(model, backend="tilewright", mode="reduce-overhead")(x)
        torch.testing.assert_close(got, model(x))
    assert ("record-launches", "not everything is on one GPU", "cpu") in [(r.rule, r.reason, r.value) for r in receipts()[-1].refused]


@on_gpu
@pytest.mark.parametrize("freeze", [False, True])
def test_on_a_gpu(freeze):
    torch._dynamo.reset()
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.LayerNorm(64), torch.nn.Linear(64, 8)).cuda().eval()
    compiled = torch.compile(model, backend="tilewright", options={"cuda_graphs": True, "freeze": freeze})
    with torch.no_grad():
        results = [(compiled(x), model(x)) for x in (torch.randn(5, 64, device="cuda") for _ in range(5))]
        for ours, theirs in results:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        side, x = torch.cuda.Stream(), torch.randn(5, 64, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            first = compiled(x)
        second = compiled(x + 1)
        side.synchronize()
        torch.testing.assert_close(first, model(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(second, model(x + 1), rtol=1e-4, atol=1e-5)
    assert "record-launches" in [a.rule for a in receipts()[-1].applied]


@on_gpu
def test_a_cache_on_a_gpu(fresh_dynamo):
    """A step that writes to what it is given, and to a buffer, some times."""

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(16, 16)
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x, cache, at):
            cache.index_copy_(0, at, self.layer(x))
            self.count += 1
            return cache.softmax(0) * self.count

    ours, theirs = Step().cuda().eval(), Step().cuda().eval()
    theirs.load_state_dict(ours.state_dict())
    compiled = torch.compile(ours, backend="tilewright", mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(2):
            caches = [torch.zeros(8, 16, device="cuda") for _ in range(2)]
            for n in range(6):
                x, at = torch.randn(1, 16, device="cuda"), torch.tensor([n], device="cuda")
                torch.testing.assert_close(compiled(x, caches[0], at), theirs(x, caches[1], at), rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(*caches, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.count, theirs.count) and "record-launches" in [a.rule for a in receipts()[-1].applied]


def test_threads_share_a_recording():
    fake, w = Fake(), torch.randn(3, 4)
    called = Replayed(scaled, [1], 2, fake)

    def work(i):
        for n in range(20):
            x = torch.full((3, 4), float(10 * i + n))
            assert torch.equal(called([x, w])[1], x + w)

    in_threads(work)
    assert fake.recorded == 1
