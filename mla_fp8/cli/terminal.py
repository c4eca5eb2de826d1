"""Where the commands print: the same lines with rich and without; rich adds colours and moving bars on a terminal."""

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

TABLE_COLUMNS = 80  # that every table fits


class Terminal:
    """Standard output, as wide as the terminal but no narrower than a table: there lines wrap, and no cell is cut."""

    def __init__(self) -> None:
        self.width = max(TABLE_COLUMNS, shutil.get_terminal_size().columns)
        self._console = _console()

    def print(self, text: str = "", style: str = "") -> None:
        """Print text as it is; `style` in rich's words, as in "bold red"."""
        if self._console is None:
            print(text)
        else:
            self._console.print(text, style=style, markup=False, emoji=False, soft_wrap=True)

    def print_lines(self, lines: Iterable[str], style: str = "") -> None:
        for line in lines:
            self.print(line, style)

    def working(self, text: str) -> contextlib.AbstractContextManager[Any]:
        """A sign on a terminal with rich, until the block ends."""
        return contextlib.nullcontext() if self._console is None else self._console.status(text)


@contextlib.contextmanager
def progress(*titles: str, total: int) -> Iterator[Callable[[str], None]]:
    """Gives a function that moves the bar of a title on; bars are on standard error, and only where rich draws them."""
    console = _console(stderr=True)
    if console is None:
        yield lambda title: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bars:
        tasks = {title: bars.add_task(title, total=total) for title in titles}
        yield lambda title: bars.advance(tasks[title])


def _console(**options: Any) -> Any:
    """rich's console, where rich is installed (mla_fp8[cli]) and prints to a terminal; else None."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        return None
    found = Console(highlight=False, **options)
    return found if found.is_terminal else None
