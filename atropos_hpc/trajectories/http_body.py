"""Request bodies: their size limits, memory limit, time limit, and content encoding."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from aiohttp import web
from isal import isal_zlib

from atropos_hpc.contracts.scored_group import RequestError

CONCURRENT_BODIES = 8  # bodies of the maximum size whose bytes may be held at once
MAX_INFLATION = 2  # a gzipped body may inflate to this times the maximum size
MAX_MEMBERS = 100  # of a gzipped body
SLICE_BYTES = 1 << 16  # given to the inflater at once, which copies what follows a member's end
IN_LOOP_BYTES = 1 << 16  # a larger gzipped body is inflated in a thread


@dataclass(frozen=True)
class BodyLimits:
    """Limits on one body. It has to arrive within `seconds`, plus its size at `bytes_per_s`."""

    max_bytes: int
    seconds: float = 30.0
    bytes_per_s: float = 1e6


class BodyReader:
    """Reads request bodies, with a bound on the memory of all that are being received."""

    def __init__(self, limits: BodyLimits) -> None:
        self.limits = limits
        self._held = 0  # bytes received of unfinished bodies; what never arrives holds nothing

    async def read(self, request: web.Request) -> bytes:
        """Return the inflated body.

        Raises RequestError: 408 too slow, 413 too large, 429 too many at once.
        """
        limit = self.limits.max_bytes
        encoding = request.headers.get("Content-Encoding", "")
        seconds = self.limits.seconds + limit / self.limits.bytes_per_s
        try:
            async with asyncio.timeout(seconds):
                body = await self._receive(request, limit)
        except TimeoutError:
            raise RequestError(408, f"the body did not arrive within {seconds:.0f} s") from None
        if not encoding or len(body) < IN_LOOP_BYTES:
            return inflate(body, encoding, MAX_INFLATION * limit)
        return await asyncio.to_thread(inflate, body, encoding, MAX_INFLATION * limit)

    async def _receive(self, request: web.Request, limit: int) -> bytes:
        too_large = f"the body is larger than {limit} bytes (trajectories.max_body_bytes)"
        if (request.content_length or 0) > limit:
            raise RequestError(413, too_large)
        parts, received = [], 0  # request.read() would copy twice more
        try:
            async for part in request.content.iter_any():
                if self._held + len(part) > CONCURRENT_BODIES * limit:
                    detail = f"{self._held} bytes are being received already: send it again later"
                    raise RequestError(429, detail)
                parts.append(part)
                received += len(part)
                self._held += len(part)
                if received > limit:
                    raise RequestError(413, too_large)
        finally:
            self._held -= received
        return parts[0] if len(parts) == 1 else b"".join(parts)


def inflate(body: bytes, encoding: str, limit: int) -> bytes:
    """Undo Content-Encoding, holding at most `limit` bytes. Raises RequestError (400, 413, 415)."""
    if encoding.lower() in ("", "identity"):
        return body
    if encoding.lower() not in ("gzip", "x-gzip"):
        raise RequestError(415, f"content-encoding {encoding!r}: use gzip or none")
    try:
        return b"".join(_members(memoryview(body), limit))
    except (isal_zlib.error, EOFError, ValueError) as error:  # type: ignore[misc]
        raise RequestError(400, f"gzip: {error}") from None


def _members(body: memoryview, limit: int) -> Iterator[bytes]:
    """Yield the inflated parts of a gzip body's members. Raises RequestError."""
    at, left = 0, limit
    for _ in range(MAX_MEMBERS):
        member = isal_zlib.decompressobj(31)  # with gzip's header and trailer
        while not member.eof:
            if at == len(body):
                raise RequestError(400, "gzip: the body is cut short")
            piece = body[at : at + SLICE_BYTES]
            part = member.decompress(piece, left + 1)
            at += len(piece) - len(member.unused_data)
            left -= len(part)
            if left < 0:
                raise RequestError(413, f"the body inflates to more than {limit} bytes")
            yield part
        if at == len(body):
            return
    raise RequestError(400, f"gzip: the body has more than {MAX_MEMBERS} members")
