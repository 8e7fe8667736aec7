#!/usr/bin/env bash
# Check the locked packages for known vulnerabilities with pip-audit. Exit with 1 if there are any.
#
# If the vulnerability database cannot be reached, print SKIPPED and exit with 0.
set -euo pipefail
cd "$(dirname "$0")/.."

report=$(mktemp -t audit.XXXXXX)
trap 'rm -f "$report" "$report.err"' EXIT
uv tool run --quiet 'pip-audit>=2.9,<3' --disable-pip --require-hashes --progress-spinner off \
  --format json --requirement docker/requirements-tpu.lock >"$report" 2>"$report.err" || true

python3 - "$report" "$report.err" <<'END'
import json
import sys
from pathlib import Path

report, errors = (Path(name).read_text() for name in sys.argv[1:])
packages = json.loads(report)["dependencies"] if report.strip() else []
audited = [package for package in packages if "vulns" in package]
if not audited:
    reason = "it has none of the packages" if packages else errors.strip().splitlines()[-1]
    sys.exit(print(f"SKIPPED: cannot reach the vulnerability database ({reason})"))
vulnerable = [
    f"{package['name']} {package['version']}: {vulnerability['id']}, "
    f"fixed in {', '.join(vulnerability['fix_versions']) or 'no version yet'}"
    for package in audited
    for vulnerability in package["vulns"]
]
print(f"{len(audited)} of {len(packages)} packages audited")
sys.exit("\n".join(vulnerable) or 0)
END
