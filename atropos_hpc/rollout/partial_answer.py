"""The samples of a request while they are generated, and how they continue on another server.

A server streams its tokens, so the client holds what an unfinished answer has so far, with the
log-prob, the policy version and whatever else belongs to each token. When the server is lost or a
weight update aborts the request, each unfinished sample continues as a request of its own: its
prompt is the old prompt and the tokens that are there. So no token is sampled twice, and a long
answer is as likely as without the interruption.

What depends on the tokens before the prompt's end cannot continue that way, and starts anew: see
`can_continue`.
"""

from collections.abc import Callable, Sequence

from msgspec.structs import replace

from atropos_hpc.contracts.messages import (
    GenerateAnswer,
    GenerateRequest,
    Generation,
    Logprobs,
    SamplingParams,
    Usage,
    VersionSpan,
)

Decode = Callable[[Sequence[int]], str]  # token ids to text
NEW_SEED = 0x9E3779B1  # added per token: a continued sample must not draw its first numbers again


def can_continue(sampling: SamplingParams) -> bool:
    """Return whether the rest of an answer can be sampled with its beginning as the prompt.

    Not with a grammar, with penalties that count the tokens of the answer only, or with words that
    may not be completed. vLLM's repetition penalty counts the prompt too, so it may.
    """
    by_answer = (
        sampling.presence_penalty,
        sampling.frequency_penalty,
        sampling.bad_words,
        sampling.structured_outputs,
    )
    return not any(by_answer)


class Sample:
    """One sample: what is there of it, and the request that generates the rest."""

    def __init__(self, request: GenerateRequest, index: int, decode: Decode | None = None) -> None:
        sampling = request.sampling_params
        self.request, self.decode = request, decode
        self.stops = [sampling.stop] if isinstance(sampling.stop, str) else sampling.stop or []
        # A stop string may begin in one part and end in the next: only with text can that be seen.
        self.continues = can_continue(sampling) and (decode is not None or not self.stops)
        self.index = index
        # Tokens over all interruptions: not generated again, and generated again.
        self.kept = self.dropped = 0
        self.cut = False  # at a stop string that lay across two parts
        self._clear()

    def _clear(self) -> None:
        self.generation = Generation([], index=self.index)
        self.joint = 0  # tokens that earlier servers generated
        self._spans: list[VersionSpan] = []  # theirs
        self._at_joint = False  # whether a stop string may still lie across the joint

    @property
    def finished(self) -> bool:
        return self.generation.finish_reason not in (None, "abort")

    def add(self, new: Generation) -> None:
        """Append what a server sent. Its version spans cover all that this server generated."""
        if self.cut:
            return
        whole = self.generation
        whole.token_ids += new.token_ids
        whole.finish_reason, whole.stop_reason = new.finish_reason, new.stop_reason
        if new.text is not None:
            whole.text = (whole.text or "") + new.text
        if new.logprobs is not None:
            whole.logprobs = whole.logprobs or Logprobs([])
            whole.logprobs.content += new.logprobs.content
        if new.sampling_mask is not None:
            whole.sampling_mask = whole.sampling_mask or []
            whole.sampling_mask += new.sampling_mask
        if new.weight_versions is not None:
            whole.weight_versions = self._spans + [
                VersionSpan(span.version, self.joint + span.start, self.joint + span.end)
                for span in new.weight_versions
            ]
        if self._at_joint:
            self._stop_at_joint()

    def resume(self, saved: Generation) -> None:
        saved.index = self.index
        self.generation = saved
        if saved.token_ids and not self.finished:
            self.interrupt()
        elif self.finished:
            self.kept += len(saved.token_ids)

    def interrupt(self) -> None:
        """Keep what is there for the next server, or drop it where it cannot be continued."""
        tokens = len(self.generation.token_ids)
        if not self.continues:
            self.dropped += tokens
            self._clear()
            return
        self.kept += tokens
        self._at_joint = bool(tokens and self.stops)
        self.joint, self._spans = tokens, list(self.generation.weight_versions or ())
        self.generation.finish_reason = None
        most = self.request.sampling_params.max_tokens
        if tokens and most is not None and tokens >= most:
            self.generation.finish_reason = "length"

    def rest(self) -> GenerateRequest:
        sampling, tokens = self.request.sampling_params, self.generation.token_ids
        changes: dict[str, int] = {"n": 1}
        if sampling.max_tokens is not None:
            changes["max_tokens"] = sampling.max_tokens - len(tokens)
        if sampling.min_tokens is not None:
            changes["min_tokens"] = max(0, sampling.min_tokens - len(tokens))
        if sampling.seed is not None:
            changes["seed"] = (sampling.seed + self.index + len(tokens) * NEW_SEED) % (1 << 63)
        return replace(
            self.request,
            token_ids=[*self.request.token_ids, *tokens],
            sampling_params=replace(sampling, **changes),
        )

    def result(self) -> Generation:
        """Return the complete sample. The text of a joined one is decoded from all its tokens."""
        whole = self.generation
        if self.joint and whole.text is not None and self.decode is not None:
            whole.text = self._text(whole)
        return whole

    def _text(self, whole: Generation) -> str:
        """Decode as the server does: without the stop token or string, unless asked for."""
        assert self.decode is not None
        if self.request.sampling_params.include_stop_str_in_output:
            return self.decode(whole.token_ids)
        if isinstance(whole.stop_reason, str):
            text = self.decode(whole.token_ids)
            return text[: text.rindex(whole.stop_reason)]
        return self.decode(whole.token_ids[:-1] if whole.ended_by_token else whole.token_ids)

    def _stop_at_joint(self) -> None:
        """End the sample at a stop string that began before the joint; servers see later ones."""
        assert self.decode is not None
        tokens = self.generation.token_ids
        before = len(self.decode(tokens[: self.joint]))
        longest = max(map(len, self.stops))
        least = max(self.joint, self.request.sampling_params.min_tokens or 0) + 1
        for end in range(least, len(tokens) + 1):
            text = self.decode(tokens[:end])
            for stop in self.stops:
                if 0 <= text.find(stop, max(0, before - len(stop) + 1)) < before:
                    return self._cut(end, stop)
            if len(text) >= before + longest - 1:
                self._at_joint = False
                return

    def _cut(self, end: int, stop: str) -> None:
        whole = self.generation
        del whole.token_ids[end:]
        if whole.logprobs is not None:
            del whole.logprobs.content[end:]
        if whole.sampling_mask is not None:
            del whole.sampling_mask[end:]
        whole.weight_versions = [
            VersionSpan(span.version, span.start, min(span.end, end))
            for span in whole.weight_versions or ()
            if span.start < end
        ]
        whole.finish_reason, whole.stop_reason = "stop", stop
        self.cut = True


def answer_of(samples: Sequence[Sample]) -> GenerateAnswer:
    """Return the answer that the complete samples of a request make up."""
    choices = [sample.result() for sample in samples]
    prompt = len(samples[0].request.token_ids)
    generated = sum(len(choice.token_ids) for choice in choices)
    return GenerateAnswer(choices, usage=Usage(prompt, generated, prompt + generated))
