"""The HTTP bodies and queries of the trajectory server and of vLLM's token endpoint.

The receiver decodes and validates each with `decode_body`, `decode_query` or `decode_answer`. The
first part is Atropos' own protocol, to which this package adds fields that unmodified clients
neither send nor read.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct

from atropos_hpc.contracts.policy import PolicyVersion
from atropos_hpc.contracts.prompts import PromptCounts
from atropos_hpc.contracts.scored_group import RequestError, describe

T = TypeVar("T")

Count = Annotated[int, Meta(ge=0, lt=1 << 31)]
Integer = Annotated[int, Meta(ge=-(1 << 31), lt=1 << 31)]
Text = Annotated[str, Meta(max_length=4096)]
Fraction = Annotated[float, Meta(ge=0, le=1)]


def decode_body(body: bytes, into: type[T]) -> T:
    """Decode a JSON request body. Raises RequestError (422)."""
    try:
        return msgspec.json.decode(body, type=into, strict=False)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(422, describe(error)) from None


def decode_query(query: Mapping[str, str], into: type[T]) -> T:
    """Decode a query string. Raises RequestError (422)."""
    try:
        return msgspec.convert(dict(query), into, strict=False)
    except msgspec.ValidationError as error:
        raise RequestError(422, f"query: {describe(error)}") from None
    except UnicodeError:
        raise RequestError(422, f"query: not UTF-8: {dict(query)!r:.200}") from None


# --- trainers


class Registration(Struct):
    """POST /register. All but the first two fields have a default, so that curl can send it."""

    batch_size: Annotated[int, Meta(ge=1, lt=1 << 20)]  # sequences
    max_token_len: Count  # longest sequence; 0: no limit
    wandb_group: Text | None = ""
    wandb_project: Text | None = ""
    checkpoint_dir: Text = ""
    save_checkpoint_interval: Integer = 0
    starting_step: Count = 0  # the policy version that training starts or resumes from
    num_steps: Integer = -1
    vocab_size: Count = 0  # 0: unknown


class Registered(Struct):
    """The answer to /register."""

    uuid: int


class LeaseQuery(Struct):
    """GET /lease: one rank's groups of a batch. `oldest` and `version` count when it is formed."""

    batch: Annotated[int, Meta(ge=0, lt=1 << 53)]
    rank: Count
    world: Annotated[int, Meta(ge=1, le=1 << 16)]
    oldest: Count = 0  # drop queued groups that an older policy version produced
    version: Count | msgspec.UnsetType = msgspec.UNSET  # the learner's own; `batch` if not given
    wait: Annotated[float, Meta(ge=0, lt=1 << 53)] = 0.0  # seconds


class AcknowledgeQuery(Struct):
    """POST /ack: every batch up to `batch` is part of a durable checkpoint."""

    batch: Annotated[int, Meta(ge=0, lt=1 << 53)]


class Acknowledged(Struct):
    status: str
    unacknowledged: int  # batches


class ServerInfo(Struct):
    """GET /info; -1 before a trainer has registered."""

    batch_size: int
    max_token_len: int


class WandbInfo(Struct):
    """GET /wandb_info."""

    group: str | None
    project: str | None


class BatchAnswer(Struct):
    """GET /batch: ScoredData in JSON. None: not enough groups are queued."""

    batch: list[Raw] | None = None


class ServerStatus(Struct):
    """GET /status: how much is where. Also the trajectory server's part of its member state."""

    current_step: int  # Atropos' name of `next_batch`
    queue_size: int  # Atropos' name of `queued_groups`
    queued_groups: int
    queued_sequences: int
    next_batch: int  # number of the next batch to be formed
    unacknowledged: int  # batches
    stale: int  # groups dropped as too stale
    stale_sequences: int
    repeated: int  # groups that were sent again
    refused: int  # requests that were malformed or could not be stored
    prompts: dict[str, PromptCounts] = {}  # by environment


# --- environments


class EnvironmentRegistration(Struct):
    """POST /register-env. A member of the run that registers again keeps its env_id."""

    max_token_length: Count
    desired_name: Text | None = None
    weight: Annotated[float, Meta(ge=0, le=1e9)] | None = 1.0
    group_size: Count = 1
    min_batch_allocation: Fraction | None = None
    member: Text | None = None  # not Atropos'


class EnvironmentRegistered(Struct, omit_defaults=True):
    """The answer to /register-env. Without a trainer, `status` says to wait and nothing follows."""

    status: str
    env_id: int | None = None
    wandb_name: str | None = None
    checkpoint_dir: str | None = None
    starting_step: int | None = None
    checkpoint_interval: int | None = None
    num_steps: int | None = None


class StatusRequest(Struct):
    """GET /status-env and POST /disconnect-env. Only `env_id` is Atropos'."""

    env_id: Count
    in_flight: Count | None = None  # sequences being generated
    served_version: Count | None = None  # oldest policy version that a live vLLM server serves


class Quota(Struct):
    """How much a worker may start now, as the trajectory server computes it."""

    groups: int  # that it may start, >= 0
    oldest_version: int  # that the servers must serve before anything may start


class EnvironmentStatus(Struct):
    """The answer to /status-env: Atropos' fields, then `batch_size` and the quota."""

    current_step: int
    queue_size: int  # groups of this environment's size that wait to be trained on
    unallocated_fraction: float
    self_queue_size: int
    max_group_size: int
    env_weight: float
    batch_size: int = -1
    quota: Quota | None = None  # absent in the answer of Atropos' own server


class Disconnected(Struct, omit_defaults=True):
    status: str
    error: str | None = None


class Stored(Struct, omit_defaults=True):
    """The answer to /scored_data and /scored_data_list."""

    status: str
    groups_processed: int | None = None


class ErrorBody(Struct):
    detail: str


# --- vLLM's token endpoint

# The key of SamplingParams.extra_args that asks for `Generation.sampling_mask`: the number of top
# log-probs that the caller wants. `logprobs` is then the largest support to be reported.
WANTED = "support_top_logprobs"


class SamplingParams(Struct, omit_defaults=True):
    """vLLM's SamplingParams, as far as OpenAI's names or Atropos environments use them."""

    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None  # None: up to the model's context
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    structured_outputs: object = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    detokenize: bool | None = None  # None: yes
    prompt_logprobs: int | None = None
    logprobs: int | None = None
    extra_args: dict[str, int] | None = None  # of this package's extensions of the server


class GenerateRequest(Struct, omit_defaults=True):
    """POST /inference/v1/generate."""

    token_ids: list[int]
    sampling_params: SamplingParams
    output_mode: Literal["tokens", "text"]
    model: str | None = None  # the adapter's name; None: the base model
    stream: bool = False  # vLLM 0.25 answers as a whole nevertheless


class TokenLogprob(Struct):
    """The log-prob of one token, nats."""

    logprob: float
    token: str = ""
    bytes: list[int] | None = None
    top_logprobs: list["TokenLogprob"] = []


class Logprobs(Struct):
    """The log-probs of a generation's tokens."""

    content: list[TokenLogprob]


class VersionSpan(Struct):
    """The label of the weights that sampled tokens [start, end)."""

    version: str
    start: int = 0
    end: int = 0

    @property
    def policy_version(self) -> int:
        """Return the policy version; vLLM says "default" for the initial model's, 0."""
        return 0 if self.version == "default" else PolicyVersion.parse(self.version).version


class Generation(Struct):
    """One sampled sequence of an answer; in a stream, what is new of it."""

    token_ids: list[int]
    index: int = 0
    finish_reason: str | None = None  # "abort" where a weight update cut it short
    stop_reason: int | str | None = None  # the stop string or stop token that ended it
    text: str | None = None
    logprobs: Logprobs | None = None
    weight_versions: list[VersionSpan] | None = None
    # the ids that were left to sample each token from; none of a token where they are too many
    sampling_mask: list[list[int]] | None = None

    @property
    def versions(self) -> tuple[int, int] | None:
        """Return (oldest, newest) policy version of its tokens; None if vLLM gave none."""
        found = [span.policy_version for span in self.weight_versions or ()]
        return (min(found), max(found)) if found else None

    @property
    def sampled_log_probs(self) -> list[float]:
        """Return the log-prob of each token; none if they were not asked for."""
        return [each.logprob for each in self.logprobs.content] if self.logprobs else []

    @property
    def ended_by_token(self) -> bool:
        """Whether its last token ended it, and is no content."""
        return self.finish_reason == "stop" and not isinstance(self.stop_reason, str)


class Usage(Struct):
    """Token counts, in OpenAI's names."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


PromptLogprobs = list[dict[str, TokenLogprob] | None]  # per token of the prompt, by token id


class GenerateAnswer(Struct):
    """The answer of /inference/v1/generate."""

    choices: list[Generation]
    prompt_logprobs: PromptLogprobs | None = None
    usage: Usage | None = None


class StreamChunk(Struct):
    """One event of a streamed answer: new tokens of some samples, or the error that ends it."""

    choices: list[Generation] = []
    error: Raw = Raw()


# --- vLLM's tool parser, POST /v1/chat/completions/derender


class SampledChoice(Struct):
    index: int
    token_ids: list[int]


class SampledAnswer(Struct):
    """The answer to be parsed, as vLLM's token endpoint gave it."""

    choices: list[SampledChoice]


class ChatRequest(Struct):
    """What a parser reads of the request that was answered. `tools` are OpenAI's."""

    tools: object
    tool_choice: str = "auto"
    messages: tuple[dict[str, str], ...] = ({"role": "user", "content": ""},)


class ParseRequest(Struct):
    """The body. `prompt_token_ids` are the last of the prompt."""

    generate_response: SampledAnswer
    chat_request: ChatRequest
    prompt_token_ids: list[int]


class FunctionCall(Struct):
    """A function's name and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Struct):
    id: str
    function: FunctionCall
    type: str = "function"


class ParsedMessage(Struct):
    content: str | None = None
    tool_calls: list[ToolCall] = []


class ParsedChoice(Struct):
    index: int
    message: ParsedMessage


class ParsedAnswer(Struct):
    choices: list[ParsedChoice]
