"""AdamW in 10 bytes per parameter instead of 16, gradient included; the weights stay float32.

A float32 weight is kept in two halves. The upper half is the model's own parameter, the weight
rounded to bfloat16, so that the model computes with it and publishes it as it is. The lower half is
what rounding took away, and the optimizer's state. Together they are the exact float32.

Moments and gradients are bfloat16. The second moment is rounded stochastically: it changes by
1 - beta2 of itself in a step, which rounding to nearest would lose. The random bits follow from the
step, so a resumed run repeats them.

The arithmetic is torch's own kernel, on float32 copies of a few elements at a time.

A checkpoint holds the weights in the form of the optimizer that wrote it. `in_stored_form` and
`take_weights` read it into either form.
"""

from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from atropos_hpc.learner.state import StateDict

# Elements whose float32 copies exist at a time: in a core's cache, or large enough for a GPU.
CHUNK = {"cpu": 1 << 17, "cuda": 1 << 24}
HALF = 1 << 15
LOWER = "lower"  # the key of a weight's lower half among the optimizer's state


class SplitAdamW(torch.optim.Optimizer):
    """See above. The parameters are bfloat16, sharded (DTensor) or not.

    State of each: exp_avg and exp_avg_sq, bfloat16, and `lower`, 16-bit integers. They are stored
    under the type bfloat16 because torch casts a restored state to the type of its parameter.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    for name in ("exp_avg", "exp_avg_sq", LOWER):
                        state[name] = torch.zeros_like(parameter)
                state["step"] += 1
                _update(parameter, state, group)


def _update(parameter: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    upper, gradient, mean, square, lower = (
        _flat(tensor)
        for tensor in (
            parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], state[LOWER],
        )
    )  # fmt: skip
    upper, lower, rounded_square = (each.view(torch.int16) for each in (upper, lower, square))
    device, size = upper.device, min(len(upper), CHUNK.get(upper.device.type, CHUNK["cuda"]))
    step = state["step"].to(device)
    dither = torch.randint(
        1 << 16, (size,), dtype=torch.int32, device=device,
        generator=torch.Generator(device).manual_seed(int(state["step"])),
    )  # fmt: skip
    for start in range(0, len(upper), max(1, size)):
        part = slice(start, start + size)
        weights = join(upper[part], lower[part])
        first, second = mean[part].float(), square[part].float()
        torch._fused_adamw_(
            [weights], [gradient[part].float()], [first], [second], [], [step],
            lr=float(group["lr"]), beta1=group["betas"][0], beta2=group["betas"][1],
            weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
        )  # fmt: skip
        upper[part], lower[part] = split(weights)
        mean[part] = first
        rounded_square[part] = (second.view(torch.int32) + dither[: len(second)]) >> 16


def split(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split float32 into a bfloat16, as int16, and what it lacks, as int32 within 16 bits."""
    bits = weights.view(torch.int32)
    upper = (bits + HALF) >> 16  # to nearest, half up: the difference is at least -HALF
    return upper.to(torch.int16), bits - (upper << 16)


def join(upper: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """Return the float32 of two halves, given as int16."""
    return ((upper.to(torch.int32) << 16) + lower).view(torch.float32)


def in_stored_form(own: StateDict, stored: Container[str]) -> StateDict:
    """Return `own` with other tensors where a checkpoint with these keys has the other form."""
    weights = dict(own.get("model", {}))
    moments = {name: dict(each) for name, each in own.get("optimizer", {}).items()}
    for name, each in moments.items():
        halves = f"optimizer.{name}.{LOWER}" in stored
        if halves and LOWER not in each:
            weights[name], each[LOWER] = (
                torch.zeros_like(weights[name], dtype=torch.bfloat16) for _ in range(2)
            )
        elif not halves and each.pop(LOWER, None) is not None:
            weights[name] = torch.zeros_like(weights[name], dtype=torch.float32)
    return {**own, "model": weights, "optimizer": moments} if moments else own


def take_weights(own: StateDict, read: StateDict) -> None:
    """Set the weights of `own` that `read`, its filled `in_stored_form`, has in the other form."""
    for name, each in own.get("optimizer", {}).items():
        halves = read["optimizer"][name]
        target, source = (_flat(state["model"][name]) for state in (own, read))
        if LOWER in halves and LOWER not in each:
            lower = _flat(halves[LOWER]).view(torch.int16)
            target.copy_(join(source.view(torch.int16), lower))
        elif LOWER in each and LOWER not in halves:
            lower = _flat(each[LOWER]).view(torch.int16)
            target.view(torch.int16)[:], lower[:] = split(source)


def _flat(tensor: Any) -> torch.Tensor:
    """View this rank's part of a tensor as one dimension."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.view(-1)
