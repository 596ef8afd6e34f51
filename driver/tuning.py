"""`tilewright tuning`: what was measured on this machine, out of its database and into another's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .errors import CannotWrite, NoTimings

app = typer.Typer(add_completion=False, help="What tuning measured: written to a file, and read from one.")
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="JSON lines, one for each timing")]


@app.command("export")
def export_timings(file: FileArgument) -> None:
    """Write all timings of the tuning database to a file."""
    from ..search.database import Database

    try:
        count = Database().dump(file)
    except OSError as error:
        raise CannotWrite(path=file, reason=error.strerror or str(error)) from error
    Console().print(f"wrote {count} timings to [bold]{file}[/bold]")


@app.command("import")
def import_timings(file: FileArgument) -> None:
    """Add the timings of a file to the tuning database. They serve machines of the same kind, with the same torch and Triton."""
    from ..search.database import Database

    try:
        count = Database().load(file)
    except OSError as error:
        raise NoTimings(path=file, reason=error.strerror or str(error)) from error
    except ValueError as error:
        raise NoTimings(path=file, reason=error) from error
    Console().print(f"read {count} timings from [bold]{file}[/bold]")
