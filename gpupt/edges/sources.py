"""Where packages come from: the machine's own apt and pip configuration, read, never
guessed; no host name stands in this program."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from gpupt.edges.process import run
from gpupt.errors import BadInput, GpuptError

MIRROR_VARIABLE = "GPUPT_DEBIAN_MIRROR"
APT_PROXY = "GPUPT_APT_PROXY_"
SUITE = "trixie"
_CERTIFICATES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
)
_MIRROR_LIST = "mirror+file:"
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@dataclass(frozen=True, slots=True)
class Sources:
    """What a bake downloads from.  ``mirror`` None: mmdebstrap's own default.

    ``environment`` is uv's, and apt's proxies under names of their own; it may hold
    secrets, so it is never printed and goes by no command line.  ``find_links`` are folders.
    """

    mirror: str | None
    environment: Mapping[str, str]
    find_links: tuple[str, ...]
    certificates: Path | None


def architecture() -> str:
    """Debian's name of this machine's architecture."""
    machine = platform.machine()
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


def read_sources(*, mirror: str | None = None) -> Sources:
    """The machine's package sources; ``mirror`` or GPUPT_DEBIAN_MIRROR go before apt's."""
    chosen = mirror or os.environ.get(MIRROR_VARIABLE) or _debian_mirror()
    if chosen and (urlsplit(chosen).username or urlsplit(chosen).password):
        raise BadInput(
            "the Debian mirror's address holds a user name or a password",
            details="it would be written into every image",
            remedy="put it into /etc/apt/auth.conf.d/ and leave it out of the address",
        )
    settings = pip_settings(_pip_config(), os.environ)
    environment, find_links = uv_sources(settings)
    environment |= apt_proxies(_apt_config())
    for name in _PROXIES:
        for spelling in (name, name.upper()):
            if spelling in os.environ:
                environment[spelling] = os.environ[spelling]
    named = settings.get("cert") or os.environ.get("SSL_CERT_FILE")
    certificates = next((Path(p) for p in (named, *_CERTIFICATES) if p and Path(p).is_file()), None)
    return Sources(chosen, environment, find_links, certificates)


def debian_mirror(targets: str) -> str | None:
    """The Debian archive among apt's index targets, lines of ``URI⇥origin⇥label``; None
    when there is none that others can reach, as on a machine that is not Debian.

    Debian's cloud images name a list of mirrors, apt-transport-mirror(1): its first is taken.
    A disc, or a folder of this machine, is of no use inside an image."""
    for line in targets.splitlines():
        uri, _, rest = line.partition("\t")
        origin, _, label = rest.partition("\t")
        if (origin, label) != ("Debian", "Debian"):
            continue
        if uri.startswith(_MIRROR_LIST):
            uri = _first_mirror(Path(uri.removeprefix(_MIRROR_LIST).rstrip("/")))
        if uri.startswith(("http://", "https://")):
            return uri.rstrip("/")
    return None


def _first_mirror(listed: Path) -> str:
    """The first address in a list of mirrors; empty when there is none to read."""
    try:
        lines = listed.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return ""
    words = (line.partition("#")[0].split() for line in lines)
    return next((each[0] for each in words if each), "")


def pip_settings(listing: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Pip's settings by name (``index-url``): ``pip config list``, then PIP_* over it."""
    found: dict[str, str] = {}
    for line in listing.splitlines():
        match = re.fullmatch(r"(?:global|install|user|site)\.([a-z-]+)='(.*)'", line)
        if match:
            found[match[1]] = match[2].replace("\\n", " ").strip()
    for name, value in environment.items():
        if name.startswith("PIP_") and value:
            found[name[4:].lower().replace("_", "-")] = value
    return found


def uv_sources(settings: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Pip's settings as uv's environment, and the folders among its find-links apart."""
    environment: dict[str, str] = {}
    if "index-url" in settings:
        environment["UV_DEFAULT_INDEX"] = settings["index-url"]
    if settings.get("extra-index-url"):
        environment["UV_INDEX"] = " ".join(settings["extra-index-url"].split())
    if settings.get("trusted-host"):
        environment["UV_INSECURE_HOST"] = " ".join(settings["trusted-host"].split())
    if settings.get("no-index", "").lower() in {"1", "true", "yes", "on"}:
        environment["UV_NO_INDEX"] = "1"
    links = shlex.split(settings.get("find-links", ""))
    addresses = [link for link in links if "://" in link]
    if addresses:
        environment["UV_FIND_LINKS"] = ",".join(addresses)
    return environment, tuple(link for link in links if "://" not in link)


def apt_proxies(config: str) -> dict[str, str]:
    """Apt's proxies out of ``apt-config dump``, under APT_PROXY and the scheme in capitals:
    they are apt's alone, often a cache of packages that knows no other traffic."""
    found = re.findall(r'^Acquire::(http|https)::Proxy "(.+)";$', config, re.MULTILINE)
    return {f"{APT_PROXY}{scheme.upper()}": address for scheme, address in found}


def proxies_for_apt(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment that has apt and mmdebstrap use what ``apt_proxies`` found."""
    return {
        f"{name.removeprefix(APT_PROXY).lower()}_proxy": value
        for name, value in environment.items()
        if name.startswith(APT_PROXY)
    }


def _debian_mirror() -> str | None:
    layout = "$(REPO_URI)\t$(ORIGIN)\t$(LABEL)"
    try:
        return debian_mirror(
            run(["apt-get", "indextargets", "--format", layout], deadline=30).stdout
        )
    except GpuptError:
        return None  # no apt: not a Debian, so nothing to learn from it


def _pip_config() -> str:
    try:
        done = run([sys.executable, "-m", "pip", "config", "list"], deadline=60, check=False)
    except GpuptError:
        return ""
    return done.stdout if done.status == 0 else ""


def _apt_config() -> str:
    try:
        return run(["apt-config", "dump"], deadline=30).stdout
    except GpuptError:
        return ""
