#!/bin/bash
# Run a command in a virtual machine whose cgroup v2 has all controllers, which a container or a
# machine with version 1 has not:
#
#   TEST_ROLE=trainer bash tests/cgroup_vm.sh forky .venv/bin/python -m pytest tests/test_slurm_cgroups.py
#
# The machine has the Debian that tests/other_debian.sh has made, this directory, the environments and
# their Python, read-only below a file system in memory. It is emulated, in one thread, since a start
# with several hangs at times: ten times slower, but needs no KVM. Needs root, qemu-system-x86,
# busybox-static and cpio; the kernel is that of apt's release.
set -euo pipefail
root=${DEBIAN_ROOT:-$PWD/build/debian-$1}
shift
work=$PWD/build/vm
mkdir -p "$work/initrd"/{bin,proc,sys,dev,lower,tmp,new,modules}
if [ ! -e "$work/boot" ]; then
	image=$(apt-cache depends linux-image-amd64 | sed -n 's/ *Depends: *//p' | head -n 1)
	(cd "$work" && apt-get -qq download "$image" && dpkg -x "$image"_*.deb . && rm ./*.deb)
fi
modules=$(echo "$work"/lib/modules/*/kernel)
for name in virtio/virtio_ring virtio/virtio virtio/virtio_pci_legacy_dev \
	virtio/virtio_pci_modern_dev virtio/virtio_pci netfs/netfs fscache/fscache 9p/9pnet \
	9p/9pnet_virtio 9p/9p overlayfs/overlay; do
	for path in "$modules"/{drivers,fs,net}/"$name".ko; do
		[ -e "$path" ] && cp "$path" "$work/initrd/modules/" && echo "${path##*/}"
	done
done >"$work/initrd/modules/order"
cp /bin/busybox "$work/initrd/bin/"

shares=("$PWD" "$(.venv/bin/python -c 'import sys; print(sys.base_prefix)')")
for path in .venv*; do
	shares+=("$(readlink -f "$path")")
done
share() { echo "-virtfs local,path=$1,mount_tag=$2,security_model=none,readonly=on,multidevs=remap"; }
options=$(share "$root" root)
mounts=
for i in "${!shares[@]}"; do
	options+=" $(share "${shares[$i]}" "s$i")"
	mounts+="mkdir -p '/new${shares[$i]}'; mount -t 9p -o \$how s$i '/new${shares[$i]}'"$'\n'
done
printf '%s\n' "cd '$PWD'" "export TEST_ROLE='${TEST_ROLE:-}' PYTHONPATH='$PWD'" \
	"export PYTHONDONTWRITEBYTECODE=1 HOME=/root" "${*@Q}" >"$work/initrd/command"

cat >"$work/initrd/init" <<X
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod /modules/\$module; done </modules/order
how=trans=virtio,version=9p2000.L,msize=524288,cache=loose,ro
mount -t 9p -o \$how root /lower
mount -t tmpfs upper /tmp
mkdir /tmp/upper /tmp/work
mount -t overlay -o lowerdir=/lower,upperdir=/tmp/upper,workdir=/tmp/work root /new
for each in proc sys dev; do mount --move /\$each /new/\$each; done
mkdir -p /new/dev/shm /new/dev/pts
for each in dev/shm run tmp; do mount -t tmpfs \$each /new/\$each; done
mount -t devpts pts /new/dev/pts
mount -t cgroup2 cgroup /new/sys/fs/cgroup
$mounts
cp /command /new/tmp/command
# slurmd asks for an address of any interface that is not 127.0.0.1.
ifconfig lo 127.0.0.1 up
ip addr add 10.0.0.1/32 dev lo
hostname vm
echo "127.0.0.1 localhost vm" >/new/etc/hosts
exec switch_root /new /bin/sh -c '
	export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
	sh /tmp/command
	echo "exit code \$?"
	echo o >/proc/sysrq-trigger
	sleep 60'
X
chmod +x "$work/initrd/init"
(cd "$work/initrd" && find . | cpio --quiet -o -H newc | gzip -1) >"$work/initrd.gz"

# shellcheck disable=SC2086
qemu-system-x86_64 -accel tcg,thread=single -cpu max -smp 2 -m 3G -nodefaults -display none \
	-no-reboot -serial stdio -net none -kernel "$work"/boot/vmlinuz-* -initrd "$work/initrd.gz" \
	-append "console=ttyS0 quiet loglevel=3 panic=-1 cryptomgr.notests" $options |
	sed -u 's|\r$||' | tee "$work/console.log"
grep -qx "exit code 0" "$work/console.log"
