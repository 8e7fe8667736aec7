#!/usr/bin/env bash
# The bill of materials of an image: its Python and Debian packages, as CycloneDX JSON on stdout.
#
#   docker/sbom.sh [IMAGE]    job:cpu by default
set -euo pipefail

image=${1:-job:cpu}
id=$(docker image inspect --format '{{.Id}}' "$image")
docker run --rm --interactive --network none --entrypoint python3 "$image" - "$image" "$id" <<'EOF'
import json
import subprocess
import sys
from importlib.metadata import distributions

image, digest = sys.argv[1:]


def component(kind, name, version, purl, licence=None):
    found = {"type": kind, "bom-ref": purl, "name": name, "version": version, "purl": purl}
    return found | ({"licenses": [{"license": {"name": licence}}]} if licence else {})


components = []
for package in distributions():
    name, version = package.metadata["Name"].lower().replace("_", "-"), package.version
    licence = package.metadata.get("License-Expression")
    components.append(component("library", name, version, f"pkg:pypi/{name}@{version}", licence))
listed = subprocess.run(
    ["dpkg-query", "--show", "--showformat=${Package} ${Version} ${Architecture}\n"],
    capture_output=True, text=True, check=True,
)
for line in listed.stdout.splitlines():
    name, version, architecture = line.split()
    purl = f"pkg:deb/debian/{name}@{version}?arch={architecture}&distro=debian-13"
    components.append(component("library", name, version, purl))
bill = {
    "bomFormat": "CycloneDX",
    "specVersion": "1.6",
    "version": 1,
    "metadata": {"component": {"type": "container", "name": image, "version": digest}},
    "components": sorted(components, key=lambda found: found["bom-ref"]),
}
print(json.dumps(bill, indent=1))
EOF
