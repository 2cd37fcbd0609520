"""Client of laminad, a daemon that owns transformer layer stacks on a GPU or CPU.

>>> import lamina, numpy as np
>>> with lamina.connect() as client:                      # LAMINA_TARGET, or the usual socket
...     stack = client.create_stack("demo", batch_size=8, max_seq_length=128, hidden_size=64, heads=4,
...                                 num_hidden_layers=2, hidden_dropout_ratio=0.1)
...     x = np.random.default_rng(0).standard_normal((8, 32, 64)).astype(np.float32)      # [B, S, H]
...     y, context = stack.forward(x)
...     dx = stack.backward(context, 2 * (y - x) / y.size)                 # the loss is mean((y - x)^2)
...     outcome = stack.apply_gradients(lr=1e-3, zero_gradients=True)
...     client.delete_stack("demo")
>>> outcome.applied
True

Client: stacks, plans, checkpoints, shared arrays. Stack: forward, backward, the optimizer, parameters.
Pipeline: the same steps without waiting for each other (Client.pipeline; in coroutines Client.apipeline).
StackConfig: what a stack is. packing: batches without padding. LaminaError: what can go wrong. `lamina.torch.RemoteStack` wraps a stack as an nn.Module.
"""

from lamina import packing
from lamina.async_pipeline import AsyncPipeline
from lamina.client import Client, MemoryPlan, PlanEntry, ServerInfo, StackInfo, connect, default_target
from lamina.config import StackConfig
from lamina.dtypes import from_float32, to_float32
from lamina.errors import (AlreadyExists, Cancelled, DataLoss, DeadlineExceeded, FailedPrecondition, Internal,
                           InvalidArgument, LaminaError, NotFound, PermissionDenied, ResourceExhausted, Unauthenticated, Unavailable,
                           Unimplemented)
from lamina.pipeline import Pending, PendingForward, Pipeline
from lamina.security import Tls
from lamina.stack import Applied, Context, Stack, StepTiming

__version__ = "0.1.0"
__all__ = [
    "AlreadyExists", "Applied", "AsyncPipeline", "Cancelled", "Client", "Context", "DataLoss", "DeadlineExceeded", "FailedPrecondition",
    "Internal", "InvalidArgument", "LaminaError", "MemoryPlan", "NotFound", "Pending", "PendingForward", "PermissionDenied",
    "Pipeline", "PlanEntry", "ResourceExhausted", "ServerInfo", "Stack", "StackConfig", "StackInfo", "StepTiming", "Tls",
    "Unauthenticated", "Unavailable", "Unimplemented",
    "connect", "default_target", "from_float32", "packing", "to_float32",
]
