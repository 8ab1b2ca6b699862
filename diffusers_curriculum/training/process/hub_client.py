"""The client of the Hub, and its errors in words that hold no token."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, get_token

from diffusers_curriculum.training.errors import HubError


def make_client(token: str | None, api: HfApi | None = None) -> HfApi:
    """The client, by a token that is given or comes from the login.

    Raises:
        HubError: there is no token.
    """
    client = api or HfApi(token=token.strip() if token else None)
    if not (client.token or get_token()):
        raise HubError("no token for the Hub; run `hf auth login` or set HF_TOKEN, and start again")
    return client


@contextmanager
def explained(what: str, advice: str, token: object = None) -> Iterator[None]:
    """Turn whatever the client or its HTTP library raises into one readable HubError.

    It quotes the errors behind that one too (the client tells only which file failed), but does not
    chain them: HTTP libraries quote a header that they refuse, token and all, and a traceback would
    show it.
    """
    try:
        yield
    except Exception as error:
        reason = _without(token, " from ".join(_described(each) for each in _causes(error)))
        raise HubError(f"{what} ({reason}); {advice}") from None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, the one that it came from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def _described(error: BaseException) -> str:
    message = str(error).strip() or "no message"
    return f"{type(error).__name__}: {message.splitlines()[0]}"


def _without(token: object, text: str) -> str:
    """A message without the token, and without anything that follows "Bearer"."""
    for secret in (token, get_token()):
        if isinstance(secret, str) and secret:
            text = text.replace(secret, "***")
    return re.sub(r"(?i)(bearer\s+)[^\s'\"]+", r"\1***", text)
