"""Each language's program over TLS with a token, and with a certificate of its own; led there by the environment alone."""

import pytest
from certificates import Authority, replace
from daemon import Daemon

TOKEN = "train-0123456789abcdef"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def secured(authority):
    tokens = replace(authority.folder / "tokens", f"train {TOKEN}\n")
    certificate, key = authority.issue_for_daemon()
    with Daemon("--tls-cert", certificate, "--tls-key", key, "--tls-client-ca", authority.path, "--tokens", tokens) as d:
        yield d


@pytest.mark.parametrize("by", ["token", "certificate", "nothing"])
def test_security_from_the_environment(program, secured, authority, monkeypatch, by, tmp_path):
    monkeypatch.setenv("LAMINA_TLS_CA", str(authority.path))
    if by == "token":
        monkeypatch.setenv("LAMINA_TOKEN_FILE", str(replace(tmp_path / "token", TOKEN + "\n")))
    elif by == "certificate":
        certificate, key = authority.issue("client", uris=["spiffe://lamina/train"])
        monkeypatch.setenv("LAMINA_CLIENT_CERT", str(certificate))
        monkeypatch.setenv("LAMINA_CLIENT_KEY", str(key))
    done = program.run("--target", secured.tcp.replace("127.0.0.1", "localhost"), "--steps", "3")
    if by != "nothing":
        assert done.code == 0 and len(done.losses) == 3 and done.transport == "memfd", done
        # Nothing of it is for a Unix socket.
        assert by == "certificate" or program.run("--target", secured.target, "--steps", "1").code == 0
    else:
        assert done.code == 1 and len(done.err.splitlines()) == 1 and "must know who calls" in done.err, done


def test_a_daemon_that_is_signed_by_another(example, secured, monkeypatch, tmp_path):
    monkeypatch.setenv("LAMINA_TLS_CA", str(Authority(tmp_path, "another").path))
    done = example.run("--target", secured.tcp.replace("127.0.0.1", "localhost"), "--steps", "1")
    assert done.code == 1 and done.out == "", done


def test_a_token_is_not_sent_unencrypted_to_another_host(program, monkeypatch, tmp_path):
    monkeypatch.setenv("LAMINA_TOKEN_FILE", str(replace(tmp_path / "token", TOKEN)))
    done = program.run("--target", "192.0.2.1:1", "--steps", "1")
    assert done.code in (1, 2) and "unencrypted" in done.err, done
