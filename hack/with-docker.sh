#!/bin/bash
# Runs a command beside a Docker daemon: the one that answers, or else one that is there for as long as the command takes, in a network
# namespace of its own. It is Debian's docker.io, unpacked into the cache and not installed: nothing of it is started on this machine's
# network. The command runs in that namespace too, without a way out.
# Usage: hack/with-docker.sh COMMAND [ARGUMENT..]
set -euo pipefail
if docker version >/dev/null 2>&1; then exec "$@"; fi
if [ "$(id -u)" -ne 0 ]; then
  echo "no Docker daemon answers, and only root can start one" >&2
  exit 1
fi
cache=${MAYFLY_CACHE:-$HOME/.cache/mayfly}/docker name=mayfly-docker run=/run/mayfly-docker
root=$cache/root
packages="docker.io containerd runc tini iptables libip6tc2 libnfnetlink0 libnetfilter-conntrack3 libnftnl11 libxtables12"
if [ ! -e "$root/complete" ]; then
  rm -rf "$root" "$cache/packages"; mkdir -p "$root" "$cache/packages"
  (
    cd "$cache/packages"
    chmod 777 .
    # shellcheck disable=SC2086
    apt-get download -qq $packages || { apt-get update -qq; apt-get download -qq $packages; }
    for package in *.deb; do dpkg -x "$package" "$root"; done
  )
  for tool in iptables ip6tables iptables-save ip6tables-save iptables-restore ip6tables-restore; do
    ln -sf xtables-nft-multi "$root/usr/sbin/$tool"
  done
  touch "$root/complete"
fi
# A privileged container gets every capability there is, by the list of a Docker older than some. A machine for builds may lack
# CAP_SYS_RESOURCE, without which runc fails, and Cilium needs the two that the list lacks.
cat >"$root/runc-here" <<RUNC
#!/bin/bash
previous=
for word in "\$@"; do
  file=
  case \$previous in --bundle) file=\$word/config.json;; --process|-p) file=\$word;; esac
  if [ "\$file" ]; then sed -i 's/"CAP_SYS_RESOURCE",/"CAP_PERFMON","CAP_BPF",/g' "\$file"; fi
  previous=\$word
done
exec "$root/usr/sbin/runc" "\$@"
RUNC
chmod 755 "$root/runc-here"

exec 9>"$cache/lock"
flock --nonblock 9 || { echo "a Docker daemon of $0 runs already" >&2; exit 1; }
mkdir -p $run
ip netns del $name 2>/dev/null || true
ip netns add $name
in_namespace=(nsenter --net=/run/netns/$name --)
"${in_namespace[@]}" ip link set lo up
export PATH=$root/usr/bin:$root/usr/sbin:$PATH DOCKER_HOST=unix://$run/docker.sock
libraries=$root/usr/lib/$(dpkg-architecture -qDEB_HOST_MULTIARCH 2>/dev/null || echo "$(uname -m)-linux-gnu")
"${in_namespace[@]}" env LD_LIBRARY_PATH="$libraries" XTABLES_LIBDIR="$libraries/xtables" dockerd --host "$DOCKER_HOST" \
  --data-root "$cache/data" --exec-root $run/exec --pidfile $run/docker.pid --oom-score-adjust 0 \
  --add-runtime here="$root/runc-here" --default-runtime here >"$cache/dockerd.log" 2>&1 9>&- &
daemon=$!
end() {
  kill $daemon 2>/dev/null || true
  wait $daemon || true
  ip netns del $name
}
trap end EXIT
for _ in $(seq 150); do
  if docker version >/dev/null 2>&1; then "${in_namespace[@]}" "$@" 9>&-; exit; fi
  if ! kill -0 $daemon 2>/dev/null; then break; fi
  sleep 0.2
done
tail -n 20 "$cache/dockerd.log" >&2
echo "the Docker daemon does not start; its log is $cache/dockerd.log" >&2
exit 1
