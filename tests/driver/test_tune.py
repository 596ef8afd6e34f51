"""Never slower: rewrites that do not gain are taken back, and the receipt shows it."""

import functools
import time

import pytest
import tilewright
import torch
from support import NATIVE
from tilewright.driver import measure, tune
from tilewright.driver import optimize as door
from tilewright.driver.accuracy import check
from tilewright.driver.compile import Options
from tilewright.driver.receipt import Receipt
from tilewright.driver.tune import compile_tuned
from tilewright.ir.graph import order
from tilewright.ir.interpret import interpret
from tilewright.ir.text import parse
from tilewright.search.database import Database, Timing
from tilewright.search.examples import example_inputs
from tilewright.search.providers import Provided, alone, providers, unpacked
from tilewright.search.tuner import Verdict

pytestmark = [pytest.mark.usefixtures("fresh_dynamo", "own_database"), NATIVE]

W = {"w": torch.randn(96, 64), "v": torch.randn(64, 96), "c": torch.randn(96)}
TEXT = """graph g(x: f32[b, 64]) {
  w = constant "w"
  v = constant "v"
  c = constant "c"
  h = linear(x, w, c)
  g = gelu(h)
  y = linear(g, v)
  z = add(y, x)
  p = softmax(z, dim=1)
  return p
}"""


SLOW = 10e-3


@pytest.fixture
def own_database(monkeypatch, tmp_path):
    """Nothing is remembered; and one thread, which waits for no other where the machine is busy."""
    monkeypatch.setattr(tune, "Database", lambda: Database(tmp_path / "t.sqlite"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def slowed(monkeypatch):
    """slowed("pack-weights"): programs compiled with that pass take ten milliseconds longer; "": with any pass."""
    real = tune.compile_graph

    def slow(name):
        def compiled(graph, options, notes=None, passes=None, schedules=None):
            made = real(graph, options, notes, passes, schedules or {})
            if passes and (not name or any(p.name == name for p in passes)):
                made.program.run = functools.partial(late, made.program.run)
            return made

        monkeypatch.setattr(tune, "compile_graph", compiled)

    def late(run, inputs):
        time.sleep(SLOW)
        return run(inputs)

    return slow


def tuned(**options):
    graph = parse(TEXT, W)
    return compile_tuned(graph, Options(max_autotune=True, **options), example_inputs(graph))


def trials(receipt):
    return {t.what: t for t in receipt.trials}


def assert_right(program):
    x = torch.randn(5, 64)
    h = torch.nn.functional.gelu(x @ W["w"].t() + W["c"]) @ W["v"].t()
    torch.testing.assert_close(program([x])[0], (h + x).softmax(1), rtol=1e-4, atol=1e-5)


def test_a_slow_group_is_rolled_back(slowed):
    slowed("pack-weights")
    made = tuned()
    trial = trials(made.receipt)["native contractions"]
    assert not trial.kept and trial.with_it > trial.without + SLOW / 2
    assert not any(a.rule == "pack-weights" for a in made.receipt.applied) and made.receipt.kernels
    assert_right(made.program)
    assert Receipt.from_json(made.receipt.to_json()) == made.receipt


def test_all_of_them_can_be_rolled_back(slowed):
    slowed("")
    made = tuned()
    assert not trials(made.receipt)["all rewrites"].kept and not made.receipt.kernels
    assert_right(made.program)


def test_the_receipt_prints_what_was_rolled_back(slowed, capsys):
    slowed("pack-weights")
    tuned().receipt.render()
    line = next(line for line in capsys.readouterr().out.splitlines() if "native contractions" in line)
    assert "slower, rolled back" in line


def test_what_was_measured_is_remembered(slowed, monkeypatch):
    slowed("pack-weights")
    first = tuned()
    monkeypatch.setattr(tilewright.search.tuner, "fastest", lambda *args: pytest.fail("measured again"))
    again = tuned()
    assert again.receipt.trials == first.receipt.trials and again.program.source == first.program.source


def test_without_time_only_all_rewrites_are_measured():
    made = tuned(tuning_seconds=0.0)
    *groups, last = made.receipt.trials
    assert groups and all(t.kept and "used up" in t.note for t in groups)
    assert last.what == "all rewrites" and last.with_it > 0
    assert_right(made.program)


def test_a_fault_of_an_alternative_costs_nothing(monkeypatch):
    real = tune.compile_graph

    def broken(graph, options, notes=None, passes=None, schedules=None):
        if not passes or any(p.name == "pack-weights" for p in passes):
            return real(graph, options, notes, passes)
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(tune, "compile_graph", broken)
    with pytest.warns(RuntimeWarning, match="oops"):
        made = tuned()
    assert "ZeroDivisionError" in trials(made.receipt)["native contractions"].note
    assert_right(made.program)


def test_random_numbers_are_not_drawn_from_the_users():
    graph = parse(TEXT, W)
    torch.manual_seed(5)
    want = torch.randn(3)
    torch.manual_seed(5)
    with torch.random.fork_rng(devices=()):
        inputs = example_inputs(graph)
    compile_tuned(graph, Options(max_autotune=True), inputs)
    assert torch.equal(torch.randn(3), want)


def test_each_contraction_has_a_provider(tmp_path):
    graph = tuned(tuning_seconds=0.0).graph
    found = providers(graph, Database(tmp_path / "p.sqlite"), time.perf_counter() + 20)
    assert {name for p in found for name in p.weights} == {"w.panels", "v.panels"}
    assert all(set(p.verdict.timings) == {"native", "vendor"} for p in found)
    region = next(n for n in order(graph) if n.op.name == "region" and "gelu" in n.attrs["label"])
    single = alone(region, graph)
    plain = unpacked(single)
    inputs = example_inputs(single)
    torch.testing.assert_close(interpret(plain, inputs), interpret(single, inputs), rtol=1e-4, atol=1e-4)
    assert [tuple(n.shape) for n in order(plain) if n.op.name == "constant" and n.tensor.rank > 1] == [(96, 64)]


def test_contractions_that_the_library_does_faster_go_there(monkeypatch):
    verdict = Verdict("vendor", "native", {"native": Timing(2.0), "vendor": Timing(1.0)})
    monkeypatch.setattr(tune, "providers", lambda *args: [Provided("linear+gelu", ("w.panels",), verdict)])
    monkeypatch.setattr(tune, "GROUPS", ())
    real = tune.remembered
    faked = lambda key, database, make, *rest: real(key, database, lambda: _slower(make()), *rest)  # noqa: E731
    monkeypatch.setattr(tune, "remembered", faked)

    def _slower(runs):
        return {"with": lambda: (time.sleep(SLOW), runs["with"]()), "without": runs["without"]}

    made = tuned()
    assert not trials(made.receipt)["native: linear+gelu"].kept
    assert_right(made.program)


def test_optimize_is_never_slower_than_eager(slowed, monkeypatch):
    slowed("")
    monkeypatch.setattr(measure, "MEASURE_SECONDS", 0.2)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.LayerNorm(64)).eval()
    made = tilewright.optimize(model, (torch.randn(64, 64),))
    assert not made.receipt.kernels and not trials(made.receipt)["all rewrites"].kept
    assert made.receipt.speed.ours < made.receipt.speed.eager + SLOW / 2


def test_slow_beside_eager_is_rolled_back_too(monkeypatch):
    """What tuning did not see, because it was not given the time."""
    real = door.compile_tuned

    def compiled(*args):
        made = real(*args)
        run = made.program.run
        made.program.run = lambda inputs: (time.sleep(SLOW), run(inputs))[1]
        return made

    monkeypatch.setattr(door, "compile_tuned", compiled)
    monkeypatch.setattr(measure, "MEASURE_SECONDS", 0.2)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU()).eval()
    made = tilewright.optimize(model, (torch.randn(64, 64),), tuning_seconds=0.01)
    assert not trials(made.receipt)["all rewrites, against eager"].kept and not made.receipt.kernels
    assert made.receipt.speed.ours < SLOW


def test_optimize_leaves_buffers_as_they_were():
    class Counter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            self.count.add_(1)
            return x.exp() * self.count

    model = Counter()
    made = tilewright.optimize(model, (torch.ones(4),))
    assert model.count == 0
    torch.testing.assert_close(made(torch.ones(4)), torch.ones(4).exp())
    torch.testing.assert_close(made(torch.ones(4)), torch.ones(4).exp() * 2)


class Cache(torch.nn.Module):
    """Remembers 4 tokens, the place of the next one in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.zeros(2, 4, 8))
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))

    def forward(self, x):
        self.kept.index_copy_(1, self.count.clone(), x)
        self.count.add_(1)
        return self.kept.sum(1).exp()


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("seconds", [0, 2])
def test_a_cache_is_not_filled_by_measuring(seconds):
    """Each timed call is a first one: eager, ours, and ours without one of the rewrites."""
    made = tilewright.optimize(Cache(), (torch.full((2, 1, 8), 0.1),), tuning_seconds=seconds)
    assert not any("compare" in t.note or "internal" in t.note for t in made.receipt.trials)
    for i in range(4):
        torch.testing.assert_close(made(torch.full((2, 1, 8), 0.1)), torch.full((2, 8), 0.1 * (i + 1)).exp())
    with pytest.raises(IndexError):
        made(torch.ones(2, 1, 8))


def test_a_cache_among_the_arguments_is_not_filled_by_measuring():
    class Step(torch.nn.Module):
        def forward(self, x, kept, count):
            kept.index_copy_(1, count.clone(), x)
            count.add_(1)
            return kept.sum(1).exp()

    given = torch.full((2, 1, 8), 0.1), torch.zeros(2, 4, 8), torch.zeros(1, dtype=torch.long)
    made = tilewright.optimize(Step(), given, tuning_seconds=0.5)
    kept, count = torch.zeros(2, 4, 8), torch.zeros(1, dtype=torch.long)
    for i in range(4):
        torch.testing.assert_close(made(given[0], kept, count), torch.full((2, 8), 0.1 * (i + 1)).exp())


def new_receipts(run):
    start = len(tilewright.receipts())
    result = run()
    return result, tilewright.receipts()[start:]


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, max_position_embeddings=64
    )
    return transformers.BertModel(config).eval(), {"input_ids": torch.randint(0, 64, (2, 32))}


@torch.no_grad()
@pytest.mark.parametrize("options", [{"max_autotune": True}, {"max_autotune": True, "freeze": True}])
def test_torch_compile_tunes(options):
    model, inputs = bert()
    fast = torch.compile(model, backend="tilewright", options=options)
    out, made = new_receipts(lambda: fast(**inputs).last_hidden_state)
    want = model.double()(**inputs).last_hidden_state
    model.float()
    result = check(out, model(**inputs).last_hidden_state, want)
    assert result.ok, result
    assert all(r.trials and "tune" in r.seconds for r in made if r.kernels)


def test_the_mode_is_the_option():
    run = torch.compile(lambda x: x.exp() + 1, backend="tilewright", mode="max-autotune")
    out, (receipt,) = new_receipts(lambda: run(torch.zeros(1000)))
    assert (out == 2).all() and "all rewrites" in trials(receipt)


def test_a_list_of_passes_is_not_questioned():
    run = torch.compile(lambda x: x.exp() + 1, backend="tilewright", options={"max_autotune": True, "passes": "canonicalize,fuse-regions"})
    _, (receipt,) = new_receipts(lambda: run(torch.zeros(10)))
    assert not receipt.trials


def test_training_is_tuned_too():
    layer = torch.nn.Linear(8, 8)
    run = torch.compile(lambda x: layer(x).relu().sum(), backend="tilewright", mode="max-autotune")
    _, made = new_receipts(lambda: run(torch.randn(4, 8)).backward())
    assert layer.weight.grad is not None and all(r.trials for r in made if r.kernels)
