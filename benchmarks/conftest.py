"""What pytest-benchmark stores: nothing that names a machine or a person."""

from __future__ import annotations

from typing import Any


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Without the host's name, and the long list of what its processor can do."""
    machine_info["node"] = machine_info["release"] = ""
    machine_info.get("cpu", {}).pop("flags", None)


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    """Without the branch, which is often a person's."""
    commit_info.pop("branch", None)


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Without the single rounds, which are most of the file."""
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
