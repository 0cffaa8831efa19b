"""The demo's summary.json, and what the jobs of the demo print, as values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpupt.errors import Failed
from gpupt.model.demo import (
    ClassifierResult,
    DemoNode,
    DemoSummary,
    Exercise,
    HostPicture,
    Sample,
    SeenGpu,
    SparkResult,
    TaskGpus,
    TimelineEntry,
)
from gpupt.model.pci import PciAddress, PciId


def summary_json(summary: DemoSummary) -> dict[str, Any]:
    """CONTRACT's demo-report/summary.json; keys beyond the contract's are added, none taken."""
    phases: dict[str, float] = {}
    for entry in summary.timeline:
        phases[entry.phase] = round(phases.get(entry.phase, 0.0) + entry.seconds, 2)
    return {
        "schema": 1,
        "ok": summary.ok,
        "seconds": round(summary.seconds, 2),
        "phases": phases,
        "host": _host(summary.host),
        "gpus": [
            {
                "address": str(gpu.address),
                "id": str(gpu.id),
                "name": gpu.name,
                "before": gpu.before.driver,
                "during": gpu.during.driver,
                "after": gpu.after.driver,
                "lent_to": gpu.during.holder if gpu.was_lent else None,
            }
            for gpu in summary.host.gpus
        ],
        "nodes": [_node(node) for node in summary.nodes],
        "spark": _spark(summary.spark),
        "classifier": _classifier(summary.classifier),
        "restored": summary.restored,
        "cluster": summary.cluster,
        "began": summary.began,
        "version": summary.version,
        "failure": summary.failure or None,
        "timeline": [_entry(entry) for entry in summary.timeline],
        # A demo that did not end well proves nothing.
        "proves": list(summary.proves) if summary.ok else [],
        "does_not_prove": list(summary.does_not_prove),
    }


def _host(host: HostPicture) -> dict[str, Any]:
    return {
        "emulated": host.emulated,
        "name": host.name,
        "cpus": host.cpus,
        "memory": host.memory,
        "kernel": host.kernel,
        "distribution": host.distribution,
        "libvirt": host.libvirt,
        "qemu": host.qemu,
        "iommu": host.iommu,
        "accelerator": host.accelerator,
        "groups": [
            {"number": group.number, "members": [str(f.address) for f in group.functions]}
            for group in host.groups
        ],
    }


def _node(node: DemoNode) -> dict[str, Any]:
    return {
        "name": node.name,
        "role": node.role.value,
        "ip": node.ip,
        "cpus": node.cpus,
        "memory": node.memory,
        "gpus_seen": [
            {
                "address": str(gpu.address),
                "vendor_id": f"{gpu.id.vendor:04x}",
                "device_id": f"{gpu.id.device:04x}",
                "class": None if gpu.class_code is None else f"{gpu.class_code:06x}",
            }
            for gpu in node.gpus_seen
        ],
        "lent": [str(address) for address in node.lent],
        "exercises": [
            {
                "address": str(done.address),
                "factorial": None if done.factorial is None else f"{done.factorial:#x}",
                "dma": done.dma,
            }
            for done in node.exercises
        ],
        "domain_type": node.domain_type or None,
        "ready_seconds": node.ready,
    }


def _spark(spark: SparkResult | None) -> dict[str, Any] | None:
    if spark is None:
        return None
    return {
        "workers": spark.workers,
        "gpu_addresses": [
            {"host": given.host, "task": given.task, "addresses": list(given.addresses)}
            for given in spark.gpu_addresses
        ],
        "job_seconds": spark.job_seconds,
    }


def _classifier(found: ClassifierResult | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "trained_on": found.trained_on,
        "applied_to": found.applied_to,
        "accuracy": found.accuracy,
        "kappa": found.kappa,
        "majority_baseline": found.majority_baseline,
        "parquet": found.parquet,
        "colour_baseline": found.colour_baseline,
        "confusion": [list(row) for row in found.confusion],
        "seeds": [{"seed": seed, "accuracy": accuracy} for seed, accuracy in found.seeds],
        "synthetic": found.synthetic,
        "trained_where": found.trained_where or None,
        "applied_where": list(found.applied_where),
        "train_seconds": found.train_seconds,
        "apply_seconds": found.apply_seconds,
    }


def _entry(entry: TimelineEntry) -> dict[str, Any]:
    return {
        "phase": entry.phase,
        "start": round(entry.start, 2),
        "end": round(entry.end, 2),
        "status": entry.status.value,
        "detail": entry.detail,
        "command": entry.command,
    }


def spark_result(job: Mapping[str, Any]) -> SparkResult:
    """What ``gpupt run NAME gpu-addresses`` printed, as a value; raises Failed."""
    try:
        return SparkResult(
            workers=int(job["workers"]),
            gpu_addresses=tuple(
                TaskGpus(
                    str(given["host"]), int(given["task"]), tuple(map(str, given["addresses"]))
                )
                for given in job["gpu_addresses"]
            ),
            job_seconds=float(job["job_seconds"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _unexpected("gpu-addresses", error) from None


def classifier_result(job: Mapping[str, Any]) -> ClassifierResult:
    """What ``gpupt run NAME classify`` printed, as a value; raises Failed."""
    try:
        (tn, fp), (fn, tp) = job["confusion"]
        return ClassifierResult(
            trained_on=int(job["trained_on"]),
            applied_to=int(job["applied_to"]),
            accuracy=float(job["accuracy"]),
            kappa=float(job["kappa"]),
            majority_baseline=float(job["majority_baseline"]),
            parquet=str(job["parquet"]),
            confusion=((int(tn), int(fp)), (int(fn), int(tp))),
            samples=tuple(map(_sample, job.get("samples", ()))),
            seeds=tuple(
                (int(tried["seed"]), float(tried["accuracy"])) for tried in job.get("seeds", ())
            ),
            synthetic=bool(job.get("synthetic", True)),
            trained_where=str(job.get("trained_where") or ""),
            applied_where=tuple(map(str, job.get("applied_where", ()))),
            colour_baseline=_number(job.get("colour_baseline")),
            train_seconds=_number(job.get("train_seconds")),
            apply_seconds=_number(job.get("apply_seconds")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _unexpected("classify", error) from None


def _sample(data: Mapping[str, Any]) -> Sample:
    return Sample(
        image=str(data["image"]),
        stained=bool(data["stained"]),
        predicted=bool(data["predicted"]),
        probability=_number(data.get("probability")),
        specimen=str(data.get("specimen", "")),
        media_type=str(data.get("media_type", "image/jpeg")),
    )


def _number(given: float | str | None) -> float | None:
    return None if given is None else float(given)


def seen_gpus(facts: Mapping[str, Any]) -> tuple[SeenGpu, ...]:
    """The GPUs in what ``gpupt-node facts`` printed, or in a node of ``gpupt show``, which
    leaves the class out; raises Failed."""
    try:
        return tuple(
            SeenGpu(
                PciAddress.parse(gpu["address"]),
                PciId(int(gpu["vendor_id"], 16), int(gpu["device_id"], 16)),
                int(gpu["class"], 16) if "class" in gpu else None,
            )
            for gpu in facts["gpus"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _unexpected("gpupt-node facts", error) from None


def exercises(printed: Mapping[str, Any]) -> tuple[Exercise, ...]:
    """What ``gpupt-node exercise`` printed, as values; raises Failed.

    The factorial comes as a number or as hex text (``0x375f00``)."""
    try:
        return tuple(
            Exercise(PciAddress.parse(gpu["address"]), _whole(gpu["factorial"]), gpu["dma"])
            for gpu in printed["gpus"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _unexpected("gpupt-node exercise", error) from None


def _whole(given: int | str | None) -> int | None:
    return int(given, 16) if isinstance(given, str) else given


def _unexpected(what: str, error: Exception) -> Failed:
    return Failed(
        f"{what} printed something other than its JSON object",
        details=f"{type(error).__name__}: {error}",
    )
