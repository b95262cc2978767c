"""Request bodies: their size limits, memory limit, and content encoding."""

from aiohttp import web
from isal import isal_zlib

from atropos_hpc.contracts.scored_group import RequestError

CONCURRENT_BODIES = 8  # bodies of the maximum size that may be received at once
MAX_INFLATION = 2  # a gzipped body may inflate to this times the maximum size


class BodyReader:
    """Reads request bodies, with a bound on the memory of all that are being received."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._receiving = 0  # bytes

    async def read(self, request: web.Request) -> bytes:
        """Return the inflated body. Raises RequestError: 413 too large, 429 too many at once."""
        limit, declared = self.max_bytes, request.content_length
        too_large = f"the body is larger than {limit} bytes (trajectories.max_body_bytes)"
        if (declared or 0) > limit:
            raise RequestError(413, too_large)
        size = limit if declared is None else declared
        if self._receiving + size > CONCURRENT_BODIES * limit:
            detail = f"{self._receiving} bytes are being received already: send it again later"
            raise RequestError(429, detail)
        self._receiving += size
        parts, received = [], 0  # request.read() would copy twice more
        try:
            async for part in request.content.iter_any():
                parts.append(part)
                received += len(part)
                if received > limit:
                    raise RequestError(413, too_large)
        finally:
            self._receiving -= size
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        return inflate(body, request.headers.get("Content-Encoding", ""), MAX_INFLATION * limit)


def inflate(body: bytes, encoding: str, limit: int) -> bytes:
    """Undo Content-Encoding, holding at most `limit` bytes. Raises RequestError (400, 413, 415)."""
    if encoding.lower() in ("", "identity"):
        return body
    if encoding.lower() not in ("gzip", "x-gzip"):
        raise RequestError(415, f"content-encoding {encoding}: use gzip or none")
    parts, left = [], limit
    try:
        while body:
            member = isal_zlib.decompressobj(31)  # with gzip's header and trailer
            part = member.decompress(body, left + 1)
            parts.append(part)
            left -= len(part)
            if left < 0:
                raise RequestError(413, f"the body inflates to more than {limit} bytes")
            if not member.eof:
                raise RequestError(400, "gzip: the body is cut short")
            body = member.unused_data
    except (isal_zlib.error, EOFError, ValueError) as error:  # type: ignore[misc]
        raise RequestError(400, f"gzip: {error}") from None
    return parts[0] if len(parts) == 1 else b"".join(parts)
