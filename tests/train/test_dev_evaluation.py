"""The temperature that calibrates: found where there is one, known as a bound where there is none."""

import numpy as np
import pytest
from scipy.special import softmax

from so8t_train.dev_evaluation import TEMPERATURES, at_bound, fitted_temperature


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_labels_were_drawn_at_is_found(temperature: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 3)) * 3
    shares = softmax(logits / temperature, axis=1)
    labels = (rng.random((len(logits), 1)) > shares.cumsum(axis=1)).sum(axis=1)
    found = fitted_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.05)
    assert not at_bound(found)


@pytest.mark.parametrize(("always_right", "bound"), [(True, min), (False, max)])
def test_labels_that_no_temperature_explains_end_at_a_bound(always_right: bool, bound) -> None:
    logits = np.random.default_rng(0).normal(size=(50, 3))
    labels = logits.argmax(axis=1) if always_right else logits.argmin(axis=1)
    found = fitted_temperature(logits, labels)
    assert found == pytest.approx(bound(TEMPERATURES), rel=1e-3)
    assert at_bound(found)
