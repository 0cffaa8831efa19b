"""The emulated GPU host: a physical machine that does not exist, booted by QEMU."""
