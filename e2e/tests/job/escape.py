"""A hostile job that tries every way out of its container that needs no bug in the kernel, and to get at the gate of its pod.

It says, a line each: `status=` what the kernel holds it to, `open=` and `shut=` for every way, `writable=` what of the kernel's files
it could write, `foreign=` processes that are not its own container's, `killed=` how many it killed. Whatever opens is not used.
"""
import ctypes, os, re, signal, socket, stat, sys, time

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long
NEWUSER, NEWNS, NEWPID, NEWNET = 0x10000000, 0x00020000, 0x20000000, 0x40000000
# x86-64 and arm64.
NUMBERS = {'init_module': (175, 105), 'finit_module': (313, 273), 'kexec_load': (246, 104), 'bpf': (321, 280), 'perf_event_open': (298, 241),
           'userfaultfd': (323, 282), 'open_by_handle_at': (304, 265), 'io_uring_setup': (425, 425), 'syslog': (103, 116),
           'add_key': (248, 217), 'quotactl': (179, 60), 'acct': (163, 89), 'swapon': (167, 224), 'reboot': (169, 142)}


def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def call(name, *arguments):
    number = NUMBERS[name][os.uname().machine != 'x86_64']
    check(LIBC.syscall(ctypes.c_long(number), *(ctypes.c_long(argument) for argument in arguments)))


def ways():
    yield 'a user namespace', lambda: check(LIBC.unshare(NEWUSER))
    yield 'a mount namespace', lambda: check(LIBC.unshare(NEWNS))
    yield 'a process namespace', lambda: check(LIBC.unshare(NEWPID))
    yield 'a network namespace', lambda: check(LIBC.unshare(NEWNET))
    yield 'mounting proc', lambda: check(LIBC.mount(b'proc', b'/tmp', b'proc', 0, None))
    yield 'mounting cgroups', lambda: check(LIBC.mount(b'none', b'/tmp', b'cgroup2', 0, None))
    yield 'mounting anew', lambda: check(LIBC.mount(b'none', b'/sys', None, 0x1020, None))
    yield 'unmounting', lambda: check(LIBC.umount2(b'/proc/sys', 2))
    yield 'another root', lambda: os.chroot('/tmp')
    yield 'being root', lambda: os.setuid(0)
    yield "the gate's user", lambda: os.setuid(65532)
    yield 'other groups', lambda: os.setgroups([0])
    yield 'a device', lambda: os.mknod('/tmp/device', stat.S_IFBLK | 0o600, os.makedev(8, 0))
    yield 'a raw socket', lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)
    yield 'a packet socket', lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    yield 'the network of the machine below', lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    yield 'setting interfaces', lambda: setting()
    yield 'another host name', lambda: socket.sethostname('other')
    yield 'the clock', lambda: time.clock_settime(time.CLOCK_REALTIME, time.time())
    for name in NUMBERS:
        yield name, lambda name=name: call(name, 0, 0, 0, 0, 0)


def setting():
    import fcntl, struct
    with socket.socket() as some:
        # SIOCSIFFLAGS: takes the loopback interface down.
        fcntl.ioctl(some, 0x8914, struct.pack('16sh14s', b'lo', 0, b''))


def attempt(name, way):
    """In a process of its own: what opens changes nothing here."""
    child = os.fork()
    if child == 0:
        try:
            way()
            print('open=' + name, flush=True)
        except OSError as error:
            print(f'shut={name}: {error.strerror}', flush=True)
        os._exit(0)
    os.waitpid(child, 0)


def writable():
    for top in '/sys', '/proc/sys', '/proc/irq', '/proc/bus', '/proc/fs', '/proc/sysrq-trigger', '/proc':
        for folder, folders, names in os.walk(top) if os.path.isdir(top) else [(os.path.dirname(top), [], [os.path.basename(top)])]:
            if folder == '/proc':
                folders[:] = []
            for name in names:
                path = os.path.join(folder, name)
                try:
                    state = os.lstat(path)
                    if stat.S_ISREG(state.st_mode):
                        os.close(os.open(path, os.O_WRONLY))
                        print('writable=' + path)
                except OSError:
                    pass


def processes():
    own = {int(name) for name in os.listdir('/proc') if name.isdigit()}
    for pid in own:
        status = open(f'/proc/{pid}/status').read()
        if 'Uid:\t1001\t' not in status or 'gate' in status.splitlines()[0]:
            print('foreign=' + status.splitlines()[0])
    for pid in set(range(1, 1 << 15)) - own:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            continue
        except PermissionError:
            pass
        # It may have begun meanwhile.
        if not os.path.exists(f'/proc/{pid}'):
            print(f'foreign={pid}')
    print(f'processes={len(own)}')
    # All that it may kill but itself and those that wait for it; its own first process the kernel keeps.
    mine, kept = os.getpid(), set()
    while mine > 0:
        kept.add(mine)
        mine = int(open(f'/proc/{mine}/stat').read().rsplit(')', 1)[1].split()[1])
    killed = 0
    for pid in set(range(2, 1 << 15)) - kept:
        try:
            os.kill(pid, signal.SIGKILL)
            killed += 1
        except OSError:
            pass
    print(f'killed={killed}')


if __name__ == '__main__':
    bystander = os.fork()
    if bystander == 0:
        # Nobody waits for the end of its output.
        os.dup2(os.open('/dev/null', os.O_RDWR), 1)
        os.dup2(1, 2)
        signal.pause()
    for line in open('/proc/self/status'):
        if re.match(r'(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp:)', line):
            print('status=' + re.sub(r'\s+', ' ', line).strip())
    print('uid_map=' + ' '.join(open('/proc/self/uid_map').read().split()))
    sys.stdout.flush()
    for name, way in ways():
        attempt(name, way)
    writable()
    processes()
    print('tried=all')
