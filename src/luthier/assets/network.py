"""The hub's client: what it does not take from the environment by itself, and its errors."""

from __future__ import annotations

import os

# Where people put their own certificates, for requests and for curl; the hub's client reads SSL_CERT_FILE alone.
BUNDLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


def trust_own_bundle() -> None:
    """Let the hub's client trust the CA bundle that the environment names under another library's variable."""
    named = next((os.environ[name] for name in BUNDLES if os.environ.get(name)), None)
    if named is not None:
        os.environ.setdefault("SSL_CERT_FILE", named)


def http_error() -> type[Exception]:
    """The root of the HTTP client's errors; which client it is depends on the hub library's version."""
    from huggingface_hub.errors import HfHubHTTPError

    return next((kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"), HfHubHTTPError)
