#!/usr/bin/env python3
"""``gpupt up`` against the floor: raw QEMU with the same disks and arguments.

Run it as root on a host that can bring FILE up: a real one, or the emulated one,

    gpupt lab run -- python3 - /root/cluster.yaml <bench/up.py

It brings the cluster up with gpupt, and notes when the last node answered.  Then it ends the
domains, makes the same overlays again, and starts the very QEMU command lines that libvirt
had used, less what only libvirt can serve (its monitor, its passed files), with taps on the
same bridge.  Both stop at the same mark: every node has answered ``gpupt-node facts`` over
SSH.  At the end the cluster is taken down by gpupt.  Python's own library alone is needed.
"""

import argparse
import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

DEADLINE = 1500
DROPPED_ALONE = {"-S"}
DROPPED_PAIRS = {"-sandbox", "-mon", "-msg", "-add-fd", "-pidfile"}


def output(*argv):
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def bring_up(state, file):
    """Seconds from `gpupt up` to the last node's readiness, and to its end."""
    began = time.monotonic()
    child = subprocess.Popen(
        ["gpupt", "--state", state, "up", "--yes", file],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    ready = 0.0
    for line in child.stderr:
        print(f"  {time.monotonic() - began:7.1f} s  {line.rstrip()}", flush=True)
        if " is up after " in line:
            ready = time.monotonic() - began
    if child.wait() != 0 or not ready:
        raise SystemExit("gpupt up did not succeed")
    return ready, time.monotonic() - began


def command_line(domain):
    """The arguments of the domain's QEMU, as it was started."""
    pid = Path(f"/run/libvirt/qemu/{domain}.pid").read_text().strip()
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().rstrip("\0").split("\0")


def without_libvirt(argv, *, tap, console):
    """The command line with what only libvirt can serve left out or replaced."""
    words, skip = [], False
    for word, value in zip(argv, [*argv[1:], ""], strict=True):
        if skip:
            skip = False
        elif word in DROPPED_ALONE:
            pass
        elif word in DROPPED_PAIRS:
            skip = True
        elif word == "-chardev":
            skip = True
            if "charserial0" in value:
                words += ["-chardev", f"file,id=charserial0,path={console}"]
        elif word == "-netdev":
            skip = True
            vhost = "on" if '"vhost":true' in value or "vhost=on" in value else "off"
            how = f"ifname={tap},script=no,downscript=no,vhost={vhost}"
            words += ["-netdev", f"tap,id=hostnet0,{how}"]
        elif word == "-object" and '"secret"' in value:
            skip = True
        else:
            words.append(word)
    return words


def make_tap(name, bridge):
    subprocess.run(["ip", "link", "del", name], capture_output=True, check=False)
    output("ip", "tuntap", "add", name, "mode", "tap")
    output("ip", "link", "set", name, "master", bridge, "up")


def await_nodes(nodes, folder):
    """Return when every node has answered ``gpupt-node facts``."""
    until = time.monotonic() + DEADLINE
    waiting = dict(nodes)
    while waiting:
        for name, address in list(waiting.items()):
            if time.monotonic() > until:
                raise SystemExit(f"{', '.join(waiting)} did not answer within {DEADLINE} s")
            try:
                socket.create_connection((address, 22), timeout=0.5).close()
            except OSError:
                continue
            done = subprocess.run(
                ["ssh", "-i", f"{folder}/id_ed25519", "-o", "BatchMode=yes",
                 "-o", f"UserKnownHostsFile={folder}/known_hosts", "-o", "ConnectTimeout=60",
                 f"root@{address}", "gpupt-node", "facts"],
                capture_output=True, check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            if done.returncode == 0:
                del waiting[name]
        time.sleep(0.2)


def run_raw(nodes, domains, folder, bridge):
    """Seconds until the same nodes are ready under raw QEMU."""
    lines = {node: command_line(domain) for node, domain in domains.items()}
    disks = {node: Path(folder, "nodes", node, "disk.qcow2") for node in nodes}
    backing = {
        node: json.loads(output("qemu-img", "info", "-U", "--output=json", str(disk)))
        for node, disk in disks.items()
    }
    for domain in domains.values():
        output("virsh", "-q", "destroy", domain)
    children, taps = [], []
    try:
        for number in range(len(nodes)):
            taps.append(f"gpupt-raw{number}")
            make_tap(taps[-1], bridge)
        began = time.monotonic()
        for number, node in enumerate(nodes):
            told = backing[node]
            disks[node].unlink(missing_ok=True)
            output(
                "qemu-img", "create", "-q", "-f", "qcow2", "-F", told["backing-filename-format"],
                "-b", told["full-backing-filename"], str(disks[node]), str(told["virtual-size"]),
            )  # fmt: skip
            words = without_libvirt(
                lines[node], tap=taps[number], console=f"/tmp/gpupt-raw-{node}.log"
            )
            with Path(f"/tmp/gpupt-raw-{node}.err").open("wb") as said:
                children.append(
                    subprocess.Popen(
                        words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said
                    )
                )
        await_nodes(nodes, folder)
        return time.monotonic() - began
    finally:
        for child in children:
            child.send_signal(signal.SIGTERM)
        for child in children:
            child.wait()
        for tap in taps:
            subprocess.run(["ip", "link", "del", tap], capture_output=True, check=False)


def main():
    parser = argparse.ArgumentParser(description="gpupt up against raw QEMU")
    parser.add_argument("file")
    parser.add_argument("--state", default="/var/lib/gpupt")
    given = parser.parse_args()
    cluster = re.search(r"^cluster:\s*(\S+)", Path(given.file).read_text(), re.M).group(1)
    subprocess.run(["gpupt", "--state", given.state, "down", "--yes", cluster], check=False)
    try:
        ready, whole = bring_up(given.state, given.file)
        shown = json.loads(output("gpupt", "--state", given.state, "--json", "show", cluster))
        nodes = {node["name"]: node["ip"] for node in shown["nodes"]}
        running = output("virsh", "-q", "list", "--name").split()
        domains = {node: next(d for d in running if d.endswith(node)) for node in nodes}
        network = next(
            n for n in output("virsh", "-q", "net-list", "--name").split() if cluster in n
        )
        bridge = re.search(r"Bridge:\s*(\S+)", output("virsh", "-q", "net-info", network)).group(1)
        folder = f"{given.state}/clusters/{cluster}"
        floor = run_raw(nodes, domains, folder, bridge)
    finally:
        subprocess.run(["gpupt", "--state", given.state, "down", "--yes", cluster], check=False)
    over = (ready - floor) / len(nodes)
    print(f"{len(nodes)} nodes ready: gpupt up {ready:.1f} s (ended at {whole:.1f} s, with the")
    print(f"rolls' checks), raw QEMU {floor:.1f} s")
    print(f"over the floor, a node: {over:.1f} s, allowed {max(2.0, 0.1 * floor):.1f} s")
    print(f"ratio  gpupt up / raw QEMU {ready / floor:.2f} ×   (goal: at most 1.1, or 2 s a node)")


if __name__ == "__main__":
    sys.exit(main())
