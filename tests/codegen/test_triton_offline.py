"""Every printed kernel compiles for NVIDIA and AMD GPUs on a machine that has none."""

from __future__ import annotations

import pytest
from triton_kernels import CASES, Case

pytest.importorskip("triton")

from tilewright.codegen.triton.offline import TARGETS, OfflineError, compile_offline
from tilewright.codegen.triton.schedule import Schedule, inner_groups, needs_whole_block


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_compiles(case: Case, target: str) -> None:
    compiled = compile_offline(case.kernel, target=target)
    assert compiled.binary and compiled.registers >= 0 and compiled.spills == 0
    assert {"ttir", "ttgir", "llir"} < set(compiled.stages)


@pytest.mark.parametrize("case", [c for c in CASES if inner_groups(c.kernel)], ids=lambda c: c.name)
def test_looped_compiles(case: Case) -> None:
    if needs_whole_block(case.kernel, inner_groups(case.kernel)):
        pytest.skip("only a persistent block can")
    assert compile_offline(case.kernel, Schedule(4, 64, persistent=False), "sm_90").binary


def test_unknown_target() -> None:
    with pytest.raises(OfflineError, match="known targets are sm_80, sm_90, gfx942"):
        compile_offline(CASES[0].kernel, target="sm_12")
