"""Client of laminad, a daemon that owns transformer layer stacks on a GPU or CPU.

    import lamina
    with lamina.connect() as client:
        stack = client.create_stack("demo", batch_size=8, max_seq_length=128, hidden_size=256, heads=8,
                                    num_hidden_layers=4)
        y, context = stack.forward(x, training=True)    # x: float32 [B, S, H]
        dx = stack.backward(context, dy)
        stack.apply_gradients(lr=1e-3, zero_gradients=True)

`lamina.torch.RemoteStack` wraps a stack as an nn.Module.
"""

from lamina.client import Client, MemoryPlan, PlanEntry, ServerInfo, StackInfo, connect
from lamina.config import StackConfig
from lamina.dtypes import from_float32, to_float32
from lamina.errors import (AlreadyExists, Cancelled, DataLoss, DeadlineExceeded, FailedPrecondition, Internal,
                           InvalidArgument, LaminaError, NotFound, ResourceExhausted, Unavailable, Unimplemented)
from lamina.stack import Applied, Context, Stack, StepTiming

__version__ = "0.1.0"
__all__ = [
    "AlreadyExists", "Applied", "Cancelled", "Client", "Context", "DataLoss", "DeadlineExceeded", "FailedPrecondition",
    "Internal", "InvalidArgument", "LaminaError", "MemoryPlan", "NotFound", "PlanEntry", "ResourceExhausted",
    "ServerInfo", "Stack", "StackConfig", "StackInfo", "StepTiming", "Unavailable", "Unimplemented", "connect",
    "from_float32", "to_float32",
]
