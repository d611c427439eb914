"""Known vulnerabilities of the packages that are installed here, by pip-audit. Without a way to the service it passes.

Exit code: 1 if there are any, else 0.
"""

import json
import subprocess
import sys

COMMAND = ["-m", "pip_audit", "--local", "--skip-editable", "--format", "json", "--progress-spinner", "off"]


def main() -> int:
    """Ask, and say what came out in one line, or one for each vulnerability."""
    process = subprocess.run([sys.executable, *COMMAND], capture_output=True, text=True, check=False)
    try:
        packages = json.loads(process.stdout)["dependencies"]
    except (ValueError, KeyError):  # it failed before it had a report
        reason = (process.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(f"vulnerabilities: not looked up, the service can't be reached ({reason})")
        return 0
    found = [
        f"vulnerabilities: {package['name']} {package['version']}: {fault['id']}, "
        f"fixed in {', '.join(fault['fix_versions']) or 'no version'}"
        for package in packages
        for fault in package.get("vulns", ())
    ]
    known = sum("vulns" in package for package in packages)
    if not known:
        print(f"vulnerabilities: not looked up, the service answers for none of the {len(packages)} packages")
        return 0
    print("\n".join(found) or f"vulnerabilities: none in {known} packages; {len(packages) - known} are not known there")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
