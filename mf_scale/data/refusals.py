"""Refusals: which answers of a server or store no retry mends, and what the user can do about each."""

from __future__ import annotations

from collections.abc import Iterator

from mf_scale.config.urls import ENVIRONMENT

PASSING = (408, 425, 429)
"""The statuses from 400 to 499 that may pass."""
BEHIND = 416
"""The status of a range that begins behind the end of the file."""
PASSING_CODES = ("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded")
"""Codes of an S3 store that may pass, whatever their status."""
GARBLED = "aiohttp.http_exceptions"
"""Where the faults live that aiohttp finds in an answer; it calls them status 400, which no server said."""
CREDENTIALS = "Set {} in the environment, or use credentials that may read it."
PLACE = "Check the url, and that the source is complete (python -m data_tools verify)."
REFUSALS = {
    "NoCredentialsError": ("no credentials were found", CREDENTIALS),
    "PartialCredentialsError": ("the credentials are incomplete", CREDENTIALS),
    "ProfileNotFound": ("the profile of the credentials was not found", CREDENTIALS),
    "UnauthorizedSSOTokenError": ("the sign-on has expired", CREDENTIALS),
    "ParamValidationError": ("the store cannot have such a name", PLACE),
    "NonHttpUrlRedirectClientError": ("the server sends us to something that is not http", PLACE),
    "TooManyRedirects": ("the server sends us in circles", PLACE),
    "InvalidURL": ("this is not a url", PLACE),
    "InvalidUrlClientError": ("this is not a url", PLACE),
    "ClientConnectorCertificateError": (
        "the server's certificate is not trusted",
        "Point SSL_CERT_FILE to the authority that signed it.",
    ),
}
"""By the name of the class, as none of the libraries need be installed: the reason, and the remedy."""
STATUSES = {
    401: ("the server wants other credentials (401)", CREDENTIALS),
    403: ("the server does not allow it (403)", CREDENTIALS),
    404: ("it is not there (404)", PLACE),
    410: ("it is there no more (410)", PLACE),
}


def refusal(error: BaseException, scheme: str) -> tuple[str, str] | None:
    """(reason, remedy) of a fault that will stay; None for one that may pass, as broken connections do."""
    for fault in _chain(error):
        if type(fault).__name__ in REFUSALS:
            reason, remedy = REFUSALS[type(fault).__name__]
            return reason, remedy.format(ENVIRONMENT[scheme])
    status = status_of(error)
    if status is None or not 400 <= status < 500 or status in PASSING or any(map(_passes, _chain(error))):
        return None
    reason, remedy = STATUSES.get(status, (f"the server refuses the request ({status})", PLACE))
    return reason, remedy.format(ENVIRONMENT[scheme])


def status_of(error: BaseException) -> int | None:
    """The http status behind a fault of aiohttp, s3fs or gcsfs; None where no answer came."""
    for fault in _chain(error):
        found = getattr(fault, "status", None) or _boto(fault)[0] or getattr(fault, "code", None)
        if str(found).isdecimal():
            return int(str(found))
    if isinstance(error, FileNotFoundError):
        return 404
    if isinstance(error, PermissionError) or str(error).startswith("Forbidden: "):  # gcsfs says no more than that
        return 403
    return 400 if isinstance(error, ValueError) and str(error).startswith("Bad Request: ") else None


def _passes(fault: BaseException) -> bool:
    """Whether a status is not the server's last word: its code says so, or the answer was garbled on its way."""
    return _boto(fault)[1] in PASSING_CODES or type(fault).__module__ == GARBLED


def _boto(fault: BaseException) -> tuple[object, object]:
    """Status and code of an answer, as botocore's errors carry them."""
    response = getattr(fault, "response", None)
    if not isinstance(response, dict):
        return None, None
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode"), response.get("Error", {}).get("Code")


def _chain(error: BaseException) -> Iterator[BaseException]:
    fault: BaseException | None = error
    while fault is not None:
        yield fault
        fault = fault.__cause__
