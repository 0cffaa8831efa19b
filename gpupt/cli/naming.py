"""What people call a GPU: an address, or an alias from STATE/aliases.yaml."""

from __future__ import annotations

from pathlib import Path

from gpupt.errors import BadInput
from gpupt.model.pci import PciAddress


def alias_file(state: Path) -> Path:
    """Where the aliases of a state folder stand, if it has any."""
    return state / "aliases.yaml"


def named_gpu(text: str, *, state: Path) -> PciAddress:
    """The address that a word stands for; raises BadInput.

    The aliases are read only for a word that is no address.
    """
    try:
        return PciAddress.parse(text)
    except BadInput as error:
        file = alias_file(state)
        aliases = read_aliases(file) if file.exists() else {}
        if text in aliases:
            return aliases[text]
        known = ", ".join(sorted(aliases)) or "none"
        raise BadInput(
            error.brief,
            details=(*error.details, f"aliases in {file}: {known}"),
            remedy=error.remedy,
        ) from None


def read_aliases(file: Path) -> dict[str, PciAddress]:
    """The aliases of a file that maps names to addresses; raises BadInput with line and column."""
    from gpupt.edges.yamlfile import read_yaml

    found = {}
    for name, value in read_yaml(file).entries().items():
        try:
            found[name] = PciAddress.parse(value.text())
        except BadInput:
            value.wrong(f"alias {name!r} is no PCI address", expected="such as 0000:41:00.0")
    return found
