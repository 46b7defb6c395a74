#!/usr/bin/env bash
# Boot this machine's systemd as process 1 of its own namespaces, over an overlay of this machine's root.
# usage: boot-systemd.sh DIRECTORY PAYLOAD FROM=TO...    as root, in a mount namespace of its own
#   DIRECTORY  empty; a tmpfs is mounted there
#   PAYLOAD    files that the machine has beside those of this one
#   FROM=TO    directory of this machine, and where that one sees it
set -euo pipefail
work=$1 payload=$2
shift 2

if [ "${STAGE:-}" != inside ]; then
    mount --make-rprivate /
    mount -t tmpfs -o mode=755 tmpfs "$work"
    mkdir "$work"/{upper,work,root,cgroup}
    # A part of the cgroup tree of its own, or the new systemd would sort this machine's processes.
    mount -t cgroup2 cgroup2 "$work/cgroup"
    group=$work/cgroup/edge-llm-test-$$
    mkdir "$group"
    echo 0 >"$group/cgroup.procs"
    cp -a "$payload/." "$work/upper/"
    chmod 755 "$work/upper"
    mount -t overlay overlay -o "lowerdir=/,upperdir=$work/upper,workdir=$work/work" "$work/root"
    for pair in "$@"; do
        mkdir -p "$work/root${pair#*=}"
        mount -o bind,ro "${pair%%=*}" "$work/root${pair#*=}"
    done
    STAGE=inside exec unshare --mount --pid --fork --kill-child --uts --ipc --net --cgroup \
        bash "$0" "$work" "$payload"
fi

cd "$work/root"
# Only what the tests ask for starts: none of this machine's own services and timers.
rm -rf etc/systemd/system/*.wants usr/lib/systemd/system/{sysinit,sockets,timers,local-fs,multi-user}.target.wants
mount -t proc proc proc
mount -o bind,ro proc/sys proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
for node in null:1:3 zero:1:5 full:1:7 random:1:8 urandom:1:9 tty:5:0; do
    IFS=: read -r name major minor <<<"$node"
    mknod -m 666 "dev/$name" c "$major" "$minor"
done
mkdir dev/{pts,shm}
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
mount -t tmpfs tmpfs dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
mount -t tmpfs -o mode=1777 tmpfs var/tmp
mkdir old
pivot_root . old
umount -l /old
rmdir /old
# Credentials come to a service through mounts that propagate.
mount --make-rshared /
cd /
exec env -i container=edge-llm-test PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd \
    --system --unit=edge-llm-test.target --log-level=info --log-target=journal --show-status=0
