"""One stack: steps, parameters, checkpoints."""

import dataclasses
import weakref

import numpy as np

from lamina import dtypes
from lamina.errors import translated
from lamina.v1 import config_service_pb2 as config_pb
from lamina.v1 import layer_service_pb2 as pb


@dataclasses.dataclass(frozen=True)
class StepTiming:
    """Where a call's time went, in seconds."""

    queue_seconds: float
    input_seconds: float
    compute_seconds: float
    output_seconds: float

    @classmethod
    def from_proto(cls, m):
        return cls(m.queue_seconds, m.input_seconds, m.compute_seconds, m.output_seconds)


@dataclasses.dataclass(frozen=True)
class Applied:
    """An optimizer step's outcome. applied False: a gradient was not finite and nothing was changed."""

    applied: bool
    grad_norm: float
    step: int


class Context:
    """What a training forward saved for its backward. Dropped without one, it is released in the daemon."""

    def __init__(self, session, stack, context_id, shape):
        self.id = context_id
        self.shape = tuple(shape)
        self._finalizer = weakref.finalize(self, session.discard, stack, context_id)
        self._finalizer.atexit = False

    def _spent(self):
        self._finalizer.detach()

    def release(self):
        """Frees it now or soon; it can get no backward any more."""
        self._finalizer()


class Stack:
    """A handle; the stack itself lives in the daemon until Client.delete_stack.

    name, config (every default filled in), dtype ("fp32", "bf16", "fp16"). Arrays are of the stack's type: float32,
    float16, or uint16 holding bf16 bits; float32 is rounded where the stack's type is another. B and S of a call
    may be smaller than the config's. Threads: any; steps of one client run one after another.
    """

    def __init__(self, client, info):
        self._client = client
        self.name = info.name
        self.config = info.config
        self.dtype = info.config.dtype
        self.last_timing = None  # StepTiming of the last forward, backward or apply_gradients

    def __repr__(self):
        c = self.config
        return (f"<lamina.Stack {self.name!r}: {c.num_hidden_layers} layers, H {c.hidden_size}, A {c.heads}, "
                f"{self.dtype}>")

    def info(self):
        """A fresh StackInfo."""
        return self._client._stack_info(self.name)

    # --- steps ---

    def forward(self, x, mask=None, lengths=None, training=None, layers=None, out=None):
        """Runs the layers over x [B, S, H]: (y [B, S, H], Context), or (y, None) in evaluation.

        mask: float32 [B, S] or [B, 1, 1, S], added to the scores of each key. lengths: int [B], 1..S. training: draw
        dropout and keep a context; None: as the stack's config says. layers: (begin, end), None for all. out: an
        array from Client.empty for the result. The result is the caller's for as long as it is referenced.
        """
        session = self._client.session
        session.release_garbage()
        training = self.config.training if training is None else bool(training)
        x = dtypes.as_stack_type(x, self.dtype)
        request = pb.ForwardRequest(stack=self.name, session_id=session.id, training=training)
        tensor, x = session.tensor(x, self.dtype)
        request.input.CopyFrom(tensor)
        if layers is not None:
            request.layers.begin, request.layers.end = layers
        keep = []
        if mask is not None:
            tensor, array = session.tensor(np.asarray(mask, np.float32), "fp32")
            request.mask.CopyFrom(tensor)
            keep.append(array)
        if lengths is not None:
            if mask is not None:
                raise ValueError("give a mask or lengths, not both")
            tensor, array = session.tensor(np.asarray(lengths, np.int32), "int32")
            request.lengths.CopyFrom(tensor)
            keep.append(array)
        target, y = session.target(x.shape, self.dtype, out)
        request.output.CopyFrom(target)
        layer = self._client._stubs.layer
        if training:
            answer = session.mutate(layer.Forward, request)
        else:
            with translated():
                answer = layer.Forward(request)
        self.last_timing = StepTiming.from_proto(answer.timing)
        context = Context(session, self.name, answer.context_id, x.shape) if answer.context_id else None
        return session.result(answer.output, y), context

    def backward(self, context, dy, input_grad=True, out=None):
        """Adds the gradients of the context's layers; returns dx [B, S, H], or None without input_grad.

        dy: gradient of the loss by the forward's output. The context is spent. NotFound for a spent one.
        """
        session = self._client.session
        dy = dtypes.as_stack_type(dy, self.dtype)
        request = pb.BackwardRequest(stack=self.name, context_id=context.id)
        tensor, dy = session.tensor(dy, self.dtype)
        request.output_grad.CopyFrom(tensor)
        dx = None
        if input_grad:
            target, dx = session.target(dy.shape, self.dtype, out)
            request.input_grad.CopyFrom(target)
        answer = session.mutate(self._client._stubs.layer.Backward, request)
        context._spent()
        self.last_timing = StepTiming.from_proto(answer.timing)
        return session.result(answer.input_grad, dx) if input_grad else None

    def apply_gradients(self, lr, beta1=None, beta2=None, eps=None, weight_decay=None, max_grad_norm=None,
                        loss_scale=None, decay_biases_and_norms=False, zero_gradients=False):
        """One AdamW step from the accumulated gradients; returns Applied.

        max_grad_norm: clip the global L2 norm. loss_scale: what the loss was multiplied by. zero_gradients: zero them
        afterwards, also when the step was skipped.
        """
        request = pb.ApplyGradientsRequest(
            stack=self.name, learning_rate=lr, beta1=beta1, beta2=beta2, epsilon=eps, weight_decay=weight_decay,
            max_grad_norm=max_grad_norm, loss_scale=loss_scale, decay_biases_and_norms=decay_biases_and_norms,
            zero_gradients=zero_gradients)
        answer = self._client.session.mutate(self._client._stubs.layer.ApplyGradients, request)
        self.last_timing = StepTiming.from_proto(answer.timing)
        return Applied(answer.applied, answer.grad_norm, answer.step)

    def zero_gradients(self):
        """Sets all gradients to zero."""
        request = pb.ZeroGradientsRequest(stack=self.name)
        self._client.session.mutate(self._client._stubs.layer.ZeroGradients, request)

    # --- parameters ---

    def parameters(self, names=None, dtype="fp32"):
        """{name: array}, by default all stored ones as float32 master weights; dtype may be the stack's own.

        Names are "layers.<i>.<name>" with DeepSpeed's names (attn_qkvw, ...); attn_qw, attn_kw, attn_vw and their
        biases are the parts of the fused ones. NotFound.
        """
        return self._stream(names, dtype, gradients=False)

    def gradients(self, names=None):
        """{name: float32 array} of the accumulated gradients. FailedPrecondition where training is off."""
        return self._stream(names, "fp32", gradients=True)

    def _stream(self, names, dtype, gradients):
        request = config_pb.StreamParametersRequest(stack=self.name, names=names or [],
                                                    dtype=dtypes.to_proto(dtype), gradients=gradients)
        arrays = {}
        with translated():
            for chunk in self._client._stubs.config.StreamParameters(request):
                if chunk.name not in arrays:
                    arrays[chunk.name] = np.empty(tuple(chunk.shape), dtypes.numpy_type(dtype))
                flat = arrays[chunk.name].reshape(-1).view(np.uint8)
                flat[chunk.offset_bytes : chunk.offset_bytes + len(chunk.data)] = np.frombuffer(chunk.data, np.uint8)
        return arrays

    def set_parameters(self, values):
        """Writes {name: array}, all or none; float32 or the stack's type. InvalidArgument, NotFound."""
        session = self._client.session
        request = config_pb.SetParametersRequest(stack=self.name)
        keep = []
        for name, value in values.items():
            value = np.asarray(value)
            own = value.dtype == dtypes.numpy_type(self.dtype)
            dtype = self.dtype if own else "fp32"
            tensor, array = session.tensor(value if own else np.asarray(value, np.float32), dtype)
            keep.append(array)
            named = request.tensors.add(name=name)
            named.tensor.CopyFrom(tensor)
        session.mutate(self._client._stubs.config.SetParameters, request)

    # --- life ---

    def update(self, **changes):
        """Changes attn_dropout_ratio, hidden_dropout_ratio or training on the live stack; returns StackInfo."""
        with translated():
            self._client._stubs.config.UpdateStack(config_pb.UpdateStackRequest(name=self.name, **changes))
        info = self.info()
        self.config = info.config
        return info

    def save(self, name=None):
        """Saves a checkpoint (default: under the stack's name); returns its path on the daemon's side."""
        request = config_pb.SaveCheckpointRequest(stack=self.name, name=name or "")
        with translated():
            return self._client._stubs.config.SaveCheckpoint(request).path

    def load(self, name=None):
        """Loads a checkpoint into this stack: weights, optimizer, counters. NotFound, DataLoss, InvalidArgument."""
        request = config_pb.LoadCheckpointRequest(stack=self.name, name=name or "")
        with translated():
            self._client._stubs.config.LoadCheckpoint(request)
