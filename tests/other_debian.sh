#!/bin/sh
# Run a command in another release of Debian, for its Slurm: sh tests/other_debian.sh RELEASE COMMAND...
#
#   TEST_ROLE=trainer sh tests/other_debian.sh forky .venv/bin/python -m pytest -m slurm
#
# Needs root and debootstrap. The release comes from the mirror that apt uses, once, into
# build/debian-RELEASE (or $DEBIAN_ROOT). The command runs there, in this directory, with this clone's
# environments and their Python, which may not be the system's own. Mounts and processes are in
# namespaces of their own, so nothing is left when the command has ended.
set -eu
release=$1
shift
root=${DEBIAN_ROOT:-$PWD/build/debian-$release}
packages=slurmctld,slurmd,slurm-client,munge,slurmdbd,mariadb-server-core,mariadb-client-core
tools=ca-certificates,curl,g++,git,libnuma1,make

if ! [ -e "$root/ready" ]; then
	mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Origin: Debian' 'Label: Debian' | head -n 1)
	mkdir -p "$root"
	# `sid`: how to install it, for releases that are newer than debootstrap.
	debootstrap --variant=minbase --include="$packages,$tools" "$release" "$root" "$mirror" sid
	touch "$root/ready"
fi

prefix=$(.venv/bin/python -c 'import sys; print(sys.base_prefix)')
case $prefix in /usr | /usr/local)
	echo "other_debian.sh: .venv has the system's Python; make it with another (uv, pyenv)" >&2
	exit 2
	;;
esac
binds="$PWD $prefix"
for path in .venv*; do
	binds="$binds $(readlink -f "$path")"
done
cp /etc/hosts /etc/resolv.conf "$root/etc/"
export ROOT="$root" BINDS="$binds" HERE="$PWD"
exec unshare --mount --pid --fork --kill-child sh -euc '
	mount -t proc proc "$ROOT/proc"
	mount --rbind /dev "$ROOT/dev"
	mount -t tmpfs tmpfs "$ROOT/dev/shm"
	mount --rbind /sys "$ROOT/sys"
	for path in $BINDS; do
		mkdir -p "$ROOT$path"
		mount --bind "$path" "$ROOT$path"
	done
	unset BINDS
	exec chroot "$ROOT" sh -c "cd \"\$HERE\" && exec \"\$@\"" sh "$@"
' sh "$@"
