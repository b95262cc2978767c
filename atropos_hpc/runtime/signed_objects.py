"""Have torch's object collectives unpickle only what a process of the run has sent.

`all_gather_object`, `broadcast_object_list` and the like unpickle what arrives over gloo or NCCL,
whose ports ask for no token. Their callers are this package, torch's checkpointing, DeepSpeed and
vLLM's workers. Once `sign_object_collectives` has been called in all processes of a group, each
pickle is preceded by its HMAC under the run's token, and one with a wrong HMAC is refused unread.

In torch 2.13, every object passes through two globals of `distributed_c10d`.
"""

import hmac
import pickle
from typing import Any, BinaryIO

ALGORITHM, SIGNATURE_BYTES = "sha256", 32


class ForgedObject(Exception):
    """An object was not sent by a process that knows the run's token."""


def sign_object_collectives(token: str) -> None:
    """Sign the objects that this process sends, and check those that it receives."""
    from torch.distributed import distributed_c10d

    key = token.encode()

    class Pickler:
        def __init__(self, file: BinaryIO) -> None:
            self._file = file

        def dump(self, value: Any) -> None:
            content = pickle.dumps(value)
            self._file.write(hmac.digest(key, content, ALGORITHM) + content)

    class Unpickler:
        def __init__(self, file: BinaryIO) -> None:
            self._file = file

        def load(self) -> Any:
            signature, content = self._file.read(SIGNATURE_BYTES), self._file.read()
            if not hmac.compare_digest(signature, hmac.digest(key, content, ALGORITHM)):
                raise ForgedObject(
                    "another process than those of the run has sent an object to this process"
                    " group; it was not read. Use exclusive nodes and a network of your own"
                )
            return pickle.loads(content)

    distributed_c10d._pickler = Pickler  # type: ignore[attr-defined, assignment]
    distributed_c10d._unpickler = Unpickler  # type: ignore[attr-defined, assignment]
