"""What a cluster would do with a manifest of `job manifest`, with processes for pods.

A pod gets the environment, arguments, and volumes of the manifest, and a new one starts or not by
its policies. The first host's name is this machine.
"""

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.command import COMMAND

INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


class Cluster:
    """Runs the Job or JobSet of a manifest to its end."""

    def __init__(self, manifest: str, folder: Path, secrets: Mapping[str, str]) -> None:
        self.config, self.workload = yaml.safe_load_all(manifest)
        spec = self.workload["spec"]
        self.is_slice = self.workload["kind"] == "JobSet"
        self.retries = (
            spec["failurePolicy"]["maxRestarts"] if self.is_slice else spec["backoffLimit"]
        )
        self.job = spec["replicatedJobs"][0]["template"]["spec"] if self.is_slice else spec
        self.folder = folder
        self.secrets = secrets
        self.starts = 0

    def run(self, interrupt: Callable[[int, list[subprocess.Popen[str]]], None]) -> bool:
        """Start pods until they succeed or may not be started again; return whether they did.

        `interrupt` gets the number of the start and the pods, and may end them.
        """
        rule = self.job["podFailurePolicy"]["rules"][0]
        assert rule["action"] == "FailJob"
        while self.starts <= self.retries:
            self.starts += 1
            pods = self._pods()
            interrupt(self.starts, pods)
            codes = [pod.wait(600) for pod in pods]
            if not any(codes):
                return True
            if set(codes) & set(rule["onExitCodes"]["values"]):
                return False
        return False

    def log(self, start: int, index: int = 0) -> str:
        return (self.folder / f"{start}-{index}.log").read_text()

    def _pods(self) -> list[subprocess.Popen[str]]:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        return [self._pod(index, port) for index in range(self.job["completions"])]

    def _pod(self, index: int, port: int) -> subprocess.Popen[str]:
        pod = self.job["template"]["spec"]
        (container,) = pod["containers"]
        mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
        root = self.folder / f"pod-{self.starts}-{index}"  # empty for each pod
        paths = {}
        for volume in pod["volumes"]:
            paths[mounts[volume["name"]]] = root / volume["name"]
            (root / volume["name"]).mkdir(parents=True)
            if "configMap" in volume:
                assert volume["configMap"]["name"] == self.config["metadata"]["name"]
                for name, text in self.config["data"].items():
                    (root / volume["name"] / name).write_text(text)
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("JOB_")
        }
        environment |= {
            "TMPDIR": str(paths["/tmp"]), "JOB_CACHE": str(paths["/cache"]),
        }  # fmt: skip
        for variable in container["env"]:
            if (value := self._value(variable, index)) is not None:
                environment[variable["name"]] = value
        name = self.workload["metadata"]["name"]
        if address := environment.get("JOB_COORDINATOR_ADDRESS"):
            assert address.startswith(f"{name}-host-0-0.{name}:")
            environment["JOB_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
        arguments = [
            str(paths["/spec"]) + a.removeprefix("/spec") if a.startswith("/spec/") else a
            for a in container["args"]
        ]
        with (self.folder / f"{self.starts}-{index}.log").open("w") as log:
            return subprocess.Popen(
                [*COMMAND, *arguments], env=environment, stdout=log, stderr=log, text=True
            )

    def _value(self, variable: dict[str, Any], index: int) -> str | None:
        if "value" in variable:
            return str(variable["value"])
        source = variable["valueFrom"]
        if "fieldRef" in source:
            assert source["fieldRef"]["fieldPath"] == INDEX
            return str(index)
        reference = source["secretKeyRef"]
        assert reference["optional"]
        return self.secrets.get(reference["key"])


def kill(pods: list[subprocess.Popen[str]]) -> None:
    """End pods as a lost node does."""
    for pod in pods:
        pod.send_signal(signal.SIGKILL)
