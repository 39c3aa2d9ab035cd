"""The update rule by hand, the learning rate, the clip, and a state that another process goes on from."""

import math
import weakref

import mlx.core as mx
import numpy as np
import pytest

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.train import optimizer
from flux2_relay.stages.train.optimizer import Optimizer, learning_rate
from flux2_relay.stages.train.options import TrainOptions

RULES = ["adamw", "adafactor", "lion", "prodigy"]
START = {"x.lora_A.weight": mx.array([[1.0, -2.0, 3.0]]), "x.lora_B.weight": mx.array([[0.5], [0.0]])}


def gradients(step: int) -> dict[str, mx.array]:
    return {name: mx.random.normal(value.shape, key=mx.random.key(step)) for name, value in START.items()}


def run(options: TrainOptions, first: int, last: int, values: dict, rule: Optimizer | None = None):
    rule = rule or Optimizer(options, values)
    for step in range(first, last):
        values = rule.update(values, gradients(step), step)
    return values, rule


def adamw(options: TrainOptions, steps: int) -> dict[str, np.ndarray]:
    """Loshchilov and Hutter's algorithm 2, in float64."""
    values = {name: np.array(value, np.float64) for name, value in START.items()}
    m = v = {name: np.zeros_like(value) for name, value in values.items()}
    first, second = options.betas
    for step in range(steps):
        g = {name: np.array(value, np.float64) for name, value in gradients(step).items()}
        m = {name: first * m[name] + (1 - first) * g[name] for name in g}
        v = {name: second * v[name] + (1 - second) * g[name] ** 2 for name in g}
        for name in g:
            m_hat, v_hat = m[name] / (1 - first ** (step + 1)), v[name] / (1 - second ** (step + 1))
            values[name] = values[name] * (1 - options.lr * options.weight_decay)
            values[name] = values[name] - options.lr * m_hat / (np.sqrt(v_hat) + options.eps)
    return values


def test_the_first_update_of_adamw_is_the_learning_rate() -> None:
    values, _ = run(TrainOptions(lr=0.25, weight_decay=0.0), 0, 1, START)
    for name, value in values.items():
        np.testing.assert_allclose(
            np.array(START[name] - value), 0.25 * np.sign(np.array(gradients(0)[name])), rtol=1e-5
        )


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_the_published_algorithm(decay: float) -> None:
    options = TrainOptions(lr=0.05, weight_decay=decay, betas=(0.8, 0.95), eps=1e-3)
    values, _ = run(options, 0, 7, START)
    for name, expected in adamw(options, 7).items():
        np.testing.assert_allclose(np.array(values[name]), expected, rtol=1e-5, atol=1e-6)


def test_lion_moves_by_the_sign() -> None:
    values, _ = run(TrainOptions(optimizer="lion", lr=0.25, weight_decay=0.0), 0, 1, START)
    name = "x.lora_A.weight"
    np.testing.assert_allclose(np.array(START[name] - values[name]), 0.25 * np.sign(np.array(gradients(0)[name])))


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_adafactor_moves_by_the_learning_rate_alone(size: float) -> None:
    """Whatever the size of the weights, and of gradients; the root mean square of an update is at most one rate."""
    start = {name: size * value for name, value in START.items()}
    for rate in (0.25, 0.5):
        values, _ = run(TrainOptions(optimizer="adafactor", lr=rate, weight_decay=0.0), 0, 1, start)
        for name, value in values.items():
            moved = np.array(start[name] - value)
            assert 0.3 * rate < np.sqrt((moved**2).mean()) <= 1.0001 * rate
            assert (np.sign(moved) == np.sign(np.array(gradients(0)[name]))).all()


def test_adafactor_decays_the_weights() -> None:
    both = [run(TrainOptions(optimizer="adafactor", lr=0.25, weight_decay=w), 0, 1, START)[0] for w in (0.0, 0.1)]
    for name, value in START.items():
        np.testing.assert_allclose(
            np.array(both[0][name] - both[1][name]), 0.025 * np.array(value), rtol=1e-4, atol=1e-6
        )


NEAR = {name: 1e-3 * value for name, value in START.items()}
"""So small that float32 holds steps of 1e-6."""


def prodigy(options: TrainOptions, steps: int) -> tuple[dict[str, np.ndarray], float]:
    """Mishchenko and Defazio's algorithm 4 in float64, with all parameters in one vector."""
    names, shapes = list(START), [value.shape for value in START.values()]

    def flat(values: dict) -> np.ndarray:
        return np.concatenate([np.array(values[name], np.float64).ravel() for name in names])

    x = start = flat(NEAR)
    (beta1, beta2), d, r, m, v, s = options.betas, 1e-6, 0.0, 0.0, 0.0, 0.0
    for step in range(steps):
        g, q = flat(gradients(step)), np.sqrt(beta2)
        r = q * r + (1 - q) * options.lr * d**2 * (g @ (start - x))
        s = q * s + (1 - q) * options.lr * d**2 * g
        m = beta1 * m + (1 - beta1) * d * g
        v = beta2 * v + (1 - beta2) * d**2 * g**2
        x = x * (1 - options.lr * d * options.weight_decay) - options.lr * d * m / (np.sqrt(v) + d * options.eps)
        d = max(d, r / np.abs(s).sum())
    cuts = np.cumsum([np.prod(shape) for shape in shapes])[:-1]
    return {n: part.reshape(shape) for n, part, shape in zip(names, np.split(x, cuts), shapes, strict=True)}, d


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_prodigy_is_the_published_algorithm(decay: float) -> None:
    options = TrainOptions(optimizer="prodigy", lr=1.0, weight_decay=decay, betas=(0.8, 0.95))
    values, rule = run(options, 0, 40, NEAR)
    expected, d = prodigy(options, 40)
    assert rule.state()["d"].item() == pytest.approx(d, rel=1e-3)
    for name, value in expected.items():
        np.testing.assert_allclose(
            np.array(values[name] - NEAR[name]), value - np.array(NEAR[name], np.float64), rtol=2e-3, atol=1e-9
        )


def test_prodigy_finds_the_distance_by_itself() -> None:
    """On |x - 10|: from 1e-6 its estimate grows to the order of the distance, and x comes near."""
    options = TrainOptions(optimizer="prodigy", lr=1.0, weight_decay=0.0, betas=(0.9, 0.99))
    values = {"x": mx.zeros((2, 2))}
    rule = Optimizer(options, values)
    for step in range(200):
        values = rule.update(values, {"x": mx.sign(values["x"] - 10.0)}, step)
    assert 2 < float(rule.state()["d"]) < 20
    assert float(mx.abs(values["x"] - 10).max()) < 4


def test_prodigy_waits_for_a_gradient() -> None:
    rule = Optimizer(TrainOptions(optimizer="prodigy", lr=1.0, weight_decay=0.0), START)
    values = rule.update(START, {name: mx.zeros_like(value) for name, value in START.items()}, 0)
    assert all(mx.array_equal(values[name], START[name]) for name in START)
    assert rule.state()["d"].item() == pytest.approx(1e-6)


def test_a_learning_rate_that_is_no_factor_is_spoken_of() -> None:
    assert "train.lr is 0.0001" in str(optimizer.advice(TrainOptions(optimizer="prodigy")))
    assert optimizer.advice(TrainOptions(optimizer="prodigy", lr=1.0)) is None
    assert optimizer.advice(TrainOptions()) is None


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_goes_down_on_a_quadratic(rule) -> None:
    options = TrainOptions(optimizer=rule, lr=1.0 if rule == "prodigy" else 0.02, weight_decay=0.0)
    values = START
    update = Optimizer(options, values)

    def size() -> float:
        return sum(float(mx.sum(mx.square(value))) for value in values.values())

    before = size()
    for step in range(150):
        values = update.update(values, {name: 2 * value for name, value in values.items()}, step)
    assert size() < 0.3 * before


@pytest.mark.parametrize("rule", RULES)
def test_a_restored_state_goes_on_bit_for_bit(rule) -> None:
    options = TrainOptions(optimizer=rule, lr=0.05 if rule != "prodigy" else 1.0, schedule="cosine", steps=6)
    whole, _ = run(options, 0, 6, START)
    half, before = run(options, 0, 3, START)
    state = {name: mx.array(np.array(value)) for name, value in before.state().items()}
    assert all(isinstance(value, mx.array) for value in state.values())
    after = Optimizer(options, START)
    after.restore(state)
    resumed, _ = run(options, 3, 6, half, after)
    assert all(mx.array_equal(whole[name], resumed[name]) for name in START)


def test_a_state_of_another_optimizer_or_adapter_is_refused() -> None:
    of_lion = Optimizer(TrainOptions(optimizer="lion"), START).state()
    for state in (of_lion, {}, Optimizer(TrainOptions(), {"y": mx.zeros(2)}).state()):
        with pytest.raises(InputError, match=r"lora.targets"):
            Optimizer(TrainOptions(), START).restore(state)


def rates(**options) -> list[float]:
    made = TrainOptions(lr=2.0, steps=10, **options)
    return [learning_rate(made, step) for step in range(made.steps)]


def test_moments_go_with_their_optimizer() -> None:
    """At once: in a circle of references they would stay until the collector comes."""
    parameters = {"w": mx.ones((4, 3))}
    update = optimizer.Optimizer(TrainOptions(), parameters)
    update.update(parameters, parameters, 0)
    gone = weakref.ref(update)
    del update
    assert gone() is None


def test_learning_rates() -> None:
    assert rates() == [2.0] * 10
    assert rates(warmup=4) == [0.5, 1.0, 1.5] + [2.0] * 7
    assert rates(schedule="linear") == pytest.approx([2.0 * (10 - n) / 10 for n in range(10)])
    assert rates(schedule="cosine") == pytest.approx([1 + math.cos(math.pi * n / 10) for n in range(10)])
    assert rates(schedule="linear", warmup=2) == pytest.approx([1.0, 2.0, *(2 - n / 4 for n in range(8))])
    assert rates(schedule="cosine", warmup=20) == pytest.approx([(n + 1) / 10 for n in range(10)])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_learning_rate_is_zero_after_the_last_step(schedule) -> None:
    assert learning_rate(TrainOptions(schedule=schedule, steps=10), 10) == pytest.approx(0)
    assert learning_rate(TrainOptions(schedule=schedule, steps=10), 12) == 0


def test_clip_scales_to_the_limit_and_tells_the_norm_before() -> None:
    found = {"a": mx.array([3.0, 0.0]), "b": mx.array([[4.0]])}
    clipped, norm = optimizer.clip(found, 1.0)
    assert norm.item() == 5.0
    np.testing.assert_allclose(np.array(clipped["a"]), [3 / (5 + 1e-6), 0], rtol=1e-6)
    for limit in (0.0, 5.1):
        kept, norm = optimizer.clip(found, limit)
        assert norm.item() == 5.0
        assert all(mx.array_equal(kept[name], found[name]) for name in found)
