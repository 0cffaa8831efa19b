"""Floor 1: frozen values, in the words of the kernel, libvirt and Rocks; no effects."""
