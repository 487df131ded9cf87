"""Where the steps run: one device in this process, or several through Hugging Face accelerate.

Both give the loop the same few calls. Data parallelism only: every process holds the whole model.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxprune.errors import SpecError


class Backend(Protocol):
    """What the loop needs of the devices."""

    device: torch.device
    processes: int
    process: int

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        """The model to call; its gradients are averaged over the processes."""
        ...

    def unwrap(self, model: nn.Module) -> None:
        """Leave no trace of ``prepare`` on the model."""
        ...

    def autocast(self) -> AbstractContextManager[Any]: ...

    def step(self, loss: Tensor, parameters: list[nn.Parameter], clip: float | None) -> None:
        """Gradients, clipping, one step of the optimizer."""
        ...

    def mean(self, value: float) -> float:
        """Over the processes."""
        ...

    def share(self, value: Any) -> Any:
        """Process 0's value, for all."""
        ...

    def align(self, model: nn.Module) -> None:
        """All processes take process 0's buffers."""
        ...

    def scale(self) -> dict[str, Any]:
        """State of the gradient scaler as JSON; empty without one."""
        ...

    def set_scale(self, state: dict[str, Any]) -> None: ...


class Local:
    """One device, this process."""

    def __init__(self, device: torch.device, precision: str) -> None:
        self.device, self.processes, self.process = device, 1, 0
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        self.optimizer = optimizer
        return model

    def unwrap(self, model: nn.Module) -> None:
        """Nothing was wrapped."""

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext()

    def step(self, loss: Tensor, parameters: list[nn.Parameter], clip: float | None) -> None:
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(parameters, clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def mean(self, value: float) -> float:
        return value

    def share(self, value: Any) -> Any:
        return value

    def align(self, model: nn.Module) -> None:
        """There is one process."""

    def scale(self) -> dict[str, Any]:
        return dict(self.scaler.state_dict())

    def set_scale(self, state: dict[str, Any]) -> None:
        if state:
            self.scaler.load_state_dict(state)


class Accelerated:
    """Through an ``accelerate.Accelerator``."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.processes = int(accelerator.num_processes)
        self.process = int(accelerator.process_index)
        if self.processes > 1 and not str(accelerator.distributed_type).startswith(
            ("DistributedType.MULTI_", "MULTI_")
        ):
            raise SpecError(
                f"accelerate is set to {accelerator.distributed_type}; fine-tuning is data "
                "parallel, every process with the whole model: choose multi-GPU or multi-CPU"
            )

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        prepared, self.optimizer = self.accelerator.prepare(model, optimizer)
        return prepared  # type: ignore[no-any-return]

    def unwrap(self, model: nn.Module) -> None:
        self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        model.__dict__.pop("forward", None)  # for mixed precision it was wrapped

    def autocast(self) -> AbstractContextManager[Any]:
        return self.accelerator.autocast()  # type: ignore[no-any-return]

    def step(self, loss: Tensor, parameters: list[nn.Parameter], clip: float | None) -> None:
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        if clip is not None:
            self.accelerator.clip_grad_norm_(parameters, clip)
        self.optimizer.step()

    def mean(self, value: float) -> float:
        here = torch.tensor(value, dtype=torch.float32, device=self.device)
        return float(self.accelerator.reduce(here, "mean"))

    def share(self, value: Any) -> Any:
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def align(self, model: nn.Module) -> None:
        from accelerate.utils import broadcast

        with torch.no_grad():
            for buffer in model.buffers():
                buffer.copy_(broadcast(buffer))

    def scale(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {} if scaler is None else dict(scaler.state_dict())

    def set_scale(self, state: dict[str, Any]) -> None:
        if state and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state)


def backend_for(accelerator: Any, device: torch.device, precision: str) -> Backend:
    """``accelerator`` where one is given; one of our own where several processes were launched.

    Raises SpecError where accelerate is needed and not installed.
    """
    if accelerator is not None:
        return Accelerated(accelerator)
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return Local(device, resolved(precision, device))
    try:
        from accelerate import Accelerator
    except ImportError as e:
        raise SpecError(
            f"{os.environ['WORLD_SIZE']} processes were launched, which needs accelerate; install "
            "it with: pip install 'fxprune[tune]'"
        ) from e
    on_cpu = not torch.cuda.is_available()
    place = torch.device("cpu" if on_cpu else "cuda")
    return Accelerated(Accelerator(cpu=on_cpu, mixed_precision=resolved(precision, place)))


def resolved(precision: str, device: torch.device) -> str:
    """What "auto" means on ``device``."""
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
