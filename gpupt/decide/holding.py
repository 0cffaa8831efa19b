"""What is said of a process that holds a GPU, and what makes it let go; pure."""

from __future__ import annotations

from shlex import quote

from gpupt.model.host import Holder


def holder_line(holder: Holder) -> str:
    """Who holds which node, where it belongs, in a line."""
    if not holder.pid:
        return f"no process has it open, and {holder.command} keeps it in use all the same"
    how = "mapped" if holder.mapped else "open"
    where = belonging(holder)
    return f"PID {holder.pid} ({holder.command}){where and f' in {where}'} has {holder.node} {how}"


def belonging(holder: Holder) -> str:
    """The container, else the unit, that a process belongs to; empty for neither."""
    of_user = "" if holder.user is None else f" of user {holder.user}"
    if holder.container is None:
        return f"{holder.unit}{of_user}" if holder.unit else ""
    if holder.runtime in {"guest", "machine"}:
        return f"{holder.runtime} {holder.container}"
    runtime = {"kubernetes": "", "libvirt-lxc": "libvirt "}.get(
        holder.runtime or "", f"{holder.runtime} "
    )
    of_pod = f" of pod {holder.pod}" if holder.pod else ""
    return f"{runtime}container {holder.container}{of_pod}{of_user}"


def way_to_stop(holder: Holder) -> str:
    """What to type so that a process lets go of a GPU, and is not started again."""
    name = quote(holder.container or "")
    if holder.pod:
        return (
            f"crictl pods --label io.kubernetes.pod.uid={holder.pod} names the pod; "
            "then kubectl delete pod, or kubectl drain this machine"
        )
    as_user = "" if holder.user is None else f" as user {holder.user}"
    match holder.runtime:
        case "docker" | "podman" | "nerdctl":
            return f"{holder.runtime} stop {name}{as_user}"
        case "cri-o" | "containerd":
            return f"crictl stop {name}"
        case "guest":
            return f"virsh shutdown {name} (gpupt down CLUSTER for a cluster's node)"
        case "libvirt-lxc":
            return f"virsh -c lxc:///system shutdown {name}"
        case "lxc":
            return f"lxc-stop -n {name} (Incus: incus stop {name})"
        case "machine":
            return f"machinectl poweroff {name}"
    unit = holder.unit or ""
    # To stop a session, or the manager of a user's units, is to log the user out.
    if not unit or unit == "init.scope" or unit.startswith(("session-", "user@")):
        return f"kill {holder.pid}"
    manager = "" if holder.user is None else f"--user -M {holder.user}@.host "
    return f"systemctl {manager}stop {quote(unit)}"
