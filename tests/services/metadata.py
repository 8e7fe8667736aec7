"""A stand-in for the metadata server that every VM of Google Cloud reaches.

It serves what `infra/startup.sh` and Google's own client libraries ask for: attributes, the
project, the VM's name and zone, and access tokens of its service account. Like the real one it
refuses whoever does not send `Metadata-Flavor: Google`.
"""

from collections.abc import Mapping

from tests.services.base import Reply, Request, Service, json_reply

_ROOT = "/computeMetadata/v1/"


class Metadata(Service):
    """The metadata of one VM."""

    def __init__(self, project: str, attributes: Mapping[str, str], token: str) -> None:
        super().__init__()
        self._project = project
        self.attributes = dict(attributes)
        self._token = token

    @property
    def host(self) -> str:
        """What GCE_METADATA_HOST is to hold."""
        return self.url.removeprefix("http://")

    def respond(self, request: Request, body: bytes) -> Reply:
        """Answer one question."""
        flavor = {"Metadata-Flavor": "Google", "Content-Type": "application/text"}
        if request.headers.get("Metadata-Flavor") != "Google":
            return Reply(403, b"Missing Metadata-Flavor:Google header.", flavor)
        path = request.route.removeprefix(_ROOT)
        if path == "project/project-id":
            return Reply(200, self._project.encode(), flavor)
        if path == "instance/attributes/" and request.query.get("recursive") == "true":
            return json_reply(self.attributes, headers=flavor)
        if path == "instance/service-accounts/default/token":
            token = {"access_token": self._token, "expires_in": 3600, "token_type": "Bearer"}
            return json_reply(token, headers=flavor)
        value = self.attributes.get(path.removeprefix("instance/attributes/"))
        if value is None:
            return Reply(404, b"Not Found", flavor)
        return Reply(200, value.encode(), flavor)
