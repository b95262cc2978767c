"""Secrets in a config and in texts: found by name and by value, and masked wherever they are shown.

run.json holds the masked config; the values that its processes need are beside it, in private.json
(0600). Whatever prints a config, a command line or a log masks it here.
"""

import logging
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from atropos_hpc.contracts.run_info import SecretValue

MASK = "***"
SHORTEST = 8  # a shorter value would be found in texts that do not contain the secret

_NAME = r"(?:token|secret|password|passwd|passphrase|credentials?|[_-]key|api_?key|authorization)"
# names of the vocabulary's tokens, which end like a secret's name
_PLAIN = r"(?:pad|eos|bos|unk|sep|cls|mask|stop|end|start|think|special)_token"
NAME = re.compile(rf"(?i)^(?!.*{_PLAIN}$).*{_NAME}$|^key$|^pw$")
# NAME=VALUE and NAME: VALUE, as in overrides, exports and maps
ASSIGNED = re.compile(
    rf"(?i)\b(?!\w*{_PLAIN}\b)([\w.-]*{_NAME}[\"']?\s*[=:]\s*[\"']?)([^\s,\"'}}\])]+)"
)
# what issuers make recognizable, and passwords in URLs
SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}"
    r"|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,})"
    r"|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
    r"|(?<=[Bb]earer )[\w.~+/=-]{8,}"
)


def is_secret_name(name: str) -> bool:
    """Tell whether what has this name is secret.

    >>> [is_secret_name(n) for n in ("HF_TOKEN", "openai_api_key", "max_tokens", "pad_token")]
    [True, True, False, False]
    """
    return NAME.match(name) is not None


def mask(text: str, known: Iterable[str] = ()) -> str:
    """Mask what looks like a secret in a text, and the `known` values wherever they are.

    >>> mask("curl https://me:pw@host -H 'Authorization: Bearer abcdefgh1'")
    "curl https://***@host -H 'Authorization: Bearer ***'"
    """
    for value in sorted(known, key=len, reverse=True):
        text = text.replace(value, MASK)
    return SHAPES.sub(MASK, text)


def mask_assignments(text: str, known: Iterable[str] = ()) -> str:
    """Mask, as `mask`, also what is assigned to a secret's name: for overrides and shell lines.

    >>> mask_assignments("rollout.variables={HF_TOKEN: abc, X: y} export A_KEY='b' max_tokens=7")
    "rollout.variables={HF_TOKEN: ***, X: y} export A_KEY='***' max_tokens=7"
    """
    return mask(ASSIGNED.sub(rf"\g<1>{MASK}", text), known)


# --- configs


def mask_config(config: Any) -> tuple[Any, list[SecretValue]]:
    """Return a config with its secrets masked, and what they were."""
    plain, found = msgspec.to_builtins(config), list[SecretValue]()
    by_name = {value for _, value in _named(plain) if len(value) >= SHORTEST}
    masked = _masked(plain, (), by_name, found)
    return msgspec.convert(masked, type(config)), found


def unmask_config(config: Any, secrets: Iterable[SecretValue]) -> Any:
    """Put the secrets back. Raises KeyError, IndexError when the config has other keys."""
    plain = msgspec.to_builtins(config)
    for secret in secrets:
        *path, last = secret.path
        at = plain
        for part in path:
            at = at[int(part)] if isinstance(at, list) else at[part]
        at[int(last) if isinstance(at, list) else last] = secret.value
    return msgspec.convert(plain, type(config))


def _named(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield (name, value) of the strings below secrets' names."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _named(entry, key)
    elif isinstance(value, list):
        for entry in value:
            yield from _named(entry, name)
    elif isinstance(value, str) and value and is_secret_name(name):
        yield name, value


def _masked(
    value: Any, path: tuple[str, ...], known: set[str], found: list[SecretValue], name: str = ""
) -> Any:
    if isinstance(value, dict):
        return {key: _masked(each, (*path, key), known, found, key) for key, each in value.items()}
    if isinstance(value, list):
        return [_masked(each, (*path, str(i)), known, found, name) for i, each in enumerate(value)]
    if not isinstance(value, str) or not value:
        return value
    masked = MASK if is_secret_name(name) else mask_assignments(value, known)
    if masked != value:
        found.append(SecretValue(list(path), value))
    return masked


# --- logs

_learned: set[str] = set()  # of the configs that this process has read


def learn(secrets: Iterable[SecretValue]) -> None:
    """Mask these values, too, in what this process logs."""
    _learned.update(each.value for each in secrets if len(each.value) >= SHORTEST)


def known_values() -> set[str]:
    """Return what is masked by value: what was learned, and this process's secret variables."""
    of_environment = {value for name, value in os.environ.items() if is_secret_name(name)}
    return _learned | {value for value in of_environment if len(value) >= SHORTEST}


class MaskingFilter(logging.Filter):
    """Masks the secrets in what a handler logs."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        masked = mask(message, known_values())
        if masked != message:
            record.msg, record.args = masked, None
        return True
