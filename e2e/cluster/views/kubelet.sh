# The kubelet sets kernel parameters that are the whole machine's. It finds them set: files with the values it wants, in the folder `data`,
# lie over the real ones, in its own view only. (Not in the node's view: containers with user namespaces may mount a new procfs only where
# the old one is visible whole.)
mount --make-rprivate /proc
mkdir -p $data
while read -r name value; do
  file=$data/$(echo $name | tr / .)
  echo $value >$file
  mount --bind $file /proc/sys/$name
done <<'VALUES'
vm/overcommit_memory 1
vm/panic_on_oom 0
kernel/panic 10
kernel/panic_on_oops 1
kernel/keys/root_maxkeys 1000000
kernel/keys/root_maxbytes 25000000
VALUES
