"""Tiny base models for training tests, each made once per session."""

from pathlib import Path

import pytest
import torch
from support.tiny_hf import make_tiny_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="session")
def untied_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 with separate output matrix and spare embedding rows."""
    directory = tmp_path_factory.mktemp("models") / "qwen2"
    return make_tiny_model(directory, "qwen2", tied=False, spare_rows=13)
