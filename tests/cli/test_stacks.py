"""stack create, list, show, update, delete; plan; params list."""

import json

import conftest


def test_create_from_a_file(daemon, config_file):
    made = daemon.json("stack", "create", "from-file", "--config", config_file())
    try:
        assert made["name"] == "from-file"
        for field, value in conftest.CONFIG.items():
            assert made["config"][field] == value
        assert made["config"]["dtype"] == "fp32"
        assert made["config"]["pre_layer_norm"] is True
        h, i, layers = 32, 48, 2
        assert made["parameter_count"] == layers * (4 * h * h + 2 * h * i + 9 * h + i)
        assert made["step"] == 0
        assert made["outstanding_contexts"] == 0
    finally:
        daemon.cli("stack", "delete", "from-file")


def test_flags_override_the_file(daemon, config_file):
    made = daemon.json("stack", "create", "flags", "--config", config_file(dtype="fp16", gelu="erf"), "--dtype", "bf16",
                       "--gelu", "tanh", "--heads", "2", "--post-layer-norm", "--no-training", "--seed", "11",
                       "--hidden-dropout-ratio", "0.25", "--layer-norm-eps", "1e-6", "--no-adjust-init-range")
    try:
        config = made["config"]
        assert config["dtype"] == "bf16"
        assert config["gelu"] == "tanh"
        assert config["heads"] == 2
        assert config["pre_layer_norm"] is False
        assert config["training"] is False
        assert config["adjust_init_range"] is False
        assert config["seed"] == 11
        assert config["hidden_dropout_ratio"] == 0.25
        assert config["layer_norm_eps"] == 1e-6
        assert config["hidden_size"] == 32  # the file's
    finally:
        daemon.cli("stack", "delete", "flags")


def test_fp16_means_dtype_fp16(daemon, config_file):
    made = daemon.json("stack", "create", "half", "--config", config_file(), "--fp16")
    daemon.cli("stack", "delete", "half")
    assert made["config"]["dtype"] == "fp16"


def test_every_setting_has_its_flag(daemon, config_file):
    flags = {"normalize_invertible": True, "gelu_checkpoint": True, "attn_dropout_checkpoint": True,
             "activation_checkpointing": True, "stochastic_mode": True, "causal": True, "dynamic_loss_scale": True,
             "initial_loss_scale": 512, "loss_scale_growth_interval": 7, "loss_scale_growth_factor": 4,
             "loss_scale_backoff_factor": 0.25, "loss_scale_hysteresis": 3, "min_loss_scale": 2}
    given = []
    for field, value in flags.items():
        given += ["--" + field.replace("_", "-")] + ([] if value is True else [value])
    plain = daemon.json("plan", "--config", config_file())
    made = daemon.json("stack", "create", "all", "--config", config_file(), *given)
    text = daemon.cli("stack", "show", "all").stdout
    daemon.cli("stack", "delete", "all")
    assert {field: made["config"][field] for field in flags} == flags
    assert made["loss_scale"] == 512
    assert made["plan"]["context_bytes"] < plain["context_bytes"]
    assert "512, dynamic" in text and "fp32, causal" in text
    for flag in ("normalize_invertible", "gelu_checkpoint", "attn_dropout_checkpoint", "activation_checkpointing",
                 "stochastic_mode"):
        assert flag in text


def test_show_can_be_created_again(daemon, stack, tmp_path):
    """The config that show prints is one that create takes, and gives the same stack."""
    shown = daemon.json("stack", "show", stack)
    path = tmp_path / "shown.json"
    path.write_text(json.dumps(shown["config"]))
    again = daemon.json("stack", "create", "again", "--config", path)
    daemon.cli("stack", "delete", "again")
    assert again["config"] == shown["config"]
    assert again["plan"] == shown["plan"]


def test_list_show_delete(daemon, stack):
    listed = {entry["name"]: entry for entry in daemon.json("stack", "list")["stacks"]}
    assert listed[stack]["config"]["hidden_size"] == 32
    text = daemon.cli("stack", "list").stdout
    assert text.startswith("NAME")
    assert stack in text
    shown = daemon.cli("stack", "show", stack).stdout
    assert "2 x (H 32, I 48, 4 heads), Pre-LN, GELU erf, fp32" in shown
    assert daemon.json("stack", "delete", stack) == {"deleted": stack}
    assert daemon.error("stack", "show", stack, code=1)["code"] == "NOT_FOUND"
    assert daemon.error("stack", "delete", stack, code=1)["code"] == "NOT_FOUND"
    assert stack not in daemon.cli("stack", "list").stdout


def test_update(daemon, stack):
    changed = daemon.json("stack", "update", stack, "--attn-dropout-ratio", "0.5", "--no-training")
    assert changed["config"]["attn_dropout_ratio"] == 0.5
    assert changed["config"]["hidden_dropout_ratio"] == 0
    assert changed["config"]["training"] is False
    assert daemon.json("stack", "update", stack, "--training")["config"]["training"] is True
    before = daemon.json("stack", "show", stack)
    for flag in ("normalize_invertible", "gelu_checkpoint", "attn_dropout_checkpoint", "activation_checkpointing",
                 "stochastic_mode"):
        name = flag.replace("_", "-")
        on = daemon.json("stack", "update", stack, f"--{name}")
        assert {key for key in on["config"] if on["config"][key] != before["config"][key]} == {flag}
        off = daemon.json("stack", "update", stack, f"--no-{name}")
        assert off["config"] == before["config"] and off["plan"] == before["plan"]
    error = daemon.error("stack", "update", stack, "--attn-dropout-ratio", "1", code=1)
    assert error["code"] == "INVALID_ARGUMENT"
    assert "attn_dropout_ratio" in error["message"]
    assert daemon.error("stack", "update", stack, code=1)["code"] == "INVALID_ARGUMENT"


def test_the_daemons_refusals(daemon, stack, config_file):
    error = daemon.error("stack", "create", stack, "--config", config_file(), code=1)
    assert error["code"] == "ALREADY_EXISTS"
    error = daemon.error("stack", "create", "x", "--config", config_file(heads=5), code=1)
    assert error["code"] == "INVALID_ARGUMENT"
    assert "heads" in error["message"] and "32" in error["message"]
    error = daemon.error("stack", "create", ".x", "--config", config_file(), code=1)
    assert error["code"] == "INVALID_ARGUMENT"
    assert "name" in error["message"]
    error = daemon.error("stack", "create", "x", "--config", config_file(), "--dynamic-loss-scale",
                         "--loss-scale-hysteresis", 0, code=1)
    assert error["code"] == "INVALID_ARGUMENT"
    assert "loss_scale_hysteresis" in error["message"]
    huge = config_file(hidden_size=65536, intermediate_size=-1, num_hidden_layers=1024)
    error = daemon.error("stack", "create", "x", "--config", huge, code=1)
    assert error["code"] == "RESOURCE_EXHAUSTED"
    text = daemon.cli("stack", "create", "x", "--config", config_file(heads=5))
    assert text.returncode == 1
    assert text.stderr.startswith("lamina: INVALID_ARGUMENT: ")


def test_config_files_that_are_wrong(daemon, tmp_path):
    path = tmp_path / "c.json"
    for content, words in {
        '{"hiden_size": 4}': ["'hiden_size'", "hidden_size"],
        '{"hidden_size": "4"}': ["'hidden_size'", "integer"],
        '{"hidden_size": 4,': ["c.json", "parse error"],
        "[]": ["c.json", "not a JSON object"],
        '{"dtype": "fp8"}': ["'dtype'", "bf16"],
    }.items():
        path.write_text(content)
        error = daemon.error("stack", "create", "x", "--config", path, code=2)
        for word in words:
            assert word in error["message"]
    error = daemon.error("plan", "--config", tmp_path / "none.json", code=2)
    assert "No such file" in error["message"]


def test_plan_is_what_create_allocates(daemon, stack, config_file):
    plan = daemon.json("plan", "--config", config_file())
    made = daemon.json("stack", "show", stack)
    assert plan["entries"] == made["plan"]["entries"]
    assert plan["total_bytes"] == made["plan"]["total_bytes"] == sum(e["bytes"] for e in plan["entries"])
    assert sum(plan["by_kind"].values()) == plan["total_bytes"]
    assert plan["fits"] is True
    assert plan["by_kind"]["gradients"] >= 4 * made["parameter_count"]
    assert plan["by_kind"]["optimizer"] >= 8 * made["parameter_count"]


def test_plan_as_text(daemon, config_file):
    text = daemon.cli("plan", "--config", config_file()).stdout
    plan = daemon.json("plan", "--config", config_file())
    assert f"{plan['total_bytes']:,}" in text
    for entry in plan["entries"]:
        assert entry["name"] in text
    assert "fits" in text and "does not fit" not in text


def test_plan_from_flags_alone_says_what_does_not_fit(daemon):
    arguments = ["plan", "--hidden-size", "16384", "--heads", "128", "--num-hidden-layers", "96", "--batch-size", "64",
                 "--max-seq-length", "4096"]
    plan = daemon.json(*arguments)
    assert plan["fits"] is False
    assert plan["total_bytes"] > plan["device_free_bytes"]
    assert "does not fit" in daemon.cli(*arguments).stdout


def test_params_list(daemon, stack):
    listed = daemon.json("params", "list", stack)
    shapes = {entry["name"]: entry["shape"] for entry in listed["parameters"]}
    assert len(shapes) == 24
    assert shapes["layers.0.attn_qkvw"] == [96, 32]
    assert shapes["layers.1.inter_w"] == [48, 32]
    assert shapes["layers.1.output_w"] == [32, 48]
    assert shapes["layers.0.norm_b"] == [32]
    count = 0
    for shape in shapes.values():
        size = 1
        for extent in shape:
            size *= extent
        count += size
    assert count == listed["parameter_count"]
    text = daemon.cli("params", "list", stack).stdout
    assert "layers.0.attn_qkvw" in text and "[96, 32]" in text
    assert daemon.error("params", "list", "nobody", code=1)["code"] == "NOT_FOUND"
