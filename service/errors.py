"""One error tree. Every error a user can see has a wire code; adapters translate vendor errors into these."""

from __future__ import annotations


class LongdraftError(Exception):
    """Base of all expected errors. `code` goes on the wire, `status` is the HTTP status it maps to."""

    code: str = "internal_error"
    status: int = 500
    type: str = "server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequest(LongdraftError):
    """The request is malformed or asks for something impossible."""

    code, status, type = "invalid_request", 400, "invalid_request_error"


class Unauthenticated(LongdraftError):
    """No key, or one that is unknown or revoked."""

    code, status, type = "invalid_api_key", 401, "invalid_request_error"


class Forbidden(LongdraftError):
    """The key is good but lacks the scope."""

    code, status, type = "insufficient_scope", 403, "invalid_request_error"


class NotFound(LongdraftError):
    """Unknown, or someone else's: the two answers are byte-identical."""

    code, status, type = "not_found", 404, "invalid_request_error"


class Conflict(LongdraftError):
    """The object is in a state that does not allow this; trying again does not help."""

    code, status, type = "conflict", 409, "invalid_request_error"


class TooLarge(LongdraftError):
    """A body, file or line is over its limit."""

    code, status, type = "too_large", 413, "invalid_request_error"


class UnsupportedEncoding(LongdraftError):
    """The body came compressed or in a media type that is not taken."""

    code, status, type = "unsupported_media_type", 415, "invalid_request_error"


class Unavailable(LongdraftError):
    """A part this service needs (database, broker, object store) does not answer; try again."""

    code, status, type = "service_unavailable", 503, "server_error"


class LeaseLost(LongdraftError):
    """The fencing token was raised by someone else: whatever was about to be written must not be."""

    code, status = "lease_lost", 409


class BlobNotFound(LongdraftError):
    """No object under this key."""

    code, status = "blob_not_found", 404


class BlobCorrupt(LongdraftError):
    """Bytes read back differ from the recorded length or SHA-256."""

    code = "blob_corrupt"


class BlobDenied(Unavailable):
    """The object store refuses our credentials, or has no such bucket: an outage that only the operator can end."""

    code = "storage_denied"


class BucketMissing(BlobDenied):
    """The object store has no such bucket (or hides it from us)."""

    code = "bucket_not_found"


class BucketRefused(LongdraftError):
    """We do not go there ourselves: not an address, a bucket or credentials that this deployment lets projects use."""

    code, status, type = "bucket_not_allowed", 400, "invalid_request_error"


class ModelUnavailable(LongdraftError):
    """A model cannot be loaded here; the message says why and what to do. `lasting`: trying again on this machine will not help."""

    code, status, type = "model_unavailable", 400, "invalid_request_error"

    def __init__(self, message: str, *, lasting: bool = True) -> None:
        super().__init__(message, param="model")
        self.lasting = lasting


class ConfigError(LongdraftError):
    """The configuration names something that does not exist or contradicts itself."""

    code, status, type = "config_error", 400, "invalid_request_error"
