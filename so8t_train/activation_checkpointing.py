"""Gradient checkpointing of a transformers model: less memory for about a third more time."""

from typing import Any


def enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass, under whichever name transformers has for it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
