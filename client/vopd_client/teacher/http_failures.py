"""Why an HTTP connection broke, in words for a line on the screen. Pure."""

from __future__ import annotations

import ssl

import grpc
import httpx2

from vopd_client.teacher.channel import Address
from vopd_client.teacher.status import Failure

# What OpenSSL makes of a peer that answers a TLS greeting in another protocol, or hangs up.
_NO_TLS = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNEXPECTED_EOF_WHILE_READING"})


def failure_of_connection(error: httpx2.RequestError | OSError, address: Address) -> Failure:
    """The failure of a request that has no whole answer: trying again may help, except where we broke the rules."""
    if isinstance(error, httpx2.LocalProtocolError):
        return Failure(grpc.StatusCode.INTERNAL, str(error))
    return Failure(grpc.StatusCode.UNAVAILABLE, _reason(error, address))


def _reason(error: BaseException, address: Address) -> str:
    cause = root_cause(error)
    match cause:
        case ssl.SSLCertVerificationError():
            return f"certificate not trusted: {cause.verify_message}"
        case ssl.SSLError():
            return _tls_reason(cause, address, connecting=isinstance(error, httpx2.ConnectError))
        case ConnectionRefusedError():
            return "connection refused"
        case OSError() if cause.strerror:
            return cause.strerror[0].lower() + cause.strerror[1:]
    if isinstance(error, httpx2.RemoteProtocolError) and str(error).startswith("illegal"):
        return f"{address.target} does not speak HTTP/1.1: the port of gRPC is reached with grpc://"
    return str(error) or type(error).__name__


def _tls_reason(cause: ssl.SSLError, address: Address, *, connecting: bool) -> str:
    reason = getattr(cause, "reason", None) or str(cause)  # errors that OpenSSL did not make have none
    if connecting and reason in _NO_TLS:
        return f"{address.target} does not speak TLS: http:// and grpc:// are without"
    return f"TLS: {reason.lower().replace('_', ' ')}"


def root_cause(error: BaseException) -> BaseException:
    """The first error of the chain that ends with this one; of several at once, such as one an address, the last."""
    while True:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[-1]
        elif (earlier := error.__cause__ or error.__context__) is not None:  # httpcore2 hides causes with `from None`
            error = earlier
        else:
            return error
