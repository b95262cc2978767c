"""One line about an exception: its type, its message, and the line of the user's code."""

import site
import sysconfig
import traceback
from collections.abc import Collection
from pathlib import Path

from atropos_hpc.runtime import masking

LONGEST = 400  # characters of a message
_LIBRARIES = (
    *{sysconfig.get_paths()["stdlib"], *site.getsitepackages(), str(Path(__file__).parents[1])},
)
_OWN_ENVIRONMENTS = str(Path(__file__).parents[1] / "environments")


def describe_error(error: BaseException, files: Collection[str] = ()) -> str:
    """Describe an exception in one line, as in "ValueError: no answer (my_env.py:40, in score)".

    The line is the innermost one in `files`; without one, the innermost outside of libraries.
    """
    message = masking.mask(" ".join(str(error).split()), masking.known_values())
    if isinstance(error, SystemExit):
        what = f"it called sys.exit({error.code!r})"
    else:
        what = type(error).__name__ + (f": {message}" if message else "")
    if len(what) > LONGEST:
        what = what[:LONGEST] + "..."
    if isinstance(error, SyntaxError) and error.filename:
        return f"{what} ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    found = locate([(frame.filename, frame.lineno or 0, frame.name) for frame in frames], files)
    return f"{what} ({found})" if found else what


def locate(frames: Collection[tuple[str, int, str]], files: Collection[str] = ()) -> str | None:
    """Describe the innermost frame in `files`, or else outside of libraries. `frames`: (file, line,
    function), outermost first."""
    for own in (lambda file: str(Path(file).resolve()) in files, is_user_code):
        for file, line, function in reversed(list(frames)):
            if own(file):
                return f"{file}:{line}, in {function}"
    return None


def is_user_code(file: str) -> bool:
    """Whether a file is neither a library's nor this package's, environments excepted.

    >>> is_user_code("/home/me/my_env.py"), is_user_code(__file__)
    (True, False)
    """
    is_library = file.startswith(_LIBRARIES) and not file.startswith(_OWN_ENVIRONMENTS)
    return not file.startswith("<") and not is_library
