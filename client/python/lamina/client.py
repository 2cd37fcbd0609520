"""The way to a daemon: what it is, its stacks, plans."""

from __future__ import annotations

import collections
import dataclasses
import os
import threading
import weakref
from types import TracebackType
from typing import Any, Dict, List, Mapping, Optional, Tuple, Type, Union

import grpc
import numpy as np

from lamina.async_pipeline import AsyncPipeline
from lamina.config import StackConfig
from lamina.errors import translated
from lamina.lease import call_with_retries
from lamina.pipeline import Pipeline
from lamina.security import PathLike, Tls, bearing, open_channel
from lamina.session import Session, on_this_host, usual_grace
from lamina.stack import Stack
from lamina.v1 import (config_service_pb2, config_service_pb2_grpc, layer_service_pb2_grpc, session_service_pb2_grpc,
                       tensor_pb2)

_Stubs = collections.namedtuple("_Stubs", "config layer session")

_CHANNEL = [
    ("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1),
    # A new client tries a daemon that is back at once, whatever an earlier client's attempts came to.
    ("grpc.use_local_subchannel_pool", 1), ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # For gRPC this is how long one attempt may take.
    ("grpc.min_reconnect_backoff_ms", 5000),
]

# A connection over which nothing comes any more, not even an answer to a ping, is broken although nobody closed it: that
# is to be known within the lease, so that another one can resume the session.
# Newer gRPC also sends pings of its own, and holds the next one back until those are answered: for a minute, unless told.
_TCP_CHANNEL = [("grpc.keepalive_time_ms", 10000), ("grpc.keepalive_timeout_ms", 10000), ("grpc.http2.ping_timeout_ms", 10000)]


def default_target() -> str:
    """LAMINA_TARGET, or the socket where laminad listens by default."""
    if os.environ.get("LAMINA_TARGET"):
        return os.environ["LAMINA_TARGET"]
    if os.geteuid() == 0:
        return "unix:/run/lamina/laminad.sock"
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/lamina-{os.geteuid()}"
    return f"unix:{runtime}/lamina/laminad.sock" if os.environ.get("XDG_RUNTIME_DIR") else f"unix:{runtime}/laminad.sock"


@dataclasses.dataclass(frozen=True)
class ServerInfo:
    """What a daemon is and offers. backend: "cpu" or "cuda"; sizes in bytes; metrics_address: HOST:PORT of /metrics and
    /statusz, empty where there are none."""

    version: str
    backend: str
    device_name: str
    device_uuid: str
    device_ordinal: int
    device_total_bytes: int
    device_free_bytes: int
    inline_cap_bytes: int
    replay_window: int
    transports: Tuple[str, ...]
    uptime_seconds: float
    checkpoints_enabled: bool
    build_commit: str
    metrics_address: str


@dataclasses.dataclass(frozen=True)
class PlanEntry:
    """One buffer of a plan; size_bytes of all its instances together."""

    kind: str
    name: str
    size_bytes: int
    instances: int


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What a stack allocates, to the byte.

    context_bytes: of one context of all layers at full size. device_free_bytes and fits: what was free when it was
    planned and whether it fits into that; None in the plan of a stack that exists.
    """

    entries: List[PlanEntry]
    total_bytes: int
    context_bytes: int
    device_free_bytes: Optional[int] = dataclasses.field(default=None, compare=False)
    fits: Optional[bool] = dataclasses.field(default=None, compare=False)

    def bytes_of(self, kind: str) -> int:
        """kind: "weights", "master_weights", "gradients", "optimizer", "activations", "workspace", "staging" or
        "graphs"."""
        return sum(e.size_bytes for e in self.entries if e.kind == kind)

    @classmethod
    def from_proto(cls, message: config_service_pb2.MemoryPlan) -> MemoryPlan:
        prefix = "MEMORY_KIND_"
        kind = config_service_pb2.MemoryKind.Name
        entries = [PlanEntry(kind(e.kind)[len(prefix):].lower(), e.name, e.size_bytes, e.instances)
                   for e in message.entries]
        return cls(entries, message.total_bytes, message.context_bytes)


@dataclasses.dataclass(frozen=True)
class StackInfo:
    """A stack as it was when asked. loss_scale: what to multiply the next loss by."""

    name: str
    config: StackConfig
    plan: MemoryPlan
    parameter_count: int
    step: int
    skipped_steps: int
    forward_count: int
    outstanding_contexts: int
    loss_scale: float = 1.0

    @classmethod
    def from_proto(cls, message: config_service_pb2.Stack) -> StackInfo:
        return cls(message.name, StackConfig.from_proto(message.config), MemoryPlan.from_proto(message.plan),
                   message.parameter_count, message.step, message.skipped_steps, message.forward_count,
                   message.outstanding_contexts, message.loss_scale)


class Client:
    """A connection to one daemon. Use as a context manager, or call close().

    target: "unix:PATH" or "HOST:PORT"; None: default_target(). transport: None (or LAMINA_TRANSPORT) to share memory
    with the daemon where that works and send tensors inside messages else, "memfd" or "inline" to insist; "device" insists
    on sharing device memory as well, which is otherwise done when it is first used and possible. client_name:
    who this is, for people who read the daemon's log. timeout: of every call, in seconds; None: none. Nothing is sent
    before the first call. Threads: any. A process that forks is to connect in the child.

    resume_grace: how many seconds the session outlives a connection that broke (the daemon may grant less). Meanwhile it
    is connected again by itself, and calls wait and are repeated, each run once; when the time is over the session has
    ended. 0: it ends with its connection. None: 10 over TCP, 0 over a Unix socket, which breaks with its process alone.

    tls, token, token_file: of TCP targets; over a Unix socket the daemon knows its callers by their users. tls: the file of
    the authorities that may have signed the daemon's certificate, or a Tls; True: those that gRPC trusts; False: no TLS, and
    a token is sent unencrypted also to other hosts; None: what LAMINA_TLS_CA and the like say (Tls.from_environment).
    token: a bearer token; token_file: a file that holds one, read again when it changes; neither: LAMINA_TOKEN_FILE.
    Unauthenticated comes from calls whose caller the daemon does not know, PermissionDenied from those that its role does
    not allow.

    >>> with connect() as client:
    ...     stack = client.create_stack("client-example", batch_size=4, max_seq_length=16, hidden_size=32, heads=4,
    ...                                 num_hidden_layers=2)
    ...     x = client.empty((4, 16, 32))          # passed without a copy
    ...     x[:] = 0.5
    ...     y, _ = stack.forward(x, training=False)
    ...     client.delete_stack("client-example")
    >>> y.shape, y.dtype
    ((4, 16, 32), dtype('float32'))
    """

    def __init__(self, target: Optional[str] = None, transport: Optional[str] = None, client_name: str = "python",
                 timeout: Optional[float] = None, resume_grace: Optional[float] = None,
                 tls: Union[Tls, PathLike, bool, None] = None, token: Optional[str] = None,
                 token_file: Optional[PathLike] = None) -> None:
        transport = transport or os.environ.get("LAMINA_TRANSPORT") or None
        if transport not in (None, "device", "memfd", "inline"):
            raise ValueError(f"transport: {transport!r} must be None, 'device', 'memfd' or 'inline'")
        if resume_grace is not None and not resume_grace >= 0:
            raise ValueError(f"resume_grace: {resume_grace!r} must be at least 0")
        self.target = target or default_target()
        self.timeout = timeout
        self._wanted_transport = transport
        self._client_name = client_name
        self._resume_grace = usual_grace(self.target) if resume_grace is None else float(resume_grace)
        options = _CHANNEL if on_this_host(self.target) else _CHANNEL + _TCP_CHANNEL
        self._channel, bearer = open_channel(self.target, on_this_host(self.target), options, tls, token, token_file)
        self._stubs = _Stubs(bearing(config_service_pb2_grpc.ConfigServiceStub(self._channel), bearer),
                             bearing(layer_service_pb2_grpc.LayerServiceStub(self._channel), bearer),
                             bearing(session_service_pb2_grpc.SessionServiceStub(self._channel), bearer))
        self._session: Optional[Session] = None
        self._opening = threading.Lock()
        self._closed = False

    def __repr__(self) -> str:
        return f"<lamina.Client of {self.target}{', closed' if self._closed else ''}>"

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException],
                 trace: Optional[TracebackType]) -> None:
        self.close()

    def close(self) -> None:
        """Ends the session: its regions and contexts are freed. Arrays over regions stay readable. Idempotent."""
        with self._opening:
            self._closed = True
            if self._session is not None:
                self._session.close()
        self._channel.close()

    @property
    def session(self) -> Session:
        """The session, opened at first use. Unavailable: no daemon, or one that drains. ResourceExhausted: the daemon's
        cap on sessions."""
        if self._session is not None and not self._closed:
            return self._session
        with self._opening:
            if self._closed:
                raise ValueError("this client was closed")
            if self._session is None:
                self._session = Session(self._stubs, self._client_name, self._wanted_transport, self.timeout,
                                        self._resume_grace)
                # A client that is dropped without close() ends its session as well.
                weakref.finalize(self, self._session.abandon)
            return self._session

    @property
    def transport(self) -> str:
        """How tensors in host memory cross: "memfd" (shared memory, no copy) or "inline" (inside messages)."""
        return "inline" if self.session.pool is None else "memfd"

    @property
    def shares_device(self) -> bool:
        """Whether tensors in device memory cross without a copy through the host: client and daemon see the same device,
        and the daemon offers regions there. why_no_device says what is in the way."""
        return self.session.device_pool() is not None

    @property
    def why_no_device(self) -> Optional[str]:
        """Why shares_device is False, in words; None where it is True."""
        return None if self.session.device_pool() is not None else self.session.no_device

    def empty(self, shape: Any, dtype: Any = "fp32", device: bool = False) -> Any:
        """An uninitialised numpy array in memory shared with the daemon: passing it (or a contiguous part of it) costs no
        copy. Without shared memory, a plain array. bf16: uint16 bits. The memory is used again once no array over it is
        referenced. ResourceExhausted: the session's cap on regions.

        device: a DeviceArray in device memory that the daemon maps too (see lamina.device); torch.from_dlpack makes a
        tensor of it. Unavailable: no device regions, and why."""
        return self.session.empty_on_device(shape, dtype) if device else self.session.empty(shape, dtype)

    def trim(self) -> int:
        """Gives shared memory that no array uses back to the daemon; returns the bytes. It happens by itself where the
        session's cap is reached."""
        return self.session.trim()

    def pipeline(self, timeout: Optional[float] = None, depth: int = 32) -> Pipeline:
        """A Pipeline: calls that are under way together, without waiting for each other's answers; see lamina.pipeline.

        timeout: of the whole pipeline, in seconds; None: none. depth: how many calls at most are under way, 1..63.
        Unavailable: no daemon. Unimplemented comes from the calls where the daemon is too old.
        """
        return Pipeline(self, timeout, depth)

    def apipeline(self, timeout: Optional[float] = None, depth: int = 32) -> AsyncPipeline:
        """The same for coroutines, `async with client.apipeline() as p`; see lamina.async_pipeline."""
        return AsyncPipeline(self, timeout, depth)

    def ping(self) -> None:
        """A round trip that does nothing. Unavailable."""
        with translated():
            self._stubs.config.GetServerInfo(config_service_pb2.GetServerInfoRequest(), timeout=self.timeout)

    def _read(self, call: Any, request: Any) -> Any:
        if self._closed:
            raise ValueError("this client was closed")
        return call_with_retries(call, request, self.timeout, self._session.lease if self._session else None)

    def _change(self, call: Any, request: Any) -> Any:
        """A call without a sequence that must not be repeated."""
        if self._closed:
            raise ValueError("this client was closed")
        with translated():
            return call(request, timeout=self.timeout)

    def info(self) -> ServerInfo:
        """ServerInfo. Unavailable where no daemon listens on the target."""
        m = self._read(self._stubs.config.GetServerInfo, config_service_pb2.GetServerInfoRequest())
        values: Dict[str, Any] = {f.name: getattr(m, f.name) for f in dataclasses.fields(ServerInfo)}
        prefix = "TRANSPORT_"
        values["transports"] = tuple(tensor_pb2.Transport.Name(t)[len(prefix):].lower() for t in m.transports)
        return ServerInfo(**values)

    @staticmethod
    def _config(config: Union[StackConfig, Mapping[str, Any], None],
                settings: Mapping[str, Any]) -> config_service_pb2.StackConfig:
        if config is None:
            config = StackConfig.from_dict(settings)
        elif settings:
            raise TypeError("give a config or settings by name, not both")
        elif not isinstance(config, StackConfig):
            config = StackConfig.from_dict(config)
        return config.to_proto()

    def create_stack(self, name: str, config: Union[StackConfig, Mapping[str, Any], None] = None,
                     **settings: Any) -> Stack:
        """Makes a stack from a StackConfig, a dict, or settings by name, draws its weights, and returns it.

        It lives in the daemon until delete_stack, also when this client is gone. AlreadyExists, InvalidArgument (names
        the setting), ResourceExhausted (with the plan's numbers).
        """
        request = config_service_pb2.CreateStackRequest(name=name, config=self._config(config, settings))
        return Stack(self, StackInfo.from_proto(self._change(self._stubs.config.CreateStack, request).stack))

    def stack(self, name: str) -> Stack:
        """The Stack of that name. NotFound."""
        return Stack(self, self._stack_info(name))

    def _stack_info(self, name: str) -> StackInfo:
        request = config_service_pb2.GetStackRequest(name=name)
        return StackInfo.from_proto(self._read(self._stubs.config.GetStack, request).stack)

    def stacks(self) -> List[StackInfo]:
        """A StackInfo of each stack, by name."""
        answer = self._read(self._stubs.config.ListStacks, config_service_pb2.ListStacksRequest())
        return [StackInfo.from_proto(m) for m in answer.stacks]

    def delete_stack(self, name: str) -> None:
        """Frees a stack, with its weights and contexts. NotFound."""
        self._change(self._stubs.config.DeleteStack, config_service_pb2.DeleteStackRequest(name=name))

    def plan(self, config: Union[StackConfig, Mapping[str, Any], None] = None, **settings: Any) -> MemoryPlan:
        """The MemoryPlan of a config; allocates nothing. InvalidArgument: as create_stack."""
        request = config_service_pb2.PlanMemoryRequest(config=self._config(config, settings))
        answer = self._read(self._stubs.config.PlanMemory, request)
        return dataclasses.replace(MemoryPlan.from_proto(answer.plan), device_free_bytes=answer.device_free_bytes,
                                   fits=answer.fits)

    def load_checkpoint(self, stack: str, name: Optional[str] = None) -> Stack:
        """Makes a new stack from a checkpoint (default: the stack's name) and returns it. NotFound, AlreadyExists,
        DataLoss, ResourceExhausted, FailedPrecondition (the daemon has no checkpoint folder)."""
        request = config_service_pb2.LoadCheckpointRequest(stack=stack, name=name or "", create=True)
        return Stack(self, StackInfo.from_proto(self._change(self._stubs.config.LoadCheckpoint, request).stack))


def connect(target: Optional[str] = None, transport: Optional[str] = None, client_name: str = "python",
            timeout: Optional[float] = None, resume_grace: Optional[float] = None,
            tls: Union[Tls, PathLike, bool, None] = None, token: Optional[str] = None,
            token_file: Optional[PathLike] = None) -> Client:
    """A Client of the daemon at `target` (default: LAMINA_TARGET, or the usual socket); see Client.

    >>> with connect() as client:
    ...     backend = client.info().backend
    >>> backend in ("cpu", "cuda")
    True
    """
    return Client(target, transport, client_name, timeout, resume_grace, tls, token, token_file)
