"""The daemon's refusals as exceptions: one class a gRPC status code, all of them LaminaError."""

import contextlib

import grpc


class LaminaError(Exception):
    """What the daemon (or the way to it) answered instead of a result.

    code: the grpc.StatusCode; message: the daemon's words, which name the field, its value and its range.
    """

    code = grpc.StatusCode.UNKNOWN

    def __init__(self, message, code=None):
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code

    def __str__(self):
        return f"{self.code.name}: {self.message}"


def _error(name, meaning):
    return type("".join(part.capitalize() for part in name.split("_")), (LaminaError,),
                {"__doc__": meaning, "__module__": __name__, "code": grpc.StatusCode[name]})


InvalidArgument = _error("INVALID_ARGUMENT", "A shape, dtype, slice or setting is outside what is allowed.")
NotFound = _error("NOT_FOUND", "No such stack, session, region, context or parameter.")
AlreadyExists = _error("ALREADY_EXISTS", "The name is taken, or the sequence was used with another body.")
FailedPrecondition = _error("FAILED_PRECONDITION", "Not in this state: training is off, or a gap in the sequence.")
ResourceExhausted = _error("RESOURCE_EXHAUSTED", "It does not fit: memory, contexts, regions, the queue.")
Unavailable = _error("UNAVAILABLE", "The daemon can't be reached, drains, or its device failed.")
Unimplemented = _error("UNIMPLEMENTED", "This version lacks the setting or call.")
DeadlineExceeded = _error("DEADLINE_EXCEEDED", "The call took longer than its timeout.")
Cancelled = _error("CANCELLED", "The call was cancelled.")
DataLoss = _error("DATA_LOSS", "A checkpoint is damaged.")
Internal = _error("INTERNAL", "The daemon failed; its log says more.")

_BY_CODE = {c.code: c for c in (InvalidArgument, NotFound, AlreadyExists, FailedPrecondition, ResourceExhausted,
                                Unavailable, Unimplemented, DeadlineExceeded, Cancelled, DataLoss, Internal)}


def from_rpc(error):
    """The LaminaError for a grpc.RpcError."""
    code = error.code()
    return _BY_CODE.get(code, LaminaError)(error.details() or code.name, code)


@contextlib.contextmanager
def translated():
    """Turns a grpc.RpcError inside into a LaminaError."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc(error) from None
