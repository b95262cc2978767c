"""A group as environments produce it: Atropos' ScoredDataGroup, and checks of its free-form fields.

The trajectory server fills it from JSON (`decode_json`), an environment worker from a Python group
(`ScoredGroup.from_python`). `contracts.group` encodes it.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import orjson
from msgspec import Meta, Raw, Struct

from atropos_hpc.contracts.prompts import Draw
from atropos_hpc.contracts.wal_record import UNKNOWN

OPTIONAL_ARRAYS = ("inference_logprobs", "advantages", "ref_logprobs")  # flag bit = 1 << index
SUPPORT = 1 << len(OPTIONAL_ARRAYS)  # flag bit: the payload ends with a support
NULL = Raw(b"null")

JsonObject = dict[str, Any]  # its keys belong to the environment, not to this package


class RequestError(Exception):
    """A request that cannot be served: the HTTP status, and a message for the sender."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class ScoredGroup(Struct):
    """Atropos' ScoredDataGroup: a group as environments produce it and as Atropos' JSON spells it.

    `decode` produces it from JSON, where msgspec has checked the types. A worker fills it from a
    Python group, whose rows may also be numpy arrays or tensors. The free-form fields are JSON.
    """

    tokens: list[list[int]]
    masks: list[list[int]]
    scores: list[float | bool]  # True is 1
    inference_logprobs: list[list[float]] | None = None
    advantages: list[list[float]] | None = None
    ref_logprobs: list[list[float]] | None = None
    env_id: Annotated[int, Meta(ge=0, lt=1 << 31)] | None = None
    messages: Raw = NULL
    generation_params: Raw = NULL
    overrides: Raw = NULL
    group_overrides: Raw = NULL
    images: Raw = NULL
    distill_token_ids: Raw = NULL
    distill_logprobs: Raw = NULL
    support: bytes | None = None  # `Support.encode`, in JSON base64; not Atropos'

    @classmethod
    def from_python(cls, group: Mapping[str, Any]) -> "ScoredGroup":
        """Take over an environment's ScoredDataGroup. Raises RequestError (422)."""
        for name in ("tokens", "masks", "scores"):
            if group.get(name) is None:
                raise RequestError(422, f"{name}: missing")
        arrays = ("tokens", "masks", "scores", "support", *OPTIONAL_ARRAYS)
        values: JsonObject = {name: group.get(name) for name in arrays}
        for name in FREE_FORM_FIELDS:
            if group.get(name) is not None:
                values[name] = Raw(_to_json(group[name], name))
        return cls(**values)


def _to_json(value: Any, name: str) -> bytes:
    options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
    try:
        return orjson.dumps(value, default=_to_builtin, option=options)
    except TypeError as error:
        raise RequestError(422, f"{name}: cannot be written as JSON: {error}") from None


def _to_builtin(value: Any) -> Any:
    """Convert what orjson does not know: tensors, pydantic models, and anything else as text."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return value.model_dump() if hasattr(value, "model_dump") else str(value)


class Message(Struct):
    """A chat message. Atropos requires these two fields; others pass unchecked."""

    role: Raw
    content: Raw


Version = Annotated[int, Meta(ge=0, lt=1 << 31)]
VersionRange = tuple[Version, Version]  # oldest, newest


class GenerationParams(Struct):
    """The keys of `generation_params` that this package reads on the way to the learner."""

    policy_versions: list[VersionRange | None] | None = None  # of each sequence
    draw: Draw | None = None  # of the prompt; None: from a client that draws none


class FreeForm(Struct):
    """The free-form fields, typed as far as they are checked."""

    messages: list[list[Message]] | None = None
    generation_params: GenerationParams | None = None
    overrides: list[dict[str, Raw]] | None = None
    group_overrides: dict[str, Raw] | None = None
    images: Raw = NULL
    distill_token_ids: list[Raw] | None = None
    distill_logprobs: list[Raw] | None = None


FREE_FORM_FIELDS = FreeForm.__struct_fields__
_free_form = msgspec.json.Decoder(FreeForm)


def free_form_json(group: ScoredGroup) -> bytes:
    """Join the free-form fields into one JSON object; empty if there are none."""
    fields = ((name, bytes(getattr(group, name))) for name in FREE_FORM_FIELDS)
    parts = [
        b'"%s":%s' % (name.encode(), msgspec.json.format(text, indent=-1))
        for name, text in fields
        if text != b"null"
    ]
    return b"{" + b",".join(parts) + b"}" if parts else b""


def draw_of(meta: bytes) -> Draw | None:
    """Return the draw in the checked free-form fields of a group."""
    if b'"draw"' not in meta:  # spares decoding where the prompts are not drawn
        return None
    params = _free_form.decode(meta).generation_params
    return None if params is None else params.draw


def check_free_form(meta: bytes, sequences: int) -> int:
    """Check the free-form fields of a group.

    Returns the oldest policy version of the group, or UNKNOWN. Raises RequestError (422).
    """
    try:
        orjson.loads(meta)  # the learner's parser: it rejects lone surrogates and deep nesting
        found = _free_form.decode(meta)
    except msgspec.ValidationError as error:
        raise RequestError(422, describe(error)) from None
    except (ValueError, RecursionError) as error:
        raise RequestError(422, f"free-form fields: {error}") from None
    if found.overrides and len(found.overrides) != sequences:
        raise RequestError(422, f"overrides: {len(found.overrides)} for {sequences} sequences")
    for name in ("distill_token_ids", "distill_logprobs"):
        entries = getattr(found, name)
        if entries is not None and len(entries) != sequences:
            raise RequestError(422, f"{name}: {len(entries)} for {sequences} sequences")
    params = found.generation_params
    if params is None or (versions := params.policy_versions) is None:
        return UNKNOWN
    if len(versions) != sequences or any(v is not None and v[0] > v[1] for v in versions):
        wanted = "[oldest, newest] or null for each sequence"
        raise RequestError(422, f"generation_params.policy_versions: needs {wanted}")
    return min((v[0] for v in versions if v is not None), default=UNKNOWN)


def describe(error: Exception) -> str:
    """Turn msgspec's "<what> - at `$.<path>`" into "<path>: <what>"."""
    what, _, path = str(error)[:500].partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    return f"{path}: {what}" if path else what
