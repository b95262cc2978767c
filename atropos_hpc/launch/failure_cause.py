"""Why a run fails, in one line: its members' own errors, and what they waited for in vain.

A member writes its last error into its member file. A node agent repeats the error of the worker
or server for which it ended. So the cause is known where the supervisor decides the run's end.
"""

from collections.abc import Iterable, Sequence

from atropos_hpc.contracts.members import AgentState, AnyMember, EnvironmentState, RolloutJobState


def explain(how: str, own: Sequence[AnyMember], members: Iterable[AnyMember]) -> str:
    """Return why a run fails. `how`: what ended, and how; `own`: the members of what ended.

    >>> worker = EnvironmentState(environment="environment (e:E)", error="environment (e:E): bad")
    >>> explain("rollout0 ended with exit code 2", [AgentState(error="it ended: bad")], [worker])
    'it ended: bad'
    """
    agents = [member for member in own if isinstance(member, AgentState | RolloutJobState)]
    said = [member.error for member in [*agents, *own] if member.error]
    if said and agents:
        return said[0]
    cause = f"{how}: {said[0]}" if said else how
    return "; ".join([cause, *without_groups(members)])


def without_groups(members: Iterable[AnyMember]) -> list[str]:
    """Describe each environment of which groups were lost: how many, and the main reason."""
    found = {}
    for worker in members:
        if not isinstance(worker, EnvironmentState):
            continue
        if worker.error:
            found[worker.environment] = worker.error
        elif worker.reasons:
            main = worker.reasons[0]
            found[worker.environment] = (
                f"{worker.environment}: {worker.sent or 0} groups sent, {worker.unsent or 0} not"
                f" sent, {worker.refused or 0} refused; most often ({main.count} times):"
                f" {main.text}"
            )
    return list(found.values())
