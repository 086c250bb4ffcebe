# Goes on after init.sh: what tests need of a machine, then the tests. {…} are filled in by guest.rs.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mkdir -p /lib/modules
mount --bind {modules} /lib/modules
mount -t tmpfs tmp /tmp
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ip link set lo up
modprobe sctp
# A missing module is a failure here, not a reason to leave the test out.
export SHUNT_EXPECT_SCTP=1
# Agents load their programs for a minute or more here.
export SHUNT_LAB_READY_SECONDS=600
cd {folder}
failed=0
echo "{begin}"
{programs}
echo "{end}$failed"
exec /bin/busybox poweroff -f
