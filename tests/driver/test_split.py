"""A model cut into stages: called one after the other they are the model; as artifacts, by the command, and where it is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tilewright
import torch
from support import NATIVE
from tilewright.driver import cli
from tilewright.driver.artifact import load
from tilewright.driver.errors import BadOption, CannotOptimize
from tilewright.driver.goal import Goal, goal_from
from tilewright.driver.split import stage_paths
from tilewright.ir.graph import constants
from tilewright.search.stages import CannotSplit, Link, Machine

pytestmark = NATIVE
torch.manual_seed(0)


class Masked(torch.nn.Module):
    """Tokens, of which some are masked in every layer; more than one result."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(20, 16)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(4))

    def forward(self, ids: torch.Tensor, inside: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.words(ids)
        for layer in self.layers:
            x = x + torch.relu(layer(x)) * inside.to(x.dtype)[..., None]
        return {"x": x, "inside": inside}


IDS, INSIDE = torch.randint(0, 20, (2, 5)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
CHEAP = {"measure": False}


def test_the_stages_in_sequence_are_the_model(tmp_path: Path) -> None:
    model = Masked().eval()
    made = tilewright.split(model, (IDS, INSIDE), stages=3)
    wanted, found = model(IDS, INSIDE), made(IDS, inside=INSIDE)
    torch.testing.assert_close(found["x"], wanted["x"])
    assert torch.equal(found["inside"], INSIDE) and made.error.ok
    held = [set(constants(s.graph)) for s in made.stages]
    assert not held[0] & held[1] and not held[1] & held[2] and all(held)

    first, *others = (load(path) for path in made.save(tmp_path / "model.tw", levels=()))
    values = first(IDS, inside=INSIDE)
    for stage in others:
        values = stage(*values)
    assert torch.equal(values["x"], found["x"])
    assert first.convention.names == ("ids", "inside") and "inside" in others[0].convention.names


def test_what_crosses_in_8_bits_has_its_error_measured() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(4))).eval()
    x = torch.randn(4, 32)
    exact, rounded = (tilewright.split(model, (x,), round_cut=on, **CHEAP) for on in (False, True))
    assert rounded.nbytes[0] == 4 * 32 + 4 * 4 and exact.nbytes[0] == 4 * 32 * 4
    assert exact.error.ours < 1e-6 < rounded.error.ours < 0.02
    with pytest.raises(CannotOptimize, match="with 8 bits for what crosses, results are off by"):
        tilewright.split(model, (x,), round_cut=True, max_error=1e-6, **CHEAP)


def test_a_head_for_a_small_machine_sends_least() -> None:
    narrow = torch.nn.Sequential(
        torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 64), torch.nn.Linear(64, 64)
    )
    made = tilewright.split(narrow.eval(), (torch.randn(16, 32),), objective="traffic", shares=(0.8, 1.0), **CHEAP)
    assert made.nbytes == (16 * 8 * 4,)
    with pytest.raises(CannotSplit, match="the memory of stage 1 .* is too little"):
        tilewright.split(narrow, (torch.randn(16, 32),), machines=(Machine(memory=100), Machine()), **CHEAP)


class Counting(torch.nn.Module):
    """Updates a buffer in its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (torch.nn.Linear(8, 8) for _ in range(3))
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        self.seen += x.sum(0)
        return self.third(torch.relu(self.second(x + self.seen)))


def test_state_stays_with_its_stage() -> None:
    model, other = Counting().eval(), Counting().eval()
    other.load_state_dict(model.state_dict())
    made = tilewright.split(model, (torch.randn(4, 8),), **CHEAP)
    assert sum(len(s.state) for s in made.stages) == 1
    for _ in range(3):
        x = torch.randn(4, 8)
        torch.testing.assert_close(made(x), other(x))


def test_an_argument_that_is_written_to_is_refused() -> None:
    class Writing(torch.nn.Module):
        def forward(self, x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
            cache += x
            return torch.relu(cache)

    with pytest.raises(CannotOptimize, match="it writes to its argument cache"):
        tilewright.split(Writing(), (torch.randn(4), torch.zeros(4)), **CHEAP)


def test_a_size_may_vary() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3))).eval()
    made = tilewright.split(model, (torch.randn(4, 8),), dynamic={"input": {0: "n"}}, **CHEAP)
    x = torch.randn(7, 8)
    torch.testing.assert_close(made(x), model(x))


def test_a_batch_goes_in_parts_where_stages_overlap() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4))).eval()
    made, alone = (tilewright.split(model, (torch.randn(rows, 8),), **CHEAP) for rows in (6, 1))
    even = replace(made.staged, seconds=(1.0, 1.0), link_seconds=(0.0,))
    found = replace(made, staged=even).micro_batches()
    assert found.pays and found.parts == (1,) * 6 and found.seconds == pytest.approx(7 / 6, rel=1e-3)
    one_sided = replace(made.staged, seconds=(1e3, 0.0), link_seconds=(0.0,))
    assert "of the time" in replace(made, staged=one_sided).micro_batches().reason
    assert replace(alone, staged=even).micro_batches().reason == "a batch of one has no parts"


def test_a_goal_of_a_command_line() -> None:
    goal = goal_from(3, "latency", memory="1MB,-,2GB", compute="20%,-,-", slowness="5,1,1", bandwidth="10MB/s", delay="5ms")
    assert [m.memory for m in goal.machines] == [1e6, float("inf"), 2e9] and goal.shares[0] == 0.2
    assert goal.links == (Link(1e7, 5e-3),) * 2 and goal.machines[0].slowness == 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stages": 1}, "two or more"),
        ({"objective": "fast"}, "throughput, latency, traffic"),
        ({"memory": "1MB,2MB,3MB"}, "give one value for all, or 2, not 3"),
        ({"memory": "50%"}, "'50%' is no amount; write for example '200MB'"),
        ({"delay": "5MB"}, "'5MB' is no amount; write for example '5ms'"),
        ({"bandwidth": "0"}, "more than nothing"),
    ],
)
def test_options_that_cannot_be_meant(options: dict[str, object], said: str) -> None:
    with pytest.raises(BadOption, match=said):
        goal_from(**{"stages": 2, "objective": "latency", **options})  # type: ignore[arg-type]


def test_links_and_shares_belong_to_stages() -> None:
    with pytest.raises(BadOption, match="there are 1 between 2 stages"):
        Goal(links=(Link(), Link()))
    with pytest.raises(BadOption, match="there are 2 stages, not 1"):
        Goal(shares=(0.5,))


def test_the_names_of_the_files() -> None:
    assert stage_paths("a/model.tw", 2) == (Path("a/model.1.tw"), Path("a/model.2.tw"))
    assert stage_paths("v1.5", 1) == (Path("v1.1.5"),)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "four_linears.py").write_text(
        "import torch\ndef net():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4))), (torch.ones(2, 8),)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    command = ["split", "four_linears:net", "--no-measure", "-o", "net.tw"]
    for more, status, said in (
        ([], 0, "wrote net.1.tw, net.2.tw"),
        (["--memory", "10"], 2, "the memory of stage 1 (10 bytes) is too little"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli._run([*command, *more])
        out, err = capsys.readouterr()
        assert ended.value.code == status and said in (err if status else out).replace("\n", " ")
    assert load("net.2.tw")(*load("net.1.tw")(torch.ones(2, 8))).shape == (2, 8)


class Cache(torch.nn.Module):
    """Remembers 4 tokens, the place of the next one in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(2, 4, 8))
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))
        self.up, self.down = torch.nn.Linear(8, 64), torch.nn.Linear(64, 8)

    def forward(self, x):
        self.kept.index_copy_(1, self.count.clone(), x)
        self.count.add_(1)
        return self.down(self.up(self.kept.sum(1)).relu())


def test_a_cache_is_not_filled_by_measuring_stages() -> None:
    torch.manual_seed(0)
    model = Cache().eval()
    made = tilewright.split(model, (torch.ones(2, 1, 8),), stages=2)
    for _ in range(4):
        with torch.no_grad():
            torch.testing.assert_close(made(torch.ones(2, 1, 8)), model(torch.ones(2, 1, 8)))
