"""The bodies of vLLM's administrative routes, in vLLM's own schema; see policy/weight_update.py."""

from msgspec import Struct


class VersionFiles(Struct, frozen=True):
    """Which version the workers load: see `vllm_engine.Update`."""

    directory: str = ""
    version: str = ""
    verified: bool = False


class UpdateWeights(Struct, frozen=True):
    """POST /update_weights."""

    update_info: VersionFiles


class FinishWeightUpdate(Struct, frozen=True):
    """POST /finish_weight_update."""

    weight_version: str


class AdapterCall(Struct, frozen=True):
    """POST /collective_rpc: a method of `vllm_engine.WorkerExtension` in every worker."""

    method: str
    kwargs: VersionFiles


class LoadLoraAdapter(Struct, frozen=True):
    """POST /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str


class UpdateWeightVersion(Struct, frozen=True):
    """POST /update_weight_version."""

    new_version: str


Body = UpdateWeights | FinishWeightUpdate | AdapterCall | LoadLoraAdapter | UpdateWeightVersion
