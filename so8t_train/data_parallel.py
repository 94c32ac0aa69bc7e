"""Data-parallel training: what the processes of one fit share, add up and agree on.

Every process holds the whole model and computes some of a step's forward passes. Gradients are
added once per optimizer step, behind the routing of the rotation gates, and every process makes the
same update. The model is not wrapped in DistributedDataParallel: that reduces in every backward
pass, and weighs every process alike, whereas here losses are divided by totals of the whole step.
"""

import atexit
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from so8t_eval.errors import BackendError, ConfigError
from so8t_train.config import FitConfig
from so8t_train.divergence import DivergedError

T = TypeVar("T")

_LONGEST_WAIT: Final = timedelta(days=1)  # for dev evaluation and saving; the launcher sees deaths
_SHARDED: Final = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


@dataclass(frozen=True)
class DataParallel:
    """This process among ``processes``; alone, everything here is a plain call."""

    processes: int = 1
    rank: int = 0
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    """Where sums are exchanged: the process's own GPU with NCCL, the CPU with gloo."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes, prints and evaluates."""
        return self.rank == 0

    def whole_step(self, config: FitConfig) -> FitConfig:
        """``config`` as one process would need it for the same steps.

        ``gradient_accumulation_steps`` counts every process's micro-batches.
        """
        steps = config.gradient_accumulation_steps * self.processes
        return config.model_copy(update={"gradient_accumulation_steps": steps})

    def placed(self, config: FitConfig) -> FitConfig:
        """``config`` with the whole model on this process's own device."""
        if self.processes == 1 or self.device.type == "cpu":
            return config
        return config.model_copy(update={"device_map": "cuda"})

    def share(self, costs: Sequence[int]) -> list[bool]:
        """Which of a step's passes are this process's own: the dearest first, to who has least."""
        loads = [0] * self.processes
        mine = [False] * len(costs)
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            rank = loads.index(min(loads))
            loads[rank] += costs[i]
            mine[i] = rank == self.rank
        return mine

    def seed_step(self, seed: int, step: int) -> None:
        """Give every process its own dropout, which depends on the step alone."""
        if self.processes > 1:
            drawn = hashlib.sha256(f"{seed}/{step}/{self.rank}".encode()).digest()
            torch.manual_seed(int.from_bytes(drawn[:7], "big"))

    def together(self, work: Callable[[], Sequence[float]]) -> list[float]:
        """Do ``work`` in every process; its numbers, added up over all of them.

        Raises:
            DivergedError, BackendError: it failed in another process. Its own error goes on as is.
        """
        if self.processes == 1:
            return list(work())
        failure: BaseException | None = None
        numbers: Sequence[float] = ()
        try:
            numbers = work()
        except (Exception, KeyboardInterrupt) as error:
            failure = error
        if self._added([float(failure is not None)])[0]:
            self._raise_failure(failure)
        return self._added(numbers)

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Do ``work`` in the main process while the others wait; its result, there alone.

        Raises:
            DivergedError, BackendError: it failed, seen from the others.
        """
        result: T | None = None

        def if_main() -> tuple[()]:
            nonlocal result
            if self.is_main:
                result = work()
            return ()

        self.together(if_main)
        return result

    @contextmanager
    def held_by_main(self, hold: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        """Stay inside of ``hold()`` in the main process, and only there.

        Raises:
            DivergedError, BackendError: it could not be entered, seen from the others.
        """
        with ExitStack() as stack:
            self.on_main(lambda: stack.enter_context(hold()))
            yield

    def from_main(self, work: Callable[[], T]) -> T:
        """Like ``on_main``; its result, for all."""
        if self.processes == 1:
            return work()
        result = [self.on_main(work)]
        dist.broadcast_object_list(result, src=0)
        return result[0]  # type: ignore[return-value]  # what the main process returned

    def require_same(self, value: Callable[[], object], what: str, remedy: str) -> None:
        """Compare ``value`` over the processes; it is not asked for where there is only one.

        Raises:
            BackendError: the processes differ in it.
        """
        if self.processes == 1:
            return
        values: list[object] = [None] * self.processes
        dist.all_gather_object(values, value())
        if any(other != values[0] for other in values):
            found = ", ".join(f"process {rank}: {other}" for rank, other in enumerate(values))
            raise BackendError(
                f"expected the same {what} in all {self.processes} processes, found {found}; {remedy}"
            )

    def check_checkpoint(self, processes: int, *, same_training: bool, config: FitConfig) -> None:
        """Accept a checkpoint of another number of processes where its steps are the same.

        They are if the training is, that is, if a step has as many micro-batches, and nothing is
        drawn per process (dropout).

        Raises:
            ConfigError: they are not.
        """
        if processes == self.processes or (same_training and not config.lora_dropout):
            return
        change = (
            "; without lora_dropout another number would do"
            if same_training
            else ", or keep gradient_accumulation_steps x processes as it was"
        )
        raise ConfigError(
            f"the checkpoint was trained by {processes} process{'es' if processes > 1 else ''}, "
            f"found {self.processes}; resume with as many{change}"
        )

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add every ``.grad`` over the processes; one that no process has stays None."""
        if self.processes == 1:
            return
        learned = list(parameters)
        there = [float(p.grad is not None) for p in learned]
        parts = [
            (torch.zeros_like(p) if p.grad is None else p.grad).to(self.device, torch.float32)
            for p in learned
        ]
        flat = torch.cat([*(part.flatten() for part in parts), torch.tensor(there).to(self.device)])
        dist.all_reduce(flat)
        numbers = torch.split(flat, [*(p.numel() for p in learned), len(learned)])
        counts = numbers[-1].tolist()
        for parameter, total, count in zip(learned, numbers, counts, strict=False):
            if count:
                parameter.grad = total.view_as(parameter).to(parameter.device, parameter.dtype)

    def _added(self, numbers: Sequence[float]) -> list[float]:
        total: Tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return list(map(float, total.tolist()))

    def _raise_failure(self, own: BaseException | None) -> None:
        texts: list[tuple[str, bool] | None] = [None] * self.processes
        mine = own and (f"{own or type(own).__name__}", isinstance(own, DivergedError))
        dist.all_gather_object(texts, mine)
        if own is not None:
            raise own
        rank, (text, is_divergence) = next((i, t) for i, t in enumerate(texts) if t is not None)
        kind = DivergedError if is_divergence else BackendError
        raise kind(f"process {rank} of {self.processes} failed: {text}")


ALONE: Final = DataParallel()
"""A fit of one process."""


def is_main_process() -> bool:
    """Whether this process speaks for its fit, as its launcher has numbered it."""
    return int(os.environ.get("RANK", "0")) == 0 or _world_size() == 1


def local_processes() -> int:
    """Processes of this fit that share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def join_processes(config: FitConfig) -> DataParallel:
    """Meet the other processes that ``torchrun`` or ``accelerate launch`` has started, if any.

    Raises:
        ConfigError: a launch that shards the model, or that does not start what it was asked for.
    """
    _check_launch(config)
    if _world_size() == 1:
        return ALONE
    from accelerate import PartialState

    on_cpu = config.device_map == "cpu" or not torch.cuda.is_available()
    local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if not on_cpu and local >= found:
        raise ConfigError(
            f"expected a GPU for each of {local_processes()} processes of this machine, found "
            f"{found}; start fewer, or set device_map: cpu"
        )
    first = not dist.is_initialized()
    state = PartialState(cpu=on_cpu, timeout=_LONGEST_WAIT)
    if first:
        atexit.register(_leave)
    return DataParallel(state.num_processes, state.process_index, state.device)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_launch(config: FitConfig) -> None:
    for variable, name in _SHARDED.items():
        if os.environ.get(variable, "false").lower() not in {"true", "1"}:
            continue
        why = (
            "the integer codes and the scales of a quantized base cannot be split"
            if config.quantizes_base
            else "training adds gradients of whole copies of the model"
        )
        raise ConfigError(
            f"expected a launch in which every process holds the whole model, found {name} "
            f"({variable}): {why}; launch without it, and without an accelerate config file that "
            "asks for it"
        )
    # Without a GPU `accelerate launch --num_processes N` starts one process, and says nothing.
    launched = {"ACCELERATE_DYNAMO_MODE", "MASTER_ADDR"} <= os.environ.keys()
    if launched and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "accelerate launch was asked for several processes and has started one, as it does "
            "without a GPU; start it with accelerate launch --multi_gpu, also on the CPU, or with "
            "torchrun --nproc-per-node N -m so8t_train.cli fit CONFIG"
        )
