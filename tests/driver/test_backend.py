"""torch.compile(backend="tilewright"): equal to eager in values, strides, aliasing and gradients; receipts say what happened."""

import copy
import subprocess
import sys

import pytest
import tilewright
import torch
from support import NATIVE, in_threads
from tilewright.driver import backend as door
from tilewright.driver.accuracy import check
from tilewright.driver.backend import checked_options
from tilewright.driver.errors import BadOption
from tilewright.driver.receipt import Receipt
from tilewright.ir.errors import CaptureError, TilewrightError
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounterWithBackend

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def mlp():
    return torch.nn.Sequential(
        torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.LayerNorm(32), torch.nn.Linear(32, 8), torch.nn.Softmax(-1)
    )


def compiled(function, **options):
    return torch.compile(function, backend="tilewright", options=options)


def new_receipts(run):
    start = len(tilewright.receipts())
    result = run()
    return result, tilewright.receipts()[start:]


def assert_like_eager(function, *values):
    """Same values, strides, dtypes, and inputs afterwards."""
    mine, theirs = copy.deepcopy(values), copy.deepcopy(values)
    got, want = compiled(function)(*mine), function(*theirs)
    for a, b in zip((*_flat(got), *mine), (*_flat(want), *theirs), strict=True):
        torch.testing.assert_close(a, b)
        assert a.stride() == b.stride()
    return got


def _flat(value):
    return [value] if isinstance(value, torch.Tensor) else list(value)


def test_inference_matches_float64():
    model, x = mlp().eval(), torch.randn(4, 16)
    with torch.no_grad():
        result = check(compiled(model)(x), model(x), copy.deepcopy(model).double()(x.double()))
    assert result.ok, result


def test_training_gradients_match():
    model = mlp()
    twin, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    x = torch.randn(4, 16)
    outputs = [compiled(model)(x), twin(x), wide(x.double())]
    for output in outputs:
        output.square().sum().backward()
    gradients = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, twin, wide)]
    assert check(*gradients).ok and check(*outputs).ok


def test_a_training_loop_converges_like_eager():
    losses = []
    for wrap in (lambda m: m, compiled):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        run, optimizer = wrap(model), torch.optim.SGD(model.parameters(), 0.1)
        x = torch.randn(32, 4)
        for _ in range(20):
            optimizer.zero_grad()
            loss = (run(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[1] < 1


def test_dynamic_shapes_compile_once():
    def f(x, w):
        return torch.softmax(x @ w, -1).flatten(), x.shape[0] * 2

    counter = CompileCounterWithBackend("tilewright")
    run = torch.compile(f, backend=counter, dynamic=True)
    w = torch.randn(6, 5)
    for n in (3, 8, 5, 64):
        x = torch.randn(n, 6)
        out, size = run(x, w)
        torch.testing.assert_close(out, f(x, w)[0])
        assert size == 2 * n
    assert counter.frame_count == 1


def test_each_recompilation_has_a_receipt():
    run = torch.compile(lambda x: x.exp() + 1, backend="tilewright", dynamic=False)
    _, made = new_receipts(lambda: [run(torch.randn(n)) for n in (3, 4, 3)])
    assert len(made) == 2


def test_mutation():
    def f(x, y):
        x.add_(y)
        y.mul_(x.sum())
        x[1:].copy_(y[:-1])
        return x * 2

    assert_like_eager(f, torch.randn(4, 4), torch.randn(4, 4))


READS = {
    "embedding": (lambda at, table: torch.nn.functional.embedding(at, table) * 2, False),
    "index_select": (lambda at, table: table.index_select(1, at) * 2, False),
    "gather": (lambda at, table: table.gather(1, at.expand(9, 3)) * 2, False),
    "index": (lambda at, table: table[at] * 2, True),
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_positions_out_of_range_are_errors(name, dynamic):
    """Never a wrong row, silently; what eager wraps is wrapped."""
    read, wraps = READS[name]
    table = torch.randn(9, 9)
    ours = torch.compile(read, backend="tilewright", dynamic=dynamic)
    assert torch.equal(ours(torch.tensor([0, 8, 3]), table), read(torch.tensor([0, 8, 3]), table))
    for wrong in (9, -1, -10):
        at = torch.tensor([0, wrong, 3])
        if wraps and wrong == -1:
            assert torch.equal(ours(at, table), read(at, table))
            continue
        with pytest.raises((IndexError, RuntimeError)):
            read(at, table)
        with pytest.raises(IndexError, match=r"index out of range in \w+ \(at .*test_backend.py:\d+\)"):
            ours(at, table)
    assert torch.equal(ours(torch.tensor([0, 8, 3]), table), read(torch.tensor([0, 8, 3]), table))


def test_buffers_are_updated():
    model = torch.nn.BatchNorm1d(4)
    twin = copy.deepcopy(model)
    x = torch.randn(8, 4)
    torch.testing.assert_close(compiled(model)(x), twin(x))
    torch.testing.assert_close(model.running_var, twin.running_var)
    assert model.num_batches_tracked == 1


def test_swapped_inputs():
    def f(x, y):
        old = x.clone()
        x.copy_(y)
        y.copy_(old)
        return old

    assert_like_eager(f, torch.randn(4), torch.randn(4))


def test_aliases_are_as_in_eager():
    def f(x, y):
        z = y.exp()
        return x, x.t(), x[1], x.clone(), z, z.t(), z.clone(), y + 0

    x, y = torch.randn(5, 4)[1:], torch.randn(4, 4)
    got, want = compiled(f)(x, y), f(x, y)
    base = lambda t: t.untyped_storage().data_ptr()  # noqa: E731
    for i in range(len(got)):
        torch.testing.assert_close(got[i], want[i])
        assert got[i].stride() == want[i].stride() and got[i].storage_offset() == want[i].storage_offset()
        for j in range(i):
            assert (base(got[i]) == base(got[j])) == (base(want[i]) == base(want[j])), (i, j)
        assert (base(got[i]) == base(x)) == (base(want[i]) == base(x))
        assert base(got[i]) != base(y)


def test_equal_results_stay_apart():
    def f(x):
        return x + 1, x + 1, (x + 1).view(-1)

    a, b, c = compiled(f)(torch.zeros(2, 2))
    a.fill_(7)
    assert (b == 1).all() and (c == 1).all()


def test_strides_of_outputs():
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    convolution = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert_like_eager(lambda x: (convolution(x).relu(), x * 2, x.permute(0, 2, 3, 1).contiguous(), x.sum(1).expand(3, 2, 4, 4)), x)


def test_inputs_that_are_not_contiguous():
    assert_like_eager(lambda x, y: x.exp() + y, torch.randn(4, 6).t(), torch.randn(6, 8)[:, ::2])


def test_integers_bools_scalars_and_empties():
    def f(x, m, e, s):
        return x // 3 + m, torch.where(m, x, -x), e.sum(0), e * 2, s * x

    assert_like_eager(f, torch.arange(-4, 4), torch.arange(8) % 2 == 0, torch.randn(0, 3), torch.tensor(2.5))


def test_constants_inside_the_model_are_real_tensors():
    def f(x):
        table = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        return x @ table.t(), table[x.argmax(-1)], torch.arange(2) * x

    _, (receipt,) = new_receipts(lambda: assert_like_eager(f, torch.randn(3, 2)))
    assert not receipt.failure


def test_random_numbers_are_eagers():
    dropout = torch.nn.Dropout(0.5)
    run = compiled(lambda x: dropout(x) * 2)
    x = torch.randn(64)
    torch.manual_seed(3)
    want = dropout(x) * 2
    torch.manual_seed(3)
    torch.testing.assert_close(run(x), want)


def test_threads():
    model, x = mlp().eval(), [torch.randn(n, 16) for n in (1, 2, 3, 8)]
    with torch.no_grad():
        run = torch.compile(model, backend="tilewright", dynamic=True)
        run(x[1]), run(x[2])

    def work(i):
        with torch.no_grad():
            for _ in range(30):
                assert torch.allclose(run(x[i]), model(x[i]), atol=1e-5)

    in_threads(work)


@NATIVE
def test_the_receipt_says_what_runs_where():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(16, 16)

        def forward(self, x):
            h = self.fc(x)
            h = h.relu() + x
            return torch.sort(h).values.softmax(-1)

    with torch.no_grad():
        _, (receipt,) = new_receipts(lambda: compiled(Block())(torch.eye(16)))
    assert [k.label for k in receipt.kernels] == ["add+relu", "softmax"]  # the bias is added in the kernel
    assert all(s.startswith("test_backend.py:") for k in receipt.kernels for s in k.sources)
    assert [c.node for c in receipt.library] == ["linear"]
    assert [(f.node.startswith("aten.sort"), f.reason, bool(f.source)) for f in receipt.fallbacks] == [(True, "no native form", True)]
    nodes = receipt.coverage.nodes
    assert (nodes.library, nodes.fallback) == (1, 1) and nodes.total == nodes.kernels + 2
    assert receipt.coverage.flops.library >= 2 * 16**3 and receipt.coverage.bytes.kernels > 0
    assert receipt.refused and {"fuse-regions", "lower", "compile"} <= receipt.seconds.keys()
    assert Receipt.from_json(receipt.to_json()) == receipt


def test_the_receipt_is_printed(capsys):
    _, (receipt,) = new_receipts(lambda: compiled(lambda x: x.exp().sum())(torch.randn(8)))
    receipt.render(details=True)
    shown = capsys.readouterr().out
    assert "coverage" in shown and "plan-memory" in shown and receipt.graph in shown


def test_without_a_compiler_everything_runs_by_eager(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    model, x = mlp().eval(), torch.randn(4, 16)
    with torch.no_grad(), pytest.warns(UserWarning, match="no C.. compiler"):
        out, (receipt,) = new_receipts(lambda: compiled(model)(x))
    torch.testing.assert_close(out, model(x))
    assert not receipt.kernels and all("no C++ compiler" in f.reason for f in receipt.fallbacks)


def test_a_graph_that_cannot_be_captured_runs_by_eager(monkeypatch):
    def refuse(*args):
        raise CaptureError(reason="it is Tuesday")

    monkeypatch.setattr("tilewright.ir.capture.aot.capture_fx", refuse)
    out, (receipt,) = new_receipts(lambda: compiled(lambda x: x.exp() + 1)(torch.zeros(3)))
    assert (out == 2).all() and "it is Tuesday" in receipt.failure and receipt.coverage.nodes.fallback == 2
    receipt.render()


def test_a_fault_of_ours_runs_by_eager_and_says_so(monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(door, "compile_graph", broken)
    with pytest.warns(RuntimeWarning, match="please report this.*oops"):
        out, (receipt,) = new_receipts(lambda: compiled(lambda x: x.exp() + 1)(torch.zeros(3)))
    assert (out == 2).all() and "ZeroDivisionError: oops" in receipt.failure


@pytest.mark.parametrize(
    "mode, options, message",
    [
        ("fastest", None, "mode='fastest': not available; modes are default, max-autotune, reduce-overhead"),
        (
            None,
            {"colour": 1},
            "there is no such option; options are passes, verify, freeze, offload, max_autotune, tuning_seconds, ",
        ),
        (None, {"tuning_seconds": True}, "it must be a float, not True"),
        (None, {"verify": "yes"}, "it must be a bool, not 'yes'"),
        (None, {"passes": "fuse-everything"}, "there is no pass 'fuse-everything'"),
    ],
)
def test_bad_options_are_one_clear_sentence(mode, options, message):
    with pytest.raises(TilewrightError, match=None) as caught:
        checked_options(mode, options)
    assert message in str(caught.value)


def test_bad_options_reach_the_user():
    with pytest.raises(BackendCompilerFailed, match="there is no such option"):
        compiled(lambda x: x + 1, colour="red")(torch.randn(2))
    assert issubclass(BadOption, TilewrightError)


def test_options_choose_passes_verify_and_dump(tmp_path):
    run = compiled(lambda x: x.exp() + 1, passes="canonicalize,fuse-regions", verify=True, dump=str(tmp_path))
    _, (receipt,) = new_receipts(lambda: run(torch.zeros(3)))
    assert receipt.arena == "0"
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["model.00.canonicalize.txt", "model.01.fuse-regions.txt", "model.program", "model.receipt.json"]


def test_importing_is_light():
    code = "import sys, tilewright; tilewright.receipts; assert not [m for m in sys.modules if m.startswith('torch._inductor')]"
    subprocess.run([sys.executable, "-c", code], check=True)
    subprocess.run([sys.executable, "-c", "import sys, tilewright; assert 'torch' not in sys.modules"], check=True)


def test_the_entry_point_is_registered():
    assert "tilewright" in torch.compiler.list_backends(exclude_tags=())
