"""Word the errors of Hydra and OmegaConf: the key, what is wrong, and the nearest valid key."""

import re
from collections.abc import Callable, Iterable, Sequence

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from atropos_hpc import schema
from atropos_hpc.config import Config, EnvironmentConf
from atropos_hpc.contracts.answers import Problem
from atropos_hpc.validate import Refused

ERRORS = (HydraException, OmegaConfBaseException, Refused)  # of composing; `problems` words them


def problems(error: Exception) -> list[Problem]:
    """Word one of ERRORS: the key, what is wrong, and the nearest valid key of a misspelt one."""
    if isinstance(error, Refused):
        return list(error.problems)
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    # OmegaConf's own error has the key. Under a debugger, its cause follows.
    innermost = next((each for each in chain[::-1] if getattr(each, "full_key", None)), chain[-1])
    first = str(innermost).splitlines()[0]
    if isinstance(error, OverrideParseException):
        return [Problem(error.override, "is not of the form key=value (with -m: key=value,value)")]
    key = getattr(innermost, "full_key", None)
    if key and re.match(r"Key '.*' (is not in struct|not in)", first):
        return [Problem(key, f"there is no such key{schema.did_you_mean(key, _keys_near(key))}")]
    if key and isinstance(innermost, MissingMandatoryValue):
        return [Problem(key, f"must be given: {key}=...")]
    if "is not a subclass of EnvironmentConf" in first:
        usage = "more_environments={NAME: {target: ..., weight: ...}}"
        return [Problem("more_environments", f"give the whole map: {usage}")]
    if key:
        return [Problem(key, first)]
    if exists := re.match(r"Could not (append to|delete from) config.*?'([^']+)'", str(error)):
        return [Problem(exists[2], _GRAMMAR[exists[1]])]
    if missing := re.search(
        r"Could not find '([^']+)'\s+Available options[^\n]*\n(.*)", str(error), re.S
    ):
        options = [option.strip() for option in missing[2].split("Config search path")[0].split()]
        name = missing[1].rpartition("/")[2]
        known = f"is none of {', '.join(options)}{schema.did_you_mean(name, options)}"
        return [Problem(missing[1], known)]
    if (choice := re.search(r"In '([^']*)': (.*)", str(error))) is not None:
        return [Problem(choice[1], choice[2])]
    return [Problem("", _one_line(error))]


def is_composing_error(error: Exception) -> bool:
    """Tell whether Hydra or OmegaConf failed on an override; for some, not with one of ERRORS."""
    if isinstance(error, ERRORS):
        return True
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    module = str(last.tb_frame.f_globals.get("__name__", "")) if last is not None else ""
    return module.partition(".")[0] in ("hydra", "omegaconf", "antlr4")


def named_problems(
    error: Exception, arguments: Sequence[str], compose: Callable[[list[str]], object]
) -> list[Problem]:
    """Word an error of composing a command line. Where it names no key, the override is searched
    that fails by itself. `compose` composes a list of overrides."""
    found = problems(error) if isinstance(error, ERRORS) else [Problem("", _one_line(error))]
    if all(problem.key for problem in found):
        return found
    for override in (each for each in arguments if "=" in each and not each.startswith("-")):
        try:
            compose([override])
        except Exception as other:  # whatever they raise
            if type(other) is type(error):
                message = problems(other)[0].message if isinstance(other, ERRORS) else ""
                key = override.partition("=")[0] or override
                return [Problem(key, message or f"cannot be read: {_one_line(other)}")]
    return [Problem(problem.key or "command line", problem.message) for problem in found]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).partition("Config search path")[0].split()) or type(error).__name__


_GRAMMAR = {
    "append to": "exists already: give it without +",
    "delete from": "is not set, so ~ cannot remove it; give key=null instead",
}


def _keys_near(key: str) -> Iterable[str]:
    yield from (name for name, _ in schema.fields(Config))
    if key.startswith("more_environments."):
        prefix = f"{key.rpartition('.')[0]}."
        yield from (name for name, _ in schema.fields(EnvironmentConf, prefix))
