"""Atropos' own trajectory API as a member of a run, behind the run's token.

    python -m atropos_hpc.trajectories.atropos_compat --run-dir RUN

For comparison with the durable server. It needs atroposlib, so it runs in the rollout role's
Python. Its state is in memory: a restart loses it.
"""

import asyncio
import logging
import signal

from atropos_hpc.contracts.members import TrajectoriesState
from atropos_hpc.runtime.membership import Member
from atropos_hpc.runtime.network import own_host
from atropos_hpc.runtime.run_dir import RunDir
from atropos_hpc.runtime.token_check import TokenGuard
from atropos_hpc.trajectories.server import listen, main, report_status, url_of

log = logging.getLogger(__name__)


async def serve(run: RunDir, node: str) -> None:
    """Run Atropos' server until SIGTERM."""
    import uvicorn
    from atroposlib.api.server import app

    from atropos_hpc.runtime.uvicorn_limits import limit_half_sent_requests

    limit_half_sent_requests()
    app.add_api_route("/health", lambda: {"status": "ok"})
    host = own_host(run.config().cluster.host)
    listener = listen(run, f"trajectories-{node}-0", host)
    member = Member(run, TrajectoriesState(), node)
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn stops on these, then raises them again for the handler that was set before
        signal.signal(number, lambda *_: None)
    config = uvicorn.Config(
        TokenGuard(app, run.token()), log_level="warning", log_config=None, access_log=False
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.05)
    if not serving.done():
        url = url_of(listener, host)
        log.info("Atropos' own trajectory API listening on %s", url)
        await asyncio.to_thread(member.update, state="serving", url=url)

    def status() -> dict[str, int]:
        queue = list(getattr(app.state, "queue", []))
        sequences = sum(len(group["tokens"]) for group in queue)
        return {"queued_groups": len(queue), "queued_sequences": sequences}

    await report_status(member, status, serving)
    await asyncio.to_thread(member.leave)
    serving.result()


if __name__ == "__main__":
    main(serve, "Atropos' own trajectory server.")
