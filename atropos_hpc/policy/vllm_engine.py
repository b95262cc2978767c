"""A weight-transfer engine for vLLM that reads published policy versions from files.

vLLM imports this module in each worker process, because `WorkerExtension` is given as
--worker-extension-cls; importing it registers the engine under the name "disk". An update of the
full weights has three steps:

  start   nothing to prepare
  update  map every file of the node's copy (or read the store itself) and compare sizes and hashes
          with the manifest; the model is not touched, so a version that fails here leaves the old
          one in place
  finish  hand the tensors to vLLM's layer-by-layer reload, which splits and packs them as at
          start-up

If `finish` fails, the model is partly old and partly new, and the worker terminates itself: no
answer may come from half a version. All workers of a node map the same files. Where the node agent
has verified their hashes, the workers do not do so again. Adapters use
`WorkerExtension` instead.
"""

import logging
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.platforms import current_platform

from atropos_hpc.contracts.policy import ADAPTER_NAME, PolicyVersion
from atropos_hpc.policy import lora
from atropos_hpc.policy.manifest import BadVersion, read_manifest
from atropos_hpc.policy.shard_buffer import tensors_of
from atropos_hpc.runtime.process import return_freed_memory
from atropos_hpc.runtime.run_dir import RunDir
from atropos_hpc.runtime.signed_objects import sign_object_collectives
from atropos_hpc.runtime.token_check import RUN_DIR

log = logging.getLogger(f"vllm.{__name__}")  # under vLLM's logger, which has the handler

BACKEND = "disk"
EXIT_HALF_APPLIED = 70
LARGE_BYTES = 128 << 20  # of a version, whose freed memory is worth 0.1 s
ADAPTER_ID = 1  # what the API server gives the first adapter it is asked to register
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass
class Init(WeightTransferInitInfo):
    """Nothing is needed."""


@dataclass
class Update(WeightTransferUpdateInfo):
    """Which version to load: its directory, and `PolicyVersion`'s text form, for checking.

    An empty directory abandons the update. `verified`: this node has verified its hashes.
    """

    directory: str
    version: str
    verified: bool = False


class DiskEngine(WeightTransferEngine[Init, Update]):
    init_info_cls = Init
    update_info_cls = Update
    trainer_send_weights: Any = None  # abstract in vLLM 0.25; no trainer sends tensors here

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shards: list[dict[str, torch.Tensor]] = []

    def init_transfer_engine(self, init_info: Init) -> None:
        pass

    def start_weight_update(self) -> None:
        self._shards = []

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class synchronizes an accelerator, which a CPU build does not have; and nothing
        # was copied there yet.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Update) -> None:
        self._shards = []
        if not update_info.directory:
            raise BadVersion("the update was abandoned")
        if (method := self.model_config.quantization) is not None:
            raise BadVersion(f"this server's layers are quantized ({method}), the version is not")
        self._shards = read_version(
            Path(update_info.directory),
            PolicyVersion.parse(update_info.version),
            verified=update_info.verified,
        )

    def finish_weight_update(self) -> None:
        if not self._shards:
            raise BadVersion("finish without an update: nothing to apply")
        size = sum(tensor.nbytes for _, tensor in self._tensors())
        try:
            with set_current_vllm_config(self.vllm_config):  # 0.25 calls this outside of one
                initialize_layerwise_reload(self.model)
                loaded = self.model.load_weights(self._tensors())
                finalize_layerwise_reload(self.model, self.model_config)
                pack_output_layers(self.model)
            missing = {name for name, _ in self.model.named_parameters()} - (loaded or set())
            if loaded is not None and missing:
                names = ", ".join(sorted(missing)[:5])
                raise BadVersion(
                    f"the version has no weights for {names} ({len(missing)} parameters)"
                )
        except BaseException:
            log.critical(
                "applying new weights failed half way: the model is neither the old version nor the"
                " new one; terminating this server",
                exc_info=True,
            )
            logging.shutdown()
            os._exit(EXIT_HALF_APPLIED)
        finally:
            self._shards = []
        if current_platform.is_cpu() and size >= LARGE_BYTES:
            return_freed_memory()  # in which the weights were

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for shard in self._shards:
            yield from shard.items()

    def shutdown(self) -> None:
        self._shards = []


def read_version(
    directory: Path, version: PolicyVersion, kind: str = "full", verified: bool = False
) -> list[dict[str, torch.Tensor]]:
    """Map every tensor of a published version, one dict per shard.

    Raises BadVersion, naming the file, when anything differs from the manifest; the hashes are
    compared unless they are `verified`.
    """
    manifest = read_manifest(directory)
    if manifest.version != version or manifest.kind != kind:
        raise BadVersion(
            f"{directory.name}: {manifest.kind} version {manifest.version}, where version {version}"
            " was announced"
        )
    shards = []
    for file in manifest.files:
        # Not as a path: vLLM removes paths from its error messages.
        shard = f"{file.file} of {directory.name}"
        try:
            data = _mapped(directory / file.file)
        except (OSError, ValueError) as error:
            raise BadVersion(f"{shard}: {error}") from error
        if len(data) != file.bytes:
            raise BadVersion(f"{shard}: {len(data)} bytes, the manifest says {file.bytes}")
        if not verified and (digest := xxhash.xxh3_64_hexdigest(data)) != file.xxh3:
            raise BadVersion(f"{shard}: xxh3 {digest}, the manifest says {file.xxh3}")
        try:
            if file.file != lora.CONFIG:
                shards.append(tensors_in(data))
        except (ValueError, KeyError) as error:
            raise BadVersion(f"{shard}: cannot be read: {error!r}") from error
    if not any(shards):
        raise BadVersion(f"{directory.name}: no tensors")
    return shards


def _mapped(path: Path) -> Any:
    """Map a file, which nobody changes, privately: torch requires writable bytes."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return bytearray()
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def tensors_in(data: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file's bytes, without copying them."""
    found = {}
    for name, (dtype, shape, start, end) in tensors_of(data).items():
        kind = DTYPES[dtype]
        count = (end - start) // kind.itemsize
        flat = (
            torch.frombuffer(data, dtype=kind, count=count, offset=start)
            if count
            else torch.empty(0, dtype=kind)
        )
        found[name] = flat.reshape(shape)
    return found


def pack_output_layers(model: torch.nn.Module) -> None:
    """Pack output layers again. On an accelerator nothing is packed, and this does nothing.

    A CPU build multiplies with a packed copy of an output layer's weights. The reload skips a layer
    that is tied to the input embedding, because it has no weights of its own: its parameter is new
    then, but its packed copy would be the old one.
    """
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and isinstance(
            layer.quant_method, UnquantizedEmbeddingMethod
        ):
            layer.quant_method.process_weights_after_loading(layer)


class WorkerExtension:
    """Mixed into vLLM's worker class; naming it also imports this module into every worker."""

    def check_policy_adapter(self, directory: str, version: str, verified: bool) -> None:
        """Check the files of a published adapter, while the previous one is in use.

        Both methods are called through /collective_rpc. Raises BadVersion.
        """
        read_version(Path(directory), PolicyVersion.parse(version), "adapter", verified)

    def load_policy_adapter(self, directory: str, version: str, verified: bool) -> None:
        """Load an adapter in place of the previous one, while the engine is paused.

        Where one worker fails, others may have loaded it: the server has to be restarted.
        """
        self.check_policy_adapter(directory, version, verified)
        request = LoRARequest(ADAPTER_NAME, ADAPTER_ID, directory, load_inplace=True)
        worker: Any = self
        worker.add_lora(request)


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, DiskEngine)

if RUN_DIR in os.environ:  # before the worker joins the group of a server's workers
    sign_object_collectives(RunDir(Path(os.environ[RUN_DIR])).token())
