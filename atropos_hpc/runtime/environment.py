"""Which variables of the user's shell reach the processes of a run: one table.

A run is described by its run.json, and is resumed from other shells. A variable that changes what a
process does, and is likely to be set for something else, is dropped; where it is wanted, it belongs
into `cluster.setup`, `roles.ROLE.setup` or `rollout.variables`, which apply after this table. The
rest passes: credentials, caches, proxies, and what a site chooses for its network and hardware.

`RULES` is applied once, by the first process of a run, from which all others inherit, and by the
checks before. docs/slurm.md shows it.
"""

import fnmatch
import logging
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass

log = logging.getLogger(__name__)

RUN, SLURM = "roles", "Slurm's commands"  # whom a rule is for
WHOM = (RUN, SLURM)
PASS, DROP = "pass", "drop"


@dataclass(frozen=True)
class Rule:
    """What happens to the variables that match one of the space-separated patterns."""

    patterns: str
    whom: tuple[str, ...]
    action: str
    reason: str

    def matches(self, name: str, whom: str) -> bool:
        """Tell whether the rule decides about a variable."""
        return whom in self.whom and any(
            fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns.split()
        )


# The first rule that matches decides.
RULES = (
    # vLLM
    Rule("VLLM_CPU_* VLLM_TARGET_DEVICE VLLM_NCCL_SO_PATH", (RUN,), PASS, "the site's hardware"),
    Rule("VLLM_CACHE_ROOT VLLM_CONFIG_ROOT VLLM_ASSETS_CACHE", (RUN,), PASS, "caches"),
    Rule("VLLM_LOGGING_LEVEL", (RUN,), PASS, "changes logs only"),
    Rule(
        "VLLM_*",
        (RUN,),
        DROP,
        "changes how servers work: VLLM_API_KEY makes them answer 401 to the run,"
        " VLLM_ALLOW_INSECURE_SERIALIZATION lets them unpickle; give rollout.variables",
    ),
    # Python
    Rule("PYTHONPATH PYTHONUSERBASE PYTHONNOUSERSITE", (RUN,), PASS, "where user code lies"),
    Rule(
        "PYTHONHOME PYTHONEXECUTABLE PYTHONPLATLIBDIR __PYVENV_LAUNCHER__",
        (RUN,),
        DROP,
        "belong to one interpreter, and a run has two",
    ),
    Rule(
        "PYTHONINSPECT PYTHONOPTIMIZE PYTHONWARNINGS PYTHONSTARTUP PYTHONIOENCODING",
        (RUN,),
        DROP,
        "processes would not end, skip assertions, fail on warnings or on text",
    ),
    # other launchers
    Rule(
        "MASTER_ADDR MASTER_PORT RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK"
        " ROLE_WORLD_SIZE TORCHELASTIC_* OMPI_* PMI_* PMIX_* ACCELERATE_*",
        (RUN,),
        DROP,
        "another launcher's; the run gives each rank its own",
    ),
    Rule("RAY_*", (RUN,), DROP, "would join another cluster; no role uses Ray"),
    # libraries
    Rule(
        "WANDB_RUN_ID WANDB_RESUME WANDB_SWEEP_ID WANDB_SERVICE WANDB__SERVICE",
        (RUN,),
        DROP,
        "name another W&B run; the run has an id of its own",
    ),
    Rule(
        "TOKENIZERS_PARALLELISM",
        (RUN,),
        DROP,
        "with `true`, tokenizers may deadlock in forked processes",
    ),
    Rule("HF_* HUGGING* TRANSFORMERS_* WANDB_*", (RUN,), PASS, "credentials, caches, offline mode"),
    Rule("OMP_* MKL_* KMP_* GOMP_*", (RUN,), PASS, "trainer.threads and the run's own win"),
    Rule("NCCL_* GLOO_* UCX_* FI_* TP_*", (RUN,), PASS, "the site's network"),
    Rule("*_proxy *_PROXY", (RUN,), PASS, "the way out; requests within a run do not use it"),
    # Slurm
    Rule(
        "SBATCH_* SALLOC_*",
        WHOM,
        DROP,
        "override the script's options, in the checks as at submission; give cluster.* or roles.*",
    ),
    Rule("SRUN_*", WHOM, DROP, "override the steps' options; give roles.ROLE.srun"),
    Rule(
        "SQUEUE_* SINFO_* SCONTROL_* SACCT_* SLURM_TIME_FORMAT SLURM_BITSTR_LEN",
        WHOM,
        DROP,
        "change what the commands print, which is parsed",
    ),
)


def decide(name: str, whom: str = RUN) -> Rule | None:
    """Return the rule for a variable; None where none matches, and the variable passes."""
    return next((rule for rule in RULES if rule.matches(name, whom)), None)


def is_dropped(name: str, whom: str = RUN) -> bool:
    """Tell whether a variable of the shell is kept from `whom`.

    >>> is_dropped("VLLM_API_KEY"), is_dropped("HF_TOKEN"), is_dropped("SBATCH_QOS", SLURM)
    (True, False, True)
    """
    rule = decide(name, whom)
    return rule is not None and rule.action == DROP


def kept(env: Mapping[str, str], whom: str = RUN) -> dict[str, str]:
    """Return the variables of an environment that reach `whom`."""
    return {name: value for name, value in env.items() if not is_dropped(name, whom)}


def drop_from(env: MutableMapping[str, str]) -> list[str]:
    """Remove the variables that do not reach the run's processes; return their names."""
    names = sorted(name for name in env if is_dropped(name))
    for name in names:
        del env[name]
    return names


def describe(names: Iterable[str]) -> str:
    """Word what was dropped, for a log. Values are not shown: they may be secrets."""
    return (
        f"not passed on to the run's processes: {', '.join(names)}, which your shell has set (see"
        " docs/slurm.md#environment-variables)"
    )
