#!/usr/bin/env bash
# Known vulnerabilities of the locked packages, by pip-audit: exit code 1 where there are any.
#
# Where its source of vulnerabilities cannot be reached, it says so, and finds nothing.
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
    reason = "it knows none of the packages" if packages else errors.strip().splitlines()[-1]
    sys.exit(print(f"skipped: the source of vulnerabilities cannot be reached ({reason})"))
found = [
    f"{package['name']} {package['version']}: {vulnerability['id']}, "
    f"fixed in {', '.join(vulnerability['fix_versions']) or 'no version yet'}"
    for package in audited
    for vulnerability in package["vulns"]
]
print(f"{len(audited)} of {len(packages)} packages audited")
sys.exit("\n".join(found) or 0)
END
