# What Cilium's agent sees differently from its node. `data` is a folder of its own.

# Once in a mount namespace:
# 1. `kernel.*` parameters are the machine's and read-only (it only logs a warning);
# 2. a kernel without modules has no /proc/modules, which the agent insists on: a tmpfs of links into the real procfs lies over /proc,
#    with a list of what is built in;
# 3. a BPF file system, which lives as long as the namespace does.
see() {
  mkdir -p $data/bpf $data/cgroup $data/proc.real $data/proc.shim
  mount --bind /proc/sys/kernel /proc/sys/kernel
  mount -o remount,ro,bind /proc/sys/kernel
  mount -t bpf bpf $data/bpf
  if [ ! -e /proc/modules ]; then
    mount --rbind /proc $data/proc.real
    mount -t tmpfs -o mode=755 tmpfs $data/proc.shim
    for entry in $(ls $data/proc.real); do
      case $entry in [2-9]*|1?*) ;; *) ln -s $data/proc.real/$entry $data/proc.shim/$entry;; esac
    done
    printf '%s 0 0 - Live 0x0\n' ip_tables iptable_nat iptable_mangle iptable_raw iptable_filter \
      ip6_tables ip6table_mangle ip6table_raw ip6table_filter xt_socket >$data/proc.shim/modules
    mount --move $data/proc.shim /proc
  fi
}

# In each process that becomes the agent: it is looked up in /proc by its pid. Those that are gone are taken away.
appear() {
  if [ -e $data/proc.real/self ]; then
    find /proc -maxdepth 1 -xtype l -delete
    ln -sfn $data/proc.real/$$ /proc/$$
  fi
}
