"""Command lines that are printed for a person to copy, and overrides in Hydra's grammar."""

import re
import shlex

from atropos_hpc.runtime import masking

# a value that needs no quotes: a path, since Hydra takes words such as null and 1e3 for others
PLAIN = re.compile(r"[A-Za-z0-9_.-]*/[A-Za-z0-9_./-]*")


def printed(*words: object) -> str:
    """Return a command line that a shell splits into these words, with secrets masked.

    >>> print(printed("atropos-hpc", "status", "runs/it's $mine"))
    atropos-hpc status 'runs/it'"'"'s $mine'
    """
    return shlex.join(masking.mask_assignments(str(word)) for word in words)


def override(key: str, value: object) -> str:
    r"""Return the override with which Hydra sets a key to exactly this text.

    >>> print(override("run_dir", "runs/a"), override("run_dir", "runs/a,b='1'"))
    run_dir=runs/a run_dir='runs/a,b=\'1\''
    """
    text = str(value)
    if PLAIN.fullmatch(text):
        return f"{key}={text}"
    # Hydra halves the backslashes before a quote, and OmegaConf those before an interpolation.
    text = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)
    text = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return f"{key}='{text}'"
