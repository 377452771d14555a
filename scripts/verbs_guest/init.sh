#!/bin/busybox sh
# The guest's first process: the host's root, read-only, under a layer in memory and the packages that only the guest
# needs; then the tests in it, and off.
/bin/busybox mkdir -p /proc /sys /dev /host /guest /layer /all
/bin/busybox --install -s /bin
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev

go() {
    while read -r module; do
        insmod "/modules/$module" || return
    done </modules/order
    for tag in host guest; do
        mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=512000 "$tag" "/$tag" || return
    done
    mount -t tmpfs -o size=60% tmpfs /layer || return
    mkdir /layer/upper /layer/work
    mount -t overlay -o lowerdir=/guest:/host,upperdir=/layer/upper,workdir=/layer/work overlay /all || return
    for point in proc sys dev; do
        mkdir -p "/all/$point"
        mount --bind "/$point" "/all/$point" || return
    done
    mkdir -p /dev/shm /dev/pts
    mount -t tmpfs tmpfs /all/dev/shm && mount -t devpts devpts /all/dev/pts || return
    . /all/kvmarket-verbs/settings || return
    chroot /all /bin/sh /kvmarket-verbs/tests.sh
}

echo 'verbs-guest: booted'
go
echo "verbs-guest: status $?"
poweroff -f
