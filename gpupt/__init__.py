"""gpupt: turns a host with GPUs into a virtual GPU cluster, and gives every GPU back."""

__version__ = "0.1.0"
