"""The terminal, to which a user's text is written as it is."""

import io
import sys
from typing import Any

from rich.console import Console
from rich.progress import TextColumn


def terminal(**options: Any) -> Console:
    """Return a console that takes no text for markup or an emoji: names, overrides and paths may
    contain `[/tmp]` or `:bell:`. Styles are given with rich.text.Text.

    Characters that the locale's encoding lacks are printed as question marks.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    return Console(markup=False, emoji=False, **options)


def column(template: str) -> TextColumn:
    """Return a progress bar's column of text that is no markup."""
    return TextColumn(template, markup=False)
