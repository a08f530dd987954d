"""What goes wrong, as the mesh says it, and when it is worth another try."""

import random
from collections.abc import Iterable
from typing import cast

import grpc
from google.protobuf.any_pb2 import Any
from google.rpc import error_details_pb2, status_pb2


class Error(Exception):
    """A call, or a job, that failed.

    Attributes:
        code: The gRPC status code.
        message: What was wrong, and what would be right.
        reason: The stable word that docs/errors.md explains; empty if it was no service of the mesh that answered.
        field: The field of the request that can't be right, such as `layers[0].units`; empty if it is none.
        retry_after: Seconds after which the same call is worth another try, if the mesh says so.
    """

    def __init__(self, code: grpc.StatusCode, message: str, details: Iterable[Any] = (), *, reason: str = "") -> None:
        self.code, self.message, self.reason = code, message, reason
        self.field = ""
        self.retry_after: float | None = None
        for detail in details:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                self.reason = error_details_pb2.ErrorInfo.FromString(detail.value).reason
            elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                violations = error_details_pb2.BadRequest.FromString(detail.value).field_violations
                self.field = violations[0].field if violations else ""
            elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                self.retry_after = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay.ToTimedelta().total_seconds()
        text = f"{self.reason or code.name}: {message}"
        text += f" (field {self.field})" if self.field else ""
        text += f" (worth another try in {self.retry_after:g} s)" if self.retry_after is not None else ""
        super().__init__(text)

    @classmethod
    def of_call(cls, failure: grpc.RpcError) -> "Error":
        """Of a call of a stub that failed."""
        metadata = dict(cast(Iterable[tuple[str, bytes]], failure.trailing_metadata() or ()))
        details = status_pb2.Status.FromString(metadata.get("grpc-status-details-bin", b"")).details
        return cls(failure.code(), failure.details() or "", details)

    @property
    def is_away(self) -> bool:
        """Whether the mesh was not there, or had no time, and the same call may go well later."""
        broken = self.code in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL) and not self.reason
        full = self.code is grpc.StatusCode.RESOURCE_EXHAUSTED and self.retry_after is not None
        return broken or full or self.code is grpc.StatusCode.UNAVAILABLE


class Patience:
    """How long a call waits for a mesh that is away: about a minute, after each answer anew."""

    def __init__(self) -> None:
        self.tries, self.after = 12, 0.25

    def wait(self, error: Error) -> float:
        """Seconds until the next try. Raises the error if there is to be none."""
        if not error.is_away or self.tries == 0:
            raise error
        self.tries -= 1
        # No two callers wait equally long, so that they do not come back as one.
        delay = max(self.after, min(error.retry_after or 0, 60)) * random.uniform(1, 1.5)
        self.after = min(2 * self.after, 8)
        return delay
