"""Every error a caller or an operator can meet. Each carries a stable code, an HTTP status and a hint.

FluxgateError
├── BadRequest            400  the request cannot be read
├── Unauthorized          401  no key, or a wrong one
├── Forbidden             403  the key lacks a scope
├── NotFound              404  not there, or not yours
├── RequestTimeout        408  the body came too slowly
├── Conflict              409  the state forbids it
├── PayloadTooLarge       413
├── UnsupportedMediaType  415
├── Unprocessable         422  well-formed, but does not fit the workflow
│   ├── Moderated              the deployment's judge refuses a text or a picture
│   ├── UrlRefused             a URL leads where the gateway does not go
│   └── UrlFailed              a URL did not give what was asked for
├── TooManyRequests       429  with Retry-After
├── JobFailed             500  a request that waited for its job cannot have pictures; the job says why
├── NoInstance            503  no instance can serve it; names what is missing
└── Unavailable           503  a part the gateway stands on is out of reach
    ├── RedisUnavailable
    ├── StorageUnavailable
    ├── ModerationUnavailable
    ├── HubUnavailable         whose a Hugging Face token is cannot be asked
    └── InstanceError          one ComfyUI did not do what was asked
        ├── InstanceUnreachable    nothing answered: it may or may not have acted
        ├── PromptRejected         it answered: the graph is not accepted there
        └── OutputMissing          a picture it announced cannot be read
"""

from __future__ import annotations

from typing import Any, ClassVar

from gateway.redaction import hide_in, hide_secrets


class FluxgateError(Exception):
    """The root. `details` names the parameter, the value and what is allowed, where there are such.

    What is repeated of a request may hold a secret: it is hidden here, for all who read, log or keep the error.
    """

    status: ClassVar[int] = 500
    code: str = "internal_error"
    hint: str | None = None

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        hint: str | None = None,
        details: dict[str, Any] | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = hide_secrets(message)
        self.code = code or self.code
        self.hint = hint if hint is not None else self.hint
        self.details: dict[str, Any] = hide_in(details or {})
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The one shape in which every error leaves the gateway."""
        return {"error": {"code": self.code, "message": self.message, "hint": self.hint, "details": self.details}}


class BadRequest(FluxgateError):
    status = 400
    code = "bad_request"


class Unauthorized(FluxgateError):
    status = 401
    code = "unauthorized"


class Forbidden(FluxgateError):
    status = 403
    code = "forbidden"


class NotFound(FluxgateError):
    status = 404
    code = "not_found"


class RequestTimeout(FluxgateError):
    status = 408
    code = "request_timeout"


class Conflict(FluxgateError):
    status = 409
    code = "conflict"


class PayloadTooLarge(FluxgateError):
    status = 413
    code = "payload_too_large"


class UnsupportedMediaType(FluxgateError):
    status = 415
    code = "unsupported_media_type"
    hint = "Send JSON with Content-Type: application/json."


class Unprocessable(FluxgateError):
    status = 422
    code = "unprocessable"


class Moderated(Unprocessable):
    code = "moderated"
    hint = "Ask for something else; the operator of this deployment decides what it draws."


class UrlRefused(Unprocessable):
    code = "url_refused"
    hint = "Name a public https URL. ALLOW_PRIVATE_URLS lets an operator exempt places of the own network."


class UrlFailed(Unprocessable):
    code = "url_failed"
    hint = "Try the URL from elsewhere: it must answer 200 over https, in time, with what is allowed here."


class TooManyRequests(FluxgateError):
    status = 429
    code = "too_many_requests"


class JobFailed(FluxgateError):
    code = "job_failed"


class NoInstance(FluxgateError):
    status = 503
    code = "no_instance"


class Unavailable(FluxgateError):
    status = 503
    code = "unavailable"


class RedisUnavailable(Unavailable):
    code = "redis_unavailable"
    hint = "Jobs already accepted are safe in Redis and go on when it is back. Try again in a few seconds."


class StorageUnavailable(Unavailable):
    code = "storage_unavailable"
    hint = "Check S3_ENDPOINT_URL, the credentials and the bucket; GET /ready names what is out of reach."


class ModerationUnavailable(Unavailable):
    code = "moderation_unavailable"
    hint = "Nothing is drawn unjudged here. Try again; the operator finds the reason in the gateway's log."


class HubUnavailable(Unavailable):
    code = "hub_unavailable"
    hint = "Callers whose token was asked about lately go on, and so do API keys. Try again in a few seconds."


class InstanceError(Unavailable):
    code = "instance_error"


class InstanceUnreachable(InstanceError):
    code = "instance_unreachable"


class PromptRejected(InstanceError):
    """ComfyUI refused the graph. `node_errors` is its own report, by node id; `rest_is_queued` when it runs the other branches."""

    code = "graph_rejected"

    def __init__(self, message: str, *, node_errors: dict[str, Any] | None = None, rest_is_queued: bool = False) -> None:
        super().__init__(message)
        self.node_errors, self.rest_is_queued = node_errors or {}, rest_is_queued


class OutputMissing(InstanceError):
    code = "output_missing"
