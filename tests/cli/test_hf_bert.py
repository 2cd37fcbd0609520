"""checkpoint import and export: pretrained BERT encoders in and out, in files made here byte by byte."""

import errno
import json
import os
import struct
import sys
import threading
import time

import numpy as np
import pytest
import torch

import conftest

sys.path.insert(0, str(conftest.ROOT / "tests/support"))
import encoder  # noqa: E402

B, S, H, A, I, L = 3, 20, 32, 4, 48, 2
CONFIG = {"model_type": "bert", "hidden_size": H, "num_attention_heads": A, "num_hidden_layers": L,
          "intermediate_size": I, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "attention_probs_dropout_prob": 0.1,
          "hidden_dropout_prob": 0.2, "initializer_range": 0.02, "max_position_embeddings": S, "vocab_size": 11}
# Lamina's name -> the model's.
NAMES = {"attn_qw": "attention.self.query.weight", "attn_qb": "attention.self.query.bias",
         "attn_kw": "attention.self.key.weight", "attn_kb": "attention.self.key.bias",
         "attn_vw": "attention.self.value.weight", "attn_vb": "attention.self.value.bias",
         "attn_ow": "attention.output.dense.weight", "attn_ob": "attention.output.dense.bias",
         "attn_nw": "attention.output.LayerNorm.weight", "attn_nb": "attention.output.LayerNorm.bias",
         "inter_w": "intermediate.dense.weight", "inter_b": "intermediate.dense.bias",
         "output_w": "output.dense.weight", "output_b": "output.dense.bias",
         "norm_w": "output.LayerNorm.weight", "norm_b": "output.LayerNorm.bias"}
SHAPES = {"attn_qw": (H, H), "attn_kw": (H, H), "attn_vw": (H, H), "attn_ow": (H, H), "inter_w": (I, H),
          "inter_b": (I,), "output_w": (H, I)}


def to_bf16(values):
    """fp32 -> bf16 bits, towards zero: any bf16 will do."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def write(path, tensors, metadata=None, misalign=False):
    """A .safetensors file of {name: (dtype, array)}; elements in the order given."""
    header, data = {}, b""
    if metadata:
        header["__metadata__"] = metadata
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + (3 if misalign else 0))
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read(path):
    """{name: (dtype, bytes, shape)} of a .safetensors file."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:8 + size])
    header.pop("__metadata__", None)
    cut = lambda begin, end: content[8 + size + begin:8 + size + end]
    return {name: (entry["dtype"], cut(*entry["data_offsets"]), entry["shape"]) for name, entry in header.items()}


def random_encoder(prefix="bert.encoder.", old_norms=False):
    """A tiny BERT's encoder with no zero and no one in it: {name: fp32 array}."""
    random = np.random.default_rng(3)
    tensors = {}
    for i in range(L):
        for ours, name in NAMES.items():
            values = random.standard_normal(SHAPES.get(ours, (H,))) * 0.2 + (ours in ("attn_nw", "norm_w"))
            if old_norms:
                name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[f"{prefix}layer.{i}.{name}"] = values.astype(np.float32)
    return tensors


def typed(tensors, dtype):
    convert = {"F32": lambda a: a, "F16": lambda a: a.astype(np.float16), "BF16": to_bf16}[dtype]
    return {name: (dtype, convert(array)) for name, array in tensors.items()}


def write_model(folder, tensors, dtype="F32", others=True, **changes):
    """A model's folder: config.json and model.safetensors, with an embedding and a pooler around the encoder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    whole = typed(tensors, dtype)
    if others:
        word = np.arange(11 * H, dtype=np.float32).reshape(11, H)
        whole = {"bert.embeddings.word_embeddings.weight": ("F32", word),
                 "bert.embeddings.position_ids": ("I64", np.arange(S).reshape(1, S))} | whole
        whole["bert.pooler.dense.bias"] = ("F16", np.ones(H, np.float16))
    write(folder / "model.safetensors", whole, metadata={"format": "pt"})
    return folder


def expected(x, tensors, prefix="bert.encoder.", gelu="erf", mask=None):
    """The hidden states that PyTorch gets, in double."""
    y = torch.as_tensor(x).double()
    for i in range(L):
        of = {ours: torch.as_tensor(tensors[f"{prefix}layer.{i}.{name}"]).double() for ours, name in NAMES.items()}
        of["attn_qkvw"] = torch.cat([of["attn_qw"], of["attn_kw"], of["attn_vw"]])
        of["attn_qkvb"] = torch.cat([of["attn_qb"], of["attn_kb"], of["attn_vb"]])
        y = encoder.layer(y, of, heads=A, pre_layer_norm=False, eps=CONFIG["layer_norm_eps"], gelu=gelu, mask=mask)
    return y.numpy()


def hidden_states(daemon, stack, x, tmp_path, *options):
    np.save(tmp_path / "x.npy", x)
    daemon.json("run", stack, "--input", tmp_path / "x.npy", "--output-file", tmp_path / "y.npy", *options)
    return np.load(tmp_path / "y.npy")


@pytest.fixture
def imported(daemon):
    """Imports, and deletes the stacks afterwards: imported(PATH, *options) -> what was printed."""
    made = []

    def run(path, *options):
        result = daemon.json("checkpoint", "import", "--format", "hf-bert", path, "--batch-size", B, *options)
        made.append(result["name"])
        return result

    yield run
    for name in made:
        daemon.cli("stack", "delete", name)


@pytest.fixture
def x():
    return np.random.default_rng(5).standard_normal((B, S, H)).astype(np.float32)


def test_hidden_states_match_pytorch(daemon, imported, x, tmp_path):
    tensors = random_encoder()
    made = imported(write_model(tmp_path / "tiny", tensors))
    assert made["name"] == "tiny"
    assert made["imported"]["prefix"] == "bert.encoder."
    assert made["imported"]["tensors"] == 16 * L
    assert made["imported"]["bytes"] == 4 * made["parameter_count"]
    for field, value in {"hidden_size": H, "heads": A, "num_hidden_layers": L, "intermediate_size": I,
                         "layer_norm_eps": 1e-6, "attn_dropout_ratio": 0.1, "hidden_dropout_ratio": 0.2,
                         "pre_layer_norm": False, "gelu": "erf", "max_seq_length": S, "batch_size": B,
                         "dtype": "fp32"}.items():
        assert made["config"][field] == value
    np.testing.assert_allclose(hidden_states(daemon, "tiny", x, tmp_path), expected(x, tensors), rtol=0, atol=1e-5)
    lengths = np.array([S, 7, 1])
    np.save(tmp_path / "l.npy", lengths)
    valid = np.arange(S)[None, :] < lengths[:, None]
    mask = torch.as_tensor(np.where(valid, 0, -np.inf)).reshape(B, 1, 1, S)
    y = hidden_states(daemon, "tiny", x, tmp_path, "--lengths", tmp_path / "l.npy")
    np.testing.assert_allclose(y[valid], expected(x, tensors, mask=mask)[valid], rtol=0, atol=1e-5)


def test_tanh_and_no_prefix_and_old_norms(daemon, imported, x, tmp_path):
    new, old = random_encoder("encoder."), random_encoder("encoder.", old_norms=True)
    folder = write_model(tmp_path / "m", old, others=False, hidden_act="gelu_new")
    made = imported(folder / "model.safetensors", "--name", "tanh")
    assert made["name"] == "tanh" and made["config"]["gelu"] == "tanh"
    y = hidden_states(daemon, "tanh", x, tmp_path)
    np.testing.assert_allclose(y, expected(x, new, "encoder.", gelu="tanh"), rtol=0, atol=1e-5)
    assert np.abs(y - expected(x, new, "encoder.", gelu="erf")).max() > 1e-4


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("stack_dtype", ["fp32", "bf16"])
def test_master_weights_are_exact_and_come_back(daemon, imported, tmp_path, dtype, stack_dtype):
    """The export over its base is the base to the bit, whatever the stack's dtype: the master weights are fp32."""
    tensors = random_encoder()
    folder = write_model(tmp_path / "m", tensors, dtype)
    imported(folder, "--name", "exact", "--dtype", stack_dtype)
    out = tmp_path / "out"
    done = daemon.json("checkpoint", "export", "--format", "hf-bert", "exact", out, "--base", folder)
    assert done["files"] == [str(out / "model.safetensors")]
    assert (done["tensors"], done["step"], done["config_written"]) == (16 * L, 0, True)
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    # Without the base: fp32 under the plain names, the values exactly the source's.
    alone = tmp_path / "alone.safetensors"
    daemon.json("checkpoint", "export", "exact", alone)
    back = read(alone)
    source = {"F32": lambda a: a, "F16": lambda a: a.astype(np.float32), "BF16": from_bf16}[dtype]
    assert len(back) == 16 * L
    for name, (_, array) in typed(tensors, dtype).items():
        kind, data, shape = back[name.replace("bert.", "")]
        assert (kind, shape) == ("F32", list(array.shape))
        assert data == source(array).tobytes()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_matrices_that_are_read_in_several_pieces(daemon, imported, tmp_path, dtype):
    """A piece has 64 KiB; here matrices have three and a bit in 16 bits, and twice that in fp32."""
    hidden, intermediate = 160, 650
    shapes = dict.fromkeys(("attn_qw", "attn_kw", "attn_vw", "attn_ow"), (hidden, hidden))
    shapes |= {"inter_w": (intermediate, hidden), "inter_b": (intermediate,), "output_w": (hidden, intermediate)}
    random = np.random.default_rng(7)
    tensors = {f"encoder.layer.0.{name}": random.standard_normal(shapes.get(ours, (hidden,))).astype(np.float32)
               for ours, name in NAMES.items()}
    folder = write_model(tmp_path / "m", tensors, dtype, others=False, hidden_size=hidden, intermediate_size=intermediate,
                         num_hidden_layers=1)
    imported(folder, "--name", "pieces")
    out = tmp_path / "out"
    daemon.json("checkpoint", "export", "pieces", out, "--base", folder)
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_export_alone_can_be_imported(daemon, imported, x, tmp_path):
    tensors = random_encoder()
    imported(write_model(tmp_path / "m", tensors), "--name", "first")
    out = tmp_path / "out"
    daemon.json("checkpoint", "export", "first", out, "--prefix", "roberta.encoder.", "--dtype", "fp16")
    assert all(name.startswith("roberta.encoder.layer.") and dtype == "F16"
               for name, (dtype, _, _) in read(out / "model.safetensors").items())
    again = imported(out, "--name", "second")
    assert again["config"]["layer_norm_eps"] == 1e-6
    y = hidden_states(daemon, "second", x, tmp_path)
    rounded = {name: array.astype(np.float16) for name, array in tensors.items()}
    np.testing.assert_allclose(y, expected(x, rounded), rtol=0, atol=1e-5)


def test_export_writes_what_was_trained(daemon, imported, x, tmp_path):
    """Over a base, other weights replace the encoder's tensors alone."""
    base = write_model(tmp_path / "base", random_encoder())
    changed = {name: array + 1 for name, array in random_encoder().items()}
    other = write_model(tmp_path / "other", changed)
    imported(other, "--name", "trained")
    text = daemon.cli("checkpoint", "export", "trained", tmp_path / "out", "--base", base).stdout
    assert "32 tensors" in text and "config.json written" in text
    assert (tmp_path / "out/model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    # In place.
    text = daemon.cli("checkpoint", "export", "trained", base / "model.safetensors", "--base", base).stdout
    assert "was there and is kept" in text
    assert (base / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert sorted(path.name for path in base.iterdir()) == ["config.json", "model.safetensors"]


def test_shards(daemon, imported, x, tmp_path):
    tensors = random_encoder()
    folder = write_model(tmp_path / "m", tensors)
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    halves = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in halves.items():
        write(folder / file, typed({name: tensors[name] for name in part}, "F32"))
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    imported(folder, "--name", "sharded")
    np.testing.assert_allclose(hidden_states(daemon, "sharded", x, tmp_path), expected(x, tensors), rtol=0, atol=1e-5)
    done = daemon.json("checkpoint", "export", "sharded", tmp_path / "out", "--base", folder)
    assert len(done["files"]) == 3
    for path in folder.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    error = daemon.error("checkpoint", "export", "sharded", tmp_path / "one.safetensors", "--base", folder, code=2)
    assert "must be a folder" in error["message"]


def test_elements_that_lie_misaligned(daemon, imported, x, tmp_path):
    tensors = random_encoder()
    folder = write_model(tmp_path / "m", tensors)
    write(folder / "model.safetensors", typed(tensors, "F32"), misalign=True)
    imported(folder, "--name", "odd")
    np.testing.assert_allclose(hidden_states(daemon, "odd", x, tmp_path), expected(x, tensors), rtol=0, atol=1e-5)


def test_flags_override_and_stand_in_for_the_config(daemon, imported, x, tmp_path):
    tensors = random_encoder()
    folder = write_model(tmp_path / "m", tensors)
    made = imported(folder, "--name", "flags", "--max-seq-length", 9, "--hidden-dropout-ratio", 0, "--no-training")
    assert made["config"]["max_seq_length"] == 9
    assert made["config"]["hidden_dropout_ratio"] == 0
    assert made["config"]["attn_dropout_ratio"] == 0.1
    assert made["config"]["training"] is False
    (folder / "config.json").unlink()
    shape = ["--hidden-size", H, "--num-hidden-layers", L, "--intermediate-size", I]
    error = daemon.error("checkpoint", "import", folder, *shape, "--name", "x", code=2)
    assert "--heads must be given" in error["message"] and "config.json" in error["message"]
    imported(folder, *shape, "--heads", A, "--max-seq-length", S, "--layer-norm-eps", 1e-6, "--name", "bare")
    np.testing.assert_allclose(hidden_states(daemon, "bare", x, tmp_path), expected(x, tensors), rtol=0, atol=1e-5)


def test_all_tensors_that_do_not_fit_are_listed(daemon, tmp_path):
    tensors = random_encoder()
    tensors["bert.encoder.layer.0.attention.self.key.bias"] = np.zeros(H + 1, np.float32)
    tensors["bert.encoder.layer.2.output.dense.bias"] = np.zeros(H, np.float32)
    del tensors["bert.encoder.layer.1.intermediate.dense.weight"]
    del tensors["bert.encoder.layer.0.output.LayerNorm.bias"]
    folder = write_model(tmp_path / "m", tensors)
    before = daemon.json("stack", "list")
    message = daemon.error("checkpoint", "import", folder, code=2)["message"]
    for line in ["4 tensors do not fit 2 layers of hidden size 32 and intermediate size 48",
                 "missing: 'bert.encoder.layer.0.output.LayerNorm.bias' [32]",
                 "missing: 'bert.encoder.layer.1.intermediate.dense.weight' [48, 32]",
                 "wrong shape: 'bert.encoder.layer.0.attention.self.key.bias' is [33], expected [32]",
                 "not of these layers: 'bert.encoder.layer.2.output.dense.bias' [32]"]:
        assert line in message
    assert daemon.json("stack", "list") == before


def test_files_that_are_wrong(daemon, tmp_path):
    before = daemon.json("stack", "list")
    folder = write_model(tmp_path / "m", random_encoder())
    good = (folder / "model.safetensors").read_bytes()
    for content, words in {good[:-1]: "the file has", good[:100]: "ends within its header", b"": "has 0 bytes",
                           struct.pack("<Q", 2**63) + b"{}": "at most 100000000",
                           struct.pack("<Q", 10**6) + b"[" * 10**6: "begin with '{'",
                           struct.pack("<Q", 10**6 + 5) + b'{"a":' + b"[" * 10**6: "an array"}.items():
        (folder / "model.safetensors").write_bytes(content)
        message = daemon.error("checkpoint", "import", folder, code=2)["message"]
        assert words in message and "model.safetensors" in message
    (folder / "model.safetensors").write_bytes(good)
    for change, words in {"hidden_act": "relu", "model_type": "gpt2", "position_embedding_type": "relative_key"}.items():
        (folder / "config.json").write_text(json.dumps(CONFIG | {change: words}))
        message = daemon.error("checkpoint", "import", folder, code=2)["message"]
        assert change in message and words in message and "config.json" in message
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert "Post-LN" in daemon.error("checkpoint", "import", folder, "--pre-layer-norm", code=2)["message"]
    assert "No such file" in daemon.error("checkpoint", "import", tmp_path / "none", code=2)["message"]
    (tmp_path / "empty").mkdir()
    assert "no model.safetensors" in daemon.error("checkpoint", "import", tmp_path / "empty", code=2)["message"]
    assert "--format" in daemon.error("checkpoint", "import", folder, "--format", "onnx", code=2)["message"]
    assert daemon.json("stack", "list") == before


def test_a_file_that_is_cut_short_while_it_is_read(daemon, imported, tmp_path):
    """A config.json that is a pipe holds the command between its look at the tensors' header and their reading."""
    folder = write_model(tmp_path / "m", random_encoder())
    model, config = folder / "model.safetensors", folder / "config.json"
    good, content = model.read_bytes(), config.read_text()
    size = struct.unpack("<Q", good[:8])[0]
    offsets = {name: entry["data_offsets"] for name, entry in json.loads(good[8:8 + size]).items() if name != "__metadata__"}
    name = next(name for name in offsets if "layer.1.output.dense.weight" in name)
    begin, end = (8 + size + offset for offset in offsets[name])
    imported(folder, "--name", "whole")
    before = daemon.json("stack", "list")

    def cut_while(*arguments):
        """The command's error when the file loses its end in the middle of that tensor."""
        model.write_bytes(good)
        config.unlink()
        os.mkfifo(config)
        error = []
        command = threading.Thread(target=lambda: error.append(daemon.error(*arguments, code=1)))
        command.start()
        give_up = time.monotonic() + 30
        while True:
            try:
                pipe = os.open(config, os.O_WRONLY | os.O_NONBLOCK)  # fails while nobody reads
                break
            except OSError as nobody:
                assert nobody.errno == errno.ENXIO and command.is_alive() and time.monotonic() < give_up
                time.sleep(0.01)
        os.truncate(model, begin + 5)
        os.write(pipe, content.encode())
        os.close(pipe)
        command.join()
        config.unlink()
        config.write_text(content)
        return error[0]

    words = (f"'{model}': was cut short while it was read: tensor '{name}' is at bytes [{begin}, {end}), "
             f"and the file ends at byte {begin + 5} now")
    error = cut_while("checkpoint", "import", folder, "--name", "half")
    assert error["code"] == "ABORTED" and error["message"] == words + "; the stack 'half' is deleted again"
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_text(content)  # else it would be read twice, to be copied
    error = cut_while("checkpoint", "export", "whole", copy, "--base", folder)
    assert error["code"] == "ABORTED" and error["message"] == words
    assert [path.name for path in copy.iterdir()] == ["config.json"]
    assert daemon.json("stack", "list") == before


def test_what_the_daemon_refuses(daemon, imported, tmp_path):
    folder = write_model(tmp_path / "m", random_encoder())
    assert daemon.error("checkpoint", "import", folder, "--name", ".x", code=1)["code"] == "INVALID_ARGUMENT"
    imported(folder, "--name", "taken")
    # The stack that was there before is not the import's to delete.
    assert daemon.error("checkpoint", "import", folder, "--name", "taken", code=1)["code"] == "ALREADY_EXISTS"
    assert daemon.json("stack", "show", "taken")["name"] == "taken"
    assert daemon.error("checkpoint", "import", folder, target="127.0.0.1:1", code=3)["code"] == "UNREACHABLE"


def test_a_failed_import_leaves_no_stack(tmp_path):
    """Inline tensors above the cap are refused by the daemon, after the stack was made."""
    daemon = conftest.Daemon("--inline-cap", "4096")
    try:
        (daemon.folder / "b.sock").unlink()
        folder = write_model(tmp_path / "m", random_encoder())
        error = daemon.error("checkpoint", "import", folder, "--name", "half", code=1)
        assert "the stack 'half' is deleted again" in error["message"]
        assert daemon.json("stack", "list")["stacks"] == []
    finally:
        daemon.stop()


def test_without_a_broker_tensors_go_inline(tmp_path, x):
    daemon = conftest.Daemon()
    try:
        (daemon.folder / "b.sock").unlink()
        tensors = random_encoder()
        folder = write_model(tmp_path / "m", tensors)
        daemon.json("checkpoint", "import", folder, "--batch-size", B, target=daemon.tcp)
        y = hidden_states(daemon, "m", x, tmp_path)
        np.testing.assert_allclose(y, expected(x, tensors), rtol=0, atol=1e-5)
        daemon.json("checkpoint", "export", "m", tmp_path / "out", "--base", folder, target=daemon.tcp)
        assert (tmp_path / "out/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    finally:
        daemon.stop()


def test_exports_that_cannot_be(daemon, stack, imported, tmp_path):
    error = daemon.error("checkpoint", "export", stack, tmp_path / "out", code=1)
    assert error["code"] == "FAILED_PRECONDITION" and "Pre-LN" in error["message"]
    assert daemon.error("checkpoint", "export", "nobody", tmp_path / "out", code=1)["code"] == "NOT_FOUND"
    folder = write_model(tmp_path / "m", random_encoder())
    imported(folder, "--name", "fine")
    error = daemon.error("checkpoint", "export", "fine", tmp_path / "no/such/m.safetensors", code=1)
    assert "no/such" in error["message"]
    error = daemon.error("checkpoint", "export", "fine", tmp_path / "out", "--base", folder, "--dtype", "fp16", code=2)
    assert "--dtype" in error["message"]
    # A config.json of another model is neither written over nor left beside what it does not describe.
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(CONFIG | {"num_attention_heads": 2}))
    error = daemon.error("checkpoint", "export", "fine", other, code=2)
    assert "heads 2, the stack's is 4" in error["message"]
    assert [path.name for path in other.iterdir()] == ["config.json"]
    tensors = random_encoder()
    del tensors["bert.encoder.layer.0.output.dense.bias"]
    broken = write_model(tmp_path / "broken", tensors)
    error = daemon.error("checkpoint", "export", "fine", tmp_path / "out", "--base", broken, code=2)
    assert "missing: 'bert.encoder.layer.0.output.dense.bias'" in error["message"]


def test_import_as_text(daemon, tmp_path):
    folder = write_model(tmp_path / "m", random_encoder())
    done = daemon.cli("checkpoint", "import", folder, "--name", "text")
    daemon.cli("stack", "delete", "text")
    assert done.returncode == 0, done.stderr
    assert "2 x (H 32, I 48, 4 heads), Post-LN, GELU erf, fp32" in done.stdout
    assert "imported 32 tensors" in done.stdout and "'bert.encoder.layer.'" in done.stdout
