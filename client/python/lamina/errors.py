"""The daemon's refusals as exceptions: one class a gRPC status code, all of them LaminaError."""

from __future__ import annotations

import contextlib
from typing import Dict, Iterator, Optional, Type

import grpc


class LaminaError(Exception):
    """What the daemon (or the way to it) answered instead of a result.

    code: the grpc.StatusCode; message: the daemon's words, which name the field, its value and its range;
    request_id: what the daemon's log calls the call, None where the daemon did not answer.
    """

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN

    def __init__(self, message: str, code: Optional[grpc.StatusCode] = None, request_id: Optional[str] = None) -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}" + (f" (request {self.request_id})" if self.request_id else "")


class InvalidArgument(LaminaError):
    """A shape, dtype, slice or setting is outside what is allowed."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(LaminaError):
    """No such stack, session, region, context or parameter."""

    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(LaminaError):
    """The name is taken, or the sequence was used with another body."""

    code = grpc.StatusCode.ALREADY_EXISTS


class FailedPrecondition(LaminaError):
    """Not in this state: training is off, or a gap in the sequence."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class ResourceExhausted(LaminaError):
    """It does not fit: memory, contexts, regions, the queue. Nothing has changed."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unavailable(LaminaError):
    """The daemon can't be reached, drains, or its device failed; or the session has ended."""

    code = grpc.StatusCode.UNAVAILABLE


class Unauthenticated(LaminaError):
    """The daemon does not know who calls: no token or certificate, or one that it does not (or no longer) accept."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(LaminaError):
    """The daemon knows who calls, and its roles do not allow the call; the message names them."""

    code = grpc.StatusCode.PERMISSION_DENIED


class Unimplemented(LaminaError):
    """This version lacks the setting or call."""

    code = grpc.StatusCode.UNIMPLEMENTED


class DeadlineExceeded(LaminaError):
    """The call took longer than the client's timeout."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(LaminaError):
    """The call was cancelled."""

    code = grpc.StatusCode.CANCELLED


class DataLoss(LaminaError):
    """A checkpoint is damaged."""

    code = grpc.StatusCode.DATA_LOSS


class Internal(LaminaError):
    """The daemon failed; its log says more."""

    code = grpc.StatusCode.INTERNAL


_BY_CODE: Dict[grpc.StatusCode, Type[LaminaError]] = {
    c.code: c for c in (InvalidArgument, NotFound, AlreadyExists, FailedPrecondition, ResourceExhausted, Unavailable,
                        Unauthenticated, PermissionDenied, Unimplemented, DeadlineExceeded, Cancelled, DataLoss, Internal)}


_BY_NUMBER: Dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def from_code(code: grpc.StatusCode, message: Optional[str], request_id: Optional[str] = None) -> LaminaError:
    """The LaminaError for a status."""
    return _BY_CODE.get(code, LaminaError)(message or code.name, code, request_id)


def from_number(number: int, message: Optional[str], request_id: Optional[str] = None) -> LaminaError:
    """The LaminaError for a status whose code is a number, as in messages; UNKNOWN for one that there is not."""
    return from_code(_BY_NUMBER.get(number, grpc.StatusCode.UNKNOWN), message, request_id)


def from_rpc(error: grpc.RpcError) -> LaminaError:
    """The LaminaError for a grpc.RpcError."""
    metadata = dict(getattr(error, "trailing_metadata", lambda: None)() or ())
    return from_code(error.code(), error.details(), metadata.get("x-request-id"))


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turns a grpc.RpcError inside into a LaminaError."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc(error) from None
