"""The drop-in's forms, names, state and training: what DeepSpeed's users do with their layers besides computing."""

import copy
import doctest
import gc
import json
import pickle

import numpy as np
import pytest
import torch
from lamina.deepspeed import DeepSpeedTransformerConfig, DeepSpeedTransformerLayer, load_state_dict, stack_of
from torch import nn

import encoder
import lamina
import lamina.deepspeed
from layers import config_of, layers_of, run

pytestmark = pytest.mark.usefixtures("client")

SHAPES = {"attn_qkvw": (96, 32), "attn_qkvb": (96,), "attn_ow": (32, 32), "attn_ob": (32,), "attn_nw": (32,),
          "attn_nb": (32,), "inter_w": (128, 32), "inter_b": (128,), "output_w": (32, 128), "output_b": (32,),
          "norm_w": (32,), "norm_b": (32,)}


def batch(seed=0, requires_grad=False):
    x = torch.randn(4, 24, 32, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_() if requires_grad else x


def twin_of(layers):
    """The same layers in plain PyTorch: (parameters by layer, forward)."""
    leaves = [{n: nn.Parameter(p.detach().clone()) for n, p in layer.named_parameters()} for layer in layers]

    def forward(x, mask=None):
        for p in leaves:
            x = encoder.layer(x, p, heads=4, pre_layer_norm=layers[0].config.pre_layer_norm, gelu="tanh", mask=mask)
        return x

    return leaves, forward


# --- the config ---


def test_defaults_are_deepspeeds():
    config = DeepSpeedTransformerConfig()
    unset = ["batch_size", "hidden_size", "heads", "attn_dropout_ratio", "hidden_dropout_ratio", "num_hidden_layers",
             "initializer_range", "local_rank", "seed", "layer_id"]
    assert all(getattr(config, name) == -1 for name in unset)
    assert (config.layer_norm_eps, config.fp16, config.pre_layer_norm, config.adjust_init_range) == (1e-12, False, True, True)
    flags = ["normalize_invertible", "gelu_checkpoint", "attn_dropout_checkpoint", "stochastic_mode", "return_tuple"]
    assert not any(getattr(config, name) for name in flags) and config.training
    # The order of today's positional arguments.
    config = DeepSpeedTransformerConfig(8, 64, 100, 4, 0.1, 0.2, 3, 0.02, 1e-6, 0, 7, True, False)
    assert (config.batch_size, config.hidden_size, config.intermediate_size, config.heads) == (8, 64, 100, 4)
    assert (config.seed, config.fp16, config.pre_layer_norm) == (7, True, False)
    assert DeepSpeedTransformerConfig(hidden_size=64).intermediate_size == 256


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_config_from_json_file(tmp_path, encoding):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"batch_size": 2, "hidden_size": 32, "heads": 4, "seed": 5}), encoding=encoding)
    config = DeepSpeedTransformerConfig.from_json_file(path)
    assert (config.batch_size, config.hidden_size, config.heads, config.seed, config.fp16) == (2, 32, 4, 5, False)


def test_unknown_settings_are_all_named():
    with pytest.raises(TypeError, match="has no gelu_checkpiont, hiden_size"):
        DeepSpeedTransformerConfig.from_dict({"hiden_size": 3, "gelu_checkpiont": True, "heads": 2})


def test_all_that_is_not_set_is_named():
    with pytest.raises(ValueError, match="batch_size is not set; heads is not set; initializer_range is not set"):
        DeepSpeedTransformerLayer(config_of(batch_size=-1, heads=-1, initializer_range=-1))


def test_settings_may_follow_as_attributes():
    config = DeepSpeedTransformerConfig.from_dict({})
    config.layer_id = None
    for name, value in dict(batch_size=4, hidden_size=32, heads=4, num_hidden_layers=3, attn_dropout_ratio=0.0,
                            hidden_dropout_ratio=0.0, initializer_range=0.02).items():
        setattr(config, name, value)
    layer = DeepSpeedTransformerLayer(config)
    assert layer.inter_w.shape == (128, 32) and layer(batch()).shape == (4, 24, 32)


# --- the layer's forms ---


def test_parameters_bear_deepspeeds_names_and_shapes():
    layer = DeepSpeedTransformerLayer(config_of())
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == SHAPES
    assert list(layer.state_dict()) == list(SHAPES)


def test_initial_weights_are_drawn_as_deepspeed_draws_them():
    torch.manual_seed(3)
    layer = DeepSpeedTransformerLayer(config_of(hidden_size=256, num_hidden_layers=8))
    for name, p in layer.named_parameters():
        if p.dim() == 1:
            assert bool((p == (1.0 if name in ("attn_nw", "norm_w") else 0.0)).all())
        else:
            wanted = 0.02 / 4 if name in ("attn_ow", "output_w") else 0.02  # sqrt(2 * 8) is 4
            # A deviation from n draws is off by 1/sqrt(2n) of itself.
            assert float(p.std()) == pytest.approx(wanted, rel=5 / (2 * p.numel()) ** 0.5)
    torch.manual_seed(3)
    again = DeepSpeedTransformerLayer(config_of(hidden_size=256, num_hidden_layers=8, adjust_init_range=False))
    assert torch.equal(again.attn_qkvw, layer.attn_qkvw)
    assert float(again.output_w.std()) == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("form", ["Layer(i, config)", "Layer(config)", "one layer copied"])
def test_forms_share_one_stack_and_compute_the_same(client, form):
    config = config_of()
    torch.manual_seed(1)
    if form == "Layer(i, config)":
        layers = layers_of(config)
    elif form == "Layer(config)":
        layers = nn.ModuleList([DeepSpeedTransformerLayer(config) for _ in range(3)])
    else:
        layer = DeepSpeedTransformerLayer(config)
        layers = nn.ModuleList([copy.deepcopy(layer) for _ in range(3)])
    assert not client.stacks()  # nothing is made before it is needed
    y = run(layers, batch())
    assert len(client.stacks()) == 1 and {l.stack for l in layers} == {layers[0].stack}
    assert [l.layer_range for l in layers] == [(0, 1), (1, 2), (2, 3)]
    assert torch.allclose(y, twin_of(layers)[1](batch()), atol=1e-5)
    # One call of the daemon over the whole stack is the layers in turn.
    whole, _ = layers[0].stack.forward(batch().numpy(), training=False)
    assert np.array_equal(whole, run(layers.eval(), batch()).detach().numpy())


def test_layer_ids_choose_the_layer_of_the_stack():
    config = config_of()
    last, first = DeepSpeedTransformerLayer(2, config), DeepSpeedTransformerLayer(0, config)
    first(last(batch()))
    assert (last.layer_range, first.layer_range) == ((2, 3), (0, 1))
    with pytest.raises(ValueError, match=r"layer_id: 3 must be in 0\.\.2"):
        DeepSpeedTransformerLayer(3, config)


def test_a_copied_model_is_a_model_of_its_own(client):
    layers = layers_of(config_of())
    before = run(layers, batch())
    twin = copy.deepcopy(layers)
    with torch.no_grad():
        twin[1].output_w += 1.0
    assert not torch.allclose(run(twin, batch()), before)
    assert torch.equal(run(layers, batch()), before)
    assert len(client.stacks()) == 2 and stack_of(twin) is not stack_of(layers)
    del twin
    gc.collect()
    assert len(client.stacks()) == 1
    del layers, before
    gc.collect()
    assert not client.stacks()


def test_initial_weights_and_biases():
    generator = torch.Generator().manual_seed(4)
    draw = lambda *shape: nn.Parameter(torch.randn(*shape, generator=generator))
    h, i = 32, 128
    weights = [draw(h, h), draw(h, h), draw(h, h), draw(h, h), draw(h), draw(i, h), draw(h, i), draw(h)]
    biases = [draw(h), None, draw(h), draw(h), draw(h), draw(i), draw(h), draw(h)]
    layer = DeepSpeedTransformerLayer(config_of(), weights, biases)
    assert torch.equal(layer.attn_qkvw, torch.cat(weights[:3]))
    assert torch.equal(layer.attn_qkvb, torch.cat([biases[0], torch.zeros(h), biases[2]]))
    given = dict(attn_ow=weights[3], attn_nw=weights[4], inter_w=weights[5], output_w=weights[6], norm_w=weights[7],
                 attn_ob=biases[3], attn_nb=biases[4], inter_b=biases[5], output_b=biases[6], norm_b=biases[7])
    assert all(torch.equal(getattr(layer, name), value) for name, value in given.items())
    weights[5], biases[6] = draw(h, h), draw(3)
    with pytest.raises(ValueError, match=r"initial_weights\[5\]: shape \[32, 32\] must be \[128, 32\]; "
                                         r"initial_biases\[6\]: shape \[3\] must be \[32\]"):
        DeepSpeedTransformerLayer(0, config_of(), weights, biases)


def test_return_tuple():
    layer = DeepSpeedTransformerLayer(config_of(return_tuple=True))
    (y,) = layer(batch())
    assert torch.equal(y, layer(batch())[0])


@pytest.mark.parametrize("shape", [(4, 1, 1, 24), (1, 1, 1, 24), (4, 24)])
def test_masks(shape):
    layers = layers_of(config_of())
    mask = torch.zeros(shape)
    mask[..., 20:] = -10000.0
    wanted = twin_of(layers)[1](batch(), mask.reshape(-1, 1, 1, 24))
    assert torch.allclose(run(layers, batch(), mask), wanted, atol=1e-5)
    changed = batch()
    changed[:, 20:] += 1  # what is hidden does not matter to the rest
    assert torch.allclose(run(layers, changed, mask)[:, :20], wanted[:, :20], atol=1e-5)


def test_arguments_that_can_not_be_served_are_refused():
    layer = DeepSpeedTransformerLayer(config_of())
    with pytest.raises(TypeError, match="attention_mask: of torch.int64, must be floating"):
        layer(batch(), torch.ones(4, 24, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"attention_mask: shape \[4, 1, 24, 24\] must be \[4, 1, 1, 24\] or \[4, 24\]"):
        layer(batch(), torch.zeros(4, 1, 24, 24))
    with pytest.raises(ValueError, match="head_mask, output_attentions: not supported"):
        layer(batch(), None, torch.ones(4), output_attentions=True)
    with pytest.raises(ValueError, match=r"hidden_states: shape \[4, 24, 31\] must be \[B, S, 32\]"):
        layer(torch.zeros(4, 24, 31))
    with pytest.raises(lamina.InvalidArgument, match=r"B in 1..4"):
        layer(torch.zeros(5, 24, 32))
    with pytest.raises(lamina.InvalidArgument, match="32"):
        layer(torch.zeros(4, 33, 32))
    with pytest.raises(ValueError, match="dtype: 'bf16' and fp16=True contradict"):
        DeepSpeedTransformerLayer(config_of(fp16=True, dtype="bf16"))
    with pytest.raises(TypeError, match="config: a dict"):
        DeepSpeedTransformerLayer({"hidden_size": 32})


def test_longer_sequences_make_room_where_no_limit_was_set(client):
    layers = layers_of(config_of(max_seq_length=None))
    short = run(layers, batch())
    loss = short.sum()
    longer = torch.randn(2, 200, 32)
    assert torch.allclose(run(layers, longer), twin_of(layers)[1](longer), atol=1e-5)
    loss.backward()  # through the first stack, which lives as long as its graph does
    assert all(p.grad is not None for p in layers.parameters())
    del loss, short
    gc.collect()
    assert len(client.stacks()) == 1
    assert torch.allclose(run(layers, batch()), twin_of(layers)[1](batch()), atol=1e-5)


# --- dropout, training and evaluation ---


def test_dropout_by_its_statistics():
    """The mean of many training forwards nears the mean that evaluation has no part of: E[drop(x)] = x at the last place."""
    config = config_of(hidden_dropout_ratio=0.25, num_hidden_layers=1, batch_size=4)
    layer = DeepSpeedTransformerLayer(config)
    with torch.no_grad():
        layer.output_w.normal_(0, 0.5)
        layer.attn_ow.zero_()  # so that the only dropout that shows is the one on the feed-forward's output
    x = batch()
    still = layer.eval()(x).detach()
    assert torch.equal(layer(x), still)
    layer.train()
    runs = [layer(x).detach() for _ in range(200)]
    assert not torch.equal(runs[0], runs[1])
    added, kept = still - x, torch.stack(runs) - x
    share = float((kept.abs() < 1e-6).float().mean())
    assert share == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / kept.numel()) ** 0.5 + 1e-3)
    # What is kept is scaled by 1/(1-p); each element is then a mean of 200 draws of variance p/(1-p) times its square.
    deviation = (kept.mean(0) - added) / added.abs().clamp_min(1e-3)
    assert float(deviation.mean().abs()) < 4 * (0.25 / 0.75 / 200 / added.numel()) ** 0.5
    with torch.no_grad():  # PyTorch's dropout is there without gradients too
        assert not torch.equal(layer(x), layer(x))


def test_attention_dropout_draws_anew_and_rests_in_evaluation():
    layers = layers_of(config_of(attn_dropout_ratio=0.5, initializer_range=0.5))
    assert not torch.equal(run(layers, batch()), run(layers, batch()))
    layers.eval()
    assert torch.equal(run(layers, batch()), run(layers, batch()))


def test_seeds_repeat_a_run():
    outcomes = []
    for seed in (5, 5, 6):
        torch.manual_seed(0)
        layers = layers_of(config_of(hidden_dropout_ratio=0.3, seed=seed))
        y = run(layers, batch())
        y.square().sum().backward()
        outcomes.append((y.detach(), layers[0].inter_w.grad))
    assert torch.equal(outcomes[0][0], outcomes[1][0]) and torch.equal(outcomes[0][1], outcomes[1][1])
    assert not torch.equal(outcomes[0][0], outcomes[2][0])


def test_evaluation_takes_no_memory_for_training():
    layers = layers_of(config_of()).eval()
    run(layers, batch())
    stack = layers[0].stack
    assert stack.info().plan.bytes_of("gradients") == 0
    layers.train()
    run(layers, batch())
    assert stack.info().plan.bytes_of("gradients") > 0


def test_ratios_follow_the_config():
    config = config_of(hidden_dropout_ratio=0.5)
    layers = layers_of(config)
    assert not torch.equal(run(layers, batch()), run(layers, batch()))
    config.hidden_dropout_ratio = 0.0
    assert torch.equal(run(layers, batch()), run(layers, batch()))
    assert layers[0].stack.info().config.hidden_dropout_ratio == 0.0


# --- memory flags, causal attention ---


def gradients_with(**settings):
    torch.manual_seed(7)
    layers = layers_of(config_of(hidden_dropout_ratio=0.2, attn_dropout_ratio=0.2, seed=3, **settings))
    x = batch(requires_grad=True)
    run(layers, x).square().sum().backward()
    return layers, [x.grad, *(p.grad for p in layers.parameters())]


@pytest.mark.parametrize("pre_layer_norm", [True, False])
@pytest.mark.parametrize("flags", [["gelu_checkpoint"], ["normalize_invertible"], ["attn_dropout_checkpoint"],
                                   ["activation_checkpointing"],
                                   ["normalize_invertible", "gelu_checkpoint", "attn_dropout_checkpoint"]], ids=" ".join)
def test_memory_flags_change_memory_and_not_gradients(flags, pre_layer_norm):
    plain, wanted = gradients_with(pre_layer_norm=pre_layer_norm)
    saving, found = gradients_with(pre_layer_norm=pre_layer_norm, **dict.fromkeys(flags, True))
    config, plan = saving[0].stack.info().config, saving[0].stack.info().plan
    assert all(getattr(config, flag) for flag in flags)
    if flags != ["attn_dropout_checkpoint"]:  # fused attention keeps nothing of it anyway
        assert plan.context_bytes < plain[0].stack.info().plan.context_bytes
    for a, b in zip(found, wanted):
        assert encoder.relative_error(a, b) < 1e-4


def test_memory_flags_follow_the_config():
    config = config_of()
    layers = layers_of(config)
    run(layers, batch()).sum().backward()
    before = layers[0].stack.info().plan.context_bytes
    config.gelu_checkpoint = config.activation_checkpointing = True
    run(layers, batch()).sum().backward()
    assert layers[0].stack.info().plan.context_bytes < before


def test_causal_layers_do_not_look_ahead():
    layers = layers_of(config_of(causal=True)).eval()
    x = batch()
    changed = x.clone()
    changed[:, 10:] += 1
    before, after = run(layers, x), run(layers, changed)
    assert torch.equal(before[:, :10], after[:, :10]) and not torch.allclose(before[:, 10:], after[:, 10:])


def test_the_modules_docstrings():
    result = doctest.testmod(lamina.deepspeed)
    assert result.attempted > 8 and result.failed == 0


# --- training with PyTorch's optimizers ---


@pytest.mark.parametrize("pre_layer_norm", [True, False])
def test_an_optimizer_trains_them_as_it_trains_plain_layers(pre_layer_norm):
    """Two accumulated backwards a step, clipping, AdamW: the losses of 10 steps are PyTorch's."""
    torch.manual_seed(2)
    layers = layers_of(config_of(pre_layer_norm=pre_layer_norm))
    leaves, plain = twin_of(layers)
    parameters = [p for leaf in leaves for p in leaf.values()]
    losses = ([], [])
    for record, forward, trained in ((losses[0], lambda x: run(layers, x), list(layers.parameters())),
                                     (losses[1], plain, parameters)):
        optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.1)
        for step in range(10):
            optimizer.zero_grad()
            for micro in range(2):
                loss = (forward(batch(micro)) - batch(micro + 2)).square().mean()
                loss.backward()
                record.append(loss.item())
            nn.utils.clip_grad_norm_(trained, 0.5)
            optimizer.step()
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_gradients_are_pytorchs():
    layers = layers_of(config_of())
    leaves, plain = twin_of(layers)
    x, y = batch(requires_grad=True), batch(requires_grad=True)
    run(layers, x).square().sum().backward()
    plain(y).square().sum().backward()
    assert encoder.relative_error(x.grad, y.grad) < 1e-5
    for layer, leaf in zip(layers, leaves):
        for name, p in layer.named_parameters():
            assert encoder.relative_error(p.grad, leaf[name].grad) < 1e-5, name


def test_a_layer_called_twice_gets_both_gradients():
    layer = DeepSpeedTransformerLayer(config_of())
    leaves, _ = twin_of([layer])
    layer(layer(batch())).square().sum().backward()
    plain = lambda x: encoder.layer(x, leaves[0], heads=4, pre_layer_norm=True, gelu="tanh")
    plain(plain(batch())).square().sum().backward()
    for name, p in layer.named_parameters():
        assert encoder.relative_error(p.grad, leaves[0][name].grad) < 1e-5, name


def test_frozen_parameters_get_no_gradient():
    layers = layers_of(config_of())
    for name, p in layers.named_parameters():
        p.requires_grad_(name.endswith("norm_w"))
    run(layers, batch()).sum().backward()
    assert all((p.grad is not None) == name.endswith("norm_w") for name, p in layers.named_parameters())


@pytest.mark.parametrize("how", ["in place", "through .data", "a new .data", "a new parameter"])
def test_changed_weights_reach_the_daemon_however_they_were_changed(how):
    layer = DeepSpeedTransformerLayer(config_of(num_hidden_layers=1))
    before = layer(batch())
    if how == "in place":
        with torch.no_grad():
            layer.output_w.mul_(2)
    elif how == "through .data":
        layer.output_w.data.mul_(2)
    elif how == "a new .data":
        layer.output_w.data = 2 * layer.output_w.detach()
    else:
        layer.output_w = nn.Parameter(2 * layer.output_w.detach())
    after = layer(batch())
    assert not torch.allclose(after, before)
    assert torch.allclose(after, twin_of([layer])[1](batch()), atol=1e-5)


def test_unchanged_weights_are_not_sent_again(daemon):
    layers = layers_of(config_of())
    run(layers, batch())
    series = 'grpc_server_handled_total{grpc_code="OK",grpc_method="SetParameters"'
    sent = lambda: sum(v for k, v in daemon.metrics().items() if "SetParameters" in k and "handled_total" in k)
    before = sent()
    assert before >= 3, series
    for _ in range(3):
        run(layers, batch()).sum().backward()
    assert sent() == before
    with torch.no_grad():
        layers[1].inter_b.add_(1)
    run(layers, batch())
    assert sent() == before + 1


def test_weights_changed_between_forward_and_backward_are_an_error():
    layers = layers_of(config_of())
    loss = run(layers, batch()).sum()
    with torch.no_grad():
        layers[2].norm_w.mul_(2)
    loss.backward()  # the daemon holds the forward's weights still: right gradients
    loss = run(layers, batch()).sum()
    with torch.no_grad():
        layers[2].norm_w.mul_(2)
    run(layers, batch())
    with pytest.raises(RuntimeError, match="weights of layer 2 were changed after this forward"):
        loss.backward()


def test_a_second_backward_is_an_error():
    loss = run(layers_of(config_of()), batch()).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward was run a second time"):
        loss.backward()


def test_half_precision_parameters():
    layers = layers_of(config_of(fp16=True)).half()
    x = batch().half().requires_grad_()
    y = run(layers, x)
    y.float().square().sum().backward()
    assert y.dtype == x.grad.dtype == torch.float16
    assert {p.grad.dtype for p in layers.parameters()} == {torch.float16}
    assert layers[0].stack.dtype == "fp16"


# --- state ---


def test_state_dicts_load(tmp_path):
    config = config_of()
    source = layers_of(config)
    torch.save(source.state_dict(), tmp_path / "checkpoint.pt")
    wanted = run(source, batch())
    target = layers_of(config_of())
    assert not torch.allclose(run(target, batch()), wanted)
    target.load_state_dict(torch.load(tmp_path / "checkpoint.pt"))
    assert torch.equal(run(target, batch()), wanted)


def bad_state(layers):
    state = {name: value + 1 for name, value in layers.state_dict().items()}
    del state["0.attn_ow"], state["2.norm_b"]
    state["1.attn_nw"] = torch.zeros(31)
    state["2.inter_w"] = torch.zeros(32, 128)
    state["1.attn_kw"] = torch.zeros(32, 32)
    return state, ["0.attn_ow", "2.norm_b", "1.attn_nw", "2.inter_w", "1.attn_kw", "[31]", "[128, 32]"]


@pytest.mark.parametrize("how", ["ModuleList", "load_state_dict"])
@pytest.mark.parametrize("called", [False, True])
def test_a_bad_state_dict_is_refused_whole(how, called):
    layers = layers_of(config_of())
    if called:
        run(layers, batch())
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    state, complaints = bad_state(layers)
    with pytest.raises(RuntimeError) as error:
        layers.load_state_dict(state) if how == "ModuleList" else load_state_dict(layers, state)
    assert all(c in str(error.value) for c in complaints), str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())


@pytest.mark.parametrize("strict", [True, False])
def test_one_wrong_shape_keeps_all_layers_as_they_were(strict):
    layers = layers_of(config_of())
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    state["2.inter_w"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"2.inter_w: shape \[3\] must be \[128, 32\]"):
        layers.load_state_dict(state, strict=strict)
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())


def test_a_part_loads_where_that_was_asked_for():
    layers = layers_of(config_of())
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    keys = layers.load_state_dict({"1.norm_b": torch.ones(32), "3.norm_b": torch.ones(32)}, strict=False)
    assert len(keys.missing_keys) == 35 and keys.unexpected_keys == ["3.norm_b"]
    changed = {name for name, value in layers.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"1.norm_b"}


def test_a_bad_tensor_elsewhere_in_the_model_stops_the_layers_too():
    model = nn.ModuleDict({"encoder": layers_of(config_of()), "head": nn.Linear(32, 2)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    state["head.weight"] = torch.zeros(3, 32)
    with pytest.raises(RuntimeError, match=r"nothing was loaded:\s+head.weight: shape \[3, 32\] must be \[2, 32\]"):
        load_state_dict(model, state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    load_state_dict(model, {name: value + 1 for name, value in before.items()})
    assert torch.equal(model["head"].weight, before["head.weight"] + 1)


def test_pickled_layers_come_back():
    layers = layers_of(config_of())
    wanted = run(layers, batch())
    again = pickle.loads(pickle.dumps(layers))
    assert torch.equal(run(again, batch()), wanted)
    assert again[0].config is again[1].config is not layers[0].config


# --- weights that stay in the daemon ---


def test_remote_optimizer_trains_as_pytorchs_adamw_does(client):
    torch.manual_seed(2)
    layers = layers_of(config_of(remote_optimizer=True))
    leaves, plain = twin_of(layers)
    parameters = [p for leaf in leaves for p in leaf.values()]
    decayed = [p for p in parameters if p.dim() == 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1},
                                   {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}], lr=3e-3)
    assert not any(p.requires_grad for p in layers.parameters())
    for step in range(5):
        ours = (run(layers, batch(step)) - batch(step + 2)).square().mean()
        theirs = (plain(batch(step)) - batch(step + 2)).square().mean()
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
        ours.backward()
        outcome = stack_of(layers).apply_gradients(lr=3e-3, weight_decay=0.1)
        optimizer.zero_grad()
        theirs.backward()
        optimizer.step()
        assert outcome.applied and outcome.step == step + 1
    state = layers.state_dict()  # fetched
    for i, leaf in enumerate(leaves):
        for name, value in leaf.items():
            assert torch.allclose(state[f"{i}.{name}"], value, atol=1e-5), name
    # Loading goes on from there, in part too.
    layers.load_state_dict({"0.norm_b": torch.ones(32)}, strict=False)
    assert np.array_equal(run_and_read(layers, "layers.0.norm_b"), np.ones(32, np.float32))
    assert np.allclose(run_and_read(layers, "layers.1.inter_w"), leaves[1]["inter_w"].detach(), atol=1e-5)


def run_and_read(layers, name):
    run(layers, batch())
    return layers[0].stack.parameters([name])[name]


def test_old_weights_here_do_not_overwrite_newer_ones_there():
    layers = layers_of(config_of(remote_optimizer=True))
    run(layers, batch()).sum().backward()
    stack_of(layers).apply_gradients(lr=1e-2)
    with torch.no_grad():
        layers[1].inter_b.add_(1)
    with pytest.raises(RuntimeError, match=r"inter_b of layer 1 changed here while the daemon holds newer weights"):
        run(layers, batch())


def test_apply_gradients_needs_remote_optimizer():
    layers = layers_of(config_of())
    with pytest.raises(RuntimeError, match="remote_optimizer is off"):
        stack_of(layers).apply_gradients(lr=1e-3)
    with pytest.raises(ValueError, match="max_seq_length is not set: with remote_optimizer"):
        layers_of(config_of(remote_optimizer=True, max_seq_length=None))
    with pytest.raises(ValueError, match="the model has no DeepSpeedTransformerLayer"):
        stack_of(nn.Linear(2, 2))
