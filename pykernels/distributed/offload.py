"""OffloadedOptimizer: master weights and state in host memory, updated there, for parameters anywhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn

from ..optim._shard import local, wrap
from ._mirror import Inner, MirrorOptimizer


class Transfers(Protocol):
    """Copies between a device and the host. Tickets stand for copies under way."""

    def host(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor: ...
    def fetch(self, source: torch.Tensor, host: torch.Tensor) -> Any: ...
    def wait(self, ticket: Any) -> None: ...
    def begin(self, device: torch.device) -> None: ...
    def send(self, host: torch.Tensor, target: torch.Tensor) -> None: ...
    def finish(self, device: torch.device) -> None: ...


class Direct:
    """No device: every copy is done when the call returns."""

    def host(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Host memory for a tensor's elements."""
        return torch.empty(tensor.shape, dtype=dtype)

    def fetch(self, source: torch.Tensor, host: torch.Tensor) -> None:
        """Starts a copy to the host."""
        host.copy_(source)

    def wait(self, ticket: None) -> None:
        """Makes the host wait for a fetch."""

    def begin(self, device: torch.device) -> None:
        """What follows may be sent to tensors that earlier work on the device still reads."""

    def send(self, host: torch.Tensor, target: torch.Tensor) -> None:
        """Starts a copy to the device."""
        target.copy_(host)

    def finish(self, device: torch.device) -> None:
        """Later work on the device sees what was sent."""


class Cuda:
    """Pinned memory and two side streams for each device, one down and one up. Only `wait` blocks the host."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}

    def _of(self, device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device), torch.cuda.Stream(device)
        return self._streams[device]

    def host(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Pinned host memory for a tensor's elements."""
        return torch.empty(tensor.shape, dtype=dtype, pin_memory=True)

    def fetch(self, source: torch.Tensor, host: torch.Tensor) -> Any:
        """Starts a copy to the host, behind what the current stream was given and what was sent from `host` before."""
        down, up = self._of(source.device)
        down.wait_stream(torch.cuda.current_stream(source.device))
        down.wait_stream(up)
        with torch.cuda.stream(down):
            host.copy_(source, non_blocking=True)
            source.record_stream(down)
            return down.record_event()

    def wait(self, ticket: Any) -> None:
        """Makes the host wait for a fetch."""
        ticket.synchronize()

    def begin(self, device: torch.device) -> None:
        """What follows may be sent to tensors that earlier work on the device still reads."""
        self._of(device)[1].wait_stream(torch.cuda.current_stream(device))

    def send(self, host: torch.Tensor, target: torch.Tensor) -> None:
        """Starts a copy to the device."""
        with torch.cuda.stream(self._of(target.device)[1]):
            target.copy_(host, non_blocking=True)

    def finish(self, device: torch.device) -> None:
        """Later work on the current stream sees what was sent."""
        torch.cuda.current_stream(device).wait_stream(self._of(device)[1])


class OffloadedOptimizer(MirrorOptimizer):
    """An optimizer whose master weights and state lie in host memory (pinned where there is a GPU).

    `params` as of any optimizer: plain parameters or DTensors, on any device. `optimizer_cls(params, **kwargs)` is
    given host copies of their local parts: float32 ones of low-precision parameters whose updates would be rounded to
    nearest, else of the parameter's dtype.

    A gradient starts on its way to the host as soon as it is ready, beside the backward of earlier layers. step()
    updates one bucket (bucket_bytes of parameters, last ones first) after another with the CPU kernels: a bucket waits
    only for its own gradients, so on a GPU, where step() is reached while backward still runs, it works while those of
    earlier layers still arrive. The new values of a bucket travel back while the next is updated. Host memory: the
    state, the copies, and the gradients once. A gradient changed after backward (clipped, say) is fetched again.

    The state has "master" beside what optimizer_cls keeps where that is a float32 copy. A parameter that is changed
    from outside, as by loading a model, is taken over in the next step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        optimizer_cls: Inner,
        *,
        bucket_bytes: int = 64 << 20,
        transfers: Transfers | None = None,
        **kwargs: Any,
    ) -> None:
        self._bucket_bytes = bucket_bytes
        self._transfers: Transfers = transfers or (Cuda() if torch.cuda.is_available() else Direct())
        self._wide = kwargs.get("rounding", "nearest") == "nearest"
        self._grads: dict[torch.Tensor, torch.Tensor] = {}  # host memory for the gradient, later for the new values
        self._fetched: dict[torch.Tensor, tuple[torch.Tensor, tuple[int, int], Any]] = {}  # gradient, versions, ticket
        self._versions: dict[torch.Tensor, int] = {}
        super().__init__(params, optimizer_cls, kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any optimizer."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self._on_gradient)
        self._buckets = _by_bytes([p for p, _ in self._pairs()][::-1], self._bucket_bytes)

    def _mirror_of(self, p: torch.Tensor) -> torch.Tensor:
        here = local(p.detach())
        low = p.dtype in (torch.bfloat16, torch.float16)
        host = self._transfers.host(here, torch.float32 if low and self._wide else p.dtype)
        host.copy_(here)
        self._versions[p] = local(p)._version
        return nn.Parameter(wrap(host, p, p.shape), requires_grad=p.requires_grad)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of any optimizer."""
        self._fetched.clear()
        super().zero_grad(set_to_none)

    def _on_gradient(self, p: torch.Tensor) -> None:
        assert p.grad is not None
        grad = local(p.grad)
        versions = p.grad._version, grad._version  # an operator may count for the DTensor or for its local part
        if p not in self._grads or self._grads[p].dtype != grad.dtype:
            self._grads[p] = self._transfers.host(grad, grad.dtype)
        self._fetched[p] = grad, versions, self._transfers.fetch(grad, self._grads[p])

    def _take_gradient(self, p: torch.Tensor) -> None:
        assert p.grad is not None
        grad = local(p.grad)
        fetched = self._fetched.get(p)
        if fetched is None or fetched[0] is not grad or fetched[1] != (p.grad._version, grad._version):
            self._on_gradient(p)

    def _take_over(self, p: torch.Tensor) -> None:
        """Elements of p that are not what the host copy rounds to were written by somebody else."""
        here = local(p.detach())
        if self._versions[p] == here._version:
            return
        host = local(self._mirrors[p].detach())
        now = here.cpu()
        host.copy_(torch.where(host.to(p.dtype) == now, host, now.to(host.dtype)))
        self._versions[p] = here._version

    def _update(self) -> None:
        devices = dict.fromkeys(local(p).device for p, _ in self._pairs())
        for device in devices:
            self._transfers.begin(device)
        for bucket in self._buckets:
            for p in bucket:
                if p.grad is not None:
                    self._take_gradient(p)
        try:
            for bucket in self._together():
                self._update_bucket([p for p in bucket if p.grad is not None])
        finally:
            self._fetched.clear()
            for device in devices:
                self._transfers.finish(device)

    def _together(self) -> list[list[torch.Tensor]]:
        """The parameters of each call of the inner optimizer: all of them where it clips by their global norm."""
        if any(group.get("max_grad_norm") for group in self.param_groups):
            return [[p for bucket in self._buckets for p in bucket]]
        return self._buckets

    def _update_bucket(self, bucket: list[torch.Tensor]) -> None:
        if not bucket:
            return
        for p in bucket:
            self._take_over(p)
            self._transfers.wait(self._fetched[p][2])
            self._mirrors[p].grad = wrap(self._grads[p].to(self._mirrors[p].dtype), p, p.shape)
        try:
            self.inner.step()
        finally:
            for p in bucket:
                self._mirrors[p].grad = None
        for p in bucket:
            here, host = local(p.detach()), local(self._mirrors[p].detach())
            # The gradient's place is free, and half as wide as a float32 copy.
            stage = self._grads[p] if self._grads[p].dtype == p.dtype else host
            if stage is not host:
                stage.copy_(host)
            self._transfers.send(stage, here)
            self._versions[p] = here._version

    def _extra_state(self, p: torch.Tensor) -> dict[str, Any]:
        mirror = self._mirrors[p]
        return {"master": mirror.detach()} if mirror.dtype != p.dtype else {}

    def _load_extra_state(self, p: torch.Tensor, state: dict[str, Any]) -> None:
        if "master" in state and self._mirrors[p].dtype != p.dtype:
            local(self._mirrors[p].detach()).copy_(local(state["master"]))


def _by_bytes(params: list[torch.Tensor], limit: int) -> list[list[torch.Tensor]]:
    buckets: list[list[torch.Tensor]] = []
    size = limit + 1
    for p in params:
        nbytes = local(p).numel() * p.element_size()
        if size + nbytes > limit:
            buckets.append([])
            size = 0
        buckets[-1].append(p)
        size += nbytes
    return buckets
