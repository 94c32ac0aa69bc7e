"""The training loop: one optimizer step at a time, resumable at every step boundary."""

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from so8t_eval.errors import ConfigError, Interrupted
from so8t_train.activation_checkpointing import enable_checkpointing
from so8t_train.checkpoint import (
    Checkpoint,
    newest_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from so8t_train.config import FitConfig
from so8t_train.cpu_lora import fuse_cpu_lora
from so8t_train.data_parallel import ALONE, DataParallel
from so8t_train.dev_evaluation import DevResult, evaluate_dev
from so8t_train.divergence import DivergedError, LossGuard, all_finite, diverged
from so8t_train.losses import safety_loss, task_loss
from so8t_train.memory_log import MemoryLog
from so8t_train.packing import pack
from so8t_train.pet import inertia_penalty, pet_weight
from so8t_train.quantized_layers import use_training_kernels
from so8t_train.random_state import RandomState, random_state, restore_random_state
from so8t_train.rotation_gate import LossKind, rotations_of
from so8t_train.safety_model import SafetyModel
from so8t_train.so8_rotation import commutator_norm
from so8t_train.step_passes import StepPass, step_passes
from so8t_train.step_report import StepReport, TrainingHooks
from so8t_train.training_data import TrainingExample, step_order
from so8t_train.training_plan import (
    category_head,
    parameter_groups,
    pet_phases,
    schedule,
    shaping_settings,
    total_steps,
    trainable,
    training_hash,
    what_differs,
)

__all__ = ["CHECKPOINTS", "StepReport", "Trainer", "TrainingHooks"]

CHECKPOINTS: Final = "checkpoints"


class Trainer:
    """Owns model, optimizer and data order of one fit."""

    def __init__(
        self,
        model: SafetyModel,
        config: FitConfig,
        *,
        examples: Sequence[TrainingExample],
        dev: Sequence[TrainingExample],
        run_directory: Path,
        start_sha256: str,
        session: str = "",
        parallel: DataParallel = ALONE,
    ) -> None:
        self.model, self.config = model, config
        self.examples, self.dev = examples, dev
        self.run_directory = run_directory
        self.parallel = parallel
        self.session = session
        """Names this process in checkpoints, logs and messages."""
        self.config_hash = training_hash(config, start_sha256, examples)
        self.head = category_head(model, config, examples)
        self.names = trainable(model, config, self.head)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.names, config), weight_decay=config.weight_decay, foreach=True
        )
        self.total_steps = total_steps(len(examples), config)
        self.step = 0
        self.saved_step: int | None = None
        """Step of the last checkpoint written or resumed from."""
        self.guard = LossGuard(config, model.vocab_size + len(model.verdict_ids))
        self.reference = self._generators()
        self.boundary: RandomState | None = random_state()
        """The random state after step ``step``; None while weights are half updated."""
        self.memory = MemoryLog(model.device)
        if model.device.type == "cpu":
            fuse_cpu_lora(model, model.dtype)

    # -- running -----------------------------------------------------------------------------

    def run(self, hooks: TrainingHooks) -> None:
        """Train to the last step, saving checkpoints.

        Raises:
            Interrupted: a stop was requested; a checkpoint of the last whole step was saved.
            DivergedError: a loss, gradient or weight is not finite, or the loss has exploded; the
                last checkpoint is kept.
        """
        if self.config.gradient_checkpointing:
            enable_checkpointing(self.model.base)
        while self.step < self.total_steps:
            report = self.train_step()
            (stop,) = self.parallel.together(partial(self._reported, report, hooks))
            if stop and self.step < self.total_steps:
                self._save_once()
                raise Interrupted(
                    f"stopped after step {self.step} of {self.total_steps} (session "
                    f"{self.session}); the checkpoint is in {self.run_directory / CHECKPOINTS}"
                )
            if self._save_due() or self.step == self.total_steps:
                self._save_once()

    def _reported(self, report: StepReport, hooks: TrainingHooks) -> tuple[bool]:
        """Evaluate if due, and report, in the main process; whether this one is asked to stop."""
        if self.parallel.is_main:
            try:
                report = report._replace(dev=self._evaluate_if_due())
            finally:  # before saving: resuming cuts later lines, but cannot add any
                hooks.on_step(report)
        return (hooks.stop_requested(),)

    def train_step(self) -> StepReport:
        """Take one optimizer step: what ``run`` repeats."""
        started = time.perf_counter()
        config = self.config
        self.model.train()
        self._set_learning_rates()
        self.parallel.seed_step(config.seed, self.step)
        batch = self._batch()
        passes = step_passes(batch, config, self.step // self._steps_per_epoch)
        weight = pet_weight(self.step / self.total_steps, pet_phases(config)) * config.pet_weight
        sums = _Sums(*self.parallel.together(partial(self._run_passes, batch, passes, weight)))
        inertia, commutator = self._finish_rotations()
        self.parallel.add_gradients(self.names)
        norm = self._clip_gradients()
        if not math.isfinite(norm):
            raise self._diverged("the gradient is not finite", batch)
        total = (
            config.safety_loss_weight * (sums.safety + config.category_loss_weight * sums.category)
            + config.task_loss_weight * sums.task
            + weight * sums.temporal
            + inertia * config.pet_inertia_weight
        )
        if exploded := self.guard.check(total):
            raise self._diverged(exploded, batch)
        rate = self.optimizer.param_groups[0]["lr"]
        self._update()
        return StepReport(
            step=self.step,
            total_steps=self.total_steps,
            epoch=self.step / self._steps_per_epoch,
            loss=total,
            safety_loss=sums.safety,
            category_loss=None if self.head is None else sums.category,
            task_loss=sums.task if passes[-1].kind == "reply" else None,
            pet_temporal=sums.temporal,
            pet_inertia=inertia,
            verdict_accuracy=sums.correct / len(batch),
            grad_norm=norm,
            learning_rate=rate,
            commutator=commutator,
            tokens=int(sums.tokens),
            step_s=time.perf_counter() - started,
            dev=None,
        )

    def _run_passes(
        self, batch: Sequence[TrainingExample], passes: Sequence[StepPass], weight: float
    ) -> "_Sums":
        """Forward and backward passes of a step, as far as they are this process's share."""
        model, config = self.model, self.config
        safety_norm = sum(e.prompt.weight for e in batch)
        replies = [reply for one in passes if one.kind == "reply" for reply in one.sequences]
        task_norm = max(1, sum(len(reply.targets) for reply in replies))
        mine = self.parallel.share([one.cost for one in passes])
        safety = category = task = temporals = 0.0
        correct = tokens = 0
        if model.bank is not None:
            model.bank.begin_step()
        for one in itertools.compress(passes, mine):
            packed = pack(one.sequences, model.device)
            tokens += packed.tokens
            if one.kind == "reply":
                loss = task_loss(model, packed) / task_norm
                self._backward(config.task_loss_weight * loss, "task", one.examples)
                task += float(loss.detach())
                continue
            result = safety_loss(
                model,
                packed,
                label_smoothing=config.label_smoothing,
                with_temporal=weight > 0,
                head=self.head,
                categories=[example.category for example in one.examples],
            )
            temporal = result.temporal_mean * (len(one.examples) / len(batch))
            learned = result.cross_entropy_sum + config.category_loss_weight * result.category_sum
            loss = config.safety_loss_weight * learned / safety_norm
            self._backward(loss + weight * temporal, "safety", one.examples)
            category += float(result.category_sum.detach()) / safety_norm
            safety += float(result.cross_entropy_sum.detach()) / safety_norm
            temporals += float(temporal.detach())
            correct += result.n_correct
        return _Sums(safety, category, temporals, task, correct, tokens)

    def _update(self) -> None:
        """Apply the gradients; what is between two whole steps happens here alone."""
        self.boundary = None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self._save_due():
            self.reference = self._generators()
        self.boundary = random_state()

    def _save_due(self) -> bool:
        return self.step % self.config.save_every_steps == 0

    def _backward(self, loss: Tensor, kind: LossKind, micro: Sequence[TrainingExample]) -> None:
        if not math.isfinite(float(loss.detach())):
            raise self._diverged(f"the {kind} loss is not finite", micro)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.model.bank is not None:
            self.model.bank.collect(kind)

    def _diverged(self, what: str, cases: Sequence[TrainingExample]) -> DivergedError:
        self.drop_step()
        return diverged(what, self.step + 1, cases)

    def drop_step(self) -> None:
        """Let go of a step that is half computed; its update is never applied."""
        if self.model.bank is not None:
            self.model.bank.end()
        self.optimizer.zero_grad(set_to_none=True)

    def _finish_rotations(self) -> tuple[float, float]:
        """Send the collected gradients to the generators; inertia value and commutator (rms)."""
        bank = self.model.bank
        if bank is None:
            return 0.0, 0.0
        now = bank.rotations()
        with torch.no_grad():
            commutator = float(commutator_norm(now.command, now.safe).square().mean().sqrt())
        if not self.config.pet_inertia_weight:
            bank.finish_step()
            return 0.0, commutator
        before = rotations_of(**self.reference)
        inertia = inertia_penalty(before.safe.to(now.safe.device), now.safe) + inertia_penalty(
            before.command.to(now.command.device), now.command
        )
        # Of the whole step, not of a share: one process's gradients have it.
        penalty = self.config.pet_inertia_weight * inertia if self.parallel.is_main else None
        bank.finish_step(penalty)
        return float(inertia.detach()), commutator

    def _clip_gradients(self) -> float:
        """Clip each group by itself, so that no loss scales another's step; total norm before."""
        squares = 0.0
        for group in self.optimizer.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            norm = torch.nn.utils.clip_grad_norm_(with_gradient, self.config.max_grad_norm)
            squares += float(norm) ** 2
        return math.sqrt(squares)

    def _batch(self, step: int | None = None) -> list[TrainingExample]:
        """The cases of the next step, or of the step after ``step``."""
        epoch, index = divmod(self.step if step is None else step, self._steps_per_epoch)
        order = step_order(len(self.examples), self.config.cases_per_step, epoch, self.config.seed)
        return [self.examples[i] for i in order[index]]

    @property
    def _steps_per_epoch(self) -> int:
        return math.ceil(len(self.examples) / self.config.cases_per_step)

    def _set_learning_rates(self) -> None:
        scale = schedule(self.step, self.total_steps, self.config.warmup_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale

    def _evaluate_if_due(self) -> DevResult | None:
        last = self.step == self.total_steps  # then the whole split is judged, for calibration
        if last or not self.dev or self.step % self.config.eval_every_steps:
            return None
        stride = math.ceil(len(self.dev) / self.config.eval_max_cases)  # files are often sorted
        cases = self.dev[::stride]
        use_training_kernels(self.model.eval())
        return evaluate_dev(self.model, cases)

    # -- saving ------------------------------------------------------------------------------

    def _save_once(self) -> None:
        self.parallel.require_same(
            self._weights_sha256, "weights", "the last checkpoint is kept, resume from it"
        )
        self.parallel.from_main(self.save)

    def _weights_sha256(self) -> str:
        digest = hashlib.sha256()
        for parameter in self.names:
            digest.update(parameter.detach().cpu().numpy().tobytes())
        return digest.hexdigest()

    def save(self, *, emergency: bool = False) -> Path:
        """Write a checkpoint of the state after the last whole step.

        Raises:
            DiskError: it could not be written.
            DivergedError: a weight is not finite; older checkpoints are kept.
            RuntimeError: the weights are half updated.
        """
        if self.boundary is None:
            raise RuntimeError("the weights are half updated: there is no whole step to save")
        parameters = {name: p.detach().cpu() for p, name in self.names.items()}
        optimizer = optimizer_tensors(self.optimizer, self.names)
        if not all_finite((*parameters.values(), *optimizer.values())):
            last = self._batch(self.step - 1)
            raise diverged("a weight or its optimizer state is not finite", self.step, last)
        checkpoint = Checkpoint(
            step=self.step,
            config_hash=self.config_hash,
            parameters=parameters,
            optimizer=optimizer,
            reference=self.reference,
            random=self.boundary,
            first_loss=self.guard.first_loss,
            session=self.session,
            emergency=emergency,
            processes=self.parallel.processes,
            settings=shaping_settings(self.config),
        )
        path = save_checkpoint(
            self.run_directory / CHECKPOINTS, checkpoint, self.config.save_total_limit
        )
        self.saved_step = self.step
        return path

    def resume(self, warn: Callable[[str], None], *, start_over: bool = False) -> bool:
        """Continue from the newest readable checkpoint, if there is one.

        ``warn`` hears of damaged ones. If all are, that is an error unless ``start_over``.

        Raises:
            ConfigError: it belongs to another configuration, base, training set or SO8T version.
            ModelFileError: there are checkpoints, and none can be read.
        """
        directory = self.run_directory / CHECKPOINTS
        checkpoint = newest_checkpoint(directory, warn, required=not start_over)
        if checkpoint is None:
            return False
        self.parallel.check_checkpoint(
            checkpoint.processes,
            same_training=checkpoint.config_hash == self.config_hash,
            config=self.config,
        )
        if checkpoint.config_hash != self.config_hash:
            raise ConfigError(
                f"{self.run_directory} was started with another "
                f"{what_differs(checkpoint.settings, shaping_settings(self.config))}; undo the "
                "change, or choose another output_dir"
            )
        with torch.no_grad():
            for parameter, name in self.names.items():
                parameter.copy_(checkpoint.parameters[name])
        restore_optimizer(self.optimizer, self.names, checkpoint.optimizer)
        self.reference = checkpoint.reference
        self.step = self.saved_step = checkpoint.step
        self.guard.first_loss = checkpoint.first_loss
        restore_random_state(checkpoint.random)
        self.boundary = checkpoint.random
        return True

    def _generators(self) -> dict[str, Tensor]:
        tensors = self.model.gate_tensors()
        return {} if tensors is None else {"safe": tensors.safe, "command": tensors.command}


class _Sums(NamedTuple):
    """Sums over the passes of one step."""

    safety: float
    category: float
    temporal: float
    task: float
    correct: float
    tokens: float
