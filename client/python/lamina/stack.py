"""One stack: steps, parameters, checkpoints."""

from __future__ import annotations

import dataclasses
import math
import weakref
from typing import (TYPE_CHECKING, Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple,
                    Union)

import numpy as np

from lamina import device, dtypes
from lamina.cuda import LEGACY_STREAM
from lamina.errors import InvalidArgument, NotFound, translated
from lamina.session import Session
from lamina.v1 import config_service_pb2 as config_pb
from lamina.v1 import layer_service_pb2 as pb
from lamina.v1 import tensor_pb2

if TYPE_CHECKING:
    from lamina.client import Client, StackInfo

# Most bytes of one SetParameters through regions: what a transfer of any size needs of shared memory.
_SET_BYTES = 256 << 20

# Which rows of which stored parameter a part is: first third, second, third of the fused ones.
_PARTS = {"attn_qw": "attn_qkvw", "attn_kw": "attn_qkvw", "attn_vw": "attn_qkvw",
          "attn_qb": "attn_qkvb", "attn_kb": "attn_qkvb", "attn_vb": "attn_qkvb"}

_OPTIMIZERS = {"adamw": pb.OPTIMIZER_KIND_ADAMW, "lamb": pb.OPTIMIZER_KIND_LAMB}
_TRANSPORTS = {tensor_pb2.TRANSPORT_DEVICE: "device", tensor_pb2.TRANSPORT_MEMFD: "memfd",
               tensor_pb2.TRANSPORT_INLINE: "inline"}
_ATTENTION_PATHS = {pb.ATTENTION_PATH_FUSED: "fused", pb.ATTENTION_PATH_PLAIN: "plain"}


@dataclasses.dataclass(frozen=True)
class StepTiming:
    """Where a call's time went, in seconds: waiting for the device, moving inputs to it (0 where its kernels read the
    region), running the layers, moving results back."""

    queue_seconds: float
    input_seconds: float
    compute_seconds: float
    output_seconds: float

    @classmethod
    def from_proto(cls, m: pb.StepTiming) -> StepTiming:
        return cls(m.queue_seconds, m.input_seconds, m.compute_seconds, m.output_seconds)


@dataclasses.dataclass(frozen=True)
class Applied:
    """An optimizer step's outcome. applied False: a gradient was not finite and nothing was changed. grad_norm: of the
    unscaled gradients before clipping. step: how many the stack has applied. loss_scale: what the gradients were divided
    by; next_loss_scale: what to multiply the next loss by."""

    applied: bool
    grad_norm: float
    step: int
    loss_scale: float = 1.0
    next_loss_scale: float = 1.0


class _HostWay:
    """How a call's tensors in host memory cross: in a region, or in messages."""

    stream: Optional[int] = None

    def __init__(self, session: Session, value: Any, dtype: str, out: Optional[np.ndarray]) -> None:
        self._session, self._dtype, self._out = session, dtype, out
        self._given = np.asarray(value)
        self._values = dtypes.as_stack_type(self._given, dtype)
        self.shape: Tuple[int, ...] = self._values.shape

    def put(self, message: tensor_pb2.Tensor) -> np.ndarray:
        """Fills the input's message; what is to be kept alive."""
        return self._session.tensor(self._values, self._dtype, message)

    def target(self, message: tensor_pb2.TensorTarget) -> Optional[np.ndarray]:
        """Fills the result's; the array that it will land in, None: inline."""
        return self._session.target(self.shape, self._dtype, self._out, message)

    def mark_ready(self, request: Any) -> None:
        """Has the call wait for what the caller has enqueued."""

    def shown(self, array: np.ndarray) -> np.ndarray:
        """A result as the caller's kind of array."""
        return _typed_like(self._given, array)

    def result(self, message: tensor_pb2.Tensor, array: Optional[np.ndarray]) -> np.ndarray:
        """What an answer gives."""
        return self.shown(self._session.result(message, array, self._out))


class _DeviceWay:
    """The same in device memory."""

    def __init__(self, session: Session, given: device.Given, dtype: str, out: Optional[Any]) -> None:
        self._session, self._given, self._dtype, self._out = session, given, dtype, out
        self.shape = given.shape
        self.stream: Optional[int] = given.stream

    def put(self, message: tensor_pb2.Tensor) -> Any:
        return self._session.device_tensor(self._given, self._dtype, message)

    def target(self, message: tensor_pb2.TensorTarget) -> Any:
        out = None if self._out is None else device.given("out", self._out, self._given.stream)
        if self._out is not None and out is None:
            raise ValueError("out: is in host memory, the input is in the device's")
        return self._session.device_target(self.shape, self._dtype, out, message)

    def mark_ready(self, request: Any) -> None:
        self._session.mark_ready(self._given.stream, request.ready)

    def shown(self, array: Any) -> Any:
        return self._out if self._out is not None else self._given.like(array)

    def result(self, message: tensor_pb2.Tensor, array: Any) -> Any:
        return self.shown(array)


class Context:
    """What a training forward saved for its backward. Dropped without one, it is released in the daemon.

    id: the daemon's name for it; shape: (B, S, H) of the forward, (T, H) of a packed one.
    """

    def __init__(self, session: Session, stack: str, context_id: str, shape: Iterable[int]) -> None:
        self.id = context_id
        self.shape = tuple(shape)
        self._finalizer = weakref.finalize(self, session.discard, stack, context_id)
        self._finalizer.atexit = False

    def __repr__(self) -> str:
        return f"<lamina.Context of {list(self.shape)}{'' if self._finalizer.alive else ', spent'}>"

    def _spent(self) -> None:
        self._finalizer.detach()

    def release(self) -> None:
        """Frees it now or soon; it can get no backward any more. Idempotent."""
        self._finalizer()


@dataclasses.dataclass
class Call:
    """One call of LayerService before it goes out. method: the RPC for it alone; field: its name in an ExecuteRequest and
    its answer's in an ExecuteResponse. mutation: whether it takes a sequence. keep: the arrays that it names. output: the
    array that its result will land in, None where that comes inside the answer or there is none. finish: makes the
    result from the answer. stream: of tensors in device memory."""

    method: Callable
    field: str
    request: Any
    mutation: bool
    finish: Callable[[Any], Any]
    keep: List[Any] = dataclasses.field(default_factory=list)
    output: Optional[Any] = None
    stream: Optional[int] = None


class Stack:
    """A handle; the stack itself lives in the daemon until Client.delete_stack.

    name, config (every default filled in), dtype ("fp32", "bf16", "fp16"), loss_scale (what to multiply the next loss
    by: 1 unless dynamic_loss_scale; as of this handle's last apply_gradients, load, update or info). Arrays are of the stack's type: float32,
    float16, or uint16 holding bf16 bits (ml_dtypes.bfloat16 is taken and given back as well); float32 is rounded where
    the stack's type is another. B and S of a call may be smaller than the config's. Results are the caller's for as long
    as they are referenced; they lie in shared memory where there is any, so that passing one on costs no copy.

    Every method may raise Unavailable (the daemon is gone or drains), ResourceExhausted (its queue is full) and
    DeadlineExceeded (the client's timeout). After any error the stack is as it was before the call, except where the
    answer itself was lost (Unavailable, DeadlineExceeded, KeyboardInterrupt): then the call may have run, once.

    Threads: any; mutations of one client run one after another.

    >>> import lamina, numpy as np
    >>> with lamina.connect() as client:
    ...     stack = client.create_stack("stack-example", batch_size=2, max_seq_length=8, hidden_size=16, heads=2,
    ...                                 num_hidden_layers=2, seed=1)
    ...     x = np.ones((2, 8, 16), np.float32)
    ...     y, context = stack.forward(x)
    ...     dx = stack.backward(context, dy=2 * y / y.size)
    ...     outcome = stack.apply_gradients(lr=1e-3, max_grad_norm=1.0, zero_gradients=True)
    ...     client.delete_stack("stack-example")
    >>> y.shape, dx.shape, outcome.applied, outcome.step
    ((2, 8, 16), (2, 8, 16), True, 1)
    """

    def __init__(self, client: Client, info: StackInfo) -> None:
        self._client = client
        self.name = info.name
        self.config = info.config
        self.dtype: str = info.config.dtype or "fp32"
        self.loss_scale: float = info.loss_scale
        self.last_timing: Optional[StepTiming] = None  # of the last forward, backward or apply_gradients
        self.last_attention_path: Optional[str] = None  # of the last forward: "fused" or "plain"
        # How the input of the last forward or backward crossed: "device", "memfd" or "inline".
        self.last_transport: Optional[str] = None

    def __repr__(self) -> str:
        c = self.config
        return (f"<lamina.Stack {self.name!r}: {c.num_hidden_layers} layers, H {c.hidden_size}, A {c.heads}, "
                f"{self.dtype}>")

    def info(self) -> StackInfo:
        """A fresh StackInfo. NotFound: it was deleted."""
        info = self._client._stack_info(self.name)
        self.loss_scale = info.loss_scale
        return info

    # --- steps ---

    def forward(self, x: Any, mask: Optional[Any] = None, lengths: Optional[Any] = None, training: Optional[bool] = None,
                layers: Optional[Tuple[int, int]] = None, out: Optional[Any] = None,
                cumulative_lengths: Optional[Any] = None, stream: Optional[int] = None) -> Tuple[Any, Optional[Context]]:
        """Runs the layers over x [B, S, H]: (y [B, S, H], Context), or (y, None) in evaluation.

        mask: float32 [B, S] or [B, 1, 1, S], added to the scores of each key: 0 to keep, -inf or a large negative
        number to hide. lengths: int [B], 1..S, instead of a mask. training: draw dropout and keep a context; None: as
        the stack's config says. layers: (begin, end), None for all. out: an array of y's shape and type from
        Client.empty; y is then that array. x may be changed as soon as the call is back.

        cumulative_lengths: int [n + 1], instead of a mask or lengths: x is a packed batch [T, H] without padding, whose
        sequence i is tokens cumulative_lengths[i] to cumulative_lengths[i + 1] (lamina.packing makes both). T is at most
        batch_size * max_seq_length and n may be above batch_size; y, dy and dx are [T, H] too.

        x may be in the device's memory, where client and daemon share a device (see lamina.device): a DeviceArray, a
        PyTorch tensor, or what has __cuda_array_interface__; contiguous, of the stack's type. It is read where it is if
        it lies in memory from Client.empty(..., device=True) or in a result, else it is copied there, on the device. y
        is then a PyTorch tensor for one, else a DeviceArray; the other arguments stay on the host. stream: the CUDA
        stream whose work so far x and out wait for; None: PyTorch's current one, else the array's or the legacy one.

        InvalidArgument: a shape, layers, or cumulative lengths that fall, stand still or do not end at T.
        FailedPrecondition: training of a stack whose training is off; normalize_invertible and a gamma too small.
        ResourceExhausted: no room for another context (says the numbers). NotFound: the stack.
        """
        session = self._client.session
        session.release_garbage()
        call = self._forward_call(x, mask, lengths, training, layers, out, cumulative_lengths, stream)
        run = session.mutate_with_room if call.mutation else session.read
        return call.finish(run(call.method, call.request, call.keep))

    def _forward_call(self, x: Any, mask: Optional[Any], lengths: Optional[Any], training: Optional[bool],
                      layers: Optional[Tuple[int, int]], out: Optional[Any], cumulative_lengths: Optional[Any],
                      stream: Optional[int]) -> Call:
        session = self._client.session
        if sum(a is not None for a in (mask, lengths, cumulative_lengths)) > 1:
            raise ValueError("give one of mask, lengths, cumulative_lengths")
        training = bool(self.config.training if training is None else training)
        request = pb.ForwardRequest(stack=self.name, session_id=session.id, training=training)
        way = self._way("x", x, out, stream)
        keep = [way.put(request.input)]
        if layers is not None:
            request.layers.begin, request.layers.end = layers
        if mask is not None:
            keep.append(session.tensor(np.asarray(mask, np.float32), "fp32", request.mask))
        if lengths is not None:
            keep.append(session.tensor(_integers("lengths", lengths), "int32", request.lengths))
        if cumulative_lengths is not None:
            offsets = _integers("cumulative_lengths", cumulative_lengths)
            keep.append(session.tensor(offsets, "int32", request.cumulative_lengths))
        y = way.target(request.output)
        if y is not None:
            keep.append(y)
        way.mark_ready(request)

        def finish(answer: pb.ForwardResponse) -> Tuple[Any, Optional[Context]]:
            self.last_timing = StepTiming.from_proto(answer.timing)
            self.last_transport = _TRANSPORTS.get(answer.input_transport)
            self.last_attention_path = _ATTENTION_PATHS.get(answer.attention_path)
            context = Context(session, self.name, answer.context_id, way.shape) if answer.context_id else None
            return way.result(answer.output, y), context

        return Call(self._client._stubs.layer.Forward, "forward", request, training, finish, keep,
                    None if y is None else way.shown(y), way.stream)

    def _way(self, name: str, value: Any, out: Optional[Any], stream: Optional[int]) -> Union[_HostWay, _DeviceWay]:
        session = self._client.session
        given = device.given(name, value, stream)
        if given is not None:
            return _DeviceWay(session, given, self.dtype, out)
        return _HostWay(session, value, self.dtype, out)

    def backward(self, context: Context, dy: Any, input_grad: bool = True, out: Optional[Any] = None,
                 stream: Optional[int] = None) -> Any:
        """Adds the gradients of the context's layers; returns dx, shaped like the forward's x, or None without input_grad.

        dy: gradient of the loss by the forward's output, of its shape; where it may be and how dx comes is as forward says
        of x and y. out, stream: as in forward. The context is spent; after
        an error that the daemon answered it is not, and the gradients are as they were.

        NotFound: a context that was spent or released, or ended with its session. InvalidArgument: dy's shape.
        FailedPrecondition: the stack was deleted.
        """
        return self._mutate(self._backward_call(context.id, context._spent, dy, input_grad, out, stream))

    def _mutate(self, call: Call) -> Any:
        return call.finish(self._client.session.mutate(call.method, call.request, call.keep))

    def _backward_call(self, context_id: str, spent: Callable[[], None], dy: Any, input_grad: bool, out: Optional[Any],
                       stream: Optional[int]) -> Call:
        """spent: called when it has run."""
        request = pb.BackwardRequest(stack=self.name, context_id=context_id)
        way = self._way("dy", dy, out, stream)
        keep = [way.put(request.output_grad)]
        dx = None
        if input_grad:
            dx = way.target(request.input_grad)
            if dx is not None:
                keep.append(dx)
        way.mark_ready(request)

        def finish(answer: pb.BackwardResponse) -> Any:
            spent()
            self.last_timing = StepTiming.from_proto(answer.timing)
            self.last_transport = _TRANSPORTS.get(answer.input_transport)
            return way.result(answer.input_grad, dx) if input_grad else None

        return Call(self._client._stubs.layer.Backward, "backward", request, True, finish, keep,
                    None if dx is None else way.shown(dx), way.stream)

    def apply_gradients(self, lr: float, beta1: Optional[float] = None, beta2: Optional[float] = None,
                        eps: Optional[float] = None, weight_decay: Optional[float] = None,
                        max_grad_norm: Optional[float] = None, loss_scale: Optional[float] = None,
                        decay_biases_and_norms: bool = False, zero_gradients: bool = False, optimizer: str = "adamw",
                        adapt_biases_and_norms: bool = False, min_trust_ratio: Optional[float] = None,
                        max_trust_ratio: Optional[float] = None) -> Applied:
        """One step of AdamW or LAMB from the accumulated gradients; returns Applied.

        Defaults as torch.optim.AdamW's, but weight_decay 0 (decoupled; biases and norms are left out of it unless
        asked). max_grad_norm: clip the global L2 norm. loss_scale: what the loss was multiplied by; None: the stack's
        own where its config has dynamic_loss_scale, else 1. zero_gradients: zero them afterwards, also when the step was
        skipped. optimizer: "adamw", or "lamb", which scales each tensor's update by ||w|| / ||update|| within
        min_trust_ratio and max_trust_ratio (None: no bound), that of biases and norms only with adapt_biases_and_norms.

        InvalidArgument: a value outside its range, or one of LAMB's with another optimizer. FailedPrecondition: training
        is off.
        """
        return self._mutate(self._apply_call(
            lr, eps, optimizer, beta1=beta1, beta2=beta2, weight_decay=weight_decay, max_grad_norm=max_grad_norm,
            loss_scale=loss_scale, decay_biases_and_norms=decay_biases_and_norms, zero_gradients=zero_gradients,
            adapt_biases_and_norms=adapt_biases_and_norms, min_trust_ratio=min_trust_ratio,
            max_trust_ratio=max_trust_ratio))

    def _apply_call(self, lr: float, eps: Optional[float] = None, optimizer: str = "adamw", **settings: Any) -> Call:
        """settings: apply_gradients' others, which are called so in the request too."""
        if optimizer not in _OPTIMIZERS:
            raise ValueError(f"optimizer: {optimizer!r} must be one of {', '.join(_OPTIMIZERS)}")
        request = pb.ApplyGradientsRequest(stack=self.name, learning_rate=lr, epsilon=eps,
                                           optimizer=_OPTIMIZERS[optimizer], **settings)

        def finish(answer: pb.ApplyGradientsResponse) -> Applied:
            self.last_timing = StepTiming.from_proto(answer.timing)
            self.loss_scale = answer.next_loss_scale
            return Applied(answer.applied, answer.grad_norm, answer.step, answer.loss_scale, answer.next_loss_scale)

        return Call(self._client._stubs.layer.ApplyGradients, "apply_gradients", request, True, finish)

    def zero_gradients(self) -> None:
        """Sets all gradients to zero. FailedPrecondition: training is off."""
        self._mutate(self._zero_call())

    def _zero_call(self) -> Call:
        request = pb.ZeroGradientsRequest(stack=self.name)
        return Call(self._client._stubs.layer.ZeroGradients, "zero_gradients", request, True, lambda answer: None)

    # --- parameters ---

    def shapes(self) -> Dict[str, Tuple[int, ...]]:
        """{name: shape} of the stored parameters, in their order."""
        request = config_pb.GetStackRequest(name=self.name)
        answer = self._client._read(self._client._stubs.config.GetStack, request)
        return {p.name: tuple(p.shape) for p in answer.parameters}

    def parameters(self, names: Optional[Sequence[str]] = None, dtype: Any = "fp32",
                   device: bool = False) -> Dict[str, Any]:
        """{name: array}, by default all stored ones as float32 master weights; dtype may be the stack's own.

        Names are "layers.<i>.<name>" with DeepSpeed's names: attn_qkvw [3H, H], attn_qkvb [3H], attn_ow [H, H],
        attn_ob [H], attn_nw and attn_nb [H], inter_w [I, H], inter_b [I], output_w [H, I], output_b [H], norm_w and
        norm_b [H]; attn_qw, attn_kw, attn_vw [H, H] and attn_qb, attn_kb, attn_vb [H] are the parts of the fused ones.
        The arrays are the caller's own. Any size: they come as a stream. NotFound: a name.

        device: DeviceArrays instead, in one piece of device memory that the daemon maps too (see lamina.device): they
        never leave the device. Unavailable: no device regions. ResourceExhausted: the session's cap.
        """
        if device:
            return self._on_device(names, dtype, gradients=False)
        return self._stream(names, dtype, gradients=False)

    def gradients(self, names: Optional[Sequence[str]] = None, device: bool = False) -> Dict[str, Any]:
        """{name: float32 array} of the accumulated gradients; names and device as for parameters. FailedPrecondition where
        training is off."""
        if device:
            return self._on_device(names, "fp32", gradients=True)
        return self._stream(names, "fp32", gradients=True)

    def _on_device(self, names: Optional[Sequence[str]], dtype: Any, gradients: bool) -> Dict[str, Any]:
        session = self._client.session
        stored = self.shapes()
        shapes = stored if names is None else {name: _shape_of(name, stored) for name in names}
        missing = [name for name, shape in shapes.items() if shape is None]
        if missing:
            raise NotFound(f"stack '{self.name}' has no parameter '{missing[0]}'")
        sizes = [math.prod(shape or ()) for shape in shapes.values()]
        whole = session.empty_on_device((sum(sizes),), dtype)
        if gradients:
            call: Callable = self._client._stubs.config.GetGradients
            request: Any = config_pb.GetGradientsRequest(stack=self.name, names=list(shapes), session_id=session.id)
        else:
            call = self._client._stubs.config.GetParameters
            request = config_pb.GetParametersRequest(stack=self.name, names=list(shapes), session_id=session.id,
                                                     dtype=dtypes.to_proto(dtype))
        session.device_target(whole.shape, whole.dtype, whole, request.target)
        # What was in this memory may still be read by kernels that were enqueued.
        session.mark_ready(LEGACY_STREAM, request.ready)
        session.read(call, request, [whole])
        arrays, begin = {}, 0
        for (name, shape), size in zip(shapes.items(), sizes):
            arrays[name] = whole.part(begin, shape or ())
            begin += size
        return arrays

    def _stream(self, names: Optional[Sequence[str]], dtype: Any, gradients: bool) -> Dict[str, np.ndarray]:
        request = config_pb.StreamParametersRequest(stack=self.name, names=list(names or ()),
                                                    dtype=dtypes.to_proto(dtype), gradients=gradients)
        stub = self._client._stubs.config.StreamParameters

        def whole(message: Any, timeout: Optional[float]) -> Dict[str, np.ndarray]:
            arrays: Dict[str, np.ndarray] = {}
            for chunk in stub(message, timeout=timeout):
                if chunk.name not in arrays:
                    arrays[chunk.name] = np.empty(tuple(chunk.shape), dtypes.numpy_type(dtype))
                flat = arrays[chunk.name].reshape(-1).view(np.uint8)
                flat[chunk.offset_bytes : chunk.offset_bytes + len(chunk.data)] = np.frombuffer(chunk.data, np.uint8)
            return arrays

        return self._client._read(whole, request)

    def set_parameters(self, values: Mapping[str, Any]) -> None:
        """Writes {name: array}, float32 or the stack's type; names as for parameters.

        All or none for values up to 256 MiB through shared memory, or up to the daemon's inline cap without. More goes
        in several calls, after every name and shape was checked. InvalidArgument: a shape or type, or without shared
        memory a tensor above the inline cap. NotFound: a name.

        Values in device memory are taken as forward takes x: float32 or the stack's type, all or none of any size.
        """
        session = self._client.session
        on_device = {name: device.given(name, value, None) for name, value in values.items()}
        if any(given is not None for given in on_device.values()):
            self._set_on_device(on_device)
            return
        arrays = {name: self._parameter_array(name, value) for name, value in values.items()}
        limit = session.inline_cap if session.pool is None else _SET_BYTES
        batches = list(_batches(arrays, limit))
        if len(batches) > 1:
            self._check_shapes(arrays)
        for batch in batches:
            request = config_pb.SetParametersRequest(stack=self.name)
            keep = []
            for name in batch:
                named = request.tensors.add(name=name)
                array, dtype = arrays[name]
                keep.append(session.tensor(array, dtype, named.tensor))
            session.mutate(self._client._stubs.config.SetParameters, request, keep)
        if session.pool is not None and len(batches) > 1:
            del keep
            session.pool.trim()

    def _set_on_device(self, values: Mapping[str, Optional[device.Given]]) -> None:
        session = self._client.session
        request = config_pb.SetParametersRequest(stack=self.name)
        keep: List[Any] = []
        stream = LEGACY_STREAM
        for name, given in values.items():
            if given is None:
                raise TypeError(f"{name}: is in host memory, others are in the device's: give one kind")
            if given.dtype not in ("fp32", self.dtype):
                raise TypeError(f"{name}: a tensor of {given.dtype} can't stand for {self.dtype}: give fp32")
            if keep and given.stream != stream:
                raise ValueError(f"{name}: is in another stream's order than the others")
            stream = given.stream
            keep.append(session.device_tensor(given, given.dtype, request.tensors.add(name=name).tensor))
        session.mark_ready(stream, request.ready)
        session.mutate(self._client._stubs.config.SetParameters, request, keep)

    def _parameter_array(self, name: str, value: Any) -> Tuple[np.ndarray, str]:
        value = np.asarray(value)
        if value.dtype == dtypes.numpy_type(self.dtype) or (self.dtype == "bf16" and value.dtype.name == "bfloat16"):
            return dtypes.as_stack_type(value, self.dtype), self.dtype
        if value.dtype.kind != "f":
            raise TypeError(f"{name}: an array of {value.dtype} can't stand for {self.dtype}: give float32")
        return value.astype(np.float32, copy=False), "fp32"

    def _check_shapes(self, arrays: Mapping[str, Tuple[np.ndarray, str]]) -> None:
        stored = self.shapes()
        for name, (array, _) in arrays.items():
            shape = _shape_of(name, stored)
            if shape is None:
                raise NotFound(f"stack '{self.name}' has no parameter '{name}'")
            if array.shape != shape:
                raise InvalidArgument(f"{name}: shape {list(array.shape)} must be {list(shape)}")

    # --- life ---

    def update(self, **changes: Any) -> StackInfo:
        """Changes settings of the live stack, all or none; returns StackInfo. Settings: attn_dropout_ratio,
        hidden_dropout_ratio, training, stochastic_mode, and the memory flags normalize_invertible, gelu_checkpoint,
        attn_dropout_checkpoint, activation_checkpointing.

        InvalidArgument: a ratio outside [0, 1). FailedPrecondition: training goes off, or a memory flag changes, while
        contexts are outstanding. ResourceExhausted: the new plan does not fit (says the numbers).
        """
        self._client.session.release_garbage()
        with translated():
            self._client._stubs.config.UpdateStack(config_pb.UpdateStackRequest(name=self.name, **changes),
                                                   timeout=self._client.timeout)
        info = self.info()
        self.config = info.config
        return info

    def save(self, name: Optional[str] = None) -> str:
        """Saves a checkpoint (default: under the stack's name): weights, optimizer, counters, config, durably and
        atomically. Returns its path on the daemon's side. FailedPrecondition: the daemon has no checkpoint folder."""
        request = config_pb.SaveCheckpointRequest(stack=self.name, name=name or "")
        return self._client._read(self._client._stubs.config.SaveCheckpoint, request).path

    def load(self, name: Optional[str] = None) -> None:
        """Loads a checkpoint into this stack: weights, optimizer, counters. NotFound, DataLoss, InvalidArgument (another
        shape)."""
        request = config_pb.LoadCheckpointRequest(stack=self.name, name=name or "")
        answer = self._client._read(self._client._stubs.config.LoadCheckpoint, request)
        self.loss_scale = answer.stack.loss_scale


def _shape_of(name: str, stored: Mapping[str, Tuple[int, ...]]) -> Optional[Tuple[int, ...]]:
    """A parameter's shape, also of a part of a fused one; None: there is none."""
    layer, _, part = name.rpartition(".")
    whole = stored.get(f"{layer}.{_PARTS[part]}") if part in _PARTS else None
    return (whole[0] // 3, *whole[1:]) if whole else stored.get(name)


def _integers(name: str, given: Any) -> np.ndarray:
    values = np.asarray(given)
    if values.dtype.kind not in "iu":
        raise TypeError(f"{name}: an array of {values.dtype}, must be of integers")
    if values.size and (values.min() < -(2**31) or values.max() >= 2**31):
        raise ValueError(f"{name}: beyond 32 bits")
    return values.astype(np.int32)


def _typed_like(given: np.ndarray, result: np.ndarray) -> np.ndarray:
    """`result`, seen as ml_dtypes' bfloat16 where the caller gave that."""
    if given.dtype.kind == "V" and given.dtype.name == "bfloat16":  # a name takes long to make
        return result.view(given.dtype)
    return result


def _batches(arrays: Mapping[str, Tuple[np.ndarray, str]], limit: int) -> Iterator[List[str]]:
    """The names in groups of at most `limit` bytes, or of one larger array; one empty group for no names."""
    batch: List[str] = []
    size = 0
    for name, (array, _) in arrays.items():
        if batch and size + array.nbytes > limit:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += array.nbytes
    yield batch
