"""The command line: `optimize MODEL`, and `tilewright` with its commands, of which that is one."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..ir.errors import TilewrightError
from .errors import CannotWrite
from .tuning import app as tuning

if TYPE_CHECKING:
    from .artifact import Optimized

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help="Optimization with a receipt.")
app.add_typer(tuning, name="tuning")

CommandLineError: Any = typer.BadParameter.__mro__[2]  # ClickException, which newer versions of typer carry inside
INTERRUPTED = 130  # what typer returns for a KeyboardInterrupt

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="a .pt2 program, a TorchScript file, or package.module:callable")]
InputsOption = Annotated[
    list[str],
    typer.Option("--inputs", "-i", help='a file (.npz, .pt, .safetensors) or "x=1x3x224x224:f32"; a letter is a varying size'),
]
OutputOption = Annotated[Path | None, typer.Option("--output", "-o", help="where to write the artifact; default: MODEL.tw")]
PassesOption = Annotated[str | None, typer.Option(help='passes to run instead of the default list, e.g. "canonicalize,fuse-regions"')]
TuneOption = Annotated[float, typer.Option("--tune", min=0, help="seconds for measuring what gains, for a target for compiling; 0: none")]
TargetOption = Annotated[
    str | None, typer.Option("--target", help="compile for a GPU that need not be here: sm_80, sm_90 or gfx942; nothing is timed")
]
LevelsOption = Annotated[
    str, typer.Option("--levels", help="levels of x86-64 that the artifact gets code for: v2, v3, v4; none: compiled where it is loaded")
]
CompressOption = Annotated[bool, typer.Option("--compress", help="weights in bfloat16 take two thirds of their bytes in the artifact")]
ErrorOption = Annotated[float | None, typer.Option("--max-error", min=0, help="how far results may be off: weights are kept in fewer bits")]
MemoryOption = Annotated[str | None, typer.Option(help='what weights may take: "50%" of what they do, "200MB"')]
ActivationsOption = Annotated[
    str | None,
    typer.Option(help='what intermediate values may take at a time: "30%" of what they do, "2MB"; images are computed in patches'),
]
LatencyOption = Annotated[str | None, typer.Option(help='what a call may take: "80%" of eager\'s time, "5ms"')]
BitsOption = Annotated[float | None, typer.Option(min=0, help="bits of a weight on average, scales included")]
BopsOption = Annotated[str | None, typer.Option(help='bits of weights times bits of inputs, over all products: "25%" of what they are')]
ObjectiveOption = Annotated[str, typer.Option(help="what to make least within the limits: latency, memory or error")]
MetricOption = Annotated[str, typer.Option(help="what --max-error is of: relative, max-abs, cosine, kl or argmax")]
FormatsOption = Annotated[str | None, typer.Option(help='formats to choose from, e.g. "bf16,int8,int4-g64"')]
CalibrationOption = Annotated[
    list[str], typer.Option("--calibration", help="a file of inputs like --inputs; several files: a quarter verifies the result")
]
PaddingOption = Annotated[
    bool, typer.Option("--remove-padding", help="tokens that an attention mask says are padding are not computed, where that gains")
]
TrustOption = Annotated[bool, typer.Option("--trust-pickle", help="read pickled modules; they can run any code")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="also write the receipt as JSON")]
ReportOption = Annotated[Path | None, typer.Option("--report", help="also write the receipt as an HTML page")]


@app.command()
def optimize(
    model: ModelArgument,
    inputs: InputsOption = [],  # noqa: B006 (typer reads the default)
    output: OutputOption = None,
    passes: PassesOption = None,
    tune: TuneOption = 30.0,
    max_error: ErrorOption = None,
    memory: MemoryOption = None,
    latency: LatencyOption = None,
    bits: BitsOption = None,
    bops: BopsOption = None,
    objective: ObjectiveOption = "latency",
    metric: MetricOption = "relative",
    formats: FormatsOption = None,
    calibration: CalibrationOption = [],  # noqa: B006 (typer reads the default)
    target: TargetOption = None,
    levels: LevelsOption = "v2,v3,v4",
    compress: CompressOption = False,
    remove_padding: PaddingOption = False,
    activations: ActivationsOption = None,
    trust_pickle: TrustOption = False,
    json: JsonOption = None,
    report: ReportOption = None,
) -> None:
    """Optimize a model for inference: write an artifact that `tilewright.load` runs, and print the receipt.

    Exactly, unless a limit is given: then the weights of each layer are kept in the format that costs least within all limits.
    """
    console = Console(file=sys.stdout)  # not what sys.stdout may be while torch exports
    artifact = _writable(model, output, json, report)
    with _progress(console) as stage:
        with stage("starting"):
            from .budget import budget_from
            from .inputs import parse_inputs
            from .loading import load_model
            from .native_code import levels_from
            from .optimize import optimize_model

            stored = levels_from(levels)
            limits = {"max_error": max_error, "memory": memory, "latency": latency, "bits": bits, "bops": bops}
            budget = budget_from(limits, objective, metric, formats, calibration)
        _check_passes(passes)
        _check_target(target)
        with stage(f"reading {model}"):
            read = load_model(model, parse_inputs(inputs), trust_pickle)
        optimized = optimize_model(read, passes, stage, tune, target, budget, remove_padding, activations)
        with stage(f"writing {artifact}, with code for {levels}" if stored and not target else f"writing {artifact}"):
            optimized.save(artifact, stored, compress)
    _tell(console, optimized, artifact, json, report)


def _tell(console: Console, made: Optimized, artifact: Path, json: Path | None, report: Path | None) -> None:
    """The receipt, and where the artifact is."""
    receipt = made.receipt
    if json:
        from .artifact import replacing

        with replacing(json) as temporary:
            Path(temporary).write_text(receipt.to_json())
    if report:
        from .report.page import write

        write(receipt, report)
    receipt.render(console)
    where, trust = (f" on a machine with {receipt.target}", ", trust_code=True") if receipt.target else ("", "")
    size = artifact.stat().st_size / 1e6
    console.print(f"\nwrote [bold]{artifact}[/bold] ({size:.1f} MB); run it{where} with tilewright.load({str(artifact)!r}{trust})")


@app.command()
def simplify(
    model: ModelArgument,
    max_error: Annotated[float, typer.Option("--max-error", min=0, help="how far results may be off")],
    inputs: InputsOption = [],  # noqa: B006 (typer reads the default)
    output: OutputOption = None,
    rewrites: Annotated[str, typer.Option(help="what may be done: any of merge-tokens,remove-blocks,share-blocks")] = "merge-tokens",
    protected: Annotated[int, typer.Option(min=0, help="so many first tokens are never merged: 1 for a class token")] = 0,
    objective: Annotated[str, typer.Option(help="what to make least within the error: latency or memory")] = "latency",
    metric: MetricOption = "relative",
    calibration: CalibrationOption = [],  # noqa: B006 (typer reads the default)
    levels: LevelsOption = "v2,v3,v4",
    compress: CompressOption = False,
    trust_pickle: TrustOption = False,
    json: JsonOption = None,
    report: ReportOption = None,
) -> None:
    """Merge tokens of an encoder that are alike, and leave out or share its blocks, as far as an error allows: write an artifact.

    What is slower than the exact model, or over the error, is not done: then it is the exact model.
    """
    console = Console(file=sys.stdout)
    artifact = _writable(model, output, json, report)
    with _progress(console) as stage:
        with stage("starting"):
            from .budget import calibration_from
            from .inputs import parse_inputs
            from .loading import load_model
            from .native_code import levels_from
            from .simplify import Allowance, simplify_model

            stored, names = levels_from(levels), [name.strip() for name in rewrites.split(",")]
            allowed = Allowance(max_error, names, protected, metric, objective, calibration_from(calibration))
        with stage(f"reading {model}"):
            read = load_model(model, parse_inputs(inputs), trust_pickle)
        made = simplify_model(read, allowed, stage)
        with stage(f"writing {artifact}, with code for {levels}" if stored else f"writing {artifact}"):
            made.save(artifact, stored, compress)
    _tell(console, made, artifact, json, report)


@app.command()
def explain(
    path: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="an artifact that `optimize` wrote, or a receipt (--json)")],
    source: Annotated[bool, typer.Option("--source", help="print the generated kernels and the host program")] = False,
    graph: Annotated[bool, typer.Option("--graph", help="print the IR")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="write an HTML page instead")] = None,
) -> None:
    """Say what was done to a model: every kernel with its source lines, every rewrite declined and why, what fell back."""
    from .artifact import member, receipt_of

    console = Console()
    if source or graph:
        console.print(member(path, "kernels" if source else "graph"), markup=False, highlight=False, soft_wrap=True)
        return
    if html:
        from .report.page import write

        _require_writable(html)
        write(receipt_of(path), html)
        console.print(f"wrote [bold]{html}[/bold]")
        return
    receipt_of(path).render(console, details=True)


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="an artifact, or a receipt (--json)")],
    second: Annotated[Path, typer.Argument(metavar="B", help="another")],
) -> int:
    """Say what differs between two optimized models: speed, error, bytes, formats, kernels, rewrites. Status 1 if anything does."""
    from .artifact import contents, receipt_of
    from .difference import differences, render

    found = differences(receipt_of(first), receipt_of(second), contents(first), contents(second))
    render(found, Console())
    return 1 if found else 0


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="an artifact that `optimize` wrote")],
    inputs: InputsOption = [],  # noqa: B006 (typer reads the default)
    model: Annotated[str | None, typer.Option("--model", "-m", help="the model it was made of, as `optimize` takes it")] = None,
    max_error: Annotated[float | None, typer.Option("--max-error", min=0, help="how far it may be from the model")] = None,
    trust_pickle: TrustOption = False,
    trust_code: Annotated[bool, typer.Option("--trust-code", help="run the binaries in the artifact, whoever compiled them")] = False,
) -> None:
    """Run an artifact on inputs, and check it against float64: its graph's meaning, and the model it was made of.

    Exits with status 1 if a result is too far off.
    """
    console = Console(file=sys.stdout)
    with _progress(console) as stage:
        with stage("starting"):
            from .errors import NoInputs
            from .inputs import parse_inputs
            from .loading import load_model
            from .verify import verify as verified
        example = parse_inputs(inputs)
        original = None
        if model is not None:
            with stage(f"reading {model}"):
                original = load_model(model, example, trust_pickle)
        example = example or (original.example if original else None)
        if example is None:
            raise NoInputs(path=path)
        with stage(f"verifying {path}"):
            found = verified(path, example, original, max_error, trust_code)
    found.render(console)
    raise typer.Exit(0 if found.ok else 1)


@app.command()
def bisect(
    model: ModelArgument,
    inputs: InputsOption = [],  # noqa: B006 (typer reads the default)
    output: Annotated[Path | None, typer.Option("--output", "-o", help="where to write the reproducer; default: bisect_MODEL.py")] = None,
    passes: PassesOption = None,
    max_error: Annotated[float | None, typer.Option("--max-error", min=0, help="how far results may be off")] = None,
    trust_pickle: TrustOption = False,
) -> None:
    """Find the rewrite or kernel that makes a model's results wrong, and write a Python file that shows it alone.

    Exits with status 1 if there is one.
    """
    console = Console(file=sys.stdout)
    reproducer = output or Path(f"bisect_{_name(model)}.py")
    _require_writable(reproducer)
    with _progress(console) as stage:
        with stage("starting"):
            from .bisect import bisect_model
            from .inputs import parse_inputs
            from .loading import load_model
            from .reproduce import write_case
        _check_passes(passes)
        with stage(f"reading {model}"):
            read = load_model(model, parse_inputs(inputs), trust_pickle)
        with stage(f"searching {model}") as told:
            found = bisect_model(read, passes, max_error, told)
    console.print(found.summary, markup=False, highlight=False, soft_wrap=True)
    if found.case is not None:
        written = " and ".join(map(str, write_case(reproducer, found.case, found.fault)))
        console.print(f"wrote {written}; it exits with status 1 while the fault is there", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(0 if found.step is None else 1)


@app.command()
def split(
    model: ModelArgument,
    stages: Annotated[int, typer.Option(help="how many, each for a machine of its own")] = 2,
    inputs: InputsOption = [],  # noqa: B006 (typer reads the default)
    output: Annotated[Path | None, typer.Option("--output", "-o", help="m.tw writes m.1.tw, m.2.tw, ...; default: MODEL.tw")] = None,
    objective: Annotated[str, typer.Option(help="what to make least: throughput (the slowest stage), latency or traffic")] = "throughput",
    memory: Annotated[str | None, typer.Option(help='what a stage may hold: "200MB", or of each "50MB,2GB"; - is no limit')] = None,
    compute: Annotated[str | None, typer.Option(help='what a stage may do of the model\'s work, like "20%,-"')] = None,
    slowness: Annotated[str | None, typer.Option(help='how many times as long as here its machine takes, like "5,1"')] = None,
    bandwidth: Annotated[str | None, typer.Option(help='of the links between machines, like "10MB/s"')] = None,
    delay: Annotated[str | None, typer.Option(help='of the links, like "5ms"')] = None,
    round_cut: Annotated[bool, typer.Option("--round-cut", help="send what crosses in 8 bits")] = False,
    max_error: Annotated[float, typer.Option("--max-error", min=0, help="how far that may put results off")] = 0.05,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="measure what segments take, or tell it by rates")] = True,
    trust_pickle: TrustOption = False,
) -> None:
    """Cut a model into stages that run one after the other, on machines of their own: write an artifact for each."""
    console = Console(file=sys.stdout)
    artifact = _writable(model, output)
    with _progress(console) as stage:
        with stage("starting"):
            from .goal import goal_from
            from .inputs import parse_inputs
            from .loading import load_model
            from .split import split_model

            goal = goal_from(stages, objective, memory, compute, slowness, bandwidth, delay, round_cut, max_error, measure)
        with stage(f"reading {model}"):
            read = load_model(model, parse_inputs(inputs), trust_pickle)
        made = split_model(read, goal, stage)
        with stage(f"writing {artifact}"):
            paths = made.save(artifact)
    made.render(console)
    console.print(f"wrote {', '.join(map(str, paths))}; call each, loaded by tilewright.load, with what the one before returns")


def _check_passes(passes: str | None) -> None:
    """Unknown passes are reported before any work is done."""
    from .pipeline import passes_from

    if passes is not None:
        passes_from(passes)


def _check_target(target: str | None) -> None:
    from .targets import require_target

    if target is not None:
        require_target(target)


def _name(model: str) -> str:
    """What files made of a model are called."""
    return Path(model.rpartition(":")[2] if ":" in model else model).stem


def _writable(model: str, output: Path | None, *others: Path | None) -> Path:
    """Where the artifact of a model goes. Raises CannotWrite where it, or one of the other files, could not be written."""
    artifact = output or Path(f"{_name(model)}.tw")
    for path in (artifact, *others):
        if path is not None:
            _require_writable(path)
    return artifact


def _require_writable(path: Path) -> None:
    """Fails early, before minutes of work, where the result could not be written."""
    if path.is_dir():
        raise CannotWrite(path=path, reason="it is a directory")
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        os.unlink(temporary)
    except OSError as error:
        raise CannotWrite(path=path, reason=error.strerror or str(error)) from error


@contextmanager
def _progress(console: Console) -> Iterator:
    """A function that names the stage under way; a bar with the elapsed time is shown while it runs, and how much of it is done."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:

        @contextmanager
        def stage(name: str) -> Iterator[Callable[[int, int], None]]:
            task = progress.add_task(name, total=None)
            begin = time.perf_counter()
            yield lambda done, total: progress.update(task, completed=done, total=total)
            progress.remove_task(task)
            seconds = time.perf_counter() - begin
            if seconds > 1:
                progress.console.print(f"{seconds:6.1f} s  {name}", style="dim", highlight=False)

        yield stage


def main() -> None:
    """The console script `tilewright`: errors of the user's making are one sentence and exit status 2."""
    _run([*sys.argv[1:]])


def optimize_main() -> None:
    """The console script `optimize`: `tilewright optimize` under a shorter name."""
    _run(["optimize", *sys.argv[1:]])


def _run(arguments: list[str]) -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that temporary files are removed
    _quiet()
    try:
        status = app(arguments or ["--help"], prog_name="tilewright", standalone_mode=False) or 0
    except CommandLineError as error:
        _say("[bold red]error:[/bold red]", f"{error.format_message().rstrip('.')}; see --help")
        status = 2
    except TilewrightError as error:
        _say("[bold red]error:[/bold red]", str(error))
        status = 2
    if status == INTERRUPTED:
        _say("[bold red]interrupted[/bold red]", "")
    sys.exit(status)


def _quiet() -> None:
    """Our warnings as one line each; the logs and warnings of torch, which reports its errors twice, are not shown."""
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"tilewright\.")
    warnings.showwarning = lambda message, *rest: _say("[bold yellow]warning:[/bold yellow]", str(message))


def _say(label: str, text: str) -> None:
    """One line on stderr."""
    console = Console(stderr=True, soft_wrap=True)
    console.print(label, end=" " if text else "\n")
    if text:
        console.print(text, markup=False, highlight=False)


if __name__ == "__main__":
    main()
