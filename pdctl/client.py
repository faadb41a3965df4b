"""The router's admin listener, as pdctl asks it.

Whatever the network or the listener does becomes a ``Failure`` with its exit code and what
to do next.  The environment's proxies are not used: an admin listener is not behind them.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pdctl.exits import ExitCode, Failure
from pdctl.render import printable

if TYPE_CHECKING:
    import httpx

READY_S = 2.0
STATUS_CODES = {
    400: ExitCode.USAGE,
    401: ExitCode.DENIED,
    403: ExitCode.DENIED,
    404: ExitCode.NOT_FOUND,
    408: ExitCode.TIMEOUT,
    409: ExitCode.CONFLICT,
    422: ExitCode.USAGE,
    504: ExitCode.TIMEOUT,
}
HINTS = {
    ExitCode.DENIED: "pdctl sends no credentials; use --server with a listener that you may ask",
    ExitCode.NOT_FOUND: "pdctl request list shows what lives; ended requests are forgotten in time",
    ExitCode.TIMEOUT: "pdctl status shows what is in the way; --timeout waits longer",
    ExitCode.CONFLICT: "pdctl status shows what is in the way; wait for it, or pdctl pause first",
    ExitCode.FAILED: "the router's log says more",
}


class AdminClient:
    """One admin listener; every call is bounded by ``timeout_s``."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s

    def get(self, path: str) -> Any:
        """Fetch JSON."""
        return self._ask("GET", path)

    def post(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, float] | None = None,
    ) -> Any:
        """Ask for something to be done; returns the answer's JSON."""
        return self._ask("POST", path, body, params)

    def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, float] | None = None,
    ) -> Any:
        import httpx

        try:
            # Reading the certificate store costs more than the whole request does.
            verify = self.url.startswith("https:")
            with httpx.Client(timeout=self._timeout_s, trust_env=False, verify=verify) as client:
                answer = client.request(method, self.url + path, json=body, params=params)
        except httpx.ConnectError as error:
            raise _unreachable(self.url, str(error)) from None
        except httpx.TimeoutException:
            raise Failure(
                ExitCode.TIMEOUT,
                f"{self.url}{path} did not answer within {self._timeout_s:g} s",
                HINTS[ExitCode.TIMEOUT],
            ) from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise Failure(
                ExitCode.USAGE, f"{self.url}: {error}", "--server wants http://HOST:PORT"
            ) from None
        except httpx.HTTPError as error:
            raise _unreachable(self.url, f"{type(error).__name__}: {error}") from None
        return _content(self.url + path, answer)


def unready_reason(url: str) -> str:
    """Ask one of a router's listeners whether it can serve; returns why not, empty if so."""
    import httpx

    try:
        answer = httpx.get(f"{url}/readyz", timeout=READY_S, trust_env=False, verify=False)
    except httpx.HTTPError as error:
        return f"{url}/readyz: {type(error).__name__}"
    if answer.is_success:
        return ""
    try:
        content = answer.json()
    except ValueError:
        content = None
    return printable(_reason(content)) or f"{url}/readyz: {answer.status_code}"


def _unreachable(url: str, reason: str) -> Failure:
    return Failure(
        ExitCode.NO_CONNECTION,
        f"cannot reach {url}: {printable(reason)}",
        "pdctl up starts a cluster; --server names another admin listener",
    )


def _content(url: str, answer: "httpx.Response") -> Any:
    try:
        content = answer.json()
    except ValueError:
        content = None
    if answer.is_success and content is not None:
        return content
    if answer.is_success:
        raise Failure(
            ExitCode.FAILED,
            f"{url} answered {answer.status_code} with something other than JSON",
            "is that a router's admin listener? pdctl status shows the local cluster's",
        )
    code = STATUS_CODES.get(answer.status_code, ExitCode.FAILED)
    reason = _reason(content) or answer.reason_phrase
    raise Failure(
        code, f"{url}: {answer.status_code}: {printable(reason)}", HINTS.get(code, "pdctl --help")
    )


def _reason(content: object) -> str:
    error = content.get("error") if isinstance(content, dict) else None
    if isinstance(error, dict):
        error = error.get("message")
    return error if isinstance(error, str) else ""
