"""Urls of sources: which are read, and that no secret stands in one or in what is said about it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from mf_scale.errors import UserError

EXTRAS = {"http": "http", "https": "http", "s3": "s3", "gs": "gcs"}
"""Schemes that are read, and the extra that installs what each needs."""
ENVIRONMENT = {
    "http": "MF_SCALE_HTTP_AUTHORIZATION (the whole Authorization header, such as 'Bearer …')",
    "https": "MF_SCALE_HTTP_AUTHORIZATION (the whole Authorization header, such as 'Bearer …')",
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE (AWS_ENDPOINT_URL for a store of your own)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS (a key file)",
}
"""Where credentials come from, by scheme."""
SECRETS = ("MF_SCALE_HTTP_AUTHORIZATION", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY")
"""Variables whose values nothing may repeat."""
SECRET_WORDS = ("api_key", "apikey", "password", "secret", "access_key", "token", "credential")
"""What the name of a key has in it whose value is a secret."""
HIDDEN = "***"

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_USER = re.compile(r"(?<=://)[^/\s'\"]*@")
_QUERY = re.compile(r"(://[^\s?#'\"<>]*)[?#][^\s'\"<>]+")


def scheme_of(source: str) -> str:
    """Scheme of a source: one of EXTRAS, or "" for a local folder.

    Raises UserError for every other scheme and for a url that holds credentials: it would be written to disk.
    """
    found = _SCHEME.match(source)
    if not found:
        return ""
    scheme = found[1].lower()
    if scheme not in EXTRAS or not source[found.end() :].startswith("//"):
        raise UserError(
            f"sources of the kind {scheme + ':'!r} are not read",
            where=redact(source),
            remedy=f"Give a local folder (./{redact(source)} if it is one) or a url of {', '.join(EXTRAS)}.",
        )
    if not _is_plain(source):
        raise UserError(
            "the url of a source holds credentials or a query, or has no host",
            where=f"{scheme}://{HIDDEN}",
            remedy=f"Give the plain url, and credentials in the environment: {ENVIRONMENT[scheme]}.",
        )
    return scheme


def redact(text: str) -> str:
    """The text without users, passwords and queries of its urls, and without the secrets of the environment."""
    text = _QUERY.sub(rf"\1?{HIDDEN}", _USER.sub(f"{HIDDEN}@", text))
    secrets = {part for name in SECRETS for part in (os.environ.get(name, ""), os.environ.get(name, "").split(" ")[-1])}
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= 4:  # hiding less would spoil ordinary words
            text = text.replace(secret, HIDDEN)
    return text


def without_secrets(value: Any, name: str = "") -> Any:
    """Mappings, lists and texts with `redact` applied, and without what stands under the name of a secret."""
    if isinstance(value, Mapping):
        return {key: without_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item, name) for item in value]
    if any(word in name.lower() for word in SECRET_WORDS):
        return HIDDEN
    return redact(value) if isinstance(value, str) else value


def _is_plain(url: str) -> bool:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises where it is not a number, as with a slash in a password
    except ValueError:
        return False
    return bool(parts.hostname) and "@" not in parts.netloc and not set("?#") & set(url)
