"""GRPO training on rewards from Atropos environments, on a laptop or a Slurm cluster."""

__version__ = "0.2.0"
