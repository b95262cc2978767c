"""The terminal, to which a user's text is written as it is."""

import io
import re
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import TextColumn
from rich.segment import Segment

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def terminal(**options: Any) -> Console:
    """Return a console that takes no text for markup or an emoji: names, overrides and paths may
    contain `[/tmp]` or `:bell:`. Styles are given with rich.text.Text.

    Characters that the locale's encoding lacks are printed as question marks.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    return _Visible(markup=False, emoji=False, **options)


class _Visible(Console):
    """Shows control characters, as in texts of a policy, instead of sending them to the terminal.

    Rich itself removes some of them, but not those that begin an escape sequence.
    """

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def visible(text: str) -> str:
    r"""Return a text with its control characters, except tabs and line ends, as escapes.

    >>> print(visible("a\x1b[2Jb"))
    a\x1b[2Jb
    """
    return CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def column(template: str) -> TextColumn:
    """Return a progress bar's column of text that is no markup."""
    return TextColumn(template, markup=False)
