"""Find the cheapest sequence of files from which a reader can make a policy version."""

from collections.abc import Callable
from dataclasses import dataclass

from atropos_hpc.contracts.policy import Manifest, PolicyVersion
from atropos_hpc.policy.manifest import BadVersion


@dataclass(frozen=True)
class Route:
    """A way to make a version: read `start` in full, then apply `deltas` in order.

    `start` None means: begin with the version that the reader holds.
    """

    start: Manifest | None
    deltas: tuple[Manifest, ...]

    @property
    def bytes(self) -> int:
        """The number of bytes to be read from the store."""
        full = sum(entry.bytes for entry in self.start.files) if self.start else 0
        return full + sum(entry.bytes for step in self.deltas for entry in step.deltas)

    @property
    def versions(self) -> list[PolicyVersion]:
        """The versions whose files are read."""
        return [step.version for step in (*([self.start] if self.start else []), *self.deltas)]


def find_routes(
    manifest: Callable[[PolicyVersion], Manifest], target: PolicyVersion, held: PolicyVersion | None
) -> list[Route]:
    """Return the routes to `target`, the one with the fewest bytes first.

    There are at most two: from the newest full version, and from the version that the reader
    holds. `manifest` returns a version's manifest. Raises BadVersion when there is no route.
    """
    routes: list[Route] = []
    deltas: list[Manifest] = []
    version, full_found, failure = target, False, ""
    while True:
        if version == held:
            routes.append(Route(None, tuple(reversed(deltas))))
        try:
            step = manifest(version)
        except BadVersion as error:
            failure = f": {error}"
            break
        if step.kind != "delta" and not full_found:
            full_found = True
            routes.append(Route(step, tuple(reversed(deltas))))
        if step.base is None or (full_found and (held is None or step.base < held)):
            break
        deltas.append(step)
        version = step.base
    if not routes:
        raise BadVersion(
            f"{target} can be made neither from a full version nor from the one held{failure}"
        )
    return sorted(routes, key=lambda route: route.bytes)
