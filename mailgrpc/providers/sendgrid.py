"""Mail by SendGrid's v3 Mail Send: one HTTP request for up to 100 recipients of a message.

    sendgrid://:API-KEY@                     api.sendgrid.com
    sendgrid://:API-KEY@api.eu.sendgrid.com  another host, or host:port
    sendgrid://:KEY@127.0.0.1:8025?scheme=http   without TLS, to the loopback only
    ca_file            PEM roots to trust instead of the system's
    timeout            seconds for the answer (60)
    connect_timeout    seconds to connect (10)

What is promised. The last look is asked when a connection stands and before the first byte of the
request, by a hook in the HTTP client. The same hook divides what a failure proves. With a star: the
channel as a whole (`of_channel`).

    no free connection        DEFERRED     TIMEOUT; see smtp.py for why it is not the channel's
    connecting              * DEFERRED     DNS, CONNECTION, TLS or TIMEOUT
    after the first byte      UNKNOWN      CONNECTION or TIMEOUT; PROVIDER: the answer is not HTTP
    202                       ACCEPTED     provider_message_id is X-Message-Id
    307, 308                  DEFERRED     PROVIDER: say it elsewhere (sendgrid_answers.py)
    400                       REJECTED     CONTENT; see below for groups
    401, 403                * DEFERRED     CREDENTIALS; a 403 that names a field has no star
    403 that names `from`     REJECTED     SENDER: not a verified sender identity
    413                       REJECTED     TOO_LARGE
    408                       DEFERRED     TIMEOUT
    429                     * DEFERRED     RATE_LIMITED, by Retry-After or X-RateLimit-Reset
    another 4xx               DEFERRED     PROVIDER: the wrong host or path
    5xx                       UNKNOWN      PROVIDER: nothing documents that it was not accepted
    anything else             UNKNOWN      PROVIDER: 202 alone says that the mail was taken

An answer counts from the end of its header on, whatever becomes of the rest. One that breaks off
within the header does not, although its status was read: RFC 9112, 8 forbids to rely on it.
1xx is no answer and is read past.

What can go wrong.
- One bad address makes SendGrid refuse the whole request with 400. That proves that nobody was
  sent anything, so the recipients are tried one by one within the same call, each after a look of
  its own. Where every error names a field outside the personalizations, it is the message that is
  wrong, and no such retry is made. The first of them that fails for the whole channel ends it for
  those behind it, and so does the end of the attempt's time.
- A kept connection that the server has closed: the request's bytes may have met a dead socket, or
  may not. That is UNKNOWN, however likely it is that nothing was read. It is made rare: a
  connection is reused for 5 s at most, and the pool looks for the server's FIN before each use.

Why this way. The body comes from the `sendgrid` package (`sendgrid_body.py`), the sending does not:
its client blocks and has no time-outs. Proxies and certificates are not taken from the environment,
because a proxy would get the first byte before the look.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from mailgrpc import failpoints
from mailgrpc.core.delivery import Cause, Outcome, Result, result_text
from mailgrpc.core.message import MailMessage
from mailgrpc.errors import Violation
from mailgrpc.providers.channel_url import (
    ChannelUrl,
    choice,
    existing_file,
    is_loopback,
    seconds,
)
from mailgrpc.providers.provider import (
    Addressee,
    Grouping,
    ProbeFailed,
    SendCall,
    everyone,
    worker_lost,
)
from mailgrpc.providers.sendgrid_answers import (
    Answer,
    concerns_recipients,
    error_text,
    result_of,
)
from mailgrpc.providers.sendgrid_body import check_message, request_body

DEFAULT_HOST = "api.sendgrid.com"
KEEPALIVE_S = 5.0
MAX_BODY = 64 * 1024
BODY_S = 5.0
"""How long the rest of an answer may take once its status is known."""


class SendGridProvider:
    """A pool of connections to the API with one key. Serves one event loop."""

    name = "sendgrid"
    grouping = Grouping.PERSONAL
    group_max = 100

    def __init__(
        self,
        *,
        base_url: str,
        api_key: str,
        concurrency: int,
        attempt_timeout_s: float,
        timeout_s: float = 60.0,
        connect_timeout_s: float = 10.0,
        ca_file: str | None = None,
    ) -> None:
        self._attempt_timeout_s = attempt_timeout_s
        self._client = httpx.AsyncClient(
            base_url=base_url,
            headers={"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"},
            timeout=httpx.Timeout(timeout_s, connect=connect_timeout_s, pool=attempt_timeout_s),
            limits=httpx.Limits(
                max_connections=concurrency,
                max_keepalive_connections=concurrency,
                keepalive_expiry=KEEPALIVE_S,
            ),
            verify=ssl.create_default_context(cafile=ca_file),
            trust_env=False,
        )

    @classmethod
    def from_url(
        cls, url: ChannelUrl, concurrency: int, attempt_timeout_s: float
    ) -> SendGridProvider:
        """The provider for a sendgrid:// URL. Raises SettingsError."""
        if url.user or not url.password:
            raise url.fault("sendgrid:// needs the API key as its password: sendgrid://:KEY@")
        if not (url.password.isascii() and url.password.isprintable() and " " not in url.password):
            raise url.fault("the API key has characters that no key has")
        host = url.host or DEFAULT_HOST
        scheme = url.parameter("scheme", choice("https", "http"), "https")
        if scheme == "http" and not is_loopback(host):
            raise url.fault("scheme=http is for the loopback: the API key would go in the clear")
        shown_host = f"[{host}]" if ":" in host else host
        ca_file = url.parameter("ca_file", existing_file, None)
        timeout_s = url.parameter("timeout", seconds, 60.0)
        connect_timeout_s = url.parameter("connect_timeout", seconds, 10.0)
        url.finish()
        return cls(
            base_url=f"{scheme}://{shown_host}{f':{url.port}' if url.port else ''}",
            api_key=url.password,
            concurrency=concurrency,
            attempt_timeout_s=attempt_timeout_s,
            timeout_s=timeout_s,
            connect_timeout_s=connect_timeout_s,
            ca_file=str(ca_file) if ca_file else None,
        )

    def check(self, message: MailMessage) -> list[Violation]:
        """What SendGrid's documented limits rule out."""
        return check_message(message)

    async def send(self, call: SendCall) -> list[Result]:
        """One request, or one a recipient where the group was refused as a whole."""
        deadline = asyncio.get_running_loop().time() + self._attempt_timeout_s
        result, is_divisible = await self._request(call, call.addressees, deadline)
        if not is_divisible or len(call.addressees) == 1:
            return everyone(call, result)
        results: list[Result] = []
        for addressee in call.addressees:
            if not result.of_channel:
                result, _ = await self._request(call, [addressee], deadline)
            results.append(result)
        return results

    async def _request(
        self, call: SendCall, addressees: Sequence[Addressee], deadline: float
    ) -> tuple[Result, bool]:
        """The result of one request, and whether its recipients may fare better one by one."""
        try:
            body = request_body(call, addressees)
        except ValueError as error:
            text = result_text(str(error))
            return Result(Outcome.REJECTED, Cause.CONTENT, text=text), False
        gate = _Gate(call.last_look, deadline)
        request = self._client.build_request(
            "POST", "/v3/mail/send", content=body, extensions={"trace": gate.trace}
        )
        try:
            answer = await self._answer(request, deadline)
        except _LookedAway:
            return worker_lost(), False
        except _IO_ERRORS as error:
            return gate.failure(error), False
        return result_of(answer), answer.status == 400 and concerns_recipients(answer)

    async def _answer(self, request: httpx.Request, deadline: float) -> Answer:
        """The answer, as soon as its status is known: a body that breaks off changes nothing."""
        async with asyncio.timeout_at(deadline):
            response = await self._client.send(request, stream=True)
        failpoints.reach("http.answered")
        body = bytearray()
        body_deadline = min(deadline, asyncio.get_running_loop().time() + BODY_S)
        try:
            async with asyncio.timeout_at(body_deadline):
                async for block in response.aiter_bytes(MAX_BODY):
                    body += block
                    if len(body) >= MAX_BODY:
                        break
        except _IO_ERRORS:
            pass
        finally:
            await response.aclose()
        return Answer(response.status_code, response.headers, bytes(body[:MAX_BODY]))

    async def probe(self) -> str:
        """Ask which scopes the key has; it needs `mail.send`."""
        host = self._client.base_url.host
        deadline = asyncio.get_running_loop().time() + self._attempt_timeout_s
        try:
            answer = await self._answer(self._client.build_request("GET", "/v3/scopes"), deadline)
        except _IO_ERRORS as error:
            failure = _failure(error, Outcome.DEFERRED)
            raise ProbeFailed(f"{host}: {failure.cause.name}: {failure.text}") from None
        if answer.status in (401, 403):
            raise ProbeFailed(f"{host}: the API key is refused: {error_text(answer)}")
        if answer.status != 200:
            raise ProbeFailed(f"{host}: HTTP {answer.status}: {error_text(answer)}")
        if "mail.send" not in answer.body.decode("utf-8", "replace"):
            raise ProbeFailed(f"{host}: the API key lacks the scope mail.send")
        return f"{host}: ready, the API key may send mail"

    async def close(self) -> None:
        """End the pooled connections."""
        await self._client.aclose()


class _LookedAway(Exception):
    """The last look said no."""


_IO_ERRORS = (httpx.HTTPError, OSError, UnicodeError)
"""What a request may raise: httpx lets errors of TLS (an OSError) and of host names that are none
(UnicodeError, by the resolver) through as they are."""


class _Gate:
    """The hook that stands where the first byte of a request is written."""

    def __init__(self, last_look: Callable[[], bool], deadline: float) -> None:
        self._last_look = last_look
        self._deadline = deadline
        self._is_connecting = False
        self._has_begun = False

    async def trace(self, event: str, info: dict[str, Any]) -> None:  # noqa: ARG002  httpcore's
        """Called by httpcore at each step; what it raises ends the request."""
        if event == "connection.connect_tcp.started":
            self._is_connecting = True
        elif event == "http11.send_request_headers.started":
            self._is_connecting = False
            # A request that has no time left is not begun: cut off, it would prove nothing.
            if asyncio.get_running_loop().time() >= self._deadline:
                raise TimeoutError("the time of the attempt was over before the request")
            if not self._last_look():
                raise _LookedAway
            failpoints.reach("http.request")
            self._has_begun = True
        elif event == "http11.send_request_body.complete":
            failpoints.reach("http.requested")

    def failure(self, error: Exception) -> Result:
        """What it means that the request had no answer."""
        outcome = Outcome.UNKNOWN if self._has_begun else Outcome.DEFERRED
        return _failure(error, outcome, of_channel=self._is_connecting)


def _failure(error: Exception, outcome: Outcome, *, of_channel: bool = False) -> Result:
    chain = _chain(error)
    cause = Cause.CONNECTION
    if isinstance(error, (httpx.TimeoutException, TimeoutError)):
        cause = Cause.TIMEOUT
    elif isinstance(error, httpx.RemoteProtocolError) and "disconnected" not in str(error):
        cause = Cause.PROVIDER
    elif any(isinstance(link, ssl.SSLError) for link in chain):
        cause = Cause.TLS
    elif any(isinstance(link, (socket.gaierror, UnicodeError)) for link in chain):
        cause = Cause.DNS
    text = str(error) or ("no answer in time" if cause is Cause.TIMEOUT else type(error).__name__)
    return Result(outcome, cause, text=result_text(text), of_channel=of_channel)


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error and what it came from: httpx, httpcore and anyio each wrap it once."""
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
