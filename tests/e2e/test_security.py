"""Who may call what: TLS, certificates, tokens, roles, the users of Unix sockets, whose session it is."""

import contextlib
import datetime
import os
import pathlib
import subprocess
import sys
import time
import urllib.error
import urllib.request

import grpc
import lamina
import pytest
from certificates import Authority, replace
from daemon import BINARY, ROOT, Daemon, wait_until
from lamina.v1 import config_service_pb2 as cpb
from lamina.v1 import config_service_pb2_grpc, layer_service_pb2_grpc, session_service_pb2_grpc
from lamina.v1 import layer_service_pb2 as lpb
from lamina.v1 import session_service_pb2 as spb
from lamina.v1 import tensor_pb2 as tpb
from raw import refused

CLI = os.environ.get("LAMINA_CLI", str(ROOT / "build/release/bin/lamina"))
LIBRARY = str(pathlib.Path(lamina.__file__).parents[1])
ALICE, BOB, CAROL = (f"{name}-0123456789abcdef" for name in ("alice", "bob", "carol"))
HOUR = datetime.timedelta(hours=1)
DENIED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
SOME, WORKER = {"read-only", "operator", "trainer"}, {"operator", "trainer"}

# Every RPC that there is, and who may call it: None is everybody. An RPC that is missing here fails a test.
MATRIX = {
    "grpc.health.v1.Health": {"Check": None, "Watch": SOME},
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": SOME},
    "grpc.channelz.v1.Channelz": dict.fromkeys(
        ["GetTopChannels", "GetServers", "GetServer", "GetServerSockets", "GetChannel", "GetSubchannel", "GetSocket"],
        {"operator"}),
    "lamina.v1.ConfigService": {
        **dict.fromkeys(["GetServerInfo", "GetStack", "ListStacks", "PlanMemory"], SOME),
        **dict.fromkeys(["CreateStack", "UpdateStack", "DeleteStack", "SaveCheckpoint", "LoadCheckpoint", "SetParameters"],
                        {"operator"}),
        **dict.fromkeys(["GetParameters", "StreamParameters", "GetGradients"], WORKER)},
    "lamina.v1.SessionService": dict.fromkeys(
        ["CreateSession", "KeepAlive", "DeleteSession", "CreateRegion", "ListRegions", "ReleaseRegion"], WORKER),
    "lamina.v1.LayerService": dict.fromkeys(
        ["Forward", "Backward", "ApplyGradients", "ZeroGradients", "ReleaseContext", "Execute"], {"trainer"}),
}


def bearer(token):
    return [("authorization", f"Bearer {token}")]


@contextlib.contextmanager
def channel(target, ca=None, pair=None):
    """A channel; with TLS where there is a CA, and with a certificate where there is a pair of files."""
    if ca is None:
        made = grpc.insecure_channel(target)
    else:
        certificate, key = (path.read_bytes() for path in pair) if pair else (None, None)
        made = grpc.secure_channel(target, grpc.ssl_channel_credentials(ca.path.read_bytes(), key, certificate))
    with made:
        yield made


def info(to, metadata=(), timeout=20):
    return config_service_pb2_grpc.ConfigServiceStub(to).GetServerInfo(
        cpb.GetServerInfoRequest(), metadata=metadata, timeout=timeout)


def code_of(call):
    """The status code of the call, or OK."""
    try:
        call()
        return grpc.StatusCode.OK
    except grpc.RpcError as error:
        return error.code()


def outcome(to, service, method, metadata):
    """(code, message) of an RPC with an empty request; OK for a stream that gives a message."""
    # All that are streams on either side are called as streams on both: on the wire there is no difference.
    stream = method in ("Watch", "ServerReflectionInfo", "StreamParameters", "KeepAlive", "Execute")
    call = to.stream_stream(f"/{service}/{method}") if stream else to.unary_unary(f"/{service}/{method}")
    try:
        if stream:
            answers = call(iter([b""]), metadata=metadata, timeout=20)
            next(answers)
            answers.cancel()
        else:
            call(b"", metadata=metadata, timeout=20)
        return grpc.StatusCode.OK, ""
    except StopIteration:
        return grpc.StatusCode.OK, ""
    except grpc.RpcError as error:
        return error.code(), error.details()


@pytest.fixture(scope="module")
def roles(tmp_path_factory):
    """A daemon with a token a role, over plain loopback: who may do what has nothing to do with how it is encrypted."""
    folder = tmp_path_factory.mktemp("roles")
    tokens = replace(folder / "tokens", "".join(f"{role} {role}-0123456789abcdef\n" for role in sorted(SOME)) +
                     "nobody nobody-0123456789abcdef\n")
    rules = replace(folder / "roles", "".join(f"token:{role}  {role}\n" for role in sorted(SOME)))
    with Daemon("--tokens", tokens, "--roles", rules, "--channelz") as d:
        yield d


def test_every_rpc_has_its_roles(roles):
    with channel(roles.tcp) as to:
        wrong = []
        for service, methods in MATRIX.items():
            for method, allowed in methods.items():
                code, message = outcome(to, service, method, ())
                if (code == grpc.StatusCode.UNAUTHENTICATED) != (allowed is not None):
                    wrong.append((service, method, "without token", code))
                for role in sorted(SOME | {"nobody"}):
                    code, message = outcome(to, service, method, bearer(f"{role}-0123456789abcdef"))
                    may = allowed is None or role in allowed
                    if (code not in DENIED) != may:
                        wrong.append((service, method, role, code))
                    if not may and not (code == grpc.StatusCode.PERMISSION_DENIED and f"token:{role} may not" in message
                                        and method in message and all(needed in message for needed in allowed)):
                        wrong.append((service, method, role, message))
    assert wrong == []


def test_no_rpc_is_missing_above(roles):
    """The daemon's own word on what it serves, by reflection."""
    from google.protobuf import descriptor_pb2

    def field(number, value):
        return bytes([number << 3 | 2, len(value)]) + value

    def reflect(request):
        """The strings of the answer's bytes fields, wherever they are: enough to find names and files."""
        reflection = to.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        return next(iter(reflection(iter([request]), metadata=bearer("read-only-0123456789abcdef"), timeout=20)))

    with channel(roles.tcp) as to:
        listed = reflect(field(7, b"*"))
        assert all(service.encode() in listed for service in MATRIX), listed
        services = {name for name in listed.decode("latin1").replace("\n", " ").split() if name.count(".") > 1}
        served = {s for s in (name.strip("\x00-\x1f ") for name in services)}
        names = {m for m in map(lambda s: "".join(c for c in s if c.isalnum() or c == "."), served)}
        assert len([n for n in names if n.count(".") >= 2 and not n.startswith("grpc.reflection.v1.")]) == len(MATRIX), names
    for service in (s for s in MATRIX if s.startswith("lamina.")):
        pool = {"ConfigService": cpb, "SessionService": spb, "LayerService": lpb}[service.rpartition(".")[2]].DESCRIPTOR
        described = descriptor_pb2.FileDescriptorProto()
        pool.CopyToProto(described)
        assert {m.name for s in described.service for m in s.method} == set(MATRIX[service])


@pytest.mark.parametrize("metadata, words", [
    ([], "must know who calls"), (bearer(ALICE), "no longer, one that this daemon knows"),
    ([("authorization", "trainer-0123456789abcdef")], '"Bearer TOKEN"'),
    ([("authorization", "Basic dHJhaW5lcjo=")], '"Bearer TOKEN"'), ([("authorization", "Bearer ")], "authorization"),
    (2 * bearer("trainer-0123456789abcdef"), "once"), (bearer("trainer-0123456789abcde"), "one that this daemon knows"),
    (bearer("trainer-0123456789abcdef0"), "one that this daemon knows"),
    (bearer("x" * 6000), "one that this daemon knows")])
def test_credentials_that_are_none(roles, metadata, words):
    with channel(roles.tcp) as to, refused("UNAUTHENTICATED", words) as caught:
        info(to, metadata)
    assert "0123456789" not in caught.value.details()


def test_denied_calls_are_counted_and_unknown_methods_are_said_to_be_so(roles):
    def counted(code):
        return sum(value for name, value in roles.metrics().items()
                   if name.startswith("grpc_server_handled_total{") and 'grpc_method="DeleteStack"' in name
                   and f'grpc_code="{code}"' in name)

    before = counted("PERMISSION_DENIED"), counted("UNAUTHENTICATED")
    with channel(roles.tcp) as to:
        for metadata in ([], bearer("trainer-0123456789abcdef")):
            with refused("PERMISSION_DENIED" if metadata else "UNAUTHENTICATED"):
                config_service_pb2_grpc.ConfigServiceStub(to).DeleteStack(
                    cpb.DeleteStackRequest(name="s"), metadata=metadata)
        assert outcome(to, "lamina.v1.ConfigService", "NoSuch", bearer("trainer-0123456789abcdef"))[0] == (
            grpc.StatusCode.UNIMPLEMENTED)
        assert outcome(to, "lamina.v1.ConfigService", "NoSuch", ())[0] == grpc.StatusCode.UNAUTHENTICATED
    assert (counted("PERMISSION_DENIED"), counted("UNAUTHENTICATED")) == (before[0] + 1, before[1] + 1)
    assert not any("NoSuch" in name for name in roles.metrics())
    assert "0123456789abcdef" not in roles.log()


def test_a_token_is_taken_back_and_a_bad_file_changes_nothing(tmp_path):
    tokens = replace(tmp_path / "tokens", f"# who trains\nalice {ALICE}\nbob {BOB}\n")
    rules = replace(tmp_path / "roles", "token:* trainer\ntoken:alice operator\n")
    with Daemon("--tokens", tokens, "--roles", rules) as d, channel(d.tcp) as to:
        sessions = session_service_pb2_grpc.SessionServiceStub(to)

        def open_session(token):
            """(the session's id, its stream)"""
            opened = sessions.CreateSession(spb.CreateSessionRequest(resume_grace_seconds=5), metadata=bearer(token))
            first = spb.KeepAliveRequest(session_id=opened.session_id)
            waiting = iter(lambda: time.sleep(60) or first, None)
            stream = sessions.KeepAlive((m for part in ([first], waiting) for m in part), metadata=bearer(token))
            next(stream)
            return opened.session_id, stream

        of_alice, of_bob = open_session(ALICE), open_session(BOB)
        assert code_of(lambda: info(to, bearer(CAROL))) == grpc.StatusCode.UNAUTHENTICATED
        # A mistake in the file: all stays, and the log says where it is, but not what stands there.
        replace(tokens, f"alice {ALICE}\nbob {BOB} extra\n")
        wait_until(lambda: "event=access_kept" in d.log())
        assert f"--tokens {tokens}:2: has 3 words" in d.log()
        assert code_of(lambda: info(to, bearer(ALICE))) == code_of(lambda: info(to, bearer(BOB))) == grpc.StatusCode.OK
        # Bob goes, Carol comes.
        replace(tokens, f"alice {ALICE}\ncarol {CAROL}\n")
        wait_until(lambda: code_of(lambda: info(to, bearer(BOB))) == grpc.StatusCode.UNAUTHENTICATED)
        assert code_of(lambda: info(to, bearer(CAROL))) == code_of(lambda: info(to, bearer(ALICE))) == grpc.StatusCode.OK
        with refused("UNAUTHENTICATED", "no longer"):
            next(of_bob[1])  # the open stream has ended, too
        assert of_alice[1].is_active()
        # Another file says what they may do.
        replace(rules, "token:alice read-only\n")
        wait_until(lambda: not of_alice[1].is_active())
        with refused("PERMISSION_DENIED", "its roles are read-only"):
            next(of_alice[1])
        with refused("PERMISSION_DENIED", "its roles are none"):
            info(to, bearer(CAROL))
        # A new token of the same name has the sessions of the old one.
        replace(rules, "token:* trainer\n")
        replace(tokens, f"alice {CAROL}\n")
        wait_until(lambda: code_of(lambda: info(to, bearer(ALICE))) == grpc.StatusCode.UNAUTHENTICATED)
        wait_until(lambda: code_of(lambda: sessions.ListRegions(
            spb.ListRegionsRequest(session_id=of_alice[0]), metadata=bearer(CAROL))) == grpc.StatusCode.OK)
        assert not any(secret in d.log() for secret in (ALICE, BOB, CAROL))


def test_a_session_is_its_makers(tmp_path):
    tokens = replace(tmp_path / "tokens", f"alice {ALICE}\nbob {BOB}\n")
    with Daemon("--tokens", tokens) as d, channel(d.tcp) as tcp, channel(d.target) as local:
        sessions = {to: session_service_pb2_grpc.SessionServiceStub(to) for to in (tcp, local)}
        layers = {to: layer_service_pb2_grpc.LayerServiceStub(to) for to in (tcp, local)}
        configs = {to: config_service_pb2_grpc.ConfigServiceStub(to) for to in (tcp, local)}
        configs[tcp].CreateStack(
            cpb.CreateStackRequest(name="s", config=cpb.StackConfig(
                batch_size=1, max_seq_length=4, hidden_size=8, heads=2, num_hidden_layers=1)), metadata=bearer(ALICE))
        opened = sessions[tcp].CreateSession(spb.CreateSessionRequest(resume_grace_seconds=5), metadata=bearer(ALICE))
        one, mutation = opened.session_id, tpb.Mutation(session_id=opened.session_id, sequence=1)
        region = sessions[tcp].CreateRegion(
            spb.CreateRegionRequest(session_id=one, size_bytes=4096), metadata=bearer(ALICE)).region
        x = tpb.Tensor(dtype=tpb.DATA_TYPE_FLOAT32, shape=(1, 4, 8), inline_data=bytes(128))
        calls = {
            "KeepAlive": lambda to, m: next(sessions[to].KeepAlive(iter([spb.KeepAliveRequest(session_id=one)]), metadata=m)),
            "DeleteSession": lambda to, m: sessions[to].DeleteSession(spb.DeleteSessionRequest(session_id=one), metadata=m),
            "CreateRegion": lambda to, m: sessions[to].CreateRegion(
                spb.CreateRegionRequest(session_id=one, size_bytes=1), metadata=m),
            "ListRegions": lambda to, m: sessions[to].ListRegions(spb.ListRegionsRequest(session_id=one), metadata=m),
            "ReleaseRegion": lambda to, m: sessions[to].ReleaseRegion(
                spb.ReleaseRegionRequest(session_id=one, region_id=region.region_id), metadata=m),
            "Forward": lambda to, m: layers[to].Forward(
                lpb.ForwardRequest(stack="s", session_id=one, training=False, input=x), metadata=m),
            "training Forward": lambda to, m: layers[to].Forward(
                lpb.ForwardRequest(stack="s", session_id=one, training=True, input=x, mutation=mutation), metadata=m),
            "ZeroGradients": lambda to, m: layers[to].ZeroGradients(
                lpb.ZeroGradientsRequest(stack="s", mutation=mutation), metadata=m),
            "ReleaseContext": lambda to, m: layers[to].ReleaseContext(
                lpb.ReleaseContextRequest(stack="s", session_id=one, context_id="0" * 32), metadata=m),
            "SetParameters": lambda to, m: configs[to].SetParameters(
                cpb.SetParametersRequest(stack="s", mutation=mutation), metadata=m),
            "GetParameters": lambda to, m: configs[to].GetParameters(cpb.GetParametersRequest(
                stack="s", session_id=one, target=tpb.TensorTarget(slice=tpb.Slice(
                    region_id=region.region_id, offset_bytes=0, size_bytes=4096))), metadata=m),
        }
        for name, call in calls.items():
            for to, metadata in ((tcp, bearer(BOB)), (local, ())):
                with refused("NOT_FOUND", "session_id: no such session"):
                    call(to, metadata)
                    pytest.fail(f"{name} works")
        # Within a stream, too; and all of it was as if it never were.
        streamed = lpb.ExecuteRequest(id=1, zero_gradients=lpb.ZeroGradientsRequest(stack="s", mutation=mutation))
        answer = next(layers[tcp].Execute(iter([streamed]), metadata=bearer(BOB)))
        assert answer.code == grpc.StatusCode.NOT_FOUND.value[0], answer
        assert next(layers[tcp].Execute(iter([streamed]), metadata=bearer(ALICE))).code == 0
        assert len(calls["ListRegions"](tcp, bearer(ALICE)).regions) == 1
        assert calls["Forward"](tcp, bearer(ALICE)).output.inline_data


def test_the_metrics_port_may_need_a_token(tmp_path):
    tokens = replace(tmp_path / "tokens", f"alice {ALICE}\nbob {BOB}\n")
    rules = replace(tmp_path / "roles", "token:alice read-only\n")
    with Daemon("--tokens", tokens, "--roles", rules, "--metrics-token") as d:
        def code(path, token=None):
            request = urllib.request.Request(f"http://{d.metrics_address}{path}")
            if token is not None:
                request.add_header("Authorization", f"Bearer {token}")
            try:
                return urllib.request.urlopen(request, timeout=20).status
            except urllib.error.HTTPError as error:
                return error.code

        for path in ("/metrics", "/statusz", "/configz", "/"):
            assert [code(path), code(path, CAROL), code(path, BOB), code(path, ALICE)] == [401, 401, 401, 200], path
        assert [code(path) for path in ("/healthz", "/readyz")] == [200, 200]
        token = replace(tmp_path / "token", ALICE)
        assert cli("status", "--target", d.target, "--token-file", token).returncode == 0
        assert "401" in cli("status", "--target", d.target).stderr


# --- TLS ---


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


def tls_flags(pair, *more):
    return ["--tls-cert", pair[0], "--tls-key", pair[1], *more]


@pytest.fixture(scope="module")
def mutual(authority):
    """A daemon that wants certificates: of trainers by their URI, of operators by their DNS name, of guests by theirs."""
    rules = replace(authority.folder / "roles", "uri:spiffe://lamina/ns/ml/sa/* trainer  # pods\n"
                                                "dns:*.ops.example operator,read-only\ncn:guest read-only\n")
    pair = authority.issue_for_daemon("mutual")
    with Daemon(*tls_flags(pair, "--tls-client-ca", authority.path, "--roles", rules)) as d:
        yield d


def test_certificates_have_roles(mutual, authority):
    trainer = authority.issue("trainer", common_name="guest-x", uris=["spiffe://lamina/ns/ml/sa/train"])
    operator = authority.issue("operator", dns=["a.ops.example"])
    guest = authority.issue("guest", common_name="guest")
    stranger = authority.issue("stranger", common_name="other", uris=["spiffe://lamina/ns/web/sa/train"], dns=["ops.example"])
    nameless = authority.issue("nameless")
    cases = {trainer: {"trainer"}, operator: {"operator", "read-only"}, guest: {"read-only"}, stranger: set()}
    for pair, has in cases.items():
        with channel(mutual.tcp, authority, pair) as to:
            assert outcome(to, "grpc.health.v1.Health", "Check", ())[0] == grpc.StatusCode.OK
            for method, needed in (("GetServerInfo", SOME), ("DeleteStack", {"operator"})):
                code = outcome(to, "lamina.v1.ConfigService", method, ())[0]
                assert (code not in DENIED) == bool(has & needed), (pair, method, code)
            assert (outcome(to, "lamina.v1.LayerService", "ZeroGradients", ())[0] not in DENIED) == ("trainer" in has)
    with channel(mutual.tcp, authority, stranger) as to, refused(
            "PERMISSION_DENIED", "cert:uri:spiffe://lamina/ns/web/sa/train may not call", "its roles are none"):
        info(to)
    with channel(mutual.tcp, authority, nameless) as to, refused("UNAUTHENTICATED", "has no name"):
        info(to)
    with channel(mutual.target) as local:  # there, users count
        assert info(local).version


def test_connections_that_are_not_to_be(mutual, authority, tmp_path):
    def refuses(target, *security):
        with channel(target, *security) as to:
            return code_of(lambda: info(to, timeout=10)) == grpc.StatusCode.UNAVAILABLE

    other = Authority(tmp_path, "other")
    assert refuses(mutual.tcp), "no TLS"
    assert refuses(mutual.tcp, authority), "no certificate"
    assert refuses(mutual.tcp, authority, other.issue("guest", common_name="guest")), "signed by another"
    assert refuses(mutual.tcp, authority, authority.issue("late", common_name="guest", ends=-HOUR)), "expired"
    assert refuses(mutual.tcp, authority, authority.issue("early", common_name="guest", begins=HOUR)), "not yet"
    guest = authority.issue("guest2", common_name="guest")
    assert refuses(mutual.tcp, other, guest), "the daemon's certificate is signed by another than this client trusts"
    with channel(mutual.tcp, authority, guest) as to:
        assert info(to).version
    with Daemon() as plain:
        assert refuses(plain.tcp, authority, guest), "a daemon without TLS"


def test_certificates_are_reloaded(tmp_path):
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    pair = old.issue_for_daemon()
    trusted = tmp_path / "clients.crt"
    replace(trusted, old.path.read_bytes())
    of_old, of_new = old.issue("a", common_name="a"), new.issue("b", common_name="b")

    def works(ca, client):
        with channel(d.tcp, ca, client) as to:
            return code_of(lambda: info(to, timeout=10)) == grpc.StatusCode.OK

    with Daemon(*tls_flags(pair, "--tls-client-ca", trusted)) as d, channel(d.tcp, old, of_old) as before:
        assert info(before).version and not works(new, of_old) and not works(old, of_new)
        # Broken in several ways: the old ones stay.
        good = {path: path.read_bytes() for path in (*pair, trusted)}
        for number, (path, content, words) in enumerate([
                (pair[0], good[pair[0]] + good[pair[0]][:200], "certificate 2 is damaged"),
                (pair[0], new.path.read_bytes(), "is not the key of"), (trusted, b"nobody", "has no certificate")], 1):
            replace(path, content)
            wait_until(lambda: d.log().count("event=certificate_kept") == number)
            kept = [line for line in d.log().splitlines() if "event=certificate_kept" in line]
            assert words in kept[-1], kept
            assert works(old, of_old)
            replace(path, good[path])
            wait_until(lambda: d.log().count("event=certificate_loaded") == 1 + number)
        # The daemon's certificate from another authority, and clients of both.
        replace(trusted, old.path.read_bytes() + new.path.read_bytes())
        new.issue_for_daemon()
        wait_until(lambda: works(new, of_old))
        assert works(new, of_new) and not works(old, of_old)
        assert info(before).version  # a connection that was there goes on
        replace(trusted, new.path.read_bytes())
        wait_until(lambda: not works(new, of_old))
        assert works(new, of_new)


def test_a_certificate_that_runs_out_is_logged(authority):
    pair = authority.issue_for_daemon("short", ends=datetime.timedelta(seconds=3))
    with Daemon(*tls_flags(pair)) as d:
        wait_until(lambda: "level=warning event=certificate_expires_soon" in d.log())
        wait_until(lambda: "level=error event=certificate_expired" in d.log())
        with channel(d.tcp, authority) as to:
            assert code_of(lambda: info(to, timeout=10)) == grpc.StatusCode.UNAVAILABLE
        authority.issue_for_daemon("short", ends=datetime.timedelta(days=9))
        wait_until(lambda: d.log().count("event=certificate_loaded") == 2)
        with channel(d.tcp, authority) as to:
            assert info(to).version
        assert d.log().count("event=certificate_expire") == 2


def test_a_token_or_a_certificate(authority, tmp_path):
    tokens = replace(tmp_path / "tokens", f"{ALICE}\nbob {BOB}\n")
    rules = replace(tmp_path / "roles", "token:default all\ncn:a read-only\n")
    a = authority.issue("a", common_name="a")
    flags = tls_flags(authority.issue_for_daemon("either"), "--tls-client-ca", authority.path, "--tokens", tokens, "--roles",
                      rules)
    with Daemon(*flags) as d:
        with channel(d.tcp, authority) as to:
            with refused("UNAUTHENTICATED", "Bearer TOKEN", "client certificate"):
                info(to)
            assert info(to, bearer(ALICE)).version
            with refused("PERMISSION_DENIED", "token:bob", "its roles are none"):
                info(to, bearer(BOB))
        with channel(d.tcp, authority, a) as to:
            assert info(to).version
            assert outcome(to, "lamina.v1.SessionService", "CreateSession", ())[0] == grpc.StatusCode.PERMISSION_DENIED
            # Who sends a token means it.
            assert outcome(to, "lamina.v1.SessionService", "CreateSession", bearer(ALICE))[0] == grpc.StatusCode.OK
            assert outcome(to, "lamina.v1.ConfigService", "GetServerInfo", bearer(CAROL))[0] == (
                grpc.StatusCode.UNAUTHENTICATED)


# --- clients ---


@pytest.fixture(scope="module")
def secured(authority):
    """A daemon with TLS and tokens, and the environment that leads clients to it."""
    tokens = replace(authority.folder / "tokens", f"alice {ALICE}\nbob {BOB}\n")
    rules = replace(authority.folder / "roles.tokens", "token:alice all\ntoken:bob read-only\n")
    with Daemon(*tls_flags(authority.issue_for_daemon("secured"), "--tokens", tokens, "--roles", rules)) as d:
        yield d


def environment(secured, authority, token):
    file = replace(authority.folder / f"token.{token[:3]}", token + "\n")
    return {"LAMINA_TARGET": secured.tcp, "LAMINA_TLS_CA": str(authority.path), "LAMINA_TOKEN_FILE": str(file)}


def test_the_python_client(secured, authority, monkeypatch):
    for name, value in environment(secured, authority, ALICE).items():
        monkeypatch.setenv(name, value)
    with lamina.connect() as client:
        stack = client.create_stack("p", batch_size=1, max_seq_length=4, hidden_size=8, heads=2, num_hidden_layers=1)
        x = client.empty((1, 4, 8))
        x[:] = 1
        y, context = stack.forward(x, training=True)
        stack.backward(context, y)
        with client.pipeline() as pipeline:
            assert pipeline.forward(stack, x, training=False).result()[0].shape == x.shape
        assert stack.apply_gradients(lr=0.1).applied and len(stack.parameters()) == 12
        # The file's next token counts from the next call on.
        file = pathlib.Path(os.environ["LAMINA_TOKEN_FILE"])
        replace(file, BOB)
        with pytest.raises(lamina.PermissionDenied, match="token:bob may not call lamina.v1.ConfigService/DeleteStack"):
            client.delete_stack("p")
        replace(file, ALICE)
        client.delete_stack("p")
    with lamina.connect(token=CAROL) as client, pytest.raises(lamina.Unauthenticated):
        client.info()
    with lamina.connect(tls=str(authority.path), token=BOB) as client:
        assert client.info().version
    with lamina.connect(tls=False, timeout=10) as client, pytest.raises(lamina.Unavailable):
        client.info()
    with pytest.raises(ValueError, match="unencrypted"):
        monkeypatch.delenv("LAMINA_TLS_CA")
        lamina.connect("192.0.2.1:1", token=BOB)
    with pytest.raises(ValueError, match="go together"):
        lamina.Tls(certificate="x")
    with pytest.raises(ValueError, match="one token"):
        lamina.connect(secured.tcp, token_file=replace(authority.folder / "two", f"{ALICE} {BOB}"))
    with pytest.raises(OSError):
        lamina.connect(secured.tcp, tls=str(authority.folder / "missing.crt"))


def cli(*arguments, env=None):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LAMINA_")}
    return subprocess.run([CLI, *map(str, arguments)], env={**clean, **(env or {})}, capture_output=True, text=True, timeout=120)


def test_the_command_line(secured, mutual, authority):
    env = environment(secured, authority, BOB)
    assert cli("info", env=env).returncode == 0
    done = cli("stack", "delete", "s", env=env)
    assert done.returncode == 1 and "PERMISSION_DENIED: token:bob may not call" in done.stderr, done.stderr
    flags = ["--target", secured.tcp, "--tls-ca", authority.path]
    assert cli("info", *flags, "--token-file", env["LAMINA_TOKEN_FILE"]).returncode == 0
    done = cli("info", *flags)
    assert done.returncode == 1 and "UNAUTHENTICATED" in done.stderr
    assert cli("health", *flags).returncode == 0  # probes need no token
    certificate, key = authority.issue("cli", common_name="guest")
    assert cli("info", "--target", mutual.tcp, "--tls-ca", authority.path, "--client-cert", certificate, "--client-key",
               key).returncode == 0
    # What is wrong on this side.
    assert cli("info", *flags, "--client-cert", certificate).returncode == 2
    assert cli("info", *flags, "--token-file", "/nonexistent").returncode == 2
    done = cli("info", "--target", secured.tcp)
    assert done.returncode == 3 and "--tls-ca" in done.stderr, done.stderr
    done = cli("info", "--target", secured.tcp, "--tls-ca", certificate)
    assert done.returncode == 3 and "not signed by" in done.stderr, done.stderr
    done = cli("info", *flags, "--tls-server-name", "other.example")
    assert done.returncode == 3 and "--tls-server-name" in done.stderr, done.stderr
    done = cli("info", "--target", "192.0.2.1:1", "--token-file", env["LAMINA_TOKEN_FILE"])
    assert done.returncode == 2 and "unencrypted" in done.stderr, done.stderr


@pytest.mark.slow
def test_conformance_over_tls_with_a_token(secured, authority):
    done = cli("conformance", "--only", "service,sessions,handles", env=environment(secured, authority, ALICE))
    assert done.returncode == 0 and ", 0 failed" in done.stdout, done.stdout


# --- the Unix sockets ---

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be other users")
USER, STRANGER = 54321, 54322
AS_USER = f"""
import os, sys, grpc
sys.path.insert(0, {LIBRARY!r})
import lamina
os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
try:
    with lamina.connect(sys.argv[2]) as client:
        print(client.info().version, client.transport, client.session.id)
        if len(sys.argv) > 3:
            sys.stdout.flush()
            sys.stdin.read()
except lamina.LaminaError as error:
    print(error)
"""


def call_as(user, target, *more, **options):
    """A process of that user that connects; it is to have read what it needs before it becomes that user."""
    return subprocess.Popen([sys.executable, "-c", AS_USER, str(user), target, *more], stdout=subprocess.PIPE,
                            stdin=subprocess.PIPE, text=True, **options)


@as_root
def test_users_of_the_socket(tmp_path):
    rules = replace(tmp_path / "roles", f"uid:{USER} trainer\n")
    with Daemon("--allow-uid", str(USER), "--roles", rules) as d:
        os.chmod(d.folder, 0o755)
        socket = pathlib.Path(d.target.split(":", 1)[1])
        assert socket.stat().st_mode & 0o777 == 0o666
        # One that stays connected, and what others can do with its session.
        one = call_as(USER, d.target, "stay")
        words = one.stdout.readline().split()
        assert words[1] == "memfd", words
        with channel(d.target) as own, refused("NOT_FOUND", "no such session"):
            session_service_pb2_grpc.SessionServiceStub(own).ListRegions(spb.ListRegionsRequest(session_id=words[2]))
        one.communicate("", timeout=60)
        strange, _ = call_as(STRANGER, d.target).communicate(timeout=60)
        assert strange.startswith("PERMISSION_DENIED: your user may not use this socket"), strange
        with lamina.connect(d.target) as client:  # the daemon's own user has all roles
            client.create_stack("s", batch_size=1, max_seq_length=4, hidden_size=8, heads=2, num_hidden_layers=1)
        replace(rules, f"uid:{USER} read-only\n")
        wait_until(lambda: "event=access_reloaded" in d.log())
        seen, _ = call_as(USER, d.target).communicate(timeout=60)
        assert seen.startswith(f"PERMISSION_DENIED: uid:{USER} may not call"), seen


@as_root
def test_without_allow_uid_the_socket_is_closed_to_others(daemon):
    os.chmod(daemon.folder, 0o755)
    assert pathlib.Path(daemon.target.split(":", 1)[1]).stat().st_mode & 0o777 == 0o600
    seen, _ = call_as(USER, daemon.target).communicate(timeout=60)
    assert seen.startswith("UNAVAILABLE"), seen


@as_root
def test_the_broker_gives_a_users_region_to_that_user_alone():
    from lamina.regions import map_region

    with Daemon("--allow-uid", str(USER)) as d:
        os.chmod(d.folder, 0o755)
        with lamina.connect(d.target) as client:
            client.empty((4,))
            region = next(iter(client.session._regions))
            session = client.session.id
            map_region(d.broker, session, region)
            code = (f"import os, sys; sys.path.insert(0, {LIBRARY!r})\n"
                    "from lamina.regions import map_region\nimport lamina\n"
                    f"os.setuid({USER})\n"
                    "try: map_region(*sys.argv[1:]); print('mapped')\n"
                    "except lamina.LaminaError as error: print(error)")
            done = subprocess.run([sys.executable, "-c", code, d.broker, session, region], capture_output=True, text=True)
            assert "does not know the region (status 5)" in done.stdout, done


# --- what is refused at the start ---


@pytest.mark.parametrize("flags, code, words", [
    ([], 2, "--tls-cert"), (["--tls"], 2, "--tls-client-ca or --tokens"), (["--tokens"], 2, "--tls-cert"),
    (["--tls", "--tokens"], None, ""), (["--tls", "--client-ca"], None, ""), (["--insecure"], None, ""),
    (["--insecure", "--tokens"], None, "")])
def test_an_address_for_all_needs_security(authority, tmp_path, flags, code, words):
    pair = authority.issue_for_daemon("all")
    known = {"--tls": tls_flags(pair), "--tokens": ["--tokens", replace(tmp_path / "tokens", ALICE)],
             "--client-ca": ["--tls-client-ca", authority.path]}
    arguments = [part for flag in flags for part in known.get(flag, [flag])]
    command = ["--listen", "0.0.0.0:0", "--device", "cpu", *map(str, arguments)]
    if code is not None:
        done = subprocess.run([BINARY, *command], capture_output=True, text=True, timeout=60)
        assert done.returncode == code and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
        return
    with Daemon(*command[:2], *arguments) as d:
        assert "listen=unix" in d.log() and "0.0.0.0:" in d.log()
        with channel(d.tcp, authority if "--tls" in flags else None) as to:
            seen = code_of(lambda: info(to, timeout=10))
        assert seen == {"--client-ca": grpc.StatusCode.UNAVAILABLE, "--tokens": grpc.StatusCode.UNAUTHENTICATED}.get(
            flags[-1], grpc.StatusCode.OK)
