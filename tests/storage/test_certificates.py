"""A network's own authority is trusted by every client alike; a wrong certificate ends at once."""

import os
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import trustme

from job.errors import JobError, SetupError
from job.evals.api_client import ChatClient
from job.spec.remote import Reference
from job.storage.certificates import share_bundle
from job.storage.hub import Repository
from job.storage.locations import open_store
from tests.conversations import turns

VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


class _Refusing(BaseHTTPRequestHandler):
    """Answers everything with 418: who gets that far trusts the certificate."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(418)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def authority(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The certificate of the authority of a service, which all clients are told to use."""
    made = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    until = getattr(request, "param", None)
    made.issue_cert("localhost", not_after=until).configure_cert(context)
    made.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with ThreadingHTTPServer(("localhost", 0), _Refusing) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"https://localhost:{server.server_port}"
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        monkeypatch.setenv("REMOTE_URL", url)
        for name in (*VARIABLES, "SSL_CERT_DIR"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        huggingface_hub.close_session()  # its client has read the variables
        yield tmp_path / "ca.pem"
        huggingface_hub.close_session()
        server.shutdown()


def hub() -> str:
    with pytest.raises(JobError) as refused:
        Repository("model", "org/m").commit()
    return str(refused.value)


def cloud_storage() -> str:
    with pytest.raises(JobError) as refused:
        open_store("gs://bucket/run").read("results.json")
    return str(refused.value)


def remote_model() -> str:
    section = Reference(model="m", base_url=os.environ["REMOTE_URL"], attempts=5)
    return ChatClient(section, "sk-key").complete(turns("hello")).error or ""


@pytest.mark.parametrize("ask", [hub, cloud_storage, remote_model])
def test_an_untrusted_certificate_is_no_outage(ask: Callable[[], str], authority: Path) -> None:
    message = ask()
    assert "certificate is not trusted" in message
    assert "SSL_CERT_FILE" in message
    assert "gave up" not in message
    assert "tried" not in message


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("ask", [hub, cloud_storage, remote_model])
def test_one_variable_holds_for_every_client(
    ask: Callable[[], str], variable: str, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(authority))
    share_bundle()
    assert "418" in ask()


@pytest.mark.parametrize("authority", [datetime.now() - timedelta(days=1)], indirect=True)
def test_a_clock_that_may_be_wrong_is_shown(
    authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    share_bundle()
    for ask in (hub, cloud_storage, remote_model):
        assert "not valid at this machine's time, 20" in ask()


def test_a_bundle_that_is_not_there_is_named(
    authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CURL_CA_BUNDLE", str(authority.with_name("missing.pem")))
    with pytest.raises(SetupError, match=r"CURL_CA_BUNDLE=.*missing.pem: there is no such file"):
        share_bundle()
