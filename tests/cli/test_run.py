"""run over .npy files, checkpoints."""

import numpy as np
import pytest

import conftest

B, S, H = 3, 20, 32


@pytest.fixture
def x_file(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.random.default_rng(1).standard_normal((B, S, H)).astype(np.float32))
    return path


def forward(daemon, stack, x_file, tmp_path, *options, **where):
    """The output of `run`, and what it printed."""
    y_file = tmp_path / "y.npy"
    printed = daemon.json("run", stack, "--input", x_file, "--output-file", y_file, *options, **where)
    return np.load(y_file), printed


def test_run_prints_what_it_wrote(daemon, stack, x_file, tmp_path):
    y, printed = forward(daemon, stack, x_file, tmp_path)
    assert y.shape == (B, S, H) and y.dtype == np.float32
    assert printed["shape"] == [B, S, H]
    assert printed["not_finite"] == 0
    np.testing.assert_allclose(
        [printed["min"], printed["max"], printed["mean"], printed["std"]],
        [y.min(), y.max(), y.mean(dtype=np.float64), y.std(dtype=np.float64)], rtol=1e-6, atol=1e-9)
    assert printed["input_transport"] == printed["output_transport"] == "memfd"
    assert printed["timing"]["compute_seconds"] > 0


def test_layers_compose(daemon, stack, x_file, tmp_path):
    whole, _ = forward(daemon, stack, x_file, tmp_path)
    first, _ = forward(daemon, stack, x_file, tmp_path, "--layers", "0:1")
    middle = tmp_path / "middle.npy"
    np.save(middle, first)
    second, _ = forward(daemon, stack, middle, tmp_path, "--layers", "1:2")
    assert not np.array_equal(first, whole)
    np.testing.assert_array_equal(second, whole)


def test_mask_and_lengths_hide_the_same_keys(daemon, stack, x_file, tmp_path):
    lengths = np.array([20, 7, 1])
    mask = np.where(np.arange(S)[None, :] < lengths[:, None], 0, -np.inf).astype(np.float32)
    np.save(tmp_path / "l.npy", lengths)
    np.save(tmp_path / "m.npy", mask.reshape(B, 1, 1, S))
    by_lengths, _ = forward(daemon, stack, x_file, tmp_path, "--lengths", tmp_path / "l.npy")
    by_mask, _ = forward(daemon, stack, x_file, tmp_path, "--mask", tmp_path / "m.npy")
    free, _ = forward(daemon, stack, x_file, tmp_path)
    valid = np.arange(S)[None, :] < lengths[:, None]
    np.testing.assert_allclose(by_mask[valid], by_lengths[valid], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(by_mask[0], free[0], rtol=1e-5, atol=1e-6)
    assert not np.allclose(by_mask[1, :7], free[1, :7], rtol=1e-3)


def test_inline_gives_the_same(daemon, stack, x_file, tmp_path):
    """Over TCP to this host the broker is reachable, so a region is used; without it, inline."""
    here, _ = forward(daemon, stack, x_file, tmp_path)
    over_tcp, printed = forward(daemon, stack, x_file, tmp_path, target=daemon.tcp)
    np.testing.assert_array_equal(here, over_tcp)
    assert printed["input_transport"] == "memfd"


def test_without_a_broker_tensors_go_inline(tmp_path, x_file, config_file):
    alone = conftest.Daemon()
    try:
        alone.json("stack", "create", "s", "--config", config_file())
        with_region, _ = forward(alone, "s", x_file, tmp_path)
        (alone.folder / "b.sock").unlink()
        inline, printed = forward(alone, "s", x_file, tmp_path)
        assert printed["input_transport"] == printed["output_transport"] == "inline"
        np.testing.assert_array_equal(with_region, inline)
    finally:
        alone.stop()


@pytest.mark.parametrize("dtype, tolerance", [("fp16", 2e-2), ("bf16", 1e-1)])
def test_other_dtypes(daemon, stack, config_file, x_file, tmp_path, dtype, tolerance):
    """fp32 files feed any stack; the same seed gives the same function up to rounding."""
    exact, _ = forward(daemon, stack, x_file, tmp_path)
    daemon.json("stack", "create", dtype, "--config", config_file(), "--dtype", dtype)
    try:
        y, printed = forward(daemon, dtype, x_file, tmp_path)
        assert printed["dtype"] == dtype
        assert y.dtype == (np.float16 if dtype == "fp16" else np.float32)
        np.testing.assert_allclose(y.astype(np.float32), exact, atol=tolerance)
    finally:
        daemon.cli("stack", "delete", dtype)


def test_fp16_input_file(daemon, stack, x_file, tmp_path):
    np.save(tmp_path / "x16.npy", np.load(x_file).astype(np.float16))
    y16, _ = forward(daemon, stack, tmp_path / "x16.npy", tmp_path)
    np.save(tmp_path / "x32.npy", np.load(x_file).astype(np.float16).astype(np.float32))
    y32, _ = forward(daemon, stack, tmp_path / "x32.npy", tmp_path)
    np.testing.assert_array_equal(y16, y32)


def test_run_changes_nothing(daemon, stack, x_file, tmp_path):
    before = daemon.json("stack", "show", stack)
    first, _ = forward(daemon, stack, x_file, tmp_path)
    second, _ = forward(daemon, stack, x_file, tmp_path)
    np.testing.assert_array_equal(first, second)
    assert daemon.json("stack", "show", stack) == before


def test_files_that_are_wrong(daemon, stack, x_file, tmp_path):
    (tmp_path / "text.npy").write_text("hello, this is not an array")
    np.save(tmp_path / "complex.npy", np.zeros((B, S, H), np.complex64))
    np.save(tmp_path / "fortran.npy", np.asfortranarray(np.zeros((B, S, H), np.float32)))
    np.save(tmp_path / "ints.npy", np.zeros((B, S, H), np.int32))
    np.save(tmp_path / "floats.npy", np.zeros(B, np.float32))
    (tmp_path / "cut.npy").write_bytes(x_file.read_bytes()[:-4])
    for name, words in {"text.npy": "is not a .npy file", "complex.npy": "<c8", "fortran.npy": "Fortran",
                        "ints.npy": "<i4", "cut.npy": "bytes of elements", "none.npy": "No such file"}.items():
        error = daemon.error("run", stack, "--input", tmp_path / name, code=2)
        assert name in error["message"] and words in error["message"]
    error = daemon.error("run", stack, "--input", x_file, "--lengths", tmp_path / "floats.npy", code=2)
    assert "--lengths" in error["message"] and "floats.npy" in error["message"]
    error = daemon.error("run", stack, "--input", x_file, "--output-file", tmp_path / "no/y.npy", code=1)
    assert "no/y.npy" in error["message"]


def test_calls_that_the_daemon_refuses(daemon, stack, x_file, tmp_path):
    assert daemon.error("run", "nobody", "--input", x_file, code=1)["code"] == "NOT_FOUND"
    for shape in [(B + 1, S, H), (B, S + 1, H), (B, S, H + 1), (S, H)]:
        np.save(tmp_path / "bad.npy", np.zeros(shape, np.float32))
        error = daemon.error("run", stack, "--input", tmp_path / "bad.npy", code=1)
        assert error["code"] == "INVALID_ARGUMENT"
    np.save(tmp_path / "l.npy", np.array([1, 0, 5], np.int32))
    error = daemon.error("run", stack, "--input", x_file, "--lengths", tmp_path / "l.npy", code=1)
    assert error["code"] == "INVALID_ARGUMENT" and "lengths" in error["message"]
    assert daemon.error("run", stack, "--input", x_file, "--layers", "1:3", code=1)["code"] == "INVALID_ARGUMENT"
    for text in ("1", "a:b", "0:1:2", ":"):
        assert "--layers" in daemon.error("run", stack, "--input", x_file, "--layers", text, code=2)["message"]


def test_checkpoint_round_trip(daemon, stack, x_file, tmp_path, config_file):
    y, _ = forward(daemon, stack, x_file, tmp_path)
    saved = daemon.json("checkpoint", "save", stack, "--name", "kept")
    assert saved["path"].endswith("kept.safetensors")
    file = daemon.checkpoints / "kept.safetensors"
    assert file.stat().st_size == saved["bytes"]
    assert saved["step"] == 0

    loaded = daemon.json("checkpoint", "load", "copy", "--name", "kept", "--create")
    assert loaded["name"] == "copy"
    assert loaded["config"]["hidden_size"] == H
    copied, _ = forward(daemon, "copy", x_file, tmp_path)
    np.testing.assert_array_equal(y, copied)
    assert daemon.error("checkpoint", "load", "copy", "--name", "kept", "--create", code=1)["code"] == "ALREADY_EXISTS"

    # Into a stack of other weights.
    daemon.json("stack", "create", "other", "--config", config_file(seed=8))
    try:
        assert not np.array_equal(y, forward(daemon, "other", x_file, tmp_path)[0])
        assert "other" in daemon.cli("checkpoint", "load", "other", "--name", "kept").stdout
        np.testing.assert_array_equal(y, forward(daemon, "other", x_file, tmp_path)[0])
    finally:
        daemon.cli("stack", "delete", "copy")
        daemon.cli("stack", "delete", "other")


def test_checkpoint_errors(daemon, stack):
    assert daemon.error("checkpoint", "save", "nobody", code=1)["code"] == "NOT_FOUND"
    assert daemon.error("checkpoint", "save", stack, "--name", "../x", code=1)["code"] == "INVALID_ARGUMENT"
    assert daemon.error("checkpoint", "load", stack, "--name", "absent", code=1)["code"] == "NOT_FOUND"
    (daemon.checkpoints / "damaged.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json at all!")
    assert daemon.error("checkpoint", "load", stack, "--name", "damaged", code=1)["code"] == "DATA_LOSS"


def test_no_checkpoint_folder(config_file):
    daemon = conftest.Daemon(checkpoints=False)
    try:
        daemon.json("stack", "create", "s", "--config", config_file())
        assert daemon.error("checkpoint", "save", "s", code=1)["code"] == "FAILED_PRECONDITION"
        assert daemon.json("info")["checkpoints_enabled"] is False
    finally:
        daemon.stop()
