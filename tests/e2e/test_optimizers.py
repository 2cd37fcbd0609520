"""LAMB against the paper's formulas in fp64, and dynamic loss scaling: through RPC, across a restart, in metrics."""

import dataclasses

import lamina
import numpy as np
import pytest
from daemon import Daemon

CONFIG = dict(batch_size=3, max_seq_length=13, hidden_size=24, heads=3, num_hidden_layers=2, seed=5)


class Lamb:
    """You et al., 2020, Algorithm 2, in fp64; biases and norms decay and adapt only where asked."""

    def __init__(self, weights, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, low=0.0, high=np.inf,
                 all_adapt=False, all_decay=False, max_grad_norm=np.inf):
        self.__dict__.update(locals())
        self.weights = {n: w.astype(np.float64) for n, w in weights.items()}
        self.m = {n: 0.0 for n in weights}
        self.v = {n: 0.0 for n in weights}
        self.step = 0

    def apply(self, gradients):
        self.step += 1
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
        clip = min(1.0, self.max_grad_norm / norm)
        for n, w in self.weights.items():
            g = gradients[n].astype(np.float64) * clip
            self.m[n] = self.beta1 * self.m[n] + (1 - self.beta1) * g
            self.v[n] = self.beta2 * self.v[n] + (1 - self.beta2) * g * g
            mean = self.m[n] / (1 - self.beta1**self.step)
            u = mean / (np.sqrt(self.v[n] / (1 - self.beta2**self.step)) + self.eps)
            if w.ndim == 2 or self.all_decay:
                u = u + self.weight_decay * w
            ratio = 1.0
            if (w.ndim == 2 or self.all_adapt) and np.linalg.norm(w) > 0 and np.linalg.norm(u) > 0:
                ratio = np.clip(np.linalg.norm(w) / np.linalg.norm(u), self.low, self.high)
            self.weights[n] = w - self.lr * ratio * u


@pytest.mark.parametrize("options, reference", [
    (dict(), dict()),
    (dict(weight_decay=0.1, max_grad_norm=0.5), dict(weight_decay=0.1, max_grad_norm=0.5)),
    (dict(min_trust_ratio=0.02, max_trust_ratio=0.05, beta2=0.99, eps=1e-6),
     dict(low=0.02, high=0.05, beta2=0.99, eps=1e-6)),
    (dict(weight_decay=0.1, adapt_biases_and_norms=True, decay_biases_and_norms=True),
     dict(weight_decay=0.1, all_adapt=True, all_decay=True))])
def test_lamb_against_the_paper(client, options, reference):
    stack = client.create_stack("t", **CONFIG)
    generator = np.random.default_rng(1)
    x, target = (generator.standard_normal((3, 13, 24)).astype(np.float32) for _ in range(2))
    start = stack.parameters()
    lamb = Lamb(start, lr=1e-2, **reference)
    for number in range(1, 11):
        y, context = stack.forward(x)
        stack.backward(context, 2 * (y - target) / y.size, input_grad=False)
        lamb.apply(stack.gradients())  # the daemon's own, so that only the optimizer is compared
        applied = stack.apply_gradients(lr=1e-2, optimizer="lamb", zero_gradients=True, **options)
        assert applied.applied and applied.step == number
    for name, found in stack.parameters().items():
        moved = np.linalg.norm(lamb.weights[name] - start[name])
        # Ten fp32 updates: each rounds the weight, its moments and its ratio once.
        bound = 10 * 2.0**-23 * (np.linalg.norm(start[name]) + 20 * moved)
        assert np.linalg.norm(found - lamb.weights[name]) <= bound, name
        assert moved > 0


def test_lambs_settings_are_checked(client):
    stack = client.create_stack("t", **CONFIG)
    y, context = stack.forward(np.ones((2, 5, 24), np.float32))
    stack.backward(context, y)
    before = stack.info()
    with pytest.raises(ValueError, match="optimizer"):
        stack.apply_gradients(lr=0.1, optimizer="sgd")
    for bad, words in ((dict(min_trust_ratio=0.5), "min_trust_ratio: is LAMB's"),
                       (dict(optimizer="adamw", max_trust_ratio=2.0), "max_trust_ratio: is LAMB's"),
                       (dict(adapt_biases_and_norms=True), "adapt_biases_and_norms: is LAMB's"),
                       (dict(optimizer="lamb", min_trust_ratio=-1.0), "min_trust_ratio"),
                       (dict(optimizer="lamb", max_trust_ratio=0.0), "max_trust_ratio"),
                       (dict(optimizer="lamb", min_trust_ratio=2.0, max_trust_ratio=1.0), "max_trust_ratio"),
                       (dict(optimizer="lamb", min_trust_ratio=float("nan")), "min_trust_ratio"),
                       (dict(loss_scale=0.0), "loss_scale"), (dict(loss_scale=float("inf")), "loss_scale")):
        with pytest.raises(lamina.InvalidArgument, match=words):
            stack.apply_gradients(lr=0.1, **bad)
    assert stack.info() == before


SCALED = dict(CONFIG, dtype="fp16", dynamic_loss_scale=True, initial_loss_scale=1024, loss_scale_growth_interval=3,
              loss_scale_growth_factor=1.75, loss_scale_backoff_factor=0.3, loss_scale_hysteresis=2, min_loss_scale=64)


def scaled_step(stack, seed, overflow=False):
    """A step whose loss is multiplied by the stack's scale, with an infinite gradient if asked; (Applied, output)."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((3, 13, 24)).astype(np.float16)
    y, context = stack.forward(x)
    dy = (generator.standard_normal(y.shape) / y.size * stack.loss_scale).astype(np.float16)
    if overflow:
        dy[0, 0, 0] = np.inf
    stack.backward(context, dy)
    kept = y.copy()
    return stack.apply_gradients(lr=1e-3, zero_gradients=True), kept


def test_the_loss_scale_grows_and_backs_off(client, daemon):
    stack = client.create_stack("t", **SCALED)
    before = daemon.metrics()
    assert stack.loss_scale == stack.info().loss_scale == 1024
    scales = []
    for seed, overflow in enumerate([False, False, False, False, True, True, False]):
        weights = stack.parameters()
        applied, _ = scaled_step(stack, seed, overflow)
        assert applied.applied != overflow and applied.loss_scale == (scales[-1] if scales else 1024)
        if overflow:
            after = stack.parameters()
            assert all(np.array_equal(weights[n], after[n]) for n in weights)
        assert stack.loss_scale == applied.next_loss_scale == client.stack("t").loss_scale
        scales.append(applied.next_loss_scale)
    grown = 1024 * 1.75
    assert scales == [1024, 1024, grown, grown, grown, grown * 0.3, grown * 0.3]
    assert stack.info().step == 5 and stack.info().skipped_steps == 2
    after = daemon.metrics()
    grew = lambda name: after[name] - before[name]
    assert grew("lamina_skipped_steps_total") == 2
    assert grew('lamina_loss_scale_changes_total{change="growth"}') == 1
    assert grew('lamina_loss_scale_changes_total{change="backoff"}') == 1
    assert after["lamina_loss_scale"] == scales[-1]


def test_the_scale_is_divided_out(client):
    """The same gradients under a scale of the stack's own, one that the call gives, and none."""
    norms = []
    for how, given in ((dict(CONFIG), None), (dict(CONFIG), 256.0),
                       (dict(CONFIG, dynamic_loss_scale=True, initial_loss_scale=256), None)):
        stack = client.create_stack("t", **how)
        y, context = stack.forward(np.ones((2, 5, 24), np.float32))
        stack.backward(context, y * (given or stack.loss_scale))
        applied = stack.apply_gradients(lr=0.0, loss_scale=given)
        assert applied.loss_scale == (given or (256 if how.get("dynamic_loss_scale") else 1))
        norms.append(applied.grad_norm)
        client.delete_stack("t")
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)


def test_training_resumes_with_its_loss_scale_bit_for_bit(tmp_path):
    def go_on(stack):
        plan = [(20, False), (21, True), (22, False), (23, False)]
        outcomes = [scaled_step(stack, seed, overflow) for seed, overflow in plan]
        # The norm of a step that overflowed may be NaN, which equals nothing.
        applied = [dataclasses.replace(a, grad_norm=a.grad_norm if a.applied else None) for a, _ in outcomes]
        return (applied, [y for _, y in outcomes], stack.parameters())

    with Daemon(checkpoints=tmp_path) as daemon, lamina.connect(daemon.target) as client:
        stack = client.create_stack("t", **SCALED, gelu_checkpoint=True, causal=True, hidden_dropout_ratio=0.1)
        for seed, overflow in enumerate([False, False, False, True, False]):
            scaled_step(stack, seed, overflow)
        assert stack.loss_scale == 1024 * 1.75  # the overflow is tolerated, and remembered
        stack.save("scaled")
        config = stack.config
        expected = go_on(stack)
        stack.load("scaled")
        assert stack.loss_scale == 1024 * 1.75
    with Daemon(checkpoints=tmp_path) as daemon, lamina.connect(daemon.target) as client:
        stack = client.load_checkpoint("t", "scaled")
        assert stack.config == config and stack.loss_scale == 1024 * 1.75
        applied, outputs, weights = go_on(stack)
        assert applied == expected[0] and applied[1].next_loss_scale == 1024 * 1.75 * 0.3
        assert all(np.array_equal(a, b) for a, b in zip(outputs, expected[1]))
        assert all(np.array_equal(weights[n], w) for n, w in expected[2].items())
