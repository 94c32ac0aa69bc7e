"""When training fails: an emergency checkpoint of the last whole step, if there is one to save."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from so8t_eval.errors import BackendError, Interrupted, So8tError
from so8t_train.divergence import DivergedError
from so8t_train.trainer import Trainer


@contextmanager
def saved_on_failure(trainer: Trainer, news: Callable[[str], None]) -> Iterator[None]:
    """Save the last whole step if the training inside fails, say so, and let the error go on.

    A diverged training is not saved: its last checkpoint is the good one.

    Raises:
        BackendError: memory ran out (Python's or torch's error, which say little); any other error
            is raised as it came.
    """
    try:
        yield
    except Interrupted:  # has saved
        raise
    except DivergedError as error:
        raise DivergedError(f"{error} (session {trainer.session})") from error
    except (Exception, KeyboardInterrupt) as error:
        traceback.clear_frames(error.__traceback__)  # activations of the step that failed
        trainer.drop_step()
        news(f"session {trainer.session} failed: {_saved(trainer)}")
        if _out_of_memory(error):
            raise BackendError(
                f"out of memory at step {trainer.step + 1} of {trainer.total_steps} "
                f"({_first_line(error)}); free memory and resume, or start again in another "
                "output_dir with a smaller micro_batch_size or max_length, or "
                "gradient_checkpointing: true"
            ) from error
        raise


def _saved(trainer: Trainer) -> str:
    """Save if there is something to save; one sentence on what is there to resume from."""
    if not trainer.parallel.is_main:
        return "the main process keeps what there is"
    if trainer.boundary is None:
        return (
            "the failure fell into the update of the weights, which is not saved half done; the "
            "checkpoint before it is kept"
        )
    if trainer.step == 0:
        return "no step was done yet; there is nothing to keep"
    if trainer.saved_step == trainer.step:
        return f"the checkpoint of step {trainer.step} is there; continue with --resume auto"
    try:
        path = trainer.save(emergency=True)
    except So8tError as problem:
        return f"no emergency checkpoint ({problem}); older checkpoints are kept"
    return f"emergency checkpoint {path}; continue with --resume auto"


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # The CPU allocator has no error type of its own.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
