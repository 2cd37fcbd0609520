"""How a client over TCP knows its daemon, and how the daemon knows the client: TLS, certificates, tokens."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Callable, List, Optional, Sequence, Tuple, Union

import grpc

PathLike = Union[str, "os.PathLike[str]"]


@dataclasses.dataclass(frozen=True)
class Tls:
    """Files in PEM, read when the client is made. Each may be left out.

    ca: who may have signed the daemon's certificate; None: the authorities that gRPC trusts. certificate, key: the
    client's own, with its chain, and its private key; both or none. server_name: what the daemon's certificate must say
    where it is not the target's host.
    """

    ca: Optional[PathLike] = None
    certificate: Optional[PathLike] = None
    key: Optional[PathLike] = None
    server_name: Optional[str] = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("tls: certificate and key go together")

    @classmethod
    def from_environment(cls) -> Optional[Tls]:
        """Of LAMINA_TLS_CA, LAMINA_CLIENT_CERT, LAMINA_CLIENT_KEY and LAMINA_TLS_SERVER_NAME, or of LAMINA_TLS=1 alone; None
        where none of them is set."""
        names = ("LAMINA_TLS_CA", "LAMINA_CLIENT_CERT", "LAMINA_CLIENT_KEY", "LAMINA_TLS_SERVER_NAME")
        values = [os.environ.get(name) or None for name in names]
        wanted = any(values) or os.environ.get("LAMINA_TLS", "0") not in ("", "0")
        return cls(*values) if wanted else None

    def credentials(self) -> grpc.ChannelCredentials:
        """What gRPC takes. OSError: a file."""
        return grpc.ssl_channel_credentials(*(None if path is None else _pem(name, path) for name, path in (
            ("ca", self.ca), ("key", self.key), ("certificate", self.certificate))))


def _pem(name: str, path: PathLike) -> bytes:
    with open(path, "rb") as file:
        content = file.read()
    if b"-----BEGIN " not in content:
        raise ValueError(f"tls: {name} {os.fspath(path)} is not PEM")
    return content


class _TokenFile:
    """The token in a file, as it is now."""

    def __init__(self, path: PathLike) -> None:
        self._path = os.fspath(path)
        self._seen = self._stamp()
        self._token = self._read()

    def _stamp(self) -> Tuple[int, int, int]:
        found = os.stat(self._path)
        return found.st_mtime_ns, found.st_ino, found.st_size

    def _read(self) -> str:
        with open(self._path, encoding="ascii", errors="replace") as file:
            words = file.read().split()
        if len(words) != 1:
            raise ValueError(f"token_file: {self._path} must hold one token and nothing else")
        return words[0]

    def __call__(self) -> str:
        try:
            stamp = self._stamp()
            if stamp != self._seen:
                self._token, self._seen = self._read(), stamp
        except (OSError, ValueError):
            pass  # it is being written
        return self._token


class _Bearing:
    """A method of a stub whose every call shows the token. gRPC's own call credentials refuse to without encryption, which
    to this host is no risk; and their plugins change threads for each call."""

    def __init__(self, method: Any, token: Callable[[], str]) -> None:
        self._method = method
        self._token = token

    def _metadata(self) -> Sequence[Tuple[str, str]]:
        return (("authorization", f"Bearer {self._token()}"),)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._method(*arguments, metadata=self._metadata(), **options)

    def future(self, *arguments: Any, **options: Any) -> Any:
        return self._method.future(*arguments, metadata=self._metadata(), **options)


def bearing(stub: Any, token: Optional[Callable[[], str]]) -> Any:
    """The stub, with the token on every call of it."""
    if token is not None:
        for name, method in list(vars(stub).items()):
            setattr(stub, name, _Bearing(method, token))
    return stub


def open_channel(target: str, on_this_host: bool, options: List[Tuple[str, Any]], tls: Union[Tls, PathLike, bool, None],
                 token: Optional[str], token_file: Optional[PathLike]) -> Tuple[grpc.Channel, Optional[Callable[[], str]]]:
    """A channel, and what gives the token that its calls are to show (None: none). The arguments are Client's."""
    if on_this_host:  # there the daemon knows callers by their users
        return grpc.insecure_channel(target, options=options), None
    explicit = tls is False
    if tls is None:
        tls = Tls.from_environment()
    elif tls is True:
        tls = Tls()
    elif tls is False:
        tls = None
    elif not isinstance(tls, Tls):
        tls = Tls(ca=tls)
    if token is not None and token_file is not None:
        raise ValueError("token and token_file: give one of them")
    if token is None and token_file is None:
        token_file = os.environ.get("LAMINA_TOKEN_FILE") or None
    bearer: Optional[Callable[[], str]] = None
    if token is not None:
        fixed = token
        bearer = lambda: fixed  # noqa: E731
    elif token_file is not None:
        bearer = _TokenFile(token_file)
    if tls is None:
        if bearer is not None and not explicit and not _is_loopback(target):
            raise ValueError(f"the token would cross the network to {target} unencrypted: give tls, or tls=False if that is meant")
        return grpc.insecure_channel(target, options=options), bearer
    if tls.server_name:
        options = [*options, ("grpc.ssl_target_name_override", tls.server_name)]
    return grpc.secure_channel(target, tls.credentials(), options=options), bearer


def _is_loopback(target: str) -> bool:
    host = target.rpartition(":")[0]
    return host in ("localhost", "[::1]") or (host.startswith("127.") and host.replace(".", "").isdigit())
