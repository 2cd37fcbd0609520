"""The way to a daemon: what it is, its stacks, plans."""

import collections
import dataclasses
import os
import threading
from typing import List

import grpc

from lamina.config import StackConfig
from lamina.errors import translated
from lamina.session import Session, call_with_retries
from lamina.stack import Stack
from lamina.v1 import (config_service_pb2, config_service_pb2_grpc, layer_service_pb2_grpc, session_service_pb2_grpc,
                       tensor_pb2)

_Stubs = collections.namedtuple("_Stubs", "config layer session")


def default_target():
    """LAMINA_TARGET, or the socket where laminad listens by default."""
    if os.environ.get("LAMINA_TARGET"):
        return os.environ["LAMINA_TARGET"]
    if os.geteuid() == 0:
        return "unix:/run/lamina/laminad.sock"
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/lamina-{os.geteuid()}"
    return f"unix:{runtime}/lamina/laminad.sock" if os.environ.get("XDG_RUNTIME_DIR") else f"unix:{runtime}/laminad.sock"


@dataclasses.dataclass(frozen=True)
class ServerInfo:
    """What a daemon is and offers. backend: "cpu" or "cuda"; sizes in bytes."""

    version: str
    backend: str
    device_name: str
    device_uuid: str
    device_ordinal: int
    device_total_bytes: int
    device_free_bytes: int
    inline_cap_bytes: int
    replay_window: int
    transports: tuple
    uptime_seconds: float
    checkpoints_enabled: bool
    build_commit: str


@dataclasses.dataclass(frozen=True)
class PlanEntry:
    """One buffer of a plan; size_bytes of all its instances together."""

    kind: str
    name: str
    size_bytes: int
    instances: int


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What a stack allocates, to the byte."""

    entries: List[PlanEntry]
    total_bytes: int
    context_bytes: int

    def bytes_of(self, kind):
        """kind: "weights", "master_weights", "gradients", "optimizer", "activations", "workspace" or "staging"."""
        return sum(e.size_bytes for e in self.entries if e.kind == kind)

    @classmethod
    def from_proto(cls, message):
        prefix = "MEMORY_KIND_"
        kind = config_service_pb2.MemoryKind.Name
        entries = [PlanEntry(kind(e.kind)[len(prefix):].lower(), e.name, e.size_bytes, e.instances)
                   for e in message.entries]
        return cls(entries, message.total_bytes, message.context_bytes)


@dataclasses.dataclass(frozen=True)
class StackInfo:
    """A stack as it was when asked."""

    name: str
    config: StackConfig
    plan: MemoryPlan
    parameter_count: int
    step: int
    skipped_steps: int
    forward_count: int
    outstanding_contexts: int

    @classmethod
    def from_proto(cls, message):
        return cls(message.name, StackConfig.from_proto(message.config), MemoryPlan.from_proto(message.plan),
                   message.parameter_count, message.step, message.skipped_steps, message.forward_count,
                   message.outstanding_contexts)


class Client:
    """A connection to one daemon. Use as a context manager, or call close().

    target: "unix:PATH" or "HOST:PORT". transport: None to share memory with the daemon where that works and send
    tensors inside messages else, "memfd" or "inline" to insist. Threads: any.
    """

    def __init__(self, target=None, transport=None, client_name="python"):
        if transport not in (None, "memfd", "inline"):
            raise ValueError(f"transport: {transport!r} must be None, 'memfd' or 'inline'")
        self.target = target or default_target()
        self._wanted_transport = transport
        self._client_name = client_name
        unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self._channel = grpc.insecure_channel(self.target, options=unlimited)
        self._stubs = _Stubs(config_service_pb2_grpc.ConfigServiceStub(self._channel),
                             layer_service_pb2_grpc.LayerServiceStub(self._channel),
                             session_service_pb2_grpc.SessionServiceStub(self._channel))
        self._session = None
        self._opening = threading.Lock()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Ends the session: its regions and contexts are freed. Arrays over regions stay readable."""
        if self._session is not None:
            self._session.close()
        self._channel.close()

    @property
    def session(self):
        """The session, opened at first use. LaminaError."""
        with self._opening:
            if self._session is None:
                self._session = Session(self._stubs, self._client_name, self._wanted_transport)
            return self._session

    @property
    def transport(self):
        """How tensors cross: "memfd" (shared memory, no copy) or "inline" (inside messages)."""
        return "inline" if self.session.pool is None else "memfd"

    def empty(self, shape, dtype="fp32"):
        """An uninitialised numpy array in memory shared with the daemon: passing it (or a contiguous part of it) costs no
        copy. Without regions, a plain array. bf16: uint16 bits."""
        return self.session.empty(shape, dtype)

    def ping(self):
        """A round trip that does nothing."""
        self._stubs.config.GetServerInfo(config_service_pb2.GetServerInfoRequest())

    def info(self):
        """ServerInfo. Unavailable where no daemon listens on the target."""
        m = call_with_retries(self._stubs.config.GetServerInfo, config_service_pb2.GetServerInfoRequest())
        values = {f.name: getattr(m, f.name) for f in dataclasses.fields(ServerInfo)}
        prefix = "TRANSPORT_"
        values["transports"] = tuple(tensor_pb2.Transport.Name(t)[len(prefix):].lower() for t in m.transports)
        return ServerInfo(**values)

    @staticmethod
    def _config(config, settings):
        if config is None:
            config = StackConfig.from_dict(settings)
        elif settings:
            raise TypeError("give a config or settings by name, not both")
        elif isinstance(config, dict):
            config = StackConfig.from_dict(config)
        return config.to_proto()

    def create_stack(self, name, config=None, **settings):
        """Makes a stack from a StackConfig, a dict, or settings by name, and returns its Stack.

        AlreadyExists, InvalidArgument (names the setting), ResourceExhausted (with the plan's numbers),
        Unimplemented.
        """
        request = config_service_pb2.CreateStackRequest(name=name, config=self._config(config, settings))
        with translated():
            message = self._stubs.config.CreateStack(request).stack
        return Stack(self, StackInfo.from_proto(message))

    def stack(self, name):
        """The Stack of that name. NotFound."""
        return Stack(self, self._stack_info(name))

    def _stack_info(self, name):
        request = config_service_pb2.GetStackRequest(name=name)
        return StackInfo.from_proto(call_with_retries(self._stubs.config.GetStack, request).stack)

    def stacks(self):
        """A StackInfo of each stack, by name."""
        request = config_service_pb2.ListStacksRequest()
        return [StackInfo.from_proto(m) for m in call_with_retries(self._stubs.config.ListStacks, request).stacks]

    def delete_stack(self, name):
        """Frees a stack, with its weights. NotFound."""
        with translated():
            self._stubs.config.DeleteStack(config_service_pb2.DeleteStackRequest(name=name))

    def plan(self, config=None, **settings):
        """The MemoryPlan of a config; allocates nothing."""
        request = config_service_pb2.PlanMemoryRequest(config=self._config(config, settings))
        return MemoryPlan.from_proto(call_with_retries(self._stubs.config.PlanMemory, request).plan)

    def load_checkpoint(self, stack, name=None):
        """Makes a new stack from a checkpoint (default: the stack's name) and returns it. NotFound, AlreadyExists, DataLoss."""
        request = config_service_pb2.LoadCheckpointRequest(stack=stack, name=name or "", create=True)
        with translated():
            return Stack(self, StackInfo.from_proto(self._stubs.config.LoadCheckpoint(request).stack))


def connect(target=None, transport=None, client_name="python"):
    """A Client of the daemon at `target` (default: LAMINA_TARGET, or the usual socket)."""
    return Client(target, transport, client_name)
