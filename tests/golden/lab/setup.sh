set -eu
modprobe 9pnet_virtio
mkdir -p /var/lib/gpupt/images
tries=0; until mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,ro images /var/lib/gpupt/images; do tries=$((tries+1)); test $tries -lt 120; sleep 0.5; done
modprobe kvm_amd || modprobe kvm_intel || true
echo 0 > /sys/module/kvm/parameters/halt_poll_ns || true
modprobe bochs
echo 10de 1cb6 > /sys/bus/pci/drivers/bochs-drm/new_id
modprobe uio_pci_generic
echo 10de 2330 > /sys/bus/pci/drivers/uio_pci_generic/new_id
echo 10de 1eb8 > /sys/bus/pci/drivers/bochs-drm/new_id
modprobe snd_hda_intel
