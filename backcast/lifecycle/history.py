"""What earlier switches changed."""

from typing import Any

from backcast.registry import Registry


def deployment_diff(registry: Registry, generation: int) -> dict[str, Any] | None:
    """Return what a deployment changed, as it was measured before its switch; None: it was not.

    Raises:
        UnknownDeployment: there is none.
    """
    deployment = registry.deployments.get(generation)
    rows = registry.diffs.of(deployment["id"])
    if not rows:
        return None
    first = rows[0]
    versions = [{"version": row["target"], **row["figures"]} for row in rows]
    ids = [version.pop("ids") for version in versions]
    return {
        "version": deployment["version"],
        "snapshot": f"{deployment['snapshot']}.{deployment['delta']}",
        "live_version": deployment["from_version"],
        "baseline": f"{first['baseline_snapshot']}.{first['baseline_delta']}",
        "ids": ids[0],
        "versions": versions,
    }
