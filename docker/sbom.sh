#!/usr/bin/env bash
# Print an image's bill of materials: its Python and Debian packages, as CycloneDX JSON. The licenses
# of Python packages are those that they state; Debian's are in /usr/share/doc/PACKAGE/copyright.
#
#   docker/sbom.sh [IMAGE]    default: job:cpu
set -euo pipefail

image=${1:-job:cpu}
id=$(docker image inspect --format '{{.Id}}' "$image")
docker run --rm --interactive --network none --entrypoint python3 "$image" - "$image" "$id" <<'EOF'
import json
import subprocess
import sys
from importlib.metadata import distributions

image, digest = sys.argv[1:]


def component(kind, name, version, purl, license=None):
    entry = {"type": kind, "bom-ref": purl, "name": name, "version": version, "purl": purl}
    return entry | ({"licenses": [{"license": {"name": license}}]} if license else {})


def stated_license(metadata):
    classifiers = metadata.get_all("Classifier") or []
    names = [name.split(" :: ")[-1] for name in classifiers if name.startswith("License :: ")]
    text = (metadata.get("License") or "").partition("\n")[0]
    return metadata.get("License-Expression") or " AND ".join(names) or text or "not stated"


components = []
for package in distributions():
    name, version = package.metadata["Name"].lower().replace("_", "-"), package.version
    license = stated_license(package.metadata)
    components.append(component("library", name, version, f"pkg:pypi/{name}@{version}", license))
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
    "components": sorted(components, key=lambda entry: entry["bom-ref"]),
}
print(json.dumps(bill, indent=1))
EOF
