"""A stage holds one model at a time, and has its memory back before the next."""

import mlx.core as mx
import pytest

from flux2_relay.stages.one_model import in_turn, say_loaded


def test_the_result_comes_back_and_the_memory_too() -> None:
    said: list[str] = []
    before = mx.get_active_memory()

    def work() -> float:
        weights = mx.ones((500, 1000))
        mx.eval(weights)
        say_loaded("model", said.append)
        return float(weights.sum())

    assert in_turn("model", work, said.append) == 500_000
    assert mx.get_active_memory() - before < 100_000
    assert mx.get_cache_memory() == 0
    loaded, released = said
    assert loaded.startswith("model loaded; arrays: ")
    assert released.startswith("model released after")
    assert "at the peak" in released


def test_a_second_model_beside_the_first_is_refused() -> None:
    with pytest.raises(RuntimeError, match="VAE was to be loaded while text encoder is still held"):
        in_turn("text encoder", lambda: in_turn("VAE", lambda: None, print), print)
    assert in_turn("VAE", lambda: 3, print) == 3  # and the failure is not held against the next


def test_a_failure_gives_the_memory_back() -> None:
    def work() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        in_turn("model", work, print)
    assert in_turn("other", lambda: 1, print) == 1
