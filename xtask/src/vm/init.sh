#!/bin/busybox sh
# The first process: mounts the machine's root below a layer in memory, and goes on there.
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do
    insmod "/modules/$module" || echo "cannot load $module"
done < /modules/order
mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=512000,cache=loose root /lower
mount -t tmpfs layer /layer
mkdir /layer/upper /layer/work
mount -t overlay -o lowerdir=/lower,upperdir=/layer/upper,workdir=/layer/work root /new
# Over the other machine's, which 9p shows too.
mount -t proc proc /new/proc
mount -t devtmpfs dev /new/dev
mount -t sysfs sys /new/sys
mount -t tmpfs run /new/run
cp /guest.sh /new/run/
exec switch_root /new /bin/sh /run/guest.sh
